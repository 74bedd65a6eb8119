"""The fused Sinkhorn pass: one read of the logits gives all that a solver needs."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext import _core
from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels.bounds import ChunkBounds, check_bounds
from sela_ext.kernels.device import cuda_place, first_line, is_tensor, usable
from sela_ext.kernels.device_candidates import DeviceCandidates
from sela_ext.kernels.logits import STEPS, StoredLogits, rows_of
from sela_ext.kernels.logits import check_logits as check_logits
from sela_ext.kernels.sinkhorn_sums import (
    SinkhornSums,
    add_sums,
    exact_sums,
    from_exact,
    like,
    sinkhorn_resolution,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt
    import torch

    from sela_ext.kernels.device import CudaDevice

# Entries that the torch twin takes at once on a device: 128 MiB for each of its float64 intermediates.
_TWIN_ENTRIES = 1 << 24

# Rows that are summed in floating point, from a multiple of this number on; from there on sums are integers.
ROWS_TOGETHER = 128
SAMPLE_ROWS = 4  # rows that a pass over a part of the rows (`every`) reads together


def check_vector(name: str, value: Any, length: int) -> npt.NDArray[np.float64]:
    """A finite vector [length] of any number type as float64 numpy."""
    if is_tensor(value):
        value = value.detach().cpu().double().numpy()
    try:
        vector = np.ascontiguousarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name}: expected {length} numbers, found {type(value).__name__}") from error
    if vector.shape != (length,):
        raise OptionError(f"{name}: expected shape ({length},), found {vector.shape}")
    if not np.isfinite(vector).all():
        bad = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise OptionError(f"{name}: expected finite numbers, found {vector[bad]} at {bad}")
    return vector


def check_weights(value: Any, rows: int) -> npt.NDArray[np.float32]:
    """Row weights [rows], finite and >= 0, as float32 numpy."""
    weights = check_vector("row_weights", value, rows)
    if rows and float(weights.min()) < 0:
        bad = int(np.argmin(weights))
        raise OptionError(f"row_weights: expected numbers >= 0, found {weights[bad]} at {bad}")
    if rows and float(weights.max()) > 1e30:
        raise OptionError(f"row_weights: expected numbers up to 1e30, found {weights.max()}")
    return weights.astype(np.float32)


def check_scale(scale: float, name: str) -> float:
    """A finite positive number."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise OptionError(f"scale: expected a number > 0, found {type(scale).__name__}")
    value = float(scale)
    if not math.isfinite(value) or value <= 0:
        raise OptionError(f"scale: expected a finite number > 0, found {value}")
    if name != "float64" and not 1e-30 < value < 1e30:
        raise OptionError(f"scale: expected a number in 1e-30 .. 1e30 for {name} logits, found {value}")
    return value


def check_threads(threads: int) -> None:
    """An integer in 0 .. 4096."""
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 <= threads <= 4096:
        raise OptionError(f"threads: expected an integer in 0 .. 4096 (0 = all), found {threads!r}")


