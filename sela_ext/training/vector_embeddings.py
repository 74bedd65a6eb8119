"""Embeddings of feature vectors that a network merely standardises: computed when they are read, never stored."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sela_ext.data import Source
from sela_ext.data.source import Int64Array
from sela_ext.data.vectors import VectorSource
from sela_ext.models import Network, Standardize


class VectorEmbeddings:
    """Stands in for a tensor [N, D]: rows are gathered and standardised when they are asked for.

    A million rows of 384 numbers would take 1.5 GB in float32; the file that they come from is read instead, which
    costs little beside what is done with them.

    Args:
        vectors: N rows of D numbers.
        standardize: what becomes of them.
        rows: which of them, int64; None: all.
    """

    on_demand = True
    dtype = torch.float32

    def __init__(self, vectors: VectorSource, standardize: Standardize, rows: Int64Array | None = None) -> None:
        self._vectors = vectors
        self._standardize = standardize
        self._rows = rows

    @property
    def shape(self) -> tuple[int, int]:
        """N, D."""
        return len(self), self._vectors.width

    @property
    def device(self) -> torch.device:
        """Where rows are delivered."""
        return self._standardize.mean.device

    def __len__(self) -> int:
        return len(self._vectors) if self._rows is None else len(self._rows)

    @torch.no_grad()
    def __getitem__(self, rows: Any) -> Tensor:
        """Rows by a slice, by their numbers int64 [B], or by a mask bool [N]: float32 [B, D]."""
        if isinstance(rows, slice):
            chosen = np.arange(*rows.indices(len(self)))
        else:
            chosen = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
            chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.reshape(-1)
        if self._rows is not None:
            chosen = self._rows[chosen]
        taken = torch.from_numpy(self._vectors.take(chosen, threads=1))
        return cast(Tensor, self._standardize(taken.to(self.device)))

    def subset(self, rows: Tensor) -> VectorEmbeddings:
        """Some of the rows, int64 [B], as embeddings of their own; nothing is read."""
        chosen = rows.cpu().numpy()
        return VectorEmbeddings(self._vectors, self._standardize, chosen if self._rows is None else self._rows[chosen])

    def whole(self) -> VectorEmbeddings:
        """All rows that there are, of whichever these are some."""
        return VectorEmbeddings(self._vectors, self._standardize)

    def float(self) -> VectorEmbeddings:
        """The same: rows are float32."""
        return self

    def cpu(self) -> Tensor:
        """All rows, in memory."""
        return self[:].cpu()


def on_demand(network: Network, source: Source) -> Tensor | None:
    """Embeddings that need no pass of the network, as a stand-in for their tensor; None where there must be one."""
    if source.vectors is None or not isinstance(network.backbone, Standardize):
        return None
    return cast(Tensor, VectorEmbeddings(source.vectors, network.backbone))


def is_on_demand(embeddings: Any) -> bool:
    """Whether embeddings are computed when they are read."""
    return isinstance(embeddings, VectorEmbeddings)


def rows_of(embeddings: Any, rows: Tensor) -> Tensor:
    """Some rows, int64 [B], of embeddings; those that are computed on demand stay so."""
    if isinstance(embeddings, VectorEmbeddings):
        return cast(Tensor, embeddings.subset(rows))
    return cast(Tensor, embeddings[rows])


def rows_of_all(embeddings: Any, rows: Tensor) -> Tensor | None:
    """These rows, int64 [B], of all vectors, where embeddings are computed on demand: every rank has the vectors.

    None where they are not: then only whoever holds a row has it.
    """
    return cast(Tensor, embeddings.whole().subset(rows)) if isinstance(embeddings, VectorEmbeddings) else None
