"""The fixed Sobel filter in front of DeepCluster's networks."""

from __future__ import annotations

import torch
from torch import nn


class Sobel(nn.Sequential):
    """Grey (a third of each channel), then the horizontal and the vertical Sobel filter; nothing of it is trained.

    Maps images [B, 3, H, W] to [B, 2, H, W]. Its parameters are named `0.weight` ... `1.bias`, as in the released
    DeepCluster weights.

    Source: Caron et al., "Deep clustering for unsupervised learning of visual features", ECCV 2018, section 3.3.
    """

    def __init__(self) -> None:
        grey, edges = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 3, padding=1)
        down = torch.tensor([1.0, 2.0, 1.0])
        across = torch.tensor([1.0, 0.0, -1.0])
        kernels = torch.stack([torch.outer(down, across), torch.outer(across, down)])[:, None]
        nn.init.constant_(grey.weight, 1.0 / 3.0)
        edges.weight = nn.Parameter(kernels)
        for layer in (grey, edges):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        super().__init__(grey, edges)
        self.requires_grad_(False)