def sinkhorn_pass(
    logits: Any,
    potential: Any,
    *,
    scale: float = 1.0,
    row_weights: Any = None,
    reference: Any = None,
    want_labels: bool = False,
    threads: int = 0,
    isa: str = "",
    every: int = 1,
    keep: float | None = None,
    keep_at_most: int = 2**62,
    first_row: int = 0,
    rows_in_all: int | None = None,
    largest_weight: float | None = None,
    bounds: ChunkBounds | None = None,
) -> SinkhornSums:
    """Read logits once and return row log-sum-exp, column sums, objective and, if asked, argmax labels.

    In torch: ``t = scale * logits + potential; lse = t.logsumexp(1); p = (t - lse[:, None]).exp()``, then
    ``(w[:, None] * p).sum(0)``, ``(w * lse).sum()`` and ``t.argmax(1)``. A row that holds NaN or +inf, or only -inf, is
    masked: label -1, in no sum, counted; the other rows' results keep their bits. The bits depend on neither threads
    nor scheduling. Runs on the device of the logits: on a CUDA device whose self-check failed, or that this build has
    no code for, the torch twin does the work there (see `sela_ext.kernels.device_verdict`).

    Args:
        logits: [N, K] float32, float16, bfloat16 or float64, numpy or torch. Rows may be strided, columns are copied
            together if they are not adjacent. Or `StoredLogits`: the results are those of the logits that these stand
            for, lse and objective too, as arrays where those are.
        potential: [K] log beta in nats, finite.
        scale: lambda > 0. float32, unless the logits are float64.
        row_weights: [N] >= 0, or None for ones. 0 takes a row out of the sums; it keeps its label.
        reference: [N] log-sum-exp of an earlier pass, which makes this one faster; any values give the same result up
            to rounding.
        want_labels: also return labels.
        threads: CPU threads, 0 for all.
        isa: CPU instruction set, "" for the one in use ("generic", "avx2", "avx512"; for tests).
        every: read only every so many groups of 4 rows, beginning with the first; the sums are over the rows read, the
            lse of others is that of `reference` (NaN without), their label -1.
        keep: also return the entries with p > exp(-keep), 0 < keep <= 24 nats (float64: 40): on a CUDA device as
            `DeviceCandidates`, which need 4 bytes of memory there for every 128 bytes of logits, and 24 for each row.
        keep_at_most: with more such entries than this none are returned (`candidates.overflow`).
        first_row: a multiple of 128: the logits are rows first_row, first_row + 1, ... of a larger matrix, whose other
            parts begin at multiples of 128, too (see `add_sums`). `every` then counts the groups of the matrix.
        rows_in_all: rows of that matrix. None: first_row + N.
        largest_weight: >= every row weight of that matrix. None: the largest one here.
        bounds: of `chunk_bounds` for these logits: filled in by a pass over all rows, used by later ones, which then
            read little of peaked logits. No bit of any result changes. CPU only.

    Returns:
        SinkhornSums.

    Raises:
        DataError: logits of a wrong shape or type.
        OptionError: another argument of a wrong shape or value.
        ResourceError: a launch on a CUDA device that failed, or a call while a CUDA graph is captured.

    Example:
        >>> import numpy as np
        >>> sums = sinkhorn_pass(np.zeros((4, 2), np.float32), np.zeros(2), want_labels=True)
        >>> sums.column_sums.tolist(), sums.labels.tolist()
        ([2.0, 2.0], [0, 0, 0, 0])

    Source: SeLa, section 3.2, equations 5-6, in the log domain.
    """
    name = check_logits(logits)
    scale = check_scale(scale, name)
    check_threads(threads)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise OptionError(f"every: expected an integer >= 1, found {every!r}")
    if first_row < 0 or first_row % ROWS_TOGETHER:
        raise OptionError(f"first_row: expected a multiple of {ROWS_TOGETHER}, found {first_row}")
    if rows_in_all is not None and rows_in_all < first_row + int(logits.shape[0]):
        raise OptionError(f"rows_in_all: expected at least {first_row + int(logits.shape[0])}, found {rows_in_all}")
    deepest = 40 if name == "float64" else 24
    if keep is not None and not 0 < keep <= deepest:
        raise OptionError(f"keep: expected a number of nats in 0 .. {deepest} for {name} logits, found {keep}")
    place = _place(logits)
    if place is not None:
        if bounds is not None:
            raise OptionError("bounds: only for logits on the CPU; leave them out, or pass logits.cpu()")
        card = usable(place)
        options = {
            "scale": scale,
            "row_weights": row_weights,
            "reference": reference,
            "want_labels": want_labels,
            "every": every,
            "keep": keep,
            "keep_at_most": keep_at_most,
            "first_row": first_row,
            "rows_in_all": rows_in_all,
            "largest_weight": largest_weight,
        }
        if card is None:
            return pass_in_torch(logits, potential, **options)
        return pass_on_device(card, logits, potential, **options)
    if is_tensor(logits) and logits.device.type != "cpu":
        raise OptionError(f"logits: expected a tensor on cpu or cuda, found {logits.device}; move it with .cpu()")

    return pass_on_cpu(
        logits,
        potential,
        scale=scale,
        row_weights=row_weights,
        reference=reference,
        want_labels=want_labels,
        threads=threads,
        isa=isa,
        every=every,
        keep=keep,
        keep_at_most=keep_at_most,
        first_row=first_row,
        rows_in_all=rows_in_all,
        largest_weight=largest_weight,
        bounds=bounds,
    )


