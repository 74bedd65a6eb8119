"""Where the prototypes of cosine heads begin, and begin anew: at centroids of the network's embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from sela_ext.errors import OptionError
from sela_ext.models import Heads
from sela_ext.training.clustering import cluster_sums

# Rows per cluster that k-means looks at, and its iterations: a beginning, not a solution.
_ROWS_PER_CLUSTER = 256
_ITERATIONS = 10


@torch.no_grad()
def place_prototypes(heads: Heads, embeddings: Tensor, valid: Tensor, seed: int) -> None:
    """Turn every prototype to a centroid of k-means over the embeddings; its length stays.

    A random network already maps like images to like embeddings, but random prototypes cut across that: the first
    labels are then close to arbitrary, and a small set is memorised before they get better. Every head has k-means
    start elsewhere, so that heads differ.

    Args:
        heads: cosine heads; changed in place.
        embeddings: [N, D].
        valid: bool [N]; the others are left out.
        seed: with the head's number it determines which rows are used and where k-means starts.

    Raises:
        OptionError: more clusters than images.
    """
    points = F.normalize(embeddings[valid].float(), dim=1).cpu()
    if max(heads.clusters) > len(points):
        raise OptionError(f"clusters: expected at most {len(points)}, the readable images, found {max(heads.clusters)}")
    directions = []
    for head, k in enumerate(heads.clusters):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + head) % 2**63)
        rows = torch.randperm(len(points), generator=generator)[: _ROWS_PER_CLUSTER * k]
        means = KMeans(k, n_init=1, max_iter=_ITERATIONS, random_state=(seed * 1009 + head) % 2**32)
        # One thread: scikit-learn adds the threads' sums in the order in which they end.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: some coincide
            means.fit(points[rows].numpy())
        directions.append(F.normalize(torch.from_numpy(means.cluster_centers_).float(), dim=1))
    lengths = heads.weight.norm(dim=1, keepdim=True)
    heads.weight.copy_(torch.cat(directions).to(lengths.device) * lengths)


@torch.no_grad()
def turn_to_means(
    heads: Heads, embeddings: Tensor, valid: Tensor, labels: NDArray[np.int32], which: Sequence[int]
) -> None:
    """Turn every prototype to the mean of its cluster's embeddings, each of length one; its own length stays.

    Args:
        heads: cosine heads; changed in place. Prototypes of clusters without images stay.
        embeddings: [N, D].
        valid: bool [N]; the others are left out.
        labels: int32 [heads, N].
        which: heads that are turned.
    """
    rows = valid.nonzero()[:, 0]
    points, places = F.normalize(embeddings[rows].float(), dim=1), rows.cpu().numpy()
    for head in which:
        k, start = heads.clusters[head], sum(heads.clusters[:head])
        means = cluster_sums(points, labels[head, places].astype(np.int64), k)
        own = heads.weight[start : start + k]
        lengths, some = own.norm(dim=1, keepdim=True), means.norm(dim=1, keepdim=True) > 0
        own.copy_(torch.where(some, F.normalize(means, dim=1).float() * lengths, own))


def forget(optimizer: torch.optim.Optimizer, heads: Heads, which: Sequence[int]) -> None:
    """Have the optimiser forget what it knows of these heads: their weights begin anew."""
    for parameter in heads.parameters():
        if len(which) == len(heads.clusters):
            optimizer.state.pop(parameter, None)
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                for head in which:
                    start = sum(heads.clusters[:head])
                    value[start : start + heads.clusters[head]] = 0
