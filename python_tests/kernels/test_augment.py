"""The fused pass against torchvision v2 in float and against its twin, on the same drawn parameters."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from sela_ext import kernels
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import Augment, reference

PRESETS = ["none", "flip", "resized_crop", "sela", "cifar", "eval"]
SIZES = [(1, 1), (2, 5), (5, 3), (4, 4), (8, 8), (32, 32), (31, 33), (17, 400), (100, 75)]
LIMIT = 0.01 / 255  # what torchvision's own float arithmetic is allowed to differ by


def random_images(count, size, channels, seed=0):
    """Noise, blocks of one colour and ramps: noise is hardest on resampling, flat colours on hue."""
    rng = np.random.default_rng(seed)
    height, width = size
    images = rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    images[1::3] = images[1::3] // 86 * 127
    images[2::3] = images[2::3, :1, :1]
    return list(images)


def torchvision_float(image, record, augment):
    """torchvision.transforms.v2.functional on the same parameters, before normalisation, in [0, 1]."""
    x = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    top, left, height, width = (int(record[name]) for name in ("top", "left", "height", "width"))
    size = augment.size
    if augment.crop == "center":
        x = functional.crop(functional.resize(x, [height, width], antialias=True), top, left, size, size)
    else:
        x = functional.resized_crop(x, top, left, height, width, [size, size], antialias=True)
    gray = len(x) == 3 and record["gray"]
    if gray and augment.gray_first:
        x = functional.rgb_to_grayscale(x, 3)
    if record["jitter"]:
        steps = [
            lambda t: functional.adjust_brightness(t, float(record["brightness"])),
            lambda t: functional.adjust_contrast(t, float(record["contrast"])),
            lambda t: functional.adjust_saturation(t, float(record["saturation"])),
            lambda t: functional.adjust_hue(t, float(record["hue"])),
        ]
        for operation in record["order"]:
            x = steps[operation](x)
    if gray and not augment.gray_first:
        x = functional.rgb_to_grayscale(x, 3)
    return functional.horizontal_flip(x) if record["flip"] else x


def denormalise(batch, augment):
    mean, std = (torch.tensor(values)[:, None, None] for values in augment.channel_values(batch.shape[1]))
    return batch * std + mean


def largest_difference(images, params, augment):
    found = denormalise(kernels.augment(images, params, augment), augment)
    expected = [torchvision_float(image, record, augment) for image, record in zip(images, params, strict=True)]
    return (found - torch.stack(expected)).abs().max().item()


def draw(augment, images, seed=0, first=0):
    sizes = np.array([image.shape[:2] for image in images])
    return kernels.sample_parameters(
        augment, sizes[:, 0], sizes[:, 1], np.arange(len(images)) + first, seed=seed, epoch=0
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 31, 32, 33])
@pytest.mark.parametrize("preset", PRESETS)
def test_images_equal_torchvision_float_on_the_same_parameters(preset, size, channels):
    augment = getattr(Augment, preset)(size)
    images = [image for k, s in enumerate(SIZES) for image in random_images(6, s, channels, seed=k)]
    assert largest_difference(images, draw(augment, images), augment) < LIMIT


@pytest.mark.parametrize("preset", ["sela", "cifar", "eval"])
def test_large_outputs_equal_torchvision_float(preset):
    augment = getattr(Augment, preset)(224)
    images = [random_images(1, size, 3)[0] for size in [(375, 500), (500, 375), (1200, 900), (60, 90), (224, 224)]]
    assert largest_difference(images, draw(augment, images), augment) < LIMIT


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 3000), (3000, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_extremely_long_images_equal_torchvision_float(size, channels):
    images = random_images(3, size, channels)
    for preset in ("none", "sela"):
        augment = getattr(Augment, preset)(33)
        assert largest_difference(images, draw(augment, images), augment) < LIMIT
    augment = Augment.eval(8)
    batch = kernels.augment(images, draw(augment, images), augment)
    assert batch.shape == (3, channels, 8, 8)
    assert batch.isfinite().all()


def test_every_order_of_the_colour_operations_equals_torchvision_float():
    from itertools import permutations, product

    orders = list(product(permutations(range(4)), [0, 1], [True, False]))
    images = random_images(len(orders), (9, 11), 3)
    for gray_first in (True, False):
        augment = Augment.sela(16, gray_first=gray_first)
        params = draw(augment, images, seed=5)
        for record, (order, gray, extreme) in zip(params, orders, strict=True):
            record["order"], record["gray"], record["jitter"] = order, gray, 1
            if extreme:
                record["brightness"], record["contrast"], record["saturation"], record["hue"] = 2.5, 0.0, 3.0, -0.5
        assert largest_difference(images, params, augment) < LIMIT


def test_factors_that_change_nothing_are_skipped_without_a_trace():
    images = random_images(7, (9, 11), 3)
    augment = Augment.sela(16, hue=0.0, brightness=0.0)
    params = draw(augment, images)
    assert (params["hue"] == 0).all()
    assert (params["brightness"] == 1).all()
    assert largest_difference(images, params, augment) < LIMIT


def test_edited_boxes_are_honoured_exactly():
    images = random_images(5, (40, 50), 3)
    augment = Augment.sela(31)
    params = draw(augment, images)
    params["top"], params["left"], params["height"], params["width"] = 3, 4, 37, 46
    params["flip"] = [0, 1, 0, 1, 0]
    assert largest_difference(images, params, augment) < LIMIT
    params.setflags(write=False)
    assert torch.equal(kernels.augment(images, params, augment), kernels.augment(images, params.copy(), augment))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_kernel_equals_its_twin(preset, channels):
    augment = getattr(Augment, preset)(33)
    images = [image for size in SIZES for image in random_images(2, size, channels)]
    params = draw(augment, images)
    found, expected = kernels.augment(images, params, augment), reference.augment(images, params, augment)
    assert (denormalise(found, augment) - denormalise(expected, augment)).abs().max() < LIMIT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("size", "channels"), [(1, 3), (31, 3), (32, 3), (33, 1)])
def test_halves_are_the_rounded_floats_in_either_memory_order(dtype, channels_last, size, channels):
    images = random_images(7, (20, 30), channels)
    augment = Augment.cifar(size)
    params = draw(augment, images)
    floats = kernels.augment(images, params, augment, channels_last=channels_last)
    halves = kernels.augment(images, params, augment, dtype=dtype, channels_last=channels_last)
    assert torch.equal(floats, kernels.augment(images, params, augment))
    assert torch.equal(halves, floats.to(dtype))
    order = torch.channels_last if channels_last else torch.contiguous_format
    assert floats.is_contiguous(memory_format=order)
    assert halves.is_contiguous(memory_format=order)


def test_halves_of_tiny_and_huge_values_are_rounded_as_torch_does():
    images = random_images(3, (8, 8), 3)
    params = draw(Augment.none(8), images)
    for std in (1e-5, 1.0, 3e4, 1e7):
        augment = Augment.none(8, mean=(0.3,), std=(std,))
        floats = kernels.augment(images, params, augment)
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(kernels.augment(images, params, augment, dtype=dtype), floats.to(dtype))


@pytest.mark.parametrize("size", [1, 33, 64])
def test_bits_do_not_depend_on_threads(size):
    images = np.stack(random_images(101, (40, 36), 3))
    augment = Augment.sela(size)
    params = draw(augment, images)
    one = kernels.augment(images, params, augment, threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(kernels.augment(images, params, augment, threads=threads), one)


def test_bits_do_not_depend_on_the_rest_of_the_batch():
    images = [random_images(1, size, 3)[0] for size in SIZES]
    augment = Augment.sela(31)
    params = draw(augment, images)
    batch = kernels.augment(images, params, augment, threads=1)
    for i in reversed(range(len(images))):
        assert torch.equal(kernels.augment(images[i : i + 1], params[i : i + 1], augment)[0], batch[i])


def test_rows_pick_images_and_out_receives_them():
    images = np.stack(random_images(10, (32, 32), 3))
    augment = Augment.cifar(32)
    rows = np.array([7, 7, 0, 3])
    params = kernels.sample_parameters(augment, 32, 32, rows, seed=1, epoch=2)
    out = torch.full((6, 3, 32, 32), 9.0)
    result = kernels.augment(images, params, augment, rows=rows, out=out[1:5])
    assert result.data_ptr() == out[1].data_ptr()
    assert torch.equal(out[1:5], kernels.augment(list(images[rows]), params, augment))
    assert (out[0] == 9).all()
    assert (out[5] == 9).all()


def test_nothing_outside_the_output_is_written():
    images = random_images(4, (13, 7), 3)
    for size in (1, 3, 31, 33):
        augment = Augment.sela(size)
        params = draw(augment, images)
        for dtype in (torch.float32, torch.bfloat16):
            room = torch.full((4 * 3 * size * size + 64,), 77.0, dtype=dtype)
            kernels.augment(images, params, augment, out=room[32:-32].view(4, 3, size, size))
            assert (room[:32] == 77).all()
            assert (room[-32:] == 77).all()


def test_strided_and_reversed_sources_give_the_pixels_that_numpy_shows():
    images = np.stack(random_images(6, (20, 30), 3))
    augment = Augment.sela(16)
    for view in (
        images[::2],
        images[:, ::2],
        images[:, :, 3:20],
        images[:, :, ::-1],
        images[:, ::-1],
        images[..., ::-1],
    ):
        params = draw(augment, view)
        expected = kernels.augment(np.ascontiguousarray(view), params, augment)
        assert torch.equal(kernels.augment(view, params, augment), expected)
        assert torch.equal(kernels.augment(list(view), params, augment), expected)


def test_images_of_the_output_size_keep_their_pixels():
    images = random_images(4, (33, 33), 3)
    augment = Augment.none(33, mean=(0.0,), std=(1 / 255,))
    batch = kernels.augment(images, draw(augment, images), augment)
    assert torch.equal(batch.round().byte(), torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    assert (batch - batch.round()).abs().max() < 1e-4


def test_one_channel_images_use_the_mean_of_three_means():
    images = [np.full((8, 8, 1), 255, np.uint8)]
    augment = Augment.none(8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.75))
    batch = kernels.augment(images, draw(augment, images), augment)
    assert torch.allclose(batch, torch.tensor((1 - 0.2) / 0.5))


def test_an_empty_batch_is_an_empty_tensor():
    augment = Augment.sela(32)
    params = kernels.sample_parameters(augment, [], [], [], seed=0, epoch=0)
    assert kernels.augment([], params, augment).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_equals_the_twin(isa, tmp_path):
    code = """
