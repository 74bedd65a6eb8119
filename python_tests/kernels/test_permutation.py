"""The shuffle of an epoch."""

import time

import numpy as np
import pytest

from sela_ext import kernels
from sela_ext.errors import OptionError
from sela_ext.kernels import reference


@pytest.mark.parametrize("n", [0, 1, 2, 3, 31, 33, 1001])
@pytest.mark.parametrize("key", [(0, 0), (2**64 - 1, 2**32 - 1), (12345, 6)])
def test_kernel_and_twin_give_the_same_order(n, key):
    ours = kernels.permutation(n, seed=key[0], epoch=key[1])
    assert ours.dtype == np.int64
    assert np.array_equal(ours, reference.permutation(n, seed=key[0], epoch=key[1]))


def test_every_number_comes_once_and_a_million_take_well_below_a_second():
    began = time.process_time()
    order = kernels.permutation(1_000_003, seed=1, epoch=1)
    seconds = time.process_time() - began
    assert np.array_equal(np.sort(order), np.arange(1_000_003))
    assert seconds < 0.5


def test_all_orders_of_four_are_equally_frequent():
    orders = [tuple(kernels.permutation(4, seed=seed, epoch=3).tolist()) for seed in range(4800)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 140
    assert counts.max() < 260


def test_seeds_and_epochs_give_unrelated_orders():
    a = kernels.permutation(1001, seed=1, epoch=1)
    for seed, epoch in ((1, 2), (2, 1), (1 + 2**32, 1)):
        assert abs(np.corrcoef(a, kernels.permutation(1001, seed=seed, epoch=epoch))[0, 1]) < 0.12


def test_refusals_name_the_range():
    with pytest.raises(OptionError, match="n: expected"):
        kernels.permutation(-1, seed=0, epoch=0)
    with pytest.raises(OptionError, match="seed"):
        kernels.permutation(3, seed=2**64, epoch=0)
