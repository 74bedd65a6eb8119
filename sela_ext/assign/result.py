"""What `assign` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sela_ext.errors import DataError
from sela_ext.kernels.sinkhorn import sinkhorn_pass


@dataclass(frozen=True)
class Assignment:
    """Balanced labels, and how they were reached. Arrays are of the kind of the logits (numpy, torch, its device).

    Attributes:
        labels: int32 [N], -1 for masked rows.
        potential: float64 [K], log beta for lambda * logits, nats, with sum_k b_k potential_k = 0.
        error: sum_k |column share_k - b_k| at this potential, measured on the whole matrix; 0 .. 2.
        converged: whether the stopping rule was met.
        passes: full reads of the N x K data.
        sizes: int64 [K], images per label.
        objective: sum_k b_k g_k - sum_i a_i lse_i, nats per image; the solution has the largest.
        seconds: wall-clock time of the solve.
        backend: "cpu-avx512", "cpu-avx2", "cpu-generic", "cuda", or "torch" on a CUDA device whose kernels are not used
            (see `sela_ext.kernels.device_verdict`).
        method: "sinkhorn" or "anderson": what "auto" became.
        history: per pass a dict of passes, error, objective, seconds (and row_error for the official rule).
        masked: number of masked rows.
        ties: rows whose label was chosen among equal scores to balance the clusters (0 on ordinary data).
        lam: lambda.
    """

    labels: Any
    potential: Any
    error: float
    converged: bool
    passes: float
    sizes: Any
    objective: float
    seconds: float
    backend: str
    method: str
    history: tuple[dict[str, float], ...]
    masked: int
    ties: int
    lam: float

    def predict(self, new_logits: Any) -> Any:
        """Labels for images that were not in the solve: argmax_k (lambda * logit_k + potential_k).

        Args:
            new_logits: [M, K] from the same network and head.

        Returns:
            int32 [M], of the kind of new_logits; -1 for rows with NaN, +inf or only -inf.

        Raises:
            DataError: another number of clusters.

        Example:
            >>> import numpy as np, sela_ext
            >>> a = sela_ext.assign(np.eye(3, dtype=np.float32))
            >>> a.predict(np.eye(3, dtype=np.float32)[[2, 0]]).tolist()
            [2, 0]
        """
        shape: Any = getattr(new_logits, "shape", ())
        if len(shape) == 2 and shape[1] != len(self.potential):
            raise DataError(f"new_logits: expected {len(self.potential)} columns, as in the solve, found {shape[1]}")
        return sinkhorn_pass(new_logits, self.potential, scale=self.lam, want_labels=True).labels