import numpy as np, torch, sela_ext
from sela_ext import kernels
from sela_ext.kernels import Augment, reference
print(sela_ext.build_info()["cpu_isa"])
rng = np.random.default_rng(0)
for channels in (1, 3):
    for size in (1, 7, 32, 65):
        for preset in ("sela", "cifar", "eval"):
            augment = getattr(Augment, preset)(size)
            images = [rng.integers(0, 256, (h, w, channels), dtype=np.uint8)
                      for h, w in [(1, 1), (5, 4), (31, 33), (32, 32), (90, 200), (200, 90)]]
            h, w = zip(*(image.shape[:2] for image in images))
            params = kernels.sample_parameters(augment, h, w, range(6), seed=3, epoch=1)
            for last in (False, True):
                a = kernels.augment(images, params, augment, channels_last=last)
                b = reference.augment(images, params, augment, channels_last=last)
                assert (a - b).abs().max() * max(augment.std) < 0.01 / 255, (channels, size, preset)
            for dtype in (torch.float16, torch.bfloat16):
                assert torch.equal(kernels.augment(images, params, augment, dtype=dtype), a.to(dtype))
"""
    environment = {**os.environ, "SELA_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    if "at best" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == isa


def test_refusals_name_what_was_expected_and_found():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    augment = Augment.sela(16)
    params = draw(augment, images)
    with pytest.raises(DataError, match="expected uint8 images, found float32"):
        kernels.augment(images.astype(np.float32), params, augment)
    with pytest.raises(DataError, match="1 or 3 channels"):
        kernels.augment(np.zeros((4, 8, 8, 2), np.uint8), params, augment)
    with pytest.raises(DataError, match=r"rows: expected image numbers in \[0, 4\), found 4"):
        kernels.augment(images, params, augment, rows=[0, 1, 2, 4])
    with pytest.raises(DataError, match="expected 4 records"):
        kernels.augment(list(images), params[:3], augment)
    with pytest.raises(DataError, match="expected 2 records, one per row, found 3"):
        kernels.augment(images, params[:3], augment, rows=[0, 1])
    with pytest.raises(DataError, match=r"rows: expected image numbers in \[0, 2\), found 2"):
        kernels.augment(images[:2], params[:3], augment)
    with pytest.raises(DataError, match="expected images of 3 channels"):
        kernels.augment([images[0], images[0, :, :, :1]], params[:2], augment)
    with pytest.raises(DataError, match="out: expected"):
        kernels.augment(images, params, augment, out=torch.empty(4, 3, 16, 15))
    with pytest.raises(DataError, match="strides"):
        kernels.augment(images, params, augment, out=torch.empty(4, 3, 16, 16), channels_last=True)
    with pytest.raises(OptionError, match="dtype"):
        kernels.augment(images, params, augment, dtype=torch.float64)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("top", 1, "box inside the image"),
        ("left", -1, r"\(top, left\) >= 0"),
        ("width", 0, "at least 1 x 1"),
        ("height", 2**31 - 1, "box inside the image"),
        ("order", (0, 1, 2, 2), "order that names each"),
        ("brightness", -0.5, "finite factors"),
        ("contrast", np.nan, "finite factors"),
        ("saturation", np.inf, "finite factors"),
        ("hue", 0.6, "hue within"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_before_anything_is_written(field, value, reason):
    images = random_images(2, (8, 8), 3)
    augment = Augment.sela(16)
    params = draw(augment, images)
    for name, whole in (("top", 0), ("left", 0), ("height", 8), ("width", 8)):
        params[name] = whole
    params[field][1] = value
    out = torch.full((2, 3, 16, 16), 5.0)
    with pytest.raises(DataError, match=rf"params\[1\]: expected .*{reason}"):
        kernels.augment(images, params, augment, out=out)
    assert (out == 5).all()


def test_augment_refuses_values_outside_their_range():
    for fields, reason in [
        ({"size": 0}, "size: expected >= 1"),
        ({"crop": "middle"}, "crop: expected"),
        ({"resize": 8}, "resize: expected >= size"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"brightness": -1}, "brightness"),
        ({"contrast": (1.0, 0.5)}, "contrast"),
        ({"hue": 0.6}, "hue"),
        ({"mean": (1.0, 2.0)}, "mean"),
        ({"std": (0.0,)}, "std"),
    ]:
        with pytest.raises(OptionError, match=reason):
            Augment(**{"size": 16, **fields})


def test_presets_differ_only_where_they_say():
    cifar, sela = Augment.cifar(32), Augment.sela(32)
    changed = {f.name for f in dataclasses.fields(Augment) if getattr(cifar, f.name) != getattr(sela, f.name)}
    assert changed == {"scale", "gray_first", "mean", "std"}
    assert Augment.sela(32, hue=0.1).factor_range("hue") == (-0.1, 0.1)
    assert Augment.sela(32, brightness=1.5).factor_range("brightness") == (0.0, 2.5)
    assert hash(Augment.none(8)) == hash(Augment.none(8))
    assert not Augment.flip(8).jitters


def test_augment_survives_json():
    import json

    augment = Augment.sela(32, brightness=(0.5, 1.5), hue=0.1)
    again = Augment(**json.loads(json.dumps(dataclasses.asdict(augment))))
    assert again == augment
    assert hash(again) == hash(augment)


def test_package_exports_augment_without_a_copy():
    import sela_ext
    from sela_ext.data import Augment as FromData

    assert sela_ext.Augment is Augment
    assert FromData is Augment
