"""Pure-torch twin of the fused Sinkhorn pass."""

from __future__ import annotations

from typing import Any

import torch

from sela_ext.kernels.reference.newton import Candidates
from sela_ext.kernels.sinkhorn import (
    SinkhornSums,
    check_logits,
    check_scale,
    check_vector,
    check_weights,
)


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
        every: read every so many blocks of 128 rows.
        keep: nats, or None.
        keep_at_most: entries.

    Returns:
        SinkhornSums; lse in float32 unless the logits are float64.
    """
    name = check_logits(logits)
    is_torch = isinstance(logits, torch.Tensor)
    x = (logits if is_torch else torch.from_numpy(logits.copy())).detach()
    rows, cols = x.shape
    g = torch.from_numpy(check_vector("potential", potential, cols)).to(x.device)
    w = torch.ones(rows) if row_weights is None else torch.from_numpy(check_weights(row_weights, rows))
    lam = torch.tensor(check_scale(scale, name), dtype=torch.float64)
    if name != "float64":
        g, lam = g.float().double(), lam.float().double()

    t = x.double() * lam.to(x.device) + g
    largest = float(torch.finfo(torch.float64 if name == "float64" else torch.float32).max)
    bad = torch.isnan(t).any(1) | (t > largest).any(1) | (t < -largest).all(1)
    t = torch.where(bad[:, None], 0.0, t)
    unread = (torch.arange(rows, device=x.device) // 128) % every != 0
    w = torch.where(bad | unread, 0.0, w.double().to(x.device))
    lse = t.logsumexp(1)
    column_sums = (w[:, None] * (t - lse[:, None]).exp()).sum(0)
    labels = torch.where(bad | unread, -1, t.argmax(1)).int() if want_labels else None
    objective, weight = float((w * lse).sum()), float(w.sum())
    lse = torch.where(bad, torch.nan, lse).to(torch.float64 if name == "float64" else torch.float32)
    if every > 1:
        known = torch.full_like(lse, torch.nan) if reference is None else torch.as_tensor(reference).to(lse)
        lse = torch.where(unread, known, lse)
    masked = int((bad & ~unread).sum())
    kept = None
    if keep is not None:
        log_p = torch.where((w > 0)[:, None], t - t.logsumexp(1, keepdim=True), -torch.inf)[~unread].cpu().numpy()
        given = None if row_weights is None else check_weights(row_weights, rows)[~unread.cpu().numpy()]
        kept = Candidates(log_p, given, keep, keep_at_most)
    if is_torch:
        return SinkhornSums(column_sums, objective, weight, lse, labels, masked, kept)
    return SinkhornSums(
        column_sums.numpy(), objective, weight, lse.numpy(), None if labels is None else labels.numpy(), masked, kept
    )
