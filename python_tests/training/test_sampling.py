import numpy as np
import pytest

from sela_ext.training.sampling import even_order


def labels_of(sizes, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)


@pytest.mark.parametrize("sizes", [[1], [31, 33], [1, 2, 997, 1], [0, 5, 0, 1001]])
def test_every_cluster_with_images_is_drawn_equally_often(sizes):
    labels = labels_of(sizes)
    order = even_order(labels, seed=3, epoch=2)
    drawn = np.bincount(labels[order], minlength=len(sizes))
    used = np.array(sizes) > 0
    assert set(drawn[used]) == {sum(sizes) // used.sum()}
    assert set(drawn[~used]) <= {0}
    assert len(order) <= sum(sizes) < len(order) + used.sum()


def test_a_cluster_repeats_no_image_before_all_of_it_have_come():
    labels = labels_of([3, 7, 90])
    order = even_order(labels, seed=1)
    for cluster, size in enumerate((3, 7, 90)):
        times = np.bincount(order, minlength=100)[labels == cluster]
        assert times.sum() == 33
        assert set(times) <= {33 // size, 33 // size + 1}


def test_the_order_is_mixed_and_depends_on_seed_and_epoch_alone():
    labels = labels_of([50, 50, 300])
    order = even_order(labels, seed=5, epoch=7)
    np.testing.assert_array_equal(order, even_order(labels.copy(), seed=5, epoch=7))
    others = [even_order(labels, seed=6, epoch=7), even_order(labels, seed=5, epoch=8)]
    assert all(not np.array_equal(order, other) for other in others)
    halves = np.bincount(labels[order[: len(order) // 2]], minlength=3)
    assert halves.min() > 40  # of 66.5 expected: not one cluster after the other


def test_images_without_a_label_are_not_drawn():
    labels = labels_of([4, 9])
    labels[::3] = -1
    order = even_order(labels)
    assert (labels[order] >= 0).all()
    assert len(even_order(np.full(5, -1, np.int32))) == 0


@pytest.mark.parametrize(("batch_size", "times"), [(1, 18), (32, 16), (27, 18), (64, 18), (256, 18), (1000, 18)])
def test_the_last_batch_is_not_short_if_that_costs_little(batch_size, times):
    # 108 draws; 3 batches of 32 and 12 more, or with 16 draws of each, 3 batches.
    labels = labels_of([50, 20, 10, 10, 10, 10])
    order = even_order(labels, batch_size=batch_size)
    assert set(np.bincount(labels[order])) == {times}
