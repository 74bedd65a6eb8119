"""Numpy twin of the candidates and of Newton's method on them: dense matrices, exact linear solves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.errors import OptionError
from sela_ext.kernels.newton import ColumnLaw, NewtonSolution, NewtonSums, check_ratio
from sela_ext.kernels.sinkhorn import check_vector

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]


class Candidates:
    """What `sinkhorn_pass` keeps of the rows read; the same methods as the compiled one."""

    def __init__(self, log_p: Vector, weights: npt.NDArray[np.float32] | None, level: float, limit: int) -> None:
        """Keep the entries of log_p [rows, K] above -level; rows of nothing but -inf have none."""
        self.rows, self.cols = log_p.shape
        self.level, self.limit = level, limit
        mask = log_p > -level
        self.overflow = int(mask.sum()) > limit
        self._mask = np.zeros_like(mask) if self.overflow else mask
        self._log_p = log_p
        self._weights = np.empty(0, np.float32) if weights is None or self.overflow else weights
        self.entries = int(self._mask.sum())

    def append(self, other: Candidates) -> None:
        """Add the rows of another part behind these."""
        entries = self.entries + other.entries
        self.overflow = self.overflow or other.overflow or entries > self.limit
        self.rows += other.rows
        self._mask = np.concatenate([self._mask, other._mask]) & (not self.overflow)
        self._log_p = np.concatenate([self._log_p, other._log_p])
        self._weights = np.concatenate([self._weights, other._weights])[: 0 if self.overflow else None]
        self.entries = int(self._mask.sum())

    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [rows + 1]; empty when there were too many."""
        if self.overflow:
            return np.empty(0, np.int64)
        return np.concatenate([[0], np.cumsum(self._mask.sum(1))]).astype(np.int64)

    def columns(self) -> npt.NDArray[Any]:
        """uint16 or uint32 [entries]."""
        return np.nonzero(self._mask)[1].astype(np.uint16 if self.cols <= 65536 else np.uint32)

    def values(self) -> npt.NDArray[np.float32]:
        """float32 [entries]: log p."""
        return self._log_p[self._mask].astype(np.float32)

    def weights(self) -> npt.NDArray[np.float32]:
        """float32 [rows], or empty: all 1."""
        return self._weights


class NewtonRows:
    """Rows with two candidates or more as a dense matrix, -inf where there is none."""

    def __init__(self, candidates: Any, cols: int) -> None:
        """Take the arrays of candidates, compiled or not, of a matrix with so many columns."""
        offsets, columns, values = candidates.offsets(), candidates.columns(), candidates.values()
        n = len(offsets) - 1
        self.values = np.full((n, cols), -np.inf)
        self.values[np.repeat(np.arange(n), np.diff(offsets)), columns] = values
        self.row_weights = np.ones(n) if not len(candidates.weights()) else candidates.weights().astype(np.float64)
        self.weight = float(self.row_weights[np.diff(offsets) > 0].sum())
        self._counts = np.zeros(cols)
        self._settle()

    def _settle(self) -> None:
        kept = np.isfinite(self.values)
        single = kept.sum(1) == 1
        np.add.at(self._counts, kept[single].argmax(1), self.row_weights[single])
        several = kept.sum(1) > 1
        self.values, self.row_weights = self.values[several], self.row_weights[several]

    def counts(self) -> Vector:
        """float64 [K]: weight of single rows."""
        return self._counts

    @property
    def rows(self) -> int:
        """Rows with several candidates."""
        return len(self.values)

    @property
    def entries(self) -> int:
        """Their entries."""
        return int(np.isfinite(self.values).sum())

    def plan_matrix(self, plan: npt.NDArray[np.float32]) -> Vector:
        """Entries of a plan as a dense matrix."""
        dense = np.zeros_like(self.values)
        dense[np.isfinite(self.values)] = plan
        return dense

    def prune(self, plan: npt.NDArray[np.float32], level: float) -> None:
        """Drop the entries of at most exp(-level)."""
        self.values[self.plan_matrix(plan) <= np.float32(math.exp(-level))] = -np.inf
        self._settle()


