"""Members of a tar archive, found by their headers and never unpacked.

Read are ustar, GNU and pax archives, as tar, Python and WebDataset write them. Whatever could lead out of the archive
or is not simply bytes in it is refused: names that climb or are absolute, links, devices, sparse files. Python's
tarfile takes a damaged header for the end of the archive, and extended headers of any length; here both are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, NamedTuple

from sela_ext.errors import DataError

BLOCK = 512
# Extended headers hold a name and a few times; a header that claims more is not read.
MOST_HEADER_BYTES = 1 << 20
MOST_SIZE = 1 << 46
# As in Linux. Names are kept in tables whose rows are as long as the longest.
MOST_NAME_BYTES = 1 << 12
_ZEROS = bytes(BLOCK)
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"M": "a part of another archive's file",
}


class TarMember(NamedTuple):
    """A regular file in an archive.

    Attributes:
        name: Its path in the archive; bytes that are not UTF-8 as surrogate escapes.
        offset: Where its bytes begin in the archive.
        size: Number of its bytes.
    """

    name: str
    offset: int
    size: int


def walk_tar(
    file: IO[bytes],
    where: str,
    *,
    archive_bytes: int | None = None,
    largest: int = MOST_SIZE,
    most_bytes: int = MOST_SIZE,
) -> Iterator[TarMember]:
    """The regular files of an archive, in order. The file may be read and moved between two of them.

    Args:
        file: The archive, uncompressed, or decompressed on the way.
        where: What to call it in messages.
        archive_bytes: Its size, if it is known: members that reach beyond it are noticed at once.
        largest: Largest size of a member.
        most_bytes: Bytes of the archive that are read, decompressed.

    Raises:
        DataError: Not a tar archive, damaged, truncated, or a member that is refused; see above.
    """
    at = 0
    long_name: str | None = None
    extended: dict[str, str] = {}
    while True:
        if at > most_bytes:
            raise _too_long(where, most_bytes)
        file.seek(at)
        block = file.read(BLOCK)
        if block == _ZEROS:
            _check_end(file, where, most_bytes)
            return
        if len(block) < BLOCK:
            raise DataError(f"{where}: truncated: expected an end mark at byte {at}, found none; copy the file again")
        _check_sum(block, at, where)
        kind = block[156:157]
        size = _number(block[124:136], at, where)
        data = at + BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            text = _extended_header(file, size, data, where)
            if kind == b"L":
                long_name = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                extended = _records(text, at, where)
            elif kind == b"g" and not _records(text, at, where).keys().isdisjoint(("path", "size")):
                raise DataError(f"{where}: expected each member to have its own name and size, found a common one")
            at = data + _padded(size)
            continue
        name = _name(block)
        if long_name is not None:
            name, long_name = long_name, None
        if extended:
            if any(key.startswith("GNU.sparse") for key in extended):
                kind = b"S"
            name = extended.get("path", name)
            if "size" in extended:
                size = _decimal(extended["size"], at, where)
            extended = {}
        if kind in _REFUSED:
            raise DataError(
                f"{where}: expected regular files, found {_REFUSED[kind]}, {printable(name)}; write the archive "
                "without (tar --dereference --hard-dereference)"
            )
        if kind not in (b"0", b"\0", b"5", b"7"):
            raise DataError(f"{where}: expected regular files, found {printable(name)} of the unknown type {kind!r}")
        _check_name(name, where)
        if size > largest or (archive_bytes is not None and data + size > archive_bytes):
            most = largest if archive_bytes is None else min(largest, archive_bytes - data)
            raise DataError(
                f"{where}: truncated, or a lying header: {printable(name)} has {size} bytes, expected at most {most}"
            )
        at = data + _padded(size)
        if kind != b"5" and not name.endswith("/"):
            yield TarMember(name.removeprefix("./"), data, size)
        elif kind == b"5":
            at = data  # folders have no bytes, whatever their header says


def is_tar(head: bytes) -> bool:
    """Whether a file begins like a tar archive, by its first 512 bytes: their checksum fits."""
    if len(head) < BLOCK or head[:1] == b"\0":
        return False
    try:
        _check_sum(head[:BLOCK], 0, "")
    except DataError:
        return False
    return True


def printable(name: str) -> str:
    """A member's name without surrogates, for messages and tables."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _check_sum(block: bytes, at: int, where: str) -> None:
    stored = block[148:156].strip(b"\0 ")
    try:
        right = sum(block) - sum(block[148:156]) + 8 * 32 == int(stored, 8)
    except ValueError:
        right = False
    if not right:
        raise DataError(f"{where}: expected the header of a tar archive's member at byte {at}, found other bytes")


def _too_long(where: str, most: int) -> DataError:
    return DataError(f"{where}: expected an archive of at most {most:,} bytes once it is decompressed, found more")


def _check_end(file: IO[bytes], where: str, most: int) -> None:
    """Behind the first zero block there is another one, and nothing but zeros."""
    count = BLOCK
    while chunk := file.read(1 << 16):
        count += len(chunk)
        if count > most:
            raise _too_long(where, most)
        if chunk.count(0) != len(chunk):
            raise DataError(
                f"{where}: expected the end of the archive, found more data; archives that were joined must be "
                "files of their own"
            )
    if count < 2 * BLOCK:
        raise DataError(f"{where}: truncated: expected an end mark of two blocks, found one; copy the file again")


def _check_name(name: str, where: str) -> None:
    if not name or "\0" in name:
        raise DataError(f"{where}: expected members with names, found {printable(name)!r}")
    if len(name) > MOST_NAME_BYTES:
        raise DataError(f"{where}: expected names of at most {MOST_NAME_BYTES} bytes, found one of {len(name)}")
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{where}: expected names within the archive, found {printable(name)!r}; nothing was unpacked")


def _extended_header(file: IO[bytes], size: int, at: int, where: str) -> bytes:
    if size > MOST_HEADER_BYTES:
        raise DataError(f"{where}: expected an extended header of at most {MOST_HEADER_BYTES} bytes, found {size}")
    file.seek(at)
    text = file.read(size)
    if len(text) != size:
        raise DataError(f"{where}: truncated in an extended header at byte {at}; copy the file again")
    return text


def _records(text: bytes, at: int, where: str) -> dict[str, str]:
    """Records of a pax header: length, blank, key, =, value, line feed."""
    found: dict[str, str] = {}
    while text:
        digits, _, _ = text[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = text[len(digits) + 1 : length - 1].partition(b"=")
        if length > len(text) or text[length - 1 : length] != b"\n" or not equals:
            raise DataError(f"{where}: expected records in the extended header at byte {at}, found {text[:20]!r}")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        text = text[length:]
    return found


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345] != 0:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _number(field: bytes, at: int, where: str) -> int:
    """A size: octal digits, or GNU's base 256."""
    if field[0] == 0x80:
        number = int.from_bytes(field[1:], "big")
    else:
        try:
            number = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
        except ValueError:
            number = -1
    if not 0 <= number <= MOST_SIZE:
        raise DataError(f"{where}: expected the size of a member in the header at byte {at}, found {field!r}")
    return number


def _decimal(text: str, at: int, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) > MOST_SIZE:
        raise DataError(f"{where}: expected the size of a member in the header at byte {at}, found {text!r:.40}")
    return int(text)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
