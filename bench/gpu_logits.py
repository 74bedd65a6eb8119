"""Logits for the benchmarks on a card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gpu import Card

LAM = 25.0
SEED = 7


def random_logits(card: Card, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits of an untrained network: hundreds of live entries a row. Filled in parts, without a larger copy."""
    logits = torch.empty(rows, cols, dtype=dtype, device=card.place)
    generator = torch.Generator(card.place).manual_seed(SEED)
    for part in logits.split(max(1, (1 << 26) // cols)):
        part.normal_(0.0, 0.1, generator=generator)
    return logits
