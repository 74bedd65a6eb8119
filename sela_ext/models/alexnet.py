"""AlexNet with batch norm, as in the SeLa paper."""

from __future__ import annotations

import math

from torch import Tensor, nn

from sela_ext.models.sobel import Sobel

# (channels, kernel, stride, padding) of the five convolutions; "M" is a 3x3 stride-2 max-pool.
_LAYOUTS: dict[str, list[tuple[int, int, int, int] | str]] = {
    "big": [(96, 11, 4, 2), "M", (256, 5, 1, 2), "M", (384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1), "M"],
    "small": [(64, 11, 4, 2), "M", (192, 5, 1, 2), "M", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), "M"],
}


class AlexNet(nn.Module):
    """AlexNet with batch norm after every convolution and without local response normalisation.

    The names of its parameters are those of the released SeLa and DeepCluster weights (`features.0` ...
    `classifier.4`, `sobel.0`, `sobel.1`).

    Args:
        channels: image channels; with `sobel` always 3.
        layout: "big" (96-256-384-384-256) or "small" (64-192-384-256-256).
        sobel: put DeepCluster's fixed Sobel filter in front, so that the first convolution sees 2 channels.

    Attributes:
        feature_dim: 4096.

    Source: section 4 and appendix of the SeLa paper (Asano et al., ICLR 2020).
    """

    def __init__(self, channels: int = 3, layout: str = "big", sobel: bool = False) -> None:
        super().__init__()
        self.sobel: nn.Module | None = Sobel() if sobel else None
        channels = 2 if sobel else channels
        layers: list[nn.Module] = []
        for item in _LAYOUTS[layout]:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(3, 2))
                continue
            width, kernel, stride, padding = item
            layers += [
                nn.Conv2d(channels, width, kernel, stride, padding),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(6)  # the identity at 224 pixels, where the paper's network has 6 x 6 already
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(channels * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
        )
        self.feature_dim = 4096
        initialise(self.features, self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, H, W] (H, W >= 63) to features [B, 4096]."""
        if self.sobel is not None:
            images = self.sobel(images)
        features: Tensor = self.classifier(self.pool(self.features(images)).flatten(1))
        return features


def initialise(*parts: nn.Module) -> None:
    """Draw the weights of convolutions from N(0, sqrt(2 / (k k out))), of linear layers from N(0, .01); biases 0.

    Source: the SeLa paper's AlexNet and DeepCluster's networks.
    """
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)
