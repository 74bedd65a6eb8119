import io
import os
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from sela_ext.data.decode import decode_file, decode_image, sniff
from sela_ext.errors import DataError


def picture(height=19, width=33, channels=3):
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    return ((y * 7 + x * 5 + c * 60) % 256).astype(np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_each_format_is_known_by_its_bytes_and_decoded_as_pillow_does(kind):
    data = encoded(Image.fromarray(picture()), kind)
    assert sniff(data[:16]) == kind
    np.testing.assert_array_equal(decode_image(data, "x"), pillow(data))


@pytest.mark.parametrize(
    "head", [b"", b"\xff\xd8", b"BM", b"BMW is not an image", b"RIFF....WAVE", b"hello, world!..."]
)
def test_other_bytes_are_no_image(head):
    assert sniff(head[:16]) is None


# D2
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("L", {}),
        ("L", {"progressive": True}),
        ("CMYK", {}),
    ],
)
def test_every_kind_of_jpeg_is_decoded_as_pillow_does(mode, options):
    data = encoded(Image.fromarray(picture()).convert(mode), "JPEG", **options)
    pixels = decode_image(data, "x")
    assert pixels.shape == (19, 33, 3)
    np.testing.assert_array_equal(pixels, pillow(data))


# D5
@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_thin_images_keep_their_shape(shape, kind):
    data = encoded(Image.fromarray(picture(*shape)), kind)
    assert decode_image(data, "x").shape == (*shape, 3)


def test_grey_is_repeated_over_the_channels():
    grey = picture(channels=1)[..., 0]
    pixels = decode_image(encoded(Image.fromarray(grey), "PNG"), "x")
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], grey)


# D4
def test_one_bit_becomes_black_and_white():
    bits = picture(channels=1)[..., 0] > 127
    pixels = decode_image(encoded(Image.fromarray(bits), "PNG"), "x")
    np.testing.assert_array_equal(pixels, np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))


# D4
def test_sixteen_bits_keep_their_high_byte():
    high = picture(channels=1)[..., 0]
    deep = (high.astype(np.uint16) << 8) | 0xA5
    pixels = decode_image(encoded(Image.fromarray(deep), "PNG"), "x")
    np.testing.assert_array_equal(pixels[..., 1], high)


# D4
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode):
    alpha = np.zeros((19, 33), np.uint8)
    alpha[:10] = 255
    image = Image.fromarray(picture()).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    pixels = decode_image(encoded(image, "PNG"), "x")
    np.testing.assert_array_equal(pixels[:10], np.asarray(image.convert("RGB"))[:10])
    assert (pixels[10:] == 255).all()


def test_half_transparent_black_becomes_grey():
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 128))
    assert decode_image(encoded(image, "PNG"), "x").tolist() == [[[127] * 3] * 3] * 3


# D4
@pytest.mark.parametrize(
    ("kind", "transparency"), [("PNG", None), ("PNG", 1), ("PNG", bytes([255, 0, 255])), ("GIF", None), ("GIF", 1)]
)
def test_palettes_give_their_colours_and_white_where_transparent(kind, transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    data = encoded(image, kind, **({} if transparency is None else {"transparency": transparency}))
    green = [0, 255, 0] if transparency is None else [255, 255, 255]
    assert decode_image(data, "x").tolist() == [[[255, 0, 0], green, [0, 0, 255]]]


def test_a_transparent_grey_value_becomes_white():
    image = Image.fromarray(np.array([[10, 20, 30]], np.uint8))
    data = encoded(image, "PNG", transparency=20)
    assert decode_image(data, "x")[0, :, 0].tolist() == [10, 255, 30]


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data, "x")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture())
    plain = decode_image(encoded(image, "JPEG"), "x")
    np.testing.assert_array_equal(decode_image(encoded(image, "JPEG", exif=exif), "x"), plain)


