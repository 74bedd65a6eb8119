"""The fused augmentation of resident images: parameters are the CPU's bits, pixels the CPU kernel's.

The CPU kernel here is the one inside `_simt`, so that nothing but numpy is needed. Its AVX2 and AVX-512 loops and the
CUDA kernel do the same multiply-adds; only the contrast's mean is summed in another order. So pixels are compared bit
by bit, and where a contrast is in play within some units in the last place of 1.
"""

import importlib.util
import subprocess
import sys
from functools import partial
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sela_ext.kernels import PARAMETERS, Augment
from sela_ext.kernels.augment import effect_fields, option_fields

spec = importlib.util.spec_from_file_location("image_rows", Path(__file__).with_name("image_rows.py"))
image_rows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(image_rows)
LIMIT, GUARD, PLAIN = image_rows.LIMIT, image_rows.GUARD, image_rows.PLAIN
thin, random_images = image_rows.thin, image_rows.random_images
empty_output, untouched = image_rows.empty_output, image_rows.untouched
make_options, further_options = image_rows.make_options, image_rows.further_options

CLOSE = 4e-6  # what the mean's other order of summation can cost
SIDES = [(1, 1), (7, 7), (28, 28), (31, 31), (32, 32), (33, 33), (40, 27), (27, 40), (64, 64), (1, 64), (64, 1), (2, 3)]


@pytest.fixture(autouse=True)
def device(simt):
    """Two multiprocessors of two blocks: grids of 1 to 4 blocks, so that most blocks take several images."""
    simt.set_device(1 if simt.variant == "thread" else 2, 2)
    yield
    simt.set_device(2, 2)


def cpu_parameters(simt, augment, size, index, key=(0, 0, 0)):
    return image_rows.cpu_parameters(simt, augment, *size, index, key)


