"""Small networks for images below 64 pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a 1x1 shortcut where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class SmallResNet(nn.Module):
    """Three residual blocks behind a 4x4 stride-2 stem, average pooled: the quickest network here.

    Args:
        channels: image channels.
        widths: channels of the blocks; every block but the first halves the resolution.

    Attributes:
        feature_dim: length of the feature vector, `widths[-1]`.
    """

    def __init__(self, channels: int = 3, widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 4, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        before = [widths[0], *widths[:-1]]
        self.blocks = nn.Sequential(
            *(ResidualBlock(b, w, 1 if i == 0 else 2) for i, (b, w) in enumerate(zip(before, widths, strict=True)))
        )
        self.feature_dim = int(widths[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to features [B, feature_dim]."""
        features: Tensor = self.blocks(self.stem(images)).mean((2, 3))
        return features


class ConvGroup(nn.Module):
    """Conv, 2x2 max-pool, batch norm, ReLU, conv, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H // 2, W // 2]."""
        x = F.relu(self.bn1(F.max_pool2d(self.conv1(x), 2)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)), inplace=True)


class SmallConvNet(nn.Module):
    """Plain convolutional groups behind a 2x2 stem, max pooled; after the CIFAR speed-run networks (airbench).

    Args:
        channels: image channels.
        widths: channels of the groups; every group halves the resolution.

    Attributes:
        feature_dim: length of the feature vector, `widths[-1]`.
    """

    def __init__(self, channels: int = 3, widths: Sequence[int] = (32, 128, 256)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 24, 2, bias=True), nn.ReLU(inplace=True))
        before = [24, *widths[:-1]]
        self.groups = nn.Sequential(*(ConvGroup(b, w) for b, w in zip(before, widths, strict=True)))
        self.feature_dim = int(widths[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to features [B, feature_dim]."""
        features: Tensor = torch.amax(self.groups(self.stem(images)), (2, 3))
        return features