def pass_on_cpu(
    logits: Any,
    potential: Any,
    *,
    scale: float = 1.0,
    row_weights: Any = None,
    reference: Any = None,
    want_labels: bool = False,
    threads: int = 0,
    isa: str = "",
    every: int = 1,
    keep: float | None = None,
    keep_at_most: int = 2**62,
    first_row: int = 0,
    rows_in_all: int | None = None,
    largest_weight: float | None = None,
    bounds: ChunkBounds | None = None,
) -> SinkhornSums:
    """`sinkhorn_pass` by the CPU kernels; the logits are on the host.

    Raises:
        OptionError: an argument of a wrong shape or value.
    """
    prepared = CpuPass(
        logits,
        row_weights=row_weights,
        threads=threads,
        isa=isa,
        first_row=first_row,
        rows_in_all=rows_in_all,
        largest_weight=largest_weight,
    )
    return prepared(
        check_vector("potential", potential, prepared.cols),
        scale=check_scale(scale, prepared.name),
        reference=None if reference is None else _reference(reference, prepared.rows, prepared.lse_type),
        want_labels=want_labels,
        every=every,
        keep=keep,
        keep_at_most=keep_at_most,
        bounds=bounds,
    )


class CpuPass:
    """`sinkhorn_pass` by the CPU kernels over the same logits again and again: they are looked at once.

    Args:
        logits: on the host; see `sinkhorn_pass`, also for the other arguments.
        row_weights: [N] or None.
        threads: of the processor.
        isa: CPU instruction set.
        first_row: a multiple of 128.
        rows_in_all: rows of the whole matrix.
        largest_weight: of that.

    Attributes:
        name: type of the logits.
        rows: N.
        cols: K.
        lse_type: what log-sum-exp comes in.
        logits: as they came.
        stored: the same where they are a 16-bit copy, else None.
        weights_at: address of the row weights; 0 without.
        largest_weight: of the whole matrix.
        threads: of the processor.
        isa: CPU instruction set.

    Raises:
        OptionError: an argument of a wrong shape or value.
    """

    def __init__(
        self,
        logits: Any,
        *,
        row_weights: Any = None,
        threads: int = 0,
        isa: str = "",
        first_row: int = 0,
        rows_in_all: int | None = None,
        largest_weight: float | None = None,
    ) -> None:
        self.name = check_logits(logits)
        self.rows, self.cols = (int(n) for n in logits.shape)
        self.lse_type = np.float64 if self.name == "float64" else np.float32
        self.logits = logits
        self._weights = None if row_weights is None else check_weights(row_weights, self.rows)
        self.largest_weight = check_largest(largest_weight, self._weights)
        self.threads, self.isa = threads, isa
        self._first_row = first_row
        self._rows_in_all = first_row + self.rows if rows_in_all is None else rows_in_all
        # `_memory` holds what the addresses point into.
        self._memory, self._address, self._stride = rows_of(logits)
        self.weights_at = 0 if self._weights is None else self._weights.ctypes.data
        self.stored = logits if isinstance(logits, StoredLogits) else None

    @property
    def addresses(self) -> tuple[int, str, int, int, int]:
        """Where the logits are: address, type, rows, columns, and elements from one row to the next."""
        return self._address, self.name, self.rows, self.cols, self._stride

    def __call__(
        self,
        potential: npt.NDArray[np.float64],
        *,
        scale: float,
        reference: npt.NDArray[Any] | None = None,
        want_labels: bool = False,
        every: int = 1,
        keep: float | None = None,
        keep_at_most: int = 2**62,
        bounds: ChunkBounds | None = None,
    ) -> SinkhornSums:
        """One pass; potential [K] is finite, reference [N] of `lse_type`. See `sinkhorn_pass`."""
        if bounds is not None:
            check_bounds(bounds, self.logits)
            if every > 1 and not bounds.complete:
                bounds = None
        unit, maxima, maxima_scale = scale, 0, 0.0
        if self.stored is not None:
            unit, maxima, maxima_scale = unit_of(self.stored, scale), self.stored.maxima.ctypes.data, scale
        kept = None if keep is None else _core.Candidates(level=float(keep), limit=keep_at_most)
        columns, exact, lse, labels, objective, weight, masked, live = _core.sinkhorn_sums_cpu(
            *self.addresses,
            unit,
            potential,
            self.weights_at,
            self.largest_weight,
            reference,
            want_labels,
            self.threads,
            self.isa,
            every,
            kept,
            self._first_row,
            self._rows_in_all,
            maxima,
            maxima_scale,
            0 if bounds is None else bounds.values.ctypes.data,
            bounds is not None and bounds.complete,
        )
        if bounds is not None:
            bounds.complete = True
        end = self._first_row + self.rows
        return SinkhornSums(
            like(self.logits, columns),
            objective,
            weight,
            like(self.logits, lse),
            None if labels is None else like(self.logits, labels),
            masked,
            kept,
            exact,
            self._rows_in_all,
            self.largest_weight,
            (rows_read(end, every) - rows_read(self._first_row, every)) * self.cols,
            live,
        )


