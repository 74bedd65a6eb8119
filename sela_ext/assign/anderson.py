"""Sinkhorn iterations with Anderson acceleration, safeguarded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sela_ext.assign.problem import Evaluation, Problem
from sela_ext.kernels.anderson import anderson_step
from sela_ext.kernels.anderson_device import LONGEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]

MEMORY = 10  # pairs of differences kept; 12 passes where plain Sinkhorn needs 23, and 79 where it needs > 3000
RESTART = 3.0  # an error this many times the best one means that the model is wrong: back to the best
STEP_CAP = 10.0  # nats: the accelerated step may go this far, or twice as far as the plain one
PATIENCE = 40  # passes that may fail to halve the error, before rounding is taken for the reason (see turn_to_float64)
STALLED = 60  # accelerated passes that may fail to halve the error, before as many plain ones
# With many rows the first passes read a part of them, at least so many, in all and per column, and then MORE_ROWS times
# as many: until the error there is PART_ERROR sqrt(columns / rows), a fifth or so of the error that all rows have then.
PART_ROWS, PART_ROWS_PER_COLUMN, MORE_ROWS = 4096, 4, 8
PART_ERROR, PART_PASSES = 0.05, 15


class Memory:
    """Differences of the latest potentials and of their residuals: a model of how the one changes the other."""

    def __init__(self, clusters: int) -> None:
        """Nothing is known."""
        self._rows = np.empty((2, MEMORY, clusters))  # steps and changes, oldest first
        self._known = 0

    @property
    def differences(self) -> Vector:
        """Steps and changes, float64 [2, m, K]."""
        return np.ascontiguousarray(self._rows[:, : self._known])

    def add(self, step: Vector, change: Vector) -> None:
        """A step of the potential, and what it changed of the residual."""
        if self._known == MEMORY:
            self._rows[:, :-1] = self._rows[:, 1:]
        else:
            self._known += 1
        self._rows[0, self._known - 1] = step
        self._rows[1, self._known - 1] = change

    def clear(self) -> None:
        """Forget everything."""
        self._known = 0

    def step(self, residual: Vector) -> Vector:
        """The accelerated step from a residual, shortened where it goes too far."""
        return anderson_step(residual, *self.differences, cap=STEP_CAP)


def parts_of(problem: Problem) -> list[int]:
    """Groups of rows from one that is read to the next, for the first stages; none where the rows are few."""
    rows, cols = problem.rows, int(problem.logits.shape[1])
    every, parts = rows // max(PART_ROWS, PART_ROWS_PER_COLUMN * cols), []
    while every > 1:
        parts.append(every)
        every //= MORE_ROWS
    return parts


def solve_part(problem: Problem, start: Vector, every: int, memory: Memory) -> Vector:
    """Iterate on a part of the rows until its potential is about as good for all rows as it can be."""
    rows, cols = problem.rows, int(problem.logits.shape[1])
    read = problem.rows_read(every)
    enough = max(PART_ERROR * math.sqrt(cols / read), problem.tol)
    potential, before = start, None
    for _ in range(PART_PASSES):
        if problem.full_passes + read / rows + 1 > problem.max_passes:
            break
        at = problem.evaluate(potential, every=every, look=True)
        residual = problem.centred(at.sinkhorn_step(problem.target))
        if before is not None:
            memory.add(at.potential - before[0].potential, residual - before[1])
        if at.error <= enough:
            break
        if before is not None and at.error > RESTART * before[0].error:
            return before[0].potential
        before = at, residual
        potential = problem.centred(at.potential + memory.step(residual))
    return potential


def one_by_one(problem: Problem, at: Evaluation, residual: Vector, memory: Memory, passes: int) -> Evaluation:
    """`anderson_passes` for rows that are elsewhere, or with somebody who watches: the same passes, with equal bits."""
    best, lowest, since = at, at.error, 0
    for _ in range(passes):
        potential = problem.centred(at.potential + memory.step(residual))
        if not np.isfinite(potential).all():
            break
        new = problem.evaluate(potential, previous=at, look=True)
        if not new.plain:
            break
        new_residual = problem.centred(new.sinkhorn_step(problem.target))
        memory.add(new.potential - at.potential, new_residual - residual)
        at, residual = new, new_residual
        if at.error < best.error:
            best = at
        if at.error <= problem.tol:
            return at
        since = 0 if at.error < 0.5 * lowest else since + 1
        lowest = lowest if since else at.error
        if at.error > RESTART * best.error or since >= PATIENCE:
            break
    return problem.evaluate(best.potential)


def solve_anderson(
    problem: Problem, start: Vector, first: Evaluation | None = None, parts: Sequence[int] = ()
) -> Evaluation:
    """Anderson(10) on g, with a cap on the step, and a restart from the best point when the error explodes.

    After a restart the plain step is taken from the best point, so the iteration falls back to plain Sinkhorn where
    the acceleration does not help.

    On a CUDA device small problems are solved in stages of several passes, whose steps are taken there (see
    Note [Stages] in sela_ext/kernels/anderson_device.py).

    Args:
        problem: whose columns are wanted.
        start: potential [K].
        first: the evaluation at the start, where there is one already.
        parts: see `parts_of`: the potential of a part of the rows is a better start, and what is learnt there of how
            shares change with the potential holds for all rows.
    """
    memory = Memory(len(start))
    for every in parts:
        start = solve_part(problem, start, every, memory)
    at = best = problem.evaluate(start) if first is None else first
    residual = problem.centred(at.sinkhorn_step(problem.target))
    stages = problem.stages(at, restart=RESTART, cap=STEP_CAP, differences=memory.differences)
    passes = problem.passes_to_spare(at) if stages is None else 0
    if passes and best.error > problem.tol:
        limits = {"memory": MEMORY, "cap": STEP_CAP, "restart": RESTART, "patience": PATIENCE}
        further = problem.many_passes(at, residual, memory.differences, passes, **limits)
        at = best = one_by_one(problem, at, residual, memory, passes) if further is None else further
        residual = problem.centred(at.sinkhorn_step(problem.target))
        memory.clear()
    plain = False  # the last step was the plain one from `best`
    lowest, since = best.error, 0  # passes since the error was last halved
    highest, resting = at, 0  # in the objective; plain iterations to come
    following = problem.centred(at.potential + memory.step(residual)) if stages is not None else start
    while best.excess(problem.target) > problem.tol or problem.tol == 0:
        if problem.exhausted:
            break
        if problem.last and best.sums.labels is None:
            return problem.evaluate(best.potential, labels=True)  # the last pass: labels of the best point
        count = problem.stage_passes(stages) if since < PATIENCE - LONGEST else 0
        if stages is not None and count > 1:  # several passes, whose steps are taken on the device
            found, following = problem.evaluate_stage(stages, following, count, at)
            for at in found:
                since += 1
                if at.error < 0.5 * lowest:
                    lowest, since = at.error, 0
                best = at if at.error < best.error else best
                highest = at if at.objective > highest.objective else highest
            continue
        if stages is not None:  # from here on every pass is looked at
            stages = None
            memory.clear()
            residual = problem.centred(at.sinkhorn_step(problem.target))
        if since >= STALLED:  # going in circles: plain iterations from the highest point raise the objective each time
            memory.clear()
            at, residual = highest, problem.centred(highest.sinkhorn_step(problem.target))
            since, resting = -STALLED, STALLED
        if resting > 0:
            resting -= 1
            step = residual
        elif at.error > RESTART * best.error and not plain:
            memory.clear()
            at, residual, plain = best, problem.centred(best.sinkhorn_step(problem.target)), True
            step = residual
        else:
            plain = False
            step = memory.step(residual)
        since += 1
        if since >= PATIENCE and problem.turn_to_float64(best):
            at = best = problem.evaluate(best.potential)
            highest = at
            residual, since = problem.centred(best.sinkhorn_step(problem.target)), 0
            continue
        new = problem.evaluate(problem.centred(at.potential + step), previous=at)
        new_residual = problem.centred(new.sinkhorn_step(problem.target))
        memory.add(new.potential - at.potential, new_residual - residual)
        at, residual = new, new_residual
        if at.error < 0.5 * lowest:
            lowest, since = at.error, 0
        if at.error < best.error:
            best = at
        if at.objective > highest.objective:
            highest = at
    return best
