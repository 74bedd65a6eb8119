"""Image files to pixels, with one documented conversion for every kind of file.

Baseline JPEG files are decoded by the compiled core, to Pillow's pixels; all others, and any with a fault, by Pillow.

Note [Conversion to RGB]
    * Grey and 1-bit images: the value in all three channels.
    * 16 bits per channel: the high byte (what Pillow itself does for 16-bit colour).
    * Fewer than 8 bits per channel: stretched to 0..255.
    * Palettes: their colours. Transparency of any kind (RGBA, LA, transparent palette entries or colours):
      composited on white. A transparent colour of 16 bits per channel is compared by its high bytes.
    * CMYK, YCCK, YCbCr, Lab, HSV: Pillow's conversion, without colour profiles.
    * Animations and files of several pages: the first.
    * EXIF orientation: ignored, the stored pixels are used. (TIFF's own orientation, a part of that format, is obeyed.)

Note [What a header may claim]
    Sizes are read from the header and compared with `MAX_PIXELS` before anything is allocated. Besides the size itself:
    WebP's canvas, which its decoder allocates when it is opened; TIFF's tiles, which may be larger than the image; and
    the pixels that the first frame of a GIF adds to its screen (Pillow).
"""

from __future__ import annotations

import warnings
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from sela_ext.data.safe_files import read_image_file
from sela_ext.data.source import UInt8Array
from sela_ext.errors import DataError
from sela_ext.kernels import try_decode_jpeg
from sela_ext.kernels.jpeg import MAX_PIXELS, starved, warning_lock

HEAD_BYTES = 16
# Pixels of a tile that any TIFF may have, however small it is.
SMALL_TILE = 1 << 22
_TILE_WIDTH, _TILE_LENGTH = 322, 323


def sniff(head: bytes) -> str | None:
    """Format of an image file by its first 16 bytes, whatever its suffix says.

    Returns:
        Pillow's name of the format: "JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"; None for anything else.

    Example:
        >>> sniff(b"GIF89a")
        'GIF'
    """
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    # "BM" alone is too short to trust: the two reserved words after the size are zero in every writer known.
    if head.startswith(b"BM") and head[6:10] == b"\0\0\0\0" and len(head) >= HEAD_BYTES - 2:
        return "BMP"
    return None


def decode_file(path: str, name: str) -> UInt8Array:
    """Pixels of an image file; see `decode_image`. Anything but a regular file is refused unopened."""
    return decode_image(read_image_file(path, name), name)


def decode_image(data: bytes, name: str) -> UInt8Array:
    """Decode an image to RGB by Note [Conversion to RGB].

    Args:
        data: The bytes of the file.
        name: What to call it in messages.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DataError: Not an image, truncated, damaged, or a header that claims more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise DataError(f"{name}: empty file, expected an image")
    format_name = sniff(data[:HEAD_BYTES])
    if format_name is None:
        raise DataError(
            f"{name}: not an image: expected JPEG, PNG, GIF, BMP, WebP or TIFF, found a file that starts with "
            f"{data[:8]!r}"
        )
    try:
        return _decode(data, format_name)
    except Warning:
        pass  # the caller turns warnings into errors
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except MemoryError as error:
        raise MemoryError(f"to decode {name}") from error
    except Exception as error:  # Pillow's plugins raise many types on damaged files
        if starved(data, error):
            raise MemoryError(f"to decode {name}") from error
        raise DataError(f"{name}: cannot be decoded as {format_name}: {_reason(error)}") from error
    # Pillow warns of harmless faults (damaged EXIF data, for one). The filters are global, so they are touched only
    # here, where a warning would otherwise refuse a good image.
    with warning_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _decode(data, format_name)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        except MemoryError as error:
            raise MemoryError(f"to decode {name}") from error
        except Exception as error:
            if starved(data, error):
                raise MemoryError(f"to decode {name}") from error
            raise DataError(f"{name}: cannot be decoded as {format_name}: {_reason(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert by Note [Conversion to RGB].

    Raises:
        DataError: Floating-point or 32-bit pixels, whose range is not known.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 0xFFFF):
            raise DataError(f"expected pixels of 8 or 16 bits, found values {values.min()}..{values.max()}")
        high = (values.astype(np.uint32) >> 8).astype(np.uint8)
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            high[values == clear] = 255
        return Image.fromarray(high).convert("RGB")
    if image.mode == "F":
        raise DataError("expected pixels of 8 or 16 bits, found floating-point values")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "PA":
            image = image.convert("RGBA")
        elif image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode(data: bytes, format_name: str) -> UInt8Array:
    if format_name == "JPEG":
        found = try_decode_jpeg(data, max_pixels=MAX_PIXELS)
        if found is not None:
            return found
    if format_name == "WEBP":
        _check_size(*_webp_size(data))
    with Image.open(BytesIO(data), formats=(format_name,)) as image:
        width, height = image.size
        _check_size(width, height)
        if isinstance(image, TiffImageFile):
            _check_tiles(image)
        image.load()
        if format_name == "PNG":
            _scale_transparency(image, depth=data[24])
        pixels = np.array(to_rgb(image), dtype=np.uint8)
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise DataError(f"expected at least one pixel, found {width} x {height}")
    return pixels


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"the header claims {width} x {height} pixels, more than the limit of {MAX_PIXELS}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas; (0, 0) if the decoder will find fault with the header anyway."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(data) >= 30:
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return 0, 0


def _check_tiles(image: TiffImageFile) -> None:
    """A tile is decoded whole: one far larger than the image is a bomb."""
    sides = [image.tag_v2.get(tag) for tag in (_TILE_WIDTH, _TILE_LENGTH)]
    width, height = (side if isinstance(side, int) else 0 for side in sides)
    if width * height > max(4 * image.size[0] * image.size[1], SMALL_TILE):
        raise DataError(f"the header claims tiles of {width} x {height} pixels for {image.size[0]} x {image.size[1]}")


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """Bring a PNG's transparent colour to the 8 bits that Pillow brings the pixels to."""
    clear = image.info.get("transparency")
    if image.mode == "L" and isinstance(clear, int) and depth in (2, 4) and clear < 1 << depth:
        image.info["transparency"] = clear * (255 // ((1 << depth) - 1))
    elif image.mode == "RGB" and isinstance(clear, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"the header claims too many pixels, more than the limit of {MAX_PIXELS}"
    text = " ".join(str(error).split())
    return text or type(error).__name__
