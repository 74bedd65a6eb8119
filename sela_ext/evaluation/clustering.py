"""How good, how even and how stable a labelling is: agreement with true labels, cluster sizes, changed labels."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as sk

from sela_ext.errors import DataError, OptionError
from sela_ext.evaluation.inputs import LabelArray, label_array

# Tables of counts up to this many entries are taken as they are, empty classes included.
_DENSE_TABLE = 1 << 22


def cluster_metrics(true_labels: Any, labels: Any, clusters: int | None = None) -> dict[str, float]:
    """Compare a labelling with the true classes; images with label -1 on either side are left out.

    Args:
        true_labels: [N] integers, the class of each image, -1 where unknown.
        labels: [N] integers, the cluster of each image, -1 where skipped.
        clusters: number of clusters K; only checked against the labels. None: no check.

    Returns:
        nmi: normalised mutual information, arithmetic mean, in [0, 1].
        ami: the same, adjusted for chance (0 on average for random labels).
        ari: adjusted Rand index (0 on average for random labels, at most 1).
        accuracy: share of images that are right under the best one-to-one matching of clusters and classes; with more
            clusters than classes (or fewer) the images of what stays unmatched count as wrong.
        majority_accuracy: the same with every cluster standing for its most frequent class, many to one: the figure to
            read where clusters are more than classes. It cannot fall when clusters are split, so compare it at equal K.
        purity: another name of majority_accuracy, under which the literature on clustering has it.
        class_entropy: entropy of the class within a cluster, mean weighted by cluster size, in nats.

    Raises:
        DataError: lengths differ, labels are malformed or beyond K, or no image has both labels.

    Example:
        >>> found = cluster_metrics([0, 0, 1, 1], [1, 1, 0, 0])
        >>> found["accuracy"], round(found["nmi"], 6)
        (1.0, 1.0)

    Source: Asano et al. 2020, section 4 and appendix (NMI, adjusted NMI, ARI).
    """
    classes = label_array(true_labels, "true_labels")
    found = label_array(labels, "labels")
    if classes.shape != found.shape:
        raise DataError(f"labels: expected {classes.size} labels, one per true label, found {found.size}")
    if clusters is not None:
        _check_range(found, clusters)
    known = (classes >= 0) & (found >= 0)
    if not known.any():
        raise DataError(f"labels: expected images with both a true label and a cluster, found none in {classes.size}")
    classes, found = classes[known], found[known]
    table = _contingency(classes, found)
    with warnings.catch_warnings():
        # scikit-learn suspects regression targets where clusters are many and images few.
        warnings.filterwarnings("ignore", message=".*unique classes is greater than 50%.*", category=UserWarning)
        scores = {
            "nmi": sk.normalized_mutual_info_score(classes, found),
            "ami": sk.adjusted_mutual_info_score(classes, found),
            "ari": sk.adjusted_rand_score(classes, found),
        }
    matched = linear_sum_assignment(table, maximize=True)
    total = int(table.sum())
    scores["accuracy"] = int(table[matched].sum()) / total
    scores["majority_accuracy"] = scores["purity"] = int(table.max(axis=0).sum()) / total
    sizes = table.sum(axis=0)
    inside = table[table > 0]
    share = (table / sizes)[table > 0]
    scores["class_entropy"] = float(-(inside * np.log(share)).sum() / total)
    return {name: abs(float(value)) if value == 0 else float(value) for name, value in scores.items()}


def cluster_table(true_labels: Any, labels: Any, clusters: int) -> dict[str, npt.NDArray[Any]]:
    """Describe every cluster by the true classes in it; images with label -1 on either side are left out.

    Args:
        true_labels: [N] integers, the class of each image, -1 where unknown.
        labels: [N] integers in -1 .. clusters - 1.
        clusters: number of clusters K, at least 1.

    Returns:
        size: images of the cluster that have a true label, int64 [K].
        majority: its most frequent class, the lowest number among equals, int64 [K]; -1 where the cluster is empty.
        purity: share of its images that are of that class, float64 [K]; NaN where empty.
        entropy: entropy of the classes in it, nats, float64 [K]; 0 = one class alone; NaN where empty.

    Raises:
        OptionError: clusters is below 1.
        DataError: lengths differ, or labels are malformed or beyond K.

    Example:
        >>> found = cluster_table([5, 5, 7, 7], [0, 0, 0, 2], clusters=3)
        >>> found["majority"].tolist(), found["size"].tolist()
        ([5, -1, 7], [3, 0, 1])

    Source: Asano et al. 2020, appendix (entropy and purity over clusters).
    """
    classes = label_array(true_labels, "true_labels")
    found = label_array(labels, "labels")
    if classes.shape != found.shape:
        raise DataError(f"labels: expected {classes.size} labels, one per true label, found {found.size}")
    _check_range(found, clusters)
    known = (classes >= 0) & (found >= 0)
    size = np.bincount(found[known], minlength=clusters)
    majority = np.full(clusters, -1, dtype=np.int64)
    purity, entropy = np.full(clusters, np.nan), np.full(clusters, np.nan)
    if known.any():
        used = np.unique(found[known])
        table = _contingency(classes[known], found[known])
        share = table / table.sum(axis=0)
        majority[used] = np.unique(classes[known])[table.argmax(axis=0)]
        purity[used] = share.max(axis=0)
        entropy[used] = np.abs(np.where(table > 0, share * np.log(np.where(table > 0, share, 1.0)), 0.0).sum(axis=0))
    return {"size": size.astype(np.int64), "majority": majority, "purity": purity, "entropy": entropy}


def label_statistics(labels: Any, clusters: int) -> dict[str, float]:
    """Tell how evenly a labelling uses its clusters; images with label -1 are left out.

    Args:
        labels: [N] integers in -1 .. clusters - 1.
        clusters: number of clusters K, at least 1.

    Returns:
        used: number of clusters with at least one image.
        size_min, size_max: images in the smallest and in the largest of all K clusters (empty ones count).
        entropy_ratio: entropy of the sizes over ln K, in [0, 1]; 1 is a perfectly even split (and K = 1).

    Raises:
        OptionError: clusters is below 1.
        DataError: labels are malformed or beyond K.

    Example:
        >>> label_statistics([0, 0, 2, -1], clusters=3)["used"]
        2
    """
    found = label_array(labels, "labels")
    _check_range(found, clusters)
    sizes = np.bincount(found[found >= 0], minlength=clusters)
    total = int(sizes.sum())
    ratio = 0.0
    if total and clusters == 1:
        ratio = 1.0
    elif total:
        share = sizes[sizes > 0] / total
        ratio = min(1.0, max(0.0, float(-(share * np.log(share)).sum()) / math.log(clusters)))
    return {
        "used": int((sizes > 0).sum()),
        "size_min": int(sizes.min()),
        "size_max": int(sizes.max()),
        "entropy_ratio": ratio,
    }


def mutual_information(one: Any, other: Any) -> float:
    """Normalised mutual information (arithmetic) of two labellings: `nmi` of `cluster_metrics`, without the rest.

    Args:
        one: [N] integers, -1 where there is no label.
        other: [N] integers, -1 where there is no label; images without a label in either are left out.

    Returns:
        0 (independent, or no image left) .. 1 (the same partition).

    Raises:
        DataError: lengths differ or labels are malformed.

    Example:
        >>> mutual_information([0, 0, 1, 1], [1, 1, 0, 0])
        1.0
    """
    first, second = label_array(one, "one"), label_array(other, "other")
    if first.shape != second.shape:
        raise DataError(f"other: expected {first.size} labels, as many as one, found {second.size}")
    both = (first >= 0) & (second >= 0)
    count = int(np.count_nonzero(both))
    if not count:
        return 0.0
    if count < both.size:
        first, second = first[both], second[both]
    return _normalised_information(first, second)


def label_change(old: Any, new: Any) -> float:
    """Return the share of images whose label changed, of those that have a label in both sets (0 if none has).

    Args:
        old: [N] integers, -1 where there is no label.
        new: [N] integers, -1 where there is no label.

    Raises:
        DataError: lengths differ or labels are malformed.

    Example:
        >>> label_change([0, 1, 2, -1], [0, 2, 2, 1])
        0.3333333333333333
    """
    before = label_array(old, "old")
    after = label_array(new, "new")
    if before.shape != after.shape:
        raise DataError(f"new: expected {before.size} labels, as many as before, found {after.size}")
    both = (before >= 0) & (after >= 0)
    count = int(np.count_nonzero(both))
    return int(np.count_nonzero((before != after) & both)) / count if count else 0.0


def _check_range(labels: LabelArray, clusters: int) -> None:
    if clusters < 1:
        raise OptionError(f"clusters: expected at least 1, found {clusters}")
    if labels.size and int(labels.max()) >= clusters:
        raise DataError(f"labels: expected values below clusters = {clusters}, found {int(labels.max())}")


def _normalised_information(one: LabelArray, other: LabelArray) -> float:
    """NMI (arithmetic) of two labellings without -1, from one table of counts where labels are small numbers."""
    names = int(one.max()) + 1, int(other.max()) + 1
    if names[0] * names[1] <= max(_DENSE_TABLE, one.size):
        counts = np.bincount(one * names[1] + other, minlength=names[0] * names[1]).reshape(names)
    else:
        counts = _contingency(one, other)
    joint = counts / one.size
    rows, columns, both_known = (share[share > 0] for share in (joint.sum(1), joint.sum(0), joint))
    if len(rows) == len(columns) == 1:
        return 1.0
    first, second, both = (-float((p * np.log(p)).sum()) for p in (rows, columns, both_known))
    shared = first + second - both
    # What rounding leaves of independent labellings is nothing.
    return 0.0 if shared <= 1e-12 else min(1.0, 2 * shared / (first + second))


def _contingency(classes: LabelArray, found: LabelArray) -> npt.NDArray[np.int64]:
    """Count images per (class, cluster) over the classes and clusters that occur: [C, K] int64."""
    class_names, row = np.unique(classes, return_inverse=True)
    cluster_names, column = np.unique(found, return_inverse=True)
    shape = (class_names.size, cluster_names.size)
    flat = np.bincount(row.ravel() * shape[1] + column.ravel(), minlength=shape[0] * shape[1])
    return flat.reshape(shape).astype(np.int64)
