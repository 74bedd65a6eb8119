"""The memory bank: what the heads saw of every image when it was last trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sela_ext.assign import shard_rows
from sela_ext.training.embedding import owners
from sela_ext.training.ranks import Ranks


class Bank:
    """Embeddings of all images, so that a label pass needs no forward pass.

    Over several ranks each holds the rows that it owns, those of `sela_ext.shard_rows`; what its steps write is for
    rows of all ranks, and is sent to their owners by `settle`.

    Args:
        images: N.
        device: where it lives.
        ranks: who shares it; None: nobody.

    Attributes:
        embeddings: [N, E] in the type the network computes in; [0] before anything was written. The rows of this rank.
        valid: bool [N]; whether the image was seen. The rows of this rank.

    Source: the memory bank of DeepCluster-v2 and SeLa-v2 (Caron et al., "Unsupervised learning of visual features by
    contrasting cluster assignments", NeurIPS 2020, appendix).
    """

    def __init__(self, images: int, device: torch.device, ranks: Ranks | None = None) -> None:
        self.device = device
        self._images, self._ranks = images, ranks or Ranks()
        self._own = shard_rows(images, self._ranks.world_size, self._ranks.rank)
        self.embeddings = torch.zeros(0, device=device)
        self.valid = torch.zeros(self._own.stop - self._own.start, dtype=torch.bool, device=device)
        # What was written and not settled: number of the write, rows, embeddings.
        self._written: list[tuple[int, Tensor, Tensor]] = []
        self._writes = 0

    def fill(self, embeddings: Tensor, valid: Tensor) -> None:
        """Take what one look at all images gave, the rows of this rank; they are kept, not copied."""
        self.embeddings, self.valid = embeddings, valid

    def write(self, index: Tensor, embedding: Tensor) -> None:
        """Note the embeddings [B, E] of the images with these numbers, int64 [B]; all ranks call it equally often."""
        rows = index.to(self.device, non_blocking=True)
        if self._ranks.several:
            self._writes += 1
            self._written.append((self._writes, rows.clone(), embedding.detach().to(self.embeddings.dtype, copy=True)))
            return
        self.embeddings[rows] = embedding.detach().to(self.embeddings.dtype)
        self.valid[rows] = True

    def settle(self) -> None:
        """Send what was written to the owners of the rows. All ranks call it; of several writes the last one counts."""
        if not self._ranks.several or not self._writes:
            return
        width = self.embeddings.shape[1:]
        nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
        rows = torch.cat([rows for _, rows, _ in self._written] or [nothing])
        numbers = torch.cat([torch.full_like(rows, number) for number, rows, _ in self._written] or [nothing])
        empty = torch.zeros((0, *width), dtype=self.embeddings.dtype, device=self.device)
        embeddings = torch.cat([part for _, _, part in self._written] or [empty])
        self._written, self._writes = [], 0
        target = owners(rows, self._images, self._ranks.world_size)
        rows, numbers, embeddings = (self._ranks.deal(part, target) for part in (rows, numbers, embeddings))
        order = torch.argsort(numbers, stable=True)
        rows = rows[order] - self._own.start
        # Of each row its last write, which has the largest place.
        last = torch.full((len(self.valid),), -1, dtype=torch.int64, device=self.device)
        last.scatter_reduce_(0, rows, torch.arange(len(rows), device=self.device), "amax")
        places = (last >= 0).nonzero()[:, 0]
        self.embeddings[places] = embeddings[order[last[places]]]
        self.valid[places] = True

    def state(self) -> dict[str, Any]:
        """Everything, on the CPU, for a checkpoint: of all ranks, on rank 0; the others give what is of no use."""
        self.settle()
        if not self._ranks.several:
            return {"embeddings": self.embeddings.cpu(), "valid": self.valid.cpu()}
        parts = [[part.cpu() for part in self._ranks.rows_to_first(rows)] for rows in (self.embeddings, self.valid)]
        if not self._ranks.first:
            return {}
        return {"embeddings": torch.cat(parts[0]), "valid": torch.cat(parts[1])}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave, on however many ranks."""
        self.embeddings = state["embeddings"][self._own].to(self.device)
        self.valid = state["valid"][self._own].to(self.device)
        if self._ranks.several:  # a slice would keep everything in memory
            self.embeddings, self.valid = self.embeddings.clone(), self.valid.clone()
