"""Small networks for images below 64 pixels."""

from __future__ import annotations

import math
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


class AttentionBlock(nn.Module):
    """Layer norm, self-attention, sum; layer norm, two linear layers, sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, L, width] to the same shape."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return x


class SmallViT(nn.Module):
    """A vision transformer for tiny images: patches of 4 x 4 pixels, the mean of the last tokens as the feature.

    The positions are sines and cosines of the place in the image, from 0 to 1: images of every size of at least a patch
    are taken, and a picture and its copy at half the size are told the same places. Pixels beyond the last whole patch
    are left out.

    Args:
        channels: image channels.
        width: length of a token, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: of the attention.
        patch: pixels on a side of a patch.

    Attributes:
        feature_dim: length of the feature vector, `width`.

    Source: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021; Beyer, Zhai, Kolesnikov, "Better plain ViT
    baselines for ImageNet-1k", 2022 (fixed positions, mean of the tokens).
    """

    def __init__(self, channels: int = 3, width: int = 128, depth: int = 6, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, patch, patch)
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.feature_dim = width
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to features [B, feature_dim]."""
        patches = self.stem(images)
        tokens = patches.flatten(2).transpose(1, 2) + patch_positions(patches)
        features: Tensor = self.norm(self.blocks(tokens)).mean(1)
        return features


def patch_positions(patches: Tensor) -> Tensor:
    """Sines and cosines of rows and columns of patches [B, width, H, W]: [H * W, width], of their type and device."""
    width, quarter = patches.shape[1], patches.shape[1] // 4
    # From half a turn to 8 turns over the image: neighbouring patches differ, and far ones are not taken for near.
    turns = torch.logspace(-1, 3, quarter, base=2.0, device=patches.device) * (2 * math.pi)
    rows, columns = (
        ((torch.arange(side, device=patches.device) + 0.5) / side)[:, None] * turns for side in patches.shape[2:]
    )
    code = torch.cat(
        [
            torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, len(columns), -1),
            torch.cat([columns.sin(), columns.cos()], 1)[None].expand(len(rows), -1, -1),
        ],
        2,
    )
    return code.reshape(-1, width).to(patches.dtype)
