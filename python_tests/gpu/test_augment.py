"""The augmentation of resident images on a device: the CPU's parameters bit by bit, its pixels within 0.01 of 255."""

import numpy as np
import pytest
import torch

from sela_ext import kernels
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import Augment
from sela_ext.kernels.check_cases import augment_difference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEY = {"seed": 2**64 - 5, "epoch": 2**32 - 2, "view": 255}


def images_of(count, height, width, channels, seed=0):
    """Noise, few colours, one colour, gray."""
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    images[1::5] //= 86
    images[2::5] = images[2::5, :1, :1]
    images[3::5] = images[3::5, :, :, :1]
    return images


def assert_as_on_the_cpu(card, images, index, options, dtype=torch.float32, channels_last=False):
    arguments = {**KEY, "dtype": dtype, "channels_last": channels_last, "return_parameters": True}
    expected, drawn = kernels.augment_resident(images, index, options, **arguments)
    found, params = kernels.augment_resident(torch.from_numpy(images).to(card.place), index, options, **arguments)
    assert params.tobytes() == drawn.tobytes()
    assert (found.device, found.dtype, found.shape) == (card.place, dtype, expected.shape)
    order = torch.channels_last if channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=order)
    assert augment_difference(options, found.cpu(), expected) is None


@pytest.mark.parametrize("preset", ["none", "flip", "resized_crop", "sela", "cifar", "eval"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (40, 27), (64, 64), (1, 1), (5, 64)])
def test_every_preset_and_shape_is_as_on_the_cpu(card, preset, height, width):
    index = np.arange(150)[::-1] % 40
    for channels in (3, 1):
        images = images_of(40, height, width, channels)
        for size in (32, 31, 8, 64):
            assert_as_on_the_cpu(card, images, index, getattr(Augment, preset)(size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_type_and_memory_order_is_as_on_the_cpu(card, dtype, channels_last):
    options = {"jitter_probability": 0.8, "gray_probability": 0.3}
    for channels in (3, 1):
        images = images_of(40, 32, 32, channels)
        for size in (32, 33, 1, 6):
            assert_as_on_the_cpu(card, images, np.arange(40), Augment.cifar(size, **options), dtype, channels_last)


@pytest.mark.parametrize("preset", ["none", "resized_crop", "sela", "cifar", "aug_plus", "eval", "deepcluster"])
@pytest.mark.parametrize(("height", "width"), [(90, 70), (65, 33), (1, 200), (256, 300)])
def test_every_preset_of_images_of_any_size_is_as_on_the_cpu(card, preset, height, width):
    index = np.array([4, 0, 0, 3, 2, 1, 4])
    for channels in (3, 1):
        images = images_of(5, height, width, channels)
        for size in (66, 33) if card.played else (66, 33, 224):
            assert_as_on_the_cpu(card, images, index, getattr(Augment, preset)(size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_type_and_memory_order_of_images_of_any_size_is_as_on_the_cpu(card, dtype, channels_last):
    images = images_of(6, 80, 70, 3)
    for options in (Augment.sela(66), Augment.eval(33), Augment.aug_plus(40), Augment.deepcluster(48)):
        assert_as_on_the_cpu(card, images, np.arange(6), options, dtype, channels_last)


def test_tones_are_as_on_the_cpu(card):
    """Of images that keep their pixels: their levels lie in the middle of equalize's bins."""
    images = images_of(9, 66, 66, 3)
    assert_as_on_the_cpu(card, images, np.arange(9), Augment.none(66, tone_probability=1.0, noise_probability=0.3))


def test_strong_jitter_and_given_parameters_are_honoured(card):
    options = Augment.sela(
        32, brightness=(0.2, 3.0), contrast=(0.0, 3.0), saturation=(0.0, 4.0), hue=0.5, gray_first=False
    )
    images = images_of(60, 36, 30, 3)
    index = np.arange(60)
    assert_as_on_the_cpu(card, images, index, options)
    params = kernels.sample_parameters(options, 36, 30, index + 1000, seed=3, epoch=4)
    params["flip"][::2] ^= 1
    expected = kernels.augment(images, params, options, rows=index)
    resident = torch.from_numpy(images).to(card.place)
    found = kernels.augment(resident, params, options, rows=index)
    assert found.device == card.place
    assert augment_difference(options, found.cpu(), expected) is None
    wrong = params.copy()
    wrong["height"][7] = 1000
    with pytest.raises(DataError, match=r"params\[7\]"):
        kernels.augment(resident, wrong, options, rows=index)


def test_more_images_than_blocks_are_all_done(card):
    count = 2000 if card.played else 100_003
    images = images_of(500, 32, 32, 3)
    options = Augment.cifar(32)
    index = np.random.default_rng(1).integers(0, 500, count)
    resident = torch.from_numpy(images).to(card.place)
    found = kernels.augment_resident(resident, index, options, **KEY, dtype=torch.float16)
    for part in (slice(0, 700), slice(count // 2, count // 2 + 700), slice(count - 700, count)):
        expected = kernels.augment_resident(images, index[part], options, **KEY, dtype=torch.float16)
        assert augment_difference(options, found[part].cpu(), expected) is None
    again = kernels.augment_resident(resident, index, options, **KEY, dtype=torch.float16)
    assert torch.equal(found, again)


def test_numbers_of_images_may_be_of_any_integer_kind(card):
    images, options = images_of(9, 8, 8, 3), Augment.cifar(8)
    resident = torch.from_numpy(images).to(card.place)
    numbers = [8, 0, 3, 3]
    expected = kernels.augment_resident(images, numbers, options, **KEY)
    kinds = (
        numbers,
        np.array(numbers, np.uint8),
        torch.tensor(numbers),
        torch.tensor(numbers, dtype=torch.int32, device=card.place),
        torch.tensor(numbers + numbers, device=card.place)[:4],
    )
    for index in kinds:
        found = kernels.augment_resident(resident, index, options, **KEY)
        assert augment_difference(options, found.cpu(), expected) is None
    assert kernels.augment_resident(resident, [], options, **KEY).shape == (0, 3, 8, 8)


def test_the_data_may_be_part_of_a_larger_tensor(card):
    images, options = images_of(9, 7, 5, 3), Augment.cifar(8)
    part = torch.from_numpy(images).to(card.place)[2:]  # starts at no multiple of anything
    expected = kernels.augment_resident(images[2:], [0, 6], options, **KEY)
    assert augment_difference(options, kernels.augment_resident(part, [0, 6], options, **KEY).cpu(), expected) is None
    out = torch.full((5, 3, 8, 8), 7.0, device=card.place)
    given = kernels.augment_resident(part, [0, 6], options, **KEY, out=out[1:3])
    assert augment_difference(options, out[1:3].cpu(), expected) is None
    assert given.data_ptr() == out[1:].data_ptr()
    assert bool((out[[0, 3, 4]] == 7).all())


def test_what_does_not_fit_is_refused_in_one_line(card):
    resident = torch.from_numpy(images_of(9, 8, 8, 3)).to(card.place)
    options = Augment.cifar(8)
    with pytest.raises(DataError, match=r"index: expected image numbers in \[0, 9\), found 9"):
        kernels.augment_resident(resident, [9], options, **KEY)
    with pytest.raises(DataError, match="index: expected integers, found float"):
        kernels.augment_resident(resident, [0.5], options, **KEY)
    with pytest.raises(DataError, match="expected contiguous memory"):
        kernels.augment_resident(resident[:, ::2], [0], options, **KEY)
    with pytest.raises(DataError, match="expected uint8"):
        kernels.augment_resident(resident.float(), [0], options, **KEY)
    with pytest.raises(DataError, match="out: expected"):
        kernels.augment_resident(resident, [0], options, **KEY, out=torch.empty(2, 3, 8, 8, device=card.place))
    with pytest.raises(OptionError, match="seed"):
        kernels.augment_resident(resident, [0], options, seed=-1, epoch=0)


@pytest.mark.gpu
def test_numbers_on_the_device_that_are_out_of_range_give_nan_and_no_crash(cuda):
    resident = torch.from_numpy(images_of(9, 8, 8, 3)).to(cuda.place)
    index = torch.tensor([3, 9, -1, 2**40, 0], device=cuda.place)
    found = kernels.augment_resident(resident, index, Augment.cifar(8), **KEY)
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, True, True, False]
    assert not bool(found[[0, 4]].isnan().any())


@pytest.mark.gpu
def test_an_output_elsewhere_is_refused(cuda):
    resident = torch.from_numpy(images_of(9, 8, 8, 3)).to(cuda.place)
    with pytest.raises(DataError, match=f"out: expected .* on {cuda.place}, found .* on cpu"):
        kernels.augment_resident(resident, [0], Augment.cifar(8), **KEY, out=torch.empty(1, 3, 8, 8))


@pytest.mark.gpu
def test_the_launch_waits_for_its_stream_and_nobody_waits_for_it(cuda):
    images, options = images_of(64, 32, 32, 3), Augment.cifar(32)
    ready = torch.from_numpy(images).to(cuda.place)
    late = torch.zeros_like(ready)
    index = torch.arange(64, device=cuda.place)
    out = torch.zeros(64, 3, 32, 32, device=cuda.place)
    kernels.augment_resident(ready, index, options, **KEY)  # warm: what is loaded at a first use waits for the device
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        late.copy_(ready)
        kernels.augment_resident(late, index, options, **KEY, out=out)
        finished = stream.query()
    assert not finished
    stream.synchronize()
    expected = kernels.augment_resident(images, np.arange(64), options, **KEY)
    assert augment_difference(options, out.cpu(), expected) is None


@pytest.mark.gpu
def test_images_beyond_2_31_bytes_are_reached(cuda):
    count = 720_000  # of 3 KB
    free, _ = torch.cuda.mem_get_info(cuda.place)
    if free < 4 << 30:
        pytest.skip(f"4 GiB of device memory are needed, {free / 2**30:.1f} GiB are free")
    resident = torch.zeros(count, 32, 32, 3, dtype=torch.uint8, device=cuda.place)
    assert resident.numel() > 1 << 31
    images = images_of(20, 32, 32, 3)
    index = np.concatenate([np.arange(10), np.arange(count - 10, count)])
    for row, image in zip(index.tolist(), images, strict=True):
        resident[row].copy_(torch.from_numpy(image))
    options = Augment.cifar(32)
    found, drawn = kernels.augment_resident(resident, index, options, **KEY, return_parameters=True)
    expected = kernels.augment(images, drawn, options)
    assert augment_difference(options, found.cpu(), expected) is None


@pytest.mark.gpu
def test_uploaded_images_and_planes_are_as_on_the_cpu(cuda):
    draw = np.random.default_rng(0)
    sides = ((97, 65), (33, 140), (5, 3), (300, 400))
    crops = [draw.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
    planes = []
    for height, width in sides:
        shapes = ((height, width), *[(-(-height // 2), -(-width // 2))] * 2)
        data = tuple(draw.integers(0, 256, shape, dtype=np.uint8) for shape in shapes)
        planes.append(kernels.Planes(data, height, width, subsampling="4:2:0"))
    there, planar = kernels.upload_images(crops, cuda.place), kernels.upload_planes(planes, cuda.place)
    for options in (Augment.sela(224), Augment.aug_plus(66)):
        index = np.arange(len(crops))
        params = kernels.sample_parameters(options, there.heights, there.widths, index, **KEY)
        effects = kernels.sample_effects(options, index, **KEY) if options.draws_effects else None
        expected = kernels.augment(crops, params, options, effects=effects)
        found = kernels.augment(there, params, options, effects=effects)
        assert found.device == cuda.place
        assert augment_difference(options, found.cpu(), expected) is None
        for exact in (False, True):
            expected = kernels.augment_planes(planes, params, options, effects=effects, exact=exact)
            found = kernels.augment_planes(planar, params, options, effects=effects, exact=exact)
            assert augment_difference(options, found.cpu(), expected) is None
    views = Augment.multi_crop((160, 96), (2, 4))
    expected = kernels.augment_views(crops, views, [0, 1, 2, 3], seed=0, epoch=1)
    found = kernels.augment_views(there, views, [0, 1, 2, 3], seed=0, epoch=1)
    for view, one, other in zip(views, found, expected, strict=True):
        assert augment_difference(view, one.cpu(), other) is None


@pytest.mark.gpu
def test_more_images_than_a_round_takes_are_all_done(cuda):
    images, options = images_of(20, 100, 90, 3), Augment.sela(224)
    index = np.random.default_rng(1).integers(0, 20, 600)
    resident = torch.from_numpy(images).to(cuda.place)
    found = kernels.augment_resident(resident, index, options, **KEY, dtype=torch.float16)
    for part in (slice(0, 20), slice(290, 310), slice(580, 600)):
        expected = kernels.augment_resident(images, index[part], options, **KEY, dtype=torch.float16)
        assert augment_difference(options, found[part].cpu(), expected) is None
    again = kernels.augment_resident(resident, index, options, **KEY, dtype=torch.float16)
    assert torch.equal(found, again)
