"""Packs as a source of images: opened, checked, and read out of memory maps."""

from __future__ import annotations

import os
import sys
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sela_ext.data.decode import decode_image
from sela_ext.data.folder import EVAL_FOLDERS, TRAIN_FOLDER
from sela_ext.data.labels import read_labels
from sela_ext.data.manifest import MANIFEST, UNFINISHED, contents_of, is_manifest, read_manifest, shard_name
from sela_ext.data.safe_files import open_regular
from sela_ext.data.shard_format import (
    FORMATS,
    NONE,
    PLACE,
    RAW,
    RECORD,
    Shard,
    Table,
    map_shard,
    read_shard,
    read_texts,
    verify_shard,
)
from sela_ext.data.source import Int64Array, LabelledSource, Located, Source, UInt8Array, hash_names
from sela_ext.errors import DataError, OptionError
from sela_ext.processors import available_processors

RECORD_BYTES = RECORD.itemsize
_unpack_place = PLACE.unpack_from
# Before Python 3.13 every memory map keeps a file handle. Of those that this process may have, a quarter is taken at
# most; maps beyond are opened again when they are needed.
_HANDLES_SHARE = 4
_LEAST_MAPS = 4


@dataclass(frozen=True)
class PackReport:
    """What a pack holds.

    Attributes:
        path: The folder.
        images: N, with those that were skipped.
        skipped: Images without bytes.
        formats: How many images there are of each format: "JPEG", "PNG", ..., "raw".
        shards: Number of files.
        bytes: Their sizes together.
    """

    path: Path
    images: int
    skipped: int
    formats: dict[str, int]
    shards: int
    bytes: int

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {name}" for name, count in self.formats.items()) or "none with bytes"
        skipped = f", {self.skipped:,} skipped" if self.skipped else ""
        shards = "1 shard" if self.shards == 1 else f"{self.shards:,} shards"
        return f"{self.path}: {self.images:,} images ({kinds}{skipped}) in {shards}, {self.bytes:,} bytes"