def newton_rows(candidates: Any, cols: int | None = None) -> NewtonRows:
    """The same as `sela_ext.kernels.newton_rows`; compiled candidates need the number of columns."""
    if candidates.overflow:
        raise OptionError("candidates: there were more than keep_at_most, none are there; raise it, or solve otherwise")
    return NewtonRows(candidates, candidates.cols if cols is None else cols)


def newton_sums(rows: Any, d: Any, *, ratio: float = 1.0, threads: int = 0, isa: str = "") -> NewtonSums:
    """The same as `sela_ext.kernels.newton_sums`; `threads` and `isa` change nothing."""
    point = check_vector("d", d, len(rows.counts()))
    t = check_ratio(ratio) * rows.values + point
    top = t.max(axis=1, keepdims=True)
    e = np.exp(t - top)
    q = e / e.sum(axis=1, keepdims=True)
    w = rows.row_weights[:, None]
    objective = float((w * (np.log(e.sum(axis=1, keepdims=True)) + top)).sum() + rows.counts() @ point)
    columns = rows.counts() + (w * q).sum(axis=0)
    return NewtonSums(columns, (w * q * (1 - q)).sum(axis=0), objective, q[np.isfinite(t)].astype(np.float32))


def newton_prune(rows: Any, plan: Any, level: float) -> None:
    """The same as `sela_ext.kernels.newton_prune`."""
    rows.prune(np.asarray(plan, np.float32), level)


def newton_product(rows: Any, plan: Any, x: Any, *, threads: int = 0, isa: str = "") -> Vector:
    """The same as `sela_ext.kernels.newton_product`; `threads` and `isa` change nothing."""
    q, w = rows.plan_matrix(np.asarray(plan, np.float32)), rows.row_weights[:, None]
    point = check_vector("x", x, len(rows.counts()))
    product: Vector = (w * q).sum(axis=0) * point - (w * q * (q @ point)[:, None]).sum(axis=0)
    return product


class ColumnTerms:
    """Value, gradient and curvature of what is wanted of the columns, and of the defect."""

    def __init__(self, target: Vector, defect: Vector, law: ColumnLaw | None, gauge: Vector) -> None:
        self.target, self.defect, self.law, self.gauge = target, defect, law, gauge

    def __call__(self, d: Vector, sums: Vector) -> tuple[float, Vector, Vector]:
        """At d, where the rows' column sums are these."""
        moving = self.target > 0
        share = self.gauge / self.gauge.sum()
        relative = d if self.law is None else d - share @ d
        grown = np.where(self.defect > 0, self.defect * np.exp(relative), self.defect)
        value = np.where(self.defect > 0, grown, self.defect * relative)
        curvature = np.where(self.defect > 0, grown, 0.0)
        sums = sums + grown
        if self.law is not None:
            sums = sums - grown[moving].sum() * share
        if self.law is None:
            value, gradient = value - self.target * d, sums - self.target
        elif self.law.bounds is None:
            asked = self.target * np.exp(-(self.law.offset + d) / self.law.strength)
            value, gradient = value + self.law.strength * asked, sums - asked
            curvature = curvature + asked / self.law.strength
        else:
            w, (low, high) = self.law.offset + d, self.law.bounds
            value = value - np.where(w > 0, low, high) * w
            at_kink = np.where(sums < low, sums - low, np.where(sums > high, sums - high, 0.0))
            gradient = np.where(w > 0, sums - low, np.where(w < 0, sums - high, at_kink))
        return float(value[moving].sum()), np.where(moving, gradient, 0.0), curvature

    def moved(self, d: Vector, step: Vector, gradient: Vector) -> Vector:
        """The point a step away; no bounded column crosses its kink."""
        new: Vector = d + step
        if self.law is None or self.law.bounds is None:
            return new
        before, after = self.law.offset + d, self.law.offset + new
        stop = np.where(before != 0, before * after < 0, after * gradient > 0) & (step != 0)
        return np.where(stop, -self.law.offset, new)

    def movable(self, d: Vector, gradient: Vector) -> npt.NDArray[np.bool_]:
        """Columns that take part in a step."""
        moving = self.target > 0
        if self.law is not None and self.law.bounds is not None:
            moving &= (gradient != 0) | (self.law.offset + d != 0)
        return moving


