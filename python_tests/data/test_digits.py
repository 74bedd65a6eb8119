import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from sela_ext.data import digits_split, find_eval_source, open_source


@pytest.fixture(scope="module")
def digits():
    return open_source("digits")


def test_the_digits_are_1797_padded_grey_images(digits):
    assert digits.array.shape == (1797, 32, 32, 1)
    assert digits.array.dtype == np.uint8
    assert digits.channels == 1
    assert digits.image_size == (32, 32)
    border = digits.array.copy()
    border[:, 4:28, 4:28] = 0
    assert not border.any()
    assert digits.array.max() == 255


def test_the_digits_are_scikit_learns_enlarged_bilinearly(digits):
    small = torch.from_numpy(load_digits().images * (255 / 16))[:, None]
    large = torch.nn.functional.interpolate(small, size=(24, 24), mode="bilinear", align_corners=False)
    difference = np.abs(large[:, 0].numpy() - digits.array[:, 4:28, 4:28, 0])
    assert difference.max() < 0.5 + 1e-9  # rounding only


def test_the_digits_have_labels_names_and_classes(digits):
    np.testing.assert_array_equal(digits.labels, load_digits().target)
    assert digits.labels.dtype == np.int64
    assert digits.class_names == list("0123456789")
    assert digits.names[0] == "digits/00000"
    assert digits.names[-1] == "digits/01796"
    assert find_eval_source("digits") is None


def test_the_split_divides_the_digits():
    train, test = digits_split()
    assert (len(train), len(test)) == (1437, 360)
    assert sorted([*train, *test]) == list(range(1797))
    np.testing.assert_array_equal(train, digits_split()[0])
    # Not the tail of the file: both halves of it are held out from.
    assert 100 < (test < 1797 // 2).sum() < 260


def test_a_subset_of_the_digits_keeps_their_labels_and_names(digits):
    _, test = digits_split()
    held_out = digits.subset(test)
    assert len(held_out) == 360
    np.testing.assert_array_equal(held_out.array, digits.array[test])
    np.testing.assert_array_equal(held_out.labels, digits.labels[test])
    assert held_out.names[5] == digits.names[test[5]]
    assert held_out.class_names == digits.class_names
