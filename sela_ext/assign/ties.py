"""Rows that are indifferent between clusters, and the warning for labels that are far from balanced."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.shards import Shard
from sela_ext.assign.sources import row_blocks

if TYPE_CHECKING:
    import numpy.typing as npt

# Two clusters tie for a row when their scores differ by less than this (nats). Far above the rounding of float32
# scores of ordinary size, far below any difference that a network means.
TIE = 1e-3
# Ties are only broken when this share of the images would have to move for equal clusters, and when ties explain at
# least half of it: on ordinary data (first round of training: 0.09) the labels are the plain argmax.
UNBALANCED = 0.1
WARN = 0.5
ENTRIES_AT_ONCE = 1 << 18  # in float64


class UnbalancedLabelsWarning(UserWarning):
    """The labels are far from the wanted cluster sizes, or a cluster can receive no image at all."""


def misplaced(sizes: npt.NDArray[np.int64], target: npt.NDArray[np.float64]) -> float:
    """Share of the images that would have to move for the wanted sizes, 0 .. 1; rounding to whole images is free."""
    count = int(sizes.sum())
    if count == 0:
        return 0.0
    excess = np.maximum(sizes - np.ceil(count * target), 0.0)
    return float(excess.sum()) / count


def break_ties(
    logits: Any,
    labels: npt.NDArray[np.int32],
    potential: npt.NDArray[np.float64],
    lam: float,
    target: npt.NDArray[np.float64],
    shard: Shard,
) -> int:
    """Give indifferent rows, in order, to that tied cluster which lacks most images; change `labels` in place.

    All rows equal is the extreme case: every row is indifferent, argmax would put all into one cluster, and this
    deals them out evenly. Which of them goes where has no meaning, but it is the same in every run, and for any number
    of ranks that the rows are spread over (labels are those of this rank).

    Returns:
        Number of rows whose label changed; 0 when indifferent rows are not what unbalances the clusters.
    """
    cols = len(target)
    rows, lengths, clusters = [], [], []
    with np.errstate(invalid="ignore", over="ignore"):
        for part, block in row_blocks(logits, max(1, ENTRIES_AT_ONCE // len(potential))):
            score = lam * block + potential
            near = score >= score.max(axis=1, keepdims=True) - TIE
            tied = np.flatnonzero((near.sum(axis=1) > 1) & (labels[part] >= 0))
            rows.append(part.start + tied)
            lengths.append(near[tied].sum(axis=1))
            clusters.append(np.nonzero(near[tied])[1].astype(np.int32))
    here = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    own = shard.own(len(labels))
    arrays = [
        own.start + here,
        labels[here],
        np.concatenate(lengths) if lengths else here,
        np.concatenate(clusters) if clusters else labels[:0],
    ]
    sizes = shard.total("sizes", np.bincount(labels[labels >= 0], minlength=cols))
    count = int(sizes.sum())
    number = int(shard.total("rows without a preference", np.array([len(here)]))[0])
    if number < 0.5 * count * misplaced(sizes, target):
        return 0
    every_row, given, every_length, every_cluster = shard.joined("rows without a preference", arrays)
    lacking = target * count - (sizes - np.bincount(given, minlength=cols))
    ends = np.cumsum(every_length)
    changed = 0
    for index, label, start, end in zip(every_row, given, ends - every_length, ends, strict=True):
        among = every_cluster[start:end]
        choice = int(among[np.argmax(lacking[among])])
        lacking[choice] -= 1
        changed += int(label != choice)
        if own.start <= index < own.stop:
            labels[index - own.start] = choice
    return changed


def warn_if_unbalanced(
    sizes: npt.NDArray[np.int64],
    impossible: npt.NDArray[np.int64],
    target: npt.NDArray[np.float64],
    converged: bool,
) -> None:
    """Warn when a cluster is possible for no image, or when over-full clusters hold more than half of the images."""
    if len(impossible):
        warnings.warn(
            f"assign: {len(impossible)} of {len(target)} clusters receive nothing, the first is {impossible[0]}: "
            "its logits are -inf in every row; the other clusters share the images",
            UnbalancedLabelsWarning,
            stacklevel=4,
        )
        return
    share = misplaced(sizes, target)
    if share > WARN:
        reason = "the logits hardly tell the images apart" if converged else "not converged: raise max_passes"
        warnings.warn(
            f"assign: {share:.0%} of the images are in over-full clusters (largest {sizes.max()}, "
            f"{int((sizes == 0).sum())} of {len(sizes)} empty): {reason}",
            UnbalancedLabelsWarning,
            stacklevel=4,
        )