class PackSource(Source):
    """The images of a pack.

    Opening reads the manifest and the table of each shard and checks both; the images themselves are mapped into memory
    shard by shard when they are first asked for. `sela pack --verify` reads them all.

    Args:
        folder: What `find_pack` found.
        labels: True labels instead of those in the pack; see `read_labels`.

    Attributes:
        manifest: What pack.json says.
        formats: How many images there are of each format.

    Raises:
        DataError: Something is missing, damaged, of another pack or of a newer version.
    """

    kind = "pack"

    def __init__(self, folder: Path, *, labels: Any = None) -> None:
        self.path = folder
        self.manifest = read_manifest(folder)
        self.channels = self.manifest.channels
        self.formats: dict[str, int] = {}
        self._shards: list[Shard] = []
        self._labels: Int64Array | None = None
        self._names: list[str] | None = None
        self._array: UInt8Array | None = None
        self._maps: dict[int, memoryview] = {}
        self._lock = threading.Lock()
        self._open_shards()
        self._encoded = self.channels == 3 and "raw" not in self.formats
        # For `locate`, which is asked for every image of every epoch: where the record of image 0 of the pack would be
        # in each shard, if the shard had it.
        self._count = len(self)
        self._firsts = [shard.first for shard in self._shards]
        self._records = [shard.table_offset - shard.first * RECORD_BYTES for shard in self._shards]
        if labels is not None:
            self._labels = read_labels(labels, len(self))
        else:
            self.class_names = self.manifest.class_names
            self._check_labels()

    def __len__(self) -> int:
        return self.manifest.images

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        if self._names is None:
            names: list[str] = []
            for shard in self._shards:
                names += self._names_of(shard)
            if hash_names(names) != self.manifest.names_sha256:
                raise DataError(f"{self.path}: the names are not those of the manifest; pack the data again")
            self._names = names
        return self._names

    def name(self, index: int) -> str:
        """See `Source.name`."""
        if self._names is not None:
            return self._names[index]
        shard, record = self._record(index)
        start = shard.text_offset + int(record["text_offset"])
        return bytes(self._map(shard.number)[start : start + int(record["name_length"])]).decode("utf-8", "replace")

    def iter_names(self) -> Iterator[str]:
        """See `Source.iter_names`; the names of one shard at a time are in memory."""
        return iter(self._names) if self._names is not None else chain.from_iterable(map(self._names_of, self._shards))

    @property
    def labels(self) -> Int64Array | None:
        """See `Source.labels`."""
        return self._labels

    @property
    def encoded(self) -> bool:
        """See `Source.encoded`."""
        return self._encoded

    @property
    def image_size(self) -> tuple[int, int] | None:
        """See `Source.image_size`; known of raw pixels."""
        return self._size if set(self.formats) == {"raw"} else None

    @property
    def array(self) -> UInt8Array | None:
        """See `Source.array`; a memory map, of a pack in one shard of raw pixels of one size and none skipped."""
        if self._array is None and self._is_array:
            shard, height, width = self._shards[0], *self._size_or_none()
            self._array = np.memmap(
                shard.path,
                dtype=np.uint8,
                mode="r",
                offset=self._array_offset,
                shape=(len(self), height, width, self.channels),
            )
        return self._array

    def read(self, index: int) -> UInt8Array:
        """See `Source.read`. The bytes are compared with their checksum."""
        record, data = self._checked_bytes(index)
        if record["format"] == RAW:
            shape = (int(record["height"]), int(record["width"]), self.channels)
            return np.frombuffer(data, dtype=np.uint8).reshape(shape)
        pixels = decode_image(bytes(data), self.name(index))
        return pixels if self.channels == 3 else np.ascontiguousarray(pixels[..., :1])

    def locate(self, index: int) -> Located:
        """See `Source.locate`; an image that was skipped has no bytes."""
        if not self._encoded:
            return super().locate(index)
        if not 0 <= index < self._count:
            raise self._no_such(index)
        number = bisect_right(self._firsts, index) - 1
        view = self._maps.get(number)
        if view is None:
            view = self._map(number)
        offset, index_offset, length, index_length = _unpack_place(view, self._records[number] + index * RECORD_BYTES)
        index_view = view[index_offset : index_offset + index_length] if index_length else None
        return Located(None, view[offset : offset + length], index_view)

    def encoded_bytes(self, index: int) -> bytes:
        """See `Source.encoded_bytes`. They are compared with their checksum."""
        if not self._encoded:
            super().locate(index)  # raises
        return bytes(self._checked_bytes(index)[1])

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        size = self.image_size
        return {
            "kind": self.kind,
            "count": len(self),
            "channels": self.channels,
            "image_size": None if size is None else list(size),
            "names": self.manifest.names_sha256,
            "first_names": [self.name(i) for i in range(min(3, len(self)))],
            "contents": contents_of(self.manifest.shards),
        }

    def skipped(self) -> list[tuple[int, str, str]]:
        """(index, name, reason) of each image without bytes."""
        found = []
        if self.manifest.skipped:
            for shard in self._shards:
                found += skipped_images(shard, self._table(shard))
        return found

    def report(self) -> PackReport:
        """What the pack holds."""
        return PackReport(
            path=self.path,
            images=len(self),
            skipped=self.manifest.skipped,
            formats=dict(self.formats),
            shards=len(self._shards),
            bytes=sum(shard.size for shard in self._shards),
        )

    def _open_shards(self) -> None:
        manifest = self.manifest
        counts = np.zeros(len(FORMATS), dtype=np.int64)
        labels: list[Int64Array] = []
        first = 0
        self._size: tuple[int, int] | None = None
        self._is_array = len(manifest.shards) == 1
        sizes = set[tuple[int, int]]()
        for number, summary in enumerate(manifest.shards):
            shard, table = read_shard(
                self.path / shard_name(number),
                number=number,
                first=first,
                pack_id=bytes.fromhex(manifest.id),
                channels=self.channels,
                size=summary.size,
            )
            if shard.images != summary.images:
                raise DataError(
                    f"{shard.path}: expected {summary.images} images, found {shard.images}; put the right file there"
                )
            counts += np.bincount(table["format"], minlength=len(FORMATS))
            if manifest.labels:
                labels.append(table["label"].astype(np.int64))
            raw = table["format"] == RAW
            if raw.any() and len(sizes) < 2:
                row = int(np.argmax(raw))
                height, width = table["height"], table["width"]
                sizes.add((int(height[row]), int(width[row])))
                if (raw & ((height != height[row]) | (width != width[row]))).any():
                    sizes.add((0, 0))  # more than one
            if self._is_array:
                starts = table["offset"].astype(np.int64)
                self._is_array = bool(raw.all() and len(sizes) == 1 and (np.diff(starts) == table["length"][:-1]).all())
                self._array_offset = int(starts[0])
            self._shards.append(shard)
            first += shard.images
        self.formats = {FORMATS[i]: int(counts[i]) for i in range(len(FORMATS)) if i != NONE and counts[i]}
        if counts[NONE] != manifest.skipped:
            raise DataError(
                f"{self.path}: expected {manifest.skipped} skipped images, found {counts[NONE]}; pack the data again"
            )
        if len(sizes) == 1:
            self._size = sizes.pop()
        self._labels = np.concatenate(labels) if labels else None

    def _check_labels(self) -> None:
        labels, names = self._labels, self.class_names
        if labels is not None and names is not None and labels.max() >= len(names):
            raise DataError(
                f"{self.path}: expected labels below the number of classes, {len(names)}, found {labels.max()}; pack "
                "the data again"
            )

    def _size_or_none(self) -> tuple[int, int]:
        assert self._size is not None  # an array has one size
        return self._size

    def _map(self, number: int) -> memoryview:
        """A shard in memory. The view stays good for as long as somebody has it."""
        view = self._maps.get(number)
        if view is not None:
            return view
        with self._lock:
            view = self._maps.get(number)
            if view is None:
                view = map_shard(self._shards[number])
                while len(self._maps) >= _most_maps():
                    self._maps.pop(next(iter(self._maps)))
                self._maps[number] = view
        return view

    def _no_such(self, index: int) -> IndexError:
        return IndexError(f"expected an image in 0..{self._count - 1}, found {index}")

    def _record(self, index: int) -> tuple[Shard, Any]:
        if not 0 <= index < self._count:
            raise self._no_such(index)
        shard = self._shards[bisect_right(self._firsts, index) - 1]
        return shard, self._table(shard)[index - shard.first]

    def _checked_bytes(self, index: int) -> tuple[Any, memoryview]:
        """Record and bytes of an image.

        Raises:
            DataError: The image was skipped, or does not match its checksum.
        """
        shard, record = self._record(index)
        offset, index_offset, length, index_length = PLACE.unpack_from(record)
        view = self._map(shard.number)
        if not length:
            start = shard.text_offset + int(record["text_offset"]) + int(record["name_length"])
            reason = bytes(view[start : start + int(record["reason_length"])]).decode("utf-8", "replace")
            raise DataError(f"{reason} (when it was packed)")
        data = view[offset : offset + length]
        if zlib.crc32(view[index_offset : index_offset + index_length], zlib.crc32(data)) != record["crc"]:
            raise DataError(
                f"{self.name(index)}: image {index} in {shard.path} does not match its checksum; copy the shard again"
            )
        return record, data

    def _table(self, shard: Shard) -> Table:
        return np.frombuffer(self._map(shard.number), dtype=RECORD, count=shard.images, offset=shard.table_offset)

    def _names_of(self, shard: Shard) -> list[str]:
        texts = read_texts(shard)
        table = self._table(shard)
        starts = table["text_offset"].astype(np.int64)
        ends = starts + table["name_length"]
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        return [texts[start:end].decode("utf-8", "replace") for start, end in pairs]


