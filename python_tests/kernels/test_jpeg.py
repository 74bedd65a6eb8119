import io
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

import sela_ext
from sela_ext import _core
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import decode_crop, decode_jpeg, decode_planes, jpeg_header, jpeg_index, try_decode_jpeg

FACTORS = {
    "4:4:4": [(1, 1), (1, 1), (1, 1)],
    "4:2:2": [(2, 1), (1, 1), (1, 1)],
    "4:4:0": [(1, 2), (1, 1), (1, 1)],
    "4:2:0": [(2, 2), (1, 1), (1, 1)],
    "4:1:1": [(4, 1), (1, 1), (1, 1)],
    "4:1:0": [(4, 2), (1, 1), (1, 1)],
    "4:4:1": [(1, 4), (1, 1), (1, 1)],
    "mixed": [(2, 2), (1, 2), (2, 1)],
    "light below colour": [(1, 1), (2, 2), (1, 1)],
    "twice": [(2, 1), (2, 1), (2, 1)],
    "grey": [(1, 1)],
    "grey, odd factors": [(2, 2)],
}
SIZES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 34, 63, 65, 70]
FOLDER = Path(os.environ.get("SELA_DATA_DIR") or Path(__file__).resolve().parents[3] / "shared" / "data")


def isas():
    best = ["generic", "avx2", "avx512"].index(_core.build_info()["cpu_isa"])
    return ["generic", "avx2", "avx512"][: best + 1]


