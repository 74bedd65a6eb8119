import itertools
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from sela_ext.errors import DataError, OptionError
from sela_ext.evaluation import cluster_metrics, cluster_table, label_change, label_statistics, mutual_information


def brute_force_accuracy(classes, labels, n_classes, n_clusters):
    """Best one-to-one matching by trying every one."""
    size = max(n_classes, n_clusters)
    best = 0
    for assignment in itertools.permutations(range(size)):
        best = max(best, int(np.sum(np.asarray(assignment)[labels] == classes)))
    return best / len(classes)


def mutual_information_by_loops(classes, labels):
    n = len(classes)
    total = 0.0
    for c in set(classes.tolist()):
        for k in set(labels.tolist()):
            joint = np.mean((classes == c) & (labels == k))
            if joint > 0:
                total += joint * math.log(joint / (np.mean(classes == c) * np.mean(labels == k)))
    assert n
    return total


def entropy_by_loops(labels):
    return -sum(p * math.log(p) for p in (np.mean(labels == k) for k in set(labels.tolist())))


@pytest.mark.parametrize("n", [1, 2, 31, 33, 1001])
@pytest.mark.parametrize(("n_classes", "n_clusters"), [(3, 3), (2, 6), (6, 2), (5, 4)])
def test_accuracy_equals_the_best_of_all_matchings(n, n_classes, n_clusters):
    rng = np.random.default_rng(n * 100 + n_classes * 10 + n_clusters)
    classes = rng.integers(n_classes, size=n)
    labels = np.where(rng.random(n) < 0.5, classes % n_clusters, rng.integers(n_clusters, size=n))
    found = cluster_metrics(classes, labels, n_clusters)
    assert found["accuracy"] == brute_force_accuracy(classes, labels, n_classes, n_clusters)


@pytest.mark.parametrize("n", [31, 33, 1001])
def test_information_scores_equal_their_definitions(n):
    rng = np.random.default_rng(n)
    classes = rng.integers(5, size=n)
    labels = np.where(rng.random(n) < 0.6, (classes * 3) % 7, rng.integers(7, size=n))
    found = cluster_metrics(classes, labels)
    mi = mutual_information_by_loops(classes, labels)
    h_classes, h_labels = entropy_by_loops(classes), entropy_by_loops(labels)
    assert found["nmi"] == pytest.approx(mi / ((h_classes + h_labels) / 2), abs=1e-12)
    assert found["class_entropy"] == pytest.approx(h_classes - mi, abs=1e-12)
    assert found["ami"] == pytest.approx(sk.adjusted_mutual_info_score(classes, labels), abs=1e-12)
    purity = sum(np.bincount(classes[labels == k]).max() for k in np.unique(labels)) / n
    assert found["purity"] == pytest.approx(purity, abs=1e-12)


def test_rand_index_equals_a_count_over_all_pairs():
    rng = np.random.default_rng(5)
    classes, labels = rng.integers(3, size=61), rng.integers(4, size=61)
    pairs = list(itertools.combinations(range(61), 2))
    same_class = np.array([classes[i] == classes[j] for i, j in pairs])
    same_label = np.array([labels[i] == labels[j] for i, j in pairs])
    expected = same_class.sum() * same_label.sum() / len(pairs)
    most = (same_class.sum() + same_label.sum()) / 2
    ari = ((same_class & same_label).sum() - expected) / (most - expected)
    assert cluster_metrics(classes, labels)["ari"] == pytest.approx(ari, abs=1e-12)


def test_renaming_clusters_changes_nothing():
    rng = np.random.default_rng(0)
    classes, labels = rng.integers(4, size=200), rng.integers(9, size=200)
    renamed = rng.permutation(9)[labels]
    assert cluster_metrics(classes, labels) == pytest.approx(cluster_metrics(classes, renamed), abs=1e-12)


