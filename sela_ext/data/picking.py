"""Batches out of images that lie in an array.

Note [Small batches of arrays]
    A batch that is shared out over threads ends when the last of them ends, and what Python does before and after it is
    done by one. Of a batch of a millisecond that is a fifth. So batches that read and write at most `SMALL_VALUES`
    numbers are begun several at a time, as many as there are threads, each with a thread of its own; they are handed
    over in order. Where fewer batches are ahead than there are threads, each has several. The first batch then takes a
    few milliseconds more than it could. Larger batches have all threads, one after the other: there the first batch,
    which everybody waits for, counts.

    The batches begun are among those that are ahead in any case: memory is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sela_ext.data.fallback import Drawing, Rows
from sela_ext.data.source import Int64Array, UInt8Array
from sela_ext.errors import DataError

# Pixels times channels that a small batch reads, or writes, whichever are more: 5 times those of 256 images of 32 x 32,
# which one thread augments in half a millisecond.
SMALL_VALUES = 1 << 22


class Picking:
    """Fills batches with images of an array.

    Args:
        array: uint8 [M, H, W, C].
        rows: The row of each image, int64 [N]; None: its number.
        drawing: What becomes of them.
        batch_size: Images of the largest batch.
        batches: Of an epoch.
        threads: For all batches together.
        ahead: Batches that may be ready or in the making.

    Attributes:
        begun: Batches to begin before the first is waited for.
    """

    def __init__(
        self,
        array: UInt8Array,
        rows: Int64Array | None,
        drawing: Drawing,
        *,
        batch_size: int,
        batches: int,
        threads: int,
        ahead: int,
    ) -> None:
        self._array = array
        self._rows = rows
        self._drawing = drawing
        self._threads = threads
        channels = int(array.shape[3])
        written = sum(view.output_channels(channels) * view.size**2 for view in drawing.views)
        small = batch_size * max(written, array[0].size) <= SMALL_VALUES
        self._together = min(threads, ahead, batches) if small else 1
        # One more than are worked on, so that no thread waits while a batch is handed over.
        self.begun = min(threads, ahead - 1) if self._together > 1 else 0
        self._pool = ThreadPoolExecutor(self._together, thread_name_prefix="sela-array") if self.begun else None
        self._started = 0

    def start(self, rows: Rows) -> Callable[[], dict[int, DataError]]:
        """Begin to fill a batch; where batches are not worked on together, it waits for the function returned.

        Returns:
            A function that waits for it, and returns nothing bad: an array has all its images.
        """
        if self._pool is None:
            return lambda: self._fill(rows, self._threads)
        share, left = divmod(self._threads, self._together)
        threads = share + (self._started % self._together < left)
        self._started += 1
        return self._pool.submit(self._fill, rows, threads).result

    def close(self) -> None:
        """Wait for what was begun: it is written into memory that somebody else gets next."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self, rows: Rows, threads: int) -> dict[int, DataError]:
        picked = rows.index if self._rows is None else self._rows[rows.index]
        self._drawing.fill(rows, np.arange(len(picked)), self._array, picked=picked, threads=threads)
        return {}
