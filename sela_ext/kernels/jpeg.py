"""JPEG files to RGB or to planes: whole, in part, or reduced, with Pillow's pixels.

Baseline files (sequential, Huffman-coded, 8 bits, grey or three components) are decoded by the compiled core, on the
calling thread and without the GIL. Every other kind of file, and everything that is not quite in order, goes to Pillow;
what comes back is the same either way.

Note [Checkpoint index]
    Entropy-coded data can only be read from the front, unless somebody has noted where things are. An index does, every
    four MCUs of each row: 11 bytes each, some 2 to 8 kB per photograph. With one, the data left of a box and above it
    are not even looked at. It is bytes that can be kept anywhere; it says which file it was made for, and one that was
    made for another file is ignored.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sela_ext import _core
from sela_ext.errors import DataError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    UInt8Array = npt.NDArray[np.uint8]
    Box = tuple[int, int, int, int]

# A 1.7 kB file can claim 65000 x 65000 pixels: sizes in headers are checked before anything is allocated.
# Pillow's own limit for an error, so that both agree.
MAX_PIXELS = 178_956_970
SCALES = (1, 2, 4, 8)
# What Pillow may take the bytes for.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")

# Filters of warnings are global: whoever changes them for a while must be alone.
warning_lock = threading.Lock()


@dataclass(frozen=True)
class JpegHeader:
    """What the headers of a file that the core decodes say.

    Attributes:
        height: pixels.
        width: pixels.
        colour: "grey", "ycc" or "rgb".
        sampling: (horizontal, vertical) factors of each component.
        restart_interval: MCUs, 0 = none.
    """

    height: int
    width: int
    colour: Literal["grey", "ycc", "rgb"]
    sampling: tuple[tuple[int, int], ...]
    restart_interval: int


@dataclass(frozen=True)
class JpegPlane:
    """Samples of one component.

    Pixel (y, x) of the image takes sample (y // step_y, x // step_x) of the component, or where `smooth_y`, `smooth_x`
    is set, 3/4 of it and 1/4 of the nearest neighbour in that direction, which is there as well.

    Attributes:
        samples: uint8 [h, w], rows possibly apart.
        top: row of samples[0] in the component.
        left: column of samples[:, 0] in the component.
        full_height: rows of the whole component.
        full_width: columns of the whole component.
        step_y: pixels per sample, vertically.
        step_x: pixels per sample, horizontally.
        smooth_y: whether libjpeg interpolates vertically.
        smooth_x: whether libjpeg interpolates horizontally.
    """

    samples: UInt8Array
    top: int
    left: int
    full_height: int
    full_width: int
    step_y: int
    step_x: int
    smooth_y: bool
    smooth_x: bool


@dataclass(frozen=True)
class JpegPlanes:
    """What a box needs, in the resolution in which the file has it.

    Attributes:
        planes: one for "grey", three for "ycc" and "rgb".
        colour: what the planes are.
        box: (top, left, height, width) in pixels of the (scaled) image.
        index: the checkpoint index, if one was asked for and the core decoded the file.
    """

    planes: tuple[JpegPlane, ...]
    colour: Literal["grey", "ycc", "rgb"]
    box: Box
    index: bytes | None = field(default=None, repr=False)


def jpeg_header(data: Any) -> JpegHeader | None:
    """Headers of a file that the core may decode; None for any other. The image itself is not looked at."""
    check_bytes("data", data)
    found = _core.jpeg_header(data)
    if found.pop("status") != "ok":
        return None
    return JpegHeader(**found)


def decode_jpeg(
    data: Any, *, scale: int = 1, index: bytes | None = None, max_pixels: int = MAX_PIXELS, isa: str = ""
) -> UInt8Array:
    """Decode a JPEG file to RGB: the pixels of ``PIL.Image.open(...).convert("RGB")``, bit for bit.

    Args:
        data: The bytes of the file (bytes, bytearray, memoryview, mmap, uint8 array).
        scale: 1, 2, 4 or 8: decode at 1/scale of the size, rounded up, as Pillow's ``draft`` does.
        index: A checkpoint index of this file; see Note [Checkpoint index].
        max_pixels: Largest height * width that a header may claim.
        isa: CPU instruction set, "" for the one in use (for tests).

    Returns:
        uint8 [ceil(H / scale), ceil(W / scale), 3].

    Raises:
        DataError: Pillow refuses the file, or its header claims more than `max_pixels`.
        OptionError: `scale` is none of these, or larger than the image.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (5, 3), (200, 100, 0)).save(file, "JPEG")
        >>> decode_jpeg(file.getvalue()).shape
        (3, 5, 3)
    """
    return _rgb(data, None, scale, index, max_pixels, isa)


def decode_crop(
    data: Any,
    box: Iterable[int],
    *,
    scale: int = 1,
    index: bytes | None = None,
    max_pixels: int = MAX_PIXELS,
    isa: str = "",
) -> UInt8Array:
    """A rectangle of `decode_jpeg(data, scale=scale)`, in the time that the rectangle takes.

    What lies right of the box and below it is not decoded, nor looked at: damage there goes unnoticed. With an index,
    the same holds for what lies left and above.

    Args:
        data: The bytes of the file.
        box: (top, left, height, width) in pixels of the scaled image.
        scale: See `decode_jpeg`.
        index: A checkpoint index of this file; see Note [Checkpoint index].
        max_pixels: See `decode_jpeg`.
        isa: CPU instruction set, "" for the one in use (for tests).

    Returns:
        uint8 [height, width, 3].

    Raises:
        DataError: As `decode_jpeg`.
        OptionError: The box is not within the image, or as `decode_jpeg`.
    """
    return _rgb(data, check_box(box), scale, index, max_pixels, isa)


def decode_planes(
    data: Any,
    box: Iterable[int] | None = None,
    *,
    scale: int = 1,
    index: bytes | None = None,
    build_index: bool = False,
    max_pixels: int = MAX_PIXELS,
    isa: str = "",
) -> JpegPlanes:
    """Samples of each component that a box needs, before upsampling and colour conversion.

    Files that go to Pillow come back as three planes of colour "rgb".

    Args:
        data: The bytes of the file.
        box: (top, left, height, width) in pixels of the scaled image; None for all of it.
        scale: See `decode_jpeg`.
        index: A checkpoint index of this file; see Note [Checkpoint index].
        build_index: Make an index on the way, for which all entropy-coded data must be read. Not together with `index`.
        max_pixels: See `decode_jpeg`.
        isa: CPU instruction set, "" for the one in use (for tests).

    Returns:
        JpegPlanes.

    Raises:
        DataError: As `decode_jpeg`.
        OptionError: As `decode_crop`, or both `index` and `build_index`.
    """
    if index is not None and build_index:
        raise OptionError("build_index: expected either an index or the wish for one, found both")
    chosen = None if box is None else check_box(box)
    _check_scale(scale)
    status, found, built = _call(_core.jpeg_planes, data, chosen, scale, index, build_index, max_pixels, isa)
    if status == "ok":
        colour, planes = found
        return JpegPlanes(tuple(JpegPlane(**plane) for plane in planes), colour, chosen or _whole(data, scale), built)
    whole = _by_pillow(data, scale, max_pixels)
    height, width = whole.shape[:2]
    chosen = chosen or (0, 0, height, width)
    part = _cut(whole, chosen)
    return JpegPlanes(
        tuple(
            JpegPlane(
                np.ascontiguousarray(part[..., c]),
                chosen[0],
                chosen[1],
                height,
                width,
                1,
                1,
                smooth_y=False,
                smooth_x=False,
            )
            for c in range(3)
        ),
        "rgb",
        chosen,
    )


def jpeg_index(data: Any, *, max_pixels: int = MAX_PIXELS, isa: str = "") -> bytes | None:
    """The checkpoint index of a file, or None if it is one for Pillow; see Note [Checkpoint index].

    Reads all entropy-coded data, but transforms next to nothing.
    """
    status, _, built = _call(_core.jpeg_planes, data, (0, 0, 1, 1), 1, None, True, max_pixels, isa)
    return built if status == "ok" else None


def try_decode_jpeg(data: Any, *, max_pixels: int = MAX_PIXELS) -> UInt8Array | None:
    """`decode_jpeg` without Pillow: None where it would be asked."""
    status, pixels, _ = _call(_core.jpeg_rgb, data, None, 1, None, False, max_pixels, "")
    return pixels if status == "ok" else None


def _rgb(data: Any, box: Box | None, scale: int, index: bytes | None, max_pixels: int, isa: str) -> UInt8Array:
    _check_scale(scale)
    status, pixels, _ = _call(_core.jpeg_rgb, data, box, scale, index, False, max_pixels, isa)
    if status == "ok":
        found: UInt8Array = pixels
        return found
    whole = _by_pillow(data, scale, max_pixels)
    return whole if box is None else np.ascontiguousarray(_cut(whole, box))


def _call(
    function: Any, data: Any, box: Box | None, scale: int, index: bytes | None, build: bool, max_pixels: int, isa: str
) -> tuple[str, Any, bytes | None]:
    """Call the core; a foreign index is left out, and a caller's fault is an OptionError."""
    check_bytes("data", data)
    if index is not None:
        check_bytes("index", index)
    four = (0, 0, 0, 0) if box is None else box
    try:
        status, found, built = function(data, *four, scale, index, build, max_pixels, isa)
        if status == "foreign index":
            status, found, built = function(data, *four, scale, None, build, max_pixels, isa)
    except (ValueError, BufferError) as error:
        raise OptionError(str(error)) from error
    return status, found, built


