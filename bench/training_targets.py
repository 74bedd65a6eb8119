"""The targets of the training, each read off the rows of one run of bench/training.py; nothing is measured here.

A rate is a row with "question": "rate" and "images_per_second"; a share one with "question": "share" and "share", of
the time of an epoch. "case" says which images, "part" what was timed, "what" by whom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import target_table
from target_table import Row, Target, Value, pick

HEADER = target_table.HEADER

OURS, PLAIN, PLAIN_LAST = "sela_ext", "torch + torchvision", "torch + torchvision, channels last"
SMALL, LARGE = "32 px", "224 px, JPEG files"
WHOLE, COMPUTE, DATA = "whole", "compute only", "data only"
WAIT, LABELS, SOLVER, EVALUATION = "waiting for images", "label pass", "solver", "evaluation"


def rate(rows: Sequence[Row], case: str, part: str, what: str) -> float | None:
    """Images per second."""
    found = pick(rows, question="rate", case=case, part=part, what=what)
    return float(found[0]["images_per_second"]) if found else None


def beside(case: str, part: str) -> Callable[[Sequence[Row]], Value]:
    """Our rate as a multiple of the faster plain loop's."""

    def value(rows: Sequence[Row]) -> Value:
        ours = rate(rows, case, part, OURS)
        plain = {name: found for name in (PLAIN, PLAIN_LAST) if (found := rate(rows, case, part, name)) is not None}
        if ours is None or not plain:
            return Value(None)
        best = max(plain, key=lambda name: plain[name])
        return Value(ours / plain[best], f"{ours:,.0f} images/s beside {plain[best]:,.0f} ({best})")

    return value


def share(case: str, part: str) -> Callable[[Sequence[Row]], Value]:
    """Per cent of the time of an epoch."""

    def value(rows: Sequence[Row]) -> Value:
        found = pick(rows, question="share", case=case, part=part, what=OURS)
        if not found:
            return Value(None)
        return Value(100 * float(found[0]["share"]), f"{found[0]['heads']} heads, {found[0]['images']:,} images")

    return value


TARGETS = (
    Target("a step at 32 px, beside the faster plain loop", "x", 1.3, None, True, beside(SMALL, WHOLE)),
    Target("a step at 224 px from JPEG files, the same", "x", 1.0, 1.3, True, beside(LARGE, WHOLE)),
    Target("waiting for images at 32 px", "%", 5, None, False, share(SMALL, WAIT)),
    Target("waiting for images at 224 px", "%", 5, None, False, share(LARGE, WAIT)),
    Target("label pass from the bank, of an epoch at 32 px", "%", 5, 1, False, share(SMALL, LABELS)),
    Target("solver, of an epoch at 32 px", "%", 2, None, False, share(SMALL, SOLVER)),
)


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table of the targets."""
    return target_table.lines(TARGETS, rows)
