import numpy as np
import pytest
import torch

from sela_ext.errors import DataError, NumericsError, OptionError
from sela_ext.evaluation import knn, weighted_knn


def brute_force(train, train_labels, test, test_labels, k, sigma):
    """The definition, one image at a time, in float64."""
    train, labels = train[train_labels >= 0].astype(np.float64), train_labels[train_labels >= 0]
    loo = test is None
    queries, expected = (train, labels) if loo else (test.astype(np.float64), test_labels)
    queries, expected = queries[expected >= 0], expected[expected >= 0]
    right = 0
    for i, query in enumerate(queries):
        similarity = train @ query / (np.linalg.norm(train, axis=1) * np.linalg.norm(query))
        if loo:
            similarity[i] = -np.inf
        nearest = np.argsort(-similarity, kind="stable")[: min(k, len(train) - loo)]
        votes = np.zeros(labels.max() + 1)
        for j in nearest:
            votes[labels[j]] += np.exp(similarity[j] / sigma)
        right += int(votes.argmax() == expected[i])
    return right / len(queries)


def blobs(n, d, classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    return (centres[labels] + 1.2 * rng.normal(size=(n, d))).astype(np.float32), labels


@pytest.mark.parametrize(("n", "m", "d"), [(31, 1, 5), (33, 31, 3), (1001, 333, 17)])
@pytest.mark.parametrize(("k", "sigma"), [(1, 0.1), (20, 0.1), (7, 0.02), (200, 1.0)])
def test_accuracy_equals_brute_force(n, m, d, k, sigma):
    train, train_labels = blobs(n, d, 6, seed=n)
    test, test_labels = blobs(m, d, 6, seed=m + 1)
    expected = brute_force(train, train_labels, test, test_labels, k, sigma)
    assert weighted_knn(train, train_labels, test, test_labels, k=k, sigma=sigma) == expected


@pytest.mark.parametrize("n", [2, 31, 1001])
def test_without_test_images_each_is_judged_by_the_others(n):
    train, labels = blobs(n, 9, 4, seed=n)
    assert weighted_knn(train, labels, None, None, k=20) == brute_force(train, labels, None, None, 20, 0.1)


def test_small_chunks_give_the_same_as_one(monkeypatch):
    train, labels = blobs(333, 9, 4, seed=3)
    whole = weighted_knn(train, labels, k=20)
    monkeypatch.setattr(knn, "_SIMILARITIES", 333 * 7)
    assert weighted_knn(train, labels, k=20) == whole


def test_images_without_a_label_are_left_out_on_both_sides():
    train, train_labels = blobs(200, 9, 4, seed=1)
    test, test_labels = blobs(50, 9, 4, seed=2)
    train_labels[::3] = -1
    test_labels[::5] = -1
    keep, keep_test = train_labels >= 0, test_labels >= 0
    assert weighted_knn(train, train_labels, test, test_labels) == weighted_knn(
        train[keep], train_labels[keep], test[keep_test], test_labels[keep_test]
    )


def test_torch_half_precision_and_numpy_are_accepted():
    train, labels = blobs(100, 8, 3, seed=4)
    train = np.round(train * 4) / 4  # exact in float16
    assert weighted_knn(torch.from_numpy(train).half(), torch.from_numpy(labels)) == weighted_knn(train, labels)


def test_scaling_a_feature_changes_nothing():
    train, labels = blobs(100, 8, 3, seed=5)
    test, test_labels = blobs(40, 8, 3, seed=6)
    scale = 2.0 ** np.random.default_rng(0).integers(-6, 6, size=(100, 1))
    assert weighted_knn(train * scale, labels, test, test_labels) == weighted_knn(train, labels, test, test_labels)


def test_of_equally_similar_images_the_earlier_ones_vote():
    train = np.ones((1000, 4), dtype=np.float32)
    labels = np.array([7] * 3 + [2] * 997)
    assert weighted_knn(train, labels, train[:1], [7], k=5) == 1.0
    assert weighted_knn(train, labels, train[:1], [7], k=7) == 0.0


def test_of_classes_with_the_same_vote_the_lower_wins():
    train = np.eye(2, dtype=np.float32)
    assert weighted_knn(train, [9, 4], np.ones((1, 2)), [4], k=2) == 1.0


def test_a_cold_temperature_does_not_overflow():
    train, labels = blobs(50, 8, 3, seed=7)
    assert weighted_knn(train, labels, train, labels, k=20, sigma=1e-4) == 1.0


def test_a_zero_feature_is_no_error():
    assert weighted_knn(np.zeros((3, 2)), [1, 0, 1], np.zeros((1, 2)), [1], k=1) == 1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, OptionError, "k: expected at least 1 neighbour, found 0"),
        ({"sigma": 0.0}, OptionError, "sigma: expected a finite number above 0, found 0"),
        ({"sigma": float("nan")}, OptionError, "sigma: expected a finite number above 0, found nan"),
        ({"train_labels": [0]}, DataError, "found 2 rows, 1 labels"),
        ({"train_labels": [-1, -1]}, DataError, "found none in 2"),
        ({"test_features": [[1.0, 2.0, 3.0]]}, DataError, "expected 2 columns as in training, found 3"),
        ({"test_features": [1.0, 2.0]}, DataError, r"shape \[N, D\], found shape \[2\]"),
        ({"test_labels": None}, DataError, "test_labels: expected one label per row"),
        ({"test_features": None}, DataError, "test_labels: expected None"),
        ({"train_features": [[1.0, 2.0], [np.inf, 0.0]]}, NumericsError, "first in row 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    arguments = {
        "train_features": [[1.0, 0.0], [0.0, 1.0]],
        "train_labels": [0, 1],
        "test_features": [[1.0, 1.0]],
        "test_labels": [0],
    }
    with pytest.raises(error, match=message):
        weighted_knn(**{**arguments, **change})


def test_a_single_image_has_no_others_to_be_judged_by():
    with pytest.raises(DataError, match="at least 2 labelled images, found 1"):
        weighted_knn([[1.0, 2.0]], [0])
