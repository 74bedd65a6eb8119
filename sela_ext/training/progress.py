"""What a run shows while it works: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _Console(Console):
    """A console whose reader may leave: that is no reason to end a run."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class RunProgress:
    """Shows the share done, epoch, loss, images per second, data-wait share, time passed + time to come.

    Args:
        enabled: show anything at all.
        quiet_seconds: without a terminal: seconds between lines.
    """

    def __init__(self, enabled: bool, quiet_seconds: float = 10.0) -> None:
        self._console = _Console(highlight=False, soft_wrap=True)
        self._enabled = enabled and sys.stdout is not None
        self._bar: Progress | None = None
        self._task: Any = None
        self._quiet_seconds = quiet_seconds
        self._last = time.monotonic()
        if self._enabled and self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=12),  # all columns together fit into 80 characters
                TextColumn("{task.percentage:3.0f}%"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("+"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=1.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, share: float, text: str) -> None:
        """Show the share of the run done, in [0, 1], and a short text."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share, description=text)
        elif self._enabled and time.monotonic() - self._last >= self._quiet_seconds:
            self._last = time.monotonic()
            self.say(f"{share:4.0%}  {text}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._enabled:
            return
        try:
            self._console.print(line, markup=False)
            sys.stdout.flush()
        except (OSError, ValueError):
            self._enabled = False
            self._abandon_output()

    def _abandon_output(self) -> None:
        """Give up on a standard output that nobody reads; otherwise the interpreter complains of it at its end."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
