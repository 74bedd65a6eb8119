"""Batches of images on a device, drawn by numbers of their own, and what is refused."""

import numpy as np
import pytest
import torch

from sela_ext import _core, kernels
from sela_ext.errors import ResourceError
from sela_ext.kernels import Augment
from sela_ext.kernels.resident import augment_kept, resident_refusal

KEY = {"seed": 3, "epoch": 4, "view": 5}


@pytest.fixture
def play(as_cuda, host_card, monkeypatch):
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    return lambda: as_cuda(host_card)


@pytest.mark.parametrize("keys", [None, [40, 41, 1 << 39]])
def test_an_image_is_drawn_by_its_key(play, host_core, keys):
    images = np.random.default_rng(0).integers(0, 256, (7, 20, 18, 3), dtype=np.uint8)
    augment, index = Augment.cifar(16), np.array([6, 0, 6])
    drawn = kernels.sample_parameters(augment, 20, 18, index if keys is None else keys, **KEY)
    options = {"dtype": torch.float16, "channels_last": True}
    expected = kernels.augment(images, drawn, augment, rows=index, **options)
    play()
    drawn_by = None if keys is None else torch.tensor(keys)
    found = augment_kept(torch.from_numpy(images), torch.from_numpy(index), drawn_by, augment, **KEY, **options)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    assert host_core.calls == (1 if keys is None else 2)


def test_a_launch_that_fails_is_one_error(play, host_core, monkeypatch):
    images = torch.zeros(3, 8, 8, 1, dtype=torch.uint8)
    play()

    def fail(*arguments):
        raise RuntimeError("sample_kernel: launch failed: no such device\nmore")

    monkeypatch.setattr(host_core, "sample_parameters_cuda", fail)
    index = torch.arange(3)
    with pytest.raises(ResourceError, match=r"^sample_kernel: launch failed: no such device$"):
        augment_kept(images, index, index, Augment.none(8), **KEY, dtype=torch.float32, channels_last=False)


@pytest.mark.parametrize(
    ("shape", "augment"),
    [
        ((7, _core.AUGMENT_CUDA_SIDE + 1, 31, 3), Augment.sela(16)),
        ((7, 33, 20, 1), Augment.none(_core.AUGMENT_CUDA_SIDE + 1)),
        ((7, 20, 33, 3), Augment.aug_plus_more(16)),
        ((7, 20, 33, 3), Augment.deepcluster(16)),
    ],
)
def test_large_images_and_effects_are_drawn_by_their_keys(play, host_core, shape, augment):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    index, keys = np.array([6, 0, 6, 3]), np.array([40, 41, 1 << 39, 3])
    drawn = kernels.sample_parameters(augment, *shape[1:3], keys, **KEY)
    effects = kernels.sample_effects(augment, keys, **KEY) if augment.draws_effects else None
    options = {"dtype": torch.float16, "channels_last": True}
    expected = kernels.augment(images, drawn, augment, effects=effects, rows=index, **options)
    play()
    arguments = torch.from_numpy(images), torch.from_numpy(index), torch.from_numpy(keys), augment
    assert torch.equal(augment_kept(*arguments, **KEY, **options), expected)
    assert host_core.calls == 1


def test_what_the_kernels_take_is_not_refused_and_the_rest_says_why():
    for dtype in (None, torch.float32, torch.float16, torch.bfloat16):
        assert resident_refusal((5, 32, 32, 3), Augment.cifar(32), dtype) is None
    assert "float32, bfloat16 or float16 on CUDA" in resident_refusal((5, 32, 32, 3), Augment.cifar(32), torch.uint8)
    assert resident_refusal((5, 32, 32, 3), Augment.none(16384)) is None
    assert "at most 16384 pixels a side on CUDA, found 16385" in resident_refusal((5, 32, 32, 3), Augment.none(16385))
    assert "C = 1 or 3" in resident_refusal((5, 32, 32, 2), Augment.cifar(32))
