"""Newton's method on candidates that lie on a CUDA device: rows, sums, Hessian products and solves, read back rarely.

Note [Rounds]
A solve on the device is a row of rounds: the sums or the product that the solve waits for, over all rows, then the
algebra of the columns, which decides what comes next. All that is known lies on the device, so rounds are launched
without waiting for one another; the host looks after so many of them whether the solve has ended (a round after the end
does nothing). Looking costs 20 to 50 us, a round of a small problem 5 to 10 us, rounds of no use as much again: the
host looks after 16 rounds, then after twice as many each time, up to 128. Solves take 10 to 600 rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels.device import first_line, usable

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import torch

    from sela_ext.kernels.device import CudaDevice
    from sela_ext.kernels.device_candidates import DeviceCandidates

    Vector = npt.NDArray[np.float64]

FIRST_LOOK, LAST_LOOK = 16, 128  # rounds after which the host looks, see Note [Rounds]
TRIALS = 12  # of a line search, at most
# The state of a solve, 64-bit numbers in the order of NewtonState in csrc/sela/newton_device.h.
STATE = np.dtype(
    [(name, np.int64) for name in ("phase", "steps", "products", "sums", "stalled", "step_products", "trial", "at")]
    + [("plan_is_here", np.int64)]
    + [(name, np.float64) for name in ("error", "value", "gauge_sum", "largest", "rz", "enough", "length", "change")]
)
DONE, FIRST = 0, 1  # phases of it


@dataclass(frozen=True)
class SolveOptions:
    """What an inner solve is asked for; see `newton_solve`."""

    ratio: float
    tolerance: float
    steps: int
    products: int
    clip: float
    reach: float
    prune: float
    strength: float = 0.0


@dataclass(frozen=True)
class Wanted:
    """What is wanted of the columns; see `newton_solve` and `ColumnLaw`. float64 [K] each, on the host."""

    target: Vector
    defect: Vector
    offset: Vector | None = None
    low: Vector | None = None
    high: Vector | None = None


# d, error, steps, products, sums, stalled: what `NewtonSolution` is made of.
Solved = tuple["Vector", float, int, int, int, bool]


def units_of(weight: float) -> float:
    """Integer units of 1.0 in sums over rows of so much weight, see Note [Units] in csrc/sela/newton_device.h."""
    return 2.0 ** (61 - math.frexp(weight)[1]) if weight > 0 else 1.0


def device_rows(candidates: DeviceCandidates) -> DeviceRows:
    """Rows for Newton's method where the candidates are: by the device's kernels, or by torch where it is refused."""
    card = usable(candidates.values.device)
    if card is not None:
        return CudaRows(card, candidates)
    from sela_ext.kernels.reference.newton_device import TorchRows

    return TorchRows(candidates)


class DeviceRows:
    """Candidates in the form that Newton's method works on, on a device; the methods of the compiled `NewtonRows`.

    Vectors of columns come and go as numpy arrays, plans stay on the device.

    Attributes:
        cols: K.
        rows: with two candidates or more.
        entries: of those rows.
        weight: of all rows with candidates.
    """

    cols: int
    rows: int
    entries: int
    weight: float

    def counts(self) -> Vector:
        """float64 [K]: weight of single rows."""
        raise NotImplementedError

    def sums(self, ratio: float, d: Vector) -> tuple[Vector, Vector, float, torch.Tensor]:
        """Column sums, diagonal of the Hessian, objective and plan at d."""
        raise NotImplementedError

    def product(self, plan: torch.Tensor, x: Vector) -> Vector:
        """The Hessian at a plan times x."""
        raise NotImplementedError

    def prune(self, plan: torch.Tensor, level: float) -> None:
        """Drop the entries of at most exp(-level) in a plan."""
        raise NotImplementedError

    def solve(self, wanted: Wanted, d: Vector, options: SolveOptions) -> Solved:
        """Newton's method from d."""
        raise NotImplementedError

    def check_plan(self, plan: torch.Tensor) -> torch.Tensor:
        """A plan of these rows.

        Raises:
            OptionError: of another number of entries.
        """
        if tuple(plan.shape) != (self.entries,):
            raise OptionError(f"plan: expected shape ({self.entries},), found {tuple(plan.shape)}")
        return plan


