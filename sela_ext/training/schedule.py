"""When to relabel, and with which learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence


def label_pass_times(passes: int, epochs: float, images: float, spacing: str) -> list[float]:
    """Times of the label passes, in images seen.

    Args:
        passes: number of label passes P >= 0.
        epochs: epochs E of the run.
        images: number of images N.
        spacing: "quadratic": ((i - 1) / (P - 1))^2 (E + 1.01) N, the first before the first step and dense at the
            start; those that lie beyond the run's end never come. "linear": (i - 1) E N / P.

    Returns:
        Ascending times, the first one 0.

    Example:
        >>> label_pass_times(4, 4, 100, "linear")
        [0.0, 100.0, 200.0, 300.0]

    Source: SeLa paper, section 4.1 (the schedule of the label optimisation) and the authors' code.
    """
    if spacing == "linear":
        return [i * epochs * images / passes for i in range(passes)]
    return [(i / max(passes - 1, 1)) ** 2 * (epochs + 1.01) * images for i in range(passes)]


def passes_due(times: Sequence[float], done: int, seen: float) -> int:
    """Number of label passes whose time has come: the new `done` once one pass has served them all.

    Args:
        times: what `label_pass_times` returned.
        done: passes made or overtaken so far.
        seen: images seen so far.
    """
    while done < len(times) and times[done] <= seen:
        done += 1
    return done


# The paper divides the learning rate by ten at epochs 150, 300 and 350 of 400.
MILESTONES = (150 / 400, 300 / 400, 350 / 400)
# One cycle: where its peak lies when no warm-up is asked for, and the rates at its beginning and end, as parts of the
# highest one.
_PEAK, _CYCLE_START, _CYCLE_END = 0.3, 1 / 25, 1 / 250_000


def learning_rate(
    base: float, progress: float, schedule: str, warmup: float, milestones: Sequence[float] = MILESTONES
) -> float:
    """Learning rate at a point of the run.

    Progress is the share of the run that is done, in images or in seconds of a budget: every schedule serves both.

    Args:
        base: the highest learning rate.
        progress: share of the run done, in [0, 1].
        schedule: "step" (a tenth from each milestone on), "cosine" or "linear" (to zero at the end), "constant", or
            "onecycle" (by cosines, up from a 25th until `warmup` of the run, or .3 where that is 0, then down to next
            to nothing).
        warmup: share of the run over which the rate grows linearly from zero; see above for "onecycle".
        milestones: of "step", shares of the run.

    Example:
        >>> [round(learning_rate(1.0, p, "step", 0.0), 6) for p in (0.0, 0.5, 0.8, 0.9)]
        [1.0, 0.1, 0.01, 0.001]
        >>> [round(learning_rate(1.0, p, "linear", 0.5), 6) for p in (0.25, 0.5, 0.75, 1.0)]
        [0.5, 1.0, 0.5, 0.0]

    Source: "step": SeLa paper, section 4; "cosine": Loshchilov, Hutter, "SGDR", 2017; "onecycle": Smith, Topin,
    "Super-convergence", 2018.
    """
    if schedule == "onecycle":
        peak = warmup or _PEAK
        if progress < peak:
            return base * _between(_CYCLE_START, 1.0, progress / peak)
        return base * _between(1.0, _CYCLE_END, min((progress - peak) / max(1.0 - peak, 1e-12), 1.0))
    if progress < warmup:
        return base * progress / warmup
    if schedule == "step":
        return base * 0.1 ** sum(progress >= milestone for milestone in milestones)
    if schedule == "constant":
        return base
    rest = min((progress - warmup) / max(1.0 - warmup, 1e-12), 1.0)
    return base * (1.0 - rest) if schedule == "linear" else base * _between(1.0, 0.0, rest)


def _between(first: float, last: float, share: float) -> float:
    """From one number to another by half a cosine."""
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * share))
