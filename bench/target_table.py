"""What a table of targets is made of: a figure is read off the rows of one run, and stands beside its gate and stretch.

A row is a dict as bench/results keeps it. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Value:
    """A figure and what goes with it.

    Attributes:
        number: the figure; None when this run has no row for it.
        note: which storage, which limit, and so on.
        at_least: the true figure is this or larger (a competitor that did not get there).
    """

    number: float | None
    note: str = ""
    at_least: bool = False


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        measure: in words.
        unit: behind the figures.
        gate: what must be reached.
        stretch: what is aimed at; None where the gate is all.
        larger: whether larger is better.
        value: rows -> figure.
    """

    measure: str
    unit: str
    gate: float
    stretch: float | None
    larger: bool
    value: Callable[[Sequence[Row]], Value]

    def verdict(self, found: Value) -> str:
        """One of: stretch, gate, not met, open (a lower bound below the gate), not in this run."""
        if found.number is None:
            return "not in this run"
        sign = 1 if self.larger else -1
        if self.stretch is not None and sign * found.number >= sign * self.stretch:
            return "stretch"
        if sign * found.number >= sign * self.gate:
            return "gate"
        return "open" if found.at_least else "not met"


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows that have all of these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def figure(number: float, unit: str = "") -> str:
    """A figure for a table: three or four digits, and the unit."""
    if number == float("inf"):
        return "not reached"
    if unit == "%" and 99 < number < 100:
        return f"{number:.4f}%"
    if number and abs(number) < 1e-3:
        text = f"{number:.1e}"
    elif abs(number) >= 100 or number == int(number):
        text = f"{number:,.0f}"
    else:
        text = f"{number:.3g}"
    return text + (unit if unit in ("x", "%") else f" {unit}" if unit else "")


def lines(targets: Sequence[Target], rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table: measure, gate, stretch, ours, verdict, note."""
    out = []
    for target in targets:
        found = target.value(rows)
        yes_or_no = target.measure.startswith("the same bits")
        if found.number is None:
            ours = "-"
        elif yes_or_no:
            ours = "equal" if found.number else "differ"
        else:
            ours = ("> " if found.at_least else "") + figure(found.number, target.unit)
        gate = "equal" if yes_or_no else figure(target.gate, target.unit)
        stretch = "-" if target.stretch is None else figure(target.stretch, target.unit)
        out.append((target.measure, gate, stretch, ours, target.verdict(found), found.note))
    return out


HEADER = ("measure", "gate", "stretch", "ours", "met", "")
