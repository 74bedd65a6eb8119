"""Torch twin of Newton's method on the candidates of a device: plain torch where they are, on any device.

The same steps as csrc/cuda/newton_kernels.cuh takes: sums over rows in integers, whose order does not matter, and
truncated Newton-CG. The algebra of the columns is on the host, which waits for each sum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sela_ext.kernels.newton import ColumnLaw
from sela_ext.kernels.newton_device import TRIALS, DeviceRows, Solved, SolveOptions, Wanted, units_of
from sela_ext.kernels.reference.newton import ColumnTerms

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from sela_ext.kernels.device_candidates import DeviceCandidates

    Vector = npt.NDArray[np.float64]

ROW_UNITS = 2.0**45  # of sums over a row, whose terms are at most 1


class TorchRows(DeviceRows):
    """Rows of candidates, in torch, where the candidates are.

    Args:
        candidates: without overflow; they are empty afterwards.
    """

    def __init__(self, candidates: DeviceCandidates) -> None:
        import torch

        self.cols = candidates.cols
        self._place = candidates.values.device
        lengths = candidates.offsets.diff()
        self.rows = len(lengths)
        self._row = torch.repeat_interleave(torch.arange(self.rows, device=self._place), lengths)
        self._columns = candidates.columns.long()
        self._values = candidates.values.double()
        given = candidates.weights
        self._weights = torch.ones(self.rows, dtype=torch.float64, device=self._place)
        if given is not None:
            self._weights = given.double()
        self.weight = float((self._weights * (lengths > 0)).sum())
        self._units = units_of(self.weight)
        self._counts = torch.zeros(self.cols, dtype=torch.int64, device=self._place)
        candidates.offsets = candidates.offsets[:1]
        candidates.columns, candidates.values = candidates.columns[:0].clone(), candidates.values[:0].clone()
        self._keep(torch.ones(len(self._row), dtype=torch.bool, device=self._place))

    def counts(self) -> Vector:
        """float64 [K]: weight of single rows."""
        counts: Vector = self._counts.cpu().numpy() / self._units
        return counts

    def sums(self, ratio: float, d: Vector) -> tuple[Vector, Vector, float, torch.Tensor]:
        """Column sums, diagonal of the Hessian, objective and plan at d."""
        import torch

        t = ratio * self._values + torch.from_numpy(np.array(d)).to(self._place)[self._columns]
        top = torch.full((self.rows,), -math.inf, dtype=torch.float64, device=self._place)
        top = top.scatter_reduce(0, self._row, t, "amax")
        e = (t - top[self._row]).exp()
        total = self._over_rows(e)
        q = e / total[self._row]
        share = self._weights[self._row] * q
        columns = self._over_columns(share, self._units) + self.counts()
        diagonal = self._over_columns(share * ((total[self._row] - e) / total[self._row]), self._units)
        objective = float((self._weights * (top + total.log())).sum()) + float(self.counts() @ d)
        return columns, diagonal, objective, q.float()

    def product(self, plan: torch.Tensor, x: Vector) -> Vector:
        """The Hessian at a plan times x."""
        import torch

        largest = float(np.abs(x).max(initial=0.0))
        if not largest > 0:
            return np.zeros(self.cols)
        q = self.check_plan(plan).double()
        step = torch.from_numpy(np.array(x)).to(self._place)[self._columns]
        mean = self._over_rows(q * step / largest) * largest / self._over_rows(q)
        moved = self._weights[self._row] * q * (step - mean[self._row])
        return self._over_columns(moved, math.ldexp(self._units, -(math.frexp(largest)[1] + 2)))

    def prune(self, plan: torch.Tensor, level: float) -> None:
        """Drop the entries of at most exp(-level) in a plan."""
        self._keep(self.check_plan(plan) > float(np.float32(math.exp(-level))))

    def solve(self, wanted: Wanted, d: Vector, options: SolveOptions) -> Solved:
        """Newton's method from d."""
        return _Solve(self, wanted, d, options).run()

    def _over_rows(self, terms: torch.Tensor) -> torch.Tensor:
        """Sums of the entries of each row, of terms within 1."""
        import torch

        sums = torch.zeros(self.rows, dtype=torch.int64, device=self._place)
        return sums.index_add_(0, self._row, (terms * ROW_UNITS).round().long()).double() / ROW_UNITS

    def _over_columns(self, terms: torch.Tensor, units: float) -> Vector:
        import torch

        sums = torch.zeros(self.cols, dtype=torch.int64, device=self._place)
        sums.index_add_(0, self._columns, (terms * units).round().long())
        columns: Vector = sums.cpu().numpy() / units
        return columns

    def _keep(self, kept: torch.Tensor) -> None:
        """Keep these entries; rows that have one left are counted from then on."""
        import torch

        lengths = torch.zeros(self.rows, dtype=torch.int64, device=self._place).index_add_(0, self._row, kept.long())
        single = kept & (lengths[self._row] == 1)
        weights = (self._weights[self._row[single]] * self._units).round().long()
        self._counts.index_add_(0, self._columns[single], weights)
        several = lengths > 1
        kept = kept & several[self._row]
        numbers = several.cumsum(0) - 1
        self._row, self._columns, self._values = numbers[self._row[kept]], self._columns[kept], self._values[kept]
        self._weights = self._weights[several]
        self.rows, self.entries = int(several.sum()), len(self._row)


