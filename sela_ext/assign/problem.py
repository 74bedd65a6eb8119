"""An assignment problem: the logits, what is wanted, and the one operation that solvers need of them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.marginals import EMPTY
from sela_ext.assign.shards import Shard
from sela_ext.assign.sources import bounds_of, device_columns, logits_pass, on_cuda, rows_of, whole_pass
from sela_ext.errors import DataError
from sela_ext.kernels.anderson import anderson_passes, centred, column_state
from sela_ext.kernels.anderson_device import AndersonDevice, stage_length
from sela_ext.kernels.device import is_tensor
from sela_ext.kernels.logits import StoredLogits
from sela_ext.kernels.sinkhorn import CpuPass, DevicePass, check_logits, rows_read
from sela_ext.kernels.sinkhorn_sums import SinkhornSums, sinkhorn_resolution

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt
    import torch

    from sela_ext.kernels.bounds import ChunkBounds
    from sela_ext.kernels.newton import ColumnLaw

    Vector = npt.NDArray[np.float64]

# Columns that receive less than this part of their share are summed again, exactly and in the log domain: the pass
# leaves out terms 26 nats below the row's sum.
FAINT = 1e-9
AT_ONCE = 1 << 22  # terms of faint columns that are kept in memory, instead of being computed twice
# Passes write and use chunk bounds from the moment on that they compute less than this part of the terms.
PEAKED = 0.2
# Below this many entries labels are computed in every pass: they cost next to nothing.
SMALL = 10_000_000
ROUNDING = 1e-3  # an error below which a stall may be that of float32


@dataclass(frozen=True)
class Evaluation:
    """One pass at one potential: the true state of the problem there.

    Attributes:
        potential: float64 [K], exactly the numbers that the kernel used.
        shares: column sums divided by the total weight [K].
        log_shares: their logarithm, exact for columns that underflow; -inf for one that no row can go to.
        error: sum over columns of |shares - b|.
        objective: sum_k b_k g_k - sum_i a_i lse_i, a = row weights of sum 1; the semi-dual, largest at the solution.
        sums: what the kernel returned.
        plain: every column is to receive something, and receives a part of it that is not faint.
    """

    potential: Vector
    shares: Vector
    log_shares: Vector
    error: float
    objective: float
    sums: SinkhornSums
    plain: bool

    @property
    def candidates(self) -> Any:
        """The entries that count, of a pass that kept them."""
        return self.sums.candidates

    def excess(self, target: Vector) -> float:
        """The part of the error that a potential can remove: impossible columns cost twice their share for ever."""
        if self.plain:
            return self.error
        return self.error - 2 * float(target[self.log_shares == -np.inf].sum())

    def sinkhorn_step(self, target: Vector) -> Vector:
        """Return log b - log col: what one Sinkhorn iteration adds to the potential; 0 for impossible columns."""
        if self.plain:
            return np.log(target) - self.log_shares
        moving = (self.log_shares > -np.inf) & (target > 0)
        log_target = np.log(target, out=np.zeros(len(target)), where=moving)
        return np.subtract(log_target, self.log_shares, out=np.zeros(len(target)), where=moving)


@dataclass
class Problem:
    """Logits [N, K] with lambda, column shares b and row weights; counts its passes and keeps their history.

    `passes` also counts the parts of a pass that read single columns; `full_passes` is what max_passes limits. A pass
    over a part of the rows counts as that part. With rows spread over ranks, the logits and row weights are those of
    this rank; all that is counted or summed is of the whole matrix.
    The row log-sum-exp of the latest pass is kept as the reference of the next one. `stored` is a copy of the logits
    that passes read instead, as long as it is there; `most_candidates` per row is what memory allows. `progress` is
    called with each entry of the history.
    """

    logits: Any
    lam: float
    target: Vector
    row_weights: Any | None
    threads: int
    max_passes: int
    tol: float
    shard: Shard = field(default_factory=Shard)
    full_passes: float = 0.0
    passes: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    stored: Any | None = None
    most_candidates: float = math.inf
    progress: Callable[[dict[str, float]], None] | None = None
    _reference: Any | None = None
    _reference_factor: float = 1.0
    _live_share: float = 1.0
    _bounds: ChunkBounds | None = None
    _bounded: Any | None = None
    _whole: CpuPass | DevicePass | None = None
    _passed: Any | None = None
    _start: float = field(default_factory=time.perf_counter)

    @cached_property
    def all_wanted(self) -> bool:
        """Whether every column is to receive something."""
        return bool((self.target > 0).all())

    @cached_property
    def faint_level(self) -> Vector:
        """Shares below which columns are summed again."""
        return FAINT * self.target

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the problem was made."""
        return time.perf_counter() - self._start

    @property
    def exhausted(self) -> bool:
        """Whether no whole pass is left."""
        return self.full_passes + 1 > self.max_passes

    @property
    def last(self) -> bool:
        """Whether only one whole pass is left."""
        return self.full_passes + 2 > self.max_passes

    @property
    def on_cuda(self) -> bool:
        """Whether the logits are on a CUDA device (those of the official rule are on the CPU)."""
        return on_cuda(self.logits)

    @property
    def working(self) -> Any:
        """What passes read: the logits, or a copy of them."""
        return self.logits if self.stored is None else self.stored

    @property
    def dtype(self) -> str:
        """The type, or kind of storage, of what passes read, by name."""
        return check_logits(self.working)

    @property
    def rows(self) -> int:
        """Rows of the whole matrix."""
        return self.shard.rows_in_all(int(self.logits.shape[0]))

    @property
    def own(self) -> slice:
        """Where the rows of this process lie in the whole matrix."""
        return self.shard.own(int(self.logits.shape[0]))

    def turn_to_float64(self, best: Evaluation) -> bool:
        """Where the rounding of float32 is what keeps a small problem from its tol, passes read a copy in float64.

        Returns:
            Whether they do so from now on.
        """
        is_array = is_tensor(self.logits) or isinstance(self.logits, np.ndarray)
        fits = is_array and self.rows * int(self.logits.shape[1]) <= SMALL
        if best.error > ROUNDING or not fits or self.stored is not None or self.dtype == "float64":
            return False
        self.stored = self.logits.detach().double() if is_tensor(self.logits) else np.asarray(self.logits, np.float64)
        self.lam = float(np.float32(self.lam))  # as the passes before rounded it
        self._reference = None
        return True

    def rounded(self, potential: Vector) -> Vector:
        """The potential as the kernel will see it: float32 numbers unless the logits are float64.

        That of clusters which are to get nothing is pinned far below all others.
        """
        if not self.all_wanted:
            potential = np.where(self.target > 0, potential, EMPTY)
        if self.dtype == "float64":
            return potential.astype(np.float64)
        return potential.astype(np.float32).astype(np.float64)

    def rows_read(self, every: int) -> int:
        """Rows in every so many groups of rows, beginning with the first."""
        return rows_read(self.rows, every)

    def evaluate(
        self,
        potential: Vector,
        *,
        previous: Evaluation | None = None,
        labels: bool = False,
        keep: float | None = None,
        keep_per_row: float = 0.0,
        factor: float = 1.0,
        every: int = 1,
        look: bool = False,
    ) -> Evaluation:
        """Run one pass at a potential; labels come along when this pass may well be the last.

        Args:
            potential: [K], for factor * lambda.
            previous: the evaluation before, which tells how near the end is.
            labels: compute labels in any case.
            keep: also return the entries with p > exp(-keep), see `sinkhorn_pass`.
            keep_per_row: unless there are more than so many per row.
            factor: of lambda; the history then names the lambda of the pass.
            every: read every so many groups of rows; the history then names the number of rows.
            look: log_shares need not be exact for faint columns: what is wanted is a start, not an end.

        Raises:
            DataError: no row is left that counts.
        """
        rows, cols = self.rows, int(self.logits.shape[1])
        whole = every == 1 and factor == 1.0
        labels = whole and (
            labels or rows * cols <= SMALL or self.last or (previous is not None and previous.error <= 100 * self.tol)
        )
        potential = self.rounded(potential)
        read = self.rows_read(every)
        reference = self._reference
        if reference is not None and factor != self._reference_factor:
            with np.errstate(over="ignore"):  # exact where one entry has all of a row
                reference = reference * (factor / self._reference_factor)
        sums = self._pass(
            potential,
            scale=self.lam * factor,
            reference=reference,
            want_labels=labels,
            every=every,
            keep=keep,
            keep_at_most=int(keep_per_row * read),
            bounds=self._bounds_for(every),
        )
        self._live_share = sums.live_share  # of the rows here: bounds change no bit
        sums = self.shard.add(sums, potential, f"over 1/{every} of the rows at {factor} lambda, keeping {keep} nats")
        self._reference, self._reference_factor = sums.lse, factor
        self.full_passes += read / rows
        self.passes += read / rows
        if not sums.weight > 0 and every > 1:  # an unlucky part
            return self.evaluate(
                potential,
                previous=previous,
                labels=labels,
                keep=keep,
                keep_per_row=keep_per_row,
                factor=factor,
                look=look,
            )
        if not sums.weight > 0:
            raise DataError(
                f"logits: {sums.masked} of {rows} rows hold NaN, +inf or nothing but -inf, the others have weight 0: "
                "no row is left to assign"
            )
        return self._known(potential, sums, factor, every, look)

    def _known(self, potential: Vector, sums: SinkhornSums, factor: float, every: int, look: bool) -> Evaluation:
        """What a pass that was counted says of its potential; goes into the history."""
        shares, log_shares, error, pulled = column_state(sums.columns_on_host(), sums.weight, self.target, potential)
        objective = pulled - sums.objective / sums.weight
        seconds = self.seconds
        faint = np.flatnonzero(shares < self.faint_level)
        plain = self.all_wanted and not len(faint)
        if len(faint) and not look:
            log_shares = self._exact_log_shares(log_shares, faint, potential, sums, factor, every)
        at = self.judged(Evaluation(potential, shares, log_shares, error, objective, sums, plain), factor, every)
        whole = every == 1 and factor == 1.0
        part = {} if whole else {"lam": self.lam * factor, "rows": self.rows_read(every)}
        entry = self._note(at.error, at.objective, seconds, **part)
        if self.progress is not None:
            self.progress(entry)
        return at

    def stages(
        self, at: Evaluation, *, restart: float = math.inf, cap: float = math.inf, differences: Vector | None = None
    ) -> AndersonDevice | None:
        """Iterations that stay on the device from a point on; None where every pass is to be looked at.

        That is where the logits are not read by CUDA kernels, or take long to be read; where columns do not have to
        meet their shares, or receive next to nothing. With rows on several ranks, whose sums meet on the host, the
        steps are the same, pass by pass.

        Args:
            at: the point.
            restart: an error this many times the best one: back to the best point.
            cap: nats that an accelerated step may go.
            differences: of potentials and of residuals, [2, known, K], that are known; None: plain iterations.
        """
        passes = self._whole
        if not isinstance(passes, DevicePass) or self._passed is not self.working or type(self) is not Problem:
            return None
        if not at.plain or self._stage_length < 2:
            return None
        accelerate = differences is not None
        steps, changes = np.zeros((2, 0, len(self.target))) if differences is None else differences
        return AndersonDevice(
            passes,
            target=self.target,
            weight=at.sums.weight,
            unit=sinkhorn_resolution(at.sums.rows_in_all, at.sums.largest_weight),
            potential=at.potential,
            residual=self.centred(at.sinkhorn_step(self.target)),
            error=at.error,
            faint=FAINT,
            restart=restart,
            cap=cap,
            accelerate=accelerate,
            steps=steps.T,
            changes=changes.T,
        )

    def stage_passes(self, stages: AndersonDevice | None) -> int:
        """Passes of the next stage; below 2 where there is none. One is left for labels at the end."""
        if stages is None or stages.ended or stages.passes is not self._whole:
            return 0
        return min(self._stage_length, math.floor(self.max_passes - self.full_passes) - 1)

    @property
    def _stage_length(self) -> int:
        return stage_length(self.rows * int(self.logits.shape[1]) * {"float64": 8, "float32": 4}.get(self.dtype, 2))

    def evaluate_stage(
        self, stages: AndersonDevice, first: Vector, count: int, previous: Evaluation
    ) -> tuple[list[Evaluation], Vector]:
        """So many passes without looking, from a potential on: what each says, and the potential to go on from."""
        labels = len(stages.target) * self.rows <= SMALL or previous.error <= 100 * self.tol
        reference = self._reference if self._reference_factor == 1.0 else None
        if self.shard.ranks > 1:
            return self._stage_of_ranks(stages, first, count, labels)
        found, following = stages.run(self.rounded(first), reference, scale=self.lam, count=count, want_labels=labels)
        evaluations = []
        for potential, sums in found:
            self._reference, self._reference_factor = sums.lse, 1.0
            self.full_passes += 1
            self.passes += 1
            evaluations.append(self._known(potential, sums, 1.0, 1, False))
        return evaluations, following

    def _stage_of_ranks(
        self, stages: AndersonDevice, first: Vector, count: int, labels: bool
    ) -> tuple[list[Evaluation], Vector]:
        """The passes of a stage over rows on several ranks: each rank takes the steps from the sums of all."""
        evaluations, following = [], self.rounded(first)
        for _ in range(count):
            potential = following
            reference = self._reference if self._reference_factor == 1.0 else None
            sums = self._pass(potential, scale=self.lam, reference=reference, want_labels=labels)
            sums = self.shard.add(sums, potential, "of a stage")
            following = stages.follow(sums.exact[: len(potential)], potential)
            self._reference, self._reference_factor = sums.lse, 1.0
            self.full_passes += 1
            self.passes += 1
            evaluations.append(self._known(potential, sums, 1.0, 1, False))
        return evaluations, following

    def _pass(self, potential: Vector, **options: Any) -> SinkhornSums:
        """One pass over what is read now: arrays in memory were looked at before the first one."""
        if self._passed is not self.working:
            self._passed = self.working
            self._whole = whole_pass(self.working, **self._common())
        if self._whole is None or not np.isfinite(potential).all():
            return logits_pass(self.working, potential, **self._common(), **options)
        if isinstance(self._whole, DevicePass):
            return self._whole(potential, **options)
        reference = options.pop("reference")
        if reference is not None:
            reference = np.ascontiguousarray(reference, self._whole.lse_type)
        return self._whole(potential, reference=reference, **options)

    def passes_to_spare(self, at: Evaluation) -> int:
        """How many accelerated passes may follow a pass, where they cost less than what is around them; else 0.

        That is a question of the problem alone, not of where its rows are or of who watches: the same everywhere.
        """
        small = self.rows * int(self.logits.shape[1]) <= SMALL
        plain = type(self) is Problem and self.all_wanted and at.plain and self.tol > 0
        return max(0, math.floor(self.max_passes - self.full_passes) - 2) if small and plain else 0

    def many_passes(
        self, at: Evaluation, residual: Vector, differences: Vector, passes: int, **limits: Any
    ) -> Evaluation | None:
        """Accelerated passes in one call, see `anderson_passes`.

        Args:
            at: a pass over all rows, the latest one.
            residual: [K], the step there.
            differences: [2, m, K], of the potential before and of the residual.
            passes: at most so many.
            limits: for `anderson_passes`.

        Returns:
            The evaluation that converged, or else one at the best potential; None where rows are elsewhere or somebody
            watches.
        """
        here = type(self.shard) is Shard and self._passed is self.working
        if not (here and isinstance(self._whole, CpuPass)) or self.progress is not None or self._reference_factor != 1:
            return None
        reference = self._reference
        before = self.seconds
        found = anderson_passes(
            self._whole,
            self.target,
            at.potential,
            residual,
            at.error,
            scale=self.lam,
            reference=None if reference is None else np.ascontiguousarray(reference, self._whole.lse_type),
            steps=differences[0],
            changes=differences[1],
            tolerance=self.tol,
            passes=passes,
            faint=FAINT,
            **limits,
        )
        for error, objective, seconds in zip(found.errors, found.objectives, found.seconds, strict=True):
            self.full_passes += 1
            self.passes += 1
            self._note(float(error), float(objective), before + float(seconds))
        if found.sums is None:
            return self.evaluate(found.best)
        self._reference = found.sums.lse
        if not found.converged:
            return self.evaluate(found.best)
        columns = found.sums.column_sums
        shares = np.asarray(columns.numpy() if hasattr(columns, "numpy") else columns) / found.sums.weight
        errors = (float(found.errors[-1]), float(found.objectives[-1]))
        return Evaluation(found.potential, shares, np.log(shares), *errors, found.sums, True)

    def _note(self, error: float, objective: float, seconds: float, **more: float) -> dict[str, float]:
        """A pass for the history."""
        entry = {"passes": self.passes, "error": error, "objective": objective, "seconds": seconds, **more}
        if self.stored is not None:
            entry["bits"] = 64 if self.dtype == "float64" else 16
        self.history.append(entry)
        return entry

    def _common(self) -> dict[str, Any]:
        """Arguments that all passes have in common."""
        return {
            "row_weights": self.row_weights,
            "threads": self.threads,
            "first_row": self.shard.first_row,
            "rows_in_all": self.rows,
            "largest_weight": self.shard.largest_weight,
        }

    def judged(self, at: Evaluation, factor: float, every: int) -> Evaluation:
        """An evaluation at factor * lambda by what is asked of the columns: as it is where that is their target."""
        return at

    def drop_copy(self) -> None:
        """Go back to the logits themselves; nothing holds the memory of the copy and its bounds any longer."""
        if self._bounded is self.stored:
            self._bounds = self._bounded = None
        self._whole = self._passed = None
        self.stored = None

    def _bounds_for(self, every: int) -> ChunkBounds | None:
        """Chunk bounds for what passes read now, once a pass has shown that few of its entries count."""
        if self._bounded is not self.working and every == 1 and self._live_share < PEAKED:
            self._bounds, self._bounded = bounds_of(self.working), self.working
        return self._bounds if self._bounded is self.working else None

    def _exact_log_shares(
        self,
        log_shares: Vector,
        faint: npt.NDArray[np.int64],
        potential: Vector,
        sums: SinkhornSums,
        factor: float,
        every: int,
    ) -> Vector:
        """Log of the shares, with faint columns taken from the logits themselves (counted as their part of a pass)."""

        def terms() -> Iterator[Any]:
            if self.on_cuda and not isinstance(self.working, StoredLogits):
                return self._terms_on_device(faint, potential, sums, factor, every)
            return self._terms(faint, potential, sums, factor, every)

        count = len(faint)
        cache = list(terms()) if self.rows * count <= AT_ONCE else None
        top = np.full(count, -np.inf)
        for t in terms() if cache is None else cache:
            top = np.maximum(top, _largest_terms(t))
        top = self.shard.largest("the largest terms of faint columns", top)
        shift = np.where(top > -np.inf, top, 0.0)
        # Terms of 0 .. 1 in two integers, of 26 and 27 binary places: their sum depends on no order.
        high, low = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for t in terms() if cache is None else cache:
            more_high, more_low = _sums_of_terms(t, shift)
            high += more_high
            low += more_low
        high = self.shard.total("sums of faint columns, high parts", high)
        low = self.shard.total("sums of faint columns, low parts", low)
        self.passes += count / int(self.logits.shape[1]) / every
        with np.errstate(divide="ignore"):
            log_shares[faint] = top + np.log(np.ldexp(high + np.ldexp(low.astype(np.float64), -27), -26))
        log_shares[faint] -= np.log(sums.weight)
        return log_shares

    def _terms(
        self, faint: npt.NDArray[np.int64], potential: Vector, sums: SinkhornSums, factor: float, every: int
    ) -> Iterator[Vector]:
        """Log of weight times p for the rows that were read, in these columns; a block of rows at a time."""
        rows = int(self.logits.shape[0])
        lse = np.asarray(sums.lse.cpu().numpy() if hasattr(sums.lse, "cpu") else sums.lse, np.float64)
        with np.errstate(divide="ignore"):
            log_weights = np.zeros(rows) if self.row_weights is None else np.log(np.float64(self.row_weights))
        for part, block in rows_of(self.working, columns=faint, every=every, first_row=self.shard.first_row):
            good = ~np.isnan(lse[part])
            yield factor * self.lam * block[good] + potential[faint] + (log_weights[part] - lse[part])[good][:, None]

    def _terms_on_device(
        self, faint: npt.NDArray[np.int64], potential: Vector, sums: SinkhornSums, factor: float, every: int
    ) -> Iterator[torch.Tensor]:
        """The same for logits on a CUDA device: float64 tensors there."""
        import torch

        place = self.working.device
        lse = torch.as_tensor(sums.lse).to(place, torch.float64)
        log_weights = torch.zeros_like(lse)
        if self.row_weights is not None:
            log_weights = torch.as_tensor(self.row_weights).to(place, torch.float64).log()
        g = torch.from_numpy(potential[faint]).to(place)
        for part, block in device_columns(self.working, columns=faint, every=every, first_row=self.shard.first_row):
            good = ~lse[part].isnan()
            yield factor * self.lam * block[good] + g + (log_weights[part] - lse[part])[good][:, None]

    def scaled(self, potential: Vector, ratio: float) -> Vector:
        """The potential that stands for the same prices at another lambda, `ratio` times as large."""
        return potential * ratio

    def column_law(self, potential: Vector, factor: float, weight: float) -> ColumnLaw | None:
        """What a potential at factor * lambda asks of the columns of rows of this weight; None: their target."""
        return None

    def centred(self, potential: Vector) -> Vector:
        """The potential shifted so that sum_k b_k g_k = 0: it is defined up to a constant."""
        return centred(potential, self.target)


def _largest_terms(t: Any) -> Vector:
    """The largest of each column of terms [n, m], numpy or on a device; -inf without rows."""
    if isinstance(t, np.ndarray):
        found: Vector = t.max(axis=0, initial=-np.inf)
        return found
    on_host: Vector = t.amax(0).cpu().numpy() if len(t) else np.full(t.shape[1], -np.inf)
    return on_host


def _sums_of_terms(t: Any, shift: Vector) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sums over rows of exp(terms - shift), 0 .. 1 each, in two integers of 26 and 27 binary places."""
    if isinstance(t, np.ndarray):
        x = np.ldexp(np.exp(t - shift), 26)
        whole = np.rint(x)
        return whole.astype(np.int64).sum(axis=0), np.rint(np.ldexp(x - whole, 27)).astype(np.int64).sum(axis=0)
    import torch

    y = (t - torch.from_numpy(shift).to(t.device)).exp() * 2.0**26
    rounded = y.round()  # to even, as numpy's
    rest = ((y - rounded) * 2.0**27).round()
    return rounded.long().sum(0).cpu().numpy(), rest.long().sum(0).cpu().numpy()
