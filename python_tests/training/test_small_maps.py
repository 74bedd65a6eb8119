"""bfloat16 on a processor: not where maps are so small that weights meet nothing but padding."""

import json

import numpy as np
import pytest
from torch import nn
from torchvision.models import resnet18

import sela_ext
from sela_ext.errors import OptionError
from sela_ext.training import resolve
from sela_ext.training.small_maps import unmet_weights

TINY = {
    "model": "resnet18", "epochs": 1, "batch_size": 8, "clusters": [3, 3], "label_passes": 1, "label_source": "eval",
    "projection": 0, "threads": 1, "progress": False, "device": "cpu", "half_resolution": 0.0,
}  # fmt: skip


# Kernel, stride, side of the map: where the gradients of bfloat16 were found to be wrong, and where right.
WRONG = [(3, 2, 1), (3, 4, 3), (5, 1, 1), (5, 2, 1), (7, 1, 2), (11, 1, 4), (11, 4, 2)]
RIGHT = [(1, 2, 1), (3, 1, 1), (3, 2, 2), (3, 4, 4), (5, 1, 2), (5, 2, 2), (7, 1, 3), (11, 4, 56)]


@pytest.mark.parametrize(("kernel", "stride", "side"), WRONG + RIGHT)
def test_convolutions_of_which_bfloat16_computes_wrong_gradients_are_found(kernel, stride, side):
    conv = nn.Conv2d(1, 1, kernel, stride, padding=kernel // 2)
    assert bool(unmet_weights(conv, 1, [side])) == ((kernel, stride, side) in WRONG)


def test_resnet18_meets_nothing_at_16_pixels_and_not_at_32():
    network = resnet18().train()
    expected = "layer4.0.conv1 sees maps of 1 x 1 when images are 16 x 16"
    assert unmet_weights(network, 3, [32, 16]) == expected
    assert unmet_weights(network, 3, [32]) == ""
    assert network.training
    assert not network.layer4[0].conv1._forward_pre_hooks
    assert int(network.bn1.num_batches_tracked) == 0


def test_valid_and_same_padding_are_no_trouble():
    assert unmet_weights(nn.Conv2d(1, 1, 3, padding="same"), 1, [1]) == ""
    assert unmet_weights(nn.Conv2d(1, 1, 3, stride=2, padding="valid"), 1, [3]) == ""
    assert unmet_weights(nn.Flatten(), 1, [3]) == ""


def images():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)


def test_precision_is_float32_where_bfloat16_would_be_wrong_and_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(resolve, "_choose_precision", lambda device: ("bfloat16", "the processor multiplies it"))
    sela_ext.train(images(), out=tmp_path / "run", image_size=16, **TINY)
    written = json.loads((tmp_path / "run" / "options.json").read_text())
    assert written["options"]["precision"] == "float32"
    assert "wrong gradients" in written["reasons"]["precision"]
    assert "layer4.0.conv1 sees maps of 1 x 1" in written["reasons"]["precision"]


@pytest.mark.parametrize(
    "size", [{"image_size": 16}, {"image_size": 32, "half_resolution": 0.5}, {"crops": "2x32+2x16"}]
)
def test_bfloat16_that_was_asked_for_is_refused_where_it_would_be_wrong(tmp_path, size):
    told = r"precision: expected float32 on the CPU .*layer4\.0\.conv1 sees maps of 1 x 1 when images are 16 x 16"
    with pytest.raises(OptionError, match=told):
        sela_ext.train(
            images(), out=tmp_path / "run", dry_run=True, precision="bfloat16", **{**TINY, "image_size": 32, **size}
        )


def test_bfloat16_stays_where_maps_are_large_enough(tmp_path):
    planned = sela_ext.train(images(), out=tmp_path / "run", dry_run=True, precision="bfloat16", image_size=32, **TINY)
    assert planned is not None
