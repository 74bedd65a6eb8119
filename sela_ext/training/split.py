"""Which images are trained on, and which are kept for evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sela_ext.data import Source, digits_split, find_eval_source, open_source
from sela_ext.errors import OptionError
from sela_ext.training.options import AUTO


def hold_out(source: Source, holdout: Any, digits: bool, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Images trained on, images held out, and why."""
    count = len(source)
    if holdout == AUTO:
        if digits:
            train_part, test_part = digits_split()
            return train_part, test_part, "360 of the digits are held out, as is usual"
        return np.arange(count), np.arange(0), "nothing is held out"
    fits = isinstance(holdout, (int, float)) and not isinstance(holdout, bool) and 0 <= holdout < count
    if not fits or (holdout > 1 and holdout != int(holdout)):
        raise OptionError(f"holdout: expected a share below 1 or a number of images below {count}, found {holdout!r}")
    number = round(holdout * count) if isinstance(holdout, float) and holdout < 1 else int(holdout)
    order = np.random.Generator(np.random.Philox(key=np.array([seed, 2**32], np.uint64))).permutation(count)
    return np.sort(order[number:]), np.sort(order[:number]), f"{number} images are held out"


def find_eval(
    data: Any, asked: Any, everything: Source, held: NDArray[np.int64], why_held: str
) -> tuple[Source | None, str]:
    """Labelled images that the network never sees in training."""
    if asked is not None:
        return (asked if isinstance(asked, Source) else open_source(asked)), "as asked"
    if len(held):
        return everything.subset(held), why_held
    found = find_eval_source(data)
    if found is not None:
        return found, f"{found.describe()} lies beside the training images"
    return None, why_held