def test_images_without_a_label_on_either_side_are_left_out():
    rng = np.random.default_rng(1)
    classes, labels = rng.integers(4, size=120), rng.integers(6, size=120)
    with_gaps = np.concatenate([classes, [-1, 2, -1]])
    with_skips = np.concatenate([labels, [0, -1, -1]])
    assert cluster_metrics(with_gaps, with_skips) == cluster_metrics(classes, labels)


def test_torch_and_numpy_give_the_same():
    rng = np.random.default_rng(2)
    classes, labels = rng.integers(4, size=99), rng.integers(6, size=99)
    assert cluster_metrics(torch.tensor(classes), torch.tensor(labels, dtype=torch.int32)) == cluster_metrics(
        classes, labels
    )


def test_a_single_cluster_scores_nothing_but_its_majority():
    found = cluster_metrics([0, 0, 0, 1], [5, 5, 5, 5], clusters=6)
    assert found == pytest.approx(
        {
            "nmi": 0.0,
            "ami": 0.0,
            "ari": 0.0,
            "accuracy": 0.75,
            "majority_accuracy": 0.75,
            "purity": 0.75,
            "class_entropy": -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
        },
        abs=1e-12,
    )


def test_one_cluster_per_image_is_pure_but_not_accurate():
    found = cluster_metrics(np.repeat([0, 1], 5), np.arange(10))
    assert found["purity"] == 1.0
    assert found["accuracy"] == pytest.approx(0.2)
    assert found["ari"] == 0.0


@pytest.mark.parametrize(
    ("classes", "labels", "clusters", "error", "message"),
    [
        ([0, 1], [0], None, DataError, "expected 2 labels, one per true label, found 1"),
        ([0, 1], [0, 7], 7, DataError, "below clusters = 7, found 7"),
        ([0, 1], [0, 1], 0, OptionError, "expected at least 1, found 0"),
        ([0, -1], [-1, 1], None, DataError, "found none in 2"),
        ([], [], None, DataError, "found none in 0"),
        ([[0, 1]], [[0, 1]], None, DataError, r"shape \[N\], found shape \[1, 2\]"),
        ([0.5, 1.0], [0, 1], None, DataError, "expected integers, found float64"),
        ([0, -2], [0, 1], None, DataError, "or -1 for none, found -2"),
    ],
)
def test_metrics_refuse_what_does_not_fit(classes, labels, clusters, error, message):
    with pytest.raises(error, match=message):
        cluster_metrics(classes, labels, clusters)


@pytest.mark.parametrize("clusters", [1, 2, 31, 1001])
def test_an_even_split_has_full_entropy(clusters):
    found = label_statistics(np.arange(clusters * 3) % clusters, clusters)
    assert found["entropy_ratio"] == pytest.approx(1.0)
    assert (found["used"], found["size_min"], found["size_max"]) == (clusters, 3, 3)


def test_statistics_count_empty_clusters_and_leave_out_skipped_images():
    found = label_statistics([0, 0, 0, 2, -1, -1], clusters=4)
    assert (found["used"], found["size_min"], found["size_max"]) == (2, 0, 3)
    assert found["entropy_ratio"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))


def test_all_in_one_of_several_clusters_has_no_entropy():
    assert label_statistics([1] * 33, clusters=5)["entropy_ratio"] == 0.0


def test_no_labelled_image_uses_no_cluster():
    found = label_statistics([-1, -1], clusters=3)
    assert found == {"used": 0, "size_min": 0, "size_max": 0, "entropy_ratio": 0.0}


def test_statistics_refuse_labels_beyond_the_clusters():
    with pytest.raises(DataError, match="below clusters = 3, found 3"):
        label_statistics([0, 3], clusters=3)


def test_change_is_the_share_of_labels_that_moved():
    assert label_change([0, 1, 2, 3], [0, 1, 3, 2]) == 0.5
    assert label_change(torch.tensor([0, 1]), np.array([0, 1])) == 0.0


def test_change_ignores_images_that_lack_a_label_in_either_set():
    assert label_change([0, -1, 2, -1], [1, 1, -1, -1]) == 1.0
    assert label_change([-1, 0], [0, -1]) == 0.0
    assert label_change([], []) == 0.0


