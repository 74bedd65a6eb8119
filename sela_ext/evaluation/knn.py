"""Weighted nearest-neighbour classification of features: no training, so it judges the features alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sela_ext.errors import DataError, OptionError
from sela_ext.evaluation.inputs import feature_tensor, judged_rows, label_array, labelled_rows, positive

# Similarities held at once: 16 Mi floats = 64 MiB.
_SIMILARITIES = 1 << 24


@torch.no_grad()
def weighted_knn(
    train_features: Any,
    train_labels: Any,
    test_features: Any = None,
    test_labels: Any = None,
    *,
    k: int = 20,
    sigma: float = 0.1,
) -> float:
    """Classify by the k most similar training images, each voting exp(similarity / sigma); return the accuracy.

    Similarity is the cosine. Ties are settled by position, so a result does not depend on chance: of training images
    with the same similarity the earlier is the nearer one, of classes with the same vote the lower number wins.
    Images with label -1 are left out on both sides.

    Args:
        train_features: [N, D] numbers, numpy or torch; the work is done on its device in float32.
        train_labels: [N] integers.
        test_features: [M, D]; None classifies each training image by the others (leave-one-out).
        test_labels: [M] integers; None with test_features None.
        k: neighbours that vote, at least 1; more than there are means all.
        sigma: temperature of the votes, above 0.

    Returns:
        Share of test images classified right, in [0, 1].

    Raises:
        OptionError: k or sigma out of range.
        DataError: shapes do not fit together, or no labelled image.
        NumericsError: a feature is NaN or infinite.

    Example:
        >>> weighted_knn([[1.0, 0.0], [0.0, 1.0]], [0, 1], [[2.0, 0.1]], [0], k=1)
        1.0

    Source: Wu et al. 2018 (instance discrimination), section 3.4; Asano et al. 2020, table of CIFAR and SVHN results.
    """
    if k < 1:
        raise OptionError(f"k: expected at least 1 neighbour, found {k}")
    positive(sigma, "sigma")
    train, classes = labelled_rows(
        feature_tensor(train_features, "train_features"), label_array(train_labels, "train_labels"), "train_features"
    )
    leave_one_out = test_features is None
    if leave_one_out:
        if test_labels is not None:
            raise DataError("test_labels: expected None, because test_features is None (leave-one-out)")
        test, expected = train, classes
        if train.shape[0] < 2:
            raise DataError(f"train_features: leave-one-out expects at least 2 labelled images, found {train.shape[0]}")
    else:
        if test_labels is None:
            raise DataError("test_labels: expected one label per row of test_features, found None")
        test, expected = judged_rows(test_features, test_labels, train)
    # Classes are renumbered 0 .. C-1 in ascending order, so vote tables stay small for any numbering.
    class_numbers, renumbered = np.unique(classes, return_inverse=True)
    votes_for = torch.from_numpy(renumbered.ravel()).to(train.device)
    train = torch.nn.functional.normalize(train, dim=1)
    test = train if leave_one_out else torch.nn.functional.normalize(test, dim=1)
    count = train.shape[0]
    neighbours = min(k, count - 1 if leave_one_out else count)
    chunk = max(1, min(1024, _SIMILARITIES // count))
    predicted = np.empty(test.shape[0], dtype=np.int64)
    for start in range(0, test.shape[0], chunk):
        similarity = test[start : start + chunk] @ train.T
        rows = torch.arange(similarity.shape[0], device=similarity.device)
        if leave_one_out:
            similarity[rows, start + rows] = -torch.inf
        values, index = _nearest(similarity, neighbours)
        weights = torch.exp((values.double() - values[:, :1].double()) / sigma)
        scores = torch.zeros(similarity.shape[0], class_numbers.size, dtype=torch.float64, device=similarity.device)
        for j in range(neighbours):  # one vote per row at a time: no colliding additions, the same order everywhere
            scores[rows, votes_for[index[:, j]]] += weights[:, j]
        predicted[start : start + chunk] = scores.argmax(dim=1).cpu().numpy()
    return float(np.mean(class_numbers[predicted] == expected))


def _nearest(similarity: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of each row of [B, N], largest first; the lower index first where values are equal."""
    values, index = similarity.topk(k, dim=1)
    last = values[:, -1:]
    # topk may keep any of the images tied at rank k; only rows with more of them than fit need the full order.
    undecided = (similarity == last).sum(dim=1) > (values == last).sum(dim=1)
    if bool(undecided.any()):
        order = similarity[undecided].sort(dim=1, descending=True, stable=True)
        values[undecided] = order.values[:, :k]
        index[undecided] = order.indices[:, :k]
    return values, index
