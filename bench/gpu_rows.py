"""The rows of gpu.py: what each times and needs, and how one that fails leaves the others as they are."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sela_ext.kernels.device import first_line

MARGIN = 1 << 30  # bytes that torch, the driver and a comparison's temporary tensors may take beside what a row names
MEMORY_WORDS = ("out of memory", "no memory left")


class Card(Protocol):
    """What is needed of gpu.py's card."""

    def wait(self) -> None:
        """Wait for the device."""

    def free(self) -> float:
        """Free memory, bytes."""


@dataclass(frozen=True)
class Row:
    """One comparison and its table.

    Attributes:
        name: in messages.
        measure: compares, times, prints the table; what is to be recorded.
        kernels: the CUDA kernels that are timed, by their names in docs/gpu.md.
        needs: bytes of the card's memory.
    """

    name: str
    measure: Callable[[], list[dict[str, Any]]]
    kernels: tuple[str, ...] = ()
    needs: float = 0.0


@dataclass
class Outcome:
    """What came of the rows.

    Attributes:
        recorded: measurements.
        failed: name and reason of those that did not come to their end, or whose results differ.
        left_out: name and reason of those that do not fit the card.
    """

    recorded: list[dict[str, Any]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def measure_rows(card: Card, rows: Sequence[Row]) -> Outcome:
    """All rows in turn. What goes wrong in one is said at once and again at the end; the others are measured.

    A device that does not answer any more after a failure (a sticky error of CUDA's) ends the measurements: those left
    count as failed.
    """
    outcome = Outcome()
    for number, row in enumerate(rows):
        free = card.free()
        if row.needs and row.needs + MARGIN > free:
            reason = f"it needs {(row.needs + MARGIN) / 2**30:.1f} GiB of the card, {free / 2**30:.1f} are free"
            print(f"\nleft out: {row.name}: {reason}")
            outcome.left_out.append((row.name, reason))
            continue
        try:
            outcome.recorded += row.measure()
            card.wait()
        except (Exception, SystemExit) as error:
            reason = first_line(error) or type(error).__name__
            if any(words in str(error).lower() for words in MEMORY_WORDS):
                print(f"\nleft out: {row.name}: {reason}")
                outcome.left_out.append((row.name, reason))
            else:
                if not isinstance(error, SystemExit):  # no comparison, but something unforeseen
                    reason = f"{type(error).__name__}: {reason}"
                    traceback.print_exc(file=sys.stderr)
                print(f"\nFAILED: {row.name}: {reason}")
                outcome.failed.append((row.name, reason))
        lost = trouble(card)
        if lost:
            print(f"\nthe device does not answer any more: {lost}")
            why = f"not measured: the device was lost after {row.name}: {lost}"
            if not any(name == row.name for name, _ in outcome.failed):
                outcome.failed.append((row.name, lost))
            outcome.failed += [(later.name, why) for later in rows[number + 1 :]]
            break
    return outcome


def trouble(card: Card) -> str:
    """What a device says that is out of order; nothing when it works."""
    try:
        card.wait()
        card.free()
    except RuntimeError as error:
        return first_line(error)
    return ""


def summary(outcome: Outcome) -> str:
    """The last lines of the report."""
    lines = [
        f"\n{len(outcome.recorded)} measurements, {len(outcome.failed)} rows failed, {len(outcome.left_out)} left out"
    ]
    lines += [f"  FAILED: {name}: {reason}" for name, reason in outcome.failed]
    lines += [f"  left out: {name}: {reason}" for name, reason in outcome.left_out]
    return "\n".join(lines)
