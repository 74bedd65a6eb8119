"""Files that are whole or not there, and reading that nothing can hold up."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from sela_ext.errors import DataError, ResourceError

PARTIAL = ".partial"
# As for the compiled reader: larger files are not read.
MOST_FILE_BYTES = 1 << 30
# As long as any options or table of contents could be.
MOST_JSON_BYTES = 1 << 24
_NOT_REGULAR = 0  # no number of the system's
# What runs out is the machine's, and no file's fault.
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn a failed write into one clear error.

    Raises:
        ResourceError: In place of any OSError.
    """
    try:
        yield
    except OSError as error:
        remedy = "check that the folder exists and can be written"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "what is complete stays: make room and run the same command again, it goes on there"
        raise ResourceError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(
    path: Path, parts: Iterable[bytes | memoryview], at: Callable[[str], None] = lambda place: None
) -> None:
    """Write a file so that after a crash there is either the old one or the whole new one.

    It is written under a temporary name beside it, brought to the disk, renamed, and its name brought to the disk. A
    kill may leave the temporary file, `path` + ".partial"; nothing else does.

    Args:
        path: The file.
        parts: What it shall hold.
        at: Told where the writing is, for tests of what a crash leaves.

    Raises:
        OSError: It cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)  # what a kill left; a link there is removed, not followed
        with open(partial, "xb") as file:
            at("before write")
            for part in parts:
                file.write(part)
            at("after write")
            file.flush()
            at("before fsync")
            os.fsync(file.fileno())
            at("after fsync")
        at("before rename")
        os.replace(partial, path)
        at("after rename")
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_whole(path: Path, data: bytes) -> None:
    """`replace_file`, with one clear error.

    Raises:
        ResourceError: It cannot be written.
    """
    with full_disk(path):
        replace_file(path, [data])


def open_regular(path: str | os.PathLike[str]) -> int:
    """A file descriptor for reading a regular file; pipes and devices are neither opened nor waited for.

    Raises:
        OSError: As `os.open`, or something that is not a regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(_NOT_REGULAR, "not a regular file")
    # It may have become a pipe since.
    handle = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)
    )
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(_NOT_REGULAR, "not a regular file")
    return handle


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """All bytes of a regular file.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It has more bytes.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"expected at most {most} bytes in a file of this kind, found {size}")
        data = file.read(size + 1)
    if len(data) > size:
        raise ValueError(f"expected {size:,} bytes, found more: it grew while it was read")
    return data


def read_json(path: str | Path) -> Any:
    """The value in a JSON file of at most `MOST_JSON_BYTES`.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It is no JSON in UTF-8, is too long, or is nested too deeply.
    """
    try:
        return json.loads(read_bounded(path, MOST_JSON_BYTES).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def out_of_resources(error: BaseException) -> bool:
    """Whether something could not be read because the process had no handle or memory left, by the error's cause."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in OUT_OF_RESOURCES


def read_image_file(path: str, name: str) -> bytes:
    """All bytes of an image file.

    Args:
        path: The file.
        name: What to call it in messages.

    Raises:
        DataError: It cannot be read, is no regular file, or has more than `MOST_FILE_BYTES`.
    """
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_FILE_BYTES:
                raise DataError(f"{name}: expected an image file of at most {MOST_FILE_BYTES:,} bytes, found {size:,}")
            return file.readall()
    except OSError as error:
        if error.errno == _NOT_REGULAR:
            raise DataError(f"{name}: expected an image file, found something that is not a regular file") from error
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def unreadable(path: str | Path, what: str, error: OSError) -> DataError | ResourceError:
    """The error for a file that cannot be opened or read; one that is not the file's fault is said to be so."""
    problem = f"{path}: cannot be {what}: {error.strerror or error}"
    if error.errno in OUT_OF_RESOURCES:
        return ResourceError(f"{problem}; raise the limit (ulimit -n, or memory), or use fewer and larger shards")
    return DataError(problem)


def damaged(path: Path, what: str) -> NoReturn:
    """Raise the error for a file of a pack that is not as it was written."""
    raise DataError(f"{path}: damaged: {what}; copy the file again, or pack the data again with overwrite")
