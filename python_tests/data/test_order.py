import numpy as np
import pytest

from sela_ext import kernels
from sela_ext.data.order import Share, occurrence_keys
from sela_ext.errors import OptionError


@pytest.mark.parametrize("count", [3, 31, 33, 1001])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_order_of_one(count, world_size):
    shares = [Share(count, rank, world_size) for rank in range(world_size)]
    orders = [share.order(seed=4, epoch=2, shuffle=True) for share in shares]
    assert [len(order) for order in orders] == [len(share) for share in shares]
    alone = Share(count).order(seed=4, epoch=2, shuffle=True)
    np.testing.assert_array_equal(alone, kernels.permutation(count, seed=4, epoch=2))
    for rank, order in enumerate(orders):
        np.testing.assert_array_equal(order, alone[rank::world_size])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("start", [0, 4, 5, 28, 31])
def test_pieces_go_on_from_any_position(drop_last, start):
    share = Share(31, batch_size=4, drop_last=drop_last)
    order = share.order(seed=0, epoch=0, shuffle=False)
    pieces = list(share.pieces(order, start))
    numbers = [i for piece in pieces for i in piece.tolist()]
    assert numbers == list(range(start, start + len(numbers)))
    assert len(numbers) == ((31 - start) // 4 * 4 if drop_last else 31 - start)
    assert all(len(piece) == 4 for piece in pieces[:-1])
    if start == 0:
        assert len(pieces) == share.batches


def test_no_batch_for_a_rank_is_an_error():
    with pytest.raises(OptionError, match="every rank, found 2 images, batch_size 1, 3 ranks"):
        Share(2, 0, 3)
    with pytest.raises(OptionError, match="full batch for rank 2, found 11 images, batch_size 4, 3 ranks"):
        Share(11, 2, 3, 4, drop_last=True)


@pytest.mark.parametrize("length", [1, 31, 1001])
def test_keys_of_an_order_name_image_and_occurrence(length):
    order = np.random.default_rng(length).integers(0, 33, length)
    keys = occurrence_keys(order, 33)
    np.testing.assert_array_equal(keys % 33, order)
    assert len(set(keys.tolist())) == length
    before = [int((order[:i] == image).sum()) for i, image in enumerate(order)]
    np.testing.assert_array_equal(keys // 33, before)


def test_keys_of_an_order_without_repeats_are_the_images():
    order = kernels.permutation(1001, seed=3, epoch=1)
    np.testing.assert_array_equal(occurrence_keys(order, 1001), order)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_a_given_order(world_size):
    keys = occurrence_keys(np.random.default_rng(0).integers(0, 5, 31), 5)
    taken = np.full(31, -1)
    for rank in range(world_size):
        share, mine = Share(5, rank, world_size, 4).given(keys)
        assert len(share) == len(mine)
        taken[rank::world_size] = mine
    np.testing.assert_array_equal(taken, keys)


@pytest.mark.parametrize(
    ("order", "match"),
    [
        ([], r"L >= 1, found float64 \[0\]"),
        ([[1, 2]], r"found int64 \[1, 2\]"),
        ([0.5], "image numbers .* found float64"),
        ([0, 5], "in 0..4, found 0 to 5"),
        ([-1, 2], "in 0..4, found -1 to 2"),
    ],
)
def test_an_order_of_other_than_image_numbers_is_refused(order, match):
    with pytest.raises(OptionError, match=match):
        occurrence_keys(order, 5)


def test_an_image_that_comes_too_often_for_its_keys_is_refused():
    with pytest.raises(OptionError, match="at most 2 times, found 3"):
        occurrence_keys([0, 0, 0], 2**39)
