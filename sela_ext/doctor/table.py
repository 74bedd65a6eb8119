"""What was found, image by image, in columns: about 0.45 kB per image, however large the images are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sela_ext.doctor.facts import RAW, UNKNOWN, Facts
from sela_ext.doctor.look_alike import CROPS, THUMB, hashes_of, thumbs_of

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", RAW, UNKNOWN)
# Names kept of images with some peculiarity.
FIRST = 20


@dataclass
class Noted:
    """Images with a peculiarity: how many, and the first of them as (row, words about it)."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: int, words: str = "") -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < FIRST:
            self.first.append((row, words))


@dataclass
class Table:
    """Columns, one row per image looked at: those of the data first, then the held-out ones.

    Attributes:
        index: int64 [R], number of the image in its source.
        held: bool [R], whether it is a held-out one.
        good: bool [R], whether it can be used.
        bytes: int64 [R].
        height, width: int32 [R], 0 where unknown.
        one_colour: bool [R].
        content, pixels: uint64 [R, 2], digests of the bytes and of the pixels.
        hashes: uint64 [R, 19].
        thumbs: uint8 [R, 16, 16].
        faults: (row, reason) of every image that cannot be used.
        formats, modes, orientations: how often each occurs.
        wrong_suffix, animated, deep, cmyk, by_pillow: images with that peculiarity.
    """

    index: npt.NDArray[np.int64]
    held: npt.NDArray[np.bool_]
    good: npt.NDArray[np.bool_] = field(init=False)
    bytes: npt.NDArray[np.int64] = field(init=False)
    height: npt.NDArray[np.int32] = field(init=False)
    width: npt.NDArray[np.int32] = field(init=False)
    one_colour: npt.NDArray[np.bool_] = field(init=False)
    content: npt.NDArray[np.uint64] = field(init=False)
    pixels: npt.NDArray[np.uint64] = field(init=False)
    hashes: npt.NDArray[np.uint64] = field(init=False)
    thumbs: npt.NDArray[np.uint8] = field(init=False)
    faults: list[tuple[int, str]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    orientations: Counter[int] = field(default_factory=Counter)
    wrong_suffix: Noted = field(default_factory=Noted)
    animated: Noted = field(default_factory=Noted)
    deep: Noted = field(default_factory=Noted)
    cmyk: Noted = field(default_factory=Noted)
    by_pillow: Noted = field(default_factory=Noted)

    def __post_init__(self) -> None:
        rows = len(self.index)
        self.good = np.zeros(rows, np.bool_)
        self.bytes = np.zeros(rows, np.int64)
        self.height, self.width = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self.one_colour = np.zeros(rows, np.bool_)
        self.content, self.pixels = np.zeros((rows, 2), np.uint64), np.zeros((rows, 2), np.uint64)
        self.hashes = np.zeros((rows, len(CROPS)), np.uint64)
        self.thumbs = np.zeros((rows, THUMB, THUMB), np.uint8)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        columns = (self.index, self.held, self.good, self.bytes, self.height, self.width, self.one_colour)
        return sum(part.nbytes for part in (*columns, self.content, self.pixels, self.hashes, self.thumbs))

    def note(self, start: int, found: list[Facts]) -> None:
        """Enter what was found about the images from row `start` on."""
        seen = [(row, facts) for row, facts in enumerate(found, start)]
        for row, facts in seen:
            self._note_one(row, facts)
        good = [(row, facts.grid) for row, facts in seen if facts.grid is not None]
        if good:
            rows = np.array([row for row, _ in good])
            grids = np.stack([grid for _, grid in good])
            self.hashes[rows], self.thumbs[rows] = hashes_of(grids), thumbs_of(grids)

    def _note_one(self, row: int, facts: Facts) -> None:
        self.bytes[row] = facts.nbytes
        self.formats[facts.format] += 1
        self.content[row] = np.frombuffer(facts.content, np.uint64)
        if facts.suffix:
            self.wrong_suffix.add(row, facts.format)
        if facts.mode:
            self.modes[facts.mode] += 1
        if facts.orientation != 1:
            self.orientations[facts.orientation] += 1
        for noted, holds in (
            (self.animated, facts.animated),
            (self.deep, facts.deep),
            (self.cmyk, facts.mode == "CMYK"),
            (self.by_pillow, facts.format == "JPEG" and not facts.compiled),
        ):
            if holds:
                noted.add(row)
        if facts.fault:
            self.faults.append((row, facts.fault))
            return
        self.good[row] = True
        self.height[row], self.width[row] = facts.height, facts.width
        self.one_colour[row] = facts.one_colour
        self.pixels[row] = np.frombuffer(facts.pixels, np.uint64)
