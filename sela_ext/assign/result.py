"""What `assign` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sela_ext.assign.sources import logits_pass
from sela_ext.errors import DataError
from sela_ext.kernels.sinkhorn import check_logits

SOFT_ROWS = 4096  # rows at once in float64


@dataclass(frozen=True)
class Assignment:
    """Balanced labels, and how they were reached. Arrays are of the kind of the logits (numpy, torch, its device).

    Attributes:
        labels: int32 [N], -1 for masked rows.
        potential: float64 [K], log beta for lambda * logits, nats, with sum_k b_k potential_k = 0 (with relax and
            size_bounds the constant counts, and is what it is).
        error: sum_k |column share_k - b_k| at this potential, measured on the whole matrix; 0 .. 2. With relax and
            size_bounds b_k is what they ask for there.
        converged: whether the stopping rule was met.
        passes: full reads of the N x K data; a read of a part counts as that part.
        sizes: int64 [K], images per label.
        objective: sum_k b_k g_k - sum_i a_i lse_i, nats per image; the solution has the largest.
        seconds: wall-clock time of the solve.
        backend: "cpu-avx512", "cpu-avx2", "cpu-generic", "cuda", or "torch" on a CUDA device whose kernels are not used
            (see `sela_ext.kernels.device_verdict`).
        method: "sinkhorn", "anderson" or "newton": what "auto" became.
        reason: why that method, in words; where Newton gave up and Anderson went on, that too; and why that storage.
        history: per pass a dict of passes, error, objective, seconds (and row_error for the official rule). Newton's
            passes at a smaller lambda, or over a part of the rows, name their lam and rows; their error is the one
            there. Passes over a copy name its bits (16; 64 where float32 did not suffice); their error is that of the
            copy.
        storage: "fixed16", "float16" or "bfloat16" where the solve worked on such a copy; else the type of the logits.
        masked: number of masked rows.
        ties: rows whose label was chosen among equal scores to balance the clusters (0 on ordinary data).
        lam: lambda.
        gap: balance="exact" only: the labels lose at most so much to the best ones of admissible sizes, nats per image
            (of logits, not lambda * logits), by the dual bound [sum_i max_j (lambda L_ij + p_j) - min over admissible
            sizes n of sum_j n_j p_j] / lambda at p = `prices`. inf when images had to be given impossible clusters.
        prices: balance="exact" only: float64 [K], nats, the dual solution behind `gap`.
        warnings: what `assign` has warned of, a line each: labels far from balanced.
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
    reason: str
    history: tuple[dict[str, float], ...]
    storage: str
    masked: int
    ties: int
    lam: float
    gap: float | None = None
    prices: Any | None = None
    warnings: tuple[str, ...] = ()

    def predict(self, new_logits: Any, *, soft: bool = False) -> Any:
        """Labels for images that were not in the solve: argmax_k (lambda * logit_k + potential_k).

        Args:
            new_logits: [M, K] from the same network and head, numpy (memory-mapped, too) or torch, CPU or CUDA, or
                FeatureLogits.
            soft: return the softmax instead of its argmax.

        Returns:
            int32 [M], of the kind of new_logits; -1 for rows with NaN, +inf or only -inf. With soft, [M, K] float32
            (float64 for float64), rows of sum 1; zeros for those rows.

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
        if soft:
            return self._soft(new_logits)
        return logits_pass(new_logits, self.potential, scale=self.lam, want_labels=True).labels

    def _soft(self, new_logits: Any) -> Any:
        import torch

        name = check_logits(new_logits)
        potential = torch.as_tensor(self.potential).detach()
        parts = []
        is_torch = False
        for first in range(0, max(1, len(new_logits)), SOFT_ROWS):
            part = new_logits[first : first + SOFT_ROWS]
            is_torch = hasattr(part, "detach")
            x = part.detach() if is_torch else torch.from_numpy(part.copy())
            score = self.lam * x.double() + potential.to(x.device, torch.float64)
            top = score.amax(1, keepdim=True)
            plan = torch.where(torch.isfinite(top), (score - top).softmax(1), 0.0)
            parts.append(plan if name == "float64" else plan.float())
        plan = torch.cat(parts)
        return plan if is_torch else plan.numpy()
