"""How ranks notice that one of them died, hangs or failed, and end together.

Note [Who is gone]
Every rank writes a counter into the store that the ranks met at, twice a second, from a thread of its own, and looks at
others. One that was killed, stopped, or lost with its machine writes no more; one that fails says so, with the reason,
before it goes. Whoever notices first writes it down as the first cause (only one can); whoever reads that prints it,
and ends its process: a main thread that waits in a collective could not be asked to.
  On the machine of the dead rank it takes a second, since its processes can be looked up. Elsewhere the next rank's
counter has to stand still for `silence` seconds, which must be longer than anything holds up a healthy process. Time in
which the observer itself did not run does not count, so that all ranks may be stopped and continued together. To watch
only the next rank (of those that have not ended as they should) makes the store's work grow with the number of ranks,
not with its square.
  A rank whose counter goes on while its main thread stands still is the business of the collectives' own timeout. Each
writes down where its main thread is, so that the error can say which rank stood elsewhere than the others.
  torchrun sends SIGTERM to the other ranks a tenth of a second after one died. A rank that leaves because of it looks
at once whether a neighbour is gone, and says that instead of "stopped by SIGTERM".
  A rank that was stopped is killed by those of its machine: it would stay as it is, whoever asks it to go.
  A rank whose launcher is gone (torchrun, `devices=n`) ends as well: nobody would end it otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from sela_ext.errors import DistributedError, SelaError

_PERIOD = 0.5  # seconds between beats
# From this many ranks on they beat less often, for the sake of the store; up to so many times.
_CROWD, _SLOWEST = 256, 8.0
# Seconds for the main thread to end by itself, after a failure and after a signal (it may be saving then).
_GRACE, _SIGNAL_GRACE = 1.5, 8.0
# Seconds that the rank which keeps the store waits for the others to be done with it, at the end and after a failure.
_KEEP, _KEEP_FAILED = 60.0, 5.0
_LAUNCHER_PATIENCE = 8.0  # seconds to reach the store of a launcher
_JOIN = 20.0  # seconds for the thread to end
_DYING = 2.0  # seconds in which a process that is killed has closed its connections, and is still there
EXIT_CODE = DistributedError.exit_code
_STOPPED = "was stopped by "
_UNHEARD = "nothing has been heard of it"
_runs = 0  # that this process took part in: several may meet at one store, one after the other
_kept: list[Any] = []  # stores that others use for as long as this process lives


class Heartbeat:
    """A thread that beats for this rank and watches others, see Note [Who is gone].

    Args:
        store: of the ranks, see `connect`; a connection of its own, since one that the main thread waits on would hold
            it up.
        rank: this one.
        world_size: number of ranks.
        silence: seconds without a beat after which a rank counts as gone.
        say: takes the line that is said before the process ends; default: standard error.
        leave: ends the process with a status; default: `os._exit`.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        silence: float,
        say: Callable[[str], None] | None = None,
        leave: Callable[[int], None] | None = None,
    ) -> None:
        self._store, self._rank, self._world_size, self._silence = store, rank, world_size, silence
        self._say, self._leave = say or _to_stderr, leave or os._exit
        self._period = _PERIOD * min(max(1.0, world_size / _CROWD), _SLOWEST)
        self._quit = threading.Event()
        self._main = threading.get_ident()
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # whoever keeps the store
        self._launcher = os.getppid() if by_torchrun or has_launcher() else None
        self._count = 0
        self._awake = 0.0  # seconds that this thread ran for
        self._heard: tuple[int, bytes, float] = (-1, b"", 0.0)  # of whom, what, and since when (by _awake)
        self._ended: set[int] = set()
        self._neighbours: dict[int, tuple[int, str]] = {}  # process and its start, of ranks of this machine
        pid = os.getpid()
        store.set(f"home/{rank}", f"process {pid} on {socket.gethostname()}")
        store.append(f"neighbours/{machine()}", json.dumps([rank, pid, started(pid)]) + "\n")
        self._beat()
        self._handler = _raise_on_sigterm()
        self._quiet = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Note who else is on this machine, now that all ranks are there."""
        self._neighbours = self._read_neighbours()

    def close(self, failed: bool = False) -> None:
        """Say that this rank ends, and stop watching.

        The rank that keeps the store waits until the others have done the same.
        """
        global _runs
        with contextlib.suppress(RuntimeError):  # the store may be gone with a rank that ended earlier
            self._store.set(f"done/{self._rank}", "1")
            if self._rank == 0 and not has_launcher():
                end = time.monotonic() + (_KEEP_FAILED if failed else _KEEP)
                others = [f"done/{other}" for other in range(1, self._world_size)]
                while not self._store.check(others) and time.monotonic() < end:
                    time.sleep(_PERIOD / 10)
        self._quit.set()
        self._thread.join(_JOIN)  # one that Python's end finds inside the store's code would abort the process
        self._quiet.close()
        if self._handler is not None and signal.getsignal(signal.SIGTERM) is self._handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _runs += 1

    def verdict(self, error: BaseException) -> BaseException | None:
        """What this rank should end with instead of `error`; None where that says it itself.

        Writes down why this rank fails, unless another was first. An error of this package that is the rank's own is
        given its number.
        """
        self._quiet.enter_context(_unheard_signals())
        name = f"rank {self._rank} of {self._world_size}"
        stopped = _signal_of(error)
        try:
            if stopped is not None:
                cause = self._found_gone() or self._first(f"rank {self._rank} {_STOPPED}{stopped.name}")
            elif of_collective(error):  # a peer left us: who, and why, is known within a moment
                cause = self._cause(patience=5.0 + 2 * self._period) or self._first(
                    f"rank {self._rank} failed: {describe(error)}{self._elsewhere()}"
                )
            else:
                cause = self._first(f"rank {self._rank} failed: {describe(error)}")
        except RuntimeError as lost:  # the store does not answer
            cause = self._lost(lost) if of_collective(error) or stopped is not None else f"rank {self._rank} failed"
        own = cause.startswith(f"rank {self._rank} ")
        if isinstance(error, SelaError) and (own or not isinstance(error, DistributedError)):
            if error.args and not str(error).startswith("rank "):
                error.args = (f"{name}: {error}",)
            return None
        if _STOPPED in cause:
            return None if stopped is not None or own else _exception_of(status_of(cause))
        if own:
            return DistributedError(f"{name} failed: {cause.partition(': ')[2]}") if of_collective(error) else None
        return DistributedError(f"{name} ends because {cause}")

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._quit.wait(self._period):
            now = time.monotonic()
            self._awake += min(now - before, 2 * self._period)
            before = now
            try:
                self._beat()
                cause = self._written() or self._orphaned() or self._dead_neighbour() or self._silent()
            except Exception as error:  # whatever it is: a watch that ends in silence is worse
                cause = self._lost(error)
            if cause is None:
                continue
            self._end_silent(cause)
            if not self._quit.wait(_SIGNAL_GRACE if _STOPPED in cause else _GRACE):
                self._say(f"sela: error: rank {self._rank} of {self._world_size}: ends because {cause}")
                self._leave(status_of(cause))
            return

    def _beat(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self._rank}", f"{self._count} {self._place()}")

    def _place(self) -> str:
        """Where the main thread is: the innermost line that is not torch's."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_torch_folder()):
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else "an unknown line"

    def _elsewhere(self) -> str:
        """The ranks that are not where this one and most others are, as words that follow the error of a collective."""
        with contextlib.suppress(RuntimeError):
            others = [other for other in range(self._world_size) if other != self._rank]
            others = [other for other in others if self._store.check([f"beat/{other}"])]
            gone = [f"rank {other} has left" for other in others if self._has_ended(other)]
            places = {other: self._store.get(f"beat/{other}").decode().partition(" ")[2] for other in others}
            usual = Counter([*places.values(), self._place()]).most_common(1)[0][0] if len(others) > 1 else None
            apart = [f"rank {other} is at {place}" for other, place in places.items() if place != usual]
            if gone or apart:
                return f"; {', '.join([*gone, *apart][:5])}"
        return ""

    def _orphaned(self) -> str | None:
        if self._launcher is None or os.getppid() == self._launcher:
            return None
        return self._first(f"rank {self._rank} failed: its launcher (process {self._launcher}) is gone")

    def _dead_neighbour(self) -> str | None:
        """The first cause, if a rank of this machine is found to be gone."""
        self._neighbours.update(self._read_neighbours())
        for other in self._missing():
            if not self._has_ended(other):
                return self._first(f"rank {other} failed: {self._killed(other)}")
        return None

    def _read_neighbours(self) -> dict[int, tuple[int, str]]:
        lines = self._store.get(f"neighbours/{machine()}").decode().splitlines()
        return {rank: (pid, start) for rank, pid, start in map(json.loads, lines) if rank != self._rank}

    def _missing(self) -> list[int]:
        return [other for other, (pid, start) in self._neighbours.items() if started(pid) != start]

    def _killed(self, other: int) -> str:
        return f"it was killed (process {self._neighbours[other][0]} on {socket.gethostname()} is gone)"

    def _silent(self) -> str | None:
        """The first cause, if the next rank has not been heard of for too long."""
        order = ((self._rank + step) % self._world_size for step in range(1, self._world_size))
        other = next((one for one in order if not self._has_ended(one)), None)
        if other is None:
            return None
        key = f"beat/{other}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        if self._heard[:2] != (other, beat):
            self._heard = other, beat, self._awake
        if self._awake - self._heard[2] <= self._silence:
            return None
        home = f" ({self._store.get(f'home/{other}').decode()})" if beat else ""
        return self._first(
            f"rank {other} failed: {_UNHEARD} for {self._silence:g} s{home}: killed, stopped, or its machine is lost"
        )

    def _end_silent(self, cause: str) -> None:
        """End the process of this machine that was not heard of: stopped, it would stay, whoever asks it to go."""
        found = re.match(rf"rank (\d+) failed: {_UNHEARD}", cause)
        pid, start = self._neighbours.get(int(found[1]), (0, "")) if found else (0, "")
        if pid and started(pid) == start:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _has_ended(self, other: int) -> bool:
        if other not in self._ended and self._store.check([f"done/{other}"]):
            self._ended.add(other)
        return other in self._ended

    def _found_gone(self) -> str | None:
        return self._written() or self._orphaned() or self._dead_neighbour()

    def _lost(self, error: Exception) -> str:
        """Why the store does not answer, as far as can be seen from here."""
        end = time.monotonic() + _DYING
        while not (missing := [one for one in self._missing() if one not in self._ended]) and time.monotonic() < end:
            time.sleep(_PERIOD / 5)
        if missing:
            return f"rank {missing[0]} failed: {self._killed(missing[0])}"
        who = "the launcher" if has_launcher() else "rank 0"
        return f"the store that {who} keeps for the ranks does not answer ({describe(error)})"

    def _cause(self, patience: float) -> str | None:
        """The first cause, waiting for one to be written down for a while."""
        end = time.monotonic() + patience
        while True:
            found = self._found_gone()
            if found is not None or time.monotonic() >= end:
                return found
            time.sleep(_PERIOD / 5)

    def _written(self) -> str | None:
        return self._store.get("first cause").decode() if self._store.check(["first cause"]) else None

    def _first(self, cause: str) -> str:
        found: bytes = self._store.compare_set("first cause", "", cause)
        return found.decode()