def pillow(data, scale=1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            if scale > 1:
                image.draft("RGB", (image.width // scale, image.height // scale))
            return np.asarray(image.convert("RGB"))


def core(data, isa="", scale=1, box=(0, 0, 0, 0), index=None):
    """(status, pixels) of the compiled decoder alone."""
    return _core.jpeg_rgb(data, *box, scale, index, False, 1 << 40, isa)[:2]


def assert_decoded_as_pillow_does(data, scale=1, note=""):
    expected = pillow(data, scale)
    for isa in isas():
        status, pixels = core(data, isa, scale)
        assert status == "ok", (isa, note)
        np.testing.assert_array_equal(pixels, expected, err_msg=f"{isa} {note}")


def noise(rng, height, width):
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8))


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def photographs():
    return sorted(path for path in FOLDER.glob("*") if path.suffix.lower() in (".jpeg", ".jpg"))


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize("name", FACTORS)
def test_every_sampling_gives_pillows_pixels(writer, name):
    rng = np.random.default_rng(len(name))
    sizes = [(w, h) for w in (1, 2, 3, 4, 5, 9, 70) for h in (1, 3, 4, 18)]
    sizes += [(int(a), int(b)) for a, b in zip(rng.permutation(SIZES), rng.permutation(SIZES), strict=True)]
    for width, height in sizes:
        data = writer.picture(rng, width, height, FACTORS[name], restart=int(rng.choice([0, 0, 1, 3, 5])))
        assert_decoded_as_pillow_does(data, note=f"{width} x {height}")


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("name", FACTORS)
def test_reduced_sizes_give_the_pixels_of_pillows_draft(writer, name, scale):
    rng = np.random.default_rng(scale)
    for width, height in [(8, 8), (9, 17), (16, 31), (18, 70), (33, 9), (70, 65)]:
        data = writer.picture(rng, width, height, FACTORS[name])
        assert_decoded_as_pillow_does(data, scale, f"{width} x {height}")


@pytest.mark.parametrize("subsampling", [0, 1, 2, "grey"])
def test_files_of_pillow_give_its_pixels_at_every_quality(subsampling):
    rng = np.random.default_rng(7)
    sizes = [(int(w), int(h)) for w, h in rng.integers(1, 71, (100, 2))]
    for quality, (width, height) in enumerate(sizes, start=1):
        image = noise(rng, height, width)
        options = {"quality": quality, "optimize": quality % 2 == 0, "restart_marker_blocks": [0, 1, 7][quality % 3]}
        data = (
            encoded(image.convert("L"), **options)
            if subsampling == "grey"
            else encoded(image, subsampling=subsampling, **options)
        )
        expected = pillow(data)
        for isa in isas():
            status, pixels = core(data, isa)
            # Noise at the lowest qualities may leave the range that all transforms agree on.
            assert status == "ok" or quality < 5, (quality, isa)
            if status == "ok":
                np.testing.assert_array_equal(pixels, expected, err_msg=f"quality {quality}, {isa}")
        np.testing.assert_array_equal(decode_jpeg(data), expected)


@pytest.mark.parametrize("restart", [1, 2, 3, 4, 5, 8, 9, 100])
def test_restart_markers_anywhere_change_nothing(writer, restart):
    data = writer.picture(np.random.default_rng(3), 70, 37, FACTORS["4:2:0"], restart=restart, fill=b"\xff")
    assert jpeg_header(data).restart_interval == restart
    assert_decoded_as_pillow_does(data)


@pytest.mark.parametrize("options", [{"frame": 0xC1}, {"frame": 0xC1, "wide_quant": True}, {"wide_quant": True}])
def test_extended_frames_and_wide_divisors_are_taken(writer, options):
    data = writer.picture(np.random.default_rng(4), 33, 31, FACTORS["4:2:0"], **options)
    assert_decoded_as_pillow_does(data)


def test_a_last_coefficient_ends_its_block_without_a_mark(writer):
    rng = np.random.default_rng(5)
    quant = np.full(64, 3)
    blocks = writer.coefficients(rng, 64, 64, FACTORS["4:4:4"], quant)
    for component in blocks:
        component[..., 63] = rng.integers(-2, 3, component.shape[:2])
        component[::2, ..., 50:63] = rng.integers(-1, 2, component[::2, ..., 50:63].shape)
    assert_decoded_as_pillow_does(writer.write(64, 64, FACTORS["4:4:4"], blocks, quant.tolist()))


def test_blocks_full_of_small_and_of_large_coefficients_are_read(writer):
    rng = np.random.default_rng(6)
    for largest, quant in [(1, 30), (3, 9), (40, 1), (500, 1)]:
        blocks = [rng.integers(-largest, largest + 1, (4, 4, 64)) for _ in range(3)]
        for component in blocks:
            component[..., 8 if largest == 500 else 64 :] = 0
            component[..., 2 if largest == 500 else 64 :] //= 50
        data = writer.write(32, 32, FACTORS["4:4:4"], blocks, [quant] * 64)
        np.testing.assert_array_equal(decode_jpeg(data), pillow(data))


# ---------------------------------------------------------------- colour


@pytest.mark.parametrize(
    ("markers", "ids", "colour"),
    [
        ("", (1, 2, 3), "ycc"),
        ("", (82, 71, 66), "rgb"),
        ("", (0, 1, 2), "ycc"),
        ("", (9, 200, 7), "ycc"),
        ("jfif", (82, 71, 66), "ycc"),
        ("adobe 0", (1, 2, 3), "rgb"),
        ("adobe 1", (82, 71, 66), "ycc"),
        ("jfif, adobe 0", (1, 2, 3), "ycc"),
    ],
)
def test_the_colour_space_is_told_as_libjpeg_does(writer, markers, ids, colour):
    head = (writer.jfif() if "jfif" in markers else b"") + (
        writer.adobe(int(markers[-1])) if "adobe" in markers else b""
    )
    for name in ("4:4:4", "4:2:0"):
        data = writer.picture(np.random.default_rng(8), 40, 23, FACTORS[name], markers=head, ids=ids)
        assert jpeg_header(data).colour == colour
        assert_decoded_as_pillow_does(data)


def test_an_rgb_file_of_pillow_keeps_its_colours():
    image = noise(np.random.default_rng(9), 30, 41)
    data = encoded(image, keep_rgb=True, quality=95)
    assert jpeg_header(data).colour == "rgb"
    assert_decoded_as_pillow_does(data)


# ---------------------------------------------------------------- what goes to Pillow


@pytest.mark.parametrize("kind", ["progressive", "CMYK", "PNG", "several scans"])
@pytest.mark.parametrize("scale", [1, 2])
def test_other_kinds_are_pillows_with_the_same_interface(writer, kind, scale):
    image = noise(np.random.default_rng(10), 37, 52)
    if kind == "PNG":
        file = io.BytesIO()
        image.save(file, "PNG")
        data = file.getvalue()
    elif kind == "CMYK":
        data = encoded(image.convert("CMYK"))
    else:
        data = encoded(image, progressive=True)
    if kind == "PNG":
        expected = np.asarray(image if scale == 1 else image.reduce(scale))
    else:
        expected = pillow(data, scale)
    assert jpeg_header(data) is None
    assert try_decode_jpeg(data) is None
    assert jpeg_index(data) is None
    np.testing.assert_array_equal(decode_jpeg(data, scale=scale), expected)
    np.testing.assert_array_equal(decode_crop(data, (3, 4, 10, 11), scale=scale), expected[3:13, 4:15])
    planes = decode_planes(data, (3, 4, 10, 11), scale=scale, build_index=True)
    assert (planes.colour, planes.index, planes.box) == ("rgb", None, (3, 4, 10, 11))
    np.testing.assert_array_equal(np.stack([p.samples for p in planes.planes], 2), expected[3:13, 4:15])


@pytest.mark.parametrize("tail", [b"", b"\xff", b"\x00\xff\xd9", b"\xff\xd0\xff\xd9", b"\xff\xd9more"])
def test_odd_ends_are_as_pillow_has_them(writer, tail):
    data = writer.picture(np.random.default_rng(11), 30, 30, FACTORS["4:2:2"], tail=tail)
    try:
        expected = pillow(data)
    except OSError:
        with pytest.raises(DataError, match="cannot be decoded as JPEG"):
            decode_jpeg(data)
    else:
        np.testing.assert_array_equal(decode_jpeg(data), expected)
    assert core(data)[0] == ("ok" if tail.startswith(b"\xff\xd9") else "damaged")


def test_a_truncated_file_is_an_error_that_says_so():
    data = encoded(noise(np.random.default_rng(12), 64, 64))
    with pytest.raises(DataError, match="cannot be decoded as JPEG: image file is truncated"):
        decode_jpeg(data[: len(data) // 2])
    with pytest.raises(DataError, match="cannot be decoded as JPEG: cannot identify"):
        decode_jpeg(b"hello")
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_planes(b"")


def assert_same_fate(data):
    """Whatever Pillow accepts is accepted, and equal."""
    try:
        expected = pillow(data)
    except Exception:  # Pillow raises many types
        expected = None
    if expected is None:
        return
    found = [core(data, isa) for isa in isas()]
    assert len({status for status, _ in found}) == 1
    if found[0][0] == "ok":
        for _, pixels in found:
            np.testing.assert_array_equal(pixels, expected)
    else:
        np.testing.assert_array_equal(decode_jpeg(data), expected)


@pytest.mark.parametrize("counts", [[2], [1, 2], [0, 4], [1] * 15 + [2]])
def test_a_code_of_ones_only_is_refused_as_libjpeg_does(writer, counts):
    symbols = list(range(sum(counts)))
    if len(symbols) > 12:
        symbols = [k % 12 for k in symbols]
    tables = [[kind, *counts, *[0] * (16 - len(counts)), *part] for kind, part in ((0, symbols), (16, symbols))]
    frame = struct.pack(">BHHBBBB", 8, 8, 8, 1, 1, 0x11, 0)
    data = b"\xff\xd8" + writer.segment(0xDB, bytes([0] + [1] * 64)) + writer.segment(0xC0, frame)
    data += b"".join(writer.segment(0xC4, bytes(table)) for table in tables)
    data += writer.segment(0xDA, bytes([1, 1, 0, 0, 63, 0])) + b"\x07\xff\xd9"
    with pytest.raises(OSError, match="broken data stream"):
        pillow(data)
    assert {core(data, isa)[0] for isa in isas()} == {"damaged"}
    with pytest.raises(DataError, match="cannot be decoded as JPEG"):
        decode_jpeg(data)


def mutated(rng, data):
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(2, len(data)))
        match int(rng.integers(5)):
            case 0:
                data[at] = int(rng.integers(256))
            case 1:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                del data[at : at + int(rng.integers(1, 4))]
            case 3:
                data[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 4)), dtype=np.uint8))
            case 4:
                data[at] = 0xFF
    return bytes(data)


