"""What a run does to its process: threads, denormals, signals."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Set torch's threads for the run. Denormals cost time and carry no information here: flush them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


class Interrupt:
    """SIGINT and SIGTERM end the run at the next step, after a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self.leave("stopped at once; continue from the last checkpoint with resume")
        self.number = number

    def leave(self, message: str) -> None:
        """End the run: KeyboardInterrupt for SIGINT, exit status 143 for SIGTERM."""
        print(message, flush=True)
        if self.number == signal.SIGTERM:
            raise SystemExit(143)
        raise KeyboardInterrupt(message)
