"""The folder that a pack is made in: who may write there, and what of an earlier packing can stay."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sela_ext.data.manifest import BAD_IMAGES, MANIFEST, MANIFEST_LIMIT, UNFINISHED, VERSION
from sela_ext.data.safe_files import PARTIAL, full_disk, sync_folder
from sela_ext.data.shard_format import shard_pack_id
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
    path = folder / UNFINISHED
    handle, created = _hold(folder, path)
    try:
        try:
            finished = False
            existing = [file for file in pack_files(folder) if not (created and file == path)]
            if existing and overwrite:
                _remove(folder)
            elif existing:
                finished = _matches(folder, handle, identity, resume)
        except BaseException:
            if created:
                path.unlink(missing_ok=True)
            raise
        text = json.dumps(identity, indent=1).encode() + b"\n"
        # What is there already stays untouched: a kill at this moment would leave shards without their description.
        if not finished and os.pread(handle, len(text) + 1, 0) != text:
            with full_disk(path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, text, 0)
                os.fsync(handle)
                sync_folder(folder)
        yield finished
        path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _hold(folder: Path, path: Path) -> tuple[int, bool]:
    """packing.json, open and locked, and whether it was made just now.

    Raises:
        OptionError: Another process holds it, or something else has its name.
        ResourceError: It cannot be made.
    """
    flags = os.O_RDWR | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))
    while True:
        with full_disk(path):
            try:
                handle, created = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
            except FileExistsError:
                try:
                    if not stat.S_ISREG(os.lstat(path).st_mode):
                        raise OptionError(f"out: expected a file, found something else: {path}; remove it") from None
                    handle, created = os.open(path, flags), False
                except FileNotFoundError:  # its owner has just finished
                    continue
        try:
            _lock(handle, folder)
            if _is_at(handle, path):
                return handle, created
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner finished and removed it before the lock was there: this is no longer the folder's


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


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
        shards = [path for path in pack_files(folder) if path.name.startswith("shard-") and path.suffix != PARTIAL]
        old = _read_identity(handle)
        # Nothing is packed yet, or the file was lost: a shard knows by itself which pack it is of.
        if not shards or (old is None and shard_pack_id(shards[0]) == pack_id_of(identity)):
            old = identity
    if not resume:
        raise OptionError(f"out: expected an empty or absent folder, found a pack in {folder}; use resume or overwrite")
    different = _differences(old, identity)
    if different:
        raise OptionError(
            f"out: {folder} holds a pack of other images or with other options: {'; '.join(different[:4])}; choose "
            "another folder, or use overwrite"
        )
    return (folder / MANIFEST).exists()


def _read_identity(handle: int) -> Any:
    """What packing.json says; None if it says nothing."""
    try:
        return json.loads(os.pread(handle, MANIFEST_LIMIT, 0))
    except (ValueError, RecursionError):
        return None


def _differences(old: Any, new: dict[str, Any]) -> list[str]:
    if not isinstance(old, dict):
        return [f"{UNFINISHED} is missing or damaged, and the shards are not those of these images and options"]
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


def pack_id_of(identity: dict[str, Any]) -> bytes:
    """The number of a pack, 16 bytes, which all its shards carry: a digest of everything that its bytes depend on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()[:16]


def _is_pack_file(name: str) -> bool:
    name = name.removesuffix(PARTIAL)
    return name in (MANIFEST, UNFINISHED, BAD_IMAGES) or (
        name.startswith("shard-") and name.endswith(".sela") and name[6:-5].isdigit()
    )


def pack_files(folder: Path) -> list[Path]:
    """Everything in a folder that has the name of a pack's file, and is no folder itself; sorted."""
    return sorted(
        path for path in folder.iterdir() if _is_pack_file(path.name) and (path.is_symlink() or not path.is_dir())
    )


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
