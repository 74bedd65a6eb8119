"""Archives of arrays (.npz) that hold images or feature vectors, and labels beside them.

Note [Arrays in an archive]
    Images are the uint8 array of three or four axes (five are refused); where there are several, as in archives that
    are divided, the one with "train" in its name, and for evaluation the one with "test", or else "val". Labels are the
    integers [N] or [N, 1] with the same of these words in their name. Where there are no images, vectors are the float
    array of two axes, found likewise, and "names" [N], if there, are theirs: so `sela embed` writes them. Other arrays
    are ignored. Arrays of objects, which are pickles, are never read.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sela_ext.data.arrays import ArraySource, open_array
from sela_ext.data.classes import number_classes
from sela_ext.data.memory import free_memory
from sela_ext.data.messages import first_line
from sela_ext.data.safe_files import open_regular
from sela_ext.data.source import Int64Array
from sela_ext.data.vectors import VectorSource
from sela_ext.errors import DataError, lacks_memory

WORDS = {"train": ("train", ""), "test": ("test", "val")}
MOST_ARRAYS = 1000


@dataclass(frozen=True)
class _Entry:
    """An array in the archive, by its header."""

    name: str
    shape: tuple[int, ...]
    kind: np.dtype[Any]

    @property
    def word(self) -> str:
        return next((word for word in ("train", "test", "val") if word in self.name.lower()), "")


def open_npz(path: Path, split: str = "train") -> ArraySource | VectorSource | None:
    """Open the images or vectors of one split: Note [Arrays in an archive].

    Args:
        path: The archive.
        split: "train" or "test".

    Returns:
        Images or vectors in memory; None if the archive has none of split "test".

    Raises:
        DataError: No such array, several, damaged or truncated, or more than this machine's memory holds.
    """
    try:
        with _archive(path) as archive:
            entries = _entries(archive, path)
            images = _choose(entries, split, path)
            if images is None:
                return None
            labels = _labels_for(images, entries, path)
            source = open_array(_load(archive, images, path), where=f"{path}: {images.name}")
            values: Int64Array | None = None
            if labels is not None:
                listed = _load(archive, labels, path).reshape(-1).tolist()
                values, _ = number_classes(listed, f"{path}: {labels.name}")
            if isinstance(source, VectorSource):
                named = next((one for one in entries if one.name == "names" and len(one.shape) == 1), None)
                if named is not None and named.shape != images.shape[:1]:
                    raise _another_length(named, images, path)
                names = None if named is None else [str(name) for name in _load(archive, named, path)]
                return VectorSource(source.stored, labels=values, names=names)
            return ArraySource(source.array, kind="npz", labels=values)
    except DataError:
        raise
    except Exception as error:  # numpy's and zipfile's readers raise many types on damaged files
        if lacks_memory(error):
            raise
        raise DataError(
            f"{path}: expected a readable .npz file of uint8 images or of vectors: {first_line(error)}"
        ) from error


def read_arrays(path: Path, names: Sequence[str], what: str, *, needed: str = "") -> dict[str, Any]:
    """Some arrays of a .npz file, as far as they are there.

    What a header claims must be what its member holds, and half of the free memory must do for each: an archive of a
    megabyte may unpack to a gigabyte.

    Args:
        path: The archive.
        names: Of the arrays.
        what: Which they are, for messages.
        needed: Name of the array that must be there.

    Raises:
        DataError: No such file, no archive, damaged, more than the memory holds, or arrays of objects.
    """
    try:
        with _archive(path) as archive:
            entries = [entry for entry in _entries(archive, path, names) if entry.name in names]
            if any(entry.kind.hasobject for entry in entries):
                raise ValueError("found arrays of objects, which are pickles, and never read")
            if needed and all(entry.name != needed for entry in entries):
                found = sorted(name.removesuffix(".npy") for name in archive.namelist())[:10]
                raise DataError(f'{path}: expected an array "{needed}", found {found}')
            return {entry.name: _load(archive, entry, path) for entry in entries}
    except DataError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DataError(f"{path}: expected {what}, cannot read them: {reason}") from error


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with os.fdopen(open_regular(path), "rb") as file, zipfile.ZipFile(file) as archive:
        yield archive


def _entries(archive: zipfile.ZipFile, path: Path, names: Sequence[str] | None = None) -> list[_Entry]:
    """The arrays by their headers; all, or those of some names."""
    infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    if names is not None:
        infos = [info for info in infos if info.filename.removesuffix(".npy") in names]
        if len(infos) > len(names):
            raise DataError(f"{path}: expected each array once, found one several times; the file is damaged")
    if len(infos) > MOST_ARRAYS:
        raise DataError(f"{path}: expected at most {MOST_ARRAYS} arrays, found {len(infos)}")
    found = []
    for info in infos:
        with archive.open(info) as file:
            shape, _, kind = _header(file)
            size = math.prod(shape) * kind.itemsize
            if not kind.hasobject and info.file_size - file.tell() != size:
                raise DataError(
                    f"{path}: {info.filename}: the header says {list(shape)} = {size} bytes, found "
                    f"{info.file_size - file.tell()}; the file is damaged"
                )
        found.append(_Entry(info.filename.removesuffix(".npy"), tuple(shape), kind))
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"expected version 1.0 or 2.0 of the array format, found {version}")


def _choose(entries: list[_Entry], split: str, path: Path) -> _Entry | None:
    images = [entry for entry in entries if entry.kind == np.uint8 and len(entry.shape) in (3, 4)]
    if not images:
        images = [entry for entry in entries if entry.kind.kind == "f" and len(entry.shape) == 2]
    divided = any(entry.word for entry in images)
    for word in WORDS[split]:
        if word == "" and divided:
            break
        found = [entry for entry in images if entry.word == word]
        if len(found) > 1:
            raise DataError(
                f"{path}: expected one array of images or vectors, found {', '.join(entry.name for entry in found)}"
            )
        if found:
            return found[0]
    if split == "test":
        return None
    listed = ", ".join(f"{entry.name} {entry.kind} {list(entry.shape)}" for entry in entries[:10]) or "nothing"
    raise DataError(
        f"{path}: expected a uint8 array of images [N, H, W] or [N, H, W, C], or floats [N, D], found {listed}"
    )


def _labels_for(images: _Entry, entries: list[_Entry], path: Path) -> _Entry | None:
    count = images.shape[0]
    whole = [entry for entry in entries if entry.kind.kind in "iu" and entry.word == images.word]
    fits = [entry for entry in whole if entry.shape in ((count,), (count, 1))]
    if not fits:
        wrong = next((entry for entry in whole if "label" in entry.name.lower() and len(entry.shape) == 1), None)
        if wrong is not None:
            raise _another_length(wrong, images, path)
    if len(fits) > 1:
        named = [entry for entry in fits if any(word in entry.name.lower() for word in ("label", "target", "y"))]
        fits = named if len(named) == 1 else []
    return fits[0] if fits else None


def _another_length(entry: _Entry, images: _Entry, path: Path) -> DataError:
    return DataError(
        f"{path}: expected {entry.name} of {images.shape[0]} entries, as many as {images.name} has rows, found "
        f"{entry.shape[0]}; save as many, or leave {entry.name} out"
    )


def _load(archive: zipfile.ZipFile, entry: _Entry, path: Path) -> Any:
    size = math.prod(entry.shape) * entry.kind.itemsize
    free = free_memory()
    if size > free // 2:
        raise DataError(
            f"{path}: {entry.name} takes {size / 2**30:.1f} GiB of memory, of which {free / 2**30:.1f} GiB are "
            "free; save it with numpy.save as a .npy file, which is memory-mapped"
        )
    with archive.open(f"{entry.name}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise DataError(f"{path}: {entry.name}: surplus bytes; the file is damaged")
        return array
