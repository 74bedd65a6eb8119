"""Pure-torch twins of the compiled kernels: same names and arguments, written to be read."""

from __future__ import annotations

from sela_ext.kernels.reference.sinkhorn import sinkhorn_pass as sinkhorn_pass