def find_pack(path: Path) -> Path | None:
    """The folder of a pack, whole or not, where `path` is one or its pack.json; else None."""
    folder = path.parent if path.name == MANIFEST and path.is_file() else path
    if not folder.is_dir():
        return None
    if (folder / shard_name(0)).is_file() or (folder / UNFINISHED).is_file():
        return folder
    try:
        with os.fdopen(open_regular(folder / MANIFEST), "rb") as file:
            return folder if is_manifest(file.read(128)) else None
    except OSError:
        return None


def open_pack(folder: Path, *, labels: Any = None) -> PackSource:
    """Open a pack; see `PackSource`.

    Raises:
        DataError: As `PackSource`, or the pack is not finished.
    """
    if not (folder / MANIFEST).exists():
        what = "was not finished" if (folder / UNFINISHED).exists() else f"has lost its {MANIFEST}"
        raise DataError(f"{folder}: the pack {what}; run the same `sela pack` again, it goes on where it stopped")
    return PackSource(folder, labels=labels)


def open_packs(folder: Path, split: str) -> Source | None:
    """The pack `train`, or for "test" the first of `test`, `val`, ... beside it, in a folder of packs.

    The classes of images for evaluation are numbered as those of the training images, by name.
    """
    train = open_pack(folder / TRAIN_FOLDER)
    if split == "train":
        return train
    place = next((folder / name for name in EVAL_FOLDERS if find_pack(folder / name) is not None), None)
    if place is None:
        return None
    test = open_pack(place)
    names, own, labels = train.class_names, test.class_names, test.labels
    if names is None or own is None or labels is None or names == own:
        return test
    names = names + [name for name in own if name not in names]
    number = np.array([*(names.index(name) for name in own), -1], dtype=np.int64)  # the label -1 stays
    labelled = LabelledSource(test, number[labels])
    labelled.class_names = names
    return labelled


