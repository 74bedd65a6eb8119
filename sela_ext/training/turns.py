"""The steps of an epoch, taken by all ranks together."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from sela_ext.data import Loader, VectorLoader
from sela_ext.data.loader import Batch
from sela_ext.data.source import Int64Array
from sela_ext.training.ranks import Ranks


@dataclass(frozen=True)
class Turn:
    """One step, as a rank sees it.

    Attributes:
        batch: this rank's images; None where no step is taken: batch norm cannot normalise a batch of one, so a step is
            passed over by all where any rank has less than two images.
        position: images of the epoch's order that are done with this step, over all ranks.
        images: of the step, over all ranks.
        share: what this rank's mean loss weighs in that of all ranks: 1 where their batches are equally large.
    """

    batch: Batch | None
    position: int
    images: int
    share: float = 1.0


def turns(
    loader: Loader | VectorLoader,
    ranks: Ranks,
    *,
    epoch: int,
    position: int,
    order: Int64Array | NDArray[Any] | None,
    batch_size: int,
    drop_last: bool,
    uneven: bool,
) -> Generator[Turn, None, None]:
    """The steps of an epoch from some position on; all ranks have equally many.

    A step of B images takes positions s B .. (s + 1) B - 1 of the epoch's order whatever the number of ranks: rank r of
    R those with number r modulo R. So a run can be continued on another number of ranks.

    Args:
        loader: of this rank, with B / R images per batch.
        ranks: all of them.
        epoch: number of the epoch.
        position: images of its order that are done, over all ranks.
        order: images of the epoch; None: all, shuffled.
        batch_size: B, a multiple of R.
        drop_last: leave a smaller last step out.
        uneven: images may be left out of batches because they cannot be read: ranks then tell each other how many they
            have.
    """
    if not ranks.several:
        with contextlib.closing(loader.epoch(epoch, position, order=order)) as batches:
            for batch in batches:
                count = len(batch.index)
                yield Turn(batch if count > 1 else None, batch.position, count)
        return
    total = len(loader.source) if order is None else len(order)
    size, rank = ranks.world_size, ranks.rank
    last = total // batch_size if drop_last else -(-total // batch_size)

    def own(until: int) -> int:
        """Images of this rank among the first `until`."""
        return (until - rank + size - 1) // size

    with contextlib.closing(loader.epoch(epoch, own(position), order=order)) as batches:
        ahead: Batch | None = None
        for step in range(-(-position // batch_size), last):  # none of an epoch that is done
            begin, end = step * batch_size, min((step + 1) * batch_size, total)
            counts = [(end - begin - other + size - 1) // size for other in range(size)]
            if ahead is None:
                ahead = next(batches, None)
            # A batch of which nothing is left is not delivered: the next one is then of a later step.
            mine, ahead = (ahead, None) if ahead is not None and ahead.position == own(end) else (None, ahead)
            if uneven:
                here = 0 if mine is None else len(mine.index)
                counts = [int(count) for count in ranks.totals([here * (other == rank) for other in range(size)])]
            taken = min(counts) > 1
            share = counts[rank] * size / sum(counts) if taken else 1.0
            yield Turn(mine if taken else None, end, sum(counts), share)
