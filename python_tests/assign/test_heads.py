"""`assign_heads`: the heads' own solves, whether the features are read for each or for all of them."""

import threading

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import FeatureLogits, assign_heads
from sela_ext.assign import UnbalancedLabelsWarning, heads, mapped
from sela_ext.errors import DataError, OptionError


def features_and_heads(rows=3001, dim=16, clusters=(20, 7, 65), seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, dim))
    features = (centres[rng.integers(40, size=rows)] + 0.3 * rng.standard_normal((rows, dim))).astype(np.float16)
    own = [(0.5 * rng.standard_normal((k, dim)), rng.standard_normal(k)) for k in clusters]
    return features, own


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "anderson"}, {"balance": "exact"}, {"storage": "fixed16"}, {"tol": 1e-6}, {"threads": 2}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_every_head_is_solved_as_if_alone(options, joint):
    features, own = features_and_heads()
    found = assign_heads(features, own, joint=joint, **options)
    for a, (weight, bias) in zip(found, own, strict=True):
        alone = sela_ext.assign(FeatureLogits(features, weight, bias), **options)
        assert a.converged
        assert np.array_equal(a.labels, alone.labels)
        assert np.array_equal(a.potential, alone.potential)
        assert a.passes == alone.passes


def test_each_head_has_its_marginals_and_start():
    features, own = features_and_heads(clusters=(4, 9))
    marginals = [None, np.arange(1, 10)]
    first = assign_heads(features, own, marginals=marginals, tol=1e-6)
    again = assign_heads(features, own, marginals=marginals, start=[first[0], None], joint=True)
    assert first[1].sizes[8] > 4 * first[1].sizes[0]
    assert again[0].passes < first[0].passes
    assert np.array_equal(again[1].labels, assign_heads(features, own, marginals=marginals)[1].labels)


def test_joint_reads_the_features_once_for_all_heads(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALLEST", 1)
    features, own = features_and_heads(rows=20_000)
    np.save(tmp_path / "features.npy", features)
    on_disk = np.load(tmp_path / "features.npy", mmap_mode="r")
    read, lock, original = [], threading.Lock(), FeatureLogits.rows_read

    def counting(self, first, last):
        with lock:
            read.append(last - first)
        return original(self, first, last)

    monkeypatch.setattr(FeatureLogits, "rows_read", counting)
    found = assign_heads(on_disk, own, joint=True, method="sinkhorn", max_passes=20)
    assert sum(read) / 20_000 <= max(a.passes for a in found) + 1
    assert sum(read) / 20_000 < 0.7 * sum(a.passes for a in found)


def test_features_that_memory_cannot_hold_are_read_jointly(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALLEST", 1)
    features, own = features_and_heads()
    np.save(tmp_path / "features.npy", features)
    on_disk = np.load(tmp_path / "features.npy", mmap_mode="r")
    meetings = []
    solve = heads._Meeting.solve
    monkeypatch.setattr(
        heads._Meeting, "solve", lambda self, *given: meetings.append(len(given[0])) or solve(self, *given)
    )
    free = 1 << 40
    monkeypatch.setattr(heads, "available_memory", lambda: free)
    assign_heads(on_disk, own)
    assert meetings == []
    free = features.nbytes - 1  # too little for two heads at once, and for the features
    assign_heads(on_disk, own)
    assert meetings == []
    monkeypatch.setattr(heads, "_heads_at_once", lambda *given: 2)
    found = assign_heads(on_disk, own)
    assert meetings == [2]
    assert [len(a.sizes) for a in found] == [20, 7, 65]


def test_an_error_of_one_head_is_raised_and_the_others_end():
    features, own = features_and_heads()
    before = threading.active_count()
    with pytest.raises(OptionError, match="marginals"):
        assign_heads(features, own, joint=True, marginals=[None, [1.0] * 6, None])
    assert threading.active_count() == before


def test_an_interrupt_ends_all_solves(monkeypatch):
    features, own = features_and_heads()
    before = threading.active_count()

    def interrupted(self, requests):
        raise KeyboardInterrupt

    monkeypatch.setattr(heads._Meeting, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assign_heads(features, own, joint=True)
    assert threading.active_count() == before


def test_warnings_of_joint_solves_come_out():
    features = torch.zeros(500, 4)
    with pytest.warns(UnbalancedLabelsWarning):
        assign_heads(
            torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * 1e-3 + features,
            [np.eye(4, dtype=np.float32), (np.eye(4), [0.0, 0, 0, 90.0])],
            joint=True,
            max_passes=1,
            method="sinkhorn",
        )


def test_what_does_not_fit_is_refused():
    features, own = features_and_heads(rows=100)
    with pytest.raises(OptionError, match="heads: expected at least one"):
        assign_heads(features, [])
    with pytest.raises(OptionError, match="start: expected 3, one for each head, found 1"):
        assign_heads(features, own, start=[None])
    with pytest.raises(OptionError, match="weight: expected shape"):
        assign_heads(features, [own[0], np.zeros((3, 5))])
    with pytest.raises(DataError, match="features: expected"):
        assign_heads(features[0], own)


def test_over_ranks_heads_go_one_by_one():
    features, own = features_and_heads()
    with pytest.raises(OptionError, match="joint: expected False or None with group=, found True"):
        assign_heads(features, own, joint=True, group=True)
