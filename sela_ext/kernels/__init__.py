"""The compiled kernels behind argument checks, and their pure-torch twins in `sela_ext.kernels.reference`.

The only package that imports `sela_ext._core`.
"""

from __future__ import annotations

from sela_ext.kernels.sinkhorn import SinkhornSums as SinkhornSums
from sela_ext.kernels.sinkhorn import sinkhorn_pass as sinkhorn_pass
