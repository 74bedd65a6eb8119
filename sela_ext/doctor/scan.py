"""All images, or a sample, looked at by several threads; at most a few of them are in memory at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sela_ext.data.source import Int64Array, Source
from sela_ext.doctor.facts import Facts, look
from sela_ext.doctor.table import Table
from sela_ext.kernels import permutation

# Images looked at by one task.
_PER_TASK = 32


def rows_of(source: Source, sample: int | None) -> Int64Array:
    """Numbers of the images to look at, ascending: all, or a random `sample` of them, always the same one."""
    count = len(source)
    if sample is None or sample >= count:
        return np.arange(count)
    return np.sort(permutation(count, seed=0, epoch=0)[:sample])


def scan(
    source: Source,
    held: Source | None,
    *,
    sample: int | None,
    threads: int,
    progress: Callable[[int, int], None],
) -> Table:
    """Look at the images.

    Args:
        source: The data.
        held: Held-out images, or None.
        sample: How many to look at of each; None = all.
        threads: Threads; one where a source cannot be read by several.
        progress: Called with the number of images done and of all.

    Returns:
        A row for each image looked at.
    """
    parts = [(source, rows_of(source, sample))]
    if held is not None:
        parts.append((held, rows_of(held, sample)))
    index = np.concatenate([rows for _, rows in parts])
    table = Table(index, np.arange(len(index)) >= len(parts[0][1]))
    first = 0
    for images, rows in parts:
        workers = threads if images.parallel_reads else 1
        tasks = [(first + at, rows[at : at + _PER_TASK]) for at in range(0, len(rows), _PER_TASK)]
        pending: deque[tuple[int, Future[list[Facts]]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="sela-doctor")
        try:
            for start, some in tasks:
                pending.append((start, pool.submit(_look_at, images, some)))
                if len(pending) > 2 * workers:
                    _enter(table, pending, progress)
            while pending:
                _enter(table, pending, progress)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        first += len(rows)
    return table


def _look_at(source: Source, rows: Int64Array) -> list[Facts]:
    return [look(source, int(row)) for row in rows]


def _enter(table: Table, pending: deque[tuple[int, Future[list[Facts]]]], progress: Callable[[int, int], None]) -> None:
    start, future = pending.popleft()
    found = future.result()
    table.note(start, found)
    progress(start + len(found), len(table))
