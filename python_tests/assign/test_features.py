"""`FeatureLogits`: logits that are computed tile by tile give what the stored ones give, bit by bit."""

import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import sela_ext
from sela_ext import FeatureLogits
from sela_ext.assign import features as module
from sela_ext.assign import mapped
from sela_ext.assign.problem import Problem
from sela_ext.assign.sources import best_columns, logits_pass
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import find_candidates, sinkhorn_pass

LAM = 25.0


def clustered(rows, cols, dim=16, seed=0, sharpness=2.0, classes=30):
    """Features around class centres, and a head on them: peaked logits."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, dim))
    features = centres[rng.integers(classes, size=rows)] + 0.3 * rng.standard_normal((rows, dim))
    weight = sharpness * rng.standard_normal((cols, dim)) / np.sqrt(dim)
    return features.astype(np.float32), weight.astype(np.float32), rng.standard_normal(cols).astype(np.float32)


def computed(logits, monkeypatch):
    """Row numbers of the products, counted from now on: a list that grows."""
    rows, lock, product = [], threading.Lock(), FeatureLogits._product

    def counting(self, block, out, weight, bias):
        with lock:
            rows.append((len(block), len(weight)))
        product(self, block, out, weight, bias)

    monkeypatch.setattr(FeatureLogits, "_product", counting)
    return rows


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols", "dim"), [(1, 1, 1), (31, 33, 7), (257, 10, 33), (1001, 100, 64)])
def test_logits_are_those_of_a_linear_layer(rows, cols, dim, dtype, normalize):
    rng = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, dim, generator=rng).to(dtype)
    weight, bias = torch.randn(cols, dim, generator=rng), torch.randn(cols, generator=rng)
    logits = FeatureLogits(features, weight, bias, normalize=normalize)
    x = features.float()
    expected = F.linear(F.normalize(x) if normalize else x, weight, bias)
    assert logits.shape == (rows, cols)
    assert len(logits) == rows
    assert torch.allclose(logits[:], expected, atol=1e-4, rtol=1e-5)
    assert torch.allclose(FeatureLogits(features, weight)[:], F.linear(x, weight), atol=1e-4, rtol=1e-5)


def test_any_rows_and_columns_can_be_read():
    features, weight, bias = clustered(1001, 33)
    logits = FeatureLogits(features, weight, bias)
    whole = logits[:]
    assert isinstance(whole, np.ndarray)
    for part in (slice(0, 1), slice(100, 300), slice(999, None), slice(5, 5), slice(128, 256), slice(-3, None)):
        assert np.array_equal(logits[part], whole[part])
    rows = np.array([1000, 3, 3, 128])
    assert np.array_equal(logits[rows], whole[rows])
    assert np.allclose(logits[rows, np.array([32, 0])], whole[rows][:, [32, 0]], atol=1e-5)
    assert np.allclose(logits[200:300, [5]], whole[200:300, [5]], atol=1e-5)
    with pytest.raises(OptionError, match="a slice of step 1"):
        logits[::2]


@pytest.mark.parametrize("source", ["numpy", "float16", "strided", "backwards", "read-only", "torch"])
def test_features_of_any_kind_are_read_as_they_are(source):
    features, weight, bias = clustered(300, 10)
    kinds = {
        "numpy": features,
        "float16": features.astype(np.float16),
        "strided": np.repeat(features, 2, axis=0)[::2],
        "backwards": np.ascontiguousarray(features[::-1])[::-1],
        "read-only": np.broadcast_to(features[:1], features.shape),
        "torch": torch.from_numpy(features),
    }
    given = kinds[source]
    found = np.asarray(FeatureLogits(given, weight, bias)[:])
    assert np.allclose(found, np.asarray(given, np.float32) @ weight.T + bias, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "anderson"},
        {"method": "sinkhorn", "tol": 1e-3},
        {"method": "newton", "tol": 1e-6, "balance": "exact"},
        {"marginals": np.arange(1, 41), "row_weights": np.linspace(0, 2, 3001)},
        {"relax": 0.1},
        {"storage": "fixed16"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_solve_gives_what_stored_logits_give_and_the_same_bits_for_any_threads(options):
    logits = FeatureLogits(*clustered(3001, 40))
    stored = sela_ext.assign(logits[:], **options)
    first, *others = (sela_ext.assign(logits, threads=threads, **options) for threads in (1, 2, 3))
    for a in others:
        assert np.array_equal(a.labels, first.labels)
        assert np.array_equal(a.potential, first.potential)
        assert a.error == first.error
    assert first.converged
    assert first.passes == pytest.approx(stored.passes, rel=0.05)
    if first.passes % 1 == 0 and stored.passes % 1 == 0:  # no column was computed alone
        assert np.array_equal(first.potential, stored.potential)
    assert (first.labels == stored.labels).mean() > 0.998


@pytest.mark.parametrize("rows", [1, 31, 33, 129, 1001])
def test_awkward_sizes_give_the_bits_of_stored_logits(rows):
    logits = FeatureLogits(*clustered(rows, 5, seed=rows))
    a, stored = sela_ext.assign(logits, max_passes=50), sela_ext.assign(logits[:], max_passes=50)
    assert np.array_equal(a.labels, stored.labels)
    assert a.error == stored.error


def test_the_official_rule_works_on_computed_logits():
    logits = FeatureLogits(*clustered(500, 12, sharpness=0.2))
    a, stored = sela_ext.assign(logits, stop="official"), sela_ext.assign(logits[:], stop="official")
    assert a.converged
    assert np.array_equal(a.labels, stored.labels)


def test_threads_of_torch_change_no_bit_and_are_left_as_they_were():
    features, weight, bias = clustered(2000, 77, dim=512)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            logits = FeatureLogits(features, weight, bias)
            sums = logits_pass(logits, np.zeros(77), scale=LAM, threads=3, want_labels=True)
            found.append((sums.exact.tobytes(), sums.lse.tobytes(), logits[:].tobytes()))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_parts_of_the_rows_add_up_to_the_whole():
    features, weight, bias = clustered(1001, 20)
    g = np.linspace(-1, 1, 20)
    whole = logits_pass(FeatureLogits(features, weight, bias), g, scale=LAM)
    parts = [
        logits_pass(FeatureLogits(features[a:b], weight, bias), g, scale=LAM, first_row=a, rows_in_all=1001)
        for a, b in ((0, 384), (384, 640), (640, 1001))
    ]
    assert np.array_equal(sum(part.exact for part in parts), whole.exact)


def test_peaked_logits_are_computed_few_times(monkeypatch):
    logits = FeatureLogits(*clustered(20_001, 60, sharpness=4.0))
    rows = computed(logits, monkeypatch)
    a = sela_ext.assign(logits, tol=1e-6)
    assert a.converged
    assert a.method == "newton"
    assert a.passes <= 6
    of_all_columns = sum(n for n, cols in rows if cols == 60)
    assert of_all_columns <= a.passes * 20_001 * 1.02


@pytest.mark.parametrize("every", [2, 7, 1000])
def test_a_sample_computes_only_the_blocks_that_are_read(every, monkeypatch):
    logits = FeatureLogits(*clustered(10_001, 9))
    stored = logits[:]
    rows = computed(logits, monkeypatch)
    g = np.zeros(9)
    sums = logits_pass(logits, g, scale=LAM, every=every, keep=8.0, want_labels=True, first_row=256)
    expected = sinkhorn_pass(stored, g, scale=LAM, every=every, keep=8.0, want_labels=True, first_row=256)
    assert sum(n for n, _ in rows) == (~np.isnan(expected.lse)).sum() < 10_001
    assert np.array_equal(sums.exact, expected.exact)
    assert np.array_equal(sums.lse, expected.lse, equal_nan=True)
    assert np.array_equal(sums.labels, expected.labels)
    for name in ("offsets", "columns", "values"):
        assert np.array_equal(getattr(sums.candidates, name)(), getattr(expected.candidates, name)())


def test_too_many_candidates_are_noticed_over_all_tiles(monkeypatch):
    monkeypatch.setattr(module, "TILE_ENTRIES", 128 * 50)
    logits = FeatureLogits(*clustered(5000, 50, sharpness=0.01))
    for limit in (0, 1000, 5000 * 50 - 1):
        assert logits_pass(
            logits, np.zeros(50), scale=1.0, keep=20.0, keep_at_most=limit, threads=2
        ).candidates.overflow
    kept = logits_pass(logits, np.zeros(50), scale=1.0, keep=20.0, keep_at_most=5000 * 50, threads=2).candidates
    assert not kept.overflow
    assert kept.entries == 5000 * 50


def test_rows_of_nan_features_are_masked():
    features, weight, bias = clustered(400, 8)
    features[[0, 200, 399]] = np.array([np.nan, np.inf, -np.inf], np.float32)[:, None]
    a = sela_ext.assign(FeatureLogits(features, weight, bias))
    assert a.masked == 3
    assert np.array_equal(np.flatnonzero(a.labels == -1), [0, 200, 399])


def test_faint_columns_are_computed_alone(monkeypatch):
    features, weight, bias = clustered(700, 12, sharpness=0.2)
    bias[:] = 0.0
    bias[3] = -100.0
    logits = FeatureLogits(features, weight, bias)
    problem = Problem(logits, LAM, np.full(12, 1 / 12), None, 1, 10, 1e-4)
    rows = computed(logits, monkeypatch)
    at = problem.evaluate(np.zeros(12))
    assert {cols for _, cols in rows} == {12, 1}
    stored = Problem(logits[:], LAM, np.full(12, 1 / 12), None, 1, 10, 1e-4).evaluate(np.zeros(12))
    assert at.log_shares[3] < -1000
    assert np.allclose(at.log_shares, stored.log_shares, rtol=1e-6)
    assert sela_ext.assign(logits, tol=1e-5).converged


@pytest.mark.parametrize("selected", [None, [0, 127, 128, 999], []])
def test_the_search_for_columns_goes_tile_by_tile(selected, monkeypatch):
    monkeypatch.setattr(module, "TILE_ENTRIES", 128 * 20)
    logits = FeatureLogits(*clustered(1001, 20))
    prices = np.linspace(0, 1, 20)
    labels = (np.arange(1001) % 20).astype(np.int32)
    options = {"scale": LAM, "count": 3, "selected": None if selected is None else np.array(selected, np.int64)}
    found = best_columns(logits, prices, labels, threads=2, **options)
    expected = find_candidates(logits[:], prices, labels, **options)
    assert found.columns.shape == expected.columns.shape
    assert np.array_equal(found.found, expected.found)
    assert np.array_equal(found.regret, expected.regret)
    assert np.array_equal(np.sort(found.values), np.sort(expected.values))


def test_predict_and_verify_take_them():
    features, weight, bias = clustered(900, 15)
    logits = FeatureLogits(torch.from_numpy(features), weight, bias)
    a = sela_ext.assign(logits, tol=1e-5)
    assert isinstance(a.labels, torch.Tensor)
    assert torch.equal(a.predict(logits), a.labels)
    soft = a.predict(logits, soft=True)
    assert torch.equal(soft.argmax(1).int(), a.labels)
    certificate = sela_ext.verify(logits, a)
    assert certificate.faults(2e-5) == []
    assert certificate.error == pytest.approx(a.error, abs=1e-6)


def test_features_may_be_mapped_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALLEST", 1)
    features, weight, bias = clustered(3000, 20)
    np.save(tmp_path / "features.npy", features.astype(np.float16))
    on_disk = np.load(tmp_path / "features.npy", mmap_mode="r")
    logits = FeatureLogits(on_disk, weight, bias)
    assert logits.mapped() is not None
    a = sela_ext.assign(logits, threads=2)
    b = sela_ext.assign(FeatureLogits(np.array(on_disk), weight, bias))
    assert np.array_equal(a.potential, b.potential)
    with open(tmp_path / "features.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=r"features: expected 96,128 bytes in .*features.npy.* found 1,000"):
        sela_ext.assign(logits)


def test_a_failing_task_ends_the_pass_and_leaves_threads_as_they_were():
    logits = FeatureLogits(*clustered(100_000, 30))
    before = torch.get_num_threads()

    def task(first, block):
        if first:
            raise ValueError("told so")
        return first

    with pytest.raises(ValueError, match="told so"):
        list(logits.tiles(task, threads=2))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros(3, np.float32), np.zeros((2, 3))), DataError, r"features: expected a numpy or torch array \[N, D\]"),
        (([[1.0]], np.zeros((2, 1))), DataError, "found list"),
        ((np.zeros((3, 2)), np.zeros((2, 2))), DataError, "float16 or bfloat16, found float64"),
        ((np.zeros((3, 2), np.int32), np.zeros((2, 2))), DataError, "found int32"),
        (
            (np.zeros((3, 2), np.float32), np.zeros((2, 3))),
            OptionError,
            r"weight: expected shape .* D = 2, found",
        ),
        ((np.zeros((3, 2), np.float32), np.zeros((0, 2))), OptionError, r"found \(0, 2\)"),
        ((np.zeros((3, 2), np.float32), "x"), OptionError, "weight: expected numbers"),
        ((np.zeros((3, 2), np.float32), np.full((2, 2), np.nan)), OptionError, "weight: expected finite numbers"),
        ((np.zeros((3, 2), np.float32), np.zeros((2, 2)), np.zeros(3)), OptionError, r"bias: expected shape \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, error, message):
    with pytest.raises(error, match=message) as refusal:
        FeatureLogits(*arguments)
    assert "\n" not in str(refusal.value)


def test_no_rows_are_refused_by_assign_and_labelled_by_predict():
    features, weight, bias = clustered(200, 4)
    none = FeatureLogits(features[:0], weight, bias)
    with pytest.raises(DataError, match="at least one row"):
        sela_ext.assign(none)
    assert sela_ext.assign(FeatureLogits(features, weight, bias)).predict(none).shape == (0,)
