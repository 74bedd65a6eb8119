"""What a fused Sinkhorn pass returns, in a form that can be added exactly over parts of a matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext import _core
from sela_ext.kernels.device import is_tensor
from sela_ext.kernels.device_candidates import DeviceCandidates

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt


@dataclass(frozen=True)
class SinkhornSums:
    """What one pass over logits [N, K] gives. Arrays are of the kind (numpy or torch, device) of the logits.

    Attributes:
        column_sums: float64 [K], sum over rows of weight times p[i, k].
        objective: sum over rows of weight times log-sum-exp, nats.
        weight: sum of the row weights that entered (N without weights and masked rows).
        lse: log-sum-exp of each row [N], float32 (float64 for float64 logits); NaN for masked rows.
        labels: int32 [N], argmax of each row, -1 for masked rows; None when not asked for.
        masked: number of masked rows.
        candidates: the entries with p > exp(-keep), for Newton's method, where the logits are: `Candidates` of the
            compiled module, or `DeviceCandidates`; None when not asked for.
        exact: int64 [K + 9] on the host: the integers that column_sums, objective, weight and masked are made of. Those
            of parts of a matrix can be added in any order and grouping, with the same bits as one pass over all of it.
        rows_in_all: rows of that matrix.
        largest_weight: the largest row weight in it; with rows_in_all it fixes the units.
        entries: rows read times columns.
        live: of these, entries whose terms the pass computed, counted by chunks of 32 columns: all, or on peaked
            logits, on the CPU, those in chunks that were not skipped.
    """

    column_sums: Any
    objective: float
    weight: float
    lse: Any
    labels: Any | None
    masked: int
    candidates: Any | None = None
    exact: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    rows_in_all: int = 0
    largest_weight: float = 1.0
    entries: int = 0
    live: int = 0

    def columns_on_host(self) -> npt.NDArray[np.float64]:
        """column_sums as a numpy array; those of a device are known on the host without another copy."""
        if is_tensor(self.column_sums) and self.column_sums.device.type != "cpu" and len(self.exact):
            return from_exact(self.exact, self.rows_in_all, self.largest_weight)[0]
        return np.asarray(self.column_sums, np.float64)

    @property
    def live_share(self) -> float:
        """Part of the entries whose terms were computed; 1 where it was not counted."""
        return min(1.0, self.live / self.entries) if self.entries else 1.0


WORDS = 4  # of a total, see Note [Exact totals] in csrc/sela/sinkhorn.h
EXTRA = 2 * WORDS + 1  # integers behind the columns: objective, weight, masked rows


def exact_sums(
    columns: npt.NDArray[np.int64], totals: npt.NDArray[np.float64], masked: int, largest_weight: float
) -> npt.NDArray[np.int64]:
    """The integers that can be added over parts, see Note [Exact totals].

    Args:
        columns: [K] integer column sums.
        totals: [2, blocks], objective and weight of each block of rows.
        masked: rows.
        largest_weight: of all rows of the matrix.

    Returns:
        int64 [K + 9].
    """
    totals = np.ascontiguousarray(totals, np.float64)
    exact = np.empty(len(columns) + EXTRA, np.int64)
    exact[: len(columns)] = columns
    words = exact[len(columns) :]
    _core.sinkhorn_exact_totals(totals.ctypes.data, totals.shape[1], largest_weight, words.ctypes.data)
    exact[-1] = masked
    return exact


def from_exact(
    exact: npt.NDArray[np.int64], rows_in_all: int, largest_weight: float
) -> tuple[npt.NDArray[np.float64], float, float, int]:
    """Column sums, objective, weight and masked rows from the integers of `exact_sums`, or sums of such."""
    exact = np.ascontiguousarray(exact, np.int64)
    columns = len(exact) - EXTRA
    words = exact[columns:].ctypes.data
    return (
        exact[:columns].astype(np.float64) * sinkhorn_resolution(rows_in_all, largest_weight),
        _core.sinkhorn_total(words, largest_weight),
        _core.sinkhorn_total(words + WORDS * exact.itemsize, largest_weight),
        int(exact[-1]),
    )


def sinkhorn_resolution(rows: int, largest_weight: float) -> float:
    """Value of one unit of the integer column sums over so many rows with such weights."""
    return _core.sinkhorn_resolution(rows, largest_weight)


def add_sums(parts: Sequence[SinkhornSums]) -> SinkhornSums:
    """Put the results of parts of one matrix together, in the order of their rows.

    Args:
        parts: of `sinkhorn_pass` with the same rows_in_all and largest_weight; their candidates are used up.

    Returns:
        SinkhornSums, with the bits of one pass over all these rows.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    exact = np.sum(np.array([part.exact for part in parts]), axis=0)
    sums, objective, weight, masked = from_exact(exact, first.rows_in_all, first.largest_weight)
    candidates = first.candidates
    if isinstance(candidates, DeviceCandidates):
        candidates = _joined_candidates([part.candidates for part in parts])
    elif candidates is not None:
        for part in parts[1:]:
            candidates.append(part.candidates)
    labels = None if first.labels is None else _joined([part.labels for part in parts])
    return SinkhornSums(
        like(first.column_sums, sums),
        objective,
        weight,
        _joined([part.lse for part in parts]),
        labels,
        masked,
        candidates,
        exact,
        first.rows_in_all,
        first.largest_weight,
        sum(part.entries for part in parts),
        sum(part.live for part in parts),
    )


def _joined_candidates(parts: Sequence[Any]) -> DeviceCandidates:
    """Candidates of a device from those of parts, in the order of their rows."""
    import torch

    first = parts[0]
    rows, entries = sum(part.rows for part in parts), sum(part.entries for part in parts)
    overflow = any(part.overflow for part in parts) or entries > first.limit
    weights = None if first.weights is None else torch.cat([part.weights for part in parts])
    if overflow:
        nothing = torch.zeros(rows + 1, dtype=torch.int64, device=first.offsets.device)
        return DeviceCandidates(
            first.level, first.limit, True, rows, first.cols, nothing, first.columns[:0], first.values[:0], weights
        )
    lengths = torch.cat([first.offsets[:1], *(part.offsets.diff() for part in parts)])
    return DeviceCandidates(
        first.level,
        first.limit,
        False,
        rows,
        first.cols,
        lengths.cumsum(0),
        torch.cat([part.columns for part in parts]),
        torch.cat([part.values for part in parts]),
        weights,
    )


def _joined(arrays: Sequence[Any]) -> Any:
    if not is_tensor(arrays[0]):
        return np.concatenate(arrays)
    import torch

    return torch.cat(list(arrays))


def like(model: Any, value: npt.NDArray[Any]) -> Any:
    """A numpy array in the kind, and on the device, of a model."""
    if not is_tensor(model):
        return value
    import torch

    return torch.from_numpy(value).to(model.device)
