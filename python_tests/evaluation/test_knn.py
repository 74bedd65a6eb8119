import sys

import numpy as np
import pytest
import torch

from sela_ext.errors import DataError, NumericsError, OptionError, ResourceError
from sela_ext.evaluation import knn, knn_scores, weighted_knn


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


def both_sets(n=1001, m=333, d=17, classes=6):
    train, train_labels = blobs(n, d, classes, seed=n)
    test, test_labels = blobs(m, d, classes, seed=m + 1)
    return train, train_labels, test, test_labels


@pytest.mark.parametrize("k", [1, 10, 50])
def test_votes_equal_scikit_learns_neighbours_with_these_weights(k):
    from sklearn.neighbors import KNeighborsClassifier

    train, train_labels, test, test_labels = both_sets()
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1))
    expected = model.fit(train.astype(np.float64), train_labels).score(test.astype(np.float64), test_labels)
    assert weighted_knn(train, train_labels, test, test_labels, k=k) == expected


@pytest.mark.parametrize("k", [1, 20, 200])
def test_both_figures_equal_those_of_the_lightly_package(k):
    predict = pytest.importorskip("lightly.utils.benchmarking", reason="lightly is not installed").knn_predict
    train, train_labels, test, test_labels = both_sets()
    bank = torch.nn.functional.normalize(torch.from_numpy(train), dim=1)
    asked = torch.nn.functional.normalize(torch.from_numpy(test), dim=1)
    ranked = predict(asked, bank.T, torch.from_numpy(train_labels), 6, knn_k=k, knn_t=0.1).numpy()
    found = knn_scores(train, train_labels, test, test_labels, k=k)[k]
    assert found["top1"] == np.mean(ranked[:, 0] == test_labels)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_faiss_finds_the_same(leave_one_out, normalize):
    pytest.importorskip("faiss", reason="faiss is not installed")
    train, train_labels, test, test_labels = both_sets()
    images = (train, train_labels) if leave_one_out else (train, train_labels, test, test_labels)
    one, other = (
        knn_scores(*images, k=(1, 20, 50), sigma=1.0, normalize=normalize, search=search)
        for search in ("exact", "faiss")
    )
    assert one == other


def test_faiss_leaves_out_the_image_itself_also_among_equals():
    pytest.importorskip("faiss", reason="faiss is not installed")
    train = np.ones((40, 4), dtype=np.float32)
    labels = np.array([3] * 39 + [1])
    assert weighted_knn(train, labels, k=5, search="faiss") == pytest.approx(39 / 40)


def test_what_is_searched_with_is_named_when_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ResourceError, match=r"faiss is not installed; pip install 'sela_ext\[faiss\]'"):
        weighted_knn(np.eye(3), [0, 1, 2], k=1, search="faiss")
    monkeypatch.setattr(knn, "FAISS_ROWS", 1)
    train, labels = blobs(99, 5, 3, seed=1)
    assert weighted_knn(train, labels, k=5) == weighted_knn(train, labels, k=5, search="exact")


def test_several_k_give_what_each_gives_alone():
    train, train_labels, test, test_labels = both_sets()
    together = knn_scores(train, train_labels, test, test_labels, k=(200, 1, 20, 5000))
    assert list(together) == [1, 20, 200, 5000]
    for k, found in together.items():
        assert knn_scores(train, train_labels, test, test_labels, k=k)[k] == found
        assert found["top1"] == weighted_knn(train, train_labels, test, test_labels, k=k)


def test_blocks_of_training_images_give_the_same_as_one(monkeypatch):
    train, train_labels, test, test_labels = both_sets()
    train = np.concatenate([train, train])  # every image twice: ties across blocks
    train_labels = np.concatenate([train_labels, (train_labels + 1) % 6])
    whole = knn_scores(train, train_labels, test, test_labels, k=(1, 7, 200))
    alone = knn_scores(train, train_labels, k=(1, 7, 200))
    monkeypatch.setattr(knn, "_BLOCK_ROWS", 97)
    monkeypatch.setattr(knn, "_SIMILARITIES", 97 * 31)
    assert knn_scores(train, train_labels, test, test_labels, k=(1, 7, 200)) == whole
    assert knn_scores(train, train_labels, k=(1, 7, 200)) == alone


