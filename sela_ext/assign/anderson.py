"""Sinkhorn iterations with Anderson acceleration, safeguarded."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from sela_ext.assign.problem import Evaluation, Problem

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]

MEMORY = 10  # pairs of differences kept; 12 passes where plain Sinkhorn needs 23, and 79 where it needs > 3000
RESTART = 3.0  # an error this many times the best one means that the model is wrong: back to the best
STEP_CAP = 10.0  # nats: the accelerated step may go this far, or twice as far as the plain one


def accelerated_step(residual: Vector, steps: list[Vector], changes: list[Vector]) -> Vector:
    """The Anderson step (type II) from the residual f = log b - log col at g.

    Args:
        residual: f at the current point [K].
        steps: differences of successive potentials, oldest first.
        changes: differences of the residuals at them.

    Returns:
        f - (steps + changes) gamma, where gamma minimises |f - changes gamma|.
    """
    if not steps:
        return residual
    change = np.stack(changes, axis=1)
    scale = np.linalg.norm(change, axis=0)
    scale[scale == 0] = 1.0
    gamma = np.linalg.lstsq(change / scale, residual, rcond=1e-10)[0] / scale
    step: Vector = residual - (np.stack(steps, axis=1) + change) @ gamma
    return step


def solve_anderson(problem: Problem, start: Vector, first: Evaluation | None = None) -> Evaluation:
    """Anderson(10) on g, with a cap on the step, and a restart from the best point when the error explodes.

    After a restart the plain step is taken from the best point, so the iteration falls back to plain Sinkhorn where
    the acceleration does not help. `first` is the evaluation at the start, where there is one already.
    """
    at = best = problem.evaluate(start) if first is None else first
    residual = problem.centred(at.sinkhorn_step(problem.target))
    steps: deque[Vector] = deque(maxlen=MEMORY)
    changes: deque[Vector] = deque(maxlen=MEMORY)
    plain = False  # the last step was the plain one from `best`
    while best.excess(problem.target) > problem.tol or problem.tol == 0:
        if problem.exhausted:
            break
        if problem.last and best.sums.labels is None:
            return problem.evaluate(best.potential, labels=True)  # the last pass: labels of the best point
        if at.error > RESTART * best.error and not plain:
            steps.clear()
            changes.clear()
            at, residual, plain = best, problem.centred(best.sinkhorn_step(problem.target)), True
            step = residual
        else:
            plain = False
            step = accelerated_step(residual, list(steps), list(changes))
            cap = max(STEP_CAP, 2 * float(np.abs(residual).max()))
            size = float(np.abs(step - step.mean()).max())
            if not np.isfinite(size):
                step = residual
            elif size > cap:
                step = step * (cap / size)
        new = problem.evaluate(problem.centred(at.potential + step), previous=at)
        new_residual = problem.centred(new.sinkhorn_step(problem.target))
        steps.append(new.potential - at.potential)
        changes.append(new_residual - residual)
        at, residual = new, new_residual
        if at.error < best.error:
            best = at
    return best