def mutants(writer, seed, count):
    rng = np.random.default_rng(seed)
    names = list(FACTORS)
    files = [
        writer.picture(rng, *(int(n) for n in rng.integers(1, 40, 2)), FACTORS[name], restart=int(rng.choice([0, 2])))
        for name in names
    ]
    for k in range(count):
        yield mutated(rng, files[k % len(files)])


def test_damaged_files_share_pillows_fate(writer):
    for data in mutants(writer, 13, 2000):
        assert_same_fate(data)


@pytest.mark.slow
def test_many_damaged_files_share_pillows_fate(writer):
    for data in mutants(writer, 14, 100_000):
        assert_same_fate(data)


def test_coefficients_out_of_range_are_left_to_pillow(writer):
    blocks = [np.zeros((2, 2, 64), int) for _ in range(3)]
    blocks[0][..., 1] = 1000
    data = writer.write(16, 16, FACTORS["4:4:4"], blocks, [1] + [200] * 63)
    assert {core(data, isa)[0] for isa in isas()} == {"damaged"}
    np.testing.assert_array_equal(decode_jpeg(data), pillow(data))


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("level", [-4101, -4100, -2500, 2500, 4091, 4092])
def test_a_level_at_the_edge_of_the_range_is_judged_alike_beside_any_neighbours(writer, level, scale):
    blocks = [np.zeros((2, 8, 64), int)]
    blocks[0][..., 0] = level
    blocks[0][:, 1::3, 0] = 10
    blocks[0][:, 1::3, 1] = 30
    data = writer.write(64, 16, FACTORS["grey"], blocks, [1] * 64)
    found = [core(data, isa, scale) for isa in isas()]
    assert {status for status, _ in found} == {"ok" if -4100 <= level < 4092 else "damaged"}
    for _, pixels in found:
        if pixels is not None:
            np.testing.assert_array_equal(pixels, pillow(data, scale))


