import numpy as np
import pytest

from sela_ext.report import sample
from sela_ext.report.sample import choose, spread_ranks


@pytest.mark.parametrize("count", [0, 1, 31, 33, 1001])
@pytest.mark.parametrize("most", [1, 2, 7, 96])
def test_ranks_are_different_and_reach_from_first_to_last(count, most):
    ranks = spread_ranks(count, most)
    assert len(set(ranks.tolist())) == len(ranks) == min(count, most)
    assert (np.diff(ranks) > 0).all()
    if count and most > 1:
        assert (ranks[0], ranks[-1]) == (0, count - 1)
    half = -(-min(count, most) // 2)
    assert ranks[:half].tolist() == list(range(half))


@pytest.mark.parametrize("n", [1, 31, 1001])
def test_the_most_confident_images_come_first(n):
    rng = np.random.default_rng(n)
    labels = rng.integers(-1, 5, size=n).astype(np.int32)
    confidence = rng.integers(0, 9, size=n).astype(np.float32) / 8
    found = choose(labels, confidence, 5)
    assert set(found.clusters.tolist()) == set(labels[labels >= 0].tolist())
    for k, members in zip(found.clusters, found.members, strict=True):
        everyone = np.flatnonzero(labels == k)
        ranked = sorted(everyone.tolist(), key=lambda i: (-confidence[i], i))
        assert members.tolist() == [ranked[i] for i in spread_ranks(len(ranked), 96)]
        assert found.sizes[k] == everyone.size
        assert found.confidence[k] == pytest.approx(confidence[everyone].mean())
    means = found.confidence[found.clusters].tolist()
    assert means == sorted(means, reverse=True)
    assert sorted(found.order) == sorted(int(i) for members in found.members for i in members)


def test_every_clusters_first_image_comes_before_any_second_one():
    labels = np.arange(90, dtype=np.int32) % 7
    found = choose(labels, np.ones(90, np.float32), 7)
    assert len(set(labels[found.order[:7]])) == 7


def test_images_that_are_asked_for_are_among_those_of_their_cluster():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=5000).astype(np.int32)
    confidence = rng.random(5000, dtype=np.float32)
    also = np.arange(0, 5000, 50)
    found = choose(labels, confidence, 3, also)
    assert set(also.tolist()) <= set(found.order)
    for members in found.members:
        assert (np.diff(confidence[members]) <= 0).all()


def test_of_many_clusters_clear_and_muddled_ones_are_shown(monkeypatch):
    monkeypatch.setattr(sample, "MOST_CLUSTERS", 40)
    labels = np.arange(1003, dtype=np.int32).repeat(2)
    confidence = (labels / 1003).astype(np.float32)
    found = choose(labels, confidence, 1010)
    assert len(set(found.clusters.tolist())) == 40
    assert (found.clusters[0], found.clusters[-1]) == (1002, 0)
    assert found.left_out == 963


def test_the_number_of_images_is_bounded_and_used():
    labels = np.arange(200_000, dtype=np.int32) % 900
    found = choose(labels, np.ones(200_000, np.float32), 900, np.arange(0, 200_000, 250))
    assert 3600 < len(found.order) <= 7000


def test_unknown_confidence_is_no_error():
    found = choose(np.array([1, 0, 1], np.int32), np.full(3, np.nan, np.float32), 2)
    assert found.clusters.tolist() == [0, 1]
    assert np.isnan(found.confidence).all()


def test_no_labelled_image_makes_an_empty_sample():
    found = choose(np.full(3, -1, np.int32), np.zeros(3, np.float32), 4)
    assert (found.members, found.order, found.left_out) == ([], [], 0)