def rows_read(rows: int, every: int) -> int:
    """Rows in every so many groups of rows among the first so many of a matrix."""
    step = SAMPLE_ROWS * every
    return rows // step * SAMPLE_ROWS + min(rows % step, SAMPLE_ROWS)


def unit_of(stored: StoredLogits, scale: float) -> float:
    """What one unit of the stored values is worth in nats."""
    return scale / (STEPS * stored.lam) if stored.kind == "fixed16" else scale


def check_largest(largest_weight: float | None, weights: Any) -> float:
    """The largest row weight of the matrix that weights (a vector, or None: all 1) belong to."""
    if largest_weight is None:
        return 1.0 if weights is None or not len(weights) else max(float(weights.max()), 1e-30)
    if not 1e-30 <= largest_weight <= 1e30 or (weights is not None and len(weights) and weights.max() > largest_weight):
        raise OptionError(
            f"largest_weight: expected 1e-30 .. 1e30 and at least every row weight, found {largest_weight}"
        )
    return float(largest_weight)


def _place(logits: Any) -> torch.device | None:
    """The CUDA device of logits, stored ones too; None where they are elsewhere."""
    return cuda_place(logits.values if isinstance(logits, StoredLogits) else logits)


def on_cuda(logits: Any) -> bool:
    """Whether passes over these logits run on a CUDA device, by its kernels or by torch."""
    return _place(logits) is not None


def backend_of(logits: Any) -> str:
    """Who does the passes over these logits: "cuda", "torch" (on a refused CUDA device), or "cpu-" and the ISA."""
    place = _place(logits)
    if place is None:
        return f"cpu-{_core.build_info()['cpu_isa']}"
    return "torch" if usable(place) is None else "cuda"


def _reference(value: Any, rows: int, lse_type: Any) -> npt.NDArray[Any]:
    if is_tensor(value):
        value = value.detach().cpu().numpy()
    before = np.ascontiguousarray(value, dtype=lse_type)
    if before.shape != (rows,):
        raise OptionError(f"reference: expected shape ({rows},), found {before.shape}")
    return before


