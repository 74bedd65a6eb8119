import io
import os
import struct
import warnings

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


def test_one_bit_becomes_black_and_white():
    bits = picture(channels=1)[..., 0] > 127
    pixels = decode_image(encoded(Image.fromarray(bits), "PNG"), "x")
    np.testing.assert_array_equal(pixels, np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))


def test_sixteen_bits_keep_their_high_byte():
    high = picture(channels=1)[..., 0]
    deep = (high.astype(np.uint16) << 8) | 0xA5
    pixels = decode_image(encoded(Image.fromarray(deep), "PNG"), "x")
    np.testing.assert_array_equal(pixels[..., 1], high)


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
