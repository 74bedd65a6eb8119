"""Pure-torch (and numpy) twins of the compiled kernels: specification, fallback and baseline, same arguments."""

from __future__ import annotations

from sela_ext.kernels.reference.augment import (
    augment,
    augment_resident,
    permutation,
    philox4x32,
    sample_parameters,
)
from sela_ext.kernels.reference.logits import store_logits
from sela_ext.kernels.reference.newton import newton_product, newton_prune, newton_rows, newton_solve, newton_sums
from sela_ext.kernels.reference.rounding import best_labels, column_margins, find_candidates, smooth_prices
from sela_ext.kernels.reference.sinkhorn import sinkhorn_pass

__all__ = [
    "augment",
    "augment_resident",
    "best_labels",
    "column_margins",
    "find_candidates",
    "newton_product",
    "newton_prune",
    "newton_rows",
    "newton_solve",
    "newton_sums",
    "permutation",
    "philox4x32",
    "sample_parameters",
    "sinkhorn_pass",
    "smooth_prices",
    "store_logits",
]
