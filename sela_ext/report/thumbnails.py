"""Small pictures of images: one by one as data URIs, or many packed into a few sheets."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

ReadImage = Callable[[int], npt.NDArray[np.uint8]]

# Longest side of an embedded thumbnail, in pixels, and of the images that are kept exactly as they are.
THUMBNAIL = 96
EXACT = 48
# Thumbnails of a sheet, across and down: a browser decodes a sheet when one of them comes into view.
ACROSS = 16
PER_SHEET = ACROSS * ACROSS
# Thumbnails of at most so many images have so many pixels on a side (multiples of 16, the blocks of JPEG).
_SIDES = ((600, 96), (2000, 64), (5000, 48), (1 << 62, 32))
# What all sheets of a page may take before base64 adds a third.
_MOST_BYTES = 5_000_000
# Tried in this order until the sheets fit; the first for tiny images, which are kept exactly.
_ENCODINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("PNG", {"optimize": True}),
    ("JPEG", {"quality": 88, "subsampling": 0}),
    ("JPEG", {"quality": 78}),
    ("JPEG", {"quality": 60}),
    ("JPEG", {"quality": 40}),
    ("JPEG", {"quality": 20}),
    ("JPEG", {"quality": 8}),
)
# Pixels that are decoded for one page: five hundred photographs of twelve million pixels, less than a minute.
_MOST_PIXELS = 6_000_000_000


@dataclass(frozen=True)
class Place:
    """Where a thumbnail lies: sheet, column and row."""

    sheet: int
    x: int
    y: int


@dataclass(frozen=True)
class Sheets:
    """Thumbnails of a page.

    Attributes:
        sources: a data URI per sheet.
        places: image -> where its thumbnail lies.
        pixelated: tiny images, to be enlarged without smoothing.
        unreadable: images that should be shown and could not be read.
        left: images that were not tried any more, since those before them were large.
    """

    sources: list[str] = field(default_factory=list)
    places: dict[int, Place] = field(default_factory=dict)
    pixelated: bool = False
    unreadable: int = 0
    left: int = 0


def make_sheets(indices: Sequence[int], read_image: ReadImage | None) -> Sheets:
    """Read images and pack their thumbnails; the middle square of each is shown.

    Args:
        indices: images, the most wanted first.
        read_image: index -> uint8 [H, W], [H, W, 1] or [H, W, 3]; what it raises is counted. None: nothing is packed.
    """
    if read_image is None or not len(indices):
        return Sheets()
    side = next(side for most, side in _SIDES if len(indices) <= most)
    cells: list[Image.Image] = []
    shown: list[int] = []
    largest = unreadable = pixels = left = 0
    for done, index in enumerate(indices):
        if pixels > _MOST_PIXELS:
            left = len(indices) - done
            break
        try:
            picture = _picture(read_image(int(index)))
        except Exception:  # one bad image, whatever its reader raises, must not cost the report
            unreadable += 1
            continue
        pixels += picture.width * picture.height
        largest = max(largest, *picture.size)
        cells.append(picture if max(picture.size) <= EXACT else _square(picture, side))
        shown.append(int(index))
    if not cells:
        return Sheets(unreadable=unreadable, left=left)
    tiny = largest <= EXACT
    if tiny:
        side = largest
    mode = "L" if all(cell.mode == "L" for cell in cells) else "RGB"
    pages = [_page(cells[start : start + PER_SHEET], side, mode) for start in range(0, len(cells), PER_SHEET)]
    places = {
        index: Place(i // PER_SHEET, i % PER_SHEET % ACROSS, i % PER_SHEET // ACROSS) for i, index in enumerate(shown)
    }
    return Sheets(_encoded(pages, tiny), places, tiny, unreadable, left)


def data_uri(image: npt.NDArray[Any]) -> tuple[str, bool]:
    """Encode an image for embedding: PNG as it is up to 48 pixels, else a JPEG of at most 96 pixels.

    Args:
        image: uint8 [H, W], [H, W, 1] or [H, W, 3].

    Returns:
        The data URI, and whether the image is tiny (to be enlarged without smoothing).

    Raises:
        ValueError: the array is no such image.
    """
    picture = _picture(image)
    exact = max(picture.size) <= EXACT
    if exact:
        return _uri(picture, "PNG", {"optimize": True}), True
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return _uri(picture, "JPEG", {"quality": 80}), False


def _picture(image: npt.NDArray[Any]) -> Image.Image:
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"expected uint8 [H, W, 1 or 3], found {array.dtype} {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))


def _square(picture: Image.Image, side: int) -> Image.Image:
    """The middle square, resized."""
    shorter = min(picture.size)
    x, y = (picture.width - shorter) / 2, (picture.height - shorter) / 2
    box = (x, y, x + shorter, y + shorter)
    return picture.resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def _page(cells: list[Image.Image], side: int, mode: str) -> Image.Image:
    """A sheet of cells, row by row; smaller images are centred, tiny ones not enlarged."""
    page = Image.new(mode, (ACROSS * side, ACROSS * side))
    for i, cell in enumerate(cells):
        shown = cell if max(cell.size) <= side else _square(cell, side)
        x = i % ACROSS * side + (side - shown.width) // 2
        y = i // ACROSS * side + (side - shown.height) // 2
        page.paste(shown, (x, y))
    return page


def _encoded(pages: list[Image.Image], tiny: bool) -> list[str]:
    """The sheets as data URIs, in the best quality in which they fit."""
    found: list[str] = []
    for kind, options in _ENCODINGS if tiny else _ENCODINGS[1:]:
        found = [_uri(page, kind, options) for page in pages]
        if sum(map(len, found)) <= _MOST_BYTES * 4 // 3:
            break
    return found


def _uri(picture: Image.Image, kind: str, options: dict[str, Any]) -> str:
    stream = io.BytesIO()
    picture.save(stream, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
