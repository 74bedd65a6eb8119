"""What a run does to its process: threads, determinism, denormals, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch

# Seconds in which a signal that comes again is the same one: a scheduler sends it to all processes of a job, and
# torchrun, which is one of them, passes it on to the ranks.
_SAME_SIGNAL = 2.0


@contextlib.contextmanager
def torch_settings(threads: int, device: torch.device | None = None) -> Iterator[None]:
    """Set torch up for a run, and back afterwards.

    Threads as asked; cuDNN by algorithms that give the same bits every time; denormals flushed, since they cost time
    and carry nothing here. A CUDA device is the current one meanwhile: what libraries take without being told where
    goes there, and no other device of the machine is touched.
    """
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.set_flush_denormal(True)
    current = device is not None and device.type == "cuda"
    try:
        with torch.cuda.device(device) if current else contextlib.nullcontext():
            yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1:]


def abandon_output() -> None:
    """Give up on a standard output that nobody reads; the interpreter would complain of it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Interrupt:
    """How SIGINT and SIGTERM end a run.

    While steps are taken the signal is noted, and the loop leaves after the step, with a checkpoint. Inside
    `at_once` (evaluation, passes over all images, closing work), and at a later second signal, the run is left at once:
    the last checkpoint stands, and what follows it is repeated on resume.

    Attributes:
        number: the signal received, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._immediate = True
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: one that is not Python's, which cannot be put back
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Note a signal, and leave it to the loop to act."""
        yield from self._mode(immediate=False)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Act on a signal immediately, also on one that was noted before."""
        yield from self._mode(immediate=True)

    def _mode(self, immediate: bool) -> Iterator[None]:
        before, self._immediate = self._immediate, immediate
        if immediate and self.number:
            self.leave("stopped; continue from the last checkpoint with resume")
        try:
            yield
        finally:
            self._immediate = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        second = bool(self.number) and now - self._since > _SAME_SIGNAL
        if not self.number:
            self._since = now
        self.number = number
        if second or self._immediate:
            self.leave("stopped; continue from the last checkpoint with resume")

    def agree(
        self, totals: Callable[[Sequence[float]], list[float]], beside: Sequence[float]
    ) -> tuple[int, list[float]]:
        """Have all ranks know what signal any of them got; one that comes meanwhile stays for the next time.

        Args:
            totals: sums over all ranks, see `sela_ext.training.ranks.Ranks.totals`.
            beside: further numbers to add up.

        Returns:
            The signal, SIGTERM before SIGINT, 0 for none; and the sums of `beside`.
        """
        mine = self.number
        interrupts, terminations, *sums = totals([float(mine == signal.SIGINT), float(mine == signal.SIGTERM), *beside])
        agreed = int(signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0)
        if agreed:
            # Whoever sends it to one rank sends it to all: what comes to this one in a moment is the same.
            self._since = self._since if self.number else time.monotonic()
            self.number = agreed
        return agreed, sums

    def leave(self, message: str) -> None:
        """End the run: KeyboardInterrupt for SIGINT, exit status 143 for SIGTERM."""
        try:
            if message:
                print(message, flush=True)
        except RuntimeError:  # the signal came in the middle of another print
            pass
        except (OSError, ValueError, AttributeError):  # whoever read our output is gone
            abandon_output()
        if self.number == signal.SIGTERM:
            raise SystemExit(143)
        raise KeyboardInterrupt(message)
