"""Where the prototypes of cosine heads begin: at the centroids of the untrained network's embeddings."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from sela_ext.assign import UnbalancedLabelsWarning, assign
from sela_ext.errors import OptionError
from sela_ext.models import Heads

# Rows per cluster that k-means looks at, and its iterations: a beginning, not a solution.
_ROWS_PER_CLUSTER = 256
_ITERATIONS = 10
# More rows than this are not looked at as long as every cluster has a few: choosing where k-means starts takes a time
# that grows with clusters times rows, half a minute for 1,000 clusters and 50,000 rows.
_MOST_ROWS, _FEWEST_ROWS = 32_768, 16
# Of the balanced rounds: most of them for feature vectors, tolerance of the sizes, and share of labels that still
# change when they end.
BALANCED_ROUNDS = 20
_TOL, _SETTLED = 1e-2, 0.01


@torch.no_grad()
def place_prototypes(
    heads: Heads,
    embeddings: Tensor,
    valid: Tensor,
    seed: int,
    *,
    rounds: int = 0,
    lam: float = 25.0,
    marginals: Any = None,
    threads: int = 0,
) -> None:
    """Turn every prototype to a centroid of k-means over the embeddings; its length stays.

    A random network already maps like images to like embeddings, but random prototypes cut across that: the first
    labels are then close to arbitrary, and a small set is memorised before they get better. Every head has k-means
    start elsewhere, so that heads differ.

    Args:
        heads: cosine heads; changed in place.
        embeddings: [N, D].
        valid: bool [N]; the others are left out.
        seed: with the head's number it determines which rows are used and where k-means starts.
        rounds: most rounds of balanced k-means that follow: labels of the prescribed cluster sizes, then their means.
            Centroids of uneven clusters are a poor start for even ones, which training does not get away from.
        lam: sharpness of these labels.
        marginals: shares of the clusters; None: equal.
        threads: of the solver; the bits do not depend on it.

    Raises:
        OptionError: more clusters than images.
    """
    readable = valid.nonzero()[:, 0].cpu()
    if max(heads.clusters) > len(readable):
        found = max(heads.clusters)
        raise OptionError(f"clusters: expected at most {len(readable)}, the readable images, found {found}")
    directions = []
    for head, k in enumerate(heads.clusters):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + head) % 2**63)
        rows = readable[torch.randperm(len(readable), generator=generator)[: _rows_for(k)]]
        points = F.normalize(embeddings[rows.to(embeddings.device)].float(), dim=1).cpu()
        means = KMeans(k, n_init=1, max_iter=_ITERATIONS, random_state=(seed * 1009 + head) % 2**32)
        # One thread: scikit-learn adds the threads' sums in the order in which they end.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: some coincide
            means.fit(points.numpy())
        centres = F.normalize(torch.from_numpy(means.cluster_centers_).float(), dim=1)
        directions.append(_balanced(centres, points, heads.temperature, rounds, lam, marginals, threads))
    lengths = heads.weight.norm(dim=1, keepdim=True)
    heads.weight.copy_(torch.cat(directions).to(lengths.device) * lengths)


def _balanced(
    centres: Tensor, points: Tensor, temperature: float, rounds: int, lam: float, marginals: Any, threads: int
) -> Tensor:
    """Directions [K, D] after rounds of labels with the prescribed sizes and of their means."""
    before: Tensor | None = None
    for _ in range(rounds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnbalancedLabelsWarning)  # a beginning need not be exact
            logits = points @ centres.t() / temperature
            solved = assign(logits, lam=lam, tol=_TOL, marginals=marginals, threads=threads)
        labels = torch.as_tensor(solved.labels).long()
        if before is not None and float((labels != before).float().mean()) < _SETTLED:
            break
        before = labels
        used = labels >= 0
        sums = torch.zeros_like(centres).index_add_(0, labels[used], points[used])
        empty = sums.norm(dim=1, keepdim=True) == 0
        centres = torch.where(empty, centres, F.normalize(sums, dim=1))
    return centres


def _rows_for(clusters: int) -> int:
    """Rows that k-means looks at for so many clusters."""
    return min(_ROWS_PER_CLUSTER * clusters, max(_MOST_ROWS, _FEWEST_ROWS * clusters))
