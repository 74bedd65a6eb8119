import math

import numpy as np
import pytest

from sela_ext.report.confusion import confusion, make_truth


@pytest.mark.parametrize(("n", "clusters", "classes"), [(1, 1, 1), (33, 4, 3), (1001, 31, 60), (5000, 100, 2)])
def test_purity_entropy_and_main_classes_are_those_of_the_counts(n, clusters, classes):
    rng = np.random.default_rng(n)
    labels = rng.integers(-1, clusters, size=n).astype(np.int32)
    labels[0] = 0
    given = rng.integers(-1, classes, size=n).astype(np.int32)
    given[0] = 0
    truth = make_truth(given, None)
    found = confusion(labels, clusters, truth)
    for k in range(clusters):
        inside = truth.labels[(labels == k) & (truth.labels >= 0)]
        if not inside.size:
            assert math.isnan(found.purity[k])
            assert found.main[k] == []
            continue
        counts = np.bincount(inside)
        share = counts[counts > 0] / inside.size
        assert found.purity[k] == pytest.approx(share.max())
        assert found.entropy[k] == pytest.approx(-(share * np.log(share)).sum(), abs=1e-12)
        assert found.main[k][0] == (int(counts.argmax()), pytest.approx(share.max()))
    assert len(found.rows) == min(30, found.classes)
    assert len(found.columns) <= 40
    for name, size, cells in found.rows:
        number = truth.names.index(name)
        assert size == ((truth.labels == number) & (labels >= 0)).sum()
        for k, cell in zip(found.columns, cells, strict=True):
            assert cell.count == ((truth.labels == number) & (labels == k)).sum()
            assert (cell.shade == 0) == (cell.count == 0)
            assert cell.shade <= 10
    for row in found.listed:
        of_class = labels[(truth.labels == row.number) & (labels >= 0)]
        assert row.size == of_class.size
        assert row.clusters[0][1] == pytest.approx(np.bincount(of_class).max() / of_class.size)


def test_classes_have_their_names_whatever_their_numbers():
    truth = make_truth(np.array([7, -1, 2_000_000_000, 7], np.int32), np.array(["zero"]))
    assert truth.labels.tolist() == [0, -1, 1, 0]
    assert truth.names == ["class 7", "class 2000000000"]
    truth = make_truth(np.array([1, 0, 0], np.int32), np.array(["a", "b", "unused"]))
    assert [truth.name(int(label)) for label in truth.labels] == ["b", "a", "a"]


def test_no_known_class_is_no_truth():
    assert make_truth(None, None) is None
    assert make_truth(np.full(3, -1, np.int32), None) is None
    assert make_truth(np.arange(3000, dtype=np.int32), None) is None  # every image a class of its own
