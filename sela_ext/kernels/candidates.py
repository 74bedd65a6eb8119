"""The candidates of a pass as arrays that can travel, and candidates from those of several parts of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext import _core
from sela_ext.kernels.device_candidates import DeviceCandidates

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt


def candidate_arrays(candidates: _core.Candidates | DeviceCandidates) -> list[npt.NDArray[Any]]:
    """Entries per row int32 [rows], columns uint16 or uint32 [entries], log p float32 [entries], row weights or empty.

    Args:
        candidates: of a pass, without overflow; from a device they are copied to the host.
    """
    if isinstance(candidates, DeviceCandidates):
        lengths = candidates.offsets.diff().int().cpu().numpy()
        columns = candidates.columns.cpu().numpy().astype(np.uint16 if candidates.cols <= 65536 else np.uint32)
        weights = np.zeros(0, np.float32) if candidates.weights is None else candidates.weights.cpu().numpy()
        return [lengths, columns, candidates.values.cpu().numpy(), weights]
    lengths = np.diff(candidates.offsets()).astype(np.int32)
    columns = candidates.columns().astype(np.uint16 if candidates.cols <= 65536 else np.uint32, copy=False)
    return [lengths, columns, candidates.values(), candidates.weights()]


def join_candidates(
    parts: Sequence[Sequence[npt.NDArray[Any]]], cols: int, level: float, limit: int
) -> _core.Candidates:
    """Candidates of a whole matrix from the arrays of its parts, in the order of their rows.

    Args:
        parts: of `candidate_arrays`.
        cols: K.
        level: nats below the row's sum, at which they were kept.
        limit: most entries.
    """
    whole: _core.Candidates | None = None
    for lengths, columns, values, weights in parts:
        part = _core.Candidates.of(
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            columns=columns,
            values=values,
            weights=weights,
            cols=cols,
            level=level,
            limit=limit,
        )
        if whole is None:
            whole = part
        else:
            whole.append(part)
    assert whole is not None
    return whole


def like_candidates(model: Any, found: _core.Candidates) -> _core.Candidates | DeviceCandidates:
    """Candidates in the form, and on the device, of others."""
    if not isinstance(model, DeviceCandidates):
        return found
    import torch

    place = model.values.device
    rows = max(found.rows, 0)
    offsets = np.zeros(rows + 1, np.int64) if found.overflow else found.offsets()
    weights = found.weights()
    return DeviceCandidates(
        found.level,
        found.limit,
        found.overflow,
        rows,
        found.cols,
        torch.from_numpy(offsets).to(place),
        torch.from_numpy(found.columns().astype(np.int32)).to(place),
        torch.from_numpy(found.values()).to(place),
        torch.from_numpy(weights).to(place) if len(weights) else None,
    )


def too_many_candidates(cols: int, level: float) -> _core.Candidates:
    """Candidates that say `overflow`: there were more than the limit, and none are kept."""

    def one_of(limit: int) -> _core.Candidates:
        nothing = np.zeros(0, np.float32)
        one = np.zeros(1, np.float32)
        return _core.Candidates.of(
            offsets=np.array([0, 1]),
            columns=one.astype(np.uint32),
            values=one,
            weights=nothing,
            cols=cols,
            level=level,
            limit=limit,
        )

    both = one_of(1)
    both.append(one_of(1))
    return both