def test_a_header_that_claims_more_than_the_file_can_hold_is_not_decoded(writer):
    data = bytearray(writer.picture(np.random.default_rng(15), 16, 16, FACTORS["4:4:4"]))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 13000, 13000)
    assert jpeg_header(bytes(data)) is None
    data[at : at + 4] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(DataError, match="more than the limit of"):
        decode_jpeg(bytes(data))


def test_the_limit_on_pixels_is_kept():
    data = encoded(noise(np.random.default_rng(16), 20, 20))
    assert decode_jpeg(data, max_pixels=400).shape == (20, 20, 3)
    for decode in (decode_jpeg, decode_planes, lambda d, **o: decode_crop(d, (0, 0, 1, 1), **o)):
        with pytest.raises(DataError, match="claims 20 x 20 pixels, more than the limit of 399"):
            decode(data, max_pixels=399)


# ---------------------------------------------------------------- boxes, planes, index


@hypothesis_settings(max_examples=150)
@given(st.data())
def test_a_crop_is_the_crop_of_the_whole(writer, draw):
    rng = np.random.default_rng(draw.draw(st.integers(0, 1000)))
    factors = FACTORS[draw.draw(st.sampled_from(list(FACTORS)))]
    scale = draw.draw(st.sampled_from([1, 1, 1, 2, 4, 8]))
    width, height = (draw.draw(st.integers(8, 100)) for _ in range(2))
    data = writer.picture(rng, width, height, factors, restart=draw.draw(st.sampled_from([0, 0, 1, 5, 7])))
    whole = decode_jpeg(data, scale=scale)
    index = jpeg_index(data)
    assert index is not None
    for _ in range(3):
        top, left = draw.draw(st.integers(0, whole.shape[0] - 1)), draw.draw(st.integers(0, whole.shape[1] - 1))
        box = (
            top,
            left,
            draw.draw(st.integers(1, whole.shape[0] - top)),
            draw.draw(st.integers(1, whole.shape[1] - left)),
        )
        expected = whole[top : top + box[2], left : left + box[3]]
        for isa in isas():
            for given_index in (None, index):
                status, pixels = core(data, isa, scale, box, given_index)
                assert status == "ok"
                np.testing.assert_array_equal(pixels, expected)


