"""The imbalance study: training images of which some classes are rarer than others.

Note [Rules of the imbalance study]
    Let C be the number of classes and n_c the number of training images of class c = 0..C-1.
    * "light": of the last class, half is removed: floor(n_c / 2) images. (CIFAR-10: half of the trucks.)
    * "heavy": of class c, the share c / C is removed: floor(n_c c / C) images. (CIFAR-10: nothing of class 0, 10% of
      class 1, 20% of class 2, ... 90% of class 9.)
    Which images of a class are removed is drawn from the seed, class by class. Images without a label stay. Images that
    are evaluated on stay as they are.

Source: Asano, Rupprecht, Vedaldi (ICLR 2020), the study of imbalanced data on CIFAR-10.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sela_ext.data.source import Int64Array
from sela_ext.errors import OptionError, nearest

IMBALANCES = ("none", "light", "heavy")
# Beyond the seeds of the other draws of a run, in the second half of the key.
_STREAM = 2**36


def removed_counts(counts: npt.ArrayLike, imbalance: str) -> Int64Array:
    """How many images of each class are removed: Note [Rules of the imbalance study].

    Args:
        counts: images n_c of each class, integers [C].
        imbalance: "none", "light" or "heavy".

    Returns:
        int64 [C].

    Raises:
        OptionError: another word.

    Example:
        >>> removed_counts([5000] * 10, "light").tolist()
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 2500]
        >>> removed_counts([5000] * 10, "heavy").tolist()
        [0, 500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500]
    """
    if imbalance not in IMBALANCES:
        raise OptionError(
            f"imbalance: expected one of {', '.join(IMBALANCES)}, found {imbalance!r}{nearest(imbalance, IMBALANCES)}"
        )
    sizes = np.asarray(counts, np.int64)
    classes = len(sizes)
    if imbalance == "heavy":
        return sizes * np.arange(classes, dtype=np.int64) // max(classes, 1)
    removed = np.zeros(classes, np.int64)
    if imbalance == "light" and classes:
        removed[-1] = sizes[-1] // 2
    return removed


def imbalanced_rows(labels: npt.ArrayLike, imbalance: str, *, classes: int | None = None, seed: int = 0) -> Int64Array:
    """Rows that stay when a set is made imbalanced.

    Args:
        labels: true labels, integers [N]; -1 = unknown, such images stay.
        imbalance: "none", "light" or "heavy": Note [Rules of the imbalance study].
        classes: number of classes C; default: the largest label and one.
        seed: 0..2**64 - 1; determines which images of a class go.

    Returns:
        int64, ascending.

    Raises:
        OptionError: another word, fewer than two classes, or a label beyond them.

    Example:
        >>> imbalanced_rows([0, 1, 0, 1, 1, 1], "light").size
        4
    """
    values = np.asarray(labels, np.int64)
    count = int(values.max(initial=-1)) + 1 if classes is None else classes
    if count < 2 or values.max(initial=-1) >= count:
        raise OptionError(
            f"imbalance: expected labels of at least 2 classes, found {np.unique(values[values >= 0]).size} classes "
            f"with labels up to {int(values.max(initial=-1))}"
        )
    stays = np.ones(len(values), bool)
    for c, removed in enumerate(removed_counts(np.bincount(values[values >= 0], minlength=count), imbalance)):
        rows = np.flatnonzero(values == c)
        order = np.random.Generator(np.random.Philox(key=np.array([seed, _STREAM + c], np.uint64))).permutation(rows)
        stays[order[: int(removed)]] = False
    return np.flatnonzero(stays)
