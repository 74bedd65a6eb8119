"""CIFAR-10 and CIFAR-100: the python version (pickles), the binary version, or the archives as they are downloaded.

Layout of the binary version, per image: one label byte (CIFAR-100: two, coarse and fine), then 32 x 32 red, green and
blue values, row by row. The python version holds dicts with the same values, uint8 [n, 3072], and lists of labels.
CIFAR-100's labels are the 100 fine ones.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from sela_ext.data.arrays import ArraySource
from sela_ext.data.pickled import read_pickle
from sela_ext.data.safe_files import read_bounded
from sela_ext.data.source import Int64Array, UInt8Array
from sela_ext.data.tar import walk_tar
from sela_ext.errors import DataError

SIDE = 32
PIXELS = 3 * SIDE * SIDE
# The largest file of either, CIFAR-100's train, has 155 MB: more is not read.
MOST_BYTES = 1 << 28
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class CifarKind:
    """One of the four versions.

    Attributes:
        name: "cifar-10" or "cifar-100".
        folder: Name of the folder in the archive.
        train: File names of the training images, in order.
        test: File names of the test images.
        meta: File with the names of the classes.
        classes: Number of classes.
        label_bytes: In front of an image of the binary version; the last one counts. 0 in the python version.
        labels: Key of the labels in the python version.
        names: Key of the class names in the python version.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    classes: int
    label_bytes: int = 0
    labels: bytes = b""
    names: bytes = b""

    def files(self, split: str) -> tuple[str, ...]:
        """File names of "train" or "test"."""
        return self.train if split == "train" else self.test


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
KINDS = (
    CifarKind(
        "cifar-10", "cifar-10-batches-py", _BATCHES, ("test_batch",), "batches.meta", 10, 0, b"labels", b"label_names"
    ),
    CifarKind(
        "cifar-10",
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in _BATCHES),
        ("test_batch.bin",),
        "batches.meta.txt",
        10,
        1,
    ),
    CifarKind(
        "cifar-100", "cifar-100-python", ("train",), ("test",), "meta", 100, 0, b"fine_labels", b"fine_label_names"
    ),
    CifarKind("cifar-100", "cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 100, 2),
)


def find_cifar(folder: Path) -> tuple[Path, CifarKind] | None:
    """Which version of CIFAR lies in a folder, or in the folder of the archive's name in it; None for neither.

    A file named like its training data is enough: what is missing is said when it is opened.
    """
    for kind in KINDS:
        for place in (folder, folder / kind.folder):
            # Files named train and test could be anything: the class names must be there as well.
            sure = (place / kind.meta).is_file() or len(kind.train) > 1
            if sure and any((place / name).is_file() for name in kind.train):
                return place, kind
    return None


def open_cifar(folder: Path, kind: CifarKind, split: str = "train") -> ArraySource:
    """Open the images of one split.

    Args:
        folder: With the files, as `find_cifar` returns it.
        kind: As `find_cifar` returns it.
        split: "train" or "test".

    Returns:
        RGB images in the files' order, in memory (3,072 bytes each), labelled.

    Raises:
        DataError: A file is missing, truncated or longer than its images, or a label is out of range.
    """
    missing = [name for name in kind.files(split) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: expected {', '.join(kind.files(split))}, found no {missing[0]}; download it again")
    parts = [(name, read_small(folder / name, MOST_BYTES)) for name in kind.files(split)]
    meta = folder / kind.meta
    names = read_small(meta, 1 << 20) if meta.is_file() else None
    return _source(kind, parts, names, str(folder))


def cifar_kind_of(path: Path, head: bytes) -> CifarKind | None:
    """Which version a single file belongs to, by its name and its first bytes; None for none."""
    for kind in KINDS:
        if path.name in kind.train + kind.test and (kind.label_bytes > 0 or head.startswith(b"\x80")):
            return kind
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # a pickle of another name
        return KINDS[0]
    return None


def open_cifar_file(path: Path, kind: CifarKind) -> ArraySource:
    """Open a single batch; see `open_cifar`. A pickle may be of either data set, whatever its name."""
    data = read_small(path, MOST_BYTES)
    meta = path.with_name(kind.meta)
    names = read_small(meta, 1 << 20) if meta.is_file() else None
    if kind.label_bytes:
        return _source(kind, [(path.name, data)], names, str(path.parent))
    value = read_pickle(data, str(path))
    if isinstance(value, dict) and KINDS[2].labels in _bytes_keys(value):
        kind, names = KINDS[2], names if kind is KINDS[2] else None
    return _joined(kind, [_unpickled(kind, value, str(path))], names, str(path.parent))


def open_cifar_archive(path: Path, split: str = "train") -> ArraySource | None:
    """Open the .tar.gz (or .tar) as it is downloaded; the files are read in place, nothing is unpacked.

    Returns:
        The images, or None if the archive holds no CIFAR.

    Raises:
        DataError: See `open_cifar`; or the archive is damaged.
    """
    wanted = {f"{kind.folder}/{name}": kind for kind in KINDS for name in (*kind.files(split), kind.meta)}
    found: dict[str, bytes] = {}
    kinds: list[CifarKind] = []
    try:
        with open_maybe_gzip(path) as file:
            for member in walk_tar(file, str(path), largest=MOST_BYTES, most_bytes=2 * MOST_BYTES):
                kind = next((kind for kind in KINDS if member.name.startswith(f"{kind.folder}/")), None)
                if kind is None:
                    return None
                if member.name in wanted:
                    file.seek(member.offset)
                    found[member.name] = file.read(member.size)
                    if len(found[member.name]) != member.size:
                        raise DataError(f"{path}: truncated in {member.name}; download it again")
                    kinds.append(kind)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}; download it again") from error
    if not kinds:
        return None
    kind = kinds[0]
    missing = [name for name in kind.files(split) if f"{kind.folder}/{name}" not in found]
    if missing:
        raise DataError(f"{path}: expected {', '.join(kind.files(split))}, found no {missing[0]}; download it again")
    parts = [(name, found[f"{kind.folder}/{name}"]) for name in kind.files(split)]
    return _source(kind, parts, found.get(f"{kind.folder}/{kind.meta}"), str(path))


