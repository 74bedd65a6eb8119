import numpy as np
import pytest

from sela_ext import kernels
from sela_ext.data.order import Share
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
