"""Newton's method on the candidates of a pass: sums, Hessian products and the whole inner solve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext import _core
from sela_ext.errors import OptionError
from sela_ext.kernels.device_candidates import DeviceCandidates
from sela_ext.kernels.newton_device import DeviceRows, SolveOptions, Wanted, device_rows
from sela_ext.kernels.sinkhorn import check_vector

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]

MAX_RATIO = 65536.0


@dataclass(frozen=True)
class NewtonSums:
    """What the candidates give at one d.

    Attributes:
        columns: float64 [K], sum over rows of weight times q[i, k].
        diagonal: float64 [K], sum of weight q (1 - q): the Hessian's diagonal.
        objective: sum of weight times log-sum-exp.
        plan: float32 [entries], q of the rows with two candidates or more; where the rows are.
    """

    columns: Vector
    diagonal: Vector
    objective: float
    plan: Any


@dataclass(frozen=True)
class NewtonSolution:
    """Where an inner solve ended.

    Attributes:
        d: float64 [K], the change of the potential, free of an arbitrary constant.
        error: sum_k |gradient_k| / weight there: an estimate, for the candidates are not the whole plan.
        steps: Newton steps.
        products: Hessian products, in all steps together.
        sums: evaluations of the sums.
        stalled: the tolerance was not reached.
    """

    d: Vector
    error: float
    steps: int
    products: int
    sums: int
    stalled: bool


@dataclass(frozen=True)
class ColumnLaw:
    """What is wanted of columns whose sums c need not be met exactly, with w = offset + d.

    Attributes:
        offset: float64 [K], nats.
        strength: nats, > 0: c = target exp(-w / strength), the optimum of columns relaxed by KL; 0: bounds it is.
        bounds: (low, high), float64 [K] each: low <= c <= high, c = low where w > 0, c = high where w < 0.
    """

    offset: Vector
    strength: float = 0.0
    bounds: tuple[Vector, Vector] | None = None


def newton_rows(candidates: Any) -> _core.NewtonRows | DeviceRows:
    """Rows with two candidates or more, and the count per column of those with one; takes the arrays over.

    The functions below take what comes of it. Rows of candidates on a CUDA device stay there, and so do plans; vectors
    of columns are numpy arrays all the same (see `sela_ext.kernels.newton_device`).

    Args:
        candidates: of a `sinkhorn_pass` with `keep`; they are empty afterwards.

    Raises:
        OptionError: there were too many candidates to keep.
        ResourceError: a launch that failed, or a stream that is being captured.
    """
    if candidates.overflow:
        raise OptionError("candidates: there were more than keep_at_most, none are there; raise it, or solve otherwise")
    return device_rows(candidates) if isinstance(candidates, DeviceCandidates) else _core.NewtonRows(candidates)


def newton_sums(rows: Any, d: Any, *, ratio: float = 1.0, threads: int = 0, isa: str = "") -> NewtonSums:
    """Column sums, Hessian diagonal, objective and plan on the candidates.

    In torch, with u = log p on the candidates and -inf elsewhere: ``t = ratio * u + d; q = softmax(t, 1)``, then
    ``(w[:, None] * q).sum(0)``, ``(w[:, None] * q * (1 - q)).sum(0)`` and ``(w * t.logsumexp(1)).sum()``; the
    objective leaves out the constant ratio * u of rows with a single candidate.

    Args:
        rows: from `newton_rows`.
        d: [K], nats: the new potential minus ratio times that of the pass.
        ratio: the new lambda divided by that of the pass, 1 .. 65536.
        threads: CPU threads, 0 for all; the bits do not depend on it.
        isa: CPU instruction set, "" for the one in use.

    Returns:
        NewtonSums.

    Raises:
        OptionError: an argument of a wrong shape or value.
    """
    point = check_vector("d", d, rows.cols)
    check_ratio(ratio)
    found = rows.sums(ratio, point) if isinstance(rows, DeviceRows) else rows.sums(ratio, point, threads, isa)
    return NewtonSums(*found)


def newton_prune(rows: Any, plan: Any, level: float) -> None:
    """Drop the entries of at most exp(-level) in a plan from the rows, in place: fewer remain at larger lambda.

    Args:
        rows: from `newton_rows`.
        plan: [entries], from `newton_sums`.
        level: nats, > 0.

    Raises:
        OptionError: an argument of a wrong shape or value.
    """
    if not level > 0:
        raise OptionError(f"level: expected a number of nats > 0, found {level}")
    rows.prune(plan if isinstance(rows, DeviceRows) else _plan(rows, plan), level)


def newton_product(rows: Any, plan: Any, x: Any, *, threads: int = 0, isa: str = "") -> Vector:
    """The Hessian of the objective at a plan, times x.

    In torch: ``(w[:, None] * q).sum(0) * x - (w[:, None] * q * (q @ x)[:, None]).sum(0)``.

    Args:
        rows: from `newton_rows`.
        plan: [entries], from `newton_sums`.
        x: [K].
        threads: CPU threads, 0 for all; the bits do not depend on it.
        isa: CPU instruction set, "" for the one in use.

    Returns:
        float64 [K].

    Raises:
        OptionError: an argument of a wrong shape or value.
    """
    point = check_vector("x", x, rows.cols)
    product: Vector
    if isinstance(rows, DeviceRows):
        product = rows.product(plan, point)
    else:
        product = rows.product(_plan(rows, plan), point, threads, isa)
    return product


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
    """Find d such that the column sums are the wanted ones, by truncated Newton-CG, all in one call.

    Minimises objective(d) + defect(d) - sum_k target_k d_k. With r = `defect`, the column sums that the candidates
    miss, defect(d) is r d where r < 0 and r exp(d) where r > 0: left-out entries grow with their column. Jacobi
    preconditioner, line search on the objective in float64; without convergence the last point is returned, the best in
    that objective.

    Args:
        rows: from `newton_rows`.
        target: [K] wanted column sums, >= 0, in all the weight of the rows; a column of target 0 stays as it is.
        defect: [K] column sums of the whole pass minus those of the candidates, at d = 0.
        d: [K] to start from.
        ratio: the new lambda divided by that of the pass, 1 .. 65536.
        tolerance: ends at sum_k |gradient_k| <= tolerance times the weight.
        steps: Newton steps, at most.
        products: Hessian products per step, at most.
        clip: nats that one step moves a column about at most, > 0.
        reach: nats that a column may move from its start, > 0. Beyond the level at which the candidates were kept,
            entries that were left out begin to count.
        prune: nats; > 0 drops the entries of at most exp(-prune) at the solution from the rows, as `newton_prune`.
        threads: CPU threads, 0 for all; the bits do not depend on it.
        isa: CPU instruction set, "" for the one in use.
        law: for columns that are relaxed or bounded; there the constant in d matters. None: sums equal to target.

    Returns:
        NewtonSolution.

    Raises:
        OptionError: an argument of a wrong shape or value.
    """
    clusters = rows.cols
    wanted = check_vector("target", target, clusters)
    if not (float(wanted.min()) >= 0 and float(wanted.sum()) > 0):
        raise OptionError(f"target: expected numbers >= 0 and one above, found {wanted.min()} .. {wanted.max()}")
    if not clip > 0:
        raise OptionError(f"clip: expected a number > 0, found {clip}")
    point = check_vector("d", d, clusters)
    missing = check_vector("defect", defect, clusters)
    offset, strength, low, high = check_law(law, clusters)
    if isinstance(rows, DeviceRows):
        options = SolveOptions(check_ratio(ratio), tolerance, steps, products, clip, reach, prune, strength)
        return NewtonSolution(*rows.solve(Wanted(wanted, missing, offset, low, high), point, options))
    return NewtonSolution(
        *rows.solve(
            wanted,
            missing,
            point,
            check_ratio(ratio),
            tolerance,
            steps,
            products,
            clip,
            reach,
            prune,
            threads,
            isa,
            offset,
            strength,
            low,
            high,
        )
    )


def check_law(law: ColumnLaw | None, clusters: int) -> tuple[Vector | None, float, Vector | None, Vector | None]:
    """Offset, strength, low and high of a law; None where there is none."""
    if law is None:
        return None, 0.0, None, None
    if (law.strength > 0) == (law.bounds is not None):
        raise OptionError(f"law: expected a strength > 0 or bounds, found {law.strength} and {law.bounds}")
    offset = check_vector("offset", law.offset, clusters)
    if law.bounds is None:
        return offset, float(law.strength), None, None
    low, high = (check_vector("bounds", bound, clusters) for bound in law.bounds)
    if not ((low >= 0).all() and (low <= high).all()):
        raise OptionError("bounds: expected 0 <= low <= high for every column")
    return offset, 0.0, low, high


def check_ratio(ratio: float) -> float:
    """A ratio of lambdas in 1 .. 65536."""
    if not 1 <= ratio <= MAX_RATIO:
        raise OptionError(f"ratio: expected a number in 1 .. {MAX_RATIO:.0f}, found {ratio}")
    return float(ratio)


def _plan(rows: Any, plan: Any) -> npt.NDArray[np.float32]:
    entries = np.ascontiguousarray(plan, np.float32)
    if entries.shape != (rows.entries,):
        raise OptionError(f"plan: expected shape ({rows.entries},), found {entries.shape}")
    return entries
