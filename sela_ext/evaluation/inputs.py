"""What the evaluation functions accept: numpy arrays, torch tensors or sequences, checked once, here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sela_ext.errors import DataError, NumericsError, OptionError

# Rows looked at together: their mask takes a byte per number.
_CHECKED_ROWS = 1 << 14
LabelArray = npt.NDArray[np.int64]


def label_array(labels: Any, name: str) -> LabelArray:
    """Return labels as int64 [N]; -1 marks an image without a label.

    Args:
        labels: [N] integers, numpy, torch or a sequence.
        name: the argument's name, for messages.

    Raises:
        DataError: labels are not one-dimensional, not integers, or below -1.
    """
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.ndim != 1:
        raise DataError(f"{name}: expected one label per image, shape [N], found shape {list(array.shape)}")
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iub":
        raise DataError(f"{name}: expected integers, found {array.dtype}; convert class names to numbers first")
    result = array.astype(np.int64)
    if int(result.min()) < -1:
        raise DataError(f"{name}: expected labels >= 0, or -1 for none, found {int(result.min())}")
    return result


def feature_tensor(features: Any, name: str, device: torch.device | None = None) -> torch.Tensor:
    """Return features as float32 [N, D] without a gradient.

    Args:
        features: [N, D] real numbers, numpy, torch or nested sequences.
        name: the argument's name, for messages.
        device: where the result lies; None leaves a tensor where it is and puts arrays on the CPU.

    Raises:
        DataError: features are not a matrix with at least one column.
        NumericsError: an entry is NaN or infinite.
    """
    if isinstance(features, torch.Tensor):
        tensor = features.detach()
    else:
        tensor = torch.from_numpy(np.array(features, dtype=np.float32))
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise DataError(f"{name}: expected features of shape [N, D], found shape {list(tensor.shape)}")
    tensor = tensor.to(device=device, dtype=torch.float32)
    for start in range(0, len(tensor), _CHECKED_ROWS):
        finite = torch.isfinite(tensor[start : start + _CHECKED_ROWS]).all(dim=1)
        if not bool(finite.all()):
            row = start + int(torch.nonzero(~finite)[0])
            raise NumericsError(f"{name}: expected finite features, found NaN or infinity, first in row {row}")
    return tensor


def labelled_rows(features: torch.Tensor, labels: LabelArray, name: str) -> tuple[torch.Tensor, LabelArray]:
    """Drop the rows whose label is -1.

    Raises:
        DataError: lengths differ, or no labelled row is left.
    """
    if features.shape[0] != labels.shape[0]:
        raise DataError(f"{name}: expected one label per row, found {features.shape[0]} rows, {labels.shape[0]} labels")
    rows = np.flatnonzero(labels >= 0)
    if rows.size == 0:
        raise DataError(f"{name}: expected at least one image with a label >= 0, found none in {labels.shape[0]}")
    if rows.size == labels.shape[0]:
        return features, labels
    return features[torch.from_numpy(rows).to(features.device)], labels[rows]


def positive(value: float, name: str) -> float:
    """Return value, or raise OptionError unless it is finite and above zero."""
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{name}: expected a finite number above 0, found {value}")
    return value


def judged_rows(features: Any, labels: Any, train: torch.Tensor) -> tuple[torch.Tensor, LabelArray]:
    """Return the labelled images a probe is judged on: features [M, D] beside `train` [N, D], and labels [M].

    Raises:
        DataError: shapes do not fit together, or no labelled image.
        NumericsError: a feature is NaN or infinite.
    """
    test, expected = labelled_rows(
        feature_tensor(features, "test_features", train.device), label_array(labels, "test_labels"), "test_features"
    )
    if test.shape[1] != train.shape[1]:
        raise DataError(f"test_features: expected {train.shape[1]} columns as in training, found {test.shape[1]}")
    return test, expected