def open_maybe_gzip(path: Path) -> IO[bytes]:
    """A file for reading, through gzip if it is compressed."""
    file = path.open("rb")
    head = file.read(2)
    file.seek(0)
    if head != GZIP:
        return file
    file.close()
    return cast("IO[bytes]", gzip.open(path, "rb"))


def read_small(path: Path, most: int) -> bytes:
    """All bytes of a regular file of at most `most` bytes.

    Raises:
        DataError: It is larger, or cannot be read.
    """
    try:
        return read_bounded(path, most)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _source(kind: CifarKind, parts: Iterable[tuple[str, bytes]], names: bytes | None, where: str) -> ArraySource:
    pieces = []
    for name, data in parts:
        place = f"{where}/{name}"
        if kind.label_bytes:
            pieces.append(_split_binary(kind, data, place))
        else:
            pieces.append(_unpickled(kind, read_pickle(data, place), place))
    return _joined(kind, pieces, names, where)


def _joined(
    kind: CifarKind, pieces: Sequence[tuple[UInt8Array, Int64Array]], names: bytes | None, where: str
) -> ArraySource:
    images = np.empty((sum(len(labels) for _, labels in pieces), SIDE, SIDE, 3), np.uint8)
    start = 0
    for planes, labels in pieces:
        images[start : start + len(labels)] = planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        start += len(labels)
    class_names = None if names is None else _class_names(kind, names, f"{where}/{kind.meta}")
    return ArraySource(
        images, kind=kind.name, labels=np.concatenate([labels for _, labels in pieces]), class_names=class_names
    )


def _split_binary(kind: CifarKind, data: bytes, where: str) -> tuple[UInt8Array, Int64Array]:
    record = kind.label_bytes + PIXELS
    count, rest = divmod(len(data), record)
    if rest or not count:
        raise DataError(
            f"{where}: expected whole images of {record} bytes, found {len(data)} bytes ({count} images and {rest} "
            "bytes); download it again"
        )
    rows = np.frombuffer(data, np.uint8).reshape(count, record)
    labels = rows[:, kind.label_bytes - 1].astype(np.int64)
    _check_range(labels, kind.classes, where)
    return rows[:, kind.label_bytes :], labels


def _unpickled(kind: CifarKind, value: Any, where: str) -> tuple[UInt8Array, Int64Array]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a dict with data and {kind.labels.decode()}, found {type(value).__name__}")
    batch = _bytes_keys(value)
    pixels, listed = batch.get(b"data"), batch.get(kind.labels)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS or not len(pixels):
        found = list(pixels.shape) if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DataError(f"{where}: expected data of shape [n, {PIXELS}], found {found}")
    if not isinstance(listed, list) or not all(type(label) is int for label in listed):
        raise DataError(f"{where}: expected {kind.labels.decode()}, a list of integers, found {type(listed).__name__}")
    if len(listed) != len(pixels):
        raise DataError(f"{where}: expected {len(pixels)} labels, one per image, found {len(listed)}")
    if not all(0 <= label < kind.classes for label in listed):
        raise DataError(f"{where}: expected labels in 0..{kind.classes - 1}, found {min(listed)}..{max(listed)}")
    return pixels, np.array(listed, np.int64)


def _bytes_keys(value: dict[Any, Any]) -> dict[bytes, Any]:
    """The dict with bytes for keys: Python 2 wrote bytes, Python 3 text."""
    return {key.encode() if isinstance(key, str) else key: item for key, item in value.items()}


def _check_range(labels: Int64Array, classes: int, where: str) -> None:
    if labels.max() >= classes:
        at = int(np.argmax(labels >= classes))
        raise DataError(
            f"{where}: expected labels in 0..{classes - 1}, found {int(labels[at])} at image {at}; the file is of "
            "another kind or damaged"
        )


def _class_names(kind: CifarKind, data: bytes, where: str) -> list[str]:
    if kind.label_bytes:
        found: list[Any] = re.split(rb"\r?\n", data.strip())
    else:
        value = read_pickle(data, where)
        found = _bytes_keys(value).get(kind.names, []) if isinstance(value, dict) else []
    names = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in found]
    if len(names) != kind.classes:
        raise DataError(f"{where}: expected {kind.classes} names of classes, found {len(names)}")
    return names
