"""What the self-check of a CUDA device runs of Anderson's steps: a few on a small problem, by numpy's least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]
    Case = tuple[str, Callable[[], "str | None"]]
    Uniform = Callable[[int, int], Vector]  # so many numbers in [0, 1) of a stream
    Step = Callable[[npt.NDArray[np.int64], Vector], Vector]

UNIT = 2.0**-40  # of the column sums, as shares
STEPS = 13  # beyond the memory
NEAR = 1e-3  # of an accelerated step, as a part of the error: near singular systems are solved in another way


class Runs(Protocol):
    """What the cases need of a device."""

    def anderson_steps(self, target: Vector, unit: float, accelerate: bool) -> Step:
        """Iterations on the device: from integer column sums and the potential they are of to the next potential."""


def anderson_cases(runs: Runs, uniform: Uniform) -> Iterator[Case]:
    """Every case: what it is, and a call that gives None, or what was expected and what was found."""
    for cols in (5, 33, 600):
        for accelerate in (True, False):
            what = f"anderson_step, {cols} columns, {'accelerated' if accelerate else 'plain'}"
            yield what, partial(_differs, runs, uniform, cols, accelerate)


def _differs(runs: Runs, uniform: Uniform, cols: int, accelerate: bool) -> str | None:
    logits = 6.0 * (uniform(50 * cols, 7).reshape(50, cols) - 0.5)
    target = 0.5 + uniform(cols, 8)
    target /= target.sum()
    step, g = runs.anderson_steps(target, UNIT, accelerate), np.zeros(cols)
    points: list[Vector] = []
    residuals: list[Vector] = []
    for number in range(STEPS):
        t = logits + g
        p = np.exp(t - t.max(axis=1, keepdims=True))
        units = np.rint((p / p.sum(axis=1, keepdims=True)).mean(axis=0) / UNIT)
        shares = units * UNIT
        error = float(np.abs(shares - target).sum())
        if error < 1e-7:  # rounding is what is left
            return None
        residual = np.log(target) - np.log(shares)
        points.append(g)
        residuals.append(residual - target @ residual)
        expected = residuals[-1]
        if accelerate and number:
            moved = np.diff(np.array(points[-11:]), axis=0).T
            changes = np.diff(np.array(residuals[-11:]), axis=0).T
            scale = np.sqrt((changes * changes).sum(axis=0))
            gamma = np.linalg.lstsq(changes / scale, residuals[-1], rcond=1e-10)[0] / scale
            expected = expected - (moved + changes) @ gamma
        expected = g + expected
        expected -= target @ expected
        found = step(units.astype(np.int64), g)
        far = np.abs(found - expected)
        if not far.max() <= 1e-9 + (NEAR * error if accelerate else 0.0):
            worst = int(np.nan_to_num(far, nan=np.inf).argmax())
            return f"step {number}, column {worst}: expected {expected[worst]:.9g}, found {found[worst]:.9g}"
        g = expected
    return None
