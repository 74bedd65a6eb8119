"""One run per folder: a lock that a crash does not leave behind.

The file `.lock` in the run folder is locked by the operating system for as long as its process lives, so a lock of a
process that was killed, or whose machine went down, is free by itself: nobody needs to delete anything. What stands in
the file says who holds it.
  Where files cannot be locked (some network mounts) a second file, `.lock.held`, that only one process can create says
who holds the folder. It stays behind after a crash: a holder on this machine whose process is gone is passed over, one
on another machine is believed.
  Two that find the same dead holder must not both remove its file: the second would remove what the first has made
meanwhile. So one at a time looks and removes, with a name in the hand that the system gives to one process and takes
back when it ends (an abstract socket of Linux); nobody else may remove a holder's file but itself. Where there are no
such names a dead holder is believed too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

from sela_ext.errors import OptionError, ResourceError
from sela_ext.training.heartbeat import machine, started

NAME = ".lock"
HELD = ".lock.held"
NAMES = (NAME, HELD)
# What the operating system says where files cannot be locked.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_TRIES = 200  # at a lock that vanishes with its holder, again and again
_TIME_TO_WRITE = 0.5  # seconds in which a holder has written who it is

Holder = dict[str, object]


class RunLock:
    """Holds a run folder while the `with` block lasts.

    Args:
        folder: the run folder; it is made where it is absent.

    Raises:
        OptionError: another living process holds it: names process, machine and since when.
        ResourceError: the lock cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> with RunLock(pathlib.Path(tempfile.mkdtemp())) as lock:
        ...     pass  # nobody else can
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path, self._held = folder, folder / NAME, folder / HELD
        self._handle = -1
        self._holds = False

    def __enter__(self) -> RunLock:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for _ in range(_TRIES):
                if self._take():
                    return self
                self._close()
        except OSError as error:
            self._close()
            where = error.filename or self._path
            raise ResourceError(f"out: cannot lock {where}: {error.strerror}; name another folder") from error
        except BaseException:
            self._close()
            raise
        raise self._refusal({})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # who waits for this very file finds that it is another one's by then
            self._path.unlink()
        if self._holds:
            with contextlib.suppress(OSError):
                self._held.unlink()
        self._close()

    def _take(self) -> bool:
        """Take the lock; False if it vanished meanwhile, with the process that held it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._handle = os.open(self._path, flags, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._refusal(self._who()) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return self._hold()
        try:
            if not os.path.samestat(os.stat(self._path), os.fstat(self._handle)):
                return False
        except FileNotFoundError:
            return False
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, _own_text(), 0)
        return True

    def _hold(self) -> bool:
        """Take the folder by being the one that creates a file; False if it must be tried again."""
        try:
            handle = os.open(self._held, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return self._pass_over()
        self._holds = True
        with open(handle, "wb") as file:
            file.write(_own_text())
        return True

    def _pass_over(self) -> bool:
        """Remove what a process left that is gone; False, since the file must then be created again.

        Raises:
            OptionError: the process is there, or may be.
        """
        text = self._read_held()
        holder = _parse(text)
        if not holder or holder.get("machine") != machine() or started(_pid(holder)) == holder.get("started"):
            raise self._refusal(holder, f", or delete {self._held} if that process is gone")
        try:
            taken = self._alone()
        except OSError:
            raise self._refusal(holder, f", or delete {self._held} if that process is gone") from None
        if taken is None:
            time.sleep(_TIME_TO_WRITE / 100)
            return False
        # Nobody else removes it now, and a dead holder does not: it is still what was read, or a living one's.
        with taken, contextlib.suppress(FileNotFoundError):
            if self._held.read_bytes() == text:
                self._held.unlink()
        return False

    def _alone(self) -> socket.socket | None:
        """What only one process of this machine can have for this folder at a time; None while another has it.

        Raises:
            OSError: there is nothing of the kind here.
        """
        if sys.platform != "linux":
            raise OSError(errno.ENOTSUP, "no abstract sockets")
        status = self._folder.stat()
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            one.bind(f"\0sela-run-{status.st_dev}-{status.st_ino}")
        except OSError as error:
            one.close()
            if error.errno == errno.EADDRINUSE:
                return None
            raise
        return one

    def _who(self) -> Holder:
        """Who holds the lock; it may be about to write that."""
        end = time.monotonic() + _TIME_TO_WRITE
        while True:
            found = _parse(os.pread(self._handle, 4096, 0))
            if found or time.monotonic() > end:
                return found
            time.sleep(_TIME_TO_WRITE / 20)

    def _read_held(self) -> bytes:
        end = time.monotonic() + _TIME_TO_WRITE
        while True:
            text = b""
            with contextlib.suppress(FileNotFoundError):
                text = self._held.read_bytes()
            if _parse(text) or time.monotonic() > end:
                return text
            time.sleep(_TIME_TO_WRITE / 20)

    def _refusal(self, holder: Holder, advice: str = "") -> OptionError:
        who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown machine')}"
        return OptionError(
            f"out: expected a folder that no run is using, found {self._folder} in use by {who} since "
            f"{holder.get('since', 'an unknown time')}; wait for it, stop it, or name another folder{advice}"
        )

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _own_text() -> bytes:
    return json.dumps(
        {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": machine(),
            "started": started(os.getpid()),
        }
    ).encode()


def _parse(text: bytes) -> Holder:
    try:
        found = json.loads(text or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _pid(holder: Holder) -> int:
    found = holder.get("pid")
    return found if isinstance(found, int) else 0
