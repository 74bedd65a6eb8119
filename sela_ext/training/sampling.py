"""Which images an epoch has, where clusters and not images are to come evenly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Part of its draws that an epoch may give up for a last batch that is not too short.
_GIVEN_UP = 0.15


def even_order(labels: NDArray[np.int32], *, batch_size: int = 1, seed: int = 0, epoch: int = 0) -> NDArray[np.int64]:
    """Draw every cluster equally often, in random order: a pure function of the arguments.

    Each of the C clusters that have images is drawn M times, M = floor(N / C), or somewhat fewer where the last batch
    would be less than half a batch otherwise: a short batch's statistics are noise. So an epoch has at most N images. A
    cluster's images come once each in random order, then once each in another one, and so on: an image comes a second
    time when all of its cluster have come.

    Args:
        labels: cluster of each image, [N]; images of -1 are not drawn.
        batch_size: images of a step.
        seed: of the draws, with `epoch`.
        epoch: number of the epoch, >= 0.

    Returns:
        Image numbers int64 [M C]; none where no image has a label.

    Example:
        >>> order = even_order(np.array([0, 0, 0, 0, 1, -1]))
        >>> len(order), sorted(order.tolist())[2:]
        (4, [4, 4])

    Source: Caron et al., "Deep clustering for unsupervised learning of visual features", ECCV 2018, section 3.3: images
    drawn uniformly over clusters. (The authors' code draws from a list that is in another order, which leaves uneven
    clusters uneven.)
    """
    draw = np.random.Generator(np.random.Philox(key=np.array([seed, 2**35 + epoch], np.uint64)))
    sorting = np.argsort(labels, kind="stable")
    _, sizes = np.unique(labels[labels >= 0], return_counts=True)
    if not len(sizes):
        return np.zeros(0, np.int64)
    times = _times(int(sizes.sum()) // len(sizes), len(sizes), batch_size)
    drawn = []
    for members in np.split(sorting[len(labels) - int(sizes.sum()) :], np.cumsum(sizes)[:-1]):
        rounds = [draw.permutation(members) for _ in range(-(-times // len(members)))]
        drawn.append(np.concatenate(rounds)[:times])
    order: NDArray[np.int64] = draw.permutation(np.concatenate(drawn)).astype(np.int64)
    return order


def _times(most: int, clusters: int, batch_size: int) -> int:
    """The largest number of draws per cluster that leaves no short batch, as far as it costs little; else `most`."""
    for times in range(most, int(most * (1 - _GIVEN_UP)), -1):
        rest = times * clusters % batch_size
        if rest == 0 or 2 * rest >= batch_size:
            return times
    return most
