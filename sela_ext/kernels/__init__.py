"""The compiled kernels behind argument checks, and their pure-torch twins in `sela_ext.kernels.reference`.

The only package that imports `sela_ext._core`.
"""

from sela_ext.kernels.augment import PARAMETERS, Augment, augment, permutation, sample_parameters

__all__ = ["PARAMETERS", "Augment", "augment", "permutation", "sample_parameters"]
