"""`open_source`: from what the user has to a source of images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sela_ext.data.arrays import open_array, open_npy
from sela_ext.data.dataset import DatasetSource
from sela_ext.data.digits import digits_source
from sela_ext.data.folder import find_split, folder_source, list_images, open_folder, open_paths
from sela_ext.data.idx import find_idx, is_idx, open_idx
from sela_ext.data.labels import read_labels
from sela_ext.data.shards import find_pack, open_pack
from sela_ext.data.source import LabelledSource, Source
from sela_ext.errors import DataError

_EXPECTED = (
    'expected "digits", the path of a folder, an IDX file or a .npy file, a list of paths, a uint8 array [N, H, W] or '
    "[N, H, W, C], or a torch Dataset"
)
_TRAIN, _TEST = "train", "t10k"


def open_source(data: Any, *, labels: Any = None) -> Source:
    """Open images of any supported kind.

    * `"digits"`: scikit-learn's 1,797 digits as 32 x 32 x 1, labelled.
    * uint8 arrays [N, H, W] or [N, H, W, C], C = 1 or 3, numpy (memory maps stay so) or torch, and .npy files.
    * IDX files, gzip-compressed or not, with the labels file beside them; or a folder in MNIST's naming, of which the
      training files are taken (`find_eval_source` gives the others).
    * A folder of image files, nested, unlabelled or with class folders; where it is divided into `train` and `test`
      (or `val`, ...), the images below `train` are taken. The rules are the notes in `sela_ext.data.folder`.
    * A list of paths of image files.
    * A torch Dataset whose items are images or (image, label, ...): slow, see `DatasetSource`.
    * A `Source`, returned as it is if no labels are given.

    Args:
        data: One of the above.
        labels: True labels, int [N] or the path of a .npy file, -1 = unknown; they replace those found with the
            images. True labels serve metrics only.

    Returns:
        The source.

    Raises:
        DataError: Nothing readable; the message says what was expected and found.

    Example:
        >>> source = open_source("digits")
        >>> source.describe()
        'digits: 1797 images, 32 x 32, grey, 10 classes (for metrics only)'
    """
    if isinstance(data, Source):
        return data if labels is None else LabelledSource(data, read_labels(labels, len(data)))
    if isinstance(data, str) and data == "digits":
        return open_source(digits_source(), labels=labels)
    if isinstance(data, (str, os.PathLike)):
        return _open_path(Path(data), labels)
    if isinstance(data, (np.ndarray, torch.Tensor)):
        return open_array(data, labels=labels)
    if isinstance(data, (list, tuple)):
        return open_paths(data, labels=labels)
    if isinstance(data, Dataset):
        return DatasetSource(data, labels=labels)
    raise DataError(f"data: {_EXPECTED}; found {type(data).__name__}")


def find_eval_source(data: Any) -> Source | None:
    """The images set aside for evaluation beside `data`, where their place follows from its layout.

    MNIST's `t10k` files beside the `train` files, or the folder `test` (or `val`, ...) beside `train`, with the same
    class numbers. The built-in digits have none: see `digits_split`.

    Args:
        data: As for `open_source`.

    Returns:
        The source, or None.
    """
    if not isinstance(data, (str, os.PathLike)) or data == "digits":
        return None
    path = Path(data)
    if path.is_dir():
        if find_idx(path, _TRAIN) is not None:
            test = find_idx(path, _TEST)
            return None if test is None else open_idx(test)
        split = find_split(path)
        if split is None:
            return None
        class_names = open_folder(split[0]).class_names
        found = [(folder, list_images(folder)) for folder in split[1]]
        sources = [folder_source(folder, paths, class_names=class_names) for folder, paths in found if paths]
        return next((source for source in sources if source.labels is not None), sources[0] if sources else None)
    if path.is_file() and path.name.startswith(f"{_TRAIN}-images"):
        test = find_idx(path.parent, _TEST)
        return None if test is None else open_idx(test)
    return None


def _open_path(path: Path, labels: Any) -> Source:
    packed = find_pack(path)
    if packed is not None:
        return open_pack(packed, labels=labels)
    if path.is_dir():
        images = find_idx(path, _TRAIN)
        if images is not None:
            return open_idx(images, labels=labels)
        split = find_split(path)
        return open_folder(path if split is None else split[0], labels=labels)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; {_EXPECTED}")
    if not path.is_file():
        raise DataError(f"{path}: {_EXPECTED}; found something that is neither a regular file nor a folder")
    if path.suffix == ".npy":
        return open_npy(path, labels=labels)
    if is_idx(path):
        return open_idx(path, labels=labels)
    raise DataError(f"{path}: {_EXPECTED}; found a file of another kind")
