"""Tar archives of images, WebDataset shards among them: indexed in place, memory-mapped, never unpacked.

Note [Samples in an archive]
    Every image file in an archive is an image, in the archives' order. Its label stands beside it, under the same name
    up to the first dot: in a file .cls (an integer, or the name of a class), or in a .json under "label", "cls" or
    "class". Without any of these, the folders in the archive are classes as in Note [Class folders] of
    `sela_ext.data.folder`. Members are known by their suffix; the pixels' format by their first bytes.

Note [Shards]
    A path is one archive; a folder of .tar files, which are taken in sorted order (`find_files` of
    `sela_ext.data.folder` says what is divided, and how); or a pattern with braces, `shard-{000..012}.tar` or
    `{a,b}.tar`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sela_ext.data.classes import ClassList, Value, number_classes, parse_value
from sela_ext.data.decode import decode_image
from sela_ext.data.folder import SUFFIXES, class_folders
from sela_ext.data.path_list import PathList
from sela_ext.data.safe_files import open_regular, unreadable
from sela_ext.data.source import Int64Array, Located, Source, UInt8Array
from sela_ext.data.tar import TarMember, printable, walk_tar
from sela_ext.errors import DataError

MOST_LABEL_BYTES = 1 << 12
MOST_JSON_BYTES = 1 << 20
JSON_KEYS = ("label", "cls", "class")
MOST_SHARDS = 100_000
# Archives mapped at a time; each takes a file handle, of which a process has often but 1,024.
MOST_MAPPED = 256
# Members whose sizes enter the fingerprint.
FINGERPRINT_MEMBERS = 10_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class TarSource(Source):
    """Images in tar archives; their bytes are slices of memory maps."""

    kind = "tar"
    channels = 3

    def __init__(
        self,
        shards: Sequence[Path],
        shard_bytes: Sequence[int],
        places: tuple[npt.NDArray[np.int32], Int64Array, Int64Array],
        names: PathList,
        *,
        labels: Int64Array | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.class_names = class_names
        self._shards = list(shards)
        self._shard_bytes = list(shard_bytes)
        # Views whose items are plain integers.
        self._shard, self._offset, self._size = (values.data for values in places)
        self._members = names
        self._labels = labels
        self._maps: OrderedDict[int, memoryview] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._members)

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        return list(self.iter_names())

    def name(self, index: int) -> str:
        """See `Source.name`: the member's, behind the archive's where there are several."""
        return self._full(index, printable(self._members[index]))

    def iter_names(self) -> Iterator[str]:
        """See `Source.iter_names`."""
        return (self._full(i, printable(name)) for i, name in enumerate(self._members))

    @property
    def labels(self) -> Int64Array | None:
        """See `Source.labels`."""
        return self._labels

    @property
    def encoded(self) -> bool:
        """See `Source.encoded`."""
        return True

    def locate(self, index: int) -> Located:
        """See `Source.locate`."""
        start = self._offset[index]
        return Located(data=self._mapped(self._shard[index])[start : start + self._size[index]])

    def read(self, index: int) -> UInt8Array:
        """See `Source.read`."""
        data = self.locate(index).data
        assert data is not None
        return decode_image(bytes(data), f"{self._shards[self._shard[index]]}: {printable(self._members[index])}")

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        rows = np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_MEMBERS).astype(np.int64))
        digest = hashlib.sha256("".join(f"{self._size[row]}," for row in rows).encode())
        return {**super().fingerprint(), "file_sizes": digest.hexdigest()}

    def _full(self, index: int, name: str) -> str:
        return name if len(self._shards) == 1 else f"{self._shards[self._shard[index]].name}/{name}"

    def _mapped(self, shard: int) -> memoryview:
        with self._lock:
            found = self._maps.get(shard)
            if found is None:
                found = _map(self._shards[shard], self._shard_bytes[shard])
                self._maps[shard] = found
                if len(self._maps) > MOST_MAPPED:
                    # Slices that are still in use keep a map alive.
                    self._maps.popitem(last=False)
            elif len(self._shards) > MOST_MAPPED:
                self._maps.move_to_end(shard)
            return found


def open_tars(shards: Sequence[Path], *, classes: ClassList | None = None) -> TarSource:
    """Open the images in tar archives: Note [Samples in an archive].

    Every header is read once, some 5 microseconds each; per image about 100 bytes are kept.

    Args:
        shards: The archives, in order.
        classes: Names of the classes, if they are known.

    Raises:
        DataError: Not a tar archive, damaged, truncated, with members that are refused (see `sela_ext.data.tar`),
            labels without an image, or no image in any of them.
    """
    shard, offset, size = array("i"), array("q"), array("q")
    names: list[PathList] = []
    sizes: list[int] = []
    values: list[Value] = []
    labelled = False
    for number, path in enumerate(shards):
        index = _Index(path)
        try:
            with path.open("rb") as file:
                index.fill(file)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        shard.extend(itertools.repeat(number, len(index.names)))
        offset.extend(index.offsets)
        size.extend(index.sizes)
        sizes.append(index.bytes)
        names.append(PathList(index.names))
        values.extend(index.values)
        labelled = labelled or index.labelled
    if not len(shard):
        raise DataError(
            f"{shards[0]}: expected images ({', '.join(sorted(SUFFIXES))}) in the archive, found none; archives "
            "within an archive must be taken out first"
        )
    members = names[0] if len(names) == 1 else PathList([name for part in names for name in part])
    labels: Int64Array | None = None
    class_names: list[str] | None = None
    if labelled:
        labels, class_names = number_classes(values, str(shards[0]), classes)
    else:
        found = class_folders(members, classes)
        if found is not None:
            labels, class_names = found
    places = (np.frombuffer(shard, np.int32), np.frombuffer(offset, np.int64), np.frombuffer(size, np.int64))
    return TarSource(shards, sizes, places, members, labels=labels, class_names=class_names)


def expand_braces(pattern: str) -> list[str]:
    """The paths that a pattern stands for.

    Raises:
        DataError: A pattern that stands for too many, or a range that runs backwards.

    Example:
        >>> expand_braces("a-{08..10}.tar")
        ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    between = _RANGE.fullmatch(found[1])
    if between is None:
        inside = found[1].split(",")
    else:
        first, last = int(between[1]), int(between[2])
        if not 0 <= last - first < MOST_SHARDS:
            raise DataError(f"{pattern}: expected a range upwards of at most {MOST_SHARDS}, found {found[0]}")
        inside = [str(number).zfill(len(between[1])) for number in range(first, last + 1)]
    rest = expand_braces(pattern[found.end() :])
    if len(inside) * len(rest) > MOST_SHARDS:
        raise DataError(f"{pattern}: expected at most {MOST_SHARDS} archives")
    return [pattern[: found.start()] + middle + end for middle in inside for end in rest]


