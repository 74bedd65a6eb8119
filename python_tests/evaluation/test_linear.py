import logging

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sela_ext.errors import DataError, NumericsError
from sela_ext.evaluation import linear, linear_probe, linear_scores


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].astype(np.float32), labels[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


@pytest.fixture
def large_form(monkeypatch):
    monkeypatch.setattr(linear, "_SMALL_ROWS", 0)
    monkeypatch.setattr(linear, "_BLOCK_ROWS", 500)


def test_digits_pixels_score_as_scikit_learn_does(digits):
    train, train_labels, test, test_labels = digits
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    expected = pipeline.fit(train.astype(np.float64), train_labels).score(test.astype(np.float64), test_labels)
    found = linear_probe(train, train_labels, test, test_labels)
    assert found == pytest.approx(expected, abs=1.5 / 360)
    assert found > 0.94


@pytest.mark.usefixtures("large_form")
def test_the_large_form_scores_as_scikit_learn_does(digits):
    train, train_labels, test, test_labels = digits
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    expected = pipeline.fit(train.astype(np.float64), train_labels).score(test.astype(np.float64), test_labels)
    assert linear_probe(train, train_labels, test, test_labels) == pytest.approx(expected, abs=1.5 / 360)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_both_forms_find_the_same_weights(classes):
    rng = np.random.default_rng(classes)
    features = torch.from_numpy(rng.normal(size=(301, 5)).astype(np.float32))
    target = (features[:, 0].numpy() * classes / 2 + rng.normal(size=301)).round().astype(np.int64) % classes
    target[:classes] = np.arange(classes)
    small, small_bias = linear._fit_small(features, target, classes, 0)
    large, large_bias = linear._fit_large(features, target, classes, 0)
    # Probabilities do not change when all classes get the same amount, so weights are compared about their mean.
    for one, other in ((small, large), (small_bias, large_bias)):
        np.testing.assert_allclose(one - one.mean(-1, keepdims=True), other - other.mean(-1, keepdims=True), atol=5e-3)


@pytest.mark.parametrize("columns", [32, 1001])
def test_correlated_features_are_fitted_within_the_limit(monkeypatch, caplog, columns):
    rng = np.random.default_rng(5)
    spread = np.diag(0.5 ** np.arange(32)) @ np.linalg.qr(rng.normal(size=(32, 32)))[0]
    features = rng.normal(size=(2003, 32)) @ spread
    target = np.argmax(features @ np.linalg.pinv(spread)[:, :5] + rng.normal(size=(2003, 5)), axis=1)
    features = np.concatenate([features, np.zeros((2003, columns - 32))], axis=1)
    train = torch.from_numpy(((features - features.mean(0)) / (features.std(0) + 1e-30)).astype(np.float32))
    monkeypatch.setattr(linear, "_ITERATIONS", 60)
    with caplog.at_level(logging.WARNING):
        weight, bias = linear._fit_large(train, target, 5, 0)
    assert not caplog.records
    # Convergence is judged by the objective itself, in float64.
    x = train.double().numpy()
    logits = x @ weight + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(p)), target] -= 1
    gradient = (x.T @ p + weight) / len(x)
    assert np.abs(gradient).max() < 1e-3
    monkeypatch.setattr(linear, "_PRECONDITIONED", 0)
    with caplog.at_level(logging.WARNING):
        linear._fit_large(train, target, 5, 0)
    assert "stopped at its limit" in caplog.text


def test_the_result_does_not_depend_on_the_seed(digits):
    train, train_labels, test, test_labels = digits
    scores = {linear_probe(train[:333], train_labels[:333], test, test_labels, seed=seed) for seed in (0, 1)}
    assert len(scores) == 1


def test_features_on_wild_scales_and_constant_ones_do_no_harm(digits):
    train, train_labels, test, test_labels = digits
    scale = np.logspace(-12, 12, 64, dtype=np.float32)
    wild = linear_probe(train * scale, train_labels, test * scale, test_labels)
    assert wild == pytest.approx(linear_probe(train, train_labels, test, test_labels), abs=1.5 / 360)


def test_images_without_a_label_are_left_out(digits):
    train, train_labels, test, test_labels = digits
    train_labels, test_labels = train_labels[:401].copy(), test_labels.copy()
    train_labels[::4] = -1
    test_labels[::7] = -1
    keep, keep_test = train_labels >= 0, test_labels >= 0
    assert linear_probe(train[:401], train_labels, test, test_labels) == linear_probe(
        train[:401][keep], train_labels[keep], test[keep_test], test_labels[keep_test]
    )


def test_two_classes_with_distant_numbers_are_told_apart():
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(333) < 0.5, 3, 1000)
    features = torch.from_numpy(rng.normal(size=(333, 4)) + 4 * (labels == 3)[:, None])
    assert linear_probe(features[:200], labels[:200], features[200:], labels[200:]) > 0.98


def test_a_single_training_class_is_always_the_answer():
    assert linear_probe([[1.0], [2.0]], [4, 4], [[1.0], [2.0], [3.0]], [4, 4, 5]) == pytest.approx(2 / 3)


def test_classes_seen_only_in_the_test_count_as_wrong(digits):
    train, train_labels, test, test_labels = digits
    low = train_labels < 5
    assert linear_probe(train[low], train_labels[low], test, test_labels) <= np.mean(test_labels < 5)


@pytest.mark.parametrize("form", ["_SMALL_ROWS", None])
def test_stopping_at_the_limit_is_logged_and_scored(digits, monkeypatch, caplog, form):
    monkeypatch.setattr(linear, "_ITERATIONS", 2)
    if form:
        monkeypatch.setattr(linear, form, 0)
    train, train_labels, test, test_labels = digits
    with caplog.at_level(logging.WARNING):
        score = linear_probe(train, train_labels, test, test_labels)
    assert 0.5 < score < 1
    assert "stopped at its limit of 2 iterations" in caplog.text


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, [[1.0], [np.nan]], NumericsError, "train_features: .* first in row 1"),
        (0, [1.0, 2.0], DataError, r"shape \[N, D\]"),
        (1, [0], DataError, "found 2 rows, 1 labels"),
        (1, [-1, -1], DataError, "found none in 2"),
        (2, [[1.0, 2.0]], DataError, "expected 1 columns as in training, found 2"),
        (3, [0, 1], DataError, "found 1 rows, 2 labels"),
    ],
)
def test_what_does_not_fit_is_refused(position, value, error, message):
    arguments = [[[0.0], [1.0]], [0, 1], [[0.5]], [0]]
    arguments[position] = value
    with pytest.raises(error, match=message):
        linear_probe(*arguments)


def test_top5_is_the_share_of_images_whose_class_is_among_the_five_highest():
    rng = np.random.default_rng(4)
    scores = torch.from_numpy(rng.integers(4, size=(301, 9)).astype(np.float32))  # many equal ones
    numbers = np.arange(9) * 3
    expected = rng.choice(np.r_[numbers, 1], size=301)
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")
    found = linear.topk_accuracy(scores, numbers, expected)
    assert found["top1"] == np.mean(numbers[order[:, 0]] == expected)
    assert found["top5"] == np.mean((numbers[order[:, :5]] == expected[:, None]).any(axis=1))


def test_top5_of_pixels_is_at_least_top1(digits):
    found = linear_scores(*digits)
    assert found["top1"] == linear_probe(*digits)
    assert found["top1"] < found["top5"] <= 1.0
