"""Where the time of a run goes, and how fast it is now."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

# What a run spends its time on. Steps include waiting for images until `Clock.seconds` takes that out.
PARTS = ("start", "train", "wait", "label_pass", "evaluation", "checkpoint")
# What readers call them.
NAMES = {
    "start": "start",
    "train": "training steps",
    "wait": "waiting for images",
    "label_pass": "label passes",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
}


class Clock:
    """Adds up the seconds of each part of a run.

    Args:
        before: seconds of each part in earlier sessions of the run.
        now: the clock, in seconds.

    Example:
        >>> times = iter([0.0, 1.0, 4.0, 5.0, 9.0])
        >>> clock = Clock(now=lambda: next(times))
        >>> clock.enter("train")
        >>> with clock.part("label_pass"):
        ...     pass
        >>> seconds = clock.seconds(waited=1.5)
        >>> seconds["train"], seconds["wait"], seconds["label_pass"]
        (5.5, 1.5, 1.0)
    """

    def __init__(self, before: Mapping[str, float] | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._before = {part: float((before or {}).get(part, 0.0)) for part in PARTS}
        self._own = dict.fromkeys(PARTS, 0.0)
        self._part = "start"
        self._last = now()
        self._marked_train = self._marked_wait = 0.0

    def enter(self, part: str) -> None:
        """From now on time counts for `part`."""
        now = self._now()
        self._own[self._part] += now - self._last
        self._part, self._last = part, now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time inside counts for `name`, and afterwards for what it counted for before."""
        outer = self._part
        self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def rates(self, images: int, all_images: int, waited: float) -> dict[str, float]:
        """How fast steps are now, and how fast the run was: what a "step" event tells of the clock.

        Args:
            images: that were trained on since the last call.
            all_images: that were trained on in this session.
            waited: seconds that steps waited for images, in this session.

        Returns:
            images_per_second and data_wait_share of the steps since the last call, without label passes, evaluations
            and checkpoints in between; interval_seconds, the time of these steps; run_images_per_second and
            run_data_wait_share of the session, with everything since its start.
        """
        self.enter(self._part)
        steps = max(self._own["train"] - self._marked_train, 1e-9)
        wait = max(waited - self._marked_wait, 0.0)
        whole = max(sum(self._own.values()), 1e-9)
        self._marked_train, self._marked_wait = self._own["train"], waited
        return {
            "images_per_second": images / steps,
            "data_wait_share": min(wait / steps, 1.0),
            "interval_seconds": steps,
            "run_images_per_second": all_images / whole,
            "run_data_wait_share": min(waited / whole, 1.0),
        }

    def seconds(self, waited: float = 0.0) -> dict[str, float]:
        """Seconds of each part over all sessions.

        Args:
            waited: seconds that steps waited for images, in this session.
        """
        self.enter(self._part)
        wait = min(waited, self._own["train"])
        own = {**self._own, "train": self._own["train"] - wait, "wait": wait}
        return {part: self._before[part] + own[part] for part in PARTS}


def describe_shares(seconds: Mapping[str, float]) -> str:
    """Say where the time went, the largest part first; what is below half a percent is left out.

    Example:
        >>> describe_shares({"train": 80.0, "wait": 4.0, "label_pass": 16.0})
        '80% training steps, 16% label passes, 4% waiting for images'
    """
    total = sum(seconds.values())
    if total <= 0:
        return ""
    shares = sorted(((value / total, part) for part, value in seconds.items()), reverse=True)
    return ", ".join(f"{share:.0%} {NAMES[part]}" for share, part in shares if share >= 0.005)


class Remaining:
    """Seconds to the end of a run, from how fast its share done grows; what came before the first step is left out."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._first: tuple[float, float] | None = None

    def update(self, share: float) -> float | None:
        """Take note of the share done, in [0, 1].

        Returns:
            Seconds to come; None before there is anything to tell them from.
        """
        now = self._now()
        if self._first is None:
            self._first = now, share
            return None
        began, first = self._first
        if share <= first:
            return None
        return (now - began) / (share - first) * max(1.0 - share, 0.0)


def words(seconds: float) -> str:
    """Write a time roughly, in the units that people use.

    Example:
        >>> words(3.2), words(75), words(420), words(7300), words(200000)
        ('3 s', '75 s', '7 min', '2 h 1 min', '2 d 8 h')
    """
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{round(whole / 60)} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    hours = round(whole / 3600)
    return f"{hours // 24} d {hours % 24} h"
