"""Weighted nearest-neighbour classification of features: no training, so it judges the features alone."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.evaluation.inputs import feature_tensor, judged_rows, label_array, labelled_rows, positive

# Similarities held at once: 16 Mi floats = 64 MiB.
_SIMILARITIES = 1 << 24
# Training images compared at once: their scaled copies are the other large thing here.
_BLOCK_ROWS = 1 << 16
# Training images from which faiss, where installed, does the search on the CPU.
FAISS_ROWS = 200_000
# The k of the published tables: the paper's, and the two beside it.
PAPER_K = (10, 50, 200)


@torch.no_grad()
def weighted_knn(
    train_features: Any,
    train_labels: Any,
    test_features: Any = None,
    test_labels: Any = None,
    *,
    k: int = 50,
    sigma: float = 0.1,
    pca: int | None = None,
    normalize: bool = True,
    search: Literal["auto", "exact", "faiss"] = "auto",
) -> float:
    """Classify by the k most similar training images, each voting exp(similarity / sigma); return the accuracy.

    `knn_scores` for one k, top-1 alone; its arguments, its rules for ties, its errors.

    Returns:
        Share of test images classified right, in [0, 1].

    Example:
        >>> weighted_knn([[1.0, 0.0], [0.0, 1.0]], [0, 1], [[2.0, 0.1]], [0], k=1)
        1.0

    Source: Wu et al. 2018 (instance discrimination), section 3.4; Asano et al. 2020, table of CIFAR and SVHN results.
    """
    scores = knn_scores(
        train_features,
        train_labels,
        test_features,
        test_labels,
        k=k,
        sigma=sigma,
        pca=pca,
        normalize=normalize,
        search=search,
    )
    return scores[int(k)]["top1"]


@torch.no_grad()
def knn_scores(
    train_features: Any,
    train_labels: Any,
    test_features: Any = None,
    test_labels: Any = None,
    *,
    k: int | Iterable[int] = PAPER_K,
    sigma: float = 0.1,
    pca: int | None = None,
    normalize: bool = True,
    search: Literal["auto", "exact", "faiss"] = "auto",
) -> dict[int, dict[str, float]]:
    """Weighted kNN for one k or several, from one search: top-1 and top-5 accuracy.

    Ties are settled by position, so a result does not depend on chance: of training images with the same similarity the
    earlier is the nearer one, of classes with the same vote the lower number wins. Images with label -1 are left out on
    both sides. The search is exact; it holds no more than a block of similarities and a block of scaled features.

    Args:
        train_features: [N, D] numbers, numpy or torch; the work is done on its device in float32.
        train_labels: [N] integers.
        test_features: [M, D]; None classifies each training image by the others (leave-one-out).
        test_labels: [M] integers; None with test_features None.
        k: neighbours that vote, at least 1; more than there are means all.
        sigma: temperature of the votes, above 0.
        pca: project both sets to this many principal directions of the training features first (centred, not
            whitened; the paper's option is 128). More than there are columns or images means all. None: no projection.
        normalize: similarity is the cosine; otherwise the inner product of the features as they are.
        search: "exact" by matrix products; "faiss" by its flat index, which settles ties between equally similar images
            in its own way; "auto" takes faiss for 200,000 training images and more, if it is installed and they are on
            the CPU.

    Returns:
        For each k: top1 and top5, shares of test images in [0, 1]. A class without a vote is not among the five.

    Raises:
        OptionError: k, sigma, pca or search out of range.
        DataError: shapes do not fit together, or no labelled image.
        NumericsError: a feature is NaN or infinite.
        ResourceError: search is "faiss", and it is not installed.

    Example:
        >>> knn_scores([[1.0, 0.0], [0.0, 1.0]], [0, 1], [[2.0, 0.1]], [1], k=(1, 2))
        {1: {'top1': 0.0, 'top5': 0.0}, 2: {'top1': 0.0, 'top5': 1.0}}

    Source: Wu et al. 2018 (instance discrimination), section 3.4; Asano et al. 2020, table of CIFAR and SVHN results.
    """
    wanted = _neighbour_counts(k)
    positive(sigma, "sigma")
    if search not in ("auto", "exact", "faiss"):
        raise OptionError(f"search: expected auto, exact or faiss, found {search!r}")
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
    if pca is not None:
        center, directions = principal_directions(train, pca)
        train = (train - center) @ directions
        test = train if leave_one_out else (test - center) @ directions
    # Classes are renumbered 0 .. C-1 in ascending order, so vote tables stay small for any numbering.
    class_numbers, renumbered = np.unique(classes, return_inverse=True)
    votes_for = torch.from_numpy(renumbered.ravel()).to(train.device)
    known = np.isin(expected, class_numbers)
    goal = torch.from_numpy(np.searchsorted(class_numbers, np.where(known, expected, class_numbers[0])))
    goal, known_rows = goal.to(train.device), torch.from_numpy(known).to(train.device)
    most = min(max(wanted), train.shape[0] - 1 if leave_one_out else train.shape[0])
    right = {count: torch.zeros(2, dtype=torch.int64, device=train.device) for count in wanted}
    neighbours = _search(search, train)(train, test, most, leave_one_out, normalize)
    for start, values, index in neighbours:
        rows = slice(start, start + len(values))
        weights = torch.exp((values.double() - values[:, :1].double()) / sigma)
        votes = votes_for[index]
        scores = torch.zeros(len(values), class_numbers.size, dtype=torch.float64, device=train.device)
        voted = torch.zeros(scores.shape, dtype=torch.bool, device=train.device)
        each = torch.arange(len(values), device=train.device)
        for j in range(most):  # one vote per row at a time: no colliding additions, the same order everywhere
            scores[each, votes[:, j]] += weights[:, j]
            voted[each, votes[:, j]] = True
            for count in wanted:
                if j + 1 == min(count, most):
                    right[count] += _hits(scores, voted, goal[rows], known_rows[rows])
    total = len(expected)
    return {count: {"top1": int(found[0]) / total, "top5": int(found[1]) / total} for count, found in right.items()}


def principal_directions(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and leading principal directions of features, from their covariance in float64.

    Args:
        features: [N, D] float32.
        count: directions wanted, at least 1; more than min(N, D) means as many as there are.

    Returns:
        [D] and [D, min(count, N, D)], float32: (features - mean) @ directions is the projection.

    Raises:
        OptionError: count is below 1.

    Example:
        >>> mean, directions = principal_directions(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]), 1)
        >>> mean.tolist(), directions.abs().tolist()
        ([2.0, 1.0], [[1.0], [0.0]])
    """
    if count < 1:
        raise OptionError(f"pca: expected at least 1 direction, found {count}")
    rows, columns = features.shape
    mean = features.mean(dim=0, dtype=torch.float64)
    covariance = torch.zeros(columns, columns, dtype=torch.float64, device=features.device)
    for start in range(0, rows, _BLOCK_ROWS // 8):
        block = features[start : start + _BLOCK_ROWS // 8].double() - mean
        covariance += block.T @ block
    _, vectors = torch.linalg.eigh(covariance)
    return mean.float(), vectors.flip(1)[:, : min(count, rows, columns)].float().contiguous()


def _neighbour_counts(k: int | Iterable[int]) -> list[int]:
    """The values of k, ascending, each once."""
    several = isinstance(k, Iterable)
    counts = sorted({int(one) for one in (k if isinstance(k, Iterable) else [k])})
    if not counts:
        raise OptionError("k: expected a number of neighbours or several, found none")
    if counts[0] < 1:
        raise OptionError(f"k: expected at least 1 neighbour, found {counts[0] if several else k}")
    return counts


def _hits(scores: Tensor, voted: Tensor, goal: Tensor, known: Tensor) -> Tensor:
    """How often the true class has the most votes, and how often it is among the first five: int64 [2]."""
    own = scores.gather(1, goal[:, None])
    numbers = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (numbers < goal[:, None]))
    rank = (before & voted).sum(dim=1)
    usable = known & voted.gather(1, goal[:, None])[:, 0]
    return torch.stack([(usable & (rank == 0)).sum(), (usable & (rank < 5)).sum()])


def _search(search: str, train: Tensor) -> Any:
    """The function that finds neighbours."""
    if search == "exact":
        return _exact_neighbours
    if search == "auto" and (train.shape[0] < FAISS_ROWS or train.device.type != "cpu"):
        return _exact_neighbours
    try:
        importlib.import_module("faiss")
    except ImportError as error:
        if search == "faiss":
            raise ResourceError("search: faiss is not installed; pip install 'sela_ext[faiss]', or exact") from error
        return _exact_neighbours
    return _faiss_neighbours


_Neighbours = Iterator[tuple[int, Tensor, Tensor]]


def _exact_neighbours(train: Tensor, test: Tensor, most: int, leave_one_out: bool, normalize: bool) -> _Neighbours:
    """Yield (first row, similarities [B, most], indices [B, most]) over test rows, the nearest first."""
    block = min(_BLOCK_ROWS, max(1, train.shape[0]))
    chunk = max(1, min(1024, _SIMILARITIES // block))
    # In one block the scaled features are made once; otherwise again for each chunk of test images.
    whole = _scaled(train, normalize) if train.shape[0] <= block else None
    for start in range(0, test.shape[0], chunk):
        asked = _scaled(test[start : start + chunk], normalize)
        values = asked.new_empty(len(asked), 0)
        index = torch.empty(len(asked), 0, dtype=torch.int64, device=asked.device)
        for first in range(0, train.shape[0], block):
            part = whole if whole is not None else _scaled(train[first : first + block], normalize)
            similarity = asked @ part.T
            if leave_one_out:
                rows = torch.arange(len(asked), device=asked.device)
                own = start + rows - first
                inside = (own >= 0) & (own < len(part))
                similarity[rows[inside], own[inside]] = -torch.inf
            near, place = _nearest(similarity, min(most, len(part)))
            # Earlier blocks come first, so equal similarities stay in the order of the images.
            values, index = torch.cat([values, near], 1), torch.cat([index, place + first], 1)
            if values.shape[1] > most:
                values, kept = _nearest(values, most)
                index = index.gather(1, kept)
        yield start, values[:, :most], index[:, :most]


def _faiss_neighbours(train: Tensor, test: Tensor, most: int, leave_one_out: bool, normalize: bool) -> _Neighbours:
    """As `_exact_neighbours`, by faiss; equally similar images come in its order."""
    faiss = importlib.import_module("faiss")
    flat = faiss.IndexFlatIP(int(train.shape[1]))
    for first in range(0, train.shape[0], _BLOCK_ROWS):
        flat.add(np.ascontiguousarray(_scaled(train[first : first + _BLOCK_ROWS], normalize).cpu().numpy()))
    for start in range(0, test.shape[0], 4096):
        asked = _scaled(test[start : start + 4096], normalize)
        values, index = (
            torch.from_numpy(found) for found in flat.search(asked.cpu().numpy(), most + int(leave_one_out))
        )
        if leave_one_out:
            own = index == (start + torch.arange(len(asked)))[:, None]
            own[~own.any(1), -1] = True  # crowded out by equals: the last one is one too many
            values, index = values[~own].view(len(asked), most), index[~own].view(len(asked), most)
        yield start, values.to(train.device), index.to(train.device)


def _scaled(features: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1) if normalize else features


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row of [B, N], largest first; the lower index first where values are equal."""
    values, index = similarity.topk(k, dim=1)
    last = values[:, -1:]
    # topk may keep any of the images tied at rank k, and orders equal ones as it likes; rows with equal values that
    # matter need the full order.
    undecided = (similarity == last).sum(dim=1) > (values == last).sum(dim=1)
    if bool(undecided.any()):
        order = similarity[undecided].sort(dim=1, descending=True, stable=True)
        values[undecided] = order.values[:, :k]
        index[undecided] = order.indices[:, :k]
    if k > 1:
        tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
        if bool(tied.any()):  # the same images, those of equal value in the order of their numbers
            ascending = index[tied].argsort(dim=1, stable=True)
            again = values[tied].gather(1, ascending).sort(dim=1, descending=True, stable=True)
            values[tied] = again.values
            index[tied] = index[tied].gather(1, ascending).gather(1, again.indices)
    return values, index
