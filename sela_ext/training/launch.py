"""`devices=n`: a run of several processes on this machine, started from one.

Note [How children start]
A child is a fresh interpreter that is told by a file what to call; nothing of the caller's `__main__` is run again. So
a plain script needs no `if __name__ == "__main__"`, and a notebook works: what is defined there goes along by value
(cloudpickle). Arrays lie in the file as they are, and all children map it: they are there once, however many children,
until one writes to its own. The file has no name, so nobody else can put anything into it; the answer comes back in one
of the same kind, read after the child has ended, so that no end of a pipe can keep the other waiting.
  Children have a session of their own: what the terminal sends comes here, and is passed on, once.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import multiprocessing.util
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, BinaryIO

import cloudpickle
import numpy as np

from sela_ext import errors
from sela_ext.errors import DistributedError, OptionError, SelaError
from sela_ext.training.heartbeat import first_cause, status_of

# Seconds that ranks get to end by themselves once one of them failed, and after a signal asked them to.
_PATIENCE = 8.0
_SIGNAL_PATIENCE = 9.0
_LOOK = 0.05  # seconds between looks at the children
_ALIGNMENT = 64  # bytes; of arrays in the file
_LENGTHS = np.dtype("<i8")
# The path first: the folder that the interpreter starts in may hold anything. A signal meanwhile ends it in silence.
_PROGRAM = """import sys
sys.path[:] = sys.argv.pop(1).split("\\n")
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
from sela_ext.training.launch_child import main
main()"""


def launch(work: Callable[..., Any], arguments: tuple[Any, ...], ranks: int) -> Any:
    """Call `work(*arguments)` in `ranks` new processes that can meet by `Ranks.join`.

    Args:
        work: any function; what it returns on rank 0 is sent back.
        arguments: of every call; they must pickle. Rank r sees them as copies of its own.
        ranks: number of processes; rank r sees RANK = LOCAL_RANK = r.

    Returns:
        What rank 0 returned.

    Raises:
        DistributedError: a rank was killed, hangs, or failed; names the first, and why.
        SelaError: all ranks failed alike, of its own kind.
        OptionError: the arguments cannot be sent to another process.
        KeyboardInterrupt, SystemExit: a signal ended the ranks; they got it too, and `_SIGNAL_PATIENCE` to save.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = _local_store(TCPStore)
    environment = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours: rank 0 must not open another
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if any(name == "lo" for _, name in socket.if_nameindex()):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # messages stay on this machine
    children: list[_Child] = []
    with contextlib.ExitStack() as closing:
        task = closing.enter_context(_nameless_file())
        write_task(task, work, arguments)
        signals = closing.enter_context(_Signals(children))
        closing.callback(_kill, children)
        for rank in range(ranks):
            if signals.number:
                break
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(_Child(rank, task, closing.enter_context(_nameless_file()), own))
        if signals.number and children:  # the last one may not have been there yet
            children[-1].process.send_signal(signals.number)
        first = _wait(children, signals)
        if signals.number == signal.SIGTERM:
            raise SystemExit(143)
        if signals.number:
            raise KeyboardInterrupt
        if first is not None:
            raise _error(first, children, first_cause(store))
        return children[0].result()


