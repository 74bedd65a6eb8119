"""The built-in data set: the 1,797 handwritten digits that scikit-learn carries."""

from __future__ import annotations

import hashlib

import numpy as np

from sela_ext.data.arrays import ArraySource
from sela_ext.data.source import Int64Array, UInt8Array

COUNT = 1797
TEST_COUNT = 360  # a fifth
SMALL_SIDE = 8  # side of scikit-learn's images; their values are 0..16
SCALE = 3  # 8 -> 24 pixels
PAD = 4  # 24 -> 32 pixels, the size that networks for small images expect


def digits_source() -> ArraySource:
    """The digits as uint8 [1797, 32, 32, 1] in scikit-learn's order, with labels and the class names "0".."9"."""
    from sklearn.datasets import load_digits  # here, since its import takes a second

    images, target = load_digits(return_X_y=True)
    small = np.asarray(images).reshape(-1, SMALL_SIDE, SMALL_SIDE).astype(np.int64)
    return ArraySource(
        enlarge(small)[..., np.newaxis],
        kind="digits",
        labels=np.asarray(target).astype(np.int64),
        class_names=[str(digit) for digit in range(10)],
    )


def digits_split() -> tuple[Int64Array, Int64Array]:
    """A fixed split of the digits for held-out evaluation.

    The images are ordered by the SHA-256 of their names, which no library version can change.

    Returns:
        Indices for training, int64 [1437], and for testing, int64 [360], each ascending.

    Example:
        >>> train, test = digits_split()
        >>> len(train), len(test), len(set(train) & set(test))
        (1437, 360, 0)
    """
    keys = [hashlib.sha256(f"digits/{i:05d}".encode()).digest() for i in range(COUNT)]
    order = np.array(sorted(range(COUNT), key=keys.__getitem__), dtype=np.int64)
    return np.sort(order[TEST_COUNT:]), np.sort(order[:TEST_COUNT])


def enlarge(small: Int64Array) -> UInt8Array:
    """Scale 0..16 to 0..255, enlarge three times bilinearly (pixel centres, clamped edges), pad with zeros.

    Integer arithmetic throughout: the weights are thirds, so nothing depends on the machine.

    Args:
        small: [N, 8, 8], values 0..16.

    Returns:
        uint8 [N, 32, 32], rounded half up.
    """
    weights = np.zeros((SCALE * SMALL_SIDE, SMALL_SIDE), dtype=np.int64)
    for out in range(SCALE * SMALL_SIDE):
        # The centre of output pixel `out` lies at (out + 1/2) / 3 - 1/2 = (out - 1) / 3 in input pixels.
        low, third = divmod(out - 1, SCALE)
        weights[out, max(low, 0)] += SCALE - third
        weights[out, min(low + 1, SMALL_SIDE - 1)] += third
    sums = weights @ small @ weights.T  # in units of 1/9 of a grey step
    divisor = 16 * SCALE * SCALE
    grey = (2 * 255 * sums + divisor) // (2 * divisor)
    return np.pad(grey, ((0, 0), (PAD, PAD), (PAD, PAD))).astype(np.uint8)
