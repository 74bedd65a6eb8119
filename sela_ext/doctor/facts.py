"""One image, looked at: what its file says of itself, what its pixels are, or why they cannot be had.

Note [What is decoded]
    Every image is decoded once, to the pixels that training sees (baseline JPEG files by the compiled decoder). The
    header is read a second time, by Pillow, only where the compiled reader of headers does not know the file, or where
    it may carry an EXIF orientation.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from sela_ext.data.decode import HEAD_BYTES, decode_image, sniff
from sela_ext.data.source import Source, UInt8Array
from sela_ext.doctor.look_alike import grid_of
from sela_ext.errors import DataError
from sela_ext.kernels.jpeg import jpeg_header, warning_lock

RAW = "pixels"  # the format of images that lie in memory, or come from a Dataset
UNKNOWN = "unknown"
SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
# Values that differ by no more than this in each channel are one colour: JPEG leaves that much behind.
ONE_COLOUR = 4
# An EXIF block stands in front of the pixels.
_EXIF_WITHIN = 1 << 16
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


@dataclass
class Facts:
    """What was found out about an image.

    Attributes:
        name: its name.
        nbytes: of the file, or of the pixels where there is none.
        format: by its content: "JPEG", "PNG", ..., `RAW`, or `UNKNOWN`.
        suffix: of its name, in lower case, where it says another format than the content; else "".
        mode: Pillow's name of the colour mode; "" if unknown.
        orientation: EXIF orientation, 1 .. 8; 1 if there is none.
        animated: more than one frame.
        deep: 16 bits per channel.
        compiled: a JPEG that the compiled decoder takes.
        height: pixels; 0 if unknown.
        width: pixels; 0 if unknown.
        one_colour: all pixels are of one colour, up to `ONE_COLOUR`.
        content: digest of the encoded bytes; of the pixels where there are none.
        pixels: digest of size and pixels.
        grid: uint8 [64, 64], see `grid_of`.
        fault: why it cannot be used, "" if it can.
    """

    name: str
    nbytes: int = 0
    format: str = UNKNOWN
    suffix: str = ""
    mode: str = ""
    orientation: int = 1
    animated: bool = False
    deep: bool = False
    compiled: bool = False
    height: int = 0
    width: int = 0
    one_colour: bool = False
    content: bytes = bytes(16)
    pixels: bytes = bytes(16)
    grid: npt.NDArray[np.uint8] | None = None
    fault: str = ""


def look(source: Source, index: int) -> Facts:
    """Look at one image: Note [What is decoded]. Nothing that is wrong with it is raised."""
    facts = Facts(source.name(index))
    try:
        if source.encoded:
            data = source.encoded_bytes(index)
            _describe(facts, data)
            pixels = decode_image(data, facts.name)
        else:
            pixels = source.read(index)
            facts.format, facts.mode = RAW, "L" if pixels.shape[2] == 1 else "RGB"
            facts.nbytes = pixels.nbytes
    except DataError as error:
        facts.fault = str(error).removeprefix(f"{facts.name}: ")
        return facts
    facts.height, facts.width = pixels.shape[:2]
    facts.one_colour = bool((np.ptp(_lattice(pixels), axis=0) <= ONE_COLOUR).all()) and _is_one_colour(pixels)
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data)
    digest.update(f"{pixels.shape}".encode())
    facts.pixels = digest.digest()[:16]
    if facts.format == RAW:
        facts.content = facts.pixels
    facts.grid = grid_of(pixels)
    return facts


def _describe(facts: Facts, data: bytes) -> None:
    """What the bytes say before they are decoded."""
    facts.nbytes = len(data)
    facts.content = hashlib.sha256(data).digest()[:16]
    facts.format = sniff(data[:HEAD_BYTES]) or UNKNOWN
    if facts.format == UNKNOWN:
        return
    suffix = os.path.splitext(facts.name)[1].lower()
    if suffix and SUFFIXES.get(suffix) != facts.format:
        facts.suffix = suffix
    if facts.format == "JPEG":
        header = jpeg_header(data)
        if header is not None:
            facts.compiled = True
            facts.mode = "L" if header.colour == "grey" else "RGB"
            if b"Exif\0\0" not in data[:_EXIF_WITHIN]:
                return
    if facts.format == "PNG" and data[12:16] == b"IHDR":
        facts.deep = data[24:25] == b"\x10"
    # Headers of damaged files raise many kinds of errors, and warn; whether the image is good is for its pixels to say.
    # The filters of warnings are global, so they are left alone unless somebody turned warnings into errors.
    try:
        _ask_pillow(facts, data)
    except Warning:
        with warning_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _ask_pillow_quietly(facts, data)
    except Exception:
        return


def _ask_pillow_quietly(facts: Facts, data: bytes) -> None:
    try:
        _ask_pillow(facts, data)
    except Exception:
        return


def _ask_pillow(facts: Facts, data: bytes) -> None:
    with Image.open(BytesIO(data), formats=(facts.format,)) as image:
        facts.mode = image.mode
        facts.deep = facts.deep or image.mode in _DEEP_MODES
        if facts.format == "TIFF":
            bits = image.tag_v2.get(258, (8,))  # type: ignore[attr-defined]
            facts.deep = facts.deep or max(bits if isinstance(bits, tuple) else (bits,)) == 16
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if isinstance(orientation, int) and 1 <= orientation <= 8:
            facts.orientation = orientation
        facts.animated = bool(getattr(image, "is_animated", False))


def _lattice(pixels: UInt8Array) -> UInt8Array:
    """Some of the pixels, evenly spread: [S, C]. Where they differ, no more need be looked at."""
    step_y, step_x = max(1, pixels.shape[0] // 8), max(1, pixels.shape[1] // 8)
    return pixels[::step_y, ::step_x].reshape(-1, pixels.shape[2])


def _is_one_colour(pixels: UInt8Array) -> bool:
    flat = pixels.reshape(-1, pixels.shape[2])
    return bool((flat.max(axis=0).astype(np.int64) - flat.min(axis=0) <= ONE_COLOUR).all())
