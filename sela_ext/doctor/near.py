"""Groups of near duplicates: proposed by hashes, accepted by comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sela_ext.data.source import UInt8Array
from sela_ext.doctor.hamming import Int64Array, Pairs, near_pairs
from sela_ext.doctor.look_alike import UInt64Array, rough_similarity, similarity, usual_similarity

# Bits in which hashes of near duplicates may differ; unrelated photographs differ in 16 or more of 64.
DISTANCE = 10
# Similarity from which two pictures count as near duplicates, where unrelated ones are hardly alike.
SIMILAR = 0.8
# Where unrelated pictures are alike (clothes, digits), more is asked: from a 99th percentile of this on ...
_USUAL, _SLOPE, _MOST_ASKED = 0.25, 0.34, 0.99
# ... which takes so many pictures to tell.
_ENOUGH = 256
# Comparisons in all alignments, 0.1 ms each.
MOST_COMPARED = 300_000
_AT_ONCE = 2048
# Grey levels by which a thumbnail must vary to be compared: smooth pictures are all alike.
FLAT = 2.0


@dataclass(frozen=True)
class NearGroups:
    """Near duplicates.

    Attributes:
        groups: int64 [members] each, rows in ascending order, at least two; ordered by their first row.
        threshold: similarity from which pictures counted as near duplicates.
        usual: how alike unrelated pictures are, see `usual_similarity`; None for a set too small to tell.
        distance: bits in which hashes of proposed pairs differed at most.
        proposed: pairs that hashes proposed.
        left_out: comparisons of hashes, and proposed pairs, that were left out to keep the time bounded.
    """

    groups: list[Int64Array]
    threshold: float
    usual: float | None
    distance: int
    proposed: int
    left_out: int


class Union:
    """Sets of rows that are joined pair by pair."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, row: int) -> int:
        """The row that stands for the set of `row`."""
        parent = self._parent
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    def join(self, first: int, second: int) -> None:
        """Make one set of two; the lower row stands for it."""
        low, high = sorted((self.root(first), self.root(second)))
        self._parent[high] = low

    def groups(self) -> list[Int64Array]:
        """Sets of at least two rows, by their first."""
        roots = np.array([self.root(row) for row in range(len(self._parent))], dtype=np.int64)
        return groups_of(roots)


def groups_of(keys: Int64Array) -> list[Int64Array]:
    """Rows with equal keys, at least two of them: ascending, ordered by their first.

    Example:
        >>> [rows.tolist() for rows in groups_of(np.array([7, 3, 7, 5, 3, 7]))]
        [[0, 2, 5], [1, 4]]
    """
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    starts, stops = np.r_[0, cuts], np.r_[cuts, len(order)]
    many = np.flatnonzero(stops - starts > 1)
    found = [order[starts[i] : stops[i]].astype(np.int64) for i in many]
    return sorted(found, key=lambda rows: int(rows[0]))


def near_groups(hashes: UInt64Array, thumbs: UInt8Array) -> NearGroups:
    """Find near duplicates.

    Args:
        hashes: uint64 [N, 19], see `hashes_of`.
        thumbs: uint8 [N, 16, 16], see `thumbs_of`.

    Returns:
        NearGroups. A group is what is connected by pairs: its ends need not be alike.
    """
    count = len(hashes)
    usual = usual_similarity(thumbs) if count >= _ENOUGH else None
    threshold = SIMILAR
    if usual is not None:
        threshold = float(np.clip(SIMILAR + _SLOPE * (usual - _USUAL), SIMILAR, _MOST_ASKED))
    pairs = _proposed(hashes)
    rough = _rough(pairs, thumbs)
    # The best alignment adds at most about as much to the middle one as is missing to 1.
    likely = np.flatnonzero(rough >= threshold - (1 - threshold))
    likely = likely[np.argsort(-rough[likely], kind="stable")]
    union = Union(count)
    compared = 0
    left_out = pairs.left_out
    for done, i in enumerate(likely):
        first, second = int(pairs.query[i]), int(pairs.match[i])
        if union.root(first) == union.root(second):
            continue
        if rough[i] < threshold:
            if compared == MOST_COMPARED:
                left_out += len(likely) - done
                break
            compared += 1
            if similarity(thumbs[first], thumbs[second], int(pairs.column[i])) < threshold:
                continue
        union.join(first, second)
    return NearGroups(union.groups(), threshold, usual, pairs.distance, len(pairs.query), left_out)


def _proposed(hashes: UInt64Array) -> Pairs:
    """Pairs worth a comparison.

    Of pictures with equal hashes, thousands in the frames of a camera that stands still, the first is compared with the
    others and each with the next; only the first is compared with other hashes. All with all would be millions.
    """
    own, first, group = np.unique(hashes[:, 0], return_index=True, return_inverse=True)
    pairs = near_pairs(own, hashes[first], DISTANCE, most_pairs=200_000 + len(hashes))
    order = np.argsort(group, kind="stable")  # groups one after the other, each in ascending order
    again = np.flatnonzero(np.diff(group[order]) == 0)
    before, after = order[again], order[again + 1]
    leads = first[group[after]]
    query = np.concatenate([first[pairs.query], leads, before[leads != before]])
    match = np.concatenate([first[pairs.match], after, after[leads != before]])
    column = np.zeros(len(query), np.int64)
    column[: len(pairs.column)] = pairs.column
    return Pairs(query, column, match, pairs.left_out, pairs.distance)


def _rough(pairs: Pairs, thumbs: UInt8Array) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """`rough_similarity` of all pairs."""
    found = np.empty(len(pairs.query), np.float32)
    for crop in np.unique(pairs.column):
        rows = np.flatnonzero(pairs.column == crop)
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            found[part] = rough_similarity(thumbs[pairs.query[part]], thumbs[pairs.match[part]], int(crop))
    return found
