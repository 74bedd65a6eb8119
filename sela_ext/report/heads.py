"""Heads side by side: how far they agree, and which clusters of another head hold the images of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

# Images on which heads are compared: a larger sample changes no digit that is shown.
_COMPARED = 200_000
# Heads in the table of all pairs.
MOST_PAIRED = 24
# (cluster, share) entries that a page may hold.
_MOST_ENTRIES = 150_000
_MATCHES = 3


@dataclass(frozen=True)
class Heads:
    """Heads compared.

    Attributes:
        numbers: of the heads in the table of pairs.
        agreement: normalised mutual information of each pair, [heads, heads].
        matches: other head -> for each of the asked clusters, up to three (cluster there, share in percent).
        left_out: heads without matches, since there are too many.
        sampled: images that were compared, 0: all.
    """

    numbers: list[int]
    agreement: npt.NDArray[np.float64]
    matches: dict[int, list[list[tuple[int, int]]]]
    left_out: int = 0
    sampled: int = 0


def compare(
    labels: npt.NDArray[np.int32], shown: int, clusters: list[int], rows: npt.NDArray[np.int64]
) -> Heads | None:
    """Compare the shown head with the others, and all with one another; None where there is one.

    Args:
        labels: [heads, N], -1 = skipped.
        shown: the shown head.
        clusters: number of clusters of every head.
        rows: clusters of the shown head whose matches are asked for.
    """
    count = len(labels)
    if count < 2:
        return None
    sampled = 0
    if labels.shape[1] > _COMPARED:
        labels = labels[:, np.round(np.linspace(0, labels.shape[1] - 1, _COMPARED)).astype(np.int64)]
        sampled = _COMPARED
    others = [head for head in range(count) if head != shown]
    room = max(0, _MOST_ENTRIES // (_MATCHES * max(1, rows.size)))
    matches = {head: _matches(_table(labels, shown, head, clusters), rows) for head in others[:room]}
    numbers = sorted([shown, *others[: MOST_PAIRED - 1]])
    agreement = np.eye(len(numbers))
    for i, one in enumerate(numbers):
        for j in range(i):
            agreement[i, j] = agreement[j, i] = mutual_information(_table(labels, one, numbers[j], clusters))
    return Heads(numbers, agreement, matches, len(others) - len(matches), sampled)


def mutual_information(table: sparse.csr_matrix) -> float:
    """Normalised mutual information (arithmetic mean) of a table of counts, in [0, 1].

    Example:
        >>> round(mutual_information(sparse.csr_matrix([[5, 0], [0, 7]])), 6)
        1.0
    """
    total = float(table.sum())
    if total == 0:
        return 0.0
    joint = table.tocoo()
    rows, columns = (np.asarray(table.sum(axis), dtype=np.float64).reshape(-1) / total for axis in (1, 0))
    share = joint.data / total
    mutual = float((share * (np.log(share) - np.log(rows[joint.row] * columns[joint.col]))).sum())
    entropies = [float(-(p[p > 0] * np.log(p[p > 0])).sum()) for p in (rows, columns)]
    mean = sum(entropies) / 2
    return min(1.0, max(0.0, mutual / mean)) if mean > 0 else 1.0


def _table(labels: npt.NDArray[np.int32], one: int, other: int, clusters: list[int]) -> sparse.csr_matrix:
    both = (labels[one] >= 0) & (labels[other] >= 0)
    ones = np.ones(int(both.sum()), np.int64)
    return sparse.coo_matrix(
        (ones, (labels[one][both], labels[other][both])), shape=(clusters[one], clusters[other])
    ).tocsr()


def _matches(table: sparse.csr_matrix, rows: npt.NDArray[np.int64]) -> list[list[tuple[int, int]]]:
    found = []
    for row in rows.tolist():
        part = slice(table.indptr[row], table.indptr[row + 1])
        columns, counts = table.indices[part], table.data[part]
        order = np.lexsort((columns, -counts))[:_MATCHES]
        total = max(1, int(counts.sum()))
        found.append([(int(columns[i]), round(100 * int(counts[i]) / total)) for i in order])
    return found
