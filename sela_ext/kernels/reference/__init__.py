"""Pure-torch (and numpy) twins of the compiled kernels: specification, fallback and baseline, same arguments."""

from __future__ import annotations

from sela_ext.kernels.reference.augment import augment, permutation, philox4x32, sample_parameters
from sela_ext.kernels.reference.rounding import best_labels, find_candidates, smooth_prices
from sela_ext.kernels.reference.sinkhorn import sinkhorn_pass

__all__ = [
    "augment",
    "best_labels",
    "find_candidates",
    "permutation",
    "philox4x32",
    "sample_parameters",
    "sinkhorn_pass",
    "smooth_prices",
]
