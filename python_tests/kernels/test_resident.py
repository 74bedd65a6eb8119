"""Batches of images on a device, drawn by numbers of their own, and what is refused."""

import numpy as np
import pytest
import torch

from sela_ext import _core, kernels
from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels import Augment
from sela_ext.kernels.resident import augment_kept, resident_refusal, takes_keys

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


def test_keys_are_for_small_images_without_effects(play):
    side = _core.AUGMENT_CUDA_SIDE
    assert takes_keys((5, side, side, 3), Augment.sela(side))
    assert not takes_keys((5, side + 1, 8, 3), Augment.sela(8))
    assert not takes_keys((5, 8, 8, 3), Augment.sela(side + 1))
    assert not takes_keys((5, 8, 8, 3), Augment.aug_plus(8))
    play()
    images, index = torch.zeros(3, 8, 8, 3, dtype=torch.uint8), torch.arange(3)
    with pytest.raises(OptionError, match="keys: expected none with effects"):
        augment_kept(images, index, index, Augment.aug_plus(8), **KEY, dtype=torch.float32, channels_last=False)


def test_what_the_kernels_take_is_not_refused_and_the_rest_says_why():
    for dtype in (None, torch.float32, torch.float16, torch.bfloat16):
        assert resident_refusal((5, 32, 32, 3), Augment.cifar(32), dtype) is None
    assert "float32, bfloat16 or float16 on CUDA" in resident_refusal((5, 32, 32, 3), Augment.cifar(32), torch.uint8)
    assert "C = 1 or 3" in resident_refusal((5, 32, 32, 2), Augment.cifar(32))
