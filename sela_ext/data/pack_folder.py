"""The folder that a pack is made in: who may write there, and what of an earlier packing can stay."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sela_ext.data.manifest import BAD_IMAGES, MANIFEST, UNFINISHED, VERSION
from sela_ext.data.safe_files import PARTIAL, full_disk, sync_folder
from sela_ext.data.shards import open_pack
from sela_ext.errors import OptionError


@contextlib.contextmanager
def claim_folder(folder: Path, identity: dict[str, Any], *, overwrite: bool, resume: bool) -> Iterator[bool]:
    """Hold the folder for this process, with packing.json in it; gives whether the pack is there already.

    Raises:
        OptionError: Something else is in the folder, or another process is at work there.
    """
    foreign = _foreign(folder)
    if foreign:
        raise OptionError(
            f"out: expected an empty or absent folder, or a pack, found {len(foreign)} other files in {folder} "
            f"({foreign[0]}); nothing was changed: choose another folder"
        )
    existing = pack_files(folder)
    path = folder / UNFINISHED
    created = not path.exists()
    with full_disk(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        _lock(handle, folder)
        try:
            finished = False
            if existing and overwrite:
                _remove(folder)
            elif existing:
                finished = _matches(folder, handle, identity, resume)
        except BaseException:
            if created:
                path.unlink(missing_ok=True)
            raise
        if not finished:
            with full_disk(path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(identity, indent=1).encode() + b"\n", 0)
                os.fsync(handle)
                sync_folder(folder)
        yield finished
        path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # another operating system: two processes at once are the user's business there
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise OptionError(f"out: another process is packing into {folder}; wait for it or end it") from error


def _matches(folder: Path, handle: int, identity: dict[str, Any], resume: bool) -> bool:
    """Whether the folder holds this very pack, whole; if it is another one, or no resuming is wanted, an error."""
    if (folder / MANIFEST).exists():
        manifest = open_pack(folder).manifest
        old: Any = {"version": VERSION, "options": manifest.options, "source": manifest.source}
    else:
        try:
            old = json.loads(os.pread(handle, 1 << 26, 0))
        except ValueError:
            old = {}
        if not any(path.name.startswith("shard-") for path in pack_files(folder)):
            old = identity  # nothing is packed yet
    if not resume:
        raise OptionError(f"out: expected an empty or absent folder, found a pack in {folder}; use resume or overwrite")
    different = _differences(old, identity)
    if different:
        raise OptionError(
            f"out: {folder} holds a pack of other images or with other options: {'; '.join(different[:4])}; choose "
            "another folder, or use overwrite"
        )
    return (folder / MANIFEST).exists()


def _differences(old: Any, new: dict[str, Any]) -> list[str]:
    if not isinstance(old, dict):
        return ["unreadable"]
    found = []
    for part in ("version", "source", "options"):
        before, after = old.get(part), new[part]
        if not (isinstance(before, dict) and isinstance(after, dict)):
            found += [] if before == after else [f"{part} was {before}, is {after}"]
            continue
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                found.append(f"{key} was {before.get(key)}, is {after.get(key)}")
    return found


def _is_pack_file(name: str) -> bool:
    name = name.removesuffix(PARTIAL)
    return name in (MANIFEST, UNFINISHED, BAD_IMAGES) or (
        name.startswith("shard-") and name.endswith(".sela") and name[6:-5].isdigit()
    )


def pack_files(folder: Path) -> list[Path]:
    """Everything in a folder that has the name of a pack's file, sorted."""
    return sorted(path for path in folder.iterdir() if _is_pack_file(path.name))


def _foreign(folder: Path) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise OptionError(f"out: expected a folder, found {folder}: {error.strerror or error}") from error
    known = {path.name for path in pack_files(folder)}
    if BAD_IMAGES in known and len(known) == 1:  # of a run, for example
        known.clear()
    return [ascii(name) for name in names if name not in known]


def _remove(folder: Path) -> None:
    """Delete a pack, the manifest first, so that what is left is never taken for a whole one."""
    for path in sorted(pack_files(folder), key=lambda path: path.name != MANIFEST):
        if path.name != UNFINISHED:
            path.unlink()
            sync_folder(folder)