def test_floating_point_pixels_are_refused():
    data = encoded(Image.fromarray(np.zeros((3, 3), np.float32)), "TIFF")
    with pytest.raises(DataError, match=r"a\.tif: expected pixels of 8 or 16 bits, found floating-point"):
        decode_image(data, "a.tif")


def test_wide_integers_are_refused():
    data = encoded(Image.fromarray(np.full((3, 3), 1 << 20, np.int32)), "TIFF")
    with pytest.raises(DataError, match="found values 1048576"):
        decode_image(data, "a.tif")


# D1
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_truncated_file_is_an_error_that_names_it(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(DataError, match=rf"pictures/a\.jpg: cannot be decoded as {kind}") as caught:
        decode_image(data[: int(len(data) * share)], "pictures/a.jpg")
    assert "\n" not in str(caught.value)


def test_a_wrong_checksum_is_an_error():
    data = bytearray(encoded(Image.fromarray(picture()), "PNG"))
    data[-20] ^= 0xFF
    with pytest.raises(DataError, match="cannot be decoded as PNG"):
        decode_image(bytes(data), "x")


# D1
def test_an_empty_file_and_a_text_are_errors_that_say_so():
    with pytest.raises(DataError, match=r"a\.jpg: empty file"):
        decode_image(b"", "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg: not an image.*b'hello wo'"):
        decode_image(b"hello world", "a.jpg")


@pytest.mark.parametrize("strict", [True, False])
def test_a_header_that_claims_a_huge_image_is_refused_before_allocation(strict):
    data = bytearray(encoded(Image.fromarray(picture(8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65000, 65000)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        with pytest.raises(DataError, match=r"bomb\.jpg: .*more than the limit of"):
            decode_image(bytes(data), "bomb.jpg")


def test_damaged_exif_data_does_not_spoil_an_image():
    # Pillow warns of this, and warnings are errors here.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\xff\0\0\0\0\0"
    image = Image.fromarray(picture())
    data = encoded(image, "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    without_jfif = data[20:] if data[2:4] == b"\xff\xe0" else data[2:]
    np.testing.assert_array_equal(decode_image(data[:2] + segment + without_jfif, "x"), decode_image(data, "x"))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match=r"pipe\.jpg: expected an image file, found something that is not a regular"):
        decode_file(str(tmp_path / "pipe.jpg"), "pipe.jpg")
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read: No such file"):
        decode_file(str(tmp_path / "gone.jpg"), "gone.jpg")


@pytest.mark.timeout(20)
def test_a_file_that_becomes_a_pipe_before_it_is_opened_is_not_waited_for(tmp_path, monkeypatch):
    path, file = tmp_path / "pipe.jpg", tmp_path / "file.jpg"
    os.mkfifo(path)
    file.write_bytes(encoded(Image.fromarray(picture()), "JPEG"))
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda name, **options: stat(file if str(name) == str(path) else name, **options))
    with pytest.raises(DataError, match="not a regular file"):
        decode_file(str(path), "pipe.jpg")


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate((1 << 30) + 1)  # takes no room on the disk
    with pytest.raises(DataError, match=r"huge\.jpg: expected an image file of at most 1,073,741,824 bytes, found 1,0"):
        decode_file(str(path), "huge.jpg")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows, width, depth, colour, *extra, interlace=0):
    """A PNG of packed rows, without filters."""
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, interlace)
    data = b"".join(b"\0" + row for row in rows)
    body = b"".join(chunk(kind, content) for kind, content in extra)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )


GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
WHITE = [255, 255, 255]