def widen(values, dtype):
    """Any output as float32."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.view(np.float16).astype(np.float32) if dtype == "float16" else values


def on_cpu(simt, images, index, params, augment, dtype="float32", channels_last=False):
    channels = images.shape[3]
    _, out = empty_output(len(index), channels, augment.size, dtype)
    rows = np.ascontiguousarray(index, np.int64)
    further = simt.EffectOptions(**effect_fields(augment))
    target = (out.ctypes.data, dtype, channels_last, 1)
    simt.augment_array(make_options(simt, augment, channels), further, images, rows, params, None, *target)
    return out


def on_device(
    simt, images, index, augment, *, key=(0, 0, 0), given=None, dtype="float32", channels_last=False, shift=0
):
    """(output [B, values], drawn parameters) of the kernel; given: not drawn."""
    count, (total, height, width, channels) = len(index), images.shape
    room, out = empty_output(count, channels, augment.size, dtype, shift)
    drawn = np.zeros(count, PARAMETERS)
    rows = np.ascontiguousarray(index, np.int64)
    simt.augment_resident_cuda(
        make_options(simt, augment, channels),
        images.ctypes.data,
        total,
        height,
        width,
        channels,
        rows.ctypes.data,
        count,
        *key,
        0 if given is None else given.ctypes.data,
        drawn.ctypes.data if given is None else 0,
        out.ctypes.data,
        dtype,
        channels_last,
        0,
    )
    assert untouched(room, out)
    return out, drawn


def check_pixels(simt, images, index, augment, key=(0, 0, 0), given=None, close=CLOSE, **output):
    """The kernel's output equals the CPU kernel's: bit by bit where no contrast is in play, else within `close`."""
    found, drawn = on_device(simt, images, index, augment, key=key, given=given, **output)
    params = drawn if given is None else given
    if given is None:
        assert drawn.tobytes() == cpu_parameters(simt, augment, images.shape[1:3], index, key).tobytes()
    expected = on_cpu(simt, images, index, params, augment)
    exact = ((params["jitter"] == 0) | (params["contrast"] == 1)) & ~gray_path(params, augment, images)
    difference = np.abs(found.astype(np.float64) - expected).max(axis=1)  # NaN fails below
    assert (difference <= min(close, LIMIT)).all(), f"differs by {difference.max() * 255:.5f} of 255"
    if simt.build_info()["cpu_isa"] != "generic":
        assert (difference[exact] == 0).all(), (
            f"{(difference[exact] != 0).sum()} of {exact.sum()} images differ in bits"
        )
    return found


def gray_path(params, augment, images):
    """Images that the CPU keeps as one plane, where saturation is one factor."""
    return (params["gray"] == 1) & (params["jitter"] == 1) & augment.gray_first & (images.shape[3] == 3)


KEYS = [(0, 0, 0), (2**64 - 1, 2**32 - 1, 255), (123456789012345, 77, 3)]
IDS = np.concatenate([np.arange(1001), [2**32 - 1, 2**32, 2**33 + 5, 2**40 - 1]])


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("preset", ["none", "flip", "resized_crop", "sela", "cifar", "eval"])
def test_drawn_parameters_are_the_cpus_bits(simt, preset, key):
    augment = getattr(Augment, preset)(31)
    for size in thin(simt, [(32, 32), (1, 3000), (375, 500)]):
        drawn = np.zeros(len(IDS) + 2, PARAMETERS)
        seed, epoch, view = key
        simt.sample_parameters_cuda(
            make_options(simt, augment, 3),
            *size,
            IDS.ctypes.data,
            len(IDS),
            seed,
            epoch,
            view,
            drawn[1:].ctypes.data,
            0,
        )
        assert drawn[1:-1].tobytes() == cpu_parameters(simt, augment, size, IDS, key).tobytes()
        assert drawn[:1].tobytes() == drawn[-1:].tobytes() == bytes(PARAMETERS.itemsize)


def test_boxes_that_fall_back_and_rare_ranges_are_the_cpus_bits(simt):
    augment = Augment.sela(32, ratio=(0.01, 50.0), scale=(0.5, 0.9), jitter_probability=0.8, hue=(-0.5, 0.1))
    for size in [(40, 60), (300, 7), (1, 1)]:
        drawn = np.zeros(2001, PARAMETERS)
        ids = np.arange(2001)
        simt.sample_parameters_cuda(
            make_options(simt, augment, 3), *size, ids.ctypes.data, len(ids), 5, 1, 2, drawn.ctypes.data, 0
        )
        assert drawn.tobytes() == cpu_parameters(simt, augment, size, ids, (5, 1, 2)).tobytes()


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (5, 7), (100, 1)])
def test_the_fused_kernel_draws_the_cpus_bits_for_any_grid(simt, grid):
    """Blocks draw for 16 images at a time: 1, 16, 17 and 33 images per block, and fewer images than blocks."""
    augment = Augment.sela(2)
    images = random_images(50, 3, 4, 3)
    simt.set_device(*grid)
    index = np.arange(33)[::-1] * 1511 % 50
    for key in KEYS:
        _, drawn = on_device(simt, images, index, augment, key=key)
        assert drawn.tobytes() == cpu_parameters(simt, augment, (3, 4), index, key).tobytes()


def test_a_grid_has_a_block_per_image_until_the_device_is_full(simt):
    images = random_images(3, 2, 2, 1)
    for grid, count, blocks in [((2, 2), 3, 3), ((2, 2), 4, 4), ((2, 2), 9, 4), ((1, 3), 9, 3)]:
        simt.set_device(*grid)
        before = simt.statistics()["blocks"]
        on_device(simt, images, np.zeros(count, np.int64), Augment.none(2))
        assert simt.statistics()["blocks"] - before == blocks


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 8, 17, 31, 32, 33, 64])
def test_pixels_equal_the_cpu_kernels_for_every_size(simt, size, channels):
    augment = Augment.sela(size, jitter_probability=0.6, gray_probability=0.4, **PLAIN)
    for number, (height, width) in thin(simt, enumerate(SIDES)):
        images = random_images(6, height, width, channels, seed=number)
        check_pixels(simt, images, np.arange(6), augment, key=(number, size, channels))


@pytest.mark.parametrize("preset", ["none", "flip", "resized_crop", "cifar", "eval"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_preset_gives_the_cpus_pixels(simt, preset, channels):
    for size, (height, width) in thin(simt, product([9, 32], [(5, 9), (32, 32), (40, 27), (33, 64)])):
        images = random_images(6, height, width, channels, seed=size)
        check_pixels(simt, images, np.arange(6), getattr(Augment, preset)(size, **PLAIN), key=(1, 2, 3))


def test_windows_of_enlarged_and_reduced_images_give_the_cpus_pixels(simt):
    """Short sides to 12, 40 and 100 pixels, then a window of 12."""
    for resize, (height, width) in thin(simt, product([12, 40, 100], [(12, 12), (31, 64), (64, 20)])):
        images = random_images(4, height, width, 3)
        check_pixels(simt, images, np.arange(4), Augment.eval(12, resize=resize, flip_probability=0.5, **PLAIN))


def test_every_order_of_the_colour_operations_gives_the_cpus_pixels(simt, schedule):
    cases = list(product(permutations(range(4)), [0, 1], [False, True]))
    images = random_images(len(cases), 9, 11, 3)
    for gray_first in (True, False):
        augment = Augment.sela(16, gray_first=gray_first, **PLAIN)
        given = cpu_parameters(simt, augment, (9, 11), np.arange(len(cases)), (schedule, 0, 0))
        for record, (order, gray, extreme) in zip(given, cases, strict=True):
            record["order"], record["gray"], record["jitter"] = order, gray, 1
            if extreme:
                record["brightness"], record["contrast"], record["saturation"], record["hue"] = 2.5, 0.0, 3.0, -0.5
        check_pixels(simt, images, np.arange(len(cases)), augment, given=given, close=2e-5)


def test_factors_of_an_image_without_jitter_are_not_used(simt):
    images = random_images(4, 9, 11, 3)
    for gray_first in (True, False):
        augment = Augment.sela(8, gray_first=gray_first, **PLAIN)
        given = cpu_parameters(simt, augment, (9, 11), np.arange(4))
        given["jitter"], given["gray"] = 0, [0, 1, 0, 1]
        given["brightness"], given["contrast"], given["saturation"], given["hue"] = 9.0, 3.0, 5.0, 0.4
        check_pixels(simt, images, np.arange(4), augment, given=given)


@pytest.mark.parametrize("idle", ["brightness", "contrast", "saturation", "hue"])
def test_an_operation_without_effect_leaves_the_others_as_they_are(simt, idle):
    orders = list(permutations(range(4)))
    images = random_images(len(orders), 9, 11, 3)
    augment = Augment.sela(16, **PLAIN)
    given = cpu_parameters(simt, augment, (9, 11), np.arange(len(orders)))
    given["jitter"], given["order"], given[idle] = 1, orders, 0.0 if idle == "hue" else 1.0
    check_pixels(simt, images, np.arange(len(orders)), augment, given=given, close=2e-5)


@pytest.mark.parametrize("hue", [-0.5, -0.25, 0.0, 1 / 3, 0.5])
@pytest.mark.parametrize("factor", [0.0, 1.0, 4.0])
def test_extreme_factors_of_extreme_images_give_the_cpus_pixels(simt, factor, hue):
    images = random_images(9, 6, 5, 3)
    images[6:9] = 0
    images[7, ..., 0] = 255
    images[8, ..., 2] = 255
    augment = Augment.sela(8, **PLAIN)
    given = cpu_parameters(simt, augment, (6, 5), np.arange(9))
    given["jitter"], given["gray"] = 1, 0
    given["brightness"] = given["contrast"] = given["saturation"] = factor
    given["hue"] = hue
    check_pixels(simt, images, np.arange(9), augment, given=given, close=2e-5)


def test_given_boxes_are_honoured_at_every_corner(simt):
    images = random_images(1, 33, 29, 3)
    boxes = [
        (0, 0, 33, 29),
        (0, 0, 1, 1),
        (32, 28, 1, 1),
        (0, 27, 33, 2),
        (30, 0, 3, 29),
        (5, 7, 16, 16),
        (1, 1, 31, 27),
    ]
    given = np.zeros(2 * len(boxes), PARAMETERS)
    for record, (flip, box) in zip(given, product([0, 1], boxes), strict=True):
        record["top"], record["left"], record["height"], record["width"] = box
        record["flip"] = flip
    for size in (1, 16, 31, 40):
        check_pixels(simt, images, np.zeros(len(given), np.int64), Augment.resized_crop(size, **PLAIN), given=given)


def round_to_half(values, dtype):
    """float32 to 16 bits, ties to even, as integers."""
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("size", "channels"), [(1, 3), (8, 3), (31, 3), (32, 3), (32, 1), (33, 1), (4, 1), (2, 3), (6, 3)]
)
def test_halves_and_memory_orders_hold_the_floats(simt, size, channels, channels_last):
    """The float32 NCHW output, which other tests compare, in every type and order, at aligned and odd addresses."""
    images = random_images(7, 20, 30, channels)
    augment = Augment.cifar(size)
    index = np.array([3, 3, 0, 6, 5, 1, 2])
    floats, _ = on_device(simt, images, index, augment)
    planes = floats.reshape(7, channels, size * size)
    floats = planes.transpose(0, 2, 1).reshape(7, -1) if channels_last else floats
    for shift in thin(simt, [0, 4, 8]):
        found, _ = on_device(simt, images, index, augment, channels_last=channels_last, shift=shift)
        np.testing.assert_array_equal(found, floats)
    for dtype, shift in thin(simt, product(["float16", "bfloat16"], [0, 2, 8])):
        found, _ = on_device(simt, images, index, augment, dtype=dtype, channels_last=channels_last, shift=shift)
        np.testing.assert_array_equal(found, round_to_half(np.ascontiguousarray(floats), dtype))


def test_the_whole_output_is_the_cpu_kernels_in_every_type_and_order(simt):
    images = random_images(5, 32, 32, 3)
    augment = Augment.sela(32, mean=(0.1, 0.5, 0.9), std=(0.5, 1.0, 2.0))
    for dtype, channels_last in product(["float32", "float16", "bfloat16"], [False, True]):
        found, drawn = on_device(simt, images, np.arange(5), augment, dtype=dtype, channels_last=channels_last)
        expected = on_cpu(simt, images, np.arange(5), drawn, augment, dtype, channels_last)
        grain = {"float32": CLOSE, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
        np.testing.assert_allclose(widen(found, dtype), widen(expected, dtype), rtol=0, atol=grain)


@pytest.mark.parametrize(
    ("height", "width", "channels"), [(32, 32, 3), (7, 5, 3), (31, 33, 1), (1, 1, 3), (3, 1, 1), (5, 3, 1)]
)
def test_images_may_start_at_any_address(simt, height, width, channels):
    """Bytes around the data set are of another value in two runs, which must not show."""
    augment = Augment.resized_crop(9)
    images = random_images(6, height, width, channels)
    index = np.array([5, 0, 3, 3, 1, 2, 4])
    expected, _ = on_device(simt, images, index, augment)
    for shift, filler in thin(simt, product([1, 2, 3, 7, 8, 15], [0, 255])):
        room = np.full(images.nbytes + 64, filler, np.uint8)
        moved = room[16 + shift : 16 + shift + images.nbytes].reshape(images.shape)
        moved[:] = images
        found, _ = on_device(simt, moved, index, augment)
        np.testing.assert_array_equal(found, expected)


def test_a_data_set_that_ends_with_its_memory_is_not_read_beyond(simt):
    """For the address sanitizer: arrays of exactly the data's bytes, one image each."""
    for height, width, channels in [(7, 5, 3), (31, 31, 1), (1, 1, 1), (33, 29, 3)]:
        images = random_images(1, height, width, channels)
        check_pixels(simt, images, np.zeros(3, np.int64), Augment.sela(8, **PLAIN))


