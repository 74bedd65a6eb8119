"""Linear probe: how much of the classes a linear classifier reads from frozen features."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from sela_ext.evaluation.inputs import LabelArray, feature_tensor, judged_rows, label_array, labelled_rows

_log = logging.getLogger(__name__)

# scikit-learn keeps float64 copies: right for small sets; above this the same objective is minimised in row blocks.
_SMALL_ROWS = 20_000
# Rows per block of the large form: 32 Ki rows of 512 features are 64 MiB.
_BLOCK_ROWS = 1 << 15
_ITERATIONS = 500
# Columns up to which correlated features are straightened out first: their second moments are 128 MiB then.
_PRECONDITIONED = 4096
# Gradient of the mean loss at which the fit has converged; test accuracy is settled well before.
_TOLERANCE = 1e-4


def linear_probe(
    train_features: Any, train_labels: Any, test_features: Any, test_labels: Any, *, seed: int = 0
) -> float:
    """Fit multinomial logistic regression on frozen features and return its accuracy on the test images.

    `linear_scores`, top-1 alone; its arguments, its method, its errors.

    Returns:
        Share of test images classified right, in [0, 1].

    Example:
        >>> linear_probe([[0.0], [0.1], [1.0], [1.1]], [0, 0, 1, 1], [[0.2], [0.9]], [0, 1])
        1.0

    Source: Asano et al. 2020, section 4.3 (linear probes), here on pooled features.
    """
    return linear_scores(train_features, train_labels, test_features, test_labels, seed=seed)["top1"]


def linear_scores(
    train_features: Any, train_labels: Any, test_features: Any, test_labels: Any, *, seed: int = 0
) -> dict[str, float]:
    """Fit multinomial logistic regression on frozen features: top-1 and top-5 accuracy on the test images.

    Features are standardised with the training mean and deviation (constant ones become 0). The objective is the sum
    of cross-entropies plus half the squared norm of the weights (C = 1, bias free of it). Up to 20,000 rows
    scikit-learn fits it; above, the same objective is minimised by L-BFGS over row blocks, on the features' device.
    Images with label -1 are left out. A fit that stops at the iteration limit (500) is logged and scored as it is.

    Args:
        train_features: [N, D] numbers, numpy or torch.
        train_labels: [N] integers.
        test_features: [M, D].
        test_labels: [M] integers.
        seed: random state of the fit. The objective is convex and both fits start from zero, so results of different
            seeds agree.

    Returns:
        top1 and top5: shares of test images in [0, 1]. With equal scores the class of the lower number comes first.

    Raises:
        DataError: shapes do not fit together, or no labelled image.
        NumericsError: a feature is NaN or infinite.

    Example:
        >>> linear_scores([[0.0], [0.1], [1.0], [1.1]], [0, 0, 1, 1], [[0.2], [0.9]], [1, 1])
        {'top1': 0.5, 'top5': 1.0}

    Source: Asano et al. 2020, section 4.3 (linear probes), here on pooled features.
    """
    train, classes = labelled_rows(
        feature_tensor(train_features, "train_features"), label_array(train_labels, "train_labels"), "train_features"
    )
    test, expected = judged_rows(test_features, test_labels, train)
    class_numbers, target = np.unique(classes, return_inverse=True)
    if class_numbers.size == 1:
        share = float(np.mean(expected == class_numbers[0]))
        return {"top1": share, "top5": share}
    deviation, mean = torch.std_mean(train, dim=0, correction=0)
    # A column that is constant up to float32 rounding says nothing; dividing by its noise would amplify it.
    flat = deviation <= 1e-6 * mean.abs()
    scale = torch.where(flat, torch.zeros_like(deviation), 1 / torch.where(flat, 1.0, deviation))
    train = (train - mean) * scale
    test = (test - mean) * scale
    fit = _fit_small if train.shape[0] <= _SMALL_ROWS else _fit_large
    weight, bias = fit(train, target.ravel(), class_numbers.size, seed)
    scores = test @ torch.from_numpy(weight).to(test) + torch.from_numpy(bias).to(test)
    return topk_accuracy(scores, class_numbers, expected)


def topk_accuracy(scores: torch.Tensor, class_numbers: npt.NDArray[np.int64], expected: LabelArray) -> dict[str, float]:
    """How often the true class has the highest score, and how often one of the five highest.

    Args:
        scores: [M, C], finite.
        class_numbers: [C], ascending: the class of each column.
        expected: [M] true classes; one that is not among the columns counts as wrong.

    Returns:
        top1 and top5 in [0, 1]; of equal scores the class of the lower number comes first.
    """
    known = np.isin(expected, class_numbers)
    goal = np.searchsorted(class_numbers, np.where(known, expected, class_numbers[0]))
    column = torch.from_numpy(goal).to(scores.device)[:, None]
    own = scores.gather(1, column)
    earlier = torch.arange(scores.shape[1], device=scores.device) < column
    rank = ((scores > own) | ((scores == own) & earlier)).sum(dim=1).cpu().numpy()
    return {name: float(np.mean(known & (rank < best))) for name, best in (("top1", 1), ("top5", 5))}


_Fitted = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def _fit_small(features: torch.Tensor, target: npt.NDArray[np.int64], classes: int, seed: int) -> _Fitted:
    """Fit with scikit-learn; returns weight [D, C] and bias [C]."""
    # With two classes scikit-learn keeps one weight vector, the difference of the two: C = 2 is the same penalty there.
    model = LogisticRegression(C=2.0 if classes == 2 else 1.0, max_iter=_ITERATIONS, tol=_TOLERANCE, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(features.double().cpu().numpy(), target)
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            _warn_unconverged(features.shape)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    weight = np.asarray(model.coef_, dtype=np.float64).T
    bias = np.asarray(model.intercept_, dtype=np.float64)
    if classes == 2:  # one column there: the log-odds of the second class
        weight = np.concatenate([np.zeros_like(weight), weight], axis=1)
        bias = np.concatenate([np.zeros_like(bias), bias])
    return weight, bias


def _fit_large(features: torch.Tensor, target: npt.NDArray[np.int64], classes: int, seed: int) -> _Fitted:
    """Minimise the same objective with L-BFGS, its value and gradient taken over row blocks by torch.

    The unknowns are the weights in the coordinates of `_preconditioner`, where the objective is about as steep in every
    direction: features of a network are correlated, and hundreds of iterations would go into the flat directions.
    """
    rows, columns = features.shape
    labels = torch.from_numpy(target).to(features.device)
    factor = _preconditioner(features)

    def weights_of(flat: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        parameters = flat.reshape(columns + 1, classes)
        weight = _solved(factor, parameters[:-1], transposed=True)
        return np.concatenate([weight, parameters[-1:]])

    def loss_and_gradient(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        parameters = weights_of(flat)
        weight = torch.from_numpy(parameters[:-1]).to(features)
        bias = torch.from_numpy(parameters[-1]).to(features)
        loss = 0.0
        gradient = np.zeros_like(parameters)
        for start in range(0, rows, _BLOCK_ROWS):
            block = features[start : start + _BLOCK_ROWS]
            picked = labels[start : start + _BLOCK_ROWS, None]
            log_p = torch.log_softmax(block @ weight + bias, dim=1)
            loss -= float(log_p.gather(1, picked).sum(dtype=torch.float64))
            residual = log_p.exp()
            residual.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=residual.dtype))
            gradient[:-1] += (block.T @ residual).double().cpu().numpy()
            gradient[-1] += residual.sum(dim=0, dtype=torch.float64).cpu().numpy()
        loss += 0.5 * float((parameters[:-1] ** 2).sum())
        gradient[:-1] += parameters[:-1]
        gradient[:-1] = _solved(factor, gradient[:-1], transposed=False)
        return loss / rows, gradient.ravel() / rows

    start = np.zeros((columns + 1) * classes)
    options = {"maxiter": _ITERATIONS, "gtol": _TOLERANCE, "ftol": 1e-9}
    solved = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    if solved.status == 1:  # the iteration or evaluation limit
        _warn_unconverged(features.shape)
    fitted = weights_of(solved.x)
    return fitted[:-1], fitted[-1]


def _preconditioner(features: torch.Tensor) -> npt.NDArray[np.float64] | None:
    """Lower factor L [D, D]: L L^T = second moments / 4 + 1 / N, bounds of the loss's and the penalty's curvature.

    None beyond 4,096 features, where factor and solves would cost more than they save.
    """
    rows, columns = features.shape
    if columns > _PRECONDITIONED:
        return None
    moments = torch.zeros(columns, columns, dtype=torch.float64, device=features.device)
    for block in torch.split(features, _BLOCK_ROWS // 8):
        moments += block.double().T @ block.double()
    moments = moments / (4 * rows) + torch.eye(columns, dtype=torch.float64, device=features.device) / rows
    return np.asarray(torch.linalg.cholesky(moments).cpu().numpy())


def _solved(
    factor: npt.NDArray[np.float64] | None, values: npt.NDArray[np.float64], *, transposed: bool
) -> npt.NDArray[np.float64]:
    """L^-1 values, or L^-T values; without a factor the values themselves."""
    if factor is None:
        return values
    found = solve_triangular(factor, values, lower=True, trans="T" if transposed else "N", check_finite=False)
    return np.asarray(found)


def _warn_unconverged(shape: torch.Size) -> None:
    _log.warning(
        "linear probe on %d x %d features stopped at its limit of %d iterations; its accuracy may be a little low",
        shape[0],
        shape[1],
        _ITERATIONS,
    )
