import numpy as np
import pytest

from sela_ext.data import open_source
from sela_ext.errors import DataError
from sela_ext.training.options import make_options
from sela_ext.training.resolve import probe_image_size, resolve


def test_images_that_cannot_be_read_are_named_with_the_reason(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(
        DataError, match=r"none of the images looked at can be read: .*a\.jpg: empty file.*; sela doctor"
    ):
        probe_image_size(open_source(tmp_path))


@pytest.mark.parametrize(
    ("images", "epochs", "reason"),
    [
        (31, 160, "the most that are chosen by themselves, for 31 images"),
        (20_001, 99, "about 2 million images seen, of 20001"),
        (100_001, 20, "the fewest that are chosen by themselves, for 100001 images"),
    ],
)
def test_the_reason_for_the_number_of_epochs_is_true(images, epochs, reason):
    source = open_source(np.zeros((images, 1, 1), np.uint8))
    plan = resolve(make_options({"clusters": 3}), {"clusters"}, source)
    assert plan.options.epochs == epochs
    assert plan.reasons["epochs"] == reason
