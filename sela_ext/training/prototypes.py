"""Where the prototypes of cosine heads begin: at the centroids of the untrained network's embeddings."""

from __future__ import annotations

import warnings

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from sela_ext.errors import OptionError
from sela_ext.models import Heads
from sela_ext.training.progress import Stage, no_stage

# Rows per cluster that k-means looks at, and its iterations: a beginning, not a solution.
_ROWS_PER_CLUSTER = 256
_ITERATIONS = 10


@torch.no_grad()
def place_prototypes(heads: Heads, embeddings: Tensor, valid: Tensor, seed: int, stage: Stage = no_stage) -> None:
    """Turn every prototype to a centroid of k-means over the embeddings; its length stays.

    A random network already maps like images to like embeddings, but random prototypes cut across that: the first
    labels are then close to arbitrary, and a small set is memorised before they get better. Every head has k-means
    start elsewhere, so that heads differ.

    Args:
        heads: cosine heads; changed in place.
        embeddings: [N, D].
        valid: bool [N]; the others are left out.
        seed: with the head's number it determines which rows are used and where k-means starts.
        stage: shows which head it is at.

    Raises:
        OptionError: more clusters than images.
    """
    points = F.normalize(embeddings[valid].float(), dim=1).cpu()
    if max(heads.clusters) > len(points):
        raise OptionError(f"clusters: expected at most {len(points)}, the readable images, found {max(heads.clusters)}")
    directions = []
    with stage("placing prototypes by k-means, heads", len(heads.clusters)) as advance:
        for head, k in enumerate(heads.clusters):
            advance(head)
            directions.append(_centroids(points, k, head, seed))
    lengths = heads.weight.norm(dim=1, keepdim=True)
    heads.weight.copy_(torch.cat(directions).to(lengths.device) * lengths)


def _centroids(points: Tensor, k: int, head: int, seed: int) -> Tensor:
    """Unit centroids [k, D] of a few iterations of k-means on some of the points."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + head) % 2**63)
    rows = torch.randperm(len(points), generator=generator)[: _ROWS_PER_CLUSTER * k]
    means = KMeans(k, n_init=1, max_iter=_ITERATIONS, random_state=(seed * 1009 + head) % 2**32)
    # One thread: scikit-learn adds the threads' sums in the order in which they end.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: some coincide
        means.fit(points[rows].numpy())
    return F.normalize(torch.from_numpy(means.cluster_centers_).float(), dim=1)
