"""How images are stored in a pack.

Note [What is stored]
    * Image files: their bytes, unchanged, and for a JPEG that the compiled core decodes its checkpoint index.
    * Arrays, IDX files and whatever else has pixels of one known size: the pixels, one image after another.
    * Image files that are all small (at most 104 x 104 pixels), of one size and not turned by EXIF data: their pixels,
      by the documented conversion. They train several times faster so, and take the room of an array.
    * Other sources without files (torch Datasets): the pixels of images of at most 104 x 104, a PNG of larger ones.
    `raw=True` stores pixels of one size in any case, `raw=False` never does; then what has no file becomes a PNG.
    `max_side` reduces larger images, by Pillow's antialiased Lanczos filter, and stores those as JPEG (4:2:0; grey ones
    as grey) with `quality`; an orientation in EXIF is kept, other metadata of such images are not.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sela_ext.data.decode import HEAD_BYTES, decode_image, sniff
from sela_ext.data.orientation import find_orientation
from sela_ext.data.safe_files import MOST_FILE_BYTES
from sela_ext.data.shard_format import FORMATS, JPEG, MOST_SIDE, PNG, RAW, RECORD, Entry, text_bytes
from sela_ext.data.source import Located, Source, UInt8Array
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels.jpeg import FORMATS as PILLOW_FORMATS
from sela_ext.kernels.jpeg import MAX_PIXELS, jpeg_header, jpeg_index

SMALL_PIXELS = 104 * 104
# Files whose sizes are looked at to foretell the size of the pack, and how much larger an index makes them: 6 to 8%.
_SAMPLE = 1000
_WITH_INDEX = 1.09
_ORIENTATION = 0x0112
_EXIF_MARKS = (b"Exif\0\0", b"eXIf", b"EXIF")  # of JPEG, PNG and WebP


@dataclass(frozen=True)
class Plan:
    """How each image is stored: Note [What is stored].

    Attributes:
        files: Bytes of files as they are.
        raw: All images as pixels.
        small_raw: Images of at most `SMALL_PIXELS` as pixels, others as PNG; neither of these three: all as PNG.
        size: (H, W) that all raw images must have, or None.
        max_side: Longest side, or None.
        quality: Of JPEG.
    """

    files: bool
    raw: bool
    small_raw: bool
    size: tuple[int, int] | None
    max_side: int | None
    quality: int


def prepare(source: Source, plan: Plan, index: int, name: str) -> Entry:
    """Bytes of one image as the plan says.

    Raises:
        DataError: It cannot be read or decoded, or has more pixels or bytes than a record of a pack can say.
    """
    entry = _stored(source, plan, index, name)
    if max(entry.height, entry.width) >= MOST_SIDE or len(entry.data) >= 1 << 32:
        raise DataError(
            f"{name}: expected sides below {MOST_SIDE:,} pixels and less than 4 GiB, found {entry.height:,} x "
            f"{entry.width:,} pixels in {len(entry.data):,} bytes"
        )
    return entry


def _stored(source: Source, plan: Plan, index: int, name: str) -> Entry:
    text = text_bytes(name)
    orientation = 1
    if source.encoded:
        data = source.encoded_bytes(index)
        if plan.files:
            entry = _as_file(data, plan, name, text)
            if entry is not None:
                return entry
            orientation = find_orientation(Located(data=data))
        pixels = decode_image(data, name)
    else:
        pixels = source.read(index)
    reduced = False
    if plan.max_side is not None and max(pixels.shape[:2]) > plan.max_side:
        pixels, reduced = _reduced(pixels, plan.max_side), True
    height, width = pixels.shape[:2]
    if plan.raw:
        if plan.size is not None and (height, width) != plan.size:
            # No image for a policy of bad images: the wish itself cannot be fulfilled.
            raise OptionError(
                f"raw: expected all images of one size, {plan.size[0]} x {plan.size[1]}, found {height} x {width} in "
                f"{name}; use raw=False, which stores the files"
            )
        return Entry(RAW, pixels.tobytes(), b"", height, width, text)
    if plan.small_raw and height * width <= SMALL_PIXELS:
        return Entry(RAW, pixels.tobytes(), b"", height, width, text)
    if not reduced:
        return Entry(PNG, _png(pixels), b"", height, width, text)
    jpeg = _jpeg(pixels, plan.quality, orientation)
    return Entry(JPEG, jpeg, jpeg_index(jpeg) or b"", height, width, text)


def _as_file(data: bytes, plan: Plan, name: str, text: bytes) -> Entry | None:
    """An image file as it is; None if it has to be reduced."""
    kind = sniff(data[:HEAD_BYTES])
    header = jpeg_header(data) if kind == "JPEG" else None
    if header is not None and header.height * header.width <= MAX_PIXELS:
        if plan.max_side is not None and max(header.height, header.width) > plan.max_side:
            return None
        index = jpeg_index(data)
        if index is not None:  # all of the file was read: it is sound
            return Entry(JPEG, data, index, header.height, header.width, text)
    height, width = decode_image(data, name).shape[:2]
    if plan.max_side is not None and max(height, width) > plan.max_side:
        return None
    assert kind is not None  # or it could not be decoded
    return Entry(FORMATS.index(kind), data, b"", height, width, text)


def _reduced(pixels: UInt8Array, max_side: int) -> UInt8Array:
    height, width = _after((pixels.shape[0], pixels.shape[1]), max_side)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    small = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    return np.ascontiguousarray(small.reshape(height, width, pixels.shape[2]))


def _png(pixels: UInt8Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def _jpeg(pixels: UInt8Array, quality: int, orientation: int) -> bytes:
    grey = pixels.shape[2] == 1 or bool((pixels[..., :1] == pixels).all())
    options: dict[str, Any] = {"quality": quality}
    if not grey:
        options["subsampling"] = "4:2:0"
    if orientation != 1:
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(file, "JPEG", **options)
    return file.getvalue()


def make_plan(source: Source, raw: Any, max_side: int | None, quality: int) -> Plan:
    """Decide how the images of a source are stored.

    Args:
        source: The images; headers of small files are looked at, and with `raw=True` the first image.
        raw: "auto", True or False.
        max_side: Longest side, or None.
        quality: Of JPEG.

    Raises:
        DataError: `raw=True`, and no image can be read.
    """
    make = functools.partial(Plan, max_side=max_side, quality=quality)
    if raw is True:
        return make(files=False, raw=True, small_raw=False, size=_after(_first_size(source), max_side))
    if raw is False:
        return make(files=source.encoded, raw=False, small_raw=False, size=None)
    if source.encoded:
        size = _common_small_size(source)
        if size is None:
            return make(files=True, raw=False, small_raw=False, size=None)
        return make(files=False, raw=True, small_raw=False, size=_after(size, max_side))
    if source.image_size is not None:
        return make(files=False, raw=True, small_raw=False, size=_after(source.image_size, max_side))
    return make(files=False, raw=False, small_raw=True, size=None)


def _after(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Size of a reduced image: the longer side becomes `max_side`, the shorter one follows, rounded, at least 1."""
    longer = max(size)
    if max_side is None or longer <= max_side:
        return size
    height, width = (max(1, (side * max_side * 2 + longer) // (2 * longer)) for side in size)
    return height, width


def _first_size(source: Source) -> tuple[int, int]:
    """(H, W) of the first image that can be read."""
    if source.image_size is not None:
        return source.image_size
    first: DataError | None = None
    for index in range(len(source)):
        try:
            height, width = source.read(index).shape[:2]
            return height, width
        except DataError as error:
            first = first or error
    raise DataError(f"expected at least one image that can be read, found none: {first}")


def _common_small_size(source: Source) -> tuple[int, int] | None:
    """(H, W) where every file is an image of this size and small; found out from headers, given up at the first not."""
    common: tuple[int, int] | None = None
    for index in range(len(source)):
        try:
            data = source.encoded_bytes(index)
            if any(mark in data for mark in _EXIF_MARKS) and find_orientation(Located(data=data)) != 1:
                return None  # which pixels alone would lose
            header = jpeg_header(data)
            if header is not None:
                size = header.height, header.width
            else:
                with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                    size = image.height, image.width
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return None
        except Exception:  # left to the policy of bad images; Pillow raises many types
            continue
        if size[0] * size[1] > SMALL_PIXELS or (common is not None and size != common):
            return None
        common = size
    return common


def foretell(source: Source, plan: Plan, start: int) -> int | None:
    """Bytes that the images from `start` on will take, about; None if that cannot be said."""
    left = len(source) - start
    if left == 0:
        return 0
    other = left * (RECORD.itemsize + 32)
    if plan.raw and plan.size is not None:
        return left * plan.size[0] * plan.size[1] * source.channels + other
    if not plan.files or plan.max_side is not None:
        return None
    rows = np.unique(np.linspace(start, len(source) - 1, min(left, _SAMPLE)).astype(np.int64))
    total = 0
    for row in rows.tolist():
        place = source.locate(row)
        with contextlib.suppress(OSError):
            size = len(place.data or b"") if place.path is None else os.stat(place.path).st_size
            total += size if size <= MOST_FILE_BYTES else 0  # a larger one is a bad image
    return int(total * left / len(rows) * _WITH_INDEX) + other