def upsampled(plane, top, left, height, width):
    """What libjpeg makes of a plane, by the rules in JpegPlane's documentation, rounding as it does."""
    y, x = np.arange(top, top + height), np.arange(left, left + width)

    def taken(rows, columns):
        rows = np.clip(rows, 0, plane.full_height - 1) - plane.top
        columns = np.clip(columns, 0, plane.full_width - 1) - plane.left
        assert rows.min() >= 0
        assert columns.min() >= 0
        return plane.samples[np.ix_(rows, columns)].astype(int)

    row, column = y // plane.step_y, x // plane.step_x
    beside_row, beside_column = row + np.where(y % 2, 1, -1), column + np.where(x % 2, 1, -1)
    if plane.smooth_x and plane.smooth_y:
        own = 3 * taken(row, column) + taken(beside_row, column)
        beside = 3 * taken(row, beside_column) + taken(beside_row, beside_column)
        return (3 * own + beside + np.where(x % 2, 7, 8)) >> 4
    if plane.smooth_x:
        return (3 * taken(row, column) + taken(row, beside_column) + np.where(x % 2, 2, 1)) >> 2
    if plane.smooth_y:
        return (3 * taken(row, column) + taken(beside_row, column) + np.where(y % 2, 2, 1)[:, None]) >> 2
    return taken(row, column)


def in_rgb(planes):
    parts = [upsampled(plane, *planes.box) for plane in planes.planes]
    if planes.colour != "ycc":
        return np.stack([*parts, *parts, *parts] if len(parts) == 1 else parts, axis=2)
    y, b, r = parts[0], parts[1] - 128, parts[2] - 128
    red, blue = y + ((91881 * r + 32768) >> 16), y + ((116130 * b + 32768) >> 16)
    return np.clip(np.stack([red, y + ((-22554 * b - 46802 * r + 32768) >> 16), blue], axis=2), 0, 255)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("name", FACTORS)
