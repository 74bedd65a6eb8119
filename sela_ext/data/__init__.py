"""Sources of images, augmentation, and the Loader."""

from sela_ext.kernels.augment import Augment

__all__ = ["Augment"]
