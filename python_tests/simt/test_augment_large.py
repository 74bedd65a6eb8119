"""The fused augmentation of images of any size: parameters are the CPU's bits, pixels the CPU kernel's.

The CPU kernel here is the one inside `_simt`. Its vertical and horizontal passes come in an order that depends on the
box, here they do not; means and sums are taken in another order. So pixels are compared within a few units in the last
place of 1, and far below the promised 0.01 of 255.
"""

import importlib.util
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from sela_ext.kernels import EFFECTS, PARAMETERS, Augment

spec = importlib.util.spec_from_file_location("image_rows", Path(__file__).with_name("image_rows.py"))
image_rows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(image_rows)
LIMIT, GUARD, PLAIN = image_rows.LIMIT, image_rows.GUARD, image_rows.PLAIN
thin, random_images = image_rows.thin, image_rows.random_images
empty_output, untouched = image_rows.empty_output, image_rows.untouched
make_options, further_options = image_rows.make_options, image_rows.further_options
cpu_parameters, cpu_effects = image_rows.cpu_parameters, image_rows.cpu_effects

CLOSE = 6e-6  # what other orders of summation cost
CROPS = np.dtype([("data", np.uint64), ("height", np.int32), ("width", np.int32), ("stride", np.int64)])


@pytest.fixture(autouse=True)
def device(simt):
    """Four blocks at once: batches of several images take several rounds."""
    simt.set_device(1, 1)
    yield
    simt.set_device(2, 2)


def output_channels(augment, channels):
    return 2 if augment.sobel else channels


def on_cpu(simt, images, index, params, augment, effects=None, dtype="float32", channels_last=False):
    channels = images.shape[3] if hasattr(images, "shape") else images[0].shape[2]
    count = len(params)
    _, out = empty_output(count, output_channels(augment, channels), augment.size, dtype)
    target = (out.ctypes.data, dtype, channels_last, 1)
    options = (make_options(simt, augment, channels), further_options(simt, augment))
    if hasattr(images, "shape"):
        rows = np.ascontiguousarray(index, np.int64)
        simt.augment_array(*options, images, rows, params, effects, *target)
    else:
        simt.augment_list(*options, images, params, effects, *target)
    return out


class Batch:
    """What of the arguments says where the images are."""

    def __init__(self, simt, images, index=None):
        self.images, self.index = images, index
        self.keep = []
        self.resident = (0, 0)
        self.crops = self.planes = 0
        self.exact = False
        if isinstance(images, np.ndarray):
            self.resident = (images.ctypes.data, len(images))
            self.sides, self.channels = images.shape[1:3], images.shape[3]
            self.count = len(index)
        else:
            records = np.zeros(len(images), CROPS)
            for record, image in zip(records, images, strict=True):
                record["data"], record["stride"] = image.ctypes.data, image.strides[0]
                record["height"], record["width"] = image.shape[:2]
            self.keep = [records, images]
            self.crops = records.ctypes.data
            self.sides = tuple(max(image.shape[side] for image in images) for side in (0, 1))
            self.channels = images[0].shape[2]
            self.count = len(images)


def needs_of(params, effects):
    changes = (params["jitter"] != 0) & (params["contrast"] != 1)
    tone, blur, noise = effects["tone"] != 0, effects["blur"], effects["noise"]
    return (bool(changes.any()), bool(tone.any()), bool((tone | (blur > 0) | (noise > 0)).any()), float(blur.max()))


