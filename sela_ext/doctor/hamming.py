"""Pairs of 64-bit hashes that differ in few bits, among millions of them.

Note [Bands]
    A hash is cut into four bands of 16 bits. Two hashes that differ in at most three bits agree in a band; of those
    that differ in more, most do. So for each band the hashes are sorted into 65,536 buckets by it, and a hash is
    compared with those in its own bucket: about 15 of a million if hashes were random. Those of pictures are not: large
    buckets are what takes the time, and they are left out, and counted, beyond a limit of comparisons in all.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sela_ext.doctor.look_alike import UInt64Array

_BANDS, _BITS = 4, 16
_BUCKETS = 1 << _BITS
# Comparisons made at once: their intermediate results stay in the cache of a processor.
_AT_ONCE = 1 << 17
# Comparisons in all: some minutes.
MOST_COMPARISONS = 1 << 34

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """What was found.

    Attributes:
        query: int64 [P], row of `queries`.
        column: int64 [P], column of `queries`.
        match: int64 [P], row of `hashes`.
        left_out: comparisons that were not made, and pairs that were dropped; 0 if all is there.
        distance: bits up to which pairs were kept.
    """

    query: Int64Array
    column: Int64Array
    match: Int64Array
    left_out: int
    distance: int


def near_pairs(
    hashes: UInt64Array,
    queries: UInt64Array,
    distance: int,
    *,
    most_pairs: int | None = None,
    most_comparisons: int = MOST_COMPARISONS,
) -> Pairs:
    """Find hashes that differ from a query in at most `distance` bits: Note [Bands].

    Row i of `queries` is not compared with row i of `hashes`: they are of the same picture.

    Args:
        hashes: uint64 [N].
        queries: uint64 [N, V].
        distance: Bits, 0 .. 64. All pairs up to 3 are found, most of the others.
        most_pairs: Where more are found, the distance is lowered until fewer are, and if even equal hashes are more,
            the last of them are dropped; None: no limit.
        most_comparisons: Limit of comparisons; the largest buckets are left out beyond it.

    Returns:
        Pairs, each (query, column, match) once, sorted.

    Example:
        >>> hashes = np.array([0b1011, 0b1000, 0b111 << 60], np.uint64)
        >>> pairs = near_pairs(hashes, hashes[:, np.newaxis], 2)
        >>> list(zip(pairs.query.tolist(), pairs.match.tolist()))
        [(0, 1), (1, 0)]
    """
    kept = _Kept(len(hashes), queries.shape[1], distance, most_pairs)
    left_out = 0
    share = most_comparisons // (_BANDS * max(1, queries.shape[1]))
    for band in range(_BANDS):
        keys = _band(hashes, band)
        order = np.argsort(keys, kind="stable")
        arranged = hashes[order]
        sizes = np.bincount(keys, minlength=_BUCKETS)
        ends = np.cumsum(sizes)
        for column in range(queries.shape[1]):
            asked = queries[:, column]
            asked_keys = _band(asked, band)
            work = sizes * np.bincount(asked_keys, minlength=_BUCKETS)
            skipped = _too_much(work, share)
            left_out += int(work[skipped].sum())
            compared = sizes.copy()
            compared[skipped] = 0
            by_key = np.argsort(asked_keys, kind="stable")
            counts = compared[asked_keys[by_key]]
            by_key, counts = by_key[counts > 0], counts[counts > 0]
            starts = ends[asked_keys[by_key]] - counts
            for rows in _portions(counts):
                query = np.repeat(by_key[rows], counts[rows])
                before = np.cumsum(counts[rows]) - counts[rows]
                place = np.arange(len(query)) + np.repeat(starts[rows] - before, counts[rows])
                bits = count_bits(arranged[place] ^ asked[query])
                close = np.flatnonzero(bits <= kept.distance)
                kept.add(query[close], column, order[place[close]], bits[close])
    table = kept.finish()
    return Pairs(table[:, 0], table[:, 1], table[:, 2], left_out + kept.dropped, kept.distance)


class _Kept:
    """Pairs found so far: rows (query, column, match, bits). A pair may be found once per band."""

    def __init__(self, hashes: int, columns: int, distance: int, most: int | None) -> None:
        self.distance = distance
        self.dropped = 0
        self._hashes, self._columns = hashes, columns
        self._most = most
        self._parts: list[Int64Array] = []
        self._count = 0

    def add(self, query: Int64Array, column: int, match: Int64Array, bits: npt.NDArray[np.uint8]) -> None:
        other = query != match
        if not other.any():
            return
        query, match, bits = query[other], match[other], bits[other]
        self._parts.append(np.stack([query, np.full(len(query), column), match, bits.astype(np.int64)], axis=1))
        self._count += len(query)
        if self._most is not None and self._count > 2 * self._most:  # not at every pair beyond the limit
            self._shrink()

    def finish(self) -> Int64Array:
        """All of them, each once, sorted."""
        table = self._merged()
        if self._most is not None and len(table) > self._most:
            self._shrink()
            table = self._merged()
        return table

    def _merged(self) -> Int64Array:
        if not self._parts:
            return np.empty((0, 4), np.int64)
        found = np.concatenate(self._parts)
        keys = (found[:, 0] * self._columns + found[:, 1]) * self._hashes + found[:, 2]  # bits follow from these
        table: Int64Array = found[np.unique(keys, return_index=True)[1]]
        self._parts, self._count = [table], len(table)
        return table

    def _shrink(self) -> None:
        table = self._merged()
        while self._most is not None and len(table) > self._most and self.distance > 0:
            self.distance -= 1
            table = table[table[:, 3] <= self.distance]
        if self._most is not None and len(table) > self._most:
            self.dropped += len(table) - self._most
            table = table[: self._most]
        self._parts, self._count = [table], len(table)


def count_bits(values: UInt64Array) -> npt.NDArray[np.uint8]:
    """Number of bits set in each value."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        counted: npt.NDArray[np.uint8] = np.bitwise_count(values)
        return counted
    return _count_bits_by_halves(values)


def _count_bits_by_halves(values: UInt64Array) -> npt.NDArray[np.uint8]:
    """Sums of neighbouring bits, pairs, nibbles, and at last of the eight bytes by one product."""
    one, two, four = np.uint64(1), np.uint64(2), np.uint64(4)
    x = values - ((values >> one) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> two) & np.uint64(0x3333333333333333))
    x = (x + (x >> four)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    counted: npt.NDArray[np.uint8] = ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)
    return counted


def _band(hashes: UInt64Array, band: int) -> Int64Array:
    return ((hashes >> np.uint64(_BITS * band)) & np.uint64(_BUCKETS - 1)).astype(np.int64)


def _too_much(work: Int64Array, most: int) -> Int64Array:
    """Buckets to leave out, those with most work first, so that the rest is within the limit."""
    if work.sum() <= most:
        return np.empty(0, np.int64)
    order = np.argsort(work, kind="stable")
    return order[np.searchsorted(np.cumsum(work[order]), most, side="right") :]


def _portions(counts: Int64Array) -> list[slice]:
    """Runs of queries with about `_AT_ONCE` comparisons each."""
    if not len(counts):
        return []
    total = np.cumsum(counts)
    cuts = np.unique(np.searchsorted(total, np.arange(_AT_ONCE, total[-1], _AT_ONCE), side="right"))
    edges = [0, *(int(cut) for cut in cuts if 0 < cut < len(counts)), len(counts)]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]
