"""How ranks notice that one of them died, hangs or failed, and end together.

Note [Who is gone]
Every rank writes a counter into the store that the ranks met at, twice a second, from a thread of its own, and looks at
what the others write. A rank whose counter stands still was killed, stopped, or lost with its machine; one that failed
says so, with the reason, before it goes. Whoever notices first writes it down as the first cause (only one can), prints
it, and ends its process at once: a main thread that waits in a collective could not be asked to.
  On the machine of the dead rank it takes a second, since process numbers can be looked up; elsewhere the counter has
to stand still for `silence` seconds, which must be longer than anything holds up a healthy process.
  A rank whose counter goes on while its main thread stands still is the business of the collectives' own timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from sela_ext.errors import DistributedError

_PERIOD = 0.5  # seconds between beats
_STORE_PATIENCE = 10.0  # seconds that the store may take to answer
EXIT_CODE = DistributedError.exit_code


class Heartbeat:
    """A thread that beats for this rank and watches the others.

    Args:
        store: of the ranks; a connection of its own, since one that the main thread waits on would hold it up.
        rank: this one.
        world_size: number of ranks.
        silence: seconds without a beat after which a rank counts as gone.
        say: takes the line that is said before the process ends; default: standard error.
        leave: ends the process; default: `os._exit` with status 6.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        silence: float,
        say: Callable[[str], None] | None = None,
        leave: Callable[[], None] | None = None,
    ) -> None:
        self._store, self._rank, self._world_size, self._silence = store, rank, world_size, silence
        self._say = say or _to_stderr
        self._leave = leave or (lambda: os._exit(EXIT_CODE))
        self._quit = threading.Event()
        self._count = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._homes: dict[int, tuple[str, int, str]] = {}
        store.set(f"home/{rank}", json.dumps([socket.gethostname(), os.getpid(), _started(os.getpid())]))
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say that this rank ends as it should, and stop watching."""
        with contextlib.suppress(Exception):  # the store may be gone with a rank that ended earlier
            self._store.set(f"done/{self._rank}", "1")
        self._quit.set()
        self._thread.join(timeout=2 * _PERIOD)

    def fail(self, cause: str) -> str:
        """Write down why this rank fails, unless another was first.

        Returns:
            The first cause, of whichever rank.
        """
        return self._first(self._rank, cause)

    def cause(self, patience: float = 5.0) -> str | None:
        """Why a collective failed here: the first cause that was written down, waiting for one for a while."""
        end = time.monotonic() + patience
        while True:
            found = self._written()
            if found is not None or time.monotonic() >= end:
                return found
            time.sleep(_PERIOD / 2)

    def _watch(self) -> None:
        while not self._quit.wait(_PERIOD):
            try:
                self._beat()
                cause = self._written() or self._look()
            except Exception as error:  # the store does not answer: whoever keeps it is gone
                cause = f"the process that keeps the ranks together is gone ({type(error).__name__})"
            if cause is not None and not self._quit.wait(3 * _PERIOD):  # the main thread may be about to say so itself
                self._say(f"sela: error: rank {self._rank} of {self._world_size}: ends because {cause}")
                self._leave()
                return

    def _beat(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self._rank}", str(self._count))

    def _look(self) -> str | None:
        """The first cause, if one of the others is found to be gone."""
        now = time.monotonic()
        for other in range(self._world_size):
            if other == self._rank or not self._store.check([f"beat/{other}"]):
                continue
            beat = self._store.get(f"beat/{other}")
            last, since = self._seen.get(other, (b"", now))
            if beat != last:
                self._seen[other] = beat, now
                since = now
            if self._store.check([f"done/{other}"]):
                continue
            home = self._home(other)
            if home[0] == socket.gethostname() and _started(home[1]) != home[2]:
                return self._first(other, f"it was killed (process {home[1]} on {home[0]} is gone)")
            if now - since > self._silence:
                return self._first(
                    other,
                    f"nothing has been heard of it for {self._silence:g} s (process {home[1]} on {home[0]}): killed, "
                    "stopped, or its machine is lost",
                )
        return None

    def _home(self, other: int) -> tuple[str, int, str]:
        if other not in self._homes:
            host, pid, started = json.loads(self._store.get(f"home/{other}"))
            self._homes[other] = host, pid, started
        return self._homes[other]

    def _written(self) -> str | None:
        return self._store.get("first cause").decode() if self._store.check(["first cause"]) else None

    def _first(self, rank: int, cause: str) -> str:
        found: bytes = self._store.compare_set("first cause", "", f"rank {rank} failed: {cause}")
        return found.decode()


def connect(address: str, port: int) -> Any:
    """A connection of its own to the store of the ranks."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_STORE_PATIENCE), wait_for_workers=False)


def _started(pid: int) -> str:
    """When a process of this machine began, which tells it from a later one of the same number; "" for none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        if not os.path.isdir("/proc/self"):  # a system without /proc: the number alone must do
            try:
                os.kill(pid, 0)
            except OSError:
                return ""
            return "there"
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def _to_stderr(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
