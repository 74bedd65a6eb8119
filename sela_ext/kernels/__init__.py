"""The compiled kernels behind argument checks, and their pure-torch twins in `sela_ext.kernels.reference`.

The only package that imports `sela_ext._core`.
"""

from __future__ import annotations

import importlib
from typing import Any

from sela_ext.kernels.sinkhorn import SinkhornSums as SinkhornSums
from sela_ext.kernels.sinkhorn import sinkhorn_pass as sinkhorn_pass


def __getattr__(name: str) -> Any:
    if name == "reference":  # imports torch, so only on demand
        return importlib.import_module("sela_ext.kernels.reference")
    raise AttributeError(f"module 'sela_ext.kernels' has no attribute {name!r}")
