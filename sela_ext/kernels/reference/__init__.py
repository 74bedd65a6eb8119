"""Pure-torch (and numpy) twins of the compiled kernels: specification, fallback and baseline, same arguments."""

from sela_ext.kernels.reference.augment import augment, permutation, philox4x32, sample_parameters

__all__ = ["augment", "permutation", "philox4x32", "sample_parameters"]