def test_planes_hold_what_the_pixels_are_made_of(writer, name, scale):
    rng = np.random.default_rng(17)
    data = writer.picture(rng, 87, 61, FACTORS[name])
    whole = pillow(data, scale)
    boxes = [None, (0, 0, 1, 1), (whole.shape[0] - 1, whole.shape[1] - 1, 1, 1), (5, 9, 20, 21), (16, 16, 10, 16)]
    for box in boxes:
        for index in (None, jpeg_index(data)):
            planes = decode_planes(data, box, scale=scale, index=index)
            top, left, height, width = planes.box
            np.testing.assert_array_equal(in_rgb(planes), whole[top : top + height, left : left + width])
            for plane in planes.planes:  # nothing but what is needed
                assert plane.samples.shape[0] <= -(-height // plane.step_y) + 1 + 2 * plane.smooth_y
                assert plane.samples.shape[1] <= -(-width // plane.step_x) + 1 + 2 * plane.smooth_x


def test_damage_below_and_right_of_a_box_goes_unnoticed(writer):
    data = bytearray(writer.picture(np.random.default_rng(18), 64, 64, FACTORS["4:4:4"], restart=8))
    whole = decode_jpeg(bytes(data))
    at = data.index(b"\xff\xd3")  # after the fourth row of MCUs
    data[at:] = b"\xff\xd9"
    np.testing.assert_array_equal(decode_crop(bytes(data), (0, 0, 32, 64)), whole[:32])
    assert core(bytes(data), box=(0, 0, 33, 64))[0] == "damaged"


@pytest.mark.parametrize("restart", [0, 3])
@pytest.mark.parametrize("name", FACTORS)
def test_an_index_is_the_same_however_it_is_built(writer, name, restart):
    data = writer.picture(np.random.default_rng(19), 150, 40, FACTORS[name], restart=restart)
    index = jpeg_index(data)
    for isa in isas():
        for box in (None, (0, 0, 1, 1), (30, 100, 5, 50)):
            assert decode_planes(data, box, build_index=True, isa=isa).index == index


def test_an_index_of_another_file_is_ignored(writer):
    rng = np.random.default_rng(20)
    first, second = (writer.picture(rng, 90, 60, FACTORS["4:2:0"]) for _ in range(2))
    expected = pillow(first)[10:50, 20:60]
    wrong = [jpeg_index(second), b"", b"SJIX", jpeg_index(first)[:-1], jpeg_index(first) + b"\0"]
    for index in wrong:
        assert core(first, box=(10, 20, 40, 40), index=index)[0] == "foreign index"
        np.testing.assert_array_equal(decode_crop(first, (10, 20, 40, 40), index=index), expected)


def digest(data):
    """The checksum at the end of an index, so that a test can write what no program would."""
    mask = (1 << 64) - 1
    h = (len(data) * 0x9E3779B97F4A7C15) & mask
    for k in range(0, len(data), 8):
        h = ((h ^ int.from_bytes(data[k : k + 8], "little")) * 0xD6E8FEB86659FD93) & mask
        h ^= h >> 32
    return h.to_bytes(8, "little")


def test_wrong_checkpoints_are_never_followed_out_of_the_file(writer):
    rng = np.random.default_rng(21)
    data = writer.picture(rng, 200, 60, FACTORS["4:2:0"])
    index = jpeg_index(data)
    assert index[-8:] == digest(index[:-8])
    for _ in range(300):
        spoilt = bytearray(index[:-8])
        for _ in range(int(rng.integers(1, 30))):
            spoilt[int(rng.integers(32, len(spoilt)))] = int(rng.integers(256))
        spoilt += digest(bytes(spoilt))
        for isa in isas():
            assert core(data, isa, box=(5, 7, 50, 180), index=bytes(spoilt))[0] in ("ok", "foreign index", "damaged")
        assert decode_crop(data, (5, 7, 50, 180), index=bytes(spoilt)).shape == (50, 180, 3)


def test_a_wrong_checkpoint_is_noticed_at_the_end_of_its_row(writer):
    data = writer.picture(np.random.default_rng(22), 200, 16, FACTORS["4:2:0"])
    index = bytearray(jpeg_index(data)[:-8])
    index[32 + 5] ^= 1  # the first DC predictor
    index += digest(bytes(index))
    assert core(data, box=(0, 0, 16, 200), index=bytes(index))[0] == "foreign index"
    np.testing.assert_array_equal(decode_crop(data, (0, 0, 16, 200), index=bytes(index)), pillow(data))


# ---------------------------------------------------------------- interface


def test_threads_decode_the_same_pixels(writer):
    rng = np.random.default_rng(23)
    files = [writer.picture(rng, 70, 50, FACTORS[name]) for name in FACTORS] * 8
    expected = [pillow(data) for data in files[: len(FACTORS)]] * 8
    for threads in (1, 2, 4):
        with ThreadPoolExecutor(threads) as pool:
            for found, pixels in zip(pool.map(decode_jpeg, files), expected, strict=True):
                np.testing.assert_array_equal(found, pixels)


def test_any_bytes_like_object_is_taken():
    data = encoded(noise(np.random.default_rng(24), 9, 9))
    for form in (bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        np.testing.assert_array_equal(decode_jpeg(form), sela_ext.decode_jpeg(data))
    with pytest.raises(OptionError, match="expected contiguous bytes"):
        decode_jpeg(np.frombuffer(data, np.uint8)[::2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 3}, "scale: expected 1, 2, 4 or 8, found 3"),
        ({"box": (0, 0, 10, 10)}, "box: expected one within 9 x 8"),
        ({"box": (-1, 0, 1, 1)}, "box: expected .top >= 0"),
        ({"box": (0, 0, 0, 1)}, "box: expected .top >= 0"),
        ({"box": (0, 0, 3, 2, 1)}, "box: expected .top >= 0"),
        ({"box": (8, 8, 1, 1)}, "box: expected one within 9 x 8"),
        ({"box": (2, 2, 2**62, 1)}, "box: expected one within 9 x 8"),
        ({"index": b"", "build_index": True}, "expected either an index or the wish for one"),
    ],
)
@pytest.mark.parametrize("progressive", [False, True])
def test_impossible_wishes_are_refused_in_one_line(arguments, message, progressive):
    data = encoded(noise(np.random.default_rng(25), 9, 8), progressive=progressive)
    with pytest.raises(OptionError, match=message):
        decode_planes(data, **arguments)


@pytest.mark.parametrize("wrong", ["text", 7, [1, 2]])
def test_what_is_no_bytes_is_refused_in_one_line(wrong):
    data = encoded(noise(np.random.default_rng(28), 9, 8))
    with pytest.raises(OptionError, match="index: expected bytes, found "):
        decode_crop(data, (0, 0, 2, 2), index=wrong)
    for decode in (decode_jpeg, decode_planes, jpeg_header, jpeg_index):
        with pytest.raises(OptionError, match="data: expected bytes, found "):
            decode(wrong)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_scale_beyond_the_image_is_refused(progressive):
    data = encoded(noise(np.random.default_rng(26), 9, 3), progressive=progressive)
    assert decode_jpeg(data, scale=2).shape == (5, 2, 3)
    with pytest.raises(OptionError, match="expected at most the 3 pixels of the shorter side, found 4"):
        decode_jpeg(data, scale=4)


# ---------------------------------------------------------------- photographs


def check_photographs(files):
    rng = np.random.default_rng(27)
    for path in files:
        data = path.read_bytes()
        expected = pillow(data)
        np.testing.assert_array_equal(decode_jpeg(data), expected, err_msg=path.name)
        if jpeg_header(data) is None:
            continue
        height, width = expected.shape[:2]
        top, left = int(rng.integers(height)), int(rng.integers(width))
        box = (top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)))
        part = expected[top : top + box[2], left : left + box[3]]
        for isa in isas():
            assert core(data, isa)[0] == "ok"
            np.testing.assert_array_equal(decode_crop(data, box, index=jpeg_index(data), isa=isa), part)


@pytest.mark.skipif(not photographs(), reason=f"no photographs in {FOLDER.name}: set SELA_DATA_DIR")
def test_photographs_have_pillows_pixels():
    check_photographs(photographs()[::25])


@pytest.mark.slow
@pytest.mark.skipif(not photographs(), reason=f"no photographs in {FOLDER.name}: set SELA_DATA_DIR")
def test_all_photographs_have_pillows_pixels():
    check_photographs(photographs())