@pytest.mark.plain_only
def test_a_data_set_at_the_end_of_a_page_is_not_read_beyond_it(simt):
    """In a process of its own, since a byte too far ends it: images up to the last byte before forbidden memory."""
    code = f"""
import ctypes, importlib.util, mmap, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_simt", {simt.__file__!r})
simt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simt)
size, page = 8, mmap.PAGESIZE
options = simt.AugmentOptions(**{option_fields(Augment.resized_crop(8), 3)!r})
memory = mmap.mmap(-1, 3 * page)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for forbidden in (base, base + 2 * page):
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
index = np.zeros(5, np.int64)
out = np.zeros((5, 3, size, size), np.float32)
for height, width in [(7, 5), (1, 1), (31, 33), (3, 3)]:
    for start in (base + page, base + 2 * page - height * width * 3):
        simt.augment_resident_cuda(options, start, 1, height, width, 3, index.ctypes.data, 5, height, 0, 0, 0, 0,
                                   out.ctypes.data, "float32", False, 0)
print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, f"status {run.returncode}: {run.stderr[-500:]}"
    assert run.stdout == "done\n"


def test_bits_do_not_depend_on_grid_or_schedule_or_batch(simt, schedule):
    images = random_images(40, 32, 32, 3)
    augment = Augment.sela(32)
    index = np.arange(40)
    simt.set_device(10 if simt.variant == "thread" else 40, 1)
    simt.set_schedule(0)
    expected, _ = on_device(simt, images, index, augment)
    simt.set_schedule(schedule)
    for grid in [(1, 1), (3, 1)]:
        simt.set_device(*grid)
        found, _ = on_device(simt, images, index, augment)
        np.testing.assert_array_equal(found, expected)
    simt.set_device(1, 2)
    found, _ = on_device(simt, images, index[::-1], augment)
    np.testing.assert_array_equal(found, expected[::-1])


def test_one_image_repeated_gives_one_output(simt, schedule):
    images = random_images(3, 31, 33, 3)
    found, drawn = on_device(simt, images, np.full(21, 1), Augment.sela(17), key=(9, 0, 0))
    assert len(np.unique(drawn)) == 1
    np.testing.assert_array_equal(found, np.repeat(found[:1], 21, axis=0))


def test_images_of_the_output_size_keep_their_pixels(simt):
    images = random_images(4, 33, 33, 3)
    found, _ = on_device(simt, images, np.arange(4), Augment.none(33, mean=(0.0,), std=(1 / 255,)), channels_last=True)
    np.testing.assert_allclose(found.reshape(images.shape), images, rtol=0, atol=1e-4)


def test_numbers_outside_the_data_set_give_nan_and_harm_no_other_image(simt):
    images = random_images(4, 8, 8, 3)
    augment = Augment.resized_crop(8, **PLAIN)
    whole, _ = on_device(simt, images, np.arange(4), augment)
    simt.set_device(1, 1)
    found, _ = on_device(simt, images, np.array([0, 4, 1, -1, 2, 2**39, 3]), augment)
    assert np.isnan(found[1::2]).all()
    np.testing.assert_array_equal(found[::2], whole)


def test_an_empty_batch_launches_nothing(simt):
    before = simt.statistics()["launches"]
    on_device(simt, random_images(2, 8, 8, 3), np.zeros(0, np.int64), Augment.sela(8))
    simt.sample_parameters_cuda(make_options(simt, Augment.sela(8), 3), 8, 8, 0, 0, 0, 0, 0, 0, 0)
    assert simt.statistics()["launches"] == before


@pytest.mark.parametrize(
    ("height", "width", "channels", "size", "reason"),
    [
        (65, 8, 3, 8, "1 to 64 pixels a side on CUDA, found 65 x 8 to 8"),
        (8, 65, 3, 8, "found 8 x 65 to 8"),
        (8, 8, 3, 65, "found 8 x 8 to 65"),
        (0, 8, 3, 8, "found 0 x 8 to 8"),
        (8, 8, 2, 8, "1 or 3 channels, found 2"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(simt, height, width, channels, size, reason):
    options = make_options(simt, Augment.none(size), 3)
    with pytest.raises(ValueError, match=reason):
        simt.augment_resident_cuda(options, 0, 1, height, width, channels, 0, 1, 0, 0, 0, 0, 0, 0, "float32", False, 0)


def test_names_that_do_not_exist_are_refused(simt):
    options = make_options(simt, Augment.none(8), 3)
    for dtype in ("float64", "uint8"):
        with pytest.raises(ValueError, match=f"dtype: expected float32, float16 or bfloat16 on CUDA, found {dtype}"):
            simt.augment_resident_cuda(options, 0, 1, 8, 8, 3, 0, 1, 0, 0, 0, 0, 0, 0, dtype, False, 0)
    with pytest.raises(ValueError, match="crop: expected random, center or resize, found middle"):
        simt.AugmentOptions(**{**option_fields(Augment.none(8), 3), "crop": "middle"})


def test_given_parameters_are_checked_before_they_are_uploaded(simt):
    augment = Augment.sela(8)
    given = cpu_parameters(simt, augment, (9, 11), np.arange(3))
    simt.check_parameters(make_options(simt, augment, 3), given, 9, 11)
    given["left"][1], given["width"][1] = 8, 4
    with pytest.raises(ValueError, match=r"params\[1\]: expected a box inside the image.* for an image of 9 x 11"):
        simt.check_parameters(make_options(simt, augment, 3), given, 9, 11)


# ---- sela_ext.kernels.augment_resident on a device that the runner stands in for.


@pytest.fixture
def resident(simt, request):
    """What is behind kernels.augment_resident, on a device whose memory is the host's, with the runner's kernels."""
    pytest.importorskip("torch")
    from sela_ext.kernels import augment_resident

    module = sys.modules[augment_resident.__module__]
    card = request.getfixturevalue("host_card")
    card.core = simt
    return SimpleNamespace(run_cuda=partial(module.run_cuda, card), as_records=module.as_records)


@pytest.mark.plain_only
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_python_layer_gives_the_torch_twins_images(simt, resident, channels, channels_last, dtype):
    import torch

    from sela_ext.kernels import reference

    images = torch.from_numpy(random_images(9, 21, 32, channels))
    augment = Augment.sela(32)
    index = torch.tensor([8, 0, 3, 3, 1])
    kind = getattr(torch, dtype)
    found, words = resident.run_cuda(images, index, augment, (5, 6, 7), None, None, None, kind, channels_last, True)
    expected, drawn = reference.augment_resident(
        images, index, augment, seed=5, epoch=6, view=7, dtype=kind, channels_last=channels_last, return_parameters=True
    )
    assert resident.as_records(words).tobytes() == drawn.tobytes()
    assert found.dtype == kind
    assert found.stride() == expected.stride()
    grain = {"float32": LIMIT / 0.22, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    assert (found.float() - expected.float()).abs().max() < grain
    again, words = resident.run_cuda(images, index, augment, (0, 0, 0), drawn, None, None, kind, channels_last, False)
    assert torch.equal(again, found)
    assert len(words) == 0
    out = torch.full_like(found, 3)
    assert resident.run_cuda(images, [0] * 5, augment, (1, 2, 3), None, None, out, None, channels_last, False)[0] is out
    assert not (out == 3).all()


@pytest.mark.plain_only
def test_the_python_layer_refuses_what_does_not_fit(simt, resident):
    import torch

    from sela_ext.errors import DataError, OptionError

    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    augment = Augment.sela(8)
    params = cpu_parameters(simt, augment, (8, 8), np.arange(4))

    def run(images=images, index=(0, 1, 2, 3), augment=augment, params=None, out=None, dtype=None, last=False):
        return resident.run_cuda(images, index, augment, (0, 0, 0), params, None, out, dtype, last, False)

    for match, wrong in [
        (r"uint8 \[N, H, W, C\] with C = 1 or 3, found torch.float32", {"images": images.float()}),
        (r"found torch.uint8 \(4, 8, 8, 2\)", {"images": images[..., :2].contiguous()}),
        ("contiguous memory", {"images": images[:, ::2]}),
        (r"image numbers in \[0, 4\), found 4", {"index": [0, 4]}),
        (r"image numbers in \[0, 4\), found -1", {"index": torch.tensor([-1, 3])}),
        ("expected integers, found float", {"index": [0.5]}),
        ("expected 4 records, one per row, found 3", {"params": params[:3]}),
        ("expected records", {"params": np.zeros(4)}),
        ("out: expected", {"out": torch.empty(4, 3, 8, 7)}),
        ("out: expected", {"out": torch.empty(4, 3, 8, 8), "dtype": torch.float16}),
        ("strides", {"out": torch.empty(4, 3, 8, 8), "last": True}),
    ]:
        with pytest.raises(DataError, match=match):
            run(**wrong)
    with pytest.raises(OptionError, match="dtype"):
        run(dtype=torch.float64)
    params["left"][2], params["width"][2] = 5, 4
    with pytest.raises(DataError, match=r"params\[2\]: expected a box inside the image"):
        run(params=params)
