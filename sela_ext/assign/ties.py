"""Rows that are indifferent between clusters, and the warning for labels that are far from balanced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.shards import Shard
from sela_ext.assign.sources import DEVICE_ENTRIES_AT_ONCE, device_blocks, on_cuda, row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    here, given = 0, np.zeros(cols, np.int64)
    for rows, _ in _tied(logits, labels, potential, lam):
        here += len(rows)
        given += np.bincount(labels[rows], minlength=cols)
    sizes = shard.total("sizes", np.bincount(labels[labels >= 0], minlength=cols))
    count = int(sizes.sum())
    number = int(shard.total("rows without a preference", np.array([here]))[0])
    if number < 0.5 * count * misplaced(sizes, target):
        return 0
    lacking = target * count - (sizes - shard.total("labels without a preference", given))
    changed = 0
    for rank in range(shard.ranks):  # in the order of the rows
        if rank == shard.rank:
            for rows, near in _tied(logits, labels, potential, lam):
                for row, choices in zip(rows, near, strict=True):
                    among = np.flatnonzero(choices)
                    choice = int(among[np.argmax(lacking[among])])
                    lacking[choice] -= 1
                    changed += int(labels[row] != choice)
                    labels[row] = choice
        (lacking,) = shard.joined(f"what is lacking after rank {rank}", [lacking[: cols * (rank == shard.rank)]])
    return int(shard.total("changed labels", np.array([changed]))[0])


def _tied(
    logits: Any, labels: npt.NDArray[np.int32], potential: npt.NDArray[np.float64], lam: float
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    """Numbers of the labelled rows without a preference, and for each of them which clusters tie; a block at a time."""
    if on_cuda(logits):
        yield from _tied_on_device(logits, labels, potential, lam)
        return
    for part, block in row_blocks(logits, max(1, ENTRIES_AT_ONCE // len(potential))):
        with np.errstate(invalid="ignore", over="ignore"):
            score = lam * block + potential
            near = score >= score.max(axis=1, keepdims=True) - TIE
        tied = np.flatnonzero((near.sum(axis=1) > 1) & (labels[part] >= 0))
        yield part.start + tied, near[tied]


def _tied_on_device(
    logits: Any, labels: npt.NDArray[np.int32], potential: npt.NDArray[np.float64], lam: float
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    """The same where the logits are; of rows that tie alike (equal images, say) one comes to the host."""
    import torch

    g = torch.from_numpy(potential).to(logits.device)
    labelled = torch.from_numpy(labels >= 0).to(logits.device)
    for part, block in device_blocks(logits, max(1, DEVICE_ENTRIES_AT_ONCE // len(potential))):
        score = lam * block + g
        near = score >= score.amax(1, keepdim=True) - TIE
        tied = ((near.sum(1) > 1) & labelled[part]).nonzero()[:, 0]
        if not len(tied):
            continue
        kinds, of = torch.unique(near[tied].to(torch.uint8), dim=0, return_inverse=True)
        yield part.start + tied.cpu().numpy(), kinds.cpu().numpy().astype(np.bool_)[of.cpu().numpy()]


def words_on_balance(
    sizes: npt.NDArray[np.int64],
    impossible: npt.NDArray[np.int64],
    target: npt.NDArray[np.float64],
    converged: bool,
) -> list[str]:
    """What to warn of: a cluster that is possible for no image, or over-full ones with more than half of the images."""
    if len(impossible):
        return [
            f"assign: {len(impossible)} of {len(target)} clusters receive nothing, the first is {impossible[0]}: "
            "its logits are -inf in every row; the other clusters share the images"
        ]
    share = misplaced(sizes, target)
    if share > WARN:
        reason = "the logits hardly tell the images apart" if converged else "not converged: raise max_passes"
        return [
            f"assign: {share:.0%} of the images are in over-full clusters (largest {sizes.max()}, "
            f"{int((sizes == 0).sum())} of {len(sizes)} empty): {reason}"
        ]
    return []
