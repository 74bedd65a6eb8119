"""Where the prototypes of cosine heads begin, and begin anew: at centroids of the network's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sela_ext.assign.features import in_order
from sela_ext.assign.plan import threads_of
from sela_ext.assign.solve import assign_silently
from sela_ext.errors import OptionError
from sela_ext.models import Heads
from sela_ext.training.clustering import cluster_sums, kmeans
from sela_ext.training.progress import Stage, no_stage

# Rows per cluster that k-means looks at, and its iterations: a beginning, not a solution. Its own beginning, by
# k-means++, looks at fewer.
_ROWS_PER_CLUSTER = 128
_ITERATIONS = 10
_SEEDING_ROWS, _SEEDING_ROWS_PER_CLUSTER = 2048, 16
# More rows than this are not looked at as long as every cluster has a few.
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
    threads: int = 0,
    stage: Stage = no_stage,
    *,
    rounds: int = 0,
    lam: float = 25.0,
    marginals: Any = None,
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
        threads: 0 = all; nothing depends on it.
        stage: shows which head it is at.
        rounds: most rounds of balanced k-means that follow: labels of the prescribed cluster sizes, then their means.
            Centroids of uneven clusters are a poor start for even ones, which training does not get away from.
        lam: sharpness of these labels.
        marginals: shares of the clusters; None: equal.

    Raises:
        OptionError: more clusters than images.
    """
    rows = valid.nonzero()[:, 0].cpu()
    count = len(rows)
    if max(heads.clusters) > count:
        raise OptionError(f"clusters: expected at most {count}, the readable images, found {max(heads.clusters)}")

    def place(head: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + head) % 2**63)
        k = heads.clusters[head]
        chosen = rows[torch.randperm(count, generator=generator)[: _rows_for(k)]]
        points = F.normalize(embeddings[chosen.to(embeddings.device)].float(), dim=1).cpu()
        centres = F.normalize(_centroids(points, k, generator), dim=1)
        return _balanced(centres, points, heads.temperature, rounds, lam, marginals, threads) if rounds else centres

    # A head is one thread's work, so sums do not depend on the number of threads; the balanced rounds have all of them.
    directions = []
    workers = 1 if rounds else threads_of(threads)
    with stage("placing prototypes by k-means, heads", len(heads.clusters)) as advance:
        for placed in in_order(place, list(range(len(heads.clusters))), workers, reading=None, step=1):
            directions.append(placed)
            advance(len(directions))
    lengths = heads.weight.norm(dim=1, keepdim=True)
    heads.weight.copy_(torch.cat(directions).to(lengths.device) * lengths)


def _centroids(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """K-means, float32 [k, D], from rows [M, D] in random order, M >= k; on one thread, with what torch brings."""
    first = points[: max(_SEEDING_ROWS, _SEEDING_ROWS_PER_CLUSTER * k)]
    start = _seeds(first, k, generator)
    return kmeans(points, k, iterations=_ITERATIONS, start=start, backend="torch").centroids


def _seeds(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Rows far from one another [k, D], by k-means++: of some drawn by squared distance, the one that leaves least.

    Source: Arthur, Vassilvitskii, "k-means++: the advantages of careful seeding", 2007; its greedy variant.
    """
    trials = 2 + k.bit_length()
    chosen = [0]  # rows come in random order
    norms = points.square().sum(1)
    left = (norms + norms[0] - 2.0 * (points @ points[0])).clamp_(min=0.0)
    for _ in range(1, k):
        reach = left.double().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64) * reach[-1]
        picks = torch.searchsorted(reach, draws).clamp_(max=len(points) - 1)
        distances = (norms[:, None] + norms[picks] - 2.0 * (points @ points[picks].T)).clamp_(min=0.0)
        left_with = torch.minimum(distances, left[:, None])
        best = int(left_with.sum(0).argmin())
        chosen.append(int(picks[best]))
        left = left_with[:, best].contiguous()
    return points[torch.tensor(chosen)]


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
    """Have the optimiser forget what it knows of these heads, whose weights begin anew.

    So are gradients of theirs that wait for further batches: they are those of the old weights.
    """
    for parameter in heads.parameters():
        if parameter.grad is not None:
            for head in which:
                start = sum(heads.clusters[:head])
                parameter.grad[start : start + heads.clusters[head]] = 0
        if len(which) == len(heads.clusters):
            optimizer.state.pop(parameter, None)
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                for head in which:
                    start = sum(heads.clusters[:head])
                    value[start : start + heads.clusters[head]] = 0


def _balanced(
    centres: Tensor, points: Tensor, temperature: float, rounds: int, lam: float, marginals: Any, threads: int
) -> Tensor:
    """Directions [K, D] after rounds of labels with the prescribed sizes and of their means."""
    before: Tensor | None = None
    for _ in range(rounds):
        logits = points @ centres.t() / temperature
        # A beginning need not be exact: what would be warned of is no matter.
        solved = assign_silently(logits, lam=lam, tol=_TOL, marginals=marginals, threads=threads)
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
