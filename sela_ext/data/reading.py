"""Encoded images through the compiled reader, and what it leaves to Pillow through the fallback."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from sela_ext import kernels
from sela_ext.data.fallback import Drawing, Fallback, Rows, want_of_resources
from sela_ext.data.ring import TensorRing
from sela_ext.data.safe_files import OUT_OF_RESOURCES
from sela_ext.data.source import Int64Array, LocatedImages, Source
from sela_ext.errors import DataError
from sela_ext.kernels import IndexStore

# Stores in folders that a loader of this process has open. A file of one has one writer.
_stores: WeakValueDictionary[tuple[int, str, int], IndexStore] = WeakValueDictionary()
_stores_lock = threading.Lock()


def open_store(folder: str | os.PathLike[str] | None, rank: int) -> IndexStore:
    """The index store of a folder, the same for all loaders of this process; a new unnamed one for None."""
    if folder is None:
        return IndexStore()
    key = os.getpid(), os.path.realpath(folder), rank
    with _stores_lock:
        store = _stores.get(key)
        if store is None:
            _stores[key] = store = IndexStore(folder, rank=rank)
        return store


class EncodedReading(ABC):
    """Fills batches from encoded images, several at a time.

    Args:
        source: Encoded images.
        drawing: What becomes of them.
        reader: The compiled reader for `drawing`; it stays open.
        fallback: For images that the reader does not take; it stays open.
        others: bool [N], images that the reader is known not to take, whichever part of them is shown; updated here. A
            batch of nothing else does not come to it: of small PNG files it would open thousands for nothing.
        ring: Lends memory for views.

    Attributes:
        with_bad: Whether images that are known to be bad take part until their batch is finished.
    """

    with_bad = False

    def __init__(
        self,
        source: Source,
        drawing: Drawing,
        reader: kernels.Reader,
        fallback: Fallback,
        others: npt.NDArray[np.bool_],
        *,
        ring: TensorRing,
    ) -> None:
        self._source = source
        self._drawing = drawing
        self._reader = reader
        self._fallback = fallback
        self._others = others
        self._ring = ring
        # Waits for the reader, so that the fallback begins with a batch while an earlier one is being handed over.
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="sela-reader")

    @abstractmethod
    def empty(self, index: Int64Array, keys: Int64Array, epoch: int) -> Rows:
        """Rows to be filled by `start`."""

    def start(self, rows: Rows) -> Callable[[], dict[int, DataError]]:
        """Begin to read a batch, made by `empty`.

        Returns:
            A function that waits for it, and returns the row and the reason of each image that cannot be read.
        """
        if self._others[rows.index].all():
            return self._without_reader(rows)
        begun = self._waiter.submit(self._wait, self._submit(rows), rows)
        return lambda: begun.result()()

    def close(self) -> None:
        """Wait for what was begun: the reader writes into memory that somebody else gets next."""
        self._waiter.shutdown(wait=True)

    @abstractmethod
    def _submit(self, rows: Rows) -> kernels.Ticket[kernels.ReadBatch]:
        """Ask the reader for a batch."""

    @abstractmethod
    def _after_reader(self, rows: Rows, read: kernels.ReadBatch) -> Callable[[], dict[int, DataError]]:
        """Begin with what the reader has not finished of a batch."""

    @abstractmethod
    def _without_reader(self, rows: Rows) -> Callable[[], dict[int, DataError]]:
        """Begin with a batch that has nothing for the reader."""

    def _wait(self, ticket: kernels.Ticket[kernels.ReadBatch], rows: Rows) -> Callable[[], dict[int, DataError]]:
        read = ticket.wait()
        rows.params, rows.effects = list(read.params), list(read.effects)
        look_at(read, rows.index, self._source, self._others)
        return self._after_reader(rows, read)

    def _views_of_first(self, rows: Rows, count: int) -> kernels.Ticket[kernels.ReadBatch]:
        """Ask the reader for the views of the first `count` rows."""
        located = self._source.locate_all(rows.index[:count])
        images = [view[:count] for view in rows.images]
        return self._reader.submit(located.items, rows.index[:count], images, **self._asked(rows, located, count))

    def _asked(self, rows: Rows, located: LocatedImages, count: int) -> dict[str, Any]:
        """What every question to the reader says of its first `count` rows."""
        drawing = self._drawing
        return {
            "seed": drawing.seed,
            "epoch": rows.epoch,
            "views": range(drawing.first_view, drawing.first_view + len(drawing.views)),
            "indexes": located.indexes,
            "keys": rows.keys[:count],
        }


class Reading(EncodedReading):
    """Makes the views of batches."""

    def empty(self, index: Int64Array, keys: Int64Array, epoch: int) -> Rows:
        """See `EncodedReading.empty`."""
        return Rows.empty(index, keys, epoch, self._ring.lend(len(index)), self._drawing.views)

    def _submit(self, rows: Rows) -> kernels.Ticket[kernels.ReadBatch]:
        return self._views_of_first(rows, len(rows.index))

    def _after_reader(self, rows: Rows, read: kernels.ReadBatch) -> Callable[[], dict[int, DataError]]:
        return self._fallback.start(rows, np.flatnonzero(read.status != kernels.READ_OK))

    def _without_reader(self, rows: Rows) -> Callable[[], dict[int, DataError]]:
        return self._fallback.start(rows, np.arange(len(rows.index)))


def look_at(read: kernels.ReadBatch, index: Int64Array, source: Source, others: npt.NDArray[np.bool_]) -> None:
    """Note which images are never the reader's.

    Raises:
        ResourceError: A file could not be opened for a reason that is not its own.
    """
    for place in np.flatnonzero(read.status == kernels.READ_UNREADABLE).tolist():
        if read.error[place] in OUT_OF_RESOURCES:
            reason = os.strerror(int(read.error[place]))
            raise want_of_resources(f"{source.name(int(index[place]))}: cannot be read: {reason}")
    # Where the size was found, another part of the image may well be the reader's.
    others[index[(read.status == kernels.READ_OTHER) & (read.height == 0)]] = True
