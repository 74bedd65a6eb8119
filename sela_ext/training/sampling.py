"""Which images an epoch has, where clusters and not images are to come evenly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def even_order(labels: NDArray[np.int32], *, at_least: int = 1, seed: int = 0, epoch: int = 0) -> NDArray[np.int64]:
    """Draw every cluster equally often, in random order: a pure function of the arguments.

    Each of the C clusters that have images is drawn floor(N / C) times, so that an epoch has at most N images, and
    fewer than C less. A cluster's images come once each in random order, then once each in another one, and so on: an
    image comes a second time when all of its cluster have come.

    Args:
        labels: cluster of each image, [N]; images of -1 are not drawn.
        at_least: images that the epoch must have, such as a batch; clusters are drawn more often if need be.
        seed: of the draws, with `epoch`.
        epoch: number of the epoch, >= 0.

    Returns:
        Image numbers int64 [L]; none where no image has a label.

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
    times = max(int(sizes.sum()) // len(sizes), -(-at_least // len(sizes)))
    drawn = []
    for members in np.split(sorting[len(labels) - int(sizes.sum()) :], np.cumsum(sizes)[:-1]):
        rounds = [draw.permutation(members) for _ in range(-(-times // len(members)))]
        drawn.append(np.concatenate(rounds)[:times])
    order: NDArray[np.int64] = draw.permutation(np.concatenate(drawn)).astype(np.int64)
    return order
