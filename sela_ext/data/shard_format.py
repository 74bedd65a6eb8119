"""One shard of a pack, written and checked. docs/formats.md describes every byte of it.

Note [Packs and crashes]
    A shard is written under a temporary name, flushed to the disk and then renamed; the manifest comes last, in the
    same way. So a folder with a manifest holds a whole pack, and one without holds the first shards of one. A shard
    ends with the checksum of all that comes before and carries the number of its pack, which follows from the images
    and the options: it takes no more than the file itself to know whether it can stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sela_ext.data.manifest import VERSION, ShardSummary, shard_name
from sela_ext.data.safe_files import PARTIAL, damaged, full_disk, open_regular, sync_folder, unreadable
from sela_ext.errors import DataError

# As in PNG: a byte that is no ASCII, the name, and line ends that a transfer as text would change.
MAGIC = b"\x89SELA\r\n\x1a"
END_MAGIC = MAGIC[::-1]
# magic, version, number of the shard, number of its first image, bytes per record, pack, zeros, CRC-32 of all that.
HEAD = struct.Struct("<8sIIQI16s16xI")
# images, start of the table, start of the texts, bytes of the texts, bytes of the file, CRC-32 of the table, CRC-32 of
# the texts, SHA-256 of the file up to here, zeros, CRC-32 of all that, end magic.
FOOT = struct.Struct("<QQQQQII32s36xI8s")
# One image: the table is an array of these.
RECORD = np.dtype(
    {
        "names": [
            "offset",
            "index_offset",
            "length",
            "index_length",
            "height",
            "width",
            "label",
            "text_offset",
            "name_length",
            "reason_length",
            "crc",
            "format",
        ],
        "formats": ["<u8", "<u8", "<u4", "<u4", "<u4", "<u4", "<i8", "<u8", "<u4", "<u4", "<u4", "u1"],
        "offsets": [0, 8, 16, 20, 24, 28, 32, 40, 48, 52, 56, 60],
        "itemsize": 64,
    }
)
# The same as one call of struct, and its first four fields.
RECORD_STRUCT = struct.Struct("<QQIIIIqQIIIB3x")
PLACE = struct.Struct("<QQII")
# What the bytes of an image are, by the number in its record.
FORMATS = ("none", "raw", "JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
NONE, RAW, JPEG, PNG = range(4)
# Height and width are below this, so that no product of them overflows.
MOST_SIDE = 1 << 24
DATA_ALIGN = 8
TABLE_ALIGN = 64
CHUNK = 1 << 22
# Records of a table that are looked at together.
_ROWS = 1 << 16
Table = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Entry:
    """One image, ready to be written.

    Attributes:
        format: Number in `FORMATS`; 0 for an image without bytes.
        data: Its bytes.
        index: Its JPEG checkpoint index, or nothing.
        height: Pixels.
        width: Pixels.
        name: UTF-8.
        reason: Why there are no bytes.
        label: -1 = unknown.
    """

    format: int
    data: bytes | memoryview
    index: bytes
    height: int
    width: int
    name: bytes
    reason: bytes = b""
    label: int = -1


@dataclass(frozen=True, slots=True)
class Shard:
    """What the head and the foot of a shard say, checked.

    Attributes:
        path: The file.
        number: 0, 1, ...
        first: Number of its first image in the pack.
        images: Number of its images, at least 1.
        size: Bytes of the file.
        text_offset: Where names and reasons begin.
        text_bytes: Their length.
        text_crc: Their checksum.
        table_offset: Where the table begins.
        body_sha256: Checksum of the file up to its foot.
    """

    path: str
    number: int
    first: int
    images: int
    size: int
    text_offset: int
    text_bytes: int
    text_crc: int
    table_offset: int
    body_sha256: bytes


class ShardWriter:
    """Write one shard from front to end; nothing of it is there under its own name before `close`.

    Args:
        folder: The pack.
        number: Of the shard.
        first: Number of its first image.
        pack_id: 16 bytes.

    Raises:
        ResourceError: The disk is full, or the file cannot be written for another reason.
    """

    def __init__(self, folder: Path, number: int, first: int, pack_id: bytes) -> None:
        self.path = folder / shard_name(number)
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        self.images = 0
        self.data_bytes = 0
        self._position = 0
        self._table = bytearray()
        self._texts = bytearray()
        self._digest = hashlib.sha256()
        head = HEAD.pack(MAGIC, VERSION, number, first, RECORD.itemsize, pack_id, 0)
        with full_disk(self.partial):
            self.partial.unlink(missing_ok=True)  # what a kill left; a link there is removed, not followed
            self._file = open(self.partial, "xb", buffering=1 << 20)  # noqa: SIM115 - closed by close and abandon
        self._write(head[:-4] + struct.pack("<I", zlib.crc32(head[:-4])))

    def add(self, entry: Entry) -> None:
        """Write the next image."""
        offset = index_offset = crc = 0
        if entry.data:
            if entry.format != RAW:
                self._pad(DATA_ALIGN)
            offset = self._position
            self._write(entry.data)
            crc = zlib.crc32(entry.data)
        if entry.index:
            self._pad(DATA_ALIGN)
            index_offset = self._position
            self._write(entry.index)
            crc = zlib.crc32(entry.index, crc)
        self.data_bytes = self._position - HEAD.size
        self._table += RECORD_STRUCT.pack(
            offset,
            index_offset,
            len(entry.data),
            len(entry.index),
            entry.height,
            entry.width,
            entry.label,
            len(self._texts),
            len(entry.name),
            len(entry.reason),
            crc,
            entry.format,
        )
        self._texts += entry.name + entry.reason
        self.images += 1

    def close(self) -> ShardSummary:
        """Write names, table and foot, and give the file its name."""
        self._pad(DATA_ALIGN)
        text_offset = self._position
        self._write(self._texts)
        self._pad(TABLE_ALIGN)
        table_offset = self._position
        self._write(self._table)
        size = self._position + FOOT.size
        foot = FOOT.pack(
            self.images,
            table_offset,
            text_offset,
            len(self._texts),
            size,
            zlib.crc32(self._table),
            zlib.crc32(self._texts),
            self._digest.digest(),
            0,
            END_MAGIC,
        )
        crc = struct.pack("<I", zlib.crc32(foot[:-12]))
        self._write(foot[:-12] + crc + END_MAGIC)
        with full_disk(self.partial):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        return ShardSummary(self.images, size, self._digest.hexdigest())

    def abandon(self) -> None:
        """Remove what was written; nothing if it was closed."""
        with contextlib.suppress(OSError):
            self._file.close()  # flushes, for which there may be no room
        self.partial.unlink(missing_ok=True)

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        with full_disk(self.partial):
            self._file.write(data)
        self._digest.update(data)
        self._position += len(data)

    def _pad(self, align: int) -> None:
        if self._position % align:
            self._write(bytes(-self._position % align))


def read_shard(
    path: Path, *, number: int, first: int, pack_id: bytes, channels: int, size: int | None = None
) -> tuple[Shard, Table]:
    """Check a shard's head, foot and table: afterwards nothing in the table points out of the file.

    Args:
        path: The file.
        number: Which shard it must be.
        first: Number that its first image must have.
        pack_id: Pack that it must belong to, 16 bytes.
        channels: Of raw pixels, 1 or 3.
        size: Bytes that the manifest says, or None.

    Returns:
        The shard, and its table [images].

    Raises:
        DataError: Whatever is not as it should be, with the file and the remedy.
    """
    try:
        handle = open_regular(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: the shard is missing; copy it again, or pack the data again") from error
    except OSError as error:
        raise unreadable(path, "read", error) from error
    try:
        with os.fdopen(handle, "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            head = file.read(HEAD.size)
            _check_head(path, head, number, first, pack_id)
            if size is not None and found != size:
                damaged(path, f"expected {size} bytes, found {found}")
            if found < HEAD.size + RECORD.itemsize + FOOT.size:
                damaged(path, f"truncated: {found} bytes")
            file.seek(found - FOOT.size)
            shard, table_crc = _check_foot(path, _read(file, FOOT.size), found, number, first)
            file.seek(shard.table_offset)
            data = _read(file, shard.images * RECORD.itemsize)
    except OSError as error:
        raise unreadable(path, "read", error) from error
    if zlib.crc32(data) != table_crc:
        damaged(path, "the table does not match its checksum")
    table: Table = np.frombuffer(data, dtype=RECORD)
    for begin in range(0, shard.images, _ROWS):
        _check_table(path, table[begin : begin + _ROWS], shard, shard.first + begin, channels)
    return shard, table


def shard_pack_id(path: Path) -> bytes | None:
    """The number of the pack that a shard says to be of, 16 bytes; None if it is no whole shard head."""
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            head = file.read(HEAD.size)
    except OSError:
        return None
    if len(head) < HEAD.size or not head.startswith(MAGIC) or zlib.crc32(head[:-4]) != HEAD.unpack(head)[-1]:
        return None
    found: bytes = HEAD.unpack(head)[5]
    return found


def read_texts(shard: Shard) -> bytes:
    """Names and reasons of a shard, as one string that the table points into.

    Raises:
        DataError: They do not match their checksum.
    """
    path = Path(shard.path)
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            file.seek(shard.text_offset)
            data = _read(file, shard.text_bytes)
    except OSError as error:
        raise unreadable(path, "read", error) from error
    if zlib.crc32(data) != shard.text_crc:
        damaged(path, "the names do not match their checksum")
    return data


def verify_shard(shard: Shard, table: Table) -> tuple[str, list[str]]:
    """Read a whole shard and compare it with its checksums.

    Args:
        shard: From `read_shard`.
        table: From `read_shard`.

    Returns:
        SHA-256 (hex) of the file, and what is wrong with it, in words.
    """
    faults: list[str] = []
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_regular(shard.path), "rb", buffering=0) as file:
            left = shard.size - FOOT.size
            while left and (chunk := file.read(min(CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
            if digest.digest() != shard.body_sha256:
                faults.append("the contents do not match their SHA-256")
            digest.update(file.read(FOOT.size))
            file.seek(shard.text_offset)
            if zlib.crc32(file.read(shard.text_bytes)) != shard.text_crc:
                faults.append("the names do not match their checksum")
    except OSError as error:
        return "", [f"cannot be read: {error.strerror or error}"]
    # All of the file could be read just now, so that it can be mapped.
    view = map_shard(shard)
    for begin in range(0, shard.images, _ROWS):
        part = table[begin : begin + _ROWS]
        fields = ("offset", "length", "index_offset", "index_length", "crc")
        columns = (part[name].tolist() for name in fields)
        for row, (start, length, index_start, index_length, crc) in enumerate(zip(*columns, strict=True), begin):
            found = zlib.crc32(view[start : start + length])
            if index_length:
                found = zlib.crc32(view[index_start : index_start + index_length], found)
            if found != crc:
                faults.append(f"image {shard.first + row} does not match its checksum")
    return digest.hexdigest(), faults


def map_shard(shard: Shard) -> memoryview:
    """A shard in memory; the view stays good for as long as somebody has it.

    Raises:
        DataError: The file is not what it was when it was checked, or cannot be mapped.
    """
    options: dict[str, Any] = {"access": mmap.ACCESS_READ}
    if sys.version_info >= (3, 13):
        options["trackfd"] = False  # keeps no file handle
    try:
        handle = open_regular(shard.path)
        try:
            size = os.fstat(handle).st_size
            if size != shard.size:
                raise DataError(
                    f"{shard.path}: expected {shard.size} bytes as when it was opened, found {size}; copy it again"
                )
            return memoryview(mmap.mmap(handle, size, **options))
        finally:
            os.close(handle)
    except OSError as error:
        raise unreadable(shard.path, "mapped into memory", error) from error


def text_bytes(text: str) -> bytes:
    """UTF-8 of a name or a message; what Unicode does not have is spelled out."""
    return text.encode("utf-8", "backslashreplace")


def _read(file: Any, size: int) -> bytes:
    """All of `size` bytes, or as many as there are."""
    parts = []
    while size > 0 and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _check_head(path: Path, head: bytes, number: int, first: int, pack_id: bytes) -> None:
    if len(head) < HEAD.size:
        damaged(path, f"truncated: {len(head)} bytes")
    magic, version, found_number, found_first, record_bytes, found_id, crc = HEAD.unpack(head)
    if magic != MAGIC:
        raise DataError(f"{path}: expected a shard of a pack, found a file that starts with {head[:8]!r}")
    if version > VERSION:
        raise DataError(
            f"{path}: written by a newer version of this package (format {version}, this one reads {VERSION}), or "
            "damaged; upgrade the package"
        )
    if crc != zlib.crc32(head[:-4]):
        damaged(path, "the head does not match its checksum")
    if version < 1 or record_bytes != RECORD.itemsize:
        damaged(path, f"format {version} with records of {record_bytes} bytes")
    if found_id != pack_id:
        raise DataError(
            f"{path}: a shard of another pack: expected pack {pack_id.hex()}, found {found_id.hex()}; put the right "
            "file there, or pack the data again with overwrite"
        )
    if (found_number, found_first) != (number, first):
        raise DataError(
            f"{path}: expected shard {number} with images from {first}, found shard {found_number} with images from "
            f"{found_first}; the file has another one's name: put the right file there"
        )


def _check_foot(path: Path, foot: bytes, size: int, number: int, first: int) -> tuple[Shard, int]:
    fields = FOOT.unpack(foot)
    images, table_offset, text_offset, text_size, file_size, table_crc, text_crc, digest, crc, magic = fields
    if magic != END_MAGIC:
        damaged(path, "truncated: the end is missing")
    if crc != zlib.crc32(foot[:-12]):
        damaged(path, "the end does not match its checksum")
    if file_size != size:
        damaged(path, f"expected {file_size} bytes, found {size}")
    if not (
        images >= 1
        and HEAD.size <= text_offset
        and text_offset + text_size <= table_offset
        and table_offset % TABLE_ALIGN == 0
        and table_offset + images * RECORD.itemsize + FOOT.size == size
    ):
        damaged(path, "the places of names and table are not possible")
    return Shard(str(path), number, first, images, size, text_offset, text_size, text_crc, table_offset, digest), (
        table_crc
    )


def _check_table(path: Path, table: Table, shard: Shard, first: int, channels: int) -> None:
    """Every rule of docs/formats.md, so that later nobody needs to look again."""
    kind = table["format"]
    length, index_length = table["length"].astype(np.uint64), table["index_length"].astype(np.uint64)
    height, width = table["height"].astype(np.uint64), table["width"].astype(np.uint64)
    end = np.uint64(shard.text_offset)
    side = np.uint64(MOST_SIDE)
    none = kind == NONE

    def outside(offset: Any, size: Any, low: int, high: Any) -> Any:
        limit = np.uint64(high)
        return (offset < np.uint64(low)) | (offset > limit) | (size > limit - np.minimum(offset, limit))

    text = table["name_length"].astype(np.uint64) + table["reason_length"].astype(np.uint64)
    rules = (
        (kind >= len(FORMATS), "has an unknown format"),
        (
            none
            & (
                (length > 0)
                | (table["offset"] > 0)
                | (index_length > 0)
                | (height > 0)
                | (width > 0)
                | (table["crc"] > 0)
            ),
            "has bytes, though its format says that it has none",
        ),
        (~none & (length == 0), "has no bytes, though its format says that it has some"),
        (~none & outside(table["offset"], length, HEAD.size, end), "lies outside the file"),
        (
            (index_length > 0) & outside(table["index_offset"], index_length, HEAD.size, end),
            "has an index that lies outside the file",
        ),
        ((index_length > 0) & (kind != JPEG), "has a JPEG index, though it is no JPEG"),
        (~none & ((height == 0) | (width == 0) | (height >= side) | (width >= side)), "has an impossible size"),
        ((kind == RAW) & (length != height * width * np.uint64(channels)), "has more or fewer bytes than pixels"),
        (table["label"] < -1, "has an impossible label"),
        (outside(table["text_offset"], text, 0, shard.text_bytes), "has a name that lies outside the file"),
        (~none & (table["reason_length"] > 0), "has a reason for being left out, though it was not"),
    )
    for wrong, what in rules:
        if wrong.any():
            damaged(path, f"image {first + int(np.argmax(wrong))} {what}")
