import math
from fractions import Fraction

import numpy as np
import pytest

from sela_ext.kernels.sinkhorn_sums import WORDS, exact_sums, from_exact, sinkhorn_resolution

LARGEST = 2.0**76  # units of a block that words can hold


def words_of(total, largest_weight):
    """The four words of one total, in Python's fractions."""
    unit = Fraction(2) ** math.frexp(largest_weight)[1]
    left = Fraction(LARGEST) if math.isnan(total) else None
    if left is None:
        left = min(max(Fraction(total) / unit, -Fraction(LARGEST)), Fraction(LARGEST)) if math.isfinite(total) else None
    if left is None:
        left = Fraction(math.copysign(LARGEST, total))
    words = []
    for k in range(WORDS):
        step = Fraction(2) ** (32 - 32 * k)
        words.append(round(left / step))  # halves to even, as the processor rounds
        left -= words[-1] * step
    return words


def value_of(words, largest_weight):
    """What words stand for: exactly, and rounded once."""
    unit = Fraction(2) ** math.frexp(largest_weight)[1]
    return float(sum(word * Fraction(2) ** (32 - 32 * k) for k, word in enumerate(words)) * unit)


@pytest.mark.parametrize("largest_weight", [1.0, 0.3, 1e-7, 3e20])
@pytest.mark.parametrize("blocks", [0, 1, 31, 1001])
def test_words_of_blocks_are_those_of_fractions(blocks, largest_weight):
    rng = np.random.default_rng(blocks)
    totals = rng.standard_normal((2, blocks)) * 10.0 ** rng.integers(-30, 25, (2, blocks)) * largest_weight
    exact = exact_sums(np.arange(5), totals, 7, largest_weight)
    wanted = np.array([[words_of(x, largest_weight) for x in row] for row in totals.tolist()], object)
    wanted = wanted.reshape(2, blocks, WORDS).sum(axis=1)
    assert exact[5:-1].tolist() == [int(word) for row in wanted for word in np.broadcast_to(row, WORDS)]
    columns, objective, weight, masked = from_exact(exact, 1001, largest_weight)
    assert (objective, weight, masked) == (*(value_of(row, largest_weight) for row in wanted), 7)
    np.testing.assert_array_equal(columns, np.arange(5) * sinkhorn_resolution(1001, largest_weight))


def test_blocks_that_are_no_numbers_count_as_the_largest_total():
    totals = np.array([[np.nan, 1.0], [-np.inf, 2.0]])
    _, objective, weight, _ = from_exact(exact_sums(np.zeros(1), totals, 0, 0.5), 2, 0.5)
    assert objective == float(Fraction(LARGEST) + 1)
    assert weight == float(2 - Fraction(LARGEST))


@pytest.mark.parametrize("top", [0, 1, -1, 2**29, 2**30, -(2**30), 2**40, -(2**40), 2**55 + 1, -(2**55) - 1])
def test_totals_of_any_words_are_rounded_once(top):
    rng = np.random.default_rng(abs(top) % 1000)
    # Between two doubles, just off the middle by the last word, and anything.
    rest = [[0, 0, 0], [0, 0, 1], [0, 0, -1], [-1, 0, 0], [2**31, 2**31, 2**31]]
    rest += (rng.integers(-(2**40), 2**40, (30, 3))).tolist()
    for words in ([top, *some] for some in rest):
        exact = np.array([0, *words, *(-word for word in words), 0])
        _, objective, weight, _ = from_exact(exact, 1, 0.5)
        assert (objective, weight) == (value_of(words, 0.5), -value_of(words, 0.5))
