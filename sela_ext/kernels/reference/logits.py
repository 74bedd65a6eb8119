"""Pure-torch twin of the conversion of logits to 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sela_ext.kernels.logits import IMPOSSIBLE, STEPS, StoredLogits, check_logits


def store_logits(
    logits: Any,
    kind: str = "fixed16",
    *,
    lam: float = 1.0,
    threads: int = 0,
    out: StoredLogits | None = None,
    first_row: int = 0,
    isa: str = "",
) -> StoredLogits:
    """The same as `sela_ext.kernels.store_logits`, in torch.

    Args:
        logits: [N, K].
        kind: "fixed16", "float16" or "bfloat16".
        lam: lambda > 0.
        threads: unused.
        out: write into these, or None.
        first_row: of `out`.
        isa: unused.

    Returns:
        StoredLogits.
    """
    name = check_logits(logits)
    x = (logits if isinstance(logits, torch.Tensor) else torch.from_numpy(logits.copy())).detach()
    x = x.double() if name == "float64" else x.float()
    largest = float(torch.finfo(torch.float32).max)
    top = x.amax(1)
    bad = ~((x <= torch.finfo(x.dtype).max).all(1) & (top.abs() <= largest) & ((top.double() * lam).abs() <= largest))
    distance = torch.where(bad[:, None], 0.0, top[:, None] - x)
    if kind == "fixed16":
        steps = distance * torch.tensor(STEPS * lam, dtype=torch.float64).to(x.dtype)
        steps = steps.float().round().clamp(max=float(IMPOSSIBLE))
        lost = steps == IMPOSSIBLE
        values = np.where(bad.numpy()[:, None], IMPOSSIBLE, steps.numpy()).astype(np.uint16)
    else:
        narrow = (0.0 - distance).float().to(torch.float16 if kind == "float16" else torch.bfloat16)
        narrow[bad] = torch.nan
        lost = narrow == -torch.inf
        values = narrow.numpy() if kind == "float16" else narrow.view(torch.int16).numpy().view(np.uint16)
    saturated = int((lost & (x > -torch.inf) & ~bad[:, None]).sum())
    maxima = torch.where(bad, torch.nan, top).float().numpy()
    if out is None:
        return StoredLogits(values, kind, maxima, saturated, float(lam))
    out.values[first_row : first_row + len(values)] = values
    out.maxima[first_row : first_row + len(values)] = maxima
    return StoredLogits(out.values, kind, out.maxima, out.saturated + saturated, float(lam))
