"""The compiled kernels behind argument checks, and their pure-torch twins in `sela_ext.kernels.reference`.

The only package that imports `sela_ext._core`.
"""

from typing import Any

from sela_ext.kernels.augment import PARAMETERS, Augment, augment, permutation, sample_parameters

__all__ = ["PARAMETERS", "Augment", "augment", "permutation", "sample_parameters"]


def __getattr__(name: str) -> Any:
    if name == "reference":  # loaded at its first use: it is not needed in training
        import importlib

        return importlib.import_module("sela_ext.kernels.reference")
    raise AttributeError(f"module 'sela_ext.kernels' has no attribute {name!r}")
