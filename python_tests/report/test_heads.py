import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from sela_ext.report import heads
from sela_ext.report.heads import compare


@pytest.mark.parametrize("n", [1, 33, 1001])
def test_agreement_is_the_normalised_mutual_information_of_the_labels(n):
    rng = np.random.default_rng(n)
    labels = np.stack([rng.integers(k, size=n) for k in (2, 7, 31)]).astype(np.int32)
    found = compare(labels, 1, [2, 7, 31], np.arange(7))
    for i in range(3):
        for j in range(3):
            expected = normalized_mutual_info_score(labels[i], labels[j])
            assert found.agreement[i, j] == pytest.approx(expected, abs=1e-9)


def test_images_without_a_label_are_left_out():
    labels = np.array([[0, 0, 1, -1, 1], [1, 1, 0, 0, -1]], np.int32)
    found = compare(labels, 0, [2, 2], np.arange(2))
    assert found.matches == {1: [[(1, 100)], [(0, 100)]]}
    assert found.agreement[0, 1] == 1


def test_the_shown_head_and_as_many_others_as_there_is_room_for_are_compared(monkeypatch):
    monkeypatch.setattr(heads, "_MOST_ENTRIES", 3 * 4 * 2)
    monkeypatch.setattr(heads, "MOST_PAIRED", 3)
    labels = np.random.default_rng(0).integers(4, size=(6, 50)).astype(np.int32)
    found = compare(labels, 5, [4] * 6, np.arange(4))
    assert list(found.matches) == [0, 1]
    assert found.left_out == 3
    assert found.numbers == [0, 1, 5]


def test_many_images_are_compared_on_a_sample(monkeypatch):
    monkeypatch.setattr(heads, "_COMPARED", 100)
    labels = np.tile(np.arange(1000, dtype=np.int32) % 7, (2, 1))
    found = compare(labels, 0, [7, 7], np.arange(7))
    assert found.sampled == 100
    assert found.agreement[0, 1] == pytest.approx(1)


def test_one_head_is_compared_with_none():
    assert compare(np.zeros((1, 5), np.int32), 0, [1], np.arange(1)) is None
