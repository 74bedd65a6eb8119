"""SVHN's cropped digits: `train_32x32.mat`, MATLAB files of version 5, read without unpacking more than they hold.

Layout of such a file: a head of 128 bytes, then elements, each a type, a number of bytes and the bytes, the whole
possibly compressed with zlib. Here: X, uint8 [32 rows, 32 columns, 3, N], and y, [N, 1], 1..10, first axis fastest. The
digit 0 has the label 10, which becomes 0.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from sela_ext.data.arrays import ArraySource
from sela_ext.data.memory import free_memory
from sela_ext.data.source import Int64Array, UInt8Array
from sela_ext.errors import DataError

SIDE = 32
PIXELS = 3 * SIDE * SIDE
CLASSES = 10
# The largest file, "extra", holds 531,131 images.
MOST_IMAGES = 1 << 20
HEAD_BYTES = 128
CHUNK_IMAGES = 1 << 12
_COMPRESSED, _MATRIX = 15, 14
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def is_mat(head: bytes) -> bool:
    """Whether a file begins like a MATLAB file of version 5 (or 7.3, which is HDF5 with the same head)."""
    return head.startswith(b"MATLAB ") and head[126:128] in (b"IM", b"MI")


def find_svhn(folder: Path, split: str) -> Path | None:
    """The file of "train" or "test" in a folder, or None."""
    path = folder / f"{split}_32x32.mat"
    return path if path.is_file() else None


def open_svhn(path: Path) -> ArraySource:
    """Open cropped digits.

    Returns:
        RGB images in the file's order, in memory (3,072 bytes each), labelled with their digit.

    Raises:
        DataError: Another version or content, truncated, damaged, surplus values, or a label out of range.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except (OSError, EOFError, ValueError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: cannot be read as a MATLAB file: {error}; download it again") from error


@dataclass
class _Matrix:
    """Head of a numeric matrix, and where its values come from."""

    name: str
    shape: tuple[int, ...]
    kind: np.dtype[np.generic]
    stream: _Stream


class _Stream:
    """The bytes of one element, decompressed on the way if need be."""

    def __init__(self, file: IO[bytes], size: int, *, compressed: bool) -> None:
        self._file = file
        self._left = size
        self._zlib = zlib.decompressobj() if compressed else None

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, which the caller has found to be reasonable."""
        data = self._some(size)
        if len(data) != size:
            raise EOFError(f"truncated: {size} bytes were announced, {len(data)} are there")
        return data

    def at_end(self) -> bool:
        """Whether nothing is left; the checksum of compressed data has been compared then."""
        if self._some(1):
            return False
        if self._zlib is not None and not self._zlib.eof:
            raise EOFError("truncated within compressed data")
        return self._left == 0

    def _some(self, size: int) -> bytes:
        if self._zlib is None:
            data = self._file.read(min(size, self._left))
            self._left -= len(data)
            return data
        parts = bytearray()
        while len(parts) < size and not self._zlib.eof:
            raw = self._zlib.unconsumed_tail
            if not raw:
                raw = self._file.read(min(1 << 16, self._left))
                self._left -= len(raw)
            found = self._zlib.decompress(raw, size - len(parts))
            parts += found
            if not raw and not found:
                break
        return bytes(parts)


def _read(file: IO[bytes], path: Path) -> ArraySource:
    head = file.read(HEAD_BYTES)
    if not is_mat(head):
        raise DataError(f"{path}: expected a MATLAB file of version 5, found {head[:16]!r}")
    order = "<" if head[126:128] == b"IM" else ">"
    (version,) = struct.unpack(order + "H", head[124:126])
    if version != 0x0100:
        raise DataError(
            f"{path}: expected a MATLAB file of version 5, found version {version >> 8} (HDF5 if 2); save it in "
            "MATLAB with -v7, or as a .npy file"
        )
    images: UInt8Array | None = None
    labels: Int64Array | None = None
    while tag := file.read(8):
        if len(tag) < 8:
            raise EOFError("truncated between elements")
        kind, size = struct.unpack(order + "II", tag)
        if kind not in (_COMPRESSED, _MATRIX):
            raise DataError(f"{path}: expected matrices X and y, found an element of type {kind}")
        start = file.tell()
        matrix = _matrix(file, size, order, path, compressed=kind == _COMPRESSED)
        if matrix.name == "X":
            images = _images(matrix, path)
        elif matrix.name == "y":
            labels = _labels(matrix, path)
        if matrix.name in ("X", "y") and not matrix.stream.at_end():
            raise DataError(f"{path}: {matrix.name} holds more values than its shape says; download it again")
        file.seek(start + size)
    if images is None:
        raise DataError(f"{path}: expected X, the images of SVHN's cropped digits, found no such matrix")
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{path}: expected {len(images)} labels in y, one per image, found {len(labels)}")
    return ArraySource(images, kind="svhn", labels=labels, class_names=[str(digit) for digit in range(CLASSES)])


def _matrix(file: IO[bytes], size: int, order: str, path: Path, *, compressed: bool) -> _Matrix:
    """Read up to the values of a matrix."""
    stream = _Stream(file, size, compressed=compressed)
    if compressed:
        kind, _ = struct.unpack(order + "II", stream.read(8))
        if kind != _MATRIX:
            raise DataError(f"{path}: expected a compressed matrix, found an element of type {kind}")
    flags = _small(stream, order, 8)
    if len(flags) != 8 or not 6 <= flags[0 if order == "<" else 3] <= 15:
        raise DataError(f"{path}: expected matrices of numbers, found another kind of variable")
    sides = _small(stream, order, 64)
    shape = tuple(int(side) for side in np.frombuffer(sides, order + "i4"))
    name = _small(stream, order, 64).decode("ascii", "replace")
    kind, _, inline = _tag(stream, order)
    if kind not in _TYPES:
        raise DataError(f"{path}: expected numbers in {name}, found type {kind}")
    if inline is not None:  # at most four bytes of values stand in the tag itself
        raise DataError(f"{path}: expected many images, found {name} of shape {list(shape)}")
    return _Matrix(name, shape, np.dtype(order + _TYPES[kind]), stream)


def _images(matrix: _Matrix, path: Path) -> UInt8Array:
    shape = matrix.shape
    fits = len(shape) == 4 and shape[:3] == (SIDE, SIDE, 3) and 0 < shape[3] <= MOST_IMAGES
    if not fits or matrix.kind != np.uint8:
        raise DataError(
            f"{path}: expected X of shape [{SIDE}, {SIDE}, 3, N], N <= {MOST_IMAGES}, uint8, found {list(shape)}, "
            f"{matrix.kind}"
        )
    size, free = shape[3] * PIXELS, free_memory()
    if size > free // 2:
        raise DataError(
            f"{path}: X takes {size / 2**30:.1f} GiB of memory, of which {free / 2**30:.1f} GiB are free; save it as a "
            ".npy file [N, 32, 32, 3], which is memory-mapped"
        )
    images = np.empty((shape[3], SIDE, SIDE, 3), np.uint8)  # touched as far as the file has values
    for start in range(0, shape[3], CHUNK_IMAGES):
        count = min(CHUNK_IMAGES, shape[3] - start)
        planes = np.frombuffer(matrix.stream.read(count * PIXELS), np.uint8).reshape(count, 3, SIDE, SIDE)
        images[start : start + count] = planes.transpose(0, 3, 2, 1)
    return images


def _labels(matrix: _Matrix, path: Path) -> Int64Array:
    count = int(np.prod(matrix.shape, dtype=np.float64))
    if len(matrix.shape) != 2 or 1 not in matrix.shape or not 0 < count <= MOST_IMAGES:
        raise DataError(f"{path}: expected y of shape [N, 1], found {list(matrix.shape)}")
    values = np.frombuffer(matrix.stream.read(count * matrix.kind.itemsize), matrix.kind)
    padding = -(count * matrix.kind.itemsize) % 8
    if padding:
        matrix.stream.read(padding)
    labels: Int64Array = values.astype(np.int64)
    if (labels != values).any() or labels.min() < 0 or labels.max() > CLASSES:
        raise DataError(f"{path}: expected labels in 1..{CLASSES} in y, found {values.min()}..{values.max()}")
    return labels % CLASSES


def _small(stream: _Stream, order: str, most: int) -> bytes:
    """The bytes of a short element."""
    _, size, inline = _tag(stream, order)
    if inline is not None:
        return inline
    if size > most:
        raise EOFError(f"{size} bytes where at most {most} are expected")
    data = stream.read(size)
    stream.read(-size % 8)
    return data


def _tag(stream: _Stream, order: str) -> tuple[int, int, bytes | None]:
    """Type, number of bytes, and the bytes themselves where they stand in the tag."""
    raw = stream.read(8)
    first, size = struct.unpack(order + "II", raw)
    if first >> 16:
        return first & 0xFFFF, first >> 16, raw[4 : 4 + min(first >> 16, 4)]
    return first, size, None
