"""Where an export goes: a file that is whole or not there, and that replaces nothing unasked."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sela_ext.data.safe_files import PARTIAL, sync_folder
from sela_ext.errors import OptionError, ResourceError

# Files of a run that it needs itself.
_OF_RUNS = ("options.json", "network.pt", "labels.npz", "labels.csv", "metrics.jsonl", "metrics.csv", "bad_images.csv")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file, or the folder.
        format: its format.
        lines: what to know about it, for people.
        facts: the same for programs; docs/export.md lists them.
    """

    path: Path
    format: str
    lines: list[str]
    facts: dict[str, Any] = field(default_factory=dict)


def check_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot or shall not be written, before the work; changes nothing.

    Raises:
        OptionError: a folder, a file that is there, one of a run's own, or in a folder that is not.
    """
    if path.is_dir():
        raise OptionError(f"out: expected a file, found the folder {path}; name a file in it")
    _check_parent(path)
    if not os.path.lexists(path):
        return
    if path.name in _OF_RUNS and (path.parent / "options.json").exists():
        raise OptionError(f"out: expected a file of its own, found {path}, which belongs to a run; name another")
    if not overwrite:
        raise OptionError(f"out: expected no file yet, found {path}; name another, or set overwrite to replace it")


def check_folder(path: Path) -> None:
    """Refuse a folder that holds anything: links and copies replace nothing.

    Raises:
        OptionError: it is a file or not empty, or its parent is not there.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise OptionError(f"out: expected a folder, found the file {path}; name another")
    if path.is_dir() and any(path.iterdir()):
        raise OptionError(f"out: expected an absent or empty folder, found {path} with entries; name another")
    _check_parent(path)


def _check_parent(path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise OptionError(f"out: expected a path in a folder that exists, found {path}; create {folder} first")
    if not os.access(folder, os.W_OK):
        raise OptionError(f"out: expected a folder that can be written, found {folder}; name another")


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A name to write under; when all is well it becomes `path` at once, else nothing is left of it.

    Raises:
        OptionError: `path` came to be meanwhile, and shall stay.
        ResourceError: it cannot be written.
    """
    partial = _beside(path)
    try:
        with _in_words(path):
            yield partial
            handle = os.open(partial, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            _put(partial, path, overwrite=overwrite)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write a whole file: see `new_file`."""
    with new_file(path, overwrite=overwrite) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """The same for a folder.

    Raises:
        OptionError: `path` came to hold something meanwhile.
        ResourceError: it cannot be written.
    """
    partial = _beside(path)
    try:
        with _in_words(path):
            partial.mkdir()
            yield partial
            try:
                os.rename(partial, path)  # onto an empty folder, too
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                raise OptionError(f"out: expected an absent or empty folder, found {path}; name another") from error
            sync_folder(path.parent)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path) -> Path:
    # Not the whole name: with what is added it could be too long for the file system.
    return path.parent / f".{path.name[:40]}.{secrets.token_hex(6)}{PARTIAL}"


def _put(partial: Path, path: Path, *, overwrite: bool) -> None:
    if overwrite:
        with contextlib.suppress(FileNotFoundError):
            os.chmod(partial, stat.S_IMODE(os.stat(path).st_mode))  # who may read it stays as it was
        os.replace(partial, path)
        return
    try:
        os.link(partial, path)  # fails where something is, even if it came a moment ago
    except FileExistsError as error:
        raise OptionError(
            f"out: expected no file yet, found {path}; name another, or set overwrite to replace it"
        ) from error
    except OSError:  # a file system without links
        check_file(path, overwrite=False)
        os.replace(partial, path)


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room" if full else "check that the folder can be written"
        raise ResourceError(f"cannot write {path}: {error.strerror or error}; {remedy}; nothing was changed") from error
