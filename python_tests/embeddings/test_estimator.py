import pickle

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.utils.estimator_checks import parametrize_with_checks

from sela_ext import SelfLabelling
from sela_ext.evaluation import cluster_metrics


@parametrize_with_checks([SelfLabelling(n_clusters=3, n_heads=2, epochs=5)])
def test_scikit_learns_checks_pass(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def blobs():
    return make_blobs(600, centers=4, n_features=8, cluster_std=1.0, random_state=3)


def fast(clusters, **options):
    return SelfLabelling(clusters, **{"n_heads": 2, "epochs": 5, "random_state": 0, "n_threads": 1, **options})


def test_clear_clusters_are_found(blobs):
    X, y = blobs
    model = fast(4).fit(X)
    assert cluster_metrics(y, model.labels_)["accuracy"] > 0.99
    assert model.stability_[4] > 0.95


def test_predicting_the_training_rows_gives_their_labels(blobs):
    X, _ = blobs
    model = fast(7, hidden_dim=32).fit(X)
    assert np.array_equal(model.predict(X), model.labels_)
    assert np.array_equal(model.fit_predict(X), model.labels_)


def test_the_same_seed_gives_the_same_bits(blobs):
    X, _ = blobs
    one, two, other = (fast(5, hidden_dim=16, random_state=seed).fit(X) for seed in (1, 1, 2))
    assert np.array_equal(one.head_labels_, two.head_labels_)
    assert np.array_equal(one.predict_proba(X), two.predict_proba(X))
    assert not np.array_equal(one.predict_proba(X), other.predict_proba(X))


def test_exact_balance_gives_sizes_that_differ_by_at_most_one(blobs):
    sizes = fast(7, balance="exact").fit(blobs[0]).cluster_sizes_
    assert sizes.sum() == 600
    assert sizes.max() - sizes.min() <= 1


def test_marginals_set_the_sizes(blobs):
    shares = np.array([0.5, 0.3, 0.2])
    sizes = fast(3, marginals=shares, balance="exact").fit(blobs[0]).cluster_sizes_
    assert np.abs(sizes - 600 * shares).max() <= 1


def test_of_several_numbers_of_clusters_the_one_is_chosen_whose_heads_agree(blobs):
    X, y = blobs
    model = fast([3, 4, 9], n_heads=3).fit(X)
    assert model.n_clusters_ == 4 == max(model.stability_, key=model.stability_.get)
    assert model.head_clusters_ == [3] * 3 + [4] * 3 + [9] * 3
    assert model.labels_.max() == 3
    assert cluster_metrics(y, model.labels_)["accuracy"] > 0.99


def test_one_cluster_takes_all(blobs):
    assert not fast(1).fit(blobs[0]).labels_.any()


def test_equal_rows_are_divided_without_an_error():
    labels = fast(3).fit(np.ones((30, 4))).labels_
    assert labels.shape == (30,)
    assert labels.min() >= 0


def test_a_pickled_estimator_predicts_the_same(blobs):
    X, _ = blobs
    model = fast(4, hidden_dim=8).fit(X)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))


def test_the_score_is_the_log_probability_of_the_labels(blobs):
    X, _ = blobs
    model = fast(4).fit(X)
    probability = model.predict_proba(X)[np.arange(len(X)), model.predict(X)]
    assert model.score(X) == pytest.approx(np.log(probability).mean(), abs=1e-4)
    assert -np.log(4) < model.score(X) <= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters: expected an integer >= 1, found 0"),
        ({"n_clusters": [3, 3]}, "several different ones"),
        ({"n_clusters": 601}, "n_samples=600 should be >= n_clusters=601"),
        ({"n_heads": 0}, "n_heads"),
        ({"head_kind": "square"}, "expected one of cosine, linear, found 'square'"),
        ({"temperature": 0}, "temperature: expected a finite number > 0"),
        ({"feature_dropout": 1.0}, ">= 0 and < 1"),
        ({"noise": float("nan")}, "noise"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"epochs": 1.5}, "epochs"),
        ({"n_clusters": [2, 3], "marginals": [0.5, 0.5]}, "marginals: expected None"),
        ({"n_threads": 0}, "n_threads"),
    ],
)
def test_a_parameter_out_of_range_is_named(blobs, options, message):
    with pytest.raises(ValueError, match=message):
        SelfLabelling(**options).fit(blobs[0])


def test_a_learning_rate_far_too_large_is_an_error_with_a_remedy(blobs):
    from sela_ext.errors import NumericsError

    with pytest.raises(NumericsError, match="smaller learning_rate"):
        fast(4, head_kind="linear", learning_rate=1e38, hidden_dim=8).fit(blobs[0])


@pytest.mark.slow
def test_digits_are_told_apart_better_than_by_k_means():
    X, y = load_digits(return_X_y=True)
    model = SelfLabelling(10, hidden_dim=256, random_state=0).fit(X)
    by_means = KMeans(10, n_init=4, random_state=0).fit_predict(X)
    ours, theirs = (cluster_metrics(y, labels) for labels in (model.labels_, by_means))
    assert ours["nmi"] > theirs["nmi"]
    assert ours["accuracy"] > theirs["accuracy"]
