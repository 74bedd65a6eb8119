"""STL-10's binary version: images of 96 x 96, channel by channel and column by column, in a memory map.

Layout: `*_X.bin` holds 27,648 bytes per image, [3, 96 columns, 96 rows], and nothing else; `*_y.bin` one byte per
image, 1..10; `class_names.txt` ten lines.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sela_ext.data.cifar import read_small
from sela_ext.data.source import Int64Array, Source, UInt8Array
from sela_ext.errors import DataError

SIDE = 96
PIXELS = 3 * SIDE * SIDE
CLASSES = 10
FOLDER = "stl10_binary"
SPLITS = {"train": ("train", "unlabeled"), "test": ("test",)}
# Images whose pixels enter the fingerprint; there are no file names.
FINGERPRINT_IMAGES = 64


class Stl10Source(Source):
    """Images of one or more files of STL-10, turned the right way when they are read."""

    kind = "stl-10"
    channels = 3

    def __init__(
        self, parts: Sequence[tuple[str, UInt8Array]], labels: Int64Array | None, class_names: list[str] | None
    ) -> None:
        self.class_names = class_names
        self._parts = list(parts)
        self._labels = labels
        self._starts = [0, *itertools.accumulate(len(array) for _, array in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        return [f"{name}/{i:06d}" for name, array in self._parts for i in range(len(array))]

    def name(self, index: int) -> str:
        """See `Source.name`."""
        name, row, _ = self._place(index)
        return f"{name}/{row:06d}"

    @property
    def labels(self) -> Int64Array | None:
        """See `Source.labels`."""
        return self._labels

    @property
    def image_size(self) -> tuple[int, int]:
        """See `Source.image_size`."""
        return SIDE, SIDE

    def read(self, index: int) -> UInt8Array:
        """See `Source.read`."""
        _, row, array = self._place(index)
        return np.ascontiguousarray(array[row].transpose(2, 1, 0))

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        digest = hashlib.sha256()
        for row in np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_IMAGES).astype(np.int64)):
            digest.update(self.read(int(row)).tobytes())
        return {**super().fingerprint(), "pixels": digest.hexdigest()}

    def _place(self, index: int) -> tuple[str, int, UInt8Array]:
        part = bisect_right(self._starts, index) - 1
        name, array = self._parts[part]
        return name, index - self._starts[part], array


def find_stl10(folder: Path) -> Path | None:
    """The folder of STL-10's files: this one, or the one of the archive's name in it; None without any."""
    for place in (folder, folder / FOLDER):
        if any((place / f"{name}_X.bin").is_file() for names in SPLITS.values() for name in names):
            return place
    return None


def open_stl10(folder: Path, split: str = "train") -> Stl10Source:
    """Open the images of one split.

    Args:
        folder: As `find_stl10` returns it.
        split: "train": the 5,000 labelled images followed by the 100,000 unlabelled ones, as far as they are there; or
            "test".

    Raises:
        DataError: None of the split's files, one that is truncated, or labels that do not fit.
    """
    names = [name for name in SPLITS[split] if (folder / f"{name}_X.bin").is_file()]
    if not names:
        raise DataError(f"{folder}: expected {' or '.join(f'{name}_X.bin' for name in SPLITS[split])}, found none")
    return _open([folder / f"{name}_X.bin" for name in names])


def is_stl10_file(path: Path) -> bool:
    """Whether a single file is one of STL-10's, by its name."""
    return path.name in {f"{name}_X.bin" for names in SPLITS.values() for name in names}


def open_stl10_file(path: Path) -> Stl10Source:
    """Open one of the files, with its labels beside it; see `open_stl10`."""
    return _open([path])


def _open(paths: Sequence[Path]) -> Stl10Source:
    parts, labels = [], []
    for path in paths:
        images = _map_images(path)
        parts.append((path.name.removesuffix("_X.bin"), images))
        labels.append(_read_labels(path.with_name(path.name.replace("_X", "_y")), path, len(images)))
    known = any(found is not None for found in labels)
    values = [
        np.full(len(part[1]), -1, np.int64) if found is None else found
        for part, found in zip(parts, labels, strict=True)
    ]
    return Stl10Source(parts, np.concatenate(values) if known else None, _class_names(paths[0].parent))


def _map_images(path: Path) -> UInt8Array:
    try:
        size = path.stat().st_size
        count, rest = divmod(size, PIXELS)
        if rest or not count:
            raise DataError(
                f"{path}: expected whole images of {PIXELS} bytes, found {size} bytes ({count} images and {rest} "
                "bytes); download it again"
            )
        return np.memmap(path, np.uint8, mode="r", shape=(count, 3, SIDE, SIDE))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_labels(path: Path, images: Path, count: int) -> Int64Array | None:
    if path == images or not path.is_file():
        return None
    values = np.frombuffer(read_small(path, 1 << 24), np.uint8).astype(np.int64)
    if len(values) != count:
        raise DataError(f"{path}: expected {count} labels, one per image of {images.name}, found {len(values)}")
    if values.min() < 1 or values.max() > CLASSES:
        raise DataError(f"{path}: expected labels in 1..{CLASSES}, found {values.min()}..{values.max()}")
    return values - 1


def _class_names(folder: Path) -> list[str] | None:
    path = folder / "class_names.txt"
    if not path.is_file():
        return None
    names = read_small(path, 1 << 16).decode("utf-8", "replace").split()
    if len(names) != CLASSES:
        raise DataError(f"{path}: expected {CLASSES} names of classes, found {len(names)}")
    return names