def _local_store(make: Any) -> Any:
    """The store at which the ranks meet, on a port of its own that only this machine can reach.

    By itself it would listen on all addresses, whatever it is named by.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        patience = timedelta(seconds=60)
        handle = listener.detach()  # the store closes it
        return make("127.0.0.1", port, None, True, timeout=patience, wait_for_workers=False, master_listen_fd=handle)
    finally:
        listener.close()


class _Child:
    """One rank: its process, and the file that it leaves its answer in."""

    def __init__(self, rank: int, task: BinaryIO, answer: BinaryIO, environment: dict[str, str]) -> None:
        self.rank, self._answer = rank, answer
        flags: list[str] = multiprocessing.util._args_from_interpreter_flags()  # type: ignore[attr-defined]
        files = task.fileno(), answer.fileno()
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-c", _PROGRAM, "\n".join(sys.path), *map(str, (*files, os.getpid()))],
            stdin=subprocess.DEVNULL,
            pass_fds=files,
            env=environment,
            start_new_session=True,
        )

    @property
    def status(self) -> int | None:
        """As of subprocess: None while it runs, -n after signal n."""
        return self.process.poll()

    def told(self) -> dict[str, Any]:
        """Kind and message of the error that it ended with; empty where it had no time to tell."""
        if not self.status:
            return {}
        try:
            found = json.loads(self._read())
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def result(self) -> Any:
        """What the work returned."""
        return pickle.loads(self._read())

    def _read(self) -> bytes:
        self._answer.seek(0)
        return self._answer.read()


class _Signals:
    """Passes SIGINT and SIGTERM on to the children, and stops and continues them with this process."""

    def __init__(self, children: Sequence[_Child]) -> None:
        self._children = children
        self.number = 0
        self.since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._pass_on)
            if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
                self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: one that is not Python's, which cannot be put back
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        self._send(number)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        for child in self._children:
            child.process.send_signal(number)


def _wait(children: Sequence[_Child], signals: _Signals) -> _Child | None:
    """Wait for all ranks to end; after a failure or a signal no longer than they may take for it.

    Returns:
        The first that failed.
    """
    deadline = float("inf")
    first = None
    while True:
        running = any(child.status is None for child in children)
        if first is None:
            first = next((child for child in children if child.status), None)
            deadline = time.monotonic() + _PATIENCE if first is not None else deadline
        if not running:
            return first
        if signals.number:
            deadline = signals.since + _SIGNAL_PATIENCE
        if time.monotonic() > deadline:
            _kill(children)
        time.sleep(_LOOK)


def _kill(children: Sequence[_Child]) -> None:
    for child in children:
        if child.status is None:
            child.process.kill()
    for child in children:
        child.process.wait()


def _error(first: _Child, children: Sequence[_Child], cause: str | None) -> BaseException:
    """The error of the whole run: of all ranks if they agree, else the first cause that a rank wrote down."""
    told = {child.rank: words for child in children if (words := child.told())}
    alike = {(words["error"], _without_rank(words["message"])) for words in told.values()}
    agreed = [(words["error"], words["message"]) for words in told.values() if words["of_all_ranks"]]
    if agreed or (len(told) == len(children) and len(alike) == 1):
        name, message = agreed[0] if agreed else next(iter(alike))
        kind = getattr(errors, name, DistributedError)
        if issubclass(kind, SelaError):
            return kind(message)
    if cause is not None and status_of(cause) != DistributedError.exit_code:
        return _of_signal(status_of(cause))
    if cause is not None:
        found = re.match(r"rank (\d+) failed: (.*)", cause, re.DOTALL)
        if found is None:
            return DistributedError(cause)
        who, why = int(found[1]), found[2]
        status = children[who].status if who < len(children) else None
        return DistributedError(_with_advice(who, len(children), why, status if why.startswith("it was killed") else 0))
    for rank, words in sorted(told.items(), key=lambda item: (item[1]["error"] == "DistributedError", item[0])):
        return DistributedError(f"rank {rank} of {len(children)} failed: {_without_rank(words['message'])}")
    # Nobody said anything: the ranks were killed, or left, before they met.
    if first.status in (130, 143):
        return _of_signal(first.status)
    why = f"it ended with status {first.status}"
    return DistributedError(_with_advice(first.rank, len(children), why, first.status))


def _of_signal(status: int) -> BaseException:
    return KeyboardInterrupt() if status == 130 else SystemExit(status)


def _with_advice(rank: int, ranks: int, why: str, status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            why = f"it was killed by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            why += " (as the system does when memory runs out)"
    return f"rank {rank} of {ranks} failed: {why}; continue from the last checkpoint with resume"


def _without_rank(message: str) -> str:
    return re.sub(r"^rank \d+ of \d+(:| failed:) ", "", message)


@contextlib.contextmanager
def _nameless_file() -> Iterator[BinaryIO]:
    """A file that has no name: in memory where the system can, else on the disk."""
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("sela"), "w+b") as file:
            yield file
    else:
        with tempfile.TemporaryFile() as file:
            yield file


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Sends arrays that lie in a file as the name of the file."""

    def reducer_override(self, value: Any) -> Any:
        below: Any = value.base if type(value) is np.memmap else None
        if isinstance(below, mmap.mmap) and value.filename:
            mode = "r+" if value.mode == "w+" else value.mode
            order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
            return np.memmap, (value.filename, value.dtype, mode, value.offset, value.shape, order)
        return super().reducer_override(value)


def write_task(file: BinaryIO, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Write a call: number of parts, their lengths, and the parts, each at a multiple of 64 bytes.

    Raises:
        OptionError: it cannot be sent.
    """
    buffers: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    try:
        _Pickler(head, protocol=5, buffer_callback=buffers.append).dump((work, arguments))
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise OptionError(
            "devices: expected data and options that can be sent to other processes, found something that cannot "
            f"({type(error).__name__}: {error}); give a path, or start the ranks with torchrun"
        ) from error
    parts = [head.getbuffer(), *(buffer.raw() for buffer in buffers)]
    file.write(np.array([len(parts), *(part.nbytes for part in parts)], _LENGTHS).tobytes())
    for part in parts:
        file.write(b"\0" * (-file.tell() % _ALIGNMENT))
        file.write(part)
    file.flush()


def read_task(descriptor: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Read a call. Arrays lie in the mapped file, and may be written to: nobody else sees it."""
    whole = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    count = int(np.frombuffer(whole, _LENGTHS, 1)[0])
    place = (1 + count) * _LENGTHS.itemsize
    parts = []
    for length in np.frombuffer(whole, _LENGTHS, count, _LENGTHS.itemsize).tolist():
        place += -place % _ALIGNMENT
        parts.append(whole[place : place + length])
        place += length
    work, arguments = pickle.loads(parts[0], buffers=parts[1:])
    return work, arguments
