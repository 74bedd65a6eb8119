"""Checkpoints that survive a kill at any moment.

One file per checkpoint: magic, length, SHA-256, then what `torch.save` wrote. It is written under a temporary name in
the same folder, flushed to disk and renamed, so that a name that is there is whole; the checksum finds damage that
came later. The newest valid file is used, by step and not by clock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from sela_ext.compat.archive import read_saved
from sela_ext.data.memory import free_memory
from sela_ext.data.safe_files import OUT_OF_RESOURCES, PARTIAL, open_regular, replace_file, sync_folder
from sela_ext.errors import CheckpointError, ResourceError
from sela_ext.training import faults

_MAGIC = b"SELACKP1"
_HEADER = struct.Struct("<8sQ32s")
_NAME = re.compile(r"step-(\d{12})\.ckpt")
_KEEP = 2
# What the system says of a file that is damaged or gone, whose place the one before it takes. Whatever else keeps one
# from being read (no permission, a network that is down, too many open files) is no damage: it passes, or is mended.
_DAMAGED = (0, errno.EIO, errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`, and keep the last two.

    Args:
        folder: the checkpoints folder; made when absent.
        step: number of optimiser steps done.
        state: tensors, numbers, strings, lists and dicts of them.

    Returns:
        The file written.

    Raises:
        ResourceError: the disk is full or cannot be written; earlier checkpoints stay as they are.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    header = _HEADER.pack(_MAGIC, len(payload), hashlib.sha256(payload).digest())
    path, needed = folder / f"step-{step:012d}.ckpt", len(header) + len(payload)
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _cannot_write(path, needed, error, "nothing was written") from error
    if free < needed:
        raise ResourceError(
            f"checkpoint {path}: expected {needed:,} free bytes, found {free:,}; free some space, then resume"
        )
    write_atomically(path, header, payload)
    _remove_others(folder, step)
    return path


def _remove_others(folder: Path, step: int) -> None:
    """Keep the last two up to this step; later ones are damaged, and a resume passed over them.

    One too many does no harm.
    """
    with contextlib.suppress(OSError):
        found = _checkpoints(folder, os.listdir(folder))
        later = [old for number, old in found if number > step]
        for old in later + [old for number, old in found if number <= step][_KEEP:]:
            with contextlib.suppress(OSError):
                old.unlink()


def load_checkpoint(folder: Path, *, tidy: bool = True) -> dict[str, Any] | None:
    """Read the newest valid checkpoint.

    Args:
        folder: the checkpoints folder.
        tidy: remove what a kill in the middle of writing left; not while another process may be writing.

    Returns:
        What was saved, on the CPU; None where the folder holds no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none of them is whole.
        ResourceError: the folder, or the newest that may be whole, cannot be read: no permission, no memory, too many
            open files.
    """
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _cannot_read(folder, error) from error
    for name in names if tidy else ():
        if name.endswith(PARTIAL):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
    found = _checkpoints(folder, names)
    problems = []
    for _, path in found:
        try:
            state = read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; the one before it, {path.name}, is used", stacklevel=2)
        return state
    if problems:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints can be read ({'; '.join(problems)}); "
            "begin again with overwrite, or put a copy back"
        )
    return None


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """`replace_file`, with the places of `faults`, and errors that say what to do about a run.

    Raises:
        ResourceError: it cannot be written; the old file stays.
    """
    renamed = False

    def at(place: str) -> None:
        nonlocal renamed
        renamed = place == "after rename"
        faults.at(place, path.name)

    try:
        replace_file(path, parts, at)
    except OSError as error:
        outcome = "the earlier file is untouched"
        if renamed:
            outcome = "the new file is there, but may not outlast a power failure"
        raise _cannot_write(path, sum(len(part) for part in parts), error, outcome) from error


def _cannot_write(path: Path, size: int, error: OSError, outcome: str) -> ResourceError:
    remedies = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space, or have the quota raised",
        errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    }
    remedy = remedies.get(error.errno or 0, "see that the folder is there and can be written")
    told = f"{error.strerror or error}; {outcome}: {remedy}, then resume"
    return ResourceError(f"cannot write {path} ({size:,} bytes): {told}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails inside, for want of space say, is an error that names the file and the way on.

    Args:
        path: of a log that grows during a run.

    Raises:
        ResourceError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror or error}; the last checkpoint is intact: free some space, then "
            "resume"
        ) from error


def _checkpoints(folder: Path, names: Iterable[str]) -> list[tuple[int, Path]]:
    """All checkpoint files among these of the folder, newest step first."""
    matches = ((_NAME.fullmatch(name), name) for name in names)
    return sorted(((int(match[1]), folder / name) for match, name in matches if match), reverse=True)


def _cannot_read(path: Path, error: OSError) -> ResourceError:
    if error.errno in OUT_OF_RESOURCES:
        remedy = "raise the limit (ulimit -n, or memory), then resume"
    elif error.errno in (errno.EACCES, errno.EPERM):
        remedy = "have it readable for whoever starts the run (chmod, chown), then resume"
    else:
        remedy = "see to the disk or mount, then resume; to go on from the checkpoint before it, move it away"
    return ResourceError(f"checkpoint {path}: cannot be read: {error.strerror or error}; {remedy}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint.

    Raises:
        CheckpointError: it is not one, or damaged.
        ResourceError: it may be whole, but cannot be read: no permission, no memory, too many open files.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size, free = os.fstat(file.fileno()).st_size, free_memory()
            if size > free // 2:  # the tensors are made out of it, beside it
                raise ResourceError(
                    f"checkpoint {path}: expected {2 * size:,} bytes of memory to read it, found {free:,} free; free "
                    "some, then resume"
                )
            header, payload = file.read(_HEADER.size), file.read(size)
    except OSError as error:
        if error.errno not in _DAMAGED:  # no fault of the file's: it must not be passed over
            raise _cannot_read(path, error) from error
        raise CheckpointError(f"checkpoint {path.name}: cannot be read: {error.strerror or error}") from error
    if len(header) < _HEADER.size:
        raise CheckpointError(f"checkpoint {path.name}: expected a header, found {len(header)} bytes")
    magic, length, digest = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise CheckpointError(f"checkpoint {path.name}: this is not a checkpoint of sela_ext")
    if len(payload) != length:
        raise CheckpointError(f"checkpoint {path.name}: expected {length:,} bytes, found {len(payload):,}")
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"checkpoint {path.name}: its checksum does not match; the file is damaged")
    # Length and checksum say that nothing was damaged, not who wrote it.
    state = read_saved(payload, f"checkpoint {path.name}")
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path.name}: expected a mapping of names to values, found another kind")
    return state
