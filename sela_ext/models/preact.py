"""ResNet with pre-activation: the paper's ResNet-50."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

_EXPANSION = 4


class PreActBottleneck(nn.Module):
    """Batch norm and ReLU before each of three convolutions; the shortcut, where there is one, sees the first of them.

    Source: He et al., "Identity mappings in deep residual networks", ECCV 2016.
    """

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels_out = _EXPANSION * width
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, 4 width, H / stride, W / stride]."""
        active = F.relu(self.bn1(x))
        y = self.conv1(active)
        y = self.conv2(F.relu(self.bn2(y)))
        y = self.conv3(F.relu(self.bn3(y)))
        out: Tensor = y + (x if self.shortcut is None else self.shortcut(active))
        return out


class PreActResNet(nn.Module):
    """Pre-activation ResNet as the SeLa paper uses it: nothing between stem and blocks, nothing after the last block.

    The stem is a 7x7 stride-2 convolution and a max-pool, without batch norm or ReLU; the last block's output is
    averaged as it is. The names of its parameters are those of the released weights (`features.0`,
    `features.{2,3,4,5}.{block}.*`).

    Args:
        channels: image channels.
        blocks: residual blocks of the four stages; (3, 4, 6, 3) is ResNet-50.
        width: channels of the stem and of the first stage's inner convolutions.

    Attributes:
        feature_dim: 32 times `width`: 2048.

    Source: the SeLa paper (Asano et al., ICLR 2020), appendix; He et al., ECCV 2016.
    """

    def __init__(self, channels: int = 3, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> None:
        super().__init__()
        before = width
        stages: list[nn.Module] = []
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            layers: list[nn.Module] = []
            for block in range(count):
                layers.append(PreActBottleneck(before, inner, 2 if stage and block == 0 else 1))
                before = _EXPANSION * inner
            stages.append(nn.Sequential(*layers))
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1), *stages, nn.AdaptiveAvgPool2d(1)
        )
        self.feature_dim = before

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to features [B, feature_dim]."""
        features: Tensor = self.features(images).flatten(1)
        return features
