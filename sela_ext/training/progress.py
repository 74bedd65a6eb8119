"""What a run shows while it works: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from sela_ext.errors import harmless
from sela_ext.training.clock import words
from sela_ext.training.machine import abandon_output


class _Console(Console):
    """A console whose reader may leave: that is no reason to end a run."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Remaining(ProgressColumn):
    """Time to come: the run's own estimate, or one from the speed of the bar."""

    def render(self, task: Task) -> Text:
        """Draw it as h:mm:ss."""
        known = task.fields.get("remaining")
        seconds = task.time_remaining if known is None else known
        return Text("-:--:--" if seconds is None else str(timedelta(seconds=int(seconds))), style="progress.remaining")


class _Bar(Progress):
    """A bar, with a line below it for what does not fit beside it."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and the line where there is something to say."""
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, style="dim", no_wrap=True, overflow="ellipsis")


Advance = Callable[[int], None]
Stage = Callable[[str, int], contextlib.AbstractContextManager[Advance]]


@contextlib.contextmanager
def no_stage(name: str, total: int = 0) -> Iterator[Advance]:
    """What stands in for `RunProgress.stage` where nothing is shown."""
    yield lambda done: None


class RunProgress:
    """Shows the share done, epoch, loss, images per second, data-wait share, time passed + time to come.

    On a terminal all that is a bar with a line below; elsewhere it is a line now and then, and no line for what is
    quickly done.

    Args:
        enabled: show anything at all.
        quiet_seconds: without a terminal: seconds between lines.
    """

    def __init__(self, enabled: bool, quiet_seconds: float = 10.0) -> None:
        self._console = _Console(highlight=False, soft_wrap=True)
        self._enabled = enabled and sys.stdout is not None
        self._bar: _Bar | None = None
        self._task: Any = None
        self._quiet_seconds = quiet_seconds
        self._last = time.monotonic()
        if self._enabled and self._console.is_terminal:
            self._bar = _Bar(
                BarColumn(bar_width=12),  # all columns together fit into 80 characters
                TextColumn("{task.percentage:3.0f}%"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("+"),
                _Remaining(),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=1.0, remaining=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, share: float, text: str, *, note: str = "", remaining: float | None = None) -> None:
        """Show how far the run is.

        Args:
            share: of the run done, in [0, 1].
            text: beside the bar, short.
            note: more, on a line of its own.
            remaining: seconds to the end, where the caller knows better than the speed of the bar.
        """
        if self._bar is not None:
            self._bar.note = note
            self._bar.update(self._task, completed=share, description=text, remaining=remaining)
        elif self._time_for_a_line():
            rest = "" if remaining is None else f"  {words(remaining)} to go"
            self.say(f"{share:4.0%}  {text}" + (f"  {note}" if note else "") + rest)

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Advance]:
        """Show that something other than steps is going on: looking at all images, say.

        Args:
            name: of it.
            total: things to be done, 0 where nobody can say.

        Returns:
            A context that gives a function, to be called with the number of things done so far.
        """
        before = "" if self._bar is None else self._bar.note

        def advance(done: int) -> None:
            told = f"{name}: {done:,} of {total:,}" if total else name
            if self._bar is not None:
                self._bar.note = told
            elif self._time_for_a_line():
                self.say(f"      {told}")

        if self._bar is not None:
            self._bar.note = name
            self._bar.refresh()
        try:
            yield advance
        finally:
            if self._bar is not None:
                self._bar.note = before

    def _time_for_a_line(self) -> bool:
        """Without a terminal: whether the last line is long enough ago."""
        if not self._enabled or time.monotonic() - self._last < self._quiet_seconds:
            return False
        self._last = time.monotonic()
        return True

    def say(self, line: str) -> None:
        """Print a line above the bar; what the encoding of the output lacks is escaped."""
        if not self._enabled:
            return
        encoding = self._console.encoding
        line = line.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._console.print(harmless(line), markup=False)
            sys.stdout.flush()
        except (OSError, ValueError):
            self._enabled = False
            self._abandon_output()

    def _abandon_output(self) -> None:
        """Give up on a standard output that nobody reads."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        abandon_output()
