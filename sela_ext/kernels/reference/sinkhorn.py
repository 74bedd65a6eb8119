"""Pure-torch twin of the fused Sinkhorn pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sela_ext.kernels.bounds import ChunkBounds
from sela_ext.kernels.logits import IMPOSSIBLE, StoredLogits
from sela_ext.kernels.reference.newton import Candidates
from sela_ext.kernels.sinkhorn import (
    ROWS_TOGETHER,
    SAMPLE_ROWS,
    check_largest,
    check_logits,
    check_scale,
    check_vector,
    check_weights,
    unit_of,
)
from sela_ext.kernels.sinkhorn_sums import SinkhornSums, exact_sums, sinkhorn_resolution


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
    """The same as `sela_ext.kernels.sinkhorn_pass`, in torch and in float64.

    `reference` is only passed on for rows that are not read, `threads` and `isa` change nothing. Scale and potential
    are rounded to float32 first unless the logits are float64, as the kernel does.

    Args:
        logits: [N, K].
        potential: [K], nats.
        scale: lambda > 0.
        row_weights: [N] >= 0 or None.
        reference: [N] or None.
        want_labels: also return labels.
        threads: unused.
        isa: unused.
        every: read every so many groups of 4 rows.
        keep: nats, or None.
        keep_at_most: entries.
        first_row: a multiple of 128.
        rows_in_all: rows of the whole matrix, or None.
        largest_weight: of all its row weights, or None.
        bounds: unused, and left as they are.

    Returns:
        SinkhornSums; lse in float32 unless the logits are float64.
    """
    name = check_logits(logits)
    is_torch = isinstance(logits, torch.Tensor)
    maxima = None
    if isinstance(logits, StoredLogits):
        maxima, x = _tensor(logits.maxima).double(), _stored_units(logits)
        is_torch = isinstance(logits.values, torch.Tensor)
    else:
        x = (logits if is_torch else torch.from_numpy(logits.copy())).detach()
    rows, cols = x.shape
    g = torch.from_numpy(check_vector("potential", potential, cols)).to(x.device)
    w = torch.ones(rows) if row_weights is None else torch.from_numpy(check_weights(row_weights, rows))
    scale = check_scale(scale, name)
    unit = scale if maxima is None else unit_of(logits, scale)
    lam = torch.tensor(unit, dtype=torch.float64)
    if name != "float64":
        g, lam = g.float().double(), lam.float().double()

    t = x.double() * lam.to(x.device) + g
    limit = float(torch.finfo(torch.float64 if name == "float64" else torch.float32).max)
    bad = torch.isnan(t).any(1) | (t > limit).any(1) | (t < -limit).all(1)
    t = torch.where(bad[:, None], 0.0, t)
    row = torch.arange(first_row, first_row + rows, device=x.device)
    block, unread = row // ROWS_TOGETHER, row // SAMPLE_ROWS % every != 0
    w = torch.where(bad | unread, 0.0, w.double().to(x.device))
    lse = t.logsumexp(1)
    column_sums = (w[:, None] * (t - lse[:, None]).exp()).sum(0)
    if maxima is not None:
        lse = lse + torch.where(bad, 0.0, scale * maxima.to(x.device))
    labels = torch.where(bad | unread, -1, t.argmax(1)).int() if want_labels else None
    given = None if row_weights is None else check_weights(row_weights, rows)
    largest = check_largest(largest_weight, given)
    rows_in_all = first_row + rows if rows_in_all is None else rows_in_all
    totals = (
        torch.stack([torch.bincount(block - block[0], value) for value in (w * lse, w)]) if rows else torch.empty(2, 0)
    )
    objective, weight = totals.sum(1).tolist()
    lse = torch.where(bad, torch.nan, lse).to(torch.float64 if name == "float64" else torch.float32)
    if every > 1:
        known = torch.full_like(lse, torch.nan) if reference is None else torch.as_tensor(reference).to(lse)
        lse = torch.where(unread, known, lse)
    masked = int((bad & ~unread).sum())
    units = (column_sums / sinkhorn_resolution(rows_in_all, largest)).round().long()
    exact = exact_sums(units.cpu().numpy(), totals.cpu().numpy(), masked, largest)
    kept = None
    if keep is not None:
        log_p = torch.where((w > 0)[:, None], t - t.logsumexp(1, keepdim=True), -torch.inf)[~unread].cpu().numpy()
        read = None if given is None else given[~unread.cpu().numpy()]
        kept = Candidates(log_p, read, keep, keep_at_most)
    sums, lse_out, labels_out = (
        value if is_torch or value is None else value.numpy() for value in (column_sums, lse, labels)
    )
    read = int((~unread).sum()) * cols
    return SinkhornSums(
        sums, objective, weight, lse_out, labels_out, masked, kept, exact, rows_in_all, largest, read, read
    )


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value.copy())


def _stored_units(stored: StoredLogits) -> torch.Tensor:
    """Stored logits in their own unit, [N, K] float64: for fixed16 minus the whole numbers."""
    if isinstance(stored.values, torch.Tensor):
        place, values = stored.values.device, stored.values
        if stored.kind != "fixed16":
            return values.double()
        steps = values.long() & 0xFFFF
        return torch.where(steps == IMPOSSIBLE, -torch.inf, -steps.double()).to(place)
    values = stored.values
    if stored.kind == "float16":
        return torch.from_numpy(values.astype(np.float64))
    if stored.kind == "bfloat16":
        return torch.from_numpy((values.astype(np.uint32) << 16).view(np.float32).astype(np.float64))
    return torch.from_numpy(np.where(values == IMPOSSIBLE, -np.inf, -values.astype(np.float64)))