def verify_pack(path: str | os.PathLike[str], *, threads: int | Literal["auto"] = "auto") -> PackReport:
    """Read a whole pack and compare it with its checksums.

    Args:
        path: Folder of the pack.
        threads: Shards read at a time; "auto" = processors that this process may use.

    Returns:
        What the pack holds.

    Raises:
        DataError: What is missing, damaged, or of another pack: the first faults, and their number.
        OptionError: `threads` is out of range.
    """
    found = find_pack(Path(path))
    if found is None:
        raise DataError(f"{path}: expected the folder of a pack, with {MANIFEST}, found none")
    source = open_pack(found)

    def verify(shard: Shard) -> list[str]:
        digest, faults = verify_shard(shard, source._table(shard))
        if not faults and digest != source.manifest.shards[shard.number].sha256:
            faults = [f"the SHA-256 is not that of {MANIFEST}: a file of another pack or version of it"]
        return [f"{shard_name(shard.number)}: {fault}" for fault in faults]

    with ThreadPoolExecutor(thread_count(threads), thread_name_prefix="sela-verify") as pool:
        faults = [fault for part in pool.map(verify, source._shards) for fault in part]
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise DataError(f"{found}: damaged: {'; '.join(faults[:4])}{more}; copy these files again, or pack again")
    _ = source.names  # compared with the manifest
    return source.report()


def skipped_images(shard: Shard, table: Table) -> list[tuple[int, str, str]]:
    """(index, name, reason) of each image of a shard that has no bytes."""
    rows = np.flatnonzero(table["format"] == NONE)
    if not len(rows):
        return []
    texts = read_texts(shard)
    found = []
    for row in rows.tolist():
        start = int(table["text_offset"][row])
        middle = start + int(table["name_length"][row])
        end = middle + int(table["reason_length"][row])
        name, reason = (part.decode("utf-8", "replace") for part in (texts[start:middle], texts[middle:end]))
        found.append((shard.first + row, name, reason))
    return found


def thread_count(threads: Any) -> int:
    """Check an option `threads`.

    Raises:
        OptionError: Neither "auto" nor a number of at least 1.
    """
    if threads == "auto":
        return available_processors()
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or threads < 1:
        raise OptionError(f'threads: expected a whole number >= 1 or "auto", found {threads!r}')
    return int(threads)


def _most_maps() -> int:
    if sys.version_info >= (3, 13):
        return 1 << 20
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (ImportError, OSError):
        return 128
    return max(_LEAST_MAPS, soft // _HANDLES_SHARE) if soft > 0 else 1 << 20
