"""Class-balanced small parts of a labelled set, for learning from 1% or 10% of the labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sela_ext.errors import DataError, OptionError
from sela_ext.evaluation.inputs import label_array


def few_shot_rows(labels: Any, fraction: float, seed: int = 0) -> npt.NDArray[np.int64]:
    """Choose a part of the labelled images with the same number of each class.

    Every class gives round(fraction * N / C) images, at least one and at most all that it has. The choice depends on
    labels, fraction and seed alone, and parts of one seed are nested: the 1% lies inside the 10%.

    Args:
        labels: [N] integers; images with -1 are never chosen.
        fraction: share of the labelled images, in (0, 1].
        seed: of the choice, 0 .. 2^64 - 1.

    Returns:
        Indices, ascending, int64.

    Raises:
        OptionError: fraction or seed out of range.
        DataError: labels malformed, or none known.

    Example:
        >>> labels = [0] * 50 + [1] * 50
        >>> rows = few_shot_rows(labels, 0.1)
        >>> len(rows), int(sum(rows < 50))
        (10, 5)

    Source: the 1% and 10% protocol of Asano et al. 2020's successors (Chen et al. 2020, SimCLR, section 6).
    """
    if not 0 < fraction <= 1:
        raise OptionError(f"fraction: expected a share in (0, 1], found {fraction}")
    if not 0 <= seed < 2**64:
        raise OptionError(f"seed: expected a whole number in 0 .. 2^64 - 1, found {seed}")
    found = label_array(labels, "labels")
    classes = np.unique(found[found >= 0])
    if classes.size == 0:
        raise DataError(f"labels: expected at least one image with a label >= 0, found none in {found.size}")
    each = max(1, round(fraction * int((found >= 0).sum()) / classes.size))
    chosen = []
    for number in classes:
        rows = np.flatnonzero(found == number)
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, int(number)], np.uint64)))
        chosen.append(rows[generator.permutation(rows.size)[:each]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)
