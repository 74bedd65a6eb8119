"""Newton's method on the entries of the plan that count: few reads, and the true error at the end of each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sela_ext.assign.anderson import solve_anderson
from sela_ext.assign.continuation import LAST_MORE, LEVEL, climb, continued, entries_per_row, samples
from sela_ext.assign.problem import Evaluation, Problem
from sela_ext.assign.relaxed import RelaxedProblem, solve_bounded

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]

# At lambda itself more entries are kept, which are few there: to a small error, columns that hardly any row ties to the
# others move far, and what was left out must stay below that error (with 16 nats: 12 reads where 5 do).
LAST_LEVEL, LAST_LEVEL_64 = 24.0, 36.0
FIRST = 1 / 16  # of lambda: where the continuation begins
PROBE = 4096  # rows that "auto" looks at
NEAR = 0.02  # a start with at most this error is improved at once; from others the continuation begins
PATIENCE = 4  # passes at lambda that may fail to halve the best error, before Anderson's method takes over


def choose_method(problem: Problem, start: Vector, *, warm: bool) -> tuple[str, str, Evaluation | None]:
    """Newton for sparse plans, Anderson for smooth ones, as a first pass at the start measures it.

    A small problem, or one with a start, is read as a whole: that pass is the first of the solve, whichever the method.
    Otherwise about 4,096 rows are looked at.

    Returns:
        "newton" or "anderson"; the reason; the evaluation at the start, when the whole matrix was read.
    """
    rows, cols = problem.rows, int(problem.logits.shape[1])
    every = 1 if warm or problem.last else max(1, rows // PROBE)
    limit = entries_per_row(problem)
    at = problem.evaluate(start, keep=LEVEL, keep_per_row=limit, every=every, look=every > 1)
    candidates = at.candidates
    first = at if every == 1 else None
    if candidates.overflow:
        reason = f"a smooth plan: more than {limit:.3g} of {cols} entries per row above exp(-{LEVEL:g})"
        return "anderson", reason, first
    found = candidates.entries / max(candidates.rows, 1)
    return "newton", f"a sparse plan: {found:.3g} of {cols} entries per row above exp(-{LEVEL:g})", first


def evaluate_at_end(problem: Problem, potential: Vector, *, candidates: bool = True) -> Evaluation:
    """A pass at lambda with labels, and with as many candidates as the last steps need."""
    level = LAST_LEVEL_64 if problem.dtype == "float64" else LAST_LEVEL
    if not candidates:
        return problem.evaluate(potential, labels=True)
    return problem.evaluate(potential, labels=True, keep=level, keep_per_row=LAST_MORE * entries_per_row(problem))


def solve_newton(
    problem: Problem, start: Vector, *, warm: bool, first: Evaluation | None = None
) -> tuple[Evaluation, str]:
    """Few passes to a small error: continuation in lambda on candidates, and the true error after every step.

    Args:
        problem: to be solved; what is read of the logits stays on their device.
        start: potential [K].
        warm: the start is worth something: it is tried first, and improved at once when it is near.
        first: the evaluation at the start with its candidates, where there is one already.

    Returns:
        The best evaluation at lambda, and what to add to the reason where Anderson's method had to go on.
    """
    rows, cols = problem.rows, int(problem.logits.shape[1])
    tolerance = max(0.1 * problem.tol, 1e-14 if problem.dtype == "float64" else 1e-9)

    def evaluate(potential: Vector) -> Evaluation:
        return evaluate_at_end(problem, potential)

    attempts = [(FIRST / 4, [1]), (FIRST, samples(rows, cols))]  # where to begin, and on which rows; the last one first
    at = evaluate(start) if warm and first is None else first
    best = at
    failures = PATIENCE  # no pass yet, or one that is not worth improving
    if at is not None and warm and at.error <= NEAR:
        failures = 0
    while best is None or not (done(problem, best) or problem.exhausted):
        if failures == PATIENCE:
            if not attempts:
                return stalled(problem, start, best)
            factor, steps = attempts.pop()
            at = evaluate(continued(problem, start if best is None else best.potential, factor, steps))
            failures = 0
        else:
            assert at is not None
            assert best is not None
            if at.candidates.overflow:
                return go_on(problem, start, best), "; smooth at the end, where Anderson's method went on"
            at = evaluate(climb(problem, at, 1.0, tolerance, math.inf).potential)
            failures = 0 if at.error < 0.5 * best.error else failures + 1
        if best is None or at.error < best.error:
            best = at
    return best, ""


def stalled(problem: Problem, start: Vector, best: Evaluation | None) -> tuple[Evaluation, str]:
    """What goes on where Newton's method got no further: itself in float64 where rounding is why, or Anderson's."""
    if best is not None and problem.turn_to_float64(best):
        return solve_newton(problem, best.potential, warm=True)
    return go_on(problem, start, best), "; stalled, Anderson's method went on"


def go_on(problem: Problem, start: Vector, best: Evaluation | None) -> Evaluation:
    """Anderson's method from the best point, or from the start."""
    if isinstance(problem, RelaxedProblem) and problem.bounds is not None:
        return solve_bounded(problem, start if best is None else best.potential)
    return solve_anderson(problem, start, best)


def done(problem: Problem, at: Evaluation) -> bool:
    """Whether the error that a potential can remove is at most tol; never with tol 0, which uses all passes."""
    return problem.tol > 0 and at.excess(problem.target) <= problem.tol
