"""Pictures that occur more than once: exactly, nearly, on both sides of a split, under different labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sela_ext.data.source import Int64Array
from sela_ext.doctor.near import FLAT, NearGroups, groups_of, near_groups
from sela_ext.doctor.table import Table


@dataclass(frozen=True)
class Group:
    """Images that show the same picture.

    Attributes:
        rows: int64 [members >= 2], rows of the table, ascending.
        same_bytes: the encoded files are equal too.
        across: there are members among the data and among the held-out images.
        labels: the different true labels of the members, ascending; more than one contradict each other.
    """

    rows: Int64Array
    same_bytes: bool
    across: bool
    labels: tuple[int, ...]

    @property
    def contradicts(self) -> bool:
        """Whether members carry different labels."""
        return len(self.labels) > 1


@dataclass(frozen=True)
class Duplicates:
    """What was found; groups that cross the split or contradict come first, then by their first row.

    Attributes:
        exact: groups of equal pixels.
        near: groups of pictures that look alike; of exact duplicates one stands for all.
        held_exact: held-out images whose pixels are among the data.
        held_near: further held-out images with a near duplicate among the data.
        search: how near duplicates were found.
    """

    exact: list[Group]
    near: list[Group]
    held_exact: int
    held_near: int
    search: NearGroups


def find_duplicates(table: Table, labels: Int64Array | None) -> Duplicates:
    """Compare all images with each other.

    Args:
        table: Of the images.
        labels: int64 [R], true label of each row, -1 where unknown; or None.
    """
    good = np.flatnonzero(table.good)
    keys = _keys(table.pixels[good])
    exact = [good[rows] for rows in groups_of(keys)]
    stands_for = _firsts(good, keys, len(table))
    rows = good[stands_for[good] == good]
    rows = rows[~table.one_colour[rows]]
    rows = rows[table.thumbs[rows].reshape(len(rows), -1).std(axis=1) >= FLAT] if len(rows) else rows
    search = near_groups(table.hashes[rows], table.thumbs[rows])
    near = [rows[group] for group in search.groups]

    held_exact = _held_rows(table, exact)
    members: dict[int, list[int]] = {}
    for group in exact:
        members[int(group[0])] = group.tolist()
    whole = [np.array(sorted(r for first in group for r in members.get(int(first), [int(first)]))) for group in near]
    held_near = np.setdiff1d(_held_rows(table, whole), held_exact)
    return Duplicates(
        _described(table, labels, exact, exact),
        _described(table, labels, near, whole),
        len(held_exact),
        len(held_near),
        search,
    )


def _keys(digests: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> Int64Array:
    """A number for each different digest [R, 2]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    new = np.ones(len(order), np.int64)
    new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    keys = np.empty(len(order), np.int64)
    keys[order] = np.cumsum(new)
    return keys


def _firsts(good: Int64Array, keys: Int64Array, count: int) -> Int64Array:
    """For each row the first one with the same key; -1 for rows that are not good."""
    found = np.full(count, -1, np.int64)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found[good] = good[first[inverse.reshape(-1)]]
    return found


def _held_rows(table: Table, groups: list[Int64Array]) -> Int64Array:
    """Held-out rows of groups that cross the split."""
    crossing = [rows[table.held[rows]] for rows in groups if 0 < table.held[rows].sum() < len(rows)]
    return np.concatenate(crossing) if crossing else np.empty(0, np.int64)


def _described(
    table: Table, labels: Int64Array | None, shown: list[Int64Array], whole: list[Int64Array]
) -> list[Group]:
    """Groups of the rows `shown`; what is said of them holds for all members, `whole`."""
    groups = []
    for rows, members in zip(shown, whole, strict=True):
        known = () if labels is None else tuple(int(v) for v in np.unique(labels[members]) if v >= 0)
        same = bool((table.content[rows] == table.content[rows[0]]).all())
        across = bool(0 < table.held[members].sum() < len(members))
        groups.append(Group(rows, same, across, known))
    return sorted(groups, key=lambda group: (not group.across, not group.contradicts, int(group.rows[0])))