def check_bytes(name: str, value: Any) -> None:
    """Refuse what holds no bytes.

    Raises:
        OptionError: an argument of another kind.
    """
    try:
        memoryview(value)
    except TypeError as error:
        raise OptionError(f"{name}: expected bytes, found {type(value).__name__}") from error


def _check_scale(scale: int) -> None:
    if scale not in SCALES:
        raise OptionError(f"scale: expected 1, 2, 4 or 8, found {scale!r}")


def check_box(box: Iterable[int], name: str = "box") -> Box:
    """A box as four numbers, whatever image it is of.

    Raises:
        OptionError: other than four numbers, or a box of no pixel.
    """
    numbers = tuple(int(number) for number in box)
    if len(numbers) != 4 or min(numbers[:2]) < 0 or min(numbers[2:]) < 1:
        raise OptionError(f"{name}: expected (top >= 0, left >= 0, height >= 1, width >= 1), found {numbers}")
    return numbers


def _whole(data: Any, scale: int) -> Box:
    header = jpeg_header(data)
    assert header is not None  # it has just been decoded
    return 0, 0, -(-header.height // scale), -(-header.width // scale)


def _cut(whole: UInt8Array, box: Box) -> UInt8Array:
    top, left, height, width = box
    if top + height > whole.shape[0] or left + width > whole.shape[1]:
        raise OptionError(f"box: expected one within {whole.shape[0]} x {whole.shape[1]}, found {box}")
    return whole[top : top + height, left : left + width]


def _by_pillow(data: Any, scale: int, max_pixels: int) -> UInt8Array:
    """What Pillow makes of the bytes."""
    try:
        return _opened(data, scale, max_pixels)
    except Warning:
        pass  # the caller turns warnings into errors
    except (DataError, OptionError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise many types on damaged files
        if starved(data, error):
            raise MemoryError from error
        raise DataError(f"cannot be decoded as JPEG: {_reason(error, max_pixels)}") from error
    # Pillow warns of harmless faults. The filters are global: touched only where they would refuse an image.
    with warning_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _opened(data, scale, max_pixels)
        except (DataError, OptionError, MemoryError):
            raise
        except Exception as error:
            if starved(data, error):
                raise MemoryError from error
            raise DataError(f"cannot be decoded as JPEG: {_reason(error, max_pixels)}") from error


def starved(data: Any, error: Exception) -> bool:
    """Whether Pillow gave up on a JPEG for want of memory: it has the same words for that and for damaged data.

    Args:
        data: the file's bytes.
        error: what Pillow raised.
    """
    if "broken data stream" not in str(error):
        return False
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            np.empty(16 * image.width * image.height, np.uint8)  # coefficients and pixels, amply; never touched
    except MemoryError:
        return True
    except Exception:  # not even a header
        return False
    return False


def _opened(data: Any, scale: int, max_pixels: int) -> UInt8Array:
    from PIL import Image

    with Image.open(BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(f"the header claims {width} x {height} pixels, more than the limit of {max_pixels}")
        if scale > min(width, height):
            raise OptionError(
                f"scale: expected at most the {min(width, height)} pixels of the shorter side, found {scale}"
            )
        if scale > 1:
            image.draft("RGB", (width // scale, height // scale))
        pixels = image.convert("RGB")
        expected = (-(-width // scale), -(-height // scale))
        if pixels.size != expected:  # not a JPEG, which alone can be reduced while it is decoded
            pixels = pixels.reduce(scale)
        return np.array(pixels, dtype=np.uint8)


def _reason(error: Exception, max_pixels: int) -> str:
    if type(error).__name__ == "DecompressionBombError":
        return f"the header claims too many pixels, more than the limit of {max_pixels}"
    return " ".join(str(error).split()) or type(error).__name__