def connect(address: str, port: int, patience: float = 60.0) -> Any:
    """A connection of its own to the store of the ranks, for the keys of this run alone.

    Args:
        address: of the store.
        port: of the store.
        patience: seconds that it may take to answer: one that is gone is noticed at once, one that was stopped is not.
    """
    return _of_this_run(
        dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, timeout=timedelta(seconds=patience), wait_for_workers=False
        )
    )


def open_store(address: str, port: int, rank: int, world_size: int, timeout: float) -> Any:
    """The store that the ranks meet at, kept by rank 0 where no launcher does, for the keys of this run alone.

    A second run of the same processes must not find the addresses of the first.
    """
    keep = rank == 0 and not has_launcher()
    # A launcher has its store before it starts ranks: one that is not there is gone.
    patience = min(timeout, _LAUNCHER_PATIENCE) if has_launcher() else timeout
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, world_size, keep, timeout=timedelta(seconds=patience), multi_tenant=True
    )
    store.set_timeout(timedelta(seconds=timeout))
    if keep:
        _kept.append(store)
    return _of_this_run(store)


def _of_this_run(store: Any) -> Any:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"sela/{attempt}/{_runs}", store)  # type: ignore[attr-defined]


def first_cause(store: Any) -> str | None:
    """What the ranks of a launcher's first run wrote down, read by the launcher from its own store."""
    key = "sela/0/0/first cause"
    return store.get(key).decode() if store.check([key]) else None


