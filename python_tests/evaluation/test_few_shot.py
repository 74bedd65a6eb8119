import numpy as np
import pytest

from sela_ext.errors import DataError, OptionError
from sela_ext.evaluation import few_shot_rows


def uneven(n, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(7, size=n, p=np.array([1, 2, 3, 4, 5, 6, 7]) / 28) * 3
    labels[::11] = -1
    return labels


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [31, 1001, 5003])
def test_every_class_gives_the_same_number_as_far_as_it_can(n, fraction):
    labels = uneven(n)
    rows = few_shot_rows(labels, fraction)
    known = labels[labels >= 0]
    classes, have = np.unique(known, return_counts=True)
    each = max(1, round(fraction * known.size / classes.size))
    chosen, counts = np.unique(labels[rows], return_counts=True)
    assert chosen.tolist() == classes.tolist()
    assert counts.tolist() == np.minimum(each, have).tolist()
    assert (np.diff(rows) > 0).all()


def test_the_choice_follows_from_the_seed_alone_and_parts_are_nested():
    labels = uneven(3001)
    one, ten = few_shot_rows(labels, 0.01, seed=4), few_shot_rows(labels, 0.1, seed=4)
    assert np.array_equal(one, few_shot_rows(labels, 0.01, seed=4))
    assert not np.array_equal(one, few_shot_rows(labels, 0.01, seed=5))
    assert np.isin(one, ten).all()


def test_a_class_keeps_its_images_when_another_is_added():
    labels = np.repeat([0, 1, 2], 100)
    more = np.repeat([0, 1, 2, 3], 100)
    assert np.array_equal(few_shot_rows(labels, 0.1, seed=1), [r for r in few_shot_rows(more, 0.1, seed=1) if r < 300])


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.1, float("nan")])
def test_shares_out_of_range_are_refused(fraction):
    with pytest.raises(OptionError, match="fraction: expected a share"):
        few_shot_rows([0, 1], fraction)


def test_unlabelled_images_alone_are_refused():
    with pytest.raises(DataError, match="found none in 2"):
        few_shot_rows([-1, -1], 0.5)
