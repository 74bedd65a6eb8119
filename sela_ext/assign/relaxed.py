"""Cluster shares that need not be met exactly: pulled towards their targets (`relax`), or kept in `size_bounds`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.anderson import solve_anderson
from sela_ext.assign.problem import Evaluation, Problem
from sela_ext.assign.sinkhorn import solve_sinkhorn
from sela_ext.errors import OptionError
from sela_ext.kernels.newton import ColumnLaw
from sela_ext.kernels.sinkhorn import check_vector

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]

STRETCH = 40  # passes of the first stretch


@dataclass(frozen=True)
class RelaxedEvaluation(Evaluation):
    """An evaluation whose next step is that of relaxed columns.

    Attributes:
        step: what one Sinkhorn iteration adds to the potential.
    """

    step: Vector

    def excess(self, target: Vector) -> float:
        """The part of the error that a potential can remove: all of it, impossible columns are not counted."""
        return self.error

    def sinkhorn_step(self, target: Vector) -> Vector:
        """Return what one iteration adds to the potential."""
        return self.step


@dataclass
class RelaxedProblem(Problem):
    """A problem whose column sums are free within a rule; its potential is fixed, not only up to a constant.

    With w = g - log b, one iteration is g <- log b + tau (g - log col), tau = lambda rho / (1 + lambda rho), for
    columns relaxed with strength rho, and g <- median(g + log low - log col, log b, g + log high - log col) for
    bounded ones. The error is sum_k |col_k - col_k exp(step_k)|: the distance to the shares that the rule asks for at
    this potential, which for columns that must be met is the plain error.

    A constant added to g changes no share, but what is asked of them; each step ends at the best constant, the maximum
    of the dual objective, or it would be approached slowly, by as much as the asked shares miss a sum of 1.

    Attributes:
        rho: strength of the pull, > 0, or None.
        bounds: [2, K] smallest and largest size in images (units of row weight), or None.
    """

    rho: float | None = None
    bounds: Vector | None = None
    _weight: float = 1.0  # of all rows, as the latest pass knows it

    @property
    def is_weak(self) -> bool:
        """Whether each iteration shrinks the error to a half or less, so that nothing more is needed."""
        return self.rho is not None and self.lam * self.rho < 1

    def scaled(self, potential: Vector, ratio: float) -> Vector:
        """The same w at another lambda."""
        log_target = np.log(self.target)
        scaled: Vector = log_target + (potential - log_target) * ratio
        return scaled

    def centred(self, potential: Vector) -> Vector:
        """The potential itself: a shift would change what it asks of the columns."""
        return potential

    def column_law(self, potential: Vector, factor: float, weight: float) -> ColumnLaw | None:
        """What a potential at factor * lambda asks of the columns of rows of this weight."""
        log_target = np.log(self.target)
        w = potential - log_target
        if self.rho is not None:
            return ColumnLaw(w, strength=factor * self.lam * self.rho)
        assert self.bounds is not None
        low, high = self.bounds / self._weight * weight
        return ColumnLaw(w, bounds=(low, high))

    def judged(self, at: Evaluation, factor: float, every: int) -> Evaluation:
        """The same with error, objective and step of the relaxed problem.

        Raises:
            OptionError: no sizes within the bounds sum to the number of images.
        """
        plain = at
        possible = plain.log_shares > -np.inf
        g, log_target = plain.potential, np.log(self.target)
        log_shares = np.where(possible, plain.log_shares, log_target)
        w = g - log_target
        dual = plain.objective - float(self.target @ g)  # - sum_i a_i lse_i
        if self.rho is not None:
            strength = factor * self.lam * self.rho
            step = log_target + strength / (1 + strength) * (g - log_shares) - g
            with np.errstate(over="ignore"):
                dual -= strength * math.fsum(self.target * np.expm1(-w / strength))
        else:
            low, high = self._shares_of_bounds(plain.sums.weight, possible, every)
            with np.errstate(divide="ignore"):
                least, most = np.log(low) - log_shares, np.log(high) - log_shares
            step = np.minimum(np.maximum(-w, least), most)  # the median: least <= most
            dual += math.fsum(np.where(w > 0, low, high) * w)
        step = np.where(possible, step, 0.0)
        moved = w + step
        if self.rho is not None:
            shift = strength * float(np.logaddexp.reduce((log_target - moved / strength)[possible]))
        else:
            shift = -_zero_crossing(moved[possible], low[possible], high[possible])
        asked = np.exp(np.minimum(log_shares + step, 1.0))
        errors = np.where(possible, np.abs(plain.shares - asked), 0.0)
        error = float(errors.sum())
        fields = {**vars(plain), "error": error, "objective": dual}
        return RelaxedEvaluation(**fields, step=step + shift)

    def _shares_of_bounds(self, weight: float, possible: npt.NDArray[np.bool_], every: int) -> tuple[Vector, Vector]:
        assert self.bounds is not None
        low, high = self.bounds
        if every > 1:  # a part of the rows
            self._weight = weight * (self.rows / self.rows_read(every))
            return low / self._weight, high / self._weight
        self._weight = weight
        if not (low[possible].sum() <= weight * (1 + 1e-9) and high[possible].sum() >= weight * (1 - 1e-9)):
            raise OptionError(
                f"size_bounds: expected bounds whose sums lie around the {weight:g} images, found "
                f"{low[possible].sum():g} and {high[possible].sum():g}; widen them"
            )
        return low / weight, high / weight


def _zero_crossing(w: Vector, low: Vector, high: Vector) -> float:
    """Where sum of low over w > x plus sum of high over w < x passes 1: the w that is to be 0."""
    order = np.argsort(w, kind="stable")
    below = np.cumsum(high[order]) + (low.sum() - np.cumsum(low[order]))  # the sum just above each w
    place = min(int(np.searchsorted(below, 1.0)), len(w) - 1)
    return float(w[order[place]])


def solve_bounded(problem: Problem, start: Vector) -> Evaluation:
    """Anderson and plain iterations in turn, in longer and longer stretches.

    The step of bounded columns has kinks, at which acceleration may go round in circles; plain iterations do not.
    """
    limit, stretch = problem.max_passes, STRETCH
    try:
        while True:
            for solve in (solve_anderson, solve_sinkhorn):
                problem.max_passes = min(limit, math.ceil(problem.full_passes) + stretch)
                at = solve(problem, start)
                start = at.potential
                if problem.full_passes + 1 > limit or (problem.tol > 0 and at.excess(problem.target) <= problem.tol):
                    return at
            stretch *= 2
    finally:
        problem.max_passes = limit


def check_relax(relax: Any) -> float:
    """The strength rho of relaxed columns, > 0."""
    number = isinstance(relax, (int, float, np.integer, np.floating)) and not isinstance(relax, bool)
    if not number or not math.isfinite(relax) or not 1e-6 <= relax <= 1e6:
        raise OptionError(f"relax: expected a number in 1e-06 .. 1e+06, found {relax!r}")
    return float(relax)


def check_bounds(size_bounds: Any, clusters: int) -> Vector:
    """Smallest and largest sizes [2, K] in images from (low, high), each a number or [K]."""
    try:
        low, high = size_bounds
    except (TypeError, ValueError) as error:
        raise OptionError(f"size_bounds: expected (low, high), found {size_bounds!r}") from error
    sizes = [np.full(clusters, value) if np.ndim(value) == 0 else value for value in (low, high)]
    bounds = np.stack([check_vector("size_bounds", value, clusters) for value in sizes])
    if not ((bounds[0] >= 0).all() and (bounds[0] <= bounds[1]).all() and (bounds[1] > 0).all()):
        raise OptionError("size_bounds: expected 0 <= low <= high and high > 0 for every cluster")
    return bounds


def relaxed_problem(problem: Problem, relax: Any, size_bounds: Any) -> RelaxedProblem:
    """The same problem with relaxed or bounded columns.

    Raises:
        OptionError: both are given, or one is out of range.
    """
    if relax is not None and size_bounds is not None:
        raise OptionError("relax, size_bounds: expected one of them, found both")
    return RelaxedProblem(
        problem.logits,
        problem.lam,
        problem.target,
        problem.row_weights,
        problem.threads,
        problem.max_passes,
        problem.tol,
        problem.shard,
        rho=None if relax is None else check_relax(relax),
        bounds=None if size_bounds is None else check_bounds(size_bounds, len(problem.target)),
    )