@pytest.mark.parametrize(
    ("depth", "row", "wanted"),
    [
        (1, b"\x50", [0, 255, 0, 255]),
        (2, b"\x1b", [0, 85, 170, 255]),
        (4, b"\x01\x8f", [0, 17, 136, 255]),
        (8, b"\x00\x01\x80\xff", [0, 1, 128, 255]),
        (16, b"\x00\xff\x01\x00\x80\x7f\xff\xff", [0, 1, 128, 255]),
    ],
)
@pytest.mark.parametrize("clear", [None, 1])
def test_grey_pngs_of_every_depth(depth, row, wanted, clear):
    # The second pixel may be the transparent one.
    values = {1: 1, 2: 1, 4: 1, 8: 1, 16: 256}
    extra = () if clear is None else ((b"tRNS", struct.pack(">H", values[depth])),)
    found = decode_image(png([row], 4, depth, GREY, *extra), "x")
    if clear is not None:
        wanted = [
            255 if i == 1 or (depth in (1, 4) and value == wanted[1]) else value for i, value in enumerate(wanted)
        ]
    assert found.tolist() == [[[value] * 3 for value in wanted]]


@pytest.mark.parametrize(
    ("depth", "row", "wanted"),
    [
        (8, bytes([1, 2, 3, 4, 5, 6]), [[1, 2, 3], [4, 5, 6]]),
        (16, bytes([1, 9, 2, 9, 3, 9, 4, 9, 5, 9, 6, 9]), [[1, 2, 3], [4, 5, 6]]),
    ],
)
def test_colour_pngs_with_and_without_a_transparent_colour(depth, row, wanted):
    assert decode_image(png([row], 2, depth, COLOUR), "x").tolist() == [wanted]
    clear = struct.pack(">HHH", *(1, 2, 3) if depth == 8 else (0x109, 0x209, 0x309))
    assert decode_image(png([row], 2, depth, COLOUR, (b"tRNS", clear)), "x").tolist() == [[WHITE, wanted[1]]]


@pytest.mark.parametrize("depth", [8, 16])
def test_alpha_of_every_depth_is_composited_on_white(depth):
    grey, colour = [(10, 255), (200, 0)], [(10, 20, 30, 255), (1, 2, 3, 0)]
    pack = (lambda values: bytes(values)) if depth == 8 else (lambda values: b"".join(bytes((v, v)) for v in values))
    row = b"".join(pack(pixel) for pixel in grey)
    assert decode_image(png([row], 2, depth, GREY_ALPHA), "x").tolist() == [[[10, 10, 10], WHITE]]
    row = b"".join(pack(pixel) for pixel in colour)
    assert decode_image(png([row], 2, depth, COLOUR_ALPHA), "x").tolist() == [[[10, 20, 30], WHITE]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes_of_every_depth(depth):
    row = {1: b"\x40", 2: b"\x10", 4: b"\x01", 8: b"\x00\x01"}[depth]
    extra = ((b"PLTE", bytes([9, 8, 7, 1, 2, 3])), (b"tRNS", bytes([255, 0])))
    assert decode_image(png([row], 2, depth, PALETTE, *extra[:1]), "x").tolist() == [[[9, 8, 7], [1, 2, 3]]]
    assert decode_image(png([row], 2, depth, PALETTE, *extra), "x").tolist() == [[[9, 8, 7], WHITE]]


def test_interlaced_pngs_are_the_same_picture():
    # Adam7 of 2 x 2 pixels: the first alone, then the one to its right, then the row below.
    passes = zlib.compress(b"\0\x0a" + b"\0\x14" + b"\0\x1e\x28")
    head = struct.pack(">IIBBBBB", 2, 2, 8, GREY, 0, 0, 1)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", passes) + chunk(b"IEND", b"")
    assert decode_image(data, "x")[..., 0].tolist() == [[10, 20], [30, 40]]


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "CMYK", "I;16", "LA"])
def test_every_mode_of_tiff(mode):
    grey = picture(9, 11, 1)[..., 0]
    if mode == "I;16":
        image, wanted = Image.fromarray(grey.astype(np.uint16) << 8 | 77), np.repeat(grey[..., None], 3, axis=2)
    else:
        image = Image.fromarray(picture(9, 11)).convert(mode)
        wanted = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode_image(encoded(image, "TIFF"), "x"), wanted)