class CudaRows(DeviceRows):
    """Rows on a CUDA device whose kernels are in use.

    Args:
        card: the device.
        candidates: without overflow; they are empty afterwards.

    Raises:
        ResourceError: a launch that failed, or a stream that is being captured.
    """

    def __init__(self, card: CudaDevice, candidates: DeviceCandidates) -> None:
        import torch

        self._card = card
        self.cols = candidates.cols
        with card.current():
            card.refuse_capture("newton_rows")
            self._offsets = candidates.offsets.contiguous()
            self._columns = candidates.columns.contiguous()
            self._values = candidates.values.contiguous()
            self._weights = None if candidates.weights is None else candidates.weights.contiguous()
            self.rows, self.entries = len(self._offsets) - 1, len(self._values)
            there = self._offsets.diff() > 0
            total = there.sum() if self._weights is None else (self._weights.double() * there).sum()
            self.weight = float(total)
            self._units = units_of(self.weight)
            self._counts = torch.zeros(self.cols, dtype=torch.int64, device=card.place)
            candidates.offsets = candidates.offsets[:1]
            candidates.columns, candidates.values = candidates.columns[:0].clone(), candidates.values[:0].clone()
            self._compact(None, 0.0)

    def counts(self) -> Vector:
        """float64 [K]: weight of single rows."""
        counts: Vector = self._counts.cpu().numpy() / self._units
        return counts

    def sums(self, ratio: float, d: Vector) -> tuple[Vector, Vector, float, torch.Tensor]:
        """Column sums, diagonal of the Hessian, objective and plan at d."""
        import torch

        with self._card.current():
            self._card.refuse_capture("newton_sums")
            point = self._put(d)
            columns, totals, plan = self._sums()
            self._launch(
                self._card.core.newton_sums_cuda, ratio, point.data_ptr(), self._addresses(columns, totals, plan)
            )
            units = torch.stack([columns[0] + self._counts, columns[1], self._counts]).cpu().numpy() / self._units
            return units[0], units[1], float(totals.sum()) + float(units[2] @ d), plan

    def product(self, plan: torch.Tensor, x: Vector) -> Vector:
        """The Hessian at a plan times x."""
        largest = float(np.abs(x).max(initial=0.0))
        if not largest > 0:
            return np.zeros(self.cols)
        with self._card.current():
            self._card.refuse_capture("newton_product")
            point, (columns, totals, _) = self._put(x), self._sums()
            self._launch(
                self._card.core.newton_product_cuda,
                point.data_ptr(),
                largest,
                self._addresses(columns, totals, self.check_plan(plan)),
            )
            product: Vector = columns[0].cpu().numpy() / math.ldexp(self._units, -(math.frexp(largest)[1] + 2))
            return product

    def prune(self, plan: torch.Tensor, level: float) -> None:
        """Drop the entries of at most exp(-level) in a plan."""
        with self._card.current():
            self._card.refuse_capture("newton_prune")
            self._compact(self.check_plan(plan), level)

    def solve(self, wanted: Wanted, d: Vector, options: SolveOptions) -> Solved:
        """Newton's method from d: rounds on the device, of which the host sees little."""
        import torch

        core, place = self._card.core, self._card.place
        with self._card.current():
            self._card.refuse_capture("newton_solve")
            vectors = torch.zeros(core.NEWTON_VECTORS, self.cols, dtype=torch.float64, device=place)
            points = vectors[core.NEWTON_POINT :: core.NEWTON_PER_POINT]
            given = {name: value for name, value in vars(wanted).items() if value is not None}
            uploaded = self._put(np.stack([*given.values(), d]))
            points[0] = uploaded[-1]
            at = {name: uploaded[i].data_ptr() for i, name in enumerate(given)}
            state = np.zeros(1, STATE)
            state["phase"] = FIRST
            there = torch.from_numpy(state.view(np.int64)).to(place)
            columns, totals, plan = self._sums()
            rounds, left = FIRST_LOOK, options.steps * (options.products + TRIALS + 1) + 2
            while True:
                self._launch(
                    core.newton_rounds_cuda,
                    (*(at.get(name, 0) for name in ("target", "defect", "offset", "low", "high")), options.strength),
                    self._counts.data_ptr(),
                    max(self.weight, 1e-300),
                    math.fsum(wanted.target),
                    options.ratio,
                    options.tolerance,
                    options.steps,
                    options.products,
                    options.clip,
                    min(options.reach, 1e300),
                    options.prune > 0,
                    vectors.data_ptr(),
                    there.data_ptr(),
                    self._addresses(columns, totals, plan),
                    rounds,
                )
                seen = torch.cat([there.view(torch.float64), points.flatten()]).cpu().numpy()
                found = seen[: there.shape[0]].view(STATE)[0]
                left -= rounds
                if found["phase"] == DONE or left <= 0:
                    break
                rounds = min(2 * rounds, LAST_LOOK)
            if options.prune > 0:
                self._compact(plan, options.prune)
        solution = seen[there.shape[0] :].reshape(2, self.cols)[found["at"]].copy()
        return (
            solution,
            float(found["error"]),
            int(found["steps"]),
            int(found["products"]),
            int(found["sums"]),
            bool(found["stalled"]),
        )

    def _put(self, vector: Vector) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.array(vector, np.float64)).to(self._card.place)

    def _sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fresh column sums [2, K] of 0, objectives of tiles, and a plan."""
        import torch

        place, tiles = self._card.place, -(-self.rows // int(self._card.core.NEWTON_TILE_ROWS))
        return (
            torch.zeros(2, self.cols, dtype=torch.int64, device=place),
            torch.zeros(tiles, dtype=torch.float64, device=place),
            torch.empty(self.entries, dtype=torch.float32, device=place),
        )

    @staticmethod
    def _addresses(columns: torch.Tensor, totals: torch.Tensor, plan: torch.Tensor) -> tuple[int, int, int]:
        return columns.data_ptr(), totals.data_ptr(), plan.data_ptr()

    def _launch(self, kernel: Callable[..., None], *arguments: Any) -> None:
        rows = (
            self._offsets.data_ptr(),
            self._columns.data_ptr(),
            self._values.data_ptr(),
            0 if self._weights is None else self._weights.data_ptr(),
            self.rows,
            self.cols,
            self.entries,
            self._units,
        )
        try:
            kernel(rows, *arguments, self._card.stream())
        except RuntimeError as error:
            raise ResourceError(first_line(error)) from error

    def _compact(self, plan: torch.Tensor | None, level: float) -> None:
        """Keep the entries above exp(-level) of a plan, or all; rows that have one left are counted from then on."""
        import torch

        if self.rows == 0:
            return
        core, place = self._card.core, self._card.place
        address = 0 if plan is None else plan.data_ptr()
        kept = torch.empty(2, self.rows, dtype=torch.int64, device=place)
        self._launch(core.newton_count_cuda, address, level, kept.data_ptr(), self._counts.data_ptr())
        ends = kept.cumsum(1)
        entries, rows = (int(n) for n in ends[:, -1].tolist())
        offsets = torch.zeros(rows + 1, dtype=torch.int64, device=place)
        columns = torch.empty(entries, dtype=torch.int32, device=place)
        values = torch.empty(entries, dtype=torch.float32, device=place)
        weights = None if self._weights is None else torch.empty(rows, dtype=torch.float32, device=place)
        self._launch(
            core.newton_compact_cuda,
            address,
            level,
            ends.data_ptr(),
            offsets.data_ptr(),
            columns.data_ptr(),
            values.data_ptr(),
            0 if weights is None else weights.data_ptr(),
        )
        self._offsets, self._columns, self._values, self._weights = offsets, columns, values, weights
        self.rows, self.entries = rows, entries
