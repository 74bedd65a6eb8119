"""Anderson's acceleration of Sinkhorn iterations: the step, and many passes in one call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext import _core
from sela_ext.errors import OptionError
from sela_ext.kernels.sinkhorn import CpuPass, unit_of
from sela_ext.kernels.sinkhorn_sums import SinkhornSums, from_exact, like, sinkhorn_resolution

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AndersonPasses:
    """What many passes in one call came to.

    Attributes:
        converged: the last pass was at most the tolerance away.
        potential: float64 [K], that of the last pass.
        best: float64 [K], the potential of the smallest error.
        errors: float64 [passes], sum over columns of |share - target|, of each pass.
        objectives: float64 [passes], target . potential - sum_i a_i lse_i.
        seconds: float64 [passes], since the call.
        sums: of the last pass, labels too; None when there was no pass.
    """

    converged: bool
    potential: Vector
    best: Vector
    errors: Vector
    objectives: Vector
    seconds: Vector
    sums: SinkhornSums | None


def anderson_step(residual: Any, steps: Any, changes: Any, *, cap: float = math.inf) -> Vector:
    """The Anderson step (type II) from the residual f = log b - log col at g: f - (steps + changes)^T gamma.

    gamma minimises |f - changes^T gamma|, the changes scaled to length 1 first; those that add less than 1e-10 to the
    others count as none.

    Args:
        residual: f at the current point [K].
        steps: differences of successive potentials [m, K], oldest first, m < 64.
        changes: differences of the residuals at them [m, K].
        cap: nats; a step that goes further than this, and than twice the residual, is shortened to the larger of the
            two, its mean left out of account. One that is no number becomes the residual.

    Returns:
        float64 [K].

    Raises:
        OptionError: arguments of shapes that do not fit together.

    Example:
        >>> anderson_step([1.0, -1.0], [[0.5, -0.5]], [[-0.25, 0.25]])
        array([ 2., -2.])

    Source: Walker and Ni, Anderson acceleration for fixed-point iterations, 2011.
    """
    f, s, c = (np.ascontiguousarray(value, np.float64) for value in (residual, steps, changes))
    if f.ndim != 1 or s.shape != c.shape or s.ndim != 2 or s.shape[1:] != f.shape or not len(f) or len(s) > 63:
        raise OptionError(
            f"steps and changes: expected [m, K] with m < 64 and K = {f.size} as the residual's, found {s.shape} and "
            f"{c.shape}"
        )
    step: Vector = _core.anderson_next(f, s, c, cap)
    return step


def column_state(
    columns: Vector, weight: float, target: Vector, potential: Vector
) -> tuple[Vector, Vector, float, float]:
    """Shares, their logarithms (-inf for 0), sum over columns of |share - target|, and target . potential; [K] each."""
    return _core.column_state(columns, weight, target, potential)


def centred(x: Vector, target: Vector) -> Vector:
    """A vector [K] shifted so that target . x = 0."""
    return _core.centred(x, target)


def anderson_passes(
    prepared: CpuPass,
    target: Vector,
    potential: Vector,
    residual: Vector,
    error: float,
    *,
    scale: float,
    reference: npt.NDArray[Any] | None,
    steps: Vector,
    changes: Vector,
    tolerance: float,
    passes: int,
    memory: int = 10,
    cap: float = 10.0,
    restart: float = 3.0,
    patience: int = 40,
    faint: float = 1e-9,
) -> AndersonPasses:
    """Accelerated Sinkhorn iterations over all rows in one call, from a point whose residual is known.

    Each iteration is a pass at potential + step, with the step of `anderson_step` on the differences so far, at most
    `cap` nats or twice as far as the plain one. It ends when the error is at most the tolerance, when the passes are
    used up, and, unconverged, when something is odd: a potential that is no number, an error of `restart` times the
    best, a column with less than `faint` of its target, `patience` passes that have not halved the error. For what then
    is to be done ask `sela_ext.assign`, which does without this call when it is shown the progress.

    Args:
        prepared: the logits, all the rows of the matrix.
        target: [K] shares of the columns, > 0, of sum 1.
        potential: [K] log beta in nats; float32 numbers unless the logits are float64.
        residual: [K] log target - log share there, shifted so that target . residual = 0.
        error: sum over columns of |share - target| there.
        scale: lambda > 0.
        reference: [N] log-sum-exp of an earlier pass, of its type, or None.
        steps: [m, K] differences of potentials before, oldest first, m <= memory.
        changes: [m, K] of their residuals.
        tolerance: error to end at.
        passes: at most so many.
        memory: differences that are kept, 1 .. 63.
        cap: nats.
        restart: of the best error.
        patience: passes.
        faint: of a column's target.

    Returns:
        AndersonPasses.

    Raises:
        OptionError: more differences than the memory.
    """
    if not 1 <= memory <= 63 or len(steps) > memory:
        raise OptionError(f"memory: expected 1 .. 63 and at least the {len(steps)} steps given, found {memory}")
    stored = prepared.stored
    unit, maxima, maxima_scale = scale, 0, 0.0
    if stored is not None:
        unit, maxima, maxima_scale = unit_of(stored, scale), stored.maxima.ctypes.data, scale
    found = _core.anderson_cpu(
        *prepared.addresses,
        unit,
        prepared.weights_at,
        prepared.largest_weight,
        maxima,
        maxima_scale,
        reference,
        target,
        np.log(target),
        potential,
        residual,
        error,
        steps,
        changes,
        tolerance,
        passes,
        memory,
        cap,
        restart,
        patience,
        faint,
        prepared.threads,
        prepared.isa,
    )
    sums = None
    if len(found["errors"]):
        exact, rows, largest = found["exact"], prepared.rows, prepared.largest_weight
        _, objective, weight, masked = from_exact(exact, rows, largest)
        sums = SinkhornSums(
            like(prepared.logits, exact[: prepared.cols] * sinkhorn_resolution(rows, largest)),
            objective,
            weight,
            like(prepared.logits, found["lse"]),
            like(prepared.logits, found["labels"]),
            masked,
            None,
            exact,
            rows,
            largest,
            rows * prepared.cols,
            found["live"],
        )
    return AndersonPasses(
        found["converged"],
        found["potential"],
        found["best"],
        found["errors"],
        found["objectives"],
        found["seconds"],
        sums,
    )
