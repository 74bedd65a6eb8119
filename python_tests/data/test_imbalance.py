import numpy as np
import pytest

from sela_ext.data.imbalance import imbalanced_rows, removed_counts
from sela_ext.errors import OptionError


def shares(labels, rows, classes):
    return np.bincount(labels[rows], minlength=classes) / np.bincount(labels, minlength=classes)


def test_light_removes_half_of_the_last_class_alone():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    rows = imbalanced_rows(labels, "light")
    assert shares(labels, rows, 10).tolist() == [1.0] * 9 + [0.5]


def test_heavy_removes_a_tenth_more_of_each_class_than_of_the_one_before():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    rows = imbalanced_rows(labels, "heavy")
    assert shares(labels, rows, 10) == pytest.approx(1 - np.arange(10) / 10)
    assert len(rows) == 550


def test_none_removes_nothing():
    labels = np.arange(31) % 3
    assert imbalanced_rows(labels, "none").tolist() == list(range(31))


def test_counts_are_rounded_down():
    assert removed_counts([7, 7, 7], "heavy").tolist() == [0, 2, 4]
    assert removed_counts([7, 7, 7], "light").tolist() == [0, 0, 3]
    assert removed_counts([1] * 33, "heavy").sum() == 0


def test_rows_are_ascending_and_depend_on_the_seed_alone():
    labels = np.arange(1001) % 10
    first, again, other = (imbalanced_rows(labels, "heavy", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.all(np.diff(first) > 0)


def test_which_images_of_a_class_go_does_not_depend_on_the_other_classes():
    labels = np.arange(1000) % 10
    fewer = labels[labels != 4]
    all_rows = imbalanced_rows(labels, "light", seed=3)
    fewer_rows = imbalanced_rows(fewer, "light", classes=10, seed=3)
    nine = np.flatnonzero(labels == 9)
    nine_fewer = np.flatnonzero(fewer == 9)
    assert np.array_equal(np.isin(nine, all_rows), np.isin(nine_fewer, fewer_rows))


def test_images_without_a_label_stay():
    labels = np.array([-1, 0, -1, 1, 1, -1])
    rows = imbalanced_rows(labels, "light")
    assert {0, 1, 2, 5} <= set(rows.tolist())
    assert len(rows) == 5


def test_a_class_that_is_missing_still_counts():
    labels = np.repeat([0, 1], 10)
    assert len(imbalanced_rows(labels, "light", classes=3)) == 20
    assert len(imbalanced_rows(labels, "light")) == 15


@pytest.mark.parametrize("labels", [[], [-1, -1], [0, 0, 0]])
def test_fewer_than_two_classes_are_refused(labels):
    with pytest.raises(OptionError, match="at least 2 classes"):
        imbalanced_rows(np.array(labels, np.int64), "heavy")


def test_other_words_and_labels_beyond_the_classes_are_refused():
    with pytest.raises(OptionError, match="expected one of none, light, heavy"):
        imbalanced_rows([0, 1], "severe")
    with pytest.raises(OptionError, match="labels up to 5"):
        imbalanced_rows([0, 5], "light", classes=3)
