import json

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

import sela_ext
from sela_ext.errors import DataError
from sela_ext.evaluation import agreement, stability


def random_labels(count, clusters, seed):
    return np.random.default_rng(seed).integers(0, clusters, count)


@pytest.mark.parametrize("count", [2, 31, 1001])
def test_the_same_partition_under_other_numbers_agrees_wholly(count):
    labels = np.arange(count) % 7
    assert agreement([labels, 6 - labels, labels]) == pytest.approx(1.0)


def test_agreement_is_the_mean_over_pairs():
    one = random_labels(400, 5, 0)
    two = np.where(np.arange(400) % 2, one, random_labels(400, 5, 1))
    three = random_labels(400, 5, 2)
    pairs = [(one, two), (one, three), (two, three)]
    wanted = np.mean([adjusted_mutual_info_score(*pair) for pair in pairs])
    assert agreement([one, two, three]) == pytest.approx(wanted)


def test_labels_by_chance_agree_to_nothing_whatever_the_number_of_clusters():
    for clusters in (2, 50):
        assert abs(agreement([random_labels(1001, clusters, seed) for seed in range(4)])) < 0.02


def test_images_without_a_label_are_left_out():
    one = np.array([0, 0, 1, 1, -1, 0])
    two = np.array([1, 1, 0, 0, 0, -1])
    assert agreement([one, two]) == pytest.approx(1.0)
    with pytest.raises(DataError, match="found none"):
        agreement([[0, -1], [-1, 0]])


def test_single_clusters_agree():
    assert agreement(np.zeros((3, 10), int)) == 1.0


def test_many_images_and_pairs_are_sampled_to_nearly_the_same():
    one = random_labels(60_001, 10, 0)
    rows = [np.where(random_labels(60_001, 2, 10 + i), one, random_labels(60_001, 10, 20 + i)) for i in range(7)]
    whole = np.mean([adjusted_mutual_info_score(rows[i], rows[j]) for i in range(7) for j in range(i)])
    assert agreement(rows) == pytest.approx(whole, abs=0.01)


def test_heads_are_compared_with_those_of_their_own_number_of_clusters():
    labels = [[0, 0, 1, 1], [0, 1, 2, 3], [1, 1, 0, 0], [0, 1, 0, 1], [3, 2, 1, 0]]
    found = stability(labels, [2, 4, 2, 3, 4])
    assert list(found) == [2, 4]
    assert found == {2: pytest.approx(1.0), 4: pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("labels", "clusters", "match"),
    [
        ([[0, 1]], None, "two labellings or more"),
        (np.zeros(3, int), None, "two labellings or more"),
        (np.zeros((2, 3)), None, "found float64"),
        ([[0, 1], [1, 0]], [2], "one number per head, 2, found 1"),
    ],
)
def test_malformed_labels_are_refused(labels, clusters, match):
    with pytest.raises(DataError, match=match):
        agreement(labels) if clusters is None else stability(labels, clusters)


def test_a_run_on_images_says_how_far_its_heads_agree(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (90, 16, 16), dtype=np.uint8)
    result = sela_ext.train(
        images, out=tmp_path / "run", clusters=[3, 3, 5], epochs=1, batch_size=32, threads=1, progress=False
    )
    assert list(result.stability) == [3]
    assert result.stability[3] == pytest.approx(agreement(result.labels[:2]))
    event = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert event["stability_by_clusters"] == {"3": result.stability[3]}
    assert ("stability" in event) == (result.head < 2)
