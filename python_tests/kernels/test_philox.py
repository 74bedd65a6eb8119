"""Philox4x32-10 against the known answers that its authors publish with Random123 (kat_vectors)."""

import numpy as np
import pytest

from sela_ext import _core
from sela_ext.kernels import reference

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, words):
    assert _core.philox4x32(counter, key).tolist() == words
    assert reference.philox4x32(counter, key).tolist() == words


def test_vectorised_philox_equals_one_counter_at_a_time():
    counters = np.random.default_rng(0).integers(0, 1 << 32, (31, 4), dtype=np.uint64)
    many = reference.philox4x32(counters, [7, 9])
    for counter, words in zip(counters, many, strict=True):
        assert _core.philox4x32(counter.tolist(), [7, 9]).tolist() == words.tolist()