class _Solve:
    """Truncated Newton-CG on rows that know their sums and products."""

    def __init__(self, rows: DeviceRows, wanted: Wanted, d: Vector, options: SolveOptions) -> None:
        self.rows, self.wanted, self.options = rows, wanted, options
        law = None
        if wanted.offset is not None:
            bounds = None if wanted.low is None or wanted.high is None else (wanted.low, wanted.high)
            law = ColumnLaw(wanted.offset, options.strength, bounds)
        self.exact = law is None
        self.weight = max(rows.weight, 1e-300)
        self.moving = wanted.target > 0
        first = rows.sums(options.ratio, d)
        self.gauge = np.where(self.moving, first[0], 0.0)
        if not self.gauge.sum() > 0:
            self.gauge = wanted.target
        self.columns = ColumnTerms(wanted.target, wanted.defect, law, self.gauge)
        self.d = np.array(d)
        shift = 0.0
        if self.exact:
            shift = float(self.gauge @ self.d) / self.gauge.sum()
            self.d[self.moving] -= shift
        self.finish(first, self.d, first[2] - shift * self.weight)

    def finish(self, found: tuple[Vector, Vector, float, torch.Tensor], d: Vector, objective: float) -> None:
        """Make a point with its sums the current one."""
        self.d, self.diagonal, self.plan = d, found[1], found[3]
        self.value, self.gradient, self.curvature, self.error = self.judged(found, d, objective)

    def judged(
        self, found: tuple[Vector, Vector, float, torch.Tensor], d: Vector, objective: float
    ) -> tuple[float, Vector, Vector, float]:
        """Value, gradient, curvature and error at d."""
        value, gradient, curvature = self.columns(d, found[0])
        if self.exact:
            gradient = gradient - self.gauge * (gradient.sum() / self.gauge.sum())
        return objective + value, gradient, curvature, float(np.abs(gradient).sum()) / self.weight

    def preconditioned(self, inverse: Vector, residual: Vector) -> Vector:
        """The residual divided by the diagonal, in the subspace that exact columns move in."""
        z = inverse * residual
        if self.exact:
            z[self.moving] -= float(self.gauge @ z) / self.gauge.sum()
        return z

    def step(self) -> tuple[Vector, int]:
        """The solution of the Newton equations by conjugate gradients, and the products that it took."""
        options, wanted = self.options, self.wanted
        extra = self.curvature + np.abs(self.gradient) / options.clip + 1e-9 * wanted.target
        extra += 1e-14 * wanted.target.sum()
        moves = self.columns.movable(self.d, self.gradient)
        inverse = np.where(moves, 1.0 / (self.diagonal + extra), 0.0)
        residual, x = -self.gradient, np.zeros_like(self.d)
        z = self.preconditioned(inverse, residual)
        direction = z
        rz = float(residual @ z)
        enough = rz * min(0.05, self.error) ** 2
        products = 0
        while products < options.products and rz > enough and rz > 0:
            product = np.where(moves, self.rows.product(self.plan, direction) + extra * direction, 0.0)
            products += 1
            if self.exact:
                product -= self.gauge * (product.sum() / self.gauge.sum())
            curvature = float(direction @ product)
            if not curvature > 0:
                break
            length = rz / curvature
            x += length * direction
            residual -= length * product
            z = self.preconditioned(inverse, residual)
            before, rz = rz, float(residual @ z)
            direction = z + rz / before * direction
        return x, products

    def longest(self, x: Vector, start: Vector) -> float:
        """How much of a step may be taken."""
        length = min(1.0, 2 * self.options.clip / max(float(np.abs(x).max()), 1e-300))
        used = x != 0
        room = (self.options.reach - np.sign(x[used]) * (self.d - start)[used]) / np.abs(x[used])
        return min(length, float(room.min(initial=np.inf)))

    def run(self) -> Solved:
        """Steps until the error is small enough, or none makes it better."""
        options, start = self.options, self.d.copy()
        steps = products = 0
        sums, stalled = 1, True
        while True:
            if self.error <= options.tolerance:
                stalled = False
                break
            if steps >= options.steps:
                break
            x, taken = self.step()
            products, steps = products + taken, steps + 1
            length = self.longest(x, start)
            if not length > 1e-6:
                break
            better, tried = self.advanced(x, length)
            sums += tried
            if not better:
                break
        if options.prune > 0:
            self.rows.prune(self.plan, options.prune)
        return self.d, self.error, steps, products, sums, stalled

    def advanced(self, x: Vector, length: float) -> tuple[bool, int]:
        """Take a part of the step that makes it better: whether there is one, and how many were looked at."""
        for tried in range(TRIALS):
            there = self.columns.moved(self.d, length * x, self.gradient)
            change = float(self.gradient @ (there - self.d))
            if not change < 0:
                return False, tried
            found = self.rows.sums(self.options.ratio, there)
            value, _, _, error = self.judged(found, there, found[2])
            if value <= self.value + 1e-4 * change or error < 0.9 * self.error:
                self.finish(found, there, found[2])
                return True, tried + 1
            length *= 0.5
        return False, TRIALS