def test_the_nearest_of_equals_is_the_earlier_for_every_k():
    # 300 equal images of ten classes: k of them are the first k.
    train, labels = np.ones((300, 3), dtype=np.float32), np.repeat(np.arange(30), 10)
    found = knn_scores(train, labels, train[:1], [1], k=(10, 20, 200))
    assert [found[k]["top1"] for k in (10, 20, 200)] == [0.0, 0.0, 0.0]
    assert [found[k]["top5"] for k in (10, 20, 200)] == [0.0, 1.0, 1.0]
    assert knn_scores(train, labels, train[:1], [5], k=(50, 200))[200]["top5"] == 0.0


def test_top5_counts_the_classes_with_the_most_votes():
    rng = np.random.default_rng(3)
    train, train_labels = rng.normal(size=(301, 7)), rng.integers(9, size=301)
    test, test_labels = rng.normal(size=(99, 7)), rng.integers(9, size=99)
    found = knn_scores(train, train_labels, test, test_labels, k=31)[31]
    right = 0
    for query, label in zip(test, test_labels, strict=True):
        similarity = train @ query / (np.linalg.norm(train, axis=1) * np.linalg.norm(query))
        nearest = np.argsort(-similarity, kind="stable")[:31]
        votes = np.bincount(train_labels[nearest], np.exp(similarity[nearest] / 0.1), minlength=9)
        right += label in [c for c in np.argsort(-votes, kind="stable")[:5] if votes[c] > 0]
    assert found["top5"] == right / 99


def test_a_class_that_is_not_in_training_is_never_right():
    train, labels = blobs(50, 5, 3, seed=0)
    found = knn_scores(train, labels, train[:4], [7, 7, 3, 9], k=(1, 50))
    assert found == {1: {"top1": 0.0, "top5": 0.0}, 50: {"top1": 0.0, "top5": 0.0}}


def test_principal_directions_equal_scikit_learns():
    from sklearn.decomposition import PCA

    train, train_labels, test, test_labels = both_sets(d=40)
    model = PCA(8, svd_solver="full").fit(train.astype(np.float64))
    mean, directions = knn.principal_directions(torch.from_numpy(train), 8)
    ours = (torch.from_numpy(test) - mean) @ directions
    theirs = model.transform(test.astype(np.float64))
    np.testing.assert_allclose(np.abs(ours.numpy()), np.abs(theirs), atol=2e-4)
    projected = [model.transform(part.astype(np.float64)) for part in (train, test)]
    expected = weighted_knn(projected[0], train_labels, projected[1], test_labels, k=20)
    assert weighted_knn(train, train_labels, test, test_labels, k=20, pca=8) == pytest.approx(expected, abs=1 / 333)


@pytest.mark.parametrize(("n", "d"), [(31, 200), (33, 5), (2, 3)])
def test_more_directions_than_there_are_means_all(n, d):
    features = torch.from_numpy(np.random.default_rng(n).normal(size=(n, d)).astype(np.float32))
    _, directions = knn.principal_directions(features, 128)
    assert directions.shape == (d, min(n, d))
    np.testing.assert_allclose((directions.T @ directions).numpy(), np.eye(min(n, d)), atol=1e-5)


def test_raw_features_vote_by_their_inner_product():
    train = np.array([[1.0, 0.0], [0.0, 10.0]])
    assert weighted_knn(train, [0, 1], [[1.0, 0.5]], [0], k=1) == 1.0
    assert weighted_knn(train, [0, 1], [[1.0, 0.5]], [1], k=1, normalize=False) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": ()}, "expected a number of neighbours or several, found none"),
        ({"k": (5, 0)}, "k: expected at least 1 neighbour, found 0"),
        ({"pca": 0}, "pca: expected at least 1 direction, found 0"),
        ({"search": "annoy"}, "search: expected auto, exact or faiss, found 'annoy'"),
    ],
)
def test_scores_refuse_what_does_not_fit(options, message):
    with pytest.raises(OptionError, match=message):
        knn_scores(np.eye(3), [0, 1, 2], **options)
