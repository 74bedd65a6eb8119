"""The stopping rule of the authors' released code, for parity with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.problem import Evaluation, Problem
from sela_ext.assign.sources import row_blocks
from sela_ext.kernels.sinkhorn import check_logits

if TYPE_CHECKING:
    import numpy.typing as npt

CHECK_EVERY = 10  # iterations between checks; the first one, number 0, is checked too
ROW_ERROR = 0.1  # sum over all rows of |c / c_new - 1|
ROWS_AT_ONCE = 4096


def log_probabilities(logits: Any) -> npt.NDArray[np.float64]:
    """Log-softmax of logits [N, K] in float64, numpy, on the CPU; rows that cannot be normalised become NaN."""
    rows, cols = logits.shape
    out = np.empty((rows, cols), np.float64)
    for part, block in row_blocks(logits, ROWS_AT_ONCE):
        top = block.max(axis=1, keepdims=True)
        shifted = np.subtract(block, top, out=np.full(block.shape, np.nan), where=np.isfinite(top))
        out[part] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return out


def first_half_step(problem: Problem, log_p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return log r = log b - log sum_i a_i P_ik^lambda: the column scalings for uniform row scalings."""
    rows, cols = log_p.shape
    top = np.full(cols, -np.inf)
    total = np.zeros(cols)
    mass = 0.0
    for first in range(0, rows, ROWS_AT_ONCE):
        t = problem.lam * log_p[first : first + ROWS_AT_ONCE]
        weights = np.ones(len(t))
        if problem.row_weights is not None:
            weights = np.asarray(problem.row_weights[first : first + len(t)], np.float64)
        good = ~np.isnan(t).any(axis=1) & (weights > 0)
        t, weights = t[good], weights[good]
        if not len(t):
            continue
        new_top = np.maximum(top, t.max(axis=0))
        shift = np.where(np.isfinite(new_top), new_top, 0.0)
        total = total * np.exp(top - shift) + (weights[:, None] * np.exp(t - shift)).sum(axis=0)
        top = new_top
        mass += float(weights.sum())
    if mass == 0.0:
        return np.log(problem.target)  # the pass that follows says that no row is left
    column = np.where(np.isfinite(top), top, 0.0) + np.log(np.maximum(total, 1e-300)) - np.log(mass)
    step: npt.NDArray[np.float64] = np.log(problem.target) - column
    return step


def solve_official(problem: Problem) -> tuple[Evaluation, bool]:
    """Sinkhorn in float64 from the log-softmax, stopped as the authors do.

    Start: row scalings 1/N, so the first half-step gives r. Every 10th iteration, the 0th included, the change of the
    row scalings c = a exp(-lse) is summed: sum_i |exp(lse_new - lse) - 1| <= 0.1 ends it. The authors know no limit;
    here max_passes is one.

    Returns:
        The last evaluation and whether the rule was met.
    """
    kind = problem.logits
    if check_logits(kind) != "float64" or not isinstance(kind, np.ndarray):
        problem.row_weights = _as_numpy(problem.row_weights)
    log_p = log_probabilities(kind)
    problem.full_passes += 1
    problem.passes += 1  # the read for the log-softmax and the first half-step
    problem.logits = log_p
    potential = first_half_step(problem, log_p)
    lse = np.zeros(log_p.shape[0])  # c = 1/N is exp(-0) / N
    iteration = 0
    while True:
        at = problem.evaluate(potential, labels=iteration % CHECK_EVERY == 0)
        if iteration % CHECK_EVERY == 0:
            with np.errstate(over="ignore"):
                changes = np.abs(np.expm1(at.sums.lse - lse))
            row_error = float(changes[~np.isnan(at.sums.lse)].sum())
            problem.history[-1]["row_error"] = row_error
            if row_error <= ROW_ERROR:
                return at, True
        if problem.exhausted:
            return at, False
        lse = at.sums.lse
        potential = at.potential + at.sinkhorn_step(problem.target)
        iteration += 1


def _as_numpy(value: Any | None) -> Any | None:
    return value.detach().cpu().numpy() if value is not None and hasattr(value, "detach") else value
