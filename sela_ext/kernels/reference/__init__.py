"""Pure-torch (and numpy) twins of the compiled kernels: specification, fallback and baseline, same arguments."""

from __future__ import annotations

from sela_ext.kernels.reference.augment import (
    augment,
    augment_resident,
    permutation,
    philox4x32,
    sample_parameters,
)
from sela_ext.kernels.reference.sinkhorn import sinkhorn_pass

__all__ = ["augment", "augment_resident", "permutation", "philox4x32", "sample_parameters", "sinkhorn_pass"]
