"""Which clusters and images a page shows: everything where it is little, an even choice where it is much."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]

# Images with a thumbnail, those of the map among them; of one cluster; and clusters with a card of their own.
MOST_IMAGES = 7000
MOST_OF_A_CLUSTER = 96
MOST_CLUSTERS = 3200


@dataclass(frozen=True)
class Sample:
    """A choice of clusters and images of one head.

    Attributes:
        sizes: images of every cluster, int64 [K].
        confidence: their mean confidence, float64 [K], NaN for empty clusters.
        clusters: shown, by mean confidence, highest first.
        members: for each of them its images, the most confident first.
        left_out: clusters with images that are not shown.
        order: all shown images, the most wanted first: every cluster's first, then every cluster's second, ...
    """

    sizes: Int
    confidence: npt.NDArray[np.float64]
    clusters: Int
    members: list[Int]
    left_out: int
    order: list[int]


def choose(
    labels: npt.NDArray[np.int32],
    confidence: npt.NDArray[np.float32],
    clusters: int,
    also: Int | None = None,
    most_images: int = MOST_IMAGES,
) -> Sample:
    """Choose clusters and images.

    Clusters are ordered by the mean confidence of their images; where there are too many, ranks at even distances are
    taken. Half of the images of a cluster are its most confident ones, the others lie at even distances behind them,
    down to the least confident: a cluster is as good as its edge.

    Args:
        labels: [N] cluster of each image, -1 = skipped.
        confidence: [N] in [0, 1]; NaN counts as lowest.
        clusters: number of clusters K.
        also: images that shall be among the shown ones, where their cluster is.
        most_images: in all.
    """
    kept = np.flatnonzero(labels >= 0)
    trust = np.nan_to_num(confidence.astype(np.float64), nan=-1.0)
    order = kept[np.lexsort((kept, -trust[kept], labels[kept]))]
    sizes = np.bincount(labels[kept], minlength=clusters).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    means = np.full(clusters, np.nan)
    used = np.flatnonzero(sizes)
    sums = np.bincount(labels[kept], weights=confidence[kept], minlength=clusters)
    means[used] = sums[used] / sizes[used]
    ranked = used[np.lexsort((used, -np.nan_to_num(means[used], nan=-1.0)))]
    shown = ranked
    if ranked.size > MOST_CLUSTERS:
        shown = ranked[np.round(np.linspace(0, ranked.size - 1, MOST_CLUSTERS)).astype(np.int64)]
    extra = np.zeros(0, np.int64) if also is None else np.asarray(also, np.int64)
    each = min(MOST_OF_A_CLUSTER, max(1, (most_images - extra.size) // max(1, shown.size)))
    by_cluster: dict[int, list[int]] = {}
    for index in extra.tolist():
        by_cluster.setdefault(int(labels[index]), []).append(index)
    members = []
    wanted: list[tuple[int, int, int]] = []
    for place, k in enumerate(shown.tolist()):
        own = order[starts[k] : starts[k] + sizes[k]]
        picked = own[spread_ranks(own.size, each)]
        if k in by_cluster:
            picked = np.union1d(picked, np.array(by_cluster[k], np.int64))
            picked = picked[np.lexsort((picked, -trust[picked]))]
        members.append(picked)
        wanted += [(turn, place, int(index)) for turn, index in enumerate(picked)]
    wanted.sort()
    return Sample(sizes, means, shown, members, int(ranked.size - shown.size), [index for _, _, index in wanted])


def spread_ranks(count: int, most: int) -> Int:
    """Choose ranks 0 .. count - 1: the first half of them in a row, the others at even distances to the last.

    Example:
        >>> spread_ranks(100, 6).tolist(), spread_ranks(3, 6).tolist()
        ([0, 1, 2, 34, 67, 99], [0, 1, 2])
    """
    if count <= most:
        return np.arange(count)
    first = -(-most // 2)
    rest = np.round(np.linspace(first - 1, count - 1, most - first + 1)).astype(np.int64)[1:]
    return np.concatenate([np.arange(first), rest])
