"""Pure-torch (and numpy) twins of the compiled kernels: specification, fallback and baseline, same arguments."""

from __future__ import annotations

from sela_ext.kernels.reference.anderson import anderson_step
from sela_ext.kernels.reference.augment import (
    augment,
    augment_resident,
    augment_views,
    permutation,
    philox4x32,
    sample_effects,
    sample_parameters,
)
from sela_ext.kernels.reference.augment_planes import augment_planes, needed_boxes
from sela_ext.kernels.reference.logits import store_logits
from sela_ext.kernels.reference.newton import newton_product, newton_prune, newton_rows, newton_solve, newton_sums
from sela_ext.kernels.reference.reader import Reader
from sela_ext.kernels.reference.rounding import best_labels, column_margins, find_candidates, smooth_prices
from sela_ext.kernels.reference.sinkhorn import sinkhorn_pass
from sela_ext.kernels.reference.vectors import vector_rows

__all__ = [
    "Reader",
    "anderson_step",
    "augment",
    "augment_planes",
    "augment_resident",
    "augment_views",
    "best_labels",
    "column_margins",
    "find_candidates",
    "needed_boxes",
    "newton_product",
    "newton_prune",
    "newton_rows",
    "newton_solve",
    "newton_sums",
    "permutation",
    "philox4x32",
    "sample_effects",
    "sample_parameters",
    "sinkhorn_pass",
    "smooth_prices",
    "store_logits",
    "vector_rows",
]