def _newton_step(
    rows: Any, found: NewtonSums, extra: Vector, gradient: Vector, moving: npt.NDArray[np.bool_], gauge: Vector | None
) -> Vector:
    """The exact solution of (H + diag(extra)) x = -gradient over moving columns; with a gauge where gauge . x = 0."""
    q, w = rows.plan_matrix(found.plan), rows.row_weights[:, None]
    hessian = (np.diag((w * q).sum(axis=0) + extra) - (w * q).T @ q)[np.ix_(moving, moving)]
    x = np.zeros(len(gradient))
    if gauge is None:
        x[moving] = np.linalg.solve(hessian, -gradient[moving])
        return x
    edge = gauge[moving, None]
    system = np.block([[hessian, edge], [edge.T, np.zeros((1, 1))]])
    x[moving] = np.linalg.solve(system, np.append(-gradient[moving], 0.0))[:-1]
    return x


def newton_solve(
    rows: Any,
    target: Any,
    defect: Any,
    d: Any,
    *,
    ratio: float = 1.0,
    tolerance: float = 1e-6,
    steps: int = 40,
    products: int = 400,
    clip: float = 4.0,
    reach: float = math.inf,
    prune: float = 0.0,
    threads: int = 0,
    isa: str = "",
    law: ColumnLaw | None = None,
) -> NewtonSolution:
    """The same as `sela_ext.kernels.newton_solve`, with the Hessian as a matrix and its exact solution.

    `products`, `threads` and `isa` change nothing.
    """
    t, r = np.asarray(target, np.float64), np.asarray(defect, np.float64)
    sums = 0
    gauge = np.where(t > 0, newton_sums(rows, d, ratio=ratio).columns, 0.0)
    at = np.array(d, np.float64)
    if law is None:
        at[t > 0] -= gauge @ at / gauge.sum()
    columns = ColumnTerms(t, r, law, gauge)

    def evaluate(point: Vector) -> tuple[float, Vector, Vector, NewtonSums]:
        nonlocal sums
        sums += 1
        found = newton_sums(rows, point, ratio=ratio)
        value, gradient, curvature = columns(point, found.columns)
        if law is None:
            gradient = gradient - gauge * gradient.sum() / gauge.sum()
        return found.objective + value, gradient, curvature, found

    start = at.copy()
    value, gradient, curvature, found = evaluate(at)
    now = float(np.abs(gradient).sum()) / rows.weight
    taken = 0
    while now > tolerance and taken < steps:
        extra = curvature + np.abs(gradient) / clip + 1e-9 * t + 1e-14 * t.sum()
        moving = columns.movable(at, gradient)
        x = _newton_step(rows, found, extra, gradient, moving, gauge if law is None else None)
        taken += 1
        length = min(1.0, 2 * clip / max(float(np.abs(x).max()), 1e-300))
        if math.isfinite(reach):
            used = x != 0
            room = (reach - np.sign(x[used]) * (at - start)[used]) / np.abs(x[used])
            length = min(length, float(room.min(initial=np.inf)))
        while length > 1e-6:
            there = columns.moved(at, length * x, gradient)
            change = float(gradient @ (there - at))
            new = evaluate(there)
            error = float(np.abs(new[1]).sum()) / rows.weight
            if new[0] <= value + 1e-4 * change or error < 0.9 * now:
                break
            length /= 2
        else:
            break
        at = there
        (value, gradient, curvature, found), now = new, error
    if prune > 0:
        newton_prune(rows, found.plan, prune)
    return NewtonSolution(at, now, taken, 0, sums, now > tolerance)
