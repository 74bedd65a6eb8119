"""Clusters against true classes: how pure each cluster is, where each class went, and the table of both."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import sparse

Int = npt.NDArray[np.int64]

# A table of more rows or columns than this cannot be read; the largest classes and their clusters are shown.
MOST_CLASSES, MOST_CLUSTERS = 30, 40
# Classes that are listed with their clusters.
MOST_LISTED = 1000
# Names longer than this are cut.
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Truth:
    """True labels.

    Attributes:
        labels: int64 [N], -1 = unknown.
        names: of the classes, one each.
    """

    labels: Int
    names: list[str]

    def name(self, label: int) -> str:
        """Name of a class, "" where it is not known."""
        return self.names[label] if label >= 0 else ""


@dataclass(frozen=True)
class ClassRow:
    """A class: its number, name and size, and the clusters that hold most of it as (cluster, share of the class)."""

    number: int
    name: str
    size: int
    clusters: list[tuple[int, float]]


@dataclass(frozen=True)
class Cell:
    """An entry of the table: images, and the shade 0 .. 10 of its share of the class."""

    count: int
    shade: int


@dataclass(frozen=True)
class Confusion:
    """Clusters against classes.

    Attributes:
        purity: share of the most frequent class, float64 [K]; NaN where no image of a cluster has a true label.
        entropy: of the classes in a cluster, in nats, float64 [K]; NaN likewise.
        main: most frequent classes of each cluster as (class, share), at most three.
        columns: clusters in the table.
        rows: classes in the table with their cells.
        listed: classes with the clusters that hold most of them.
        classes, clusters: that hold images with a true label.
    """

    purity: npt.NDArray[np.float64]
    entropy: npt.NDArray[np.float64]
    main: list[list[tuple[int, float]]]
    columns: list[int] = field(default_factory=list)
    rows: list[tuple[str, int, list[Cell]]] = field(default_factory=list)
    listed: list[ClassRow] = field(default_factory=list)
    classes: int = 0
    clusters: int = 0


def make_truth(labels: npt.NDArray[np.int32] | None, names: npt.NDArray[np.str_] | None) -> Truth | None:
    """True labels with a name for every class; None where no image has one, or classes are no classes.

    Args:
        labels: [N], -1 = unknown.
        names: of the classes.
    """
    if labels is None or not (labels >= 0).any():
        return None
    numbers, places = np.unique(labels, return_inverse=True)  # numbers of classes may be anything
    known = numbers >= 0
    if known.sum() > max(1000, labels.size // 2):
        return None
    dense = places.reshape(-1) - int(numbers[0] < 0)
    given = [] if names is None else names.tolist()
    said = [str(given[n])[:_LONGEST_NAME] if n < len(given) else f"class {n}" for n in numbers[known].tolist()]
    return Truth(dense.astype(np.int64), said)


def confusion(labels: npt.NDArray[np.int32], clusters: int, truth: Truth) -> Confusion:
    """Count classes in clusters.

    Args:
        labels: cluster of each image, [N], -1 = skipped.
        clusters: their number, K.
        truth: true labels.
    """
    table = _count(labels, truth.labels, clusters, len(truth.names))
    sizes = np.asarray(table.sum(1), dtype=np.float64).reshape(-1)
    purity, entropy = np.full(clusters, np.nan), np.full(clusters, np.nan)
    main: list[list[tuple[int, float]]] = [[] for _ in range(clusters)]
    for k in np.flatnonzero(sizes):
        classes, counts = _row(table, int(k))
        share = counts / sizes[k]
        purity[k], entropy[k] = share[0], max(0.0, float(-(share * np.log(share)).sum()))
        main[k] = [(int(c), float(s)) for c, s in zip(classes[:3], share[:3], strict=True)]
    by_class = table.T.tocsr()
    class_sizes = np.asarray(by_class.sum(1), dtype=np.int64).reshape(-1)
    ranked = np.lexsort((np.arange(class_sizes.size), -class_sizes))
    ranked = ranked[class_sizes[ranked] > 0]
    listed = []
    for c in np.sort(ranked[:MOST_LISTED]):
        found, counts = _row(by_class, int(c))
        shares = [(int(k), float(n) / class_sizes[c]) for k, n in zip(found[:3], counts[:3], strict=True)]
        listed.append(ClassRow(int(c), truth.name(int(c)), int(class_sizes[c]), shares))
    shown = np.sort(ranked[:MOST_CLASSES])
    columns = _columns(table, shown, main, sizes)
    counts = table[columns][:, shown].toarray() if columns and shown.size else np.zeros((0, 0), np.int64)
    rows = [
        (
            truth.name(int(c)),
            int(class_sizes[c]),
            [Cell(int(n), int(np.ceil(10 * n / class_sizes[c]))) for n in counts[:, place]],
        )
        for place, c in enumerate(shown)
    ]
    return Confusion(purity, entropy, main, columns, rows, listed, int(ranked.size), int((sizes > 0).sum()))


def _count(rows: npt.NDArray[np.int32], columns: Int, height: int, width: int) -> sparse.csr_matrix:
    """Images by both labels, as a sparse table [height, width]; images without either are left out."""
    both = (rows >= 0) & (columns >= 0)
    ones = np.ones(int(both.sum()), np.int64)
    return sparse.coo_matrix((ones, (rows[both], columns[both])), shape=(height, width)).tocsr()


def _row(table: sparse.csr_matrix, row: int) -> tuple[Int, Int]:
    """Columns and counts of a row, most first, ties by number."""
    part = slice(table.indptr[row], table.indptr[row + 1])
    columns, counts = table.indices[part].astype(np.int64), table.data[part].astype(np.int64)
    order = np.lexsort((columns, -counts))
    return columns[order], counts[order]


def _columns(
    table: sparse.csr_matrix, shown: Int, main: list[list[tuple[int, float]]], sizes: npt.NDArray[np.float64]
) -> list[int]:
    """Clusters of the table: those that hold most of the shown classes, in the order of their main class."""
    held = np.asarray(table[:, shown].sum(1)).reshape(-1)
    largest = np.lexsort((np.arange(held.size), -held))[:MOST_CLUSTERS]
    kept = [int(k) for k in largest if sizes[k] > 0 and held[k] > 0]
    return sorted(kept, key=lambda k: (main[k][0][0], -main[k][0][1], k))
