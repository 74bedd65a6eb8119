"""IDX files, the format of MNIST and Fashion-MNIST, gzip-compressed or not.

Layout: two zero bytes, a type byte (0x08 = uint8), the number of axes, each axis as a big-endian uint32, the values.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from sela_ext.data.arrays import ArraySource
from sela_ext.data.memory import free_memory
from sela_ext.data.source import Int64Array, UInt8Array
from sela_ext.errors import DataError

TYPE_UINT8 = 0x08
IMAGE_AXES = 3
LABEL_AXES = 1
CHUNK_BYTES = 1 << 24  # bytes read at a time, so that a header that lies about its counts cannot claim memory


def is_idx(path: Path) -> bool:
    """Whether the file starts like uint8 IDX images or labels, looking through gzip."""
    try:
        with _open(path) as file:
            head = file.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return len(head) == 4 and head[:3] == bytes((0, 0, TYPE_UINT8)) and head[3] in (LABEL_AXES, IMAGE_AXES)


def find_idx(folder: Path, split: str) -> Path | None:
    """The images file of `split` ("train" or "t10k") in a folder in MNIST's naming, or None."""
    for name in (f"{split}-images-idx3-ubyte", f"{split}-images.idx3-ubyte"):
        for suffix in ("", ".gz"):
            path = folder / (name + suffix)
            if path.is_file():
                return path
    return None


def open_idx(path: Path, *, labelled: bool = True) -> ArraySource:
    """Open IDX images, with the labels file beside them if there is one.

    Args:
        path: The images file; uncompressed files are memory-mapped.
        labelled: Whether the labels file matters.

    Raises:
        DataError: Wrong magic number, truncated values, surplus bytes, or another number of labels than of images.
    """
    images = read_idx(path, IMAGE_AXES)
    if 0 in images.shape:
        raise DataError(f"{path}: expected at least one image, found shape {list(images.shape)}")
    values: Int64Array | None = None
    beside = _labels_beside(path) if labelled else None
    if beside is not None:
        values = read_idx(beside, LABEL_AXES).astype(np.int64)
        if len(values) != len(images):
            raise DataError(
                f"{beside}: expected {len(images)} labels, one per image of {path.name}, found {len(values)}"
            )
    return ArraySource(images[..., np.newaxis], kind="idx", labels=values)


def read_idx(path: Path, axes: int) -> UInt8Array:
    """Values of an IDX file.

    Args:
        path: The file, gzip-compressed or not.
        axes: Expected number of axes: 3 for images [N, H, W], 1 for labels [N].

    Returns:
        uint8 of the shape in the header; a read-only memory map if the file is not compressed.

    Raises:
        DataError: See `open_idx`.
    """
    try:
        with _open(path) as file:
            head = file.read(4 + 4 * axes)
            expected_magic = bytes((0, 0, TYPE_UINT8, axes))
            if head[:4] != expected_magic:
                raise DataError(
                    f"{path}: expected IDX uint8 with {axes} axes (magic {expected_magic.hex()}), found "
                    f"{head[:4].hex() or 'an empty file'}"
                )
            if len(head) < 4 + 4 * axes:
                raise DataError(f"{path}: truncated in the header, {len(head)} bytes")
            shape = struct.unpack(f">{axes}I", head[4:])
            size = math.prod(shape)
            if not isinstance(file, gzip.GzipFile):
                found = path.stat().st_size - len(head)
                _check_size(path, shape, size, found)
                if size == 0:
                    return np.zeros(shape, np.uint8)
                return np.memmap(path, dtype=np.uint8, mode="r", offset=len(head), shape=shape)
            free = free_memory()
            if size > free // 2:
                raise DataError(
                    f"{path}: the header says {list(shape)} = {size} bytes, of {free} that are free in memory; gunzip "
                    "it first, so that it can be memory-mapped"
                )
            parts = bytearray()
            # One byte more than the header says, to notice surplus bytes.
            while len(parts) <= size and (chunk := file.read(min(CHUNK_BYTES, size + 1 - len(parts)))):
                parts += chunk
            _check_size(path, shape, size, len(parts))
            return np.frombuffer(parts, dtype=np.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as an IDX file: {error}") from error


def _check_size(path: Path, shape: tuple[int, ...], expected: int, found: int) -> None:
    if found < expected:
        raise DataError(
            f"{path}: truncated: the header says {list(shape)} = {expected} bytes, found {found}; copy the file again"
        )
    if found > expected:
        raise DataError(f"{path}: the header says {list(shape)} = {expected} bytes, found more; the file is damaged")


def _labels_beside(path: Path) -> Path | None:
    name = path.name.removesuffix(".gz")
    if "images" not in name:
        return None
    name = name.replace("images", "labels").replace("idx3", "idx1")
    for candidate in (path.with_name(name), path.with_name(name + ".gz")):
        if candidate.is_file() and candidate != path:
            return candidate
    return None


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile:
    file = path.open("rb")
    magic = file.read(2)
    file.seek(0)
    if magic != b"\x1f\x8b":
        return file
    file.close()
    return gzip.GzipFile(path, "rb")
