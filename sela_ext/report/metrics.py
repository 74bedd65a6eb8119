"""Reading metrics.jsonl, the log of a run: one JSON object a line, told apart by its "event"."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sela_ext.data.safe_files import read_bounded
from sela_ext.errors import DataError

# Ten million events; they become Python objects of several times their size.
MOST_LOG_BYTES = 1 << 31
Event = Mapping[str, Any]
Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """The events of a run, in the order in which they were written.

    Attributes:
        events: one mapping per readable line.
        unreadable: lines that are no JSON object with an "event"; a last line cut off by a kill is not counted.
    """

    events: list[Event] = field(default_factory=list)
    unreadable: int = 0

    def of(self, *kinds: str) -> list[Event]:
        """Return the events of the given kinds, such as "step" or "label_pass"."""
        return [event for event in self.events if event["event"] in kinds]

    def last(self, *kinds: str) -> Event | None:
        """Return the newest event of the given kinds, or None."""
        return next((event for event in reversed(self.events) if event["event"] in kinds), None)


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl; a missing file is a run without events, a truncated last line is left out.

    Args:
        path: the file.

    Raises:
        DataError: the file is there but cannot be read.
    """
    try:
        text = read_bounded(path, MOST_LOG_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return Metrics()
    except OSError as error:
        raise DataError(f"{path}: expected a readable log of the run, found {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path}: expected the log of a run: {error}") from error
    lines = text.split("\n")
    events: list[Event] = []
    unreadable = 0
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and isinstance(value.get("event"), str):
            events.append(value)
        elif number < len(lines) - 1:  # the last piece has no line end: a write that a kill cut short
            unreadable += 1
    return Metrics(events, unreadable)


def number(value: Any) -> float:
    """Return value as a float, NaN where it is no number.

    Example:
        >>> number(3), number(None), number("fast")
        (3.0, nan, nan)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def columns(events: Iterable[Event], *names: str) -> dict[str, Column]:
    """Turn events into columns: float64 [events] per name, NaN where an event lacks it.

    Example:
        >>> columns([{"loss": 2.5}, {"loss": None}, {"step": 3}], "loss")["loss"].tolist()
        [2.5, nan, nan]
    """
    rows = list(events)
    return {name: np.array([number(row.get(name)) for row in rows], dtype=np.float64) for name in names}


def heads_of(event: Event) -> list[Event]:
    """Return the entries of an event's "heads", each with a number; anything else is left out."""
    heads = event.get("heads")
    if not isinstance(heads, list):
        return []
    return [entry for entry in heads if isinstance(entry, dict) and isinstance(entry.get("head"), int)]


def head_columns(events: Iterable[Event], name: str) -> dict[int, tuple[Column, Column]]:
    """Turn one value of the events' heads into a curve per head: head -> (epoch, value), both float64.

    Entries without the value are left out, so heads that take turns have shorter curves.

    Example:
        >>> passes = [{"epoch": 1.0, "heads": [{"head": 0, "changed": 0.5}, {"head": 1}]}]
        >>> {head: value.tolist() for head, (_, value) in head_columns(passes, "changed").items()}
        {0: [0.5]}
    """
    curves: dict[int, tuple[list[float], list[float]]] = {}
    for event in events:
        epoch = number(event.get("epoch"))
        for entry in heads_of(event):
            value = number(entry.get(name))
            if not math.isnan(value):
                x, y = curves.setdefault(entry["head"], ([], []))
                x.append(epoch)
                y.append(value)
    return {head: (np.array(x), np.array(y)) for head, (x, y) in sorted(curves.items())}