def test_change_refuses_sets_of_different_length():
    with pytest.raises(DataError, match="expected 2 labels, as many as before, found 3"):
        label_change([0, 1], [0, 1, 2])


def test_every_cluster_is_described_by_its_classes():
    rng = np.random.default_rng(6)
    classes, labels = rng.integers(3, 8, size=301), rng.integers(9, size=301)
    labels[labels == 4] = 5  # an empty one
    found = cluster_table(np.r_[classes, -1, 3], np.r_[labels, 0, -1], 9)
    for k in range(9):
        inside = classes[labels == k]
        assert found["size"][k] == inside.size
        if inside.size == 0:
            assert found["majority"][k] == -1
            assert np.isnan([found["purity"][k], found["entropy"][k]]).all()
            continue
        counts = np.bincount(inside)
        assert found["majority"][k] == counts.argmax()
        assert found["purity"][k] == counts.max() / inside.size
        share = counts[counts > 0] / inside.size
        assert found["entropy"][k] == pytest.approx(-(share * np.log(share)).sum(), abs=1e-12)
    totals = cluster_metrics(classes, labels)
    weights = found["size"] / 301
    assert np.nansum(weights * found["entropy"]) == pytest.approx(totals["class_entropy"], abs=1e-12)
    assert np.nansum(weights * found["purity"]) == pytest.approx(totals["purity"], abs=1e-12)


def test_with_more_clusters_than_classes_each_may_stand_for_its_majority():
    classes = np.repeat([0, 1, 2], 40)
    labels = classes * 4 + np.arange(120) % 4  # four pure clusters for each class
    found = cluster_metrics(classes, labels, 12)
    assert found["accuracy"] == 0.25  # one to one: three clusters of ten images count
    assert found["majority_accuracy"] == found["purity"] == 1.0


def test_scores_equal_those_of_scipy_and_scikit_learn_at_three_thousand_clusters():
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    rng = np.random.default_rng(8)
    classes, labels = rng.integers(100, size=20_001), rng.integers(3000, size=20_001)
    labels[:10_000] = classes[:10_000] * 30 + labels[:10_000] % 30
    found = cluster_metrics(classes, labels, 3000)
    table = contingency_matrix(classes, labels)
    rows, columns = linear_sum_assignment(-table)
    assert found["accuracy"] == table[rows, columns].sum() / 20_001
    assert found["nmi"] == pytest.approx(sk.normalized_mutual_info_score(classes, labels), abs=1e-12)
    assert found["ari"] == pytest.approx(sk.adjusted_rand_score(classes, labels), abs=1e-12)


def test_labels_of_two_passes_are_compared_symmetrically():
    rng = np.random.default_rng(9)
    old, new = rng.integers(5, size=99), rng.integers(7, size=99)
    new[::9] = -1
    both = new >= 0
    expected = sk.normalized_mutual_info_score(old[both], new[both])
    assert mutual_information(old, new) == pytest.approx(expected, abs=1e-12)
    assert mutual_information(new, old) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("largest", [3, 5_000_000])
def test_information_is_that_of_scikit_learn_for_small_and_large_label_numbers(largest):
    rng = np.random.default_rng(10)
    one = rng.integers(3, size=1001)
    other = np.where(rng.random(1001) < 0.5, one, rng.integers(4, size=1001)) * (largest // 3)
    expected = sk.normalized_mutual_info_score(one, other)
    assert mutual_information(one, other) == pytest.approx(expected, abs=1e-12)


def test_information_of_one_cluster_and_of_independent_labels():
    assert mutual_information([4, 4, 4], [7, 7, 7]) == 1.0
    assert mutual_information([4, 4, 4], [0, 1, 2]) == 0.0
    assert mutual_information([0, 0, 1, 1], [0, 1, 0, 1]) == 0.0
    assert mutual_information([-1, -1], [0, 1]) == 0.0
