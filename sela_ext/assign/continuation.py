"""Continuation in lambda on the candidates of few passes.

Note [Continuation on candidates]
One pass at a small lambda gives, beside the exact column sums, the entries p > exp(-16): the candidates. On them alone
the problem is solved there, and then at lambdas larger by sqrt(2) each, up to the one asked for: the entries that a
larger lambda needs are among those of a smaller one, for an entry at exp(-16) is at exp(-16 r) when lambda grows by r.
So one read of the matrix carries the continuation over the whole range, and the reads that follow find an error of a
thousandth instead of one. Every step of the potential is limited to what the candidates can know (`reach`): beyond it,
the matrix is read again. What ends the solve is always the true error of a pass over the whole matrix at the lambda
asked for.
  Where the plan is smooth - many entries per row - candidates are as many as the matrix has entries. The first lambda
is then chosen larger, and where even the one asked for is smooth, Anderson's method takes over: it is fast there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sela_ext.kernels.newton import newton_rows, newton_solve, newton_sums

if TYPE_CHECKING:
    import numpy.typing as npt

    from sela_ext.assign.problem import Evaluation, Problem
    from sela_ext.kernels.newton import ColumnLaw

    Vector = npt.NDArray[np.float64]

LEVEL = 16.0  # nats below its row's sum at which an entry stops being a candidate, and that the potential may move
# A plan is smooth when its rows have more candidates than this part of the columns, or than MANY (which bounds the
# memory to 400 bytes a row). Up to FEW are never too many.
DENSITY, MANY, FEW = 0.12, 64, 16
LAST_MORE = 2.0  # so many times the entries per row may be kept at lambda itself
STEP = math.sqrt(2.0)  # of lambda, from one solve on the candidates to the next
# The first stages read a part of the rows, at least SAMPLE and so many per column; each stage MORE_ROWS times as many
# as the one before: its potential is nearer to that of all rows, and less is left to do on them (1,281,167 x 1000: half
# the time).
SAMPLE, SAMPLE_PER_COLUMN, MORE_ROWS = 2048, 8, 8
# A part of the rows is followed up to the lambda with so many entries per row, the next one further by FURTHER: beyond,
# few rows mislead. Where columns move further than its candidates reach, it is read up to AGAIN times more: that costs
# less than the same on all rows.
SAMPLED_TO, FURTHER, AGAIN = 12.0, 2.0, 2
# Errors to which the stages are solved, first on a part of the rows, then on all: what is left moves single columns
# further than candidates reach when lambda grows (3e-3 for both: up to 11 reads where 4 do).
SAMPLE_ERROR, STAGE_ERROR = 3e-3, 3e-4
# Nats from a column's share to the wanted one, beyond which it counts as faint, and the logarithm of the smallest share
# that is told apart.
FAINT, FAINTEST = 14.0, -280.0
AT_REST = 1e-5  # nats: float32 potentials are not exactly log b
SMALLEST, THIN = 2.0**-12, 6.0  # the continuation begins at a smaller lambda when rows have fewer entries
PROGRESS = 0.8  # a stage that another pass does not improve so much is left
LOST, DESCENTS = 0.05, 2  # for a smaller lambda while its error is above this, so many times


def entries_per_row(problem: Problem) -> float:
    """So many candidates a plan may have per row, on the average, to count as sparse."""
    return min(max(FEW, min(MANY, DENSITY * int(problem.logits.shape[1]))), problem.most_candidates / LAST_MORE)


class Climbed(NamedTuple):
    """How far the candidates of a pass have led.

    Attributes:
        potential: [K], for factor * lambda.
        factor: the part of lambda that was reached.
        settled: whether the problem was solved at the lambda of the pass.
    """

    potential: Vector
    factor: float
    settled: bool


def climb(problem: Problem, at: Evaluation, factor: float, tolerance: float, fewest: float) -> Climbed:
    """Solve on the candidates of a pass at factor * lambda, then at larger lambdas; see the note above.

    Args:
        problem: whose columns are wanted.
        at: the pass, with candidates; they are used up.
        factor: the part of lambda that it was at.
        tolerance: error to which each lambda is solved.
        fewest: goes on to the next lambda while rows have more entries than this, on the average.
    """
    step = at.sinkhorn_step(problem.target)
    hopeless = step > -FAINTEST
    if hopeless.any():  # so far away that no number of the candidates can tell how far
        return Climbed(problem.centred(at.potential + np.where(hopeless, step, 0.0)), factor, False)
    number = at.candidates.rows
    rows = newton_rows(at.candidates)
    weight = at.sums.weight
    possible = at.log_shares > -np.inf
    target = np.where(possible, problem.target, 0.0)
    target *= weight / target.sum()
    columns = newton_sums(rows, np.zeros(len(target)), threads=problem.threads).columns
    # What the candidates miss; faint columns know it from the logits themselves.
    shares = np.where(possible, np.exp(np.maximum(at.log_shares, FAINTEST)), 0.0)
    defect = weight * shares - columns
    # A column of which the candidates know nothing takes a Sinkhorn step; how it grows on is left to the next pass.
    faint = possible & (step > FAINT)
    d = np.where(faint, step, 0.0)
    missing, current, before = defect, factor, factor
    while True:
        ratio = current / factor
        law = problem.column_law(at.potential * ratio, current, weight)
        crowd = (rows.entries + number - rows.rows) / number  # entries per row; rows with one left are not in `rows`
        found = newton_solve(
            rows,
            target,
            missing,
            d if law is None else at_rest(d, law),
            ratio=ratio,
            tolerance=tolerance,
            reach=LEVEL * current / before,
            prune=LEVEL,
            threads=problem.threads,
            law=law,
        )
        potential = at.potential * ratio + found.d
        if found.stalled or current >= 1.0 or faint.any() or crowd <= fewest:
            return Climbed(problem.centred(potential), current, current > factor or not found.stalled)
        before, current = current, raised(current, STEP)
        further = problem.scaled(potential, current / before) - at.potential * (current / factor)
        d = np.where(possible & (target > 0), further, 0.0)
        # An entry that was left out was below exp(-16), so it shrinks by at least so much.
        missing = np.maximum(defect, 0.0) * math.exp(-LEVEL * (current / factor - 1.0))


def at_rest(d: Vector, law: ColumnLaw) -> Vector:
    """The same point, with bounded columns whose w is 0 up to rounding exactly at their kink."""
    near = np.abs(law.offset + d) <= AT_REST
    return np.where(near, -law.offset, d) if law.bounds is not None else d


def samples(rows: int, cols: int) -> list[int]:
    """Groups of rows from one that is read to the next, for the stages: smaller from one to the next, at last 1."""
    steps, wanted = [], max(SAMPLE, SAMPLE_PER_COLUMN * cols)
    while rows // wanted > 1:
        steps.append(rows // wanted)
        wanted *= MORE_ROWS
    return [*steps, 1]


def continued(problem: Problem, start: Vector, factor: float, steps: list[int]) -> Vector:
    """Go from about factor * lambda up to lambda; returns a potential for lambda.

    Reads the matrix where the candidates are exhausted, and never so often that no pass is left for the end.

    Args:
        problem: whose columns are wanted.
        start: potential at lambda, which is scaled.
        factor: where to begin. A lambda is then looked for where a row has several entries, and not too many.
        steps: see `samples`.
    """
    potential, limit = problem.scaled(start, factor), entries_per_row(problem)
    rows, cols = problem.rows, int(problem.logits.shape[1])
    thin = min(THIN, cols / 4)
    level, every = 0, steps[0]
    looking = max(every, rows // SAMPLE)  # few rows tell how many entries a row has
    found = looking == every
    rising = False  # lambda was too small before
    again = 0  # so many times this part of the rows was left unsolved
    last_factor, last_error = 0.0, math.inf
    descents = DESCENTS
    while factor < 1.0 and problem.full_passes + problem.rows_read(every) / rows + 1 <= problem.max_passes:
        reading = every if found else looking
        at = problem.evaluate(
            potential, keep=LEVEL, keep_per_row=limit, factor=factor, every=reading, look=reading > every
        )
        wish = factor
        if at.candidates.overflow:  # smooth here: the start is as good at the next lambda
            rising, wish = True, raised(factor, 2.0)
        elif not rising and factor > SMALLEST and at.candidates.entries < thin * at.candidates.rows:
            wish = factor / 4
        elif factor == last_factor and at.error > PROGRESS * last_error:
            if every == 1 and at.error > LOST and descents > 0:  # far away: candidates reach further where it is smooth
                wish, descents = factor / 4, descents - 1
            else:  # the way on may be easier than the rest here
                wish = raised(factor, STEP)
        if wish != factor:
            potential, factor = problem.scaled(potential, wish / factor), wish
            continue
        rising = True
        if not found:
            found = True
            continue
        last_factor, last_error = factor, at.error
        if every == 1:
            potential, factor, _ = climb(problem, at, factor, STAGE_ERROR, 0.0)
            continue
        fewest = SAMPLED_TO / FURTHER**level if not again else math.inf
        potential, factor, settled = climb(problem, at, factor, SAMPLE_ERROR, fewest)
        again += 1
        if settled or again > AGAIN:
            level, every, again = level + 1, steps[level + 1], 0
            last_factor = 0.0  # other rows: the error is another
    return problem.scaled(potential, 1.0 / factor)


def raised(factor: float, step: float) -> float:
    """The next part of lambda, exactly 1 at the end."""
    return factor * step if factor * step < 1 - 1e-9 else 1.0
