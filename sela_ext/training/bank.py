"""The memory bank: what the heads saw of every image when it was last trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Bank:
    """Embeddings of all images, so that a label pass needs no forward pass.

    Args:
        images: N.
        device: where it lives.

    Attributes:
        embeddings: [N, E] in the type the network computes in; [0] before anything was written.
        valid: bool [N]; whether the image was seen.

    Source: the memory bank of DeepCluster-v2 and SeLa-v2 (Caron et al., "Unsupervised learning of visual features by
    contrasting cluster assignments", NeurIPS 2020, appendix).
    """

    def __init__(self, images: int, device: torch.device) -> None:
        self.device = device
        self.embeddings = torch.zeros(0, device=device)
        self.valid = torch.zeros(images, dtype=torch.bool, device=device)

    def fill(self, embeddings: Tensor, valid: Tensor) -> None:
        """Take what one look at all images gave: embeddings [N, E], valid bool [N]; they are kept, not copied."""
        self.embeddings, self.valid = embeddings, valid

    def write(self, index: Tensor, embedding: Tensor) -> None:
        """Note the embeddings [B, E] of the images with these numbers, int64 [B]."""
        rows = index.to(self.device, non_blocking=True)
        self.embeddings[rows] = embedding.detach().to(self.embeddings.dtype)
        self.valid[rows] = True

    def state(self) -> dict[str, Any]:
        """Everything, on the CPU, for a checkpoint."""
        return {"embeddings": self.embeddings.cpu(), "valid": self.valid.cpu()}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.embeddings, self.valid = state["embeddings"].to(self.device), state["valid"].to(self.device)
