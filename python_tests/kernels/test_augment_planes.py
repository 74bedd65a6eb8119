"""The fused pass on planes: against Pillow's pixels, torchvision v2 in float and the twin."""

import dataclasses
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional

from sela_ext import kernels
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import Augment, Planes, reference
from sela_ext.kernels.augment_planes import SUBSAMPLINGS

LIMIT = 0.01 / 255
SIZES = [(1, 1), (1, 2), (2, 1), (3, 3), (5, 4), (4, 6), (1, 40), (40, 1), (31, 33), (64, 48), (65, 90), (200, 33)]


def random_planes(size, subsampling, seed=0, top=0, left=0):
    """A whole image: soft structures and noise, so that colours saturate here and there."""
    rng = np.random.default_rng(seed)
    step = SUBSAMPLINGS[subsampling]
    data = []
    for row, column in ((1, 1), step, step):
        shape = (-(-size[0] // row), -(-size[1] // column))
        coarse = torch.from_numpy(rng.random((1, 1, 3, 4), dtype=np.float32))
        soft = torch.nn.functional.interpolate(coarse, shape, mode="bilinear")[0, 0].numpy()
        data.append((soft * 200 + rng.integers(0, 56, shape)).astype(np.uint8))
    return Planes(tuple(data), *size, subsampling=subsampling)


def boxed(planes, box):
    """The same planes, cut down to a box of pixels widened to whole samples."""
    top, left, bottom, right = (int(x) for x in box)
    row, column = planes.step if len(planes.data) == 3 else (1, 1)
    top, left = top // row * row, left // column * column
    data = [
        plane[top // r : -(-bottom // r), left // c : -(-right // c)].copy()
        for (r, c), plane in zip(planes.steps, planes.data, strict=True)
    ]
    return dataclasses.replace(planes, data=tuple(data), top=top, left=left)


def draw(augment, source, seed=0):
    heights, widths = np.array([(planes.height, planes.width) for planes in source]).T
    index = np.arange(len(source))
    params = kernels.sample_parameters(augment, heights, widths, index, seed=seed, epoch=1)
    return params, kernels.sample_effects(augment, index, seed=seed, epoch=1)


def blocky_planes(size, subsampling, seed=0):
    """A whole image whose samples are alike in blocks of 8 x 8: a JPEG file of DC coefficients holds it exactly."""
    rng = np.random.default_rng(seed)
    step = SUBSAMPLINGS[subsampling]
    data = []
    for row, column in ((1, 1), step, step):
        shape = (-(-size[0] // row), -(-size[1] // column))
        blocks = rng.integers(0, 256, (-(-shape[0] // 8), -(-shape[1] // 8)), dtype=np.uint8)
        data.append(np.repeat(np.repeat(blocks, 8, 0), 8, 1)[: shape[0], : shape[1]].copy())
    return Planes(tuple(data), *size, subsampling=subsampling)


def jpeg_of(planes):
    """A baseline JPEG file of planes that are alike in blocks of 8 x 8: every block is its DC coefficient."""
    steps = planes.steps
    most = (max(s[0] for s in steps), max(s[1] for s in steps))
    factors = [(most[0] // row, most[1] // column) for row, column in steps]  # blocks per MCU, (rows, columns)
    mcus = [-(-n // (8 * m)) for n, m in zip((planes.height, planes.width), most, strict=True)]
    bits = []
    last = [0] * len(steps)
    for my in range(mcus[0]):
        for mx in range(mcus[1]):
            for c, (rows, columns) in enumerate(factors):
                for y in range(my * rows, (my + 1) * rows):
                    for x in range(mx * columns, (mx + 1) * columns):
                        plane = planes.data[c]
                        value = int(plane[min(8 * y, plane.shape[0] - 1), min(8 * x, plane.shape[1] - 1)])
                        change = 8 * (value - 128) - last[c]
                        last[c] += change
                        length = abs(change).bit_length()
                        bits.append(f"{length:04b}")  # the DC code: twelve symbols of 4 bits
                        if length:
                            bits.append(f"{change if change > 0 else change + (1 << length) - 1:0{length}b}")
                        bits.append("0")  # end of block: the only AC code
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    body = bytes(int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)).replace(b"\xff", b"\xff\x00")

    def segment(marker, content):
        return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content

    count = len(steps)
    frame = bytes([8]) + planes.height.to_bytes(2, "big") + planes.width.to_bytes(2, "big") + bytes([count])
    frame += b"".join(bytes([c + 1, factors[c][1] << 4 | factors[c][0], 0]) for c in range(count))
    scan = bytes([count]) + b"".join(bytes([c + 1, 0]) for c in range(count)) + bytes([0, 63, 0])
    jfif = segment(0xE0, b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00") if count == 3 else b""
    tables = segment(0xDB, bytes([0]) + bytes([1] * 64))
    tables += segment(0xC4, bytes([0x00]) + bytes([0, 0, 0, 12] + [0] * 12) + bytes(range(12)))
    tables += segment(0xC4, bytes([0x10]) + bytes([1] + [0] * 15) + bytes([0]))
    return b"\xff\xd8" + jfif + tables + segment(0xC0, frame) + segment(0xDA, scan) + body + b"\xff\xd9"


def pillow(planes):
    """The RGB pixels of the file that holds these planes, uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(jpeg_of(planes))) as image:
        return np.array(image.convert("RGB"))


def in_unit(batch, augment, channels=3):
    mean, std = (torch.tensor(values)[:, None, None] for values in augment.channel_values(channels))
    return batch * std + mean


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_exact_pixels_are_pillows_bit_for_bit(subsampling):
    for k, size in enumerate([*SIZES, (37, 101)]):
        planes = blocky_planes(size, subsampling, seed=k)
        pixels = pillow(planes)
        augment = Augment.none(max(size))
        params, _ = draw(augment, [planes])
        if size[0] == size[1]:  # not resampled
            found = kernels.augment_planes([planes], params, augment, exact=True, dtype=torch.uint8)[0]
            assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels)
        found = kernels.augment_planes([planes], params, augment, exact=True)
        assert torch.equal(found, kernels.augment([pixels], params, augment))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("preset", ["sela", "eval"])
def test_exact_outputs_equal_torchvision_float_on_pillows_pixels(preset, subsampling):
    augment = getattr(Augment, preset)(33)
    source = [blocky_planes(size, subsampling, seed=k) for k, size in enumerate([(31, 33), (64, 48), (200, 37)] * 3)]
    params, _ = draw(augment, source)
    found = in_unit(kernels.augment_planes(source, params, augment, exact=True), augment)
    for planes, record, mine in zip(source, params, found, strict=True):
        x = torch.from_numpy(pillow(planes)).permute(2, 0, 1).float() / 255
        top, left, height, width = (int(record[name]) for name in ("top", "left", "height", "width"))
        if preset == "eval":
            x = functional.crop(functional.resize(x, [height, width], antialias=True), top, left, 33, 33)
        else:
            x = functional.resized_crop(x, top, left, height, width, [33, 33], antialias=True)
        if record["gray"]:
            x = functional.rgb_to_grayscale(x, 3)
        if record["jitter"]:
            for k in record["order"]:
                step = ("brightness", "contrast", "saturation", "hue")[k]
                x = getattr(functional, f"adjust_{step}")(x, float(record[step]))
        if record["flip"]:
            x = functional.horizontal_flip(x)
        assert (mine - x).abs().max() < LIMIT


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [1, 31, 32, 64])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_planes_equal_their_twin(subsampling, size, exact):
    for preset in ("none", "sela", "eval", "aug_plus"):
        augment = getattr(Augment, preset)(size)
        source = [random_planes(shape, subsampling, seed=k) for k, shape in enumerate(SIZES)]
        if preset == "eval":  # a side of 40 to 1 pixels would be resampled to an image of 46 x 1,829 in the twin
            source = [planes for planes in source if min(planes.height, planes.width) > 2]
        params, effects = draw(augment, source)
        found = kernels.augment_planes(source, params, augment, effects=effects, exact=exact)
        expected = reference.augment_planes(source, params, augment, effects=effects, exact=exact)
        assert (found - expected).abs().max() * min(augment.std) < LIMIT, preset


def test_rgb_planes_and_forced_smoothness_equal_their_twin():
    for subsampling, step in SUBSAMPLINGS.items():
        source = [random_planes(shape, subsampling, seed=k) for k, shape in enumerate(SIZES)]
        smooth = (step[0] == 2, step[1] == 2)
        for fields in ({"colour": "rgb"}, {"smooth": (False, False)}, {"smooth": smooth}):
            changed = [dataclasses.replace(planes, **fields) for planes in source]
            augment = Augment.sela(33)
            params, _ = draw(augment, changed)
            for exact in (False, True):
                found = kernels.augment_planes(changed, params, augment, exact=exact)
                expected = reference.augment_planes(changed, params, augment, exact=exact)
                assert (found - expected).abs().max() * min(augment.std) < LIMIT


def test_unsubsampled_rgb_planes_are_the_interleaved_image():
    source = [random_planes(shape, "4:4:4", seed=k) for k, shape in enumerate(SIZES)]
    source = [dataclasses.replace(planes, colour="rgb") for planes in source]
    augment = Augment.sela(33)
    params, _ = draw(augment, source)
    expected = kernels.augment([np.stack(planes.data, axis=-1) for planes in source], params, augment)
    for exact in (False, True):
        found = kernels.augment_planes(source, params, augment, exact=exact)
        assert (found - expected).abs().max() * min(augment.std) < 1e-6


@pytest.mark.parametrize("exact", [False, True])
def test_gray_planes_are_the_gray_image_in_one_channel_and_the_rgb_image_in_three(exact):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, size, dtype=np.uint8) for size in SIZES * 6]
    source = [Planes((image,), *image.shape) for image in pixels]
    for augment in (Augment.sela(33, gray_probability=0.5), Augment.cifar(20, gray_probability=0.5)):
        params, _ = draw(augment, source)
        one = kernels.augment_planes(source, params, augment, exact=exact, channels=1)
        assert torch.equal(one, kernels.augment([image[:, :, None] for image in pixels], params, augment))
        three = kernels.augment_planes(source, params, augment, exact=exact)
        expected = kernels.augment([np.repeat(image[:, :, None], 3, 2) for image in pixels], params, augment)
        assert (three - expected).abs().max() * min(augment.std) < LIMIT
        twin = reference.augment_planes(source, params, augment, exact=exact)
        assert (three - twin).abs().max() * min(augment.std) < LIMIT


def test_gray_files_show_what_pillow_shows():
    planes = Planes(blocky_planes((37, 50), "4:4:4").data[:1], 37, 50)
    augment = Augment.sela(33)
    params, _ = draw(augment, [planes])
    expected = kernels.augment([pillow(planes)], params, augment)
    assert (kernels.augment_planes([planes], params, augment) - expected).abs().max() * min(augment.std) < LIMIT


def test_images_of_all_kinds_may_stand_in_one_batch():
    source = [random_planes((40 + k, 50), s, seed=k) for k, s in enumerate([*SUBSAMPLINGS, *SUBSAMPLINGS])]
    source += [Planes(planes.data[:1], planes.height, planes.width) for planes in source[:3]]
    augment = Augment.sela(33)
    params, _ = draw(augment, source)
    for exact in (False, True):
        batch = kernels.augment_planes(source, params, augment, exact=exact)
        for i, planes in enumerate(source):
            alone = kernels.augment_planes([planes], params[i : i + 1], augment, exact=exact)
            assert torch.equal(alone[0], batch[i])


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_the_planar_default_is_close_to_exact_where_colours_do_not_saturate(subsampling):
    row, column = SUBSAMPLINGS[subsampling]
    rng = np.random.default_rng(3)
    source = []
    for _ in range(6):
        coarse = torch.from_numpy(rng.random((1, 3, 8, 10), dtype=np.float32))
        soft = torch.nn.functional.interpolate(coarse, (240, 320), mode="bicubic")[0].clamp(0, 1).permute(1, 2, 0)
        pixels = (soft.numpy() * 200 + 20 + rng.integers(0, 16, (240, 320, 1))).astype(np.uint8)
        ycc = np.array(Image.fromarray(pixels).convert("YCbCr"), dtype=np.float32)
        small = ycc.reshape(240 // row, row, 320 // column, column, 3).mean((1, 3)).round().astype(np.uint8)
        data = (ycc[..., 0].astype(np.uint8), small[..., 1].copy(), small[..., 2].copy())
        source.append(Planes(data, 240, 320, subsampling=subsampling))
    augment = Augment.sela(96)
    params, _ = draw(augment, source)
    found, exact = (in_unit(kernels.augment_planes(source, params, augment, exact=e), augment) for e in (False, True))
    assert (found - exact).abs().mean() < 0.3 / 255


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_the_needed_box_is_enough_and_gives_the_same_bits(subsampling, exact):
    for preset in ("sela", "eval", "none"):
        augment = getattr(Augment, preset)(17)
        source = [
            random_planes(size, subsampling, seed=k) for k, size in enumerate([(31, 33), (64, 48), (200, 41)] * 5)
        ]
        params, _ = draw(augment, source)
        sizes = np.array([(planes.height, planes.width) for planes in source])
        boxes = kernels.needed_boxes(params, augment, sizes[:, 0], sizes[:, 1], subsampling=subsampling)
        parts = [boxed(planes, box) for planes, box in zip(source, boxes, strict=True)]
        found = kernels.augment_planes(parts, params, augment, exact=exact)
        assert torch.equal(found, kernels.augment_planes(source, params, augment, exact=exact))


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    subsampling=st.sampled_from([*SUBSAMPLINGS]),
    preset=st.sampled_from(["resized_crop", "eval", "none"]),
    side=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_needed_boxes_equal_their_twin_and_lie_in_the_image(size, subsampling, preset, side, seed):
    augment = getattr(Augment, preset)(side)
    params = kernels.sample_parameters(augment, *size, [seed], seed=0, epoch=0)
    box = kernels.needed_boxes(params, augment, *size, subsampling=subsampling)[0]
    twin = reference.needed_boxes(params, augment, *size, subsampling=subsampling)[0]
    # Where an output's triangle ends exactly between two pixels, rounding decides whether a weight of zero is in use.
    assert np.abs(box - twin).max() <= (2 * max(SUBSAMPLINGS[subsampling]) if preset == "eval" else 0)
    assert 0 <= box[0] < box[2] <= size[0]
    assert 0 <= box[1] < box[3] <= size[1]
    planes = random_planes(size, subsampling, seed)
    whole = kernels.augment_planes([planes], params, augment)
    assert whole.isfinite().all()
    assert torch.equal(kernels.augment_planes([boxed(planes, box)], params, augment), whole)


def test_a_subsampling_may_be_given_as_any_pair():
    planes = random_planes((31, 33), "4:2:0")
    augment = Augment.resized_crop(16)
    params, _ = draw(augment, [planes])
    listed = dataclasses.replace(planes, subsampling=[2, 2])
    for what in (kernels, reference):
        expected = what.augment_planes([planes], params, augment)
        assert torch.equal(what.augment_planes([listed], params, augment), expected)
        boxes = what.needed_boxes(params, augment, 31, 33)
        assert np.array_equal(what.needed_boxes(params, augment, 31, 33, subsampling=[2, 2]), boxes)


def test_memory_outside_the_box_is_never_read(tmp_path):
    """Planes at the very end of a page that is followed by one which may not be read."""
    code = """
import ctypes, mmap, sys
import numpy as np, torch
from sela_ext import kernels
from sela_ext.kernels import Augment, Planes
page = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
def fenced(array):
    size = -(-array.nbytes // page) * page
    block = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
    view = np.frombuffer(block, np.uint8, array.nbytes, size - array.nbytes).reshape(array.shape)
    view[:] = array
    return view
rng = np.random.default_rng(0)
for step in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4)):
    for size in ((1, 1), (3, 5), (17, 90), (64, 31), (90, 65)):
        shapes = [size] + [(-(-size[0] // step[0]), -(-size[1] // step[1]))] * 2
        data = tuple(fenced(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes)
        planes = Planes(data, *size, subsampling=step)
        for side in (1, 8, 33):
            augment = Augment.flip(side)
            for index in range(2):
                params = kernels.sample_parameters(augment, *size, [index], seed=0, epoch=0)
                for exact in (False, True):
                    kernels.augment_planes([planes], params, augment, exact=exact)
                kernels.augment_planes([Planes(data[:1], *size)], params, augment)
print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "done"


@pytest.mark.parametrize("exact", [False, True])
def test_bits_do_not_depend_on_threads(exact):
    source = [random_planes((90 + k, 100), [*SUBSAMPLINGS][k % 5], seed=k) for k in range(60)]
    augment = Augment.aug_plus(64)
    params, effects = draw(augment, source)
    one = kernels.augment_planes(source, params, augment, effects=effects, exact=exact, threads=1)
    for threads in (2, 4):
        found = kernels.augment_planes(source, params, augment, effects=effects, exact=exact, threads=threads)
        assert torch.equal(found, one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("exact", [False, True])
def test_other_types_and_memory_orders_hold_the_same_numbers(dtype, exact):
    source = [random_planes((50, 41), s, seed=k) for k, s in enumerate(SUBSAMPLINGS)]
    augment = Augment.sela(33)
    params, _ = draw(augment, source)
    floats = kernels.augment_planes(source, params, augment, exact=exact)
    expected = in_unit(floats, augment) * 255 if dtype == torch.uint8 else floats.to(dtype)
    for last in (False, True):
        out = torch.empty(5, 3, 33, 33, dtype=dtype)
        out = out.to(memory_format=torch.channels_last) if last else out
        found = kernels.augment_planes(source, params, augment, exact=exact, out=out, channels_last=last)
        assert found is out
        assert (found.float() - expected.float()).abs().max() < (0.501 if dtype == torch.uint8 else 1e-9)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_equals_the_twin(isa, tmp_path):
    code = """
import numpy as np, sela_ext
from sela_ext import kernels
from sela_ext.kernels import Augment, Planes, reference
print(sela_ext.build_info()["cpu_isa"])
rng = np.random.default_rng(0)
source = []
for step in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4)):
    for size in ((1, 1), (5, 4), (31, 33), (90, 200), (200, 90)):
        shapes = [size] + [(-(-size[0] // step[0]), -(-size[1] // step[1]))] * 2
        source.append(Planes([rng.integers(0, 256, s, dtype=np.uint8) for s in shapes], *size, subsampling=step))
heights, widths = zip(*((planes.height, planes.width) for planes in source))
for size in (1, 31, 64):
    augment = Augment.sela(size)
    params = kernels.sample_parameters(augment, heights, widths, range(25), seed=3, epoch=1)
    for exact in (False, True):
        a = kernels.augment_planes(source, params, augment, exact=exact)
        b = reference.augment_planes(source, params, augment, exact=exact)
        assert (a - b).abs().max() * min(augment.std) < 0.01 / 255, (size, exact)
"""
    environment = {**os.environ, "SELA_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    if "at best" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == isa


def test_nothing_outside_the_output_is_written():
    source = [random_planes((50, 41), s, seed=k) for k, s in enumerate(SUBSAMPLINGS)]
    for size in (1, 3, 31, 33):
        augment = Augment.sela(size)
        params, _ = draw(augment, source)
        for exact in (False, True):
            room = torch.full((5 * 3 * size * size + 64,), 77.0)
            kernels.augment_planes(source, params, augment, exact=exact, out=room[32:-32].view(5, 3, size, size))
            assert (room[:32] == 77).all()
            assert (room[-32:] == 77).all()


def test_an_empty_batch_is_an_empty_tensor():
    augment = Augment.sela(32)
    params = kernels.sample_parameters(augment, [], [], [], seed=0, epoch=0)
    assert kernels.augment_planes([], params, augment).shape == (0, 3, 32, 32)
    assert kernels.needed_boxes(params, augment, [], []).shape == (0, 4)


def test_refusals_name_what_was_expected_and_found():
    planes = random_planes((20, 30), "4:2:0")
    augment = Augment.none(16)
    params, _ = draw(augment, [planes])
    with pytest.raises(DataError, match="planes that hold the samples of needed_box"):
        kernels.augment_planes([boxed(planes, (0, 0, 18, 30))], params, augment)
    with pytest.raises(DataError, match="planes that hold the samples of needed_box"):
        kernels.augment_planes([boxed(planes, (0, 2, 20, 30))], params, augment)
    with pytest.raises(DataError, match="params: expected 2 records"):
        kernels.augment_planes([planes, planes], params, augment)
    with pytest.raises(DataError, match="expected a list of Planes, found ndarray"):
        kernels.augment_planes([np.zeros((4, 4))], params, augment)
    with pytest.raises(DataError, match="expected 3 for images of 3 planes"):
        kernels.augment_planes([planes], params, augment, channels=1)
    with pytest.raises(OptionError, match="channels: expected 1 or 3, found 2"):
        kernels.augment_planes([planes], params, augment, channels=2)
    with pytest.raises(DataError, match="effects: expected records"):
        kernels.augment_planes([planes], params, Augment.aug_plus(16))
    bad = dataclasses.replace(planes, smooth=(True, True), subsampling="4:4:4", data=planes.data[:1] * 3)
    with pytest.raises(DataError, match="interpolation only of 2 pixels per sample"):
        kernels.augment_planes([bad], params, augment)
    outside = params.copy()
    outside["top"] = 5
    with pytest.raises(DataError, match="box inside the image"):
        kernels.augment_planes([planes], outside, augment)
    with pytest.raises(DataError, match="box inside the image"):
        kernels.needed_boxes(outside, augment, 20, 30)
    for what in (kernels, reference):
        for wrong in ("4:2:1", (3, 1), (2, 2, 2)):
            with pytest.raises(OptionError, match="subsampling"):
                what.needed_boxes(params, augment, 20, 30, subsampling=wrong)
        with pytest.raises(DataError, match="heights: expected one number or 1"):
            what.needed_boxes(params, augment, [20, 20], 30)
        with pytest.raises(DataError, match="heights: expected sizes in"):
            what.needed_boxes(params, Augment.eval(16), 0, 30)
    with pytest.raises(DataError, match="multiples of"):
        dataclasses.replace(boxed(planes, (2, 2, 20, 30)), top=1)
    with pytest.raises(DataError, match="at most 10 x 15 samples"):
        dataclasses.replace(planes, data=(planes.data[0], planes.data[0], planes.data[0]))
    with pytest.raises(DataError, match="1 or 3 arrays uint8"):
        Planes((planes.data[0].astype(np.float32),), 20, 30)
    with pytest.raises(OptionError, match="colour"):
        dataclasses.replace(planes, colour="lab")
    with pytest.raises(OptionError, match="subsampling"):
        dataclasses.replace(planes, subsampling=(3, 1))


@pytest.mark.parametrize("reduced", [2, 4, 8])
@pytest.mark.parametrize("step", [(1, 1), (2, 2), (4, 8), (32, 16)])
@pytest.mark.parametrize("exact", [False, True])
def test_planes_of_reduced_images_give_what_the_twin_gives(reduced, step, exact):
    rng = np.random.default_rng(5)
    for size in [(1, 1), (3, 70), (70, 3), (65, 90), (131, 200)]:
        steps = [(reduced, reduced), step, step]
        data = [rng.integers(90, 166, (-(-size[0] // r), -(-size[1] // c)), dtype=np.uint8) for r, c in steps]
        smooth = (step == (2, 2), step == (2, 2)) if size[1] > 4 else None
        colour = Planes(tuple(data), *size, subsampling=step, reduced=reduced, smooth=smooth)
        grey = Planes((data[0],), *size, reduced=reduced)
        for augment in (Augment.resized_crop(17), Augment.eval(16), Augment.none(31)):
            source = [colour, grey]
            params, _ = draw(augment, source)
            found = kernels.augment_planes(source, params, augment, exact=exact)
            expected = reference.augment_planes(source, params, augment, exact=exact)
            assert (found - expected).abs().max() < 2 * LIMIT / min(augment.std)


def test_reduced_planes_are_checked():
    plane = np.zeros((4, 4), np.uint8)
    for reduced in (0, 3, 16):
        with pytest.raises(OptionError, match="reduced"):
            Planes((plane,), 8, 8, reduced=reduced)
    with pytest.raises(DataError, match="2 x 2 samples"):
        Planes((plane,), 8, 8, reduced=4)
