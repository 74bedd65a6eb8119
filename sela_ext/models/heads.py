"""Cluster heads: linear or cosine classifiers that share one feature vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Heads(nn.Module):
    """T cluster heads on one feature vector, kept in one matrix so that they are one product.

    Args:
        feature_dim: length D of the feature vector.
        clusters: number of clusters K_t of every head.
        kind: "linear" (the paper: weights N(0, 0.01), bias 0) or "cosine" (features and prototypes of length one,
            no bias, divided by `temperature`).
        temperature: of the cosine heads.
    """

    def __init__(
        self, feature_dim: int, clusters: Sequence[int], kind: str = "linear", temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.clusters = [int(k) for k in clusters]
        self.kind = kind
        self.temperature = float(temperature)
        self.weight = nn.Parameter(torch.empty(sum(self.clusters), feature_dim))
        self.bias: nn.Parameter | None = None
        if kind == "linear":
            nn.init.normal_(self.weight, 0.0, 0.01)
            self.bias = nn.Parameter(torch.zeros(sum(self.clusters)))
        else:
            # The length of a prototype is its step size: directions turn by about lr / length^2.
            nn.init.uniform_(self.weight, -(feature_dim**-0.5), feature_dim**-0.5)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map embeddings [B, D] to the logits of all heads side by side, float32 [B, sum K_t]."""
        return self._logits(embedding, slice(None))

    def logits_of(self, head: int, embedding: Tensor) -> Tensor:
        """Map embeddings [B, D] to the logits of one head, float32 [B, K_head]."""
        start = sum(self.clusters[:head])
        return self._logits(embedding, slice(start, start + self.clusters[head]))

    def as_linear(self, head: int) -> tuple[Tensor, Tensor | None, bool]:
        """Weight, bias, and whether embeddings are scaled to length one first: one head as a linear map, detached.

        Returns:
            float32 [K_head, D], float32 [K_head] or None, and a bool: `logits_of` up to rounding.
        """
        start = sum(self.clusters[:head])
        rows = slice(start, start + self.clusters[head])
        weight = self.weight[rows].detach().float()
        if self.kind == "cosine":
            return F.normalize(weight, dim=1) / self.temperature, None, True
        return weight, None if self.bias is None else self.bias[rows].detach().float(), False

    def split(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Cut what `forward` returned into one [B, K_t] per head."""
        return torch.split(logits, self.clusters, dim=1)

    def _logits(self, embedding: Tensor, rows: slice) -> Tensor:
        embedding, weight = embedding.float(), self.weight[rows]
        if self.kind == "cosine":
            return F.linear(F.normalize(embedding, dim=1), F.normalize(weight, dim=1)) / self.temperature
        return F.linear(embedding, weight, None if self.bias is None else self.bias[rows])


def make_projection(feature_dim: int, widths: int | Sequence[int]) -> tuple[nn.Module, int]:
    """Build the layers between the backbone's features and the heads.

    Args:
        feature_dim: length of the features.
        widths: a number: Linear + batch norm + ReLU of that width (0: nothing); or a list: every entry but the last is
            such a layer, and the last is a Linear alone. [2048, 128] is SwAV's and SeLa-v2's.

    Returns:
        The module, and the length of what it gives.

    Example:
        >>> module, length = make_projection(512, [2048, 128])
        >>> [type(layer).__name__ for layer in module], length
        (['Linear', 'BatchNorm1d', 'ReLU', 'Linear'], 128)

    Source: Caron et al., SwAV (NeurIPS 2020), appendix.
    """
    hidden, last = ([widths] if widths else [], None) if isinstance(widths, int) else (widths[:-1], widths[-1])
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(feature_dim, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        feature_dim = width
    if last is not None:
        layers.append(nn.Linear(feature_dim, last))
        feature_dim = last
    return (nn.Sequential(*layers) if layers else nn.Identity()), feature_dim


def projection_widths(state: Mapping[str, Tensor]) -> int | list[int]:
    """Find the `widths` that `make_projection` was given, from the weights of what it built.

    Example:
        >>> projection_widths(make_projection(64, 32)[0].state_dict())
        32
        >>> projection_widths(make_projection(64, [32, 8])[0].state_dict())
        [32, 8]
    """
    linear = sorted(
        (int(name.partition(".")[0]), len(tensor))
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.ndim == 2
    )
    if not linear:
        return 0
    widths = [width for _, width in linear]
    if f"{linear[-1][0] + 1}.running_mean" not in state:
        return widths
    return widths[0]


class Network(nn.Module):
    """Backbone, optional projection, and heads.

    Args:
        backbone: maps images to features [B, D].
        feature_dim: D.
        clusters: number of clusters of every head.
        projection: what stands in front of the heads, see `make_projection`; 0 = nothing.
        head_kind: see `Heads`.
        temperature: see `Heads`.
        channels_in: image channels the backbone takes; one-channel images are repeated to fit.
        name: of the backbone, for messages and reports.
        rotation: have a further linear layer that tells four rotations apart.

    Attributes:
        rotation: that layer, from embeddings [B, embedding_dim] to [B, 4]; else None.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        clusters: Sequence[int],
        *,
        projection: int | Sequence[int] = 0,
        head_kind: str = "linear",
        temperature: float = 0.07,
        channels_in: int = 3,
        name: str = "",
        rotation: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.channels_in = channels_in
        self.projection, self.embedding_dim = make_projection(feature_dim, projection)
        self.heads = Heads(self.embedding_dim, clusters, head_kind, temperature)
        self.rotation: nn.Module | None = None
        if rotation:
            self.rotation = nn.Linear(self.embedding_dim, 4)
            nn.init.normal_(self.rotation.weight, 0.0, 0.01)
            nn.init.zeros_(self.rotation.bias)

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to the backbone's features [B, feature_dim]."""
        if images.shape[1] == 1 and self.channels_in == 3:
            images = images.expand(-1, 3, -1, -1)
        features: Tensor = self.backbone(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to embeddings [B, embedding_dim]: what the heads see."""
        embedding: Tensor = self.projection(self.features(images))
        return embedding
