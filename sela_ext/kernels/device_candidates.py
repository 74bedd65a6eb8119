"""Candidates of a pass on a CUDA device: the entries of a plan that count, as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class DeviceCandidates:
    """The entries with p > exp(-level) at the potential of one pass, row by row (CSR), where the logits are.

    The same as the compiled module's `Candidates` on the CPU. Entries are in the order of the rows read, then of their
    columns, whatever the order in which blocks ran. Rows that are masked or of weight 0 have none.

    Attributes:
        level: nats, > 0.
        limit: with more entries than this none are kept.
        overflow: there were more than `limit`; columns and values are then empty, and all offsets 0.
        rows: rows read by the pass.
        cols: K.
        offsets: int64 [rows + 1]: the entries of the r-th row read are offsets[r] .. offsets[r + 1].
        columns: int32 [entries].
        values: float32 [entries], log p, so that p at the potential g + d is softmax(value + d).
        weights: float32 [rows] row weights of the rows read, or None: all 1.
    """

    level: float
    limit: int
    overflow: bool
    rows: int
    cols: int
    offsets: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor | None = None

    @property
    def entries(self) -> int:
        """How many there are."""
        return int(self.values.shape[0])