class _Index:
    """Where the images of one archive are."""

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self.names: list[str] = []
        self.offsets = array("q")
        self.sizes = array("q")
        self.values: list[Value] = []
        self.labelled = False
        self._path = path
        self._key = ""
        self._first = 0  # the first image of the sample at hand
        self._value: Value = None
        self._sure = False  # whether the value comes from a .cls file, which goes before .json
        self._label_name = ""

    def fill(self, file: IO[bytes]) -> None:
        self.bytes = os.fstat(file.fileno()).st_size
        for member in walk_tar(file, str(self._path), archive_bytes=self.bytes):
            folder, slash, base = member.name.rpartition("/")
            if base.startswith("."):
                continue
            stem, _, suffix = base.partition(".")
            key = folder + slash + stem
            if key != self._key:
                self._finish()
                self._key, self._first = key, len(self.names)
            last = "." + suffix.rsplit(".", 1)[-1].lower()
            if last in SUFFIXES:
                self.names.append(member.name)
                self.offsets.append(member.offset)
                self.sizes.append(member.size)
            elif last == ".cls":
                self._value, self._sure = self._cls(file, member), True
                self._label_name = member.name
            elif last == ".json" and not self._sure:
                self._value = self._json(file, member)
        self._finish()

    def _finish(self) -> None:
        count = len(self.names) - self._first
        if self._sure and not count:
            raise DataError(
                f"{self._path}: expected the image of {printable(self._label_name)} beside it, found none; write the "
                "files of a sample one behind the other (tar --sort=name)"
            )
        self.values.extend(itertools.repeat(self._value, count))
        self.labelled = self.labelled or (count > 0 and self._value is not None)
        self._value, self._sure = None, False

    def _cls(self, file: IO[bytes], member: TarMember) -> Value:
        value = parse_value(self._text(file, member, MOST_LABEL_BYTES))
        if value is None or (isinstance(value, int) and value < 0) or (isinstance(value, str) and "\n" in value):
            raise DataError(
                f"{self._path}: {printable(member.name)}: expected a label, an integer >= 0 or a name, found {value!r}"
            )
        return value

    def _json(self, file: IO[bytes], member: TarMember) -> Value:
        try:
            found = json.loads(self._text(file, member, MOST_JSON_BYTES))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._path}: {printable(member.name)}: expected JSON: {error}") from error
        if not isinstance(found, dict):
            return None
        value = next((found[key] for key in JSON_KEYS if key in found), None)
        return value if isinstance(value, (str, int)) and not isinstance(value, bool) else None

    def _text(self, file: IO[bytes], member: TarMember, most: int) -> str:
        if member.size > most:
            raise DataError(
                f"{self._path}: {printable(member.name)}: expected at most {most} bytes, found {member.size}"
            )
        file.seek(member.offset)
        try:
            return file.read(member.size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: {printable(member.name)}: expected UTF-8: {error}") from error


def _map(path: Path, size: int) -> memoryview:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise unreadable(path, "read again", error) from error
    except ValueError as error:  # it is empty now
        raise DataError(f"{path}: cannot be read again: {error}") from error
    if len(data) != size:
        raise DataError(f"{path}: changed while it is in use: expected {size} bytes, found {len(data)}; start again")
    return data
