"""VGG16 with batch norm, as DeepCluster trains it."""

from __future__ import annotations

from torch import Tensor, nn

from sela_ext.models.alexnet import initialise
from sela_ext.models.sobel import Sobel

# Channels of the 3x3 convolutions; 0 is a 2x2 max-pool.
_LAYOUT = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class VGG16(nn.Module):
    """VGG16 with batch norm after every convolution; its feature is fc7 after the ReLU.

    The names of its parameters are those of the released DeepCluster weights (`features.0` ... `classifier.3`,
    `sobel.0`, `sobel.1`).

    Args:
        channels: image channels; with `sobel` always 3.
        sobel: put the fixed Sobel filter in front, so that the first convolution sees 2 channels.

    Attributes:
        feature_dim: 4096.

    Source: Caron et al., "Deep clustering for unsupervised learning of visual features", ECCV 2018.
    """

    def __init__(self, channels: int = 3, sobel: bool = False) -> None:
        super().__init__()
        self.sobel: nn.Module | None = Sobel() if sobel else None
        channels = 2 if sobel else channels
        layers: list[nn.Module] = []
        for width in _LAYOUT:
            if not width:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(7)  # the identity at 224 pixels
        self.classifier = nn.Sequential(
            nn.Linear(channels * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
        )
        self.feature_dim = 4096
        initialise(self.features, self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, H, W] (H, W >= 32) to features [B, 4096]."""
        if self.sobel is not None:
            images = self.sobel(images)
        features: Tensor = self.classifier(self.pool(self.features(images)).flatten(1))
        return features