def on_device(
    simt,
    batch,
    augment,
    *,
    key=(0, 0, 0),
    given=None,
    effects=None,
    needs=None,
    dtype="float32",
    channels_last=False,
    shift=0,
):
    """(output [B, values], drawn parameters) of the kernels; given: not drawn."""
    count = batch.count
    room, out = empty_output(count, output_channels(augment, batch.channels), augment.size, dtype, shift)
    drawn = np.zeros(count, PARAMETERS)
    index = None if batch.index is None else np.ascontiguousarray(batch.index, np.int64)
    options = (make_options(simt, augment, batch.channels), further_options(simt, augment))
    needs = (True, True, True, augment.blur_sigma[1] if augment.blur_probability else 0.0) if needs is None else needs
    size = simt.augment_workspace_cuda(*options, batch.channels, *batch.sides, count, needs)
    workspace = np.full(size + 16, 0xFF, np.uint8)  # all floats are NaN
    simt.augment_device_cuda(
        *options,
        *batch.resident,
        batch.crops,
        batch.planes,
        batch.exact,
        *batch.sides,
        batch.channels,
        0 if index is None else index.ctypes.data,
        count,
        needs,
        *key,
        0 if given is None else given.ctypes.data,
        0 if effects is None else effects.ctypes.data,
        drawn.ctypes.data if given is None else 0,
        workspace.ctypes.data + (-workspace.ctypes.data) % 16,
        out.ctypes.data,
        dtype,
        channels_last,
        0,
    )
    assert untouched(room, out)
    return out, drawn


def worst(found, expected):
    """Largest difference; NaN where one of them is no number."""
    return np.abs(found.astype(np.float64) - expected).max()


def check_resident(simt, images, index, augment, key=(0, 0, 0), given=None, effects=None, close=CLOSE):
    """The kernels' output is the CPU kernel's, and what they drew is its bits."""
    drawn_effects = effects
    if effects is None:
        drawn_effects = cpu_effects(simt, augment, index, key)
    needs = None if given is None else needs_of(given, drawn_effects)
    found, drawn = on_device(
        simt, Batch(simt, images, index), augment, key=key, given=given, effects=effects, needs=needs
    )
    params = drawn if given is None else given
    if given is None:
        assert drawn.tobytes() == cpu_parameters(simt, augment, *images.shape[1:3], index, key).tobytes()
    expected = on_cpu(simt, images, index, params, augment, drawn_effects)
    difference = worst(found, expected)
    assert difference <= min(close, LIMIT), f"differs by {difference * 255:.5f} of 255"
    return found


SIDES = [(97, 65), (33, 97), (17, 17), (1, 90), (90, 1), (66, 66), (131, 200), (3, 5)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 17, 31, 33, 65, 97])
def test_pixels_equal_the_cpu_kernels_for_every_size(simt, size, channels):
    augment = Augment.sela(size, jitter_probability=0.6, gray_probability=0.4, **PLAIN)
    for number, (height, width) in thin(simt, enumerate(SIDES)):
        images = random_images(6, height, width, channels, seed=number)
        check_resident(simt, images, np.arange(6), augment, key=(number, size, channels))


