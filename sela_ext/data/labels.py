"""True labels given by the user: an array, a tensor, a list or a .npy file, checked against the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sela_ext.data.npy import map_npy
from sela_ext.data.source import Int64Array
from sela_ext.errors import DataError


def read_labels(labels: Any, count: int) -> Int64Array:
    """Bring `labels` into one form.

    Args:
        labels: Integers [N] (numpy, torch, list) or the path of a .npy file that holds them; -1 = unknown.
        count: N, the number of images.

    Returns:
        int64 [N].

    Raises:
        DataError: Another length, another type, or a value below -1.
    """
    where = "labels"
    if isinstance(labels, (str, Path)):
        where = f"labels file {labels}"
        labels = map_npy(labels, f"labels, a readable .npy file of {count} integers")
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu().numpy()
    try:
        values = np.asarray(labels)
    except ValueError as error:
        raise DataError(f"{where}: expected {count} integers, found a ragged list") from error
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise DataError(
            f"{where}: expected integers of shape [{count}], found {values.dtype} of shape {list(values.shape)}"
        )
    if len(values) != count:
        raise DataError(f"{where}: expected one per image, {count}, found {len(values)}")
    values = values.astype(np.int64)
    if values.min() < -1:
        raise DataError(f"{where}: expected values >= 0, or -1 for unknown, found {int(values.min())}")
    return values