def status_of(cause: str) -> int:
    """The exit status that a cause asks for."""
    if _STOPPED not in cause:
        return EXIT_CODE
    return 128 + (signal.SIGINT if cause.endswith("SIGINT") else signal.SIGTERM)


def has_launcher() -> bool:
    """Whether torchrun or `launch` started this rank and keeps the store, so that no rank does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def of_collective(error: BaseException) -> bool:
    """Whether an error is a collective's that a peer did not come to."""
    if isinstance(error, SelaError):  # what a solve over ranks makes of it has it as its cause
        return isinstance(error, DistributedError) and error.__cause__ is not None and of_collective(error.__cause__)
    if isinstance(error, dist.DistError):
        return True
    words = ("connection", "gloo", "nccl", "peer", "timed out", "timeout", "socket")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def describe(error: BaseException) -> str:
    """An error in one line."""
    first = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


@functools.cache
def machine() -> str:
    """Tells tables of processes apart: machine, its start, and the container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def started(pid: int) -> str:
    """When a process of this machine began, which tells it from a later one of the same number; "" for none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        if os.path.isdir("/proc/self"):
            return ""
        try:  # a system without /proc: the number alone must do
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:
            pass
        return "there"
    return "" if fields[0] in ("Z", "X") else fields[19]


def _signal_of(error: BaseException) -> signal.Signals | None:
    """The signal that an exception stands for."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    if isinstance(error, SystemExit) and error.code in (130, 143):
        return signal.SIGINT if error.code == 130 else signal.SIGTERM
    return None


def _exception_of(status: int) -> BaseException:
    return KeyboardInterrupt() if status == 130 else SystemExit(status)


def _raise_on_sigterm() -> Callable[[int, FrameType | None], None] | None:
    """Have SIGTERM end the main thread by an exception, where it would end the process unheard."""
    if threading.current_thread() is not threading.main_thread():
        return None
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return None

    def handler(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, handler)
    return handler


@contextlib.contextmanager
def _unheard_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM not disturb how a rank ends that is ending anyway."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: one that is not Python's, which cannot be put back
                signal.signal(number, handler)


@functools.cache
def _torch_folder() -> str:
    return str(Path(torch.__file__).parent)


def _to_stderr(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