@pytest.mark.parametrize("preset", ["none", "flip", "resized_crop", "sela", "cifar", "eval"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_preset_gives_the_cpus_pixels(simt, preset, channels):
    for size, (height, width) in thin(simt, product([17, 65], [(5, 9), (65, 70), (140, 95)])):
        images = random_images(6, height, width, channels, seed=size)
        check_resident(simt, images, np.arange(6), getattr(Augment, preset)(size, **PLAIN), key=(1, 2, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_each_channel_has_its_mean_and_deviation(simt, channels):
    """Of tiles alone, behind the contrast, and behind effects."""
    mean, std = (0.1, 0.5, 0.9)[:channels], (0.5, 0.25, 2.0)[:channels]
    images = random_images(3, 66, 40, channels)
    for steps in ({"jitter_probability": 0.0}, {}, {"blur_probability": 1.0, "blur_kernel": 3}):
        augment = Augment.sela(17, **steps, mean=mean, std=std)
        check_resident(simt, images, np.arange(3), augment, key=(5, 1, 0), close=1e-4)


EFFECT_PLANS = {
    "blur": {"blur_probability": 0.8, "blur_kernel": 15},
    "wide blur": {"blur_probability": 1.0, "blur_kernel": 41, "blur_sigma": (3.0, 9.0)},
    "tone": {"tone_probability": 0.9},
    "noise": {"noise_probability": 0.7},
    "sobel": {"sobel": True},
    "all": {
        **{"blur_probability": 0.7, "tone_probability": 0.8, "noise_probability": 0.5, "sobel": True},
        **{"gray_first": False},
    },
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("plan", list(EFFECT_PLANS))
def test_effects_give_the_cpus_pixels(simt, plan, channels):
    for size, (height, width) in thin(simt, [(33, (40, 51)), (70, (31, 90))]):
        augment = Augment.sela(size, jitter_probability=0.7, **{**EFFECT_PLANS[plan], **PLAIN})
        images = random_images(9, height, width, channels, seed=size)
        # A level at the border between two of equalize's bins may fall on either side: no more than that.
        check_effects(simt, images, augment)


@pytest.mark.plain_only
def test_a_blur_of_more_weights_than_a_block_has_threads_is_the_cpus(simt):
    steps = {"blur_probability": 1.0, "blur_kernel": 519, "blur_sigma": (70.0, 70.0)}
    check_effects(simt, random_images(1, 40, 51, 1), Augment.none(260, **steps, **PLAIN))


def check_effects(simt, images, augment, close=2e-5):
    index, key = np.arange(len(images)), (3, 1, 2)
    effects = cpu_effects(simt, augment, index, key)
    found, drawn = on_device(simt, Batch(simt, images, index), augment, key=key)
    params = cpu_parameters(simt, augment, *images.shape[1:3], index, key)
    assert drawn.tobytes() == params.tobytes()
    expected = on_cpu(simt, images, index, params, augment, effects)
    given, _ = on_device(
        simt, Batch(simt, images, index), augment, given=params, effects=effects, needs=needs_of(params, effects)
    )
    np.testing.assert_array_equal(given, found)
    difference = np.abs(found.astype(np.float64) - expected)
    assert not np.isnan(difference).any()
    equalized = effects["tone"] == 1
    assert difference[~equalized].max(initial=0.0) <= close
    if equalized.any():
        assert np.mean(difference[equalized] > 2e-5) < 0.01


def test_a_sharpened_image_of_one_or_two_pixels_stays_as_it_is(simt):
    for size in (1, 2, 3):
        augment = Augment.none(size, tone_probability=1.0, **PLAIN)
        images = random_images(3, 9, 7, 3)
        effects = np.zeros(3, EFFECTS)
        effects["tone"], effects["sharpness"] = 3, [0.0, 1.9, 7.0]
        params = cpu_parameters(simt, augment, 9, 7, np.arange(3))
        check_resident(simt, images, np.arange(3), augment, given=params, effects=effects, close=1e-6)


@pytest.mark.parametrize("tone", [1, 2])
def test_tones_of_flat_and_dark_images_give_the_cpus_pixels(simt, tone):
    augment = Augment.none(65, tone_probability=1.0, **PLAIN)
    images = random_images(6, 65, 65, 3)
    images[0] = 7
    images[1] //= 64
    images[3] = 0
    effects = np.zeros(6, EFFECTS)
    effects["tone"] = tone
    params = cpu_parameters(simt, augment, 65, 65, np.arange(6))
    found, _ = on_device(
        simt, Batch(simt, images, np.arange(6)), augment, given=params, effects=effects, needs=needs_of(params, effects)
    )
    expected = on_cpu(simt, images, np.arange(6), params, augment, effects)
    assert worst(found, expected) <= 1e-6


def random_crops(sides, channels, seed=0):
    """Images of several sizes, each in memory of its own, to the byte."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*side, channels), dtype=np.uint8) for side in sides]


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_of_different_sizes_give_the_cpus_pixels(simt, channels):
    for size in thin(simt, [17, 66, 96]):
        augment = Augment.aug_plus(size, **PLAIN)
        images = random_crops(SIDES, channels, seed=size)
        heights, widths = np.array([image.shape[:2] for image in images], np.int32).T
        index = np.arange(len(images))
        params = cpu_parameters(simt, augment, heights, widths, index, (1, 1, 1))
        effects = cpu_effects(simt, augment, index, (1, 1, 1))
        expected = on_cpu(simt, images, None, params, augment, effects)
        found, drawn = on_device(simt, Batch(simt, images, index), augment, key=(1, 1, 1))
        assert drawn.tobytes() == params.tobytes()
        assert worst(found, expected) <= 2e-5
        again, _ = on_device(
            simt, Batch(simt, images), augment, given=params, effects=effects, needs=needs_of(params, effects)
        )
        np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize(("height", "width"), [(3, 9001), (2100, 4), (700, 900), (1, 2000)])
def test_sources_far_larger_than_the_output_give_the_cpus_pixels(simt, height, width):
    """Tiles narrower than the output, and boxes that no tile holds."""
    for size in thin(simt, [7, 23]):
        images = random_images(2, height, width, 3)
        for preset in (Augment.none, Augment.eval):
            if preset is Augment.eval and max(height, width) > 1000:
                continue
            check_resident(simt, images, np.arange(2), preset(size, flip_probability=0.5, **PLAIN), close=2e-5)


def test_outputs_wider_than_a_block_give_the_cpus_pixels(simt):
    for size, (height, width) in thin(simt, [(257, (40, 30)), (300, (20, 700))]):
        images = random_images(1, height, width, 3)
        check_resident(simt, images, [0], Augment.sela(size, **PLAIN), key=(5, 0, 0), close=2e-5)


def test_windows_of_enlarged_and_reduced_images_give_the_cpus_pixels(simt):
    for resize, (height, width) in thin(simt, product([20, 66, 150], [(20, 20), (70, 100), (101, 33)])):
        images = random_images(3, height, width, 3)
        check_resident(simt, images, np.arange(3), Augment.eval(20, resize=resize, flip_probability=0.5, **PLAIN))


def test_every_order_of_the_colour_operations_gives_the_cpus_pixels(simt, schedule):
    cases = list(product(permutations(range(4)), [0, 1], [False, True]))
    images = random_images(len(cases), 9, 70, 3)
    for gray_first in (True, False):
        augment = Augment.sela(17, gray_first=gray_first, **PLAIN)
        given = cpu_parameters(simt, augment, 9, 70, np.arange(len(cases)), (schedule, 0, 0))
        for record, (order, gray, extreme) in zip(given, cases, strict=True):
            record["order"], record["gray"], record["jitter"] = order, gray, 1
            if extreme:
                record["brightness"], record["contrast"], record["saturation"], record["hue"] = 2.5, 0.0, 3.0, -0.5
        check_resident(simt, images, np.arange(len(cases)), augment, given=given, close=2e-5)


def round_to_half(values, dtype):
    """float32 to 16 bits, ties to even, as integers."""
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("steps", [{}, {"jitter_probability": 0.0}, {"blur_probability": 1.0}, {"sobel": True}])
@pytest.mark.parametrize(("size", "channels"), [(33, 3), (32, 3), (66, 1), (20, 3)])
def test_halves_and_memory_orders_hold_the_floats(simt, size, channels, steps, channels_last):
    """The float32 NCHW output, which other tests compare, in every type and order, at aligned and odd addresses."""
    images = random_images(4, 20, 66, channels)
    augment = Augment.cifar(size, **steps)
    batch = Batch(simt, images, np.array([3, 3, 0, 1]))
    floats, _ = on_device(simt, batch, augment)
    planes = floats.reshape(4, -1, size * size)
    floats = planes.transpose(0, 2, 1).reshape(4, -1) if channels_last else floats
    for shift in thin(simt, [0, 4]):
        found, _ = on_device(simt, batch, augment, channels_last=channels_last, shift=shift)
        np.testing.assert_array_equal(found, floats)
    for dtype, shift in thin(simt, product(["float16", "bfloat16"], [0, 2])):
        found, _ = on_device(simt, batch, augment, dtype=dtype, channels_last=channels_last, shift=shift)
        np.testing.assert_array_equal(found, round_to_half(np.ascontiguousarray(floats), dtype))


def test_images_may_lie_at_any_address(simt):
    images = random_images(5, 70, 33, 3)
    augment = Augment.sela(31)
    index = np.array([4, 0, 3, 1, 2])
    expected, _ = on_device(simt, Batch(simt, images, index), augment)
    for shift, filler in thin(simt, product([1, 2, 3], [0, 255])):
        room = np.full(images.nbytes + 64, filler, np.uint8)
        moved = room[16 + shift : 16 + shift + images.nbytes].reshape(images.shape)
        moved[:] = images
        found, _ = on_device(simt, Batch(simt, moved, index), augment)
        np.testing.assert_array_equal(found, expected)


def test_images_that_end_with_their_memory_are_not_read_beyond(simt):
    """For the address sanitizer: arrays of exactly the data's bytes, one image each."""
    for height, width, channels in thin(simt, [(7, 5, 3), (66, 31, 1), (1, 1, 1), (33, 79, 3), (1, 2, 3)]):
        images = random_images(1, height, width, channels)
        check_resident(simt, images, np.zeros(2, np.int64), Augment.sela(8, **PLAIN))


def test_bits_do_not_depend_on_rounds_or_schedule(simt, schedule):
    """More multiprocessors: more images per round; a batch: rounds that begin elsewhere."""
    images = random_images(12, 66, 40, 3)
    augment = Augment.aug_plus_more(33, noise_probability=0.5)
    index = np.arange(12)
    simt.set_schedule(0)
    simt.set_device(40, 1)
    expected, _ = on_device(simt, Batch(simt, images, index), augment)
    simt.set_schedule(schedule)
    launches = []
    for multiprocessors in (1, 40):
        simt.set_device(multiprocessors, 1)
        before = simt.statistics()["launches"]
        found, _ = on_device(simt, Batch(simt, images, index), augment)
        launches.append(simt.statistics()["launches"] - before)
        np.testing.assert_array_equal(found, expected)
    assert launches[0] > launches[1]
    simt.set_device(1, 1)
    found, _ = on_device(simt, Batch(simt, images, index[::-1]), augment)
    np.testing.assert_array_equal(found, expected[::-1])


def test_numbers_outside_the_data_set_give_nan_and_harm_no_other_image(simt):
    images = random_images(4, 66, 20, 3)
    for steps in ({}, {"jitter_probability": 0.0}, {"tone_probability": 1.0, "blur_probability": 1.0}, {"sobel": True}):
        augment = Augment.sela(17, **{**steps, **PLAIN})
        whole, _ = on_device(simt, Batch(simt, images, np.arange(4)), augment)
        found, _ = on_device(simt, Batch(simt, images, np.array([0, 4, 1, -1, 2, 2**39, 3])), augment)
        assert np.isnan(found[1::2]).all()
        np.testing.assert_array_equal(found[::2], whole)


def test_steps_that_nobody_needs_are_not_launched(simt):
    images = random_images(3, 66, 20, 3)
    batch = Batch(simt, images, np.arange(3))
    nothing, contrast = (False, False, False, 0.0), (True, False, False, 0.0)
    for augment, needs, launches in [
        (Augment.none(17), nothing, 2),
        (Augment.sela(17), contrast, 3),
        (Augment.none(17, sobel=True), nothing, 5),
        (Augment.aug_plus(17, blur_kernel=3), (True, False, True, 2.0), 5),
        (Augment.aug_plus_more(17, blur_kernel=3, sobel=True), (True, True, True, 2.0), 7),
    ]:
        before = simt.statistics()["launches"]
        on_device(simt, batch, augment, needs=needs)
        assert simt.statistics()["launches"] - before == launches
    before = simt.statistics()["launches"]
    on_device(simt, Batch(simt, images, np.zeros(0, np.int64)), Augment.sela(17))
    assert simt.statistics()["launches"] == before


# ---- Planes.


def random_planes(height, width, steps, count=3, top=0, left=0, smooth=None, rgb=False, reduced=1, seed=0):
    """A smooth image with some noise, as components of `steps` pixels per chroma sample; from (top, left) on."""
    rng = np.random.default_rng(seed)
    planes = []
    for c in range(count):
        row, column = (reduced, reduced) if c == 0 else steps
        tall, wide = -(-height // row) - top // row, -(-width // column) - left // column
        ramp = 90 + 60 * np.sin(np.arange(tall)[:, None] / 5 + c) + 50 * np.cos(np.arange(wide) / 7)
        planes.append(np.clip(ramp + rng.normal(0, 25, (tall, wide)), 0, 255).astype(np.uint8))
    return (planes, top, left, height, width, steps, smooth, rgb, reduced)


class PlaneBatch(Batch):
    def __init__(self, simt, images, exact=False, index=None):
        addresses = np.zeros((len(images), 3), np.int64)
        for i, image in enumerate(images):
            addresses[i, : len(image[0])] = [plane.ctypes.data for plane in image[0]]
        self.records = simt.plane_records(images, addresses)
        room = np.zeros(self.records.nbytes + 16, np.uint8)
        begin = -room.ctypes.data % 16
        room[begin : begin + self.records.nbytes] = self.records.reshape(-1)
        self.keep = [room, images]
        self.resident, self.crops, self.planes = (0, 0), 0, room.ctypes.data + begin
        self.exact, self.index, self.channels, self.count = exact, index, 3, len(images)
        self.sides = (max(image[3] for image in images), max(image[4] for image in images))


def planes_on_cpu(simt, images, params, augment, effects=None, exact=False):
    _, out = empty_output(len(images), output_channels(augment, 3), augment.size, "float32")
    options = (make_options(simt, augment, 3), further_options(simt, augment))
    simt.augment_planes(*options, images, exact, 3, params, effects, out.ctypes.data, "float32", False, 1)
    return out


def check_planes(simt, images, augment, exact, key=(1, 2, 3), close=2e-5):
    heights, widths = np.array([image[3:5] for image in images], np.int32).T
    index = np.arange(len(images))
    params = cpu_parameters(simt, augment, heights, widths, index, key)
    effects = cpu_effects(simt, augment, index, key)
    simt.check_planes(make_options(simt, augment, 3), images, params)
    expected = planes_on_cpu(simt, images, params, augment, effects, exact)
    needs = needs_of(params, effects)
    found, _ = on_device(simt, PlaneBatch(simt, images, exact), augment, given=params, effects=effects, needs=needs)
    assert worst(found, expected) <= close
    return found


STEPS = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 4)]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("steps", STEPS)
def test_planes_give_the_cpus_pixels(simt, steps, exact):
    sides = thin(simt, [(40, 51), (97, 66), (5, 3), (1, 1), (2, 71), (71, 2)])
    images = [random_planes(*side, steps, seed=i) for i, side in enumerate(sides)]
    for size in thin(simt, [17, 40, 66]):
        check_planes(simt, images, Augment.resized_crop(size, **PLAIN), exact)
        check_planes(simt, images, Augment.sela(size, **PLAIN), exact)


@pytest.mark.parametrize("exact", [False, True])
def test_gray_rgb_reduced_and_repeated_planes_give_the_cpus_pixels(simt, exact):
    images = [
        random_planes(60, 77, (2, 2), count=1),
        random_planes(60, 77, (1, 1), rgb=True),
        random_planes(60, 77, (2, 2), smooth=(False, False)),
        random_planes(60, 77, (8, 8), reduced=4),
        random_planes(61, 79, (2, 2), reduced=2),
        random_planes(60, 77, (1, 1), count=1, reduced=8),
    ]
    check_planes(simt, images, Augment.sela(33, **PLAIN), exact)
    check_planes(simt, images, Augment.eval(20, resize=30, **PLAIN), exact)


def test_parts_of_planes_are_enough(simt):
    """What is above and left of the samples that are there is not read."""
    images = [random_planes(64, 80, (2, 2), top=16, left=32, seed=5)]
    whole = [random_planes(64, 80, (2, 2), seed=6)]
    for plane, part in zip(whole[0][0], images[0][0], strict=True):
        plane[-part.shape[0] :, -part.shape[1] :] = part
    augment = Augment.resized_crop(20, **PLAIN)
    params = np.zeros(1, PARAMETERS)
    params["top"], params["left"], params["height"], params["width"] = 20, 36, 44, 44
    for exact in (False, True):
        needs = (False, False, False, 0.0)
        expected, _ = on_device(simt, PlaneBatch(simt, whole, exact), augment, given=params, needs=needs)
        found, _ = on_device(simt, PlaneBatch(simt, images, exact), augment, given=params, needs=needs)
        np.testing.assert_array_equal(found, expected)
        assert worst(found, planes_on_cpu(simt, images, params, augment, exact=exact)) <= CLOSE


@pytest.mark.parametrize("exact", [False, True])
def test_planes_far_larger_than_the_output_give_the_cpus_pixels(simt, exact):
    images = [random_planes(4, 5000, (2, 2)), random_planes(900, 30, (1, 2)), random_planes(30, 900, (1, 1), rgb=True)]
    check_planes(simt, images, Augment.none(7, flip_probability=1.0, **PLAIN), exact)


def test_records_of_planes_hold_what_the_cpu_sees(simt):
    images = [random_planes(9, 11, (2, 2))]
    with pytest.raises(ValueError, match=r"addresses: expected \[1, 3\]"):
        simt.plane_records(images, np.zeros((2, 3), np.int64))
    augment = Augment.none(8)
    params = cpu_parameters(simt, augment, 9, 11, [0])
    options = make_options(simt, augment, 3)
    params["width"] = 12
    with pytest.raises(ValueError, match=r"params\[0\]: expected a box inside the image"):
        simt.check_planes(options, images, params)
    params["width"] = 11
    images[0][0][1] = images[0][0][1][:-1]
    with pytest.raises(ValueError, match=r"planes\[0\]: expected planes that hold the samples of needed_box"):
        simt.check_planes(options, images, params)


# ---- Refusals.


@pytest.mark.parametrize(
    ("height", "width", "channels", "size", "reason"),
    [
        (0, 8, 3, 8, "at least 1 x 1 pixels, found 0 x 8"),
        (8, 8, 2, 8, "1 or 3 channels, found 2"),
        (8, 8, 3, 20000, "1 to 16384 pixels a side on CUDA, found 20000"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(simt, height, width, channels, size, reason):
    augment = Augment.none(size)
    options = (make_options(simt, augment, 3), further_options(simt, augment))
    needs = (False, False, False, 0.0)
    with pytest.raises(ValueError, match=reason):
        simt.augment_workspace_cuda(*options, channels, height, width, 1, needs)
    with pytest.raises(ValueError, match=reason):
        simt.augment_device_cuda(
            *options,
            1,
            1,
            0,
            0,
            False,
            height,
            width,
            channels,
            0,
            1,
            needs,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            "float32",
            False,
            0,
        )


def test_names_and_blurs_that_do_not_exist_are_refused(simt):
    augment = Augment.none(10000, blur_probability=1.0, blur_sigma=(3000.0, 3000.0), blur_kernel=19999)
    options = (make_options(simt, augment, 3), further_options(simt, augment))
    rest = (1, 1, 0, 0, False, 8, 8, 3, 0, 1, (False, False, True, 3000.0), 0, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="at most 8192 pixels from its middle on CUDA, found 9999"):
        simt.augment_device_cuda(*options, *rest, "float32", False, 0)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16 on CUDA, found uint8"):
        simt.augment_device_cuda(*options, *rest, "uint8", False, 0)
