"""How far labellings from different starts agree: the yardstick for a number of clusters where no labels are known."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn import metrics as sk

from sela_ext.errors import DataError

# Images that the labellings are compared on, evenly spread, where there are more: the index then is good to about .01.
MOST_IMAGES = 20_000
# Pairs of labellings that are compared for one number of clusters.
MOST_PAIRS = 15


def agreement(labels: Any) -> float:
    """Mean adjusted mutual information over pairs of labellings.

    Args:
        labels: integers [T, N], T >= 2; images with label -1 in one of a pair are left out of that pair.

    Returns:
        1 = all labellings are the same partition, 0 = they share what chance makes them share. Of more than 20,000
        images that many are compared, evenly spread, and of more than 15 pairs as many.

    Raises:
        DataError: fewer than two labellings, or a pair without common images.

    Example:
        >>> agreement([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]])
        1.0
    """
    rows = np.asarray(labels)
    if rows.ndim != 2 or len(rows) < 2 or rows.dtype.kind not in "iu":
        raise DataError(f"labels: expected integers [T, N] of two labellings or more, found {rows.dtype} {rows.shape}")
    if rows.shape[1] > MOST_IMAGES:
        rows = rows[:, np.linspace(0, rows.shape[1] - 1, MOST_IMAGES).astype(np.int64)]
    pairs = list(itertools.combinations(range(len(rows)), 2))
    if len(pairs) > MOST_PAIRS:  # every labelling with its next ones, so that all take part
        distances = range(1, len(rows))
        pairs = [(one, (one + step) % len(rows)) for step in distances for one in range(len(rows))][:MOST_PAIRS]
    return float(np.mean([_information(rows[one], rows[other]) for one, other in pairs]))


def stability(labels: Any, clusters: Sequence[int]) -> dict[int, float]:
    """Agreement among the heads of each number of clusters.

    Args:
        labels: integers [T, N], of T heads; -1 = no label.
        clusters: number of clusters of each head, [T].

    Returns:
        K -> `agreement` of its heads, for every K that two heads or more have; ascending.

    Raises:
        DataError: not one number of clusters per head.

    Example:
        >>> stability([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 2, 3]], [2, 2, 4])
        {2: 1.0}
    """
    rows = np.asarray(labels)
    if len(rows) != len(clusters):
        raise DataError(f"clusters: expected one number per head, {len(rows)}, found {len(clusters)}")
    heads = {k: [head for head, own in enumerate(clusters) if own == k] for k in sorted(set(clusters))}
    return {k: agreement(rows[which]) for k, which in heads.items() if len(which) > 1}


def _information(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    both = (one >= 0) & (other >= 0)
    if not both.any():
        raise DataError("labels: expected images with a label in both labellings, found none")
    one, other = one[both], other[both]
    if one.min() == one.max() and other.min() == other.max():
        return 1.0  # one cluster each: nothing to disagree about
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # many clusters are not a regression target here
        return float(sk.adjusted_mutual_info_score(one, other))