def pass_in_torch(
    logits: Any,
    potential: Any,
    *,
    scale: float = 1.0,
    row_weights: Any = None,
    reference: Any = None,
    want_labels: bool = False,
    every: int = 1,
    keep: float | None = None,
    keep_at_most: int = 2**62,
    first_row: int = 0,
    rows_in_all: int | None = None,
    largest_weight: float | None = None,
) -> SinkhornSums:
    """`sinkhorn_pass` by the pure-torch twin where the logits are, a block of rows at a time: it needs float64 copies.

    Raises:
        OptionError: an argument of a wrong shape or value.
    """
    from sela_ext.kernels.reference.sinkhorn import sinkhorn_pass as twin

    rows, cols = (int(n) for n in logits.shape)
    weights = None if row_weights is None else check_weights(row_weights, rows)
    largest = check_largest(largest_weight, weights)
    rows_in_all = first_row + rows if rows_in_all is None else rows_in_all
    step = max(1, _TWIN_ENTRIES // cols // ROWS_TOGETHER) * ROWS_TOGETHER

    def part_of(first: int) -> SinkhornSums:
        part = slice(first, min(first + step, rows))
        sums = twin(
            logits.rows(part.start, part.stop) if isinstance(logits, StoredLogits) else logits[part],
            potential,
            scale=scale,
            row_weights=None if weights is None else weights[part],
            reference=None if reference is None else reference[part],
            want_labels=want_labels,
            every=every,
            keep=keep,
            keep_at_most=keep_at_most,
            first_row=first_row + first,
            rows_in_all=rows_in_all,
            largest_weight=largest,
        )
        return sums if keep is None else replace(sums, candidates=_on_device(sums.candidates, sums.lse.device))

    return add_sums([part_of(first) for first in range(0, max(rows, 1), step)])


def _on_device(found: Any, place: torch.device) -> DeviceCandidates:
    """The candidates of the twin as those of a device."""
    import torch

    rows = 0 if found.overflow else found.rows
    weights = found.weights()
    return DeviceCandidates(
        float(found.level),
        found.limit,
        found.overflow,
        found.rows,
        found.cols,
        torch.from_numpy(found.offsets() if rows else np.zeros(found.rows + 1, np.int64)).to(place),
        torch.from_numpy(found.columns().astype(np.int32)).to(place),
        torch.from_numpy(found.values()).to(place),
        torch.from_numpy(weights.copy()).to(place) if len(weights) else None,
    )


def pass_on_device(card: CudaDevice, logits: Any, potential: Any, **options: Any) -> SinkhornSums:
    """`sinkhorn_pass` by the CUDA kernels of a device, whatever its self-check says; the logits are there already.

    Raises:
        OptionError: an argument of a wrong shape or value.
        ResourceError: a launch that failed, or a stream that is being captured.
    """
    launch, collect = prepared_pass(card, logits, potential, **options)
    launch()
    return collect()


def prepared_pass(
    card: CudaDevice,
    logits: Any,
    potential: Any,
    *,
    row_weights: Any = None,
    first_row: int = 0,
    rows_in_all: int | None = None,
    largest_weight: float | None = None,
    **options: Any,
) -> tuple[Callable[[], None], Callable[[], SinkhornSums]]:
    """Check and allocate: (launch, collect), the kernels alone and what reads their results back.

    Raises:
        OptionError: an argument of a wrong shape or value.
        ResourceError: a stream that is being captured.
    """
    whole = DevicePass(
        card,
        logits,
        row_weights=row_weights,
        first_row=first_row,
        rows_in_all=rows_in_all,
        largest_weight=largest_weight,
    )
    return whole.prepared(potential, **options)


class DevicePass:
    """`sinkhorn_pass` by the CUDA kernels over the same logits again and again: they are looked at once.

    A pass waits for the device once, when its sums are read back; with candidates their number comes along.

    Args:
        card: whose kernels do it.
        logits: there, a tensor or `StoredLogits`; see `sinkhorn_pass`, also for the other arguments.
        row_weights: [N] or None.
        first_row: a multiple of 128.
        rows_in_all: rows of the whole matrix.
        largest_weight: of that.

    Attributes:
        name: type of the logits, or kind they are stored in.
        rows: N.
        cols: K.
        lse_type: what log-sum-exp comes in.
        card: whose kernels do it.

    Raises:
        OptionError: an argument of a wrong shape or value.
        ResourceError: a stream that is being captured.
    """

    def __init__(
        self,
        card: CudaDevice,
        logits: Any,
        *,
        row_weights: Any = None,
        first_row: int = 0,
        rows_in_all: int | None = None,
        largest_weight: float | None = None,
    ) -> None:
        import torch

        self.name = check_logits(logits)
        self.rows, self.cols = (int(n) for n in logits.shape)
        self.lse_type = torch.float64 if self.name == "float64" else torch.float32
        self.card = card
        self._stored = logits if isinstance(logits, StoredLogits) else None
        values = (logits.values if isinstance(logits, StoredLogits) else logits).detach()
        if values.stride(1) != 1 or (self.rows > 1 and values.stride(0) < self.cols):
            values = values.contiguous()
        self._values: torch.Tensor = values
        self._stride = max(int(values.stride(0)), self.cols)
        self._first_row = first_row
        self._rows_in_all = first_row + self.rows if rows_in_all is None else rows_in_all
        with card.current():
            card.refuse_capture("sinkhorn_pass")
            self._weights = (
                None if row_weights is None else self._there("row_weights", row_weights, self.rows, torch.float32)
            )
            largest = 1.0 if self._weights is None or largest_weight is None else 0.0  # of no rows
            if self._weights is not None and self.rows:
                low, largest = torch.stack([self._weights.min(), self._weights.max()]).tolist()
                if not (low >= 0 and largest <= 1e30):
                    raise OptionError(f"row_weights: expected numbers in 0 .. 1e30, found {low} .. {largest}")
                largest = max(largest, 1e-30)
            self._largest = largest if largest_weight is None else max(largest, check_largest(largest_weight, None))

    def _there(self, label: str, value: Any, length: int, dtype: torch.dtype) -> torch.Tensor:
        """A vector [length] of any kind as a tensor on the device."""
        import torch

        if not is_tensor(value):
            kept = getattr(value, "dtype", None) in (np.float32, np.float64)
            try:
                array = np.ascontiguousarray(value, dtype=None if kept else np.float64)
            except (TypeError, ValueError) as error:
                raise OptionError(f"{label}: expected {length} numbers, found {type(value).__name__}") from error
            # torch wants to be able to write
            value = torch.from_numpy(array if array.flags.writeable else array.copy())
        tensor: torch.Tensor = value.detach().to(self.card.place).to(dtype).contiguous()
        if tensor.shape != (length,):
            raise OptionError(f"{label}: expected shape ({length},), found {tuple(tensor.shape)}")
        return tensor

    def __call__(self, potential: Any, *, bounds: None = None, **options: Any) -> SinkhornSums:
        """One pass, see `sinkhorn_pass`; there are no bounds on a device."""
        launch, collect = self.prepared(potential, **options)
        launch()
        return collect()

    def prepared(
        self,
        potential: Any,
        *,
        scale: float = 1.0,
        reference: Any = None,
        want_labels: bool = False,
        every: int = 1,
        keep: float | None = None,
        keep_at_most: int = 2**62,
        after: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> tuple[Callable[[], None], Callable[[], SinkhornSums]]:
        """(launch, collect) of one pass: the kernels alone, and what reads their results back.

        With `after` nothing waits for the device: the potential is float64 [K] there, finite, and read when the kernels
        run; behind their launch `after` is called with the integer column sums and the log-sum-exp.

        Raises:
            OptionError: an argument of a wrong shape or value.
            ResourceError: a stream that is being captured.
        """
        import torch

        card, device, rows, cols = self.card, self.card.place, self.rows, self.cols
        scale = check_scale(scale, self.name)
        stored, level = self._stored, 0.0 if keep is None else float(keep)
        unit = scale if stored is None else unit_of(stored, scale)
        read = rows_read(self._first_row + rows, every) - rows_read(self._first_row, every)
        with card.current():
            card.refuse_capture("sinkhorn_pass")
            if after is not None:
                g = potential
            elif is_tensor(potential) and potential.device.type != "cpu":
                g = self._there("potential", potential, cols, torch.float64)
                if not bool(torch.isfinite(g).all()):
                    raise OptionError("potential: expected finite numbers, found NaN or infinity")
            else:
                g = torch.from_numpy(check_vector("potential", potential, cols).copy()).to(device)
            before = None if reference is None else self._there("reference", reference, rows, self.lse_type)
            where = (self._values.data_ptr(), self.name, rows, cols, self._stride)
            totals_count, scratch_bytes = card.core.sinkhorn_workspace_cuda(
                *where, self._first_row, every, keep is not None, stored is not None
            )
            # Everything that is read back, in one piece: column sums, totals, masked rows, candidates.
            packed = torch.zeros(cols + totals_count + 2, dtype=torch.int64, device=device)
            columns, totals = packed[:cols], packed[cols : cols + totals_count]
            if every == 1:
                lse = torch.empty(rows, dtype=self.lse_type, device=device)
            else:  # rows that are not read keep what is known
                lse = (
                    torch.full((rows,), torch.nan, dtype=self.lse_type, device=device)
                    if before is None
                    else before.clone()
                )
            labels = torch.full((rows,), -1, dtype=torch.int32, device=device) if want_labels else None
            scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
            counts = None if keep is None else torch.zeros(read, dtype=torch.int32, device=device)

        def address(tensor: torch.Tensor | None) -> int:
            return 0 if tensor is None else int(tensor.data_ptr())

        def launch() -> None:
            with card.current(), _launching():
                card.core.sinkhorn_pass_cuda(
                    *where,
                    unit,
                    address(g),
                    address(self._weights),
                    self._largest,
                    address(before),
                    address(columns),
                    address(lse),
                    address(labels),
                    address(totals),
                    address(packed) + 8 * (cols + totals_count),
                    address(scratch),
                    card.stream(),
                    self._rows_in_all,
                    self._first_row,
                    every,
                    level,
                    address(counts),
                    0 if stored is None else address(stored.maxima),
                    scale,
                )
            if after is not None:
                after(columns, lse)

        def candidates(offsets: torch.Tensor, entries: int) -> DeviceCandidates:
            overflow = entries > keep_at_most
            if overflow:
                offsets, entries = torch.zeros_like(offsets), 0
            found = DeviceCandidates(
                level,
                keep_at_most,
                overflow,
                read,
                cols,
                offsets,
                torch.empty(entries, dtype=torch.int32, device=device),
                torch.empty(entries, dtype=torch.float32, device=device),
                self._weights_of(every),
            )
            if entries:
                with _launching():
                    card.core.sinkhorn_candidates_cuda(
                        *where,
                        unit,
                        address(g),
                        self._first_row,
                        every,
                        level,
                        stored is not None,
                        address(scratch),
                        address(offsets),
                        address(found.columns),
                        address(found.values),
                        card.stream(),
                    )
            return found

        def collect() -> SinkhornSums:
            with card.current():
                offsets = None
                if counts is not None:
                    offsets = torch.zeros(read + 1, dtype=torch.int64, device=device)
                    torch.cumsum(counts, 0, dtype=torch.int64, out=offsets[1:])
                    packed[-1:] = offsets[-1:]
                host = packed.cpu().numpy()
                parts = host[cols:-2].view(np.float64).reshape(2, -1)
                exact = exact_sums(host[:cols], parts, int(host[-2]), self._largest)
                _, objective, weight, masked = from_exact(exact, self._rows_in_all, self._largest)
                return SinkhornSums(
                    columns.double() * sinkhorn_resolution(self._rows_in_all, self._largest),
                    objective,
                    weight,
                    lse,
                    labels,
                    masked,
                    None if offsets is None else candidates(offsets, int(host[-1])),
                    exact,
                    self._rows_in_all,
                    self._largest,
                    read * cols,
                    read * cols,
                )

        return launch, collect

    def _weights_of(self, every: int) -> torch.Tensor | None:
        """Row weights of the rows read."""
        import torch

        if self._weights is None or every == 1:
            return self._weights
        row = torch.arange(self._first_row, self._first_row + self.rows, device=self._weights.device)
        return self._weights[row // SAMPLE_ROWS % every == 0]


def device_pass(logits: Any, **common: Any) -> DevicePass | None:
    """A `DevicePass` over logits on a CUDA device whose kernels may be used; None for others."""
    place = _place(logits)
    card = None if place is None else usable(place)
    return None if card is None else DevicePass(card, logits, **common)


@contextlib.contextmanager
def _launching() -> Iterator[None]:
    """What a launch raises becomes ResourceError."""
    try:
        yield
    except RuntimeError as error:
        raise ResourceError(first_line(error)) from error
