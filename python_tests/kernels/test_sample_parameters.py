"""Drawn parameters: equal to the twin bit for bit, in torchvision's distributions, without state."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from sela_ext import kernels
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import Augment, reference

SHAPES = [(1, 1), (2, 5), (32, 32), (1, 3000), (3000, 1), (375, 500), (4000, 6000), (7, 3)]


@pytest.mark.parametrize("preset", ["none", "flip", "resized_crop", "sela", "cifar", "eval"])
@pytest.mark.parametrize("key", [(0, 0, 0), (2**64 - 1, 2**32 - 1, 255), (123456789012345, 77, 3)])
def test_kernel_and_twin_draw_the_same_bits(preset, key):
    augment = getattr(Augment, preset)(31)
    seed, epoch, view = key
    index = np.concatenate([np.arange(1001), np.array([2**32, 2**40 - 1, 2**33 + 5])])
    sizes = np.array([SHAPES[i % len(SHAPES)] for i in range(len(index))])
    arguments = (augment, sizes[:, 0], sizes[:, 1], index)
    ours = kernels.sample_parameters(*arguments, seed=seed, epoch=epoch, view=view)
    assert ours.tobytes() == reference.sample_parameters(*arguments, seed=seed, epoch=epoch, view=view).tobytes()


def test_wide_ratios_and_jitter_probability_draw_the_same_bits_as_the_twin():
    augment = Augment.sela(32, ratio=(0.01, 50.0), scale=(0.5, 0.9), jitter_probability=0.8, hue=(-0.5, 0.1))
    arguments = (augment, 40, 60, np.arange(3001))
    ours = kernels.sample_parameters(*arguments, seed=5, epoch=1)
    assert ours.tobytes() == reference.sample_parameters(*arguments, seed=5, epoch=1).tobytes()
    assert 0.77 < ours["jitter"].mean() < 0.83


def test_a_draw_depends_on_nothing_but_its_own_key():
    augment = Augment.sela(32)
    whole = kernels.sample_parameters(augment, 50, 40, np.arange(100), seed=1, epoch=2)
    part = kernels.sample_parameters(augment, 50, 40, [63, 7], seed=1, epoch=2)
    assert part.tobytes() == whole[[63, 7]].tobytes()


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 3}, {"view": 1}])
def test_seed_epoch_and_view_each_give_other_draws(change):
    augment = Augment.sela(32)
    key = {"seed": 1, "epoch": 2, "view": 0}
    a = kernels.sample_parameters(augment, 500, 400, np.arange(1000), **key)
    b = kernels.sample_parameters(augment, 500, 400, np.arange(1000), **{**key, **change})
    assert (a["top"] == b["top"]).mean() < 0.1
    assert (a["brightness"] == b["brightness"]).mean() < 0.01
    assert 0.4 < (a["flip"] == b["flip"]).mean() < 0.6


@pytest.mark.parametrize("size", [(375, 500), (60, 300), (32, 32)])
def test_boxes_have_torchvisions_distribution(size):
    """Two-sample Kolmogorov-Smirnov against torchvision's own sampler; the fallback box included (60 x 300)."""
    from scipy.stats import ks_2samp

    augment = Augment.resized_crop(32)
    ours = kernels.sample_parameters(augment, *size, np.arange(3000), seed=11, epoch=0)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(32, antialias=True)
    image = torch.zeros(3, *size)
    theirs = [crop.make_params([image]) for _ in range(3000)]
    for name in ("top", "left", "height", "width"):
        assert ks_2samp(ours[name], [p[name] for p in theirs]).pvalue > 1e-3
    assert (ours["top"] + ours["height"] <= size[0]).all()
    assert (ours["left"] + ours["width"] <= size[1]).all()


def test_factors_flags_and_orders_are_uniform():
    p = kernels.sample_parameters(Augment.sela(32), 32, 32, np.arange(24_000), seed=4, epoch=0)
    for name in ("brightness", "contrast", "saturation"):
        assert p[name].min() >= np.float32(0.6)
        assert p[name].max() <= np.float32(1.4)
        assert abs(p[name].mean() - 1) < 0.01
        assert abs(p[name].std() - 0.8 / math.sqrt(12)) < 0.01
    assert abs(p["hue"].mean()) < 0.01
    assert abs(p["gray"].mean() - 0.2) < 0.01
    assert abs(p["flip"].mean() - 0.5) < 0.015
    _, counts = np.unique(p["order"], axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 850
    assert counts.max() < 1150
    for a in ("flip", "gray", "brightness", "hue", "top"):
        for b in ("contrast", "saturation", "left"):
            if (a, b) == ("top", "left"):  # both small where the box is large
                continue
            assert abs(np.corrcoef(p[a], p[b])[0, 1]) < 0.03


@pytest.mark.parametrize("size", [(1, 1), (30, 50), (50, 31), (256, 256), (300, 225), (1000, 333), (37, 36)])
@pytest.mark.parametrize("side", [1, 31, 224])
def test_eval_is_torchvisions_resize_and_center_crop(size, side):
    augment = Augment.eval(side)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    params = kernels.sample_parameters(augment, *size, [0], seed=0, epoch=0)
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    x = functional.center_crop(functional.resize(x, [augment.resize_side], antialias=True), [side, side])
    expected = functional.normalize(x, list(augment.mean), list(augment.std))
    found = kernels.augment([image], params, augment)[0]
    assert (found - expected).abs().max() < 0.01 / 255 / min(augment.std)


def test_refusals_name_the_range():
    augment = Augment.sela(32)
    with pytest.raises(OptionError, match=r"seed: expected an integer in \[0, 2\^64\)"):
        kernels.sample_parameters(augment, 8, 8, [0], seed=-1, epoch=0)
    with pytest.raises(OptionError, match="epoch"):
        kernels.sample_parameters(augment, 8, 8, [0], seed=0, epoch=2**32)
    with pytest.raises(OptionError, match="view"):
        kernels.sample_parameters(augment, 8, 8, [0], seed=0, epoch=0, view=256)
    with pytest.raises(DataError, match="heights: expected sizes"):
        kernels.sample_parameters(augment, 0, 8, [0], seed=0, epoch=0)
    with pytest.raises(DataError, match="widths: expected one number or 3"):
        kernels.sample_parameters(augment, 8, [8, 8], [0, 1, 2], seed=0, epoch=0)
    with pytest.raises(DataError, match="image ids"):
        kernels.sample_parameters(augment, 8, 8, [2**40], seed=0, epoch=0)
    with pytest.raises(DataError, match=r"long side below 2\^30"):
        kernels.sample_parameters(Augment.eval(224), 1, 2**24 - 1, [0], seed=0, epoch=0)
