"""kernels.augment_resident for data in the CPU's memory: the drawn parameters and the fused pass in one call.

On a device it runs in python_tests/simt/test_augment.py, with the SIMT runner for the device, and, marked gpu,
in python_tests/gpu.
"""

import numpy as np
import pytest
import torch

from sela_ext import kernels
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import PARAMETERS, Augment, reference


def images_of(count=9, height=21, width=32, channels=3):
    return np.random.default_rng(count).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_it_is_sample_parameters_and_augment_in_one_call(channels, dtype, channels_last):
    images, index, augment = images_of(channels=channels), [8, 0, 3, 3], Augment.sela(33)
    key = {"seed": 2**63, "epoch": 7, "view": 2}
    params = kernels.sample_parameters(augment, 21, 32, index, **key)
    expected = kernels.augment(images, params, augment, rows=index, dtype=dtype, channels_last=channels_last)
    for source in (images, torch.from_numpy(images)):
        found, drawn = kernels.augment_resident(
            source, index, augment, **key, dtype=dtype, channels_last=channels_last, return_parameters=True
        )
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        assert drawn.dtype == PARAMETERS
        assert drawn.tobytes() == params.tobytes()


@pytest.mark.parametrize("preset", ["none", "flip", "resized_crop", "sela", "cifar", "eval"])
def test_it_equals_its_twin(preset):
    images, augment = images_of(), getattr(Augment, preset)(17)
    found, drawn = kernels.augment_resident(images, np.arange(9), augment, seed=4, epoch=5, return_parameters=True)
    expected, twins = reference.augment_resident(images, np.arange(9), augment, seed=4, epoch=5, return_parameters=True)
    assert drawn.tobytes() == twins.tobytes()
    assert (found - expected).abs().max() * max(augment.std) < 0.01 / 255
    assert torch.equal(
        reference.augment_resident(torch.from_numpy(images), range(9), augment, seed=4, epoch=5), expected
    )


def test_numbers_of_any_kind_pick_the_same_images():
    images, augment = images_of(), Augment.cifar(16)
    expected = kernels.augment_resident(images, [8, 1, 1], augment, seed=0, epoch=0)
    for index in (
        (8, 1, 1),
        np.array([8, 1, 1], np.uint8),
        torch.tensor([8, 1, 1]),
        torch.tensor([8, 1, 1], dtype=torch.int32),
        np.array([8, 0, 1, 0, 1])[::2],
    ):
        assert torch.equal(kernels.augment_resident(images, index, augment, seed=0, epoch=0), expected)


def test_out_is_written_and_returned():
    images, augment = images_of(), Augment.sela(8)
    out = torch.full((4, 3, 8, 8), 9.0, dtype=torch.bfloat16)
    assert (
        kernels.augment_resident(images, [0, 1], augment, seed=0, epoch=0, out=out[1:3]).data_ptr() == out[1].data_ptr()
    )
    assert (out[[0, 3]] == 9).all()
    twin = torch.full_like(out, 9)
    reference.augment_resident(images, [0, 1], augment, seed=0, epoch=0, out=twin[1:3])
    assert (out.float() - twin.float()).abs().max() < 0.05


def test_views_and_epochs_differ_and_an_empty_batch_is_empty():
    images, augment = images_of(), Augment.sela(8)
    one = kernels.augment_resident(images, range(9), augment, seed=0, epoch=0)
    assert not torch.equal(one, kernels.augment_resident(images, range(9), augment, seed=0, epoch=0, view=1))
    assert not torch.equal(one, kernels.augment_resident(images, range(9), augment, seed=0, epoch=1))
    assert kernels.augment_resident(images, [], augment, seed=0, epoch=0).shape == (0, 3, 8, 8)


def test_torch_images_go_where_numpy_ones_go_in_augment():
    images, augment = images_of(), Augment.sela(8)
    params = kernels.sample_parameters(augment, 21, 32, [3, 4], seed=0, epoch=0)
    expected = kernels.augment(images, params, augment, rows=[3, 4])
    assert torch.equal(kernels.augment(torch.from_numpy(images), params, augment, rows=[3, 4]), expected)


def test_refusals_name_what_was_expected_and_found():
    images, augment = images_of(), Augment.sela(8)
    with pytest.raises(OptionError, match=r"epoch: expected an integer in \[0, 2\^32\)"):
        kernels.augment_resident(images, [0], augment, seed=0, epoch=-1)
    with pytest.raises(DataError, match=r"index: expected image numbers in \[0, 9\), found 9"):
        kernels.augment_resident(images, [0, 9], augment, seed=0, epoch=0)
    with pytest.raises(DataError, match=r"index: expected image numbers in \[0, 9\), found -1"):
        kernels.augment_resident(images, [-1], augment, seed=0, epoch=0)
    with pytest.raises(DataError, match="index: expected integers, found float64"):
        kernels.augment_resident(images, [0.0], augment, seed=0, epoch=0)
    with pytest.raises(DataError, match=r"images: expected uint8 images \[N, H, W, C\], found \(21, 32, 3\)"):
        kernels.augment_resident(images[0], [0], augment, seed=0, epoch=0)
    with pytest.raises(DataError, match="expected uint8 images, found float32"):
        kernels.augment_resident(images.astype(np.float32), [0], augment, seed=0, epoch=0)
    with pytest.raises(DataError, match="list"):
        kernels.augment_resident([images[0]], [0], augment, seed=0, epoch=0)
    with pytest.raises(DataError, match=r"on the CPU, found torch.float32 \(1, 3, 8, 8\) on meta"):
        kernels.augment_resident(images, [0], augment, seed=0, epoch=0, out=torch.empty(1, 3, 8, 8, device="meta"))
    with pytest.raises(DataError, match="found meta"):
        kernels.augment(torch.zeros(1, 8, 8, 3, dtype=torch.uint8, device="meta"), np.zeros(1, PARAMETERS), augment)
