import numpy as np
import pytest

from sela_ext.data import open_source
from sela_ext.training.options import make_options
from sela_ext.training.resolve import resolve


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
