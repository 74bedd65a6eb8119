"""One run per folder: a lock that a crash does not leave behind.

The file `.lock` in the run folder is locked by the operating system for as long as its process lives, so a lock of a
process that was killed, or whose machine went down, is free by itself: nobody needs to delete anything. What stands in
the file says who holds it. Where files cannot be locked (some network mounts) the text decides: a holder on this
machine whose process is gone is passed over, one on another machine is believed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from sela_ext.errors import OptionError, ResourceError

NAME = ".lock"
# What the operating system says where files cannot be locked.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """Holds a run folder while the `with` block lasts.

    Args:
        folder: the run folder; it exists.

    Raises:
        OptionError: another living process holds it: names process, machine and since when.
        ResourceError: the lock cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._handle = -1

    def __enter__(self) -> RunLock:
        try:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ResourceError(f"out: cannot write {self._path}: {error.strerror}; name another folder") from error
        try:
            self._take()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # who comes next must find the file that others wait for: emptied, not gone
            os.ftruncate(self._handle, 0)
        self._close()

    def _take(self) -> None:
        holder = self._read()
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._refusal(holder) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise ResourceError(f"out: cannot lock {self._path}: {error.strerror}; name another folder") from error
            if holder and (holder.get("host") != socket.gethostname() or _alive(holder)):
                raise self._refusal(holder) from error
        text = json.dumps(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        )
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, text.encode(), 0)
        except OSError as error:
            raise ResourceError(f"out: cannot write {self._path}: {error.strerror}; free some space") from error

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(os.pread(self._handle, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _refusal(self, holder: dict[str, object]) -> OptionError:
        who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown machine')}"
        return OptionError(
            f"out: expected a folder that no run is using, found {self._path.parent} in use by {who} since "
            f"{holder.get('since', 'an unknown time')}; wait for it, stop it, or name another folder"
        )

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _alive(holder: dict[str, object]) -> bool:
    """Whether the process of this machine that the file names is there."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
