"""Weights that others released: the checkpoints of SeLa and DeepCluster, and networks under torchvision's names."""

from sela_ext.compat.released import load_released

__all__ = ["load_released"]