def test_the_first_page_is_taken():
    pages = [Image.new("RGB", (4, 4), "red"), Image.new("L", (9, 9))]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert decode_image(data, "x").tolist() == [[[255, 0, 0]] * 4] * 4


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_with_alpha_and_animations(lossless):
    image = Image.new("RGBA", (6, 5), (10, 20, 30, 0))
    assert (decode_image(encoded(image, "WEBP", lossless=lossless), "x") == 255).all()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, "x")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_every_mode_of_bmp(mode):
    image = Image.fromarray(picture()).convert(mode)
    wanted = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode_image(encoded(image, "BMP"), "x"), wanted)


HUGE = 60_000


def _bomb(kind):
    """A small file whose header claims 60,000 x 60,000 pixels (WebP: 16,383 x 16,383, the most that it can)."""
    small = Image.new("RGB", (8, 8))
    if kind == "PNG":
        data = bytearray(encoded(small, "PNG"))
        data[16:24] = struct.pack(">II", HUGE, HUGE)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "GIF":
        data = bytearray(encoded(small, "GIF"))
        data[6:10] = struct.pack("<HH", HUGE, HUGE)
    elif kind == "GIF frame":
        data = bytearray(encoded(small, "GIF"))
        at = data.index(b",\0\0\0\0\x08\0\x08\0") + 5
        data[at : at + 4] = struct.pack("<HH", HUGE, HUGE)
    elif kind == "BMP":
        data = bytearray(encoded(small, "BMP"))
        data[18:26] = struct.pack("<ii", HUGE, HUGE)
    elif kind == "TIFF":
        data = bytearray(encoded(small, "TIFF"))
        for tag in (256, 257):
            at = next(i for i in range(len(data)) if data[i : i + 4] in (struct.pack("<HH", tag, t) for t in (3, 4)))
            data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, HUGE)
    elif kind == "VP8L":
        data = bytearray(encoded(small, "WEBP", lossless=True))
        bits = int.from_bytes(data[21:25], "little") & 0xF0000000 | 0x3FFE | 0x3FFE << 14
        data[21:25] = struct.pack("<I", bits)
    elif kind == "VP8":
        data = bytearray(encoded(small, "WEBP"))
        assert data[12:16] == b"VP8 "
        data[26:30] = struct.pack("<HH", 0x3FFF, 0x3FFF)
    else:
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
        assert data[12:16] == b"VP8X"
        data[24:30] = struct.pack("<I", HUGE)[:3] * 2
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "GIF frame", "BMP", "TIFF", "VP8L", "VP8", "VP8X"])
def test_small_files_that_claim_a_huge_picture_are_refused_without_taking_memory(kind):
    data = _bomb(kind)
    assert len(data) < 2000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"bomb: .*more than the limit of 178956970"):
        decode_image(data, "bomb")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def tiled_tiff(width, height, tile_width, tile_height):
    """A grey TIFF of one tile, compressed."""
    data = zlib.compress(bytes(min(tile_width * tile_height, 1 << 16)))
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile_width, 323: tile_height}
    tags |= {324: 8 + 2 + 12 * 10 + 4, 325: len(data)}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + body + bytes(4) + data


def test_a_picture_of_few_pixels_with_a_huge_tile_is_refused():
    assert decode_image(tiled_tiff(16, 16, 256, 256), "x").shape == (16, 16, 3)
    with pytest.raises(DataError, match="claims tiles of 16384 x 16384 pixels for 16 x 16"):
        decode_image(tiled_tiff(16, 16, 1 << 14, 1 << 14), "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_file_cut_anywhere_is_an_error_or_whole(kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    data = encoded(image, kind)
    whole = decode_image(data, "x")
    for size in range(len(data)):
        try:
            found = decode_image(data[:size], "x")
        except DataError:
            continue
        # The last bytes of some formats hold no pixels.
        assert size > 0.8 * len(data)
        np.testing.assert_array_equal(found, whole)
