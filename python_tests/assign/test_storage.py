"""`storage=`: a solve on a 16-bit copy, measured on the logits themselves."""

import weakref

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import FeatureLogits
from sela_ext.assign import solve
from sela_ext.assign.storage import copy_tolerance, stored_copy
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import sinkhorn_pass
from sela_ext.kernels.logits import store_logits

LAM = 25.0
KINDS = ("fixed16", "float16", "bfloat16")


def gaussian(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def peaked(rows, cols, seed=0, sharpness=3.0, classes=30):
    rng = np.random.default_rng(seed)
    centres, weight = rng.standard_normal((classes, 24)), rng.standard_normal((24, cols)) / np.sqrt(24)
    features = centres[rng.integers(classes, size=rows)] + 0.5 * rng.standard_normal((rows, 24))
    return (sharpness * features @ weight).astype(np.float32)


def true_error(logits, potential):
    t = LAM * np.asarray(logits, np.float64) + np.asarray(potential)
    p = np.exp(t - t.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.abs(p.mean(axis=0) - 1 / t.shape[1]).sum()


@pytest.fixture(scope="module", params=["dense", "peaked", "sharp"])
def case(request):
    logits = {
        "dense": lambda: 0.5 * gaussian(30_000, 100),
        "peaked": lambda: peaked(30_000, 100),
        "sharp": lambda: peaked(30_000, 100, sharpness=9.0),
    }[request.param]()
    exact = sela_ext.assign(logits.astype(np.float64), tol=1e-8, max_passes=300)
    assert exact.error < 1e-6
    return request.param, logits, exact.labels


@pytest.mark.parametrize(("kind", "gate"), [("fixed16", 0.9999), ("float16", 0.9999), ("bfloat16", 0.999)])
def test_labels_at_the_potential_of_the_copy_are_those_of_float64(kind, gate, case, monkeypatch):
    name, logits, exact = case
    if name == "sharp" and kind == "float16":  # entries far from the row's maximum count there: their steps are coarse
        gate = 0.9998
    monkeypatch.setattr(solve, "copy_tolerance", lambda tol, kind: 2e-6)  # what is left is the copy's rounding
    a = sela_ext.assign(logits, storage=kind, tol=0.02)
    assert a.storage == kind
    assert a.history[-2]["error"] <= 2e-6
    assert a.history[-2]["bits"] == 16
    assert "bits" not in a.history[-1]
    assert (a.labels == exact).mean() >= gate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-6])
def test_the_error_is_that_of_the_logits_themselves(kind, tol):
    logits = peaked(5000, 60)
    a = sela_ext.assign(logits, storage=kind, tol=tol)
    assert a.converged
    assert a.error == pytest.approx(true_error(logits, a.potential), rel=0.05, abs=1e-6)
    assert a.error <= tol
    t = LAM * logits.astype(np.float64) + a.potential
    assert (t.max(axis=1) - t[np.arange(5000), a.labels] < 1e-3).all()


def test_where_rounding_left_too_much_the_logits_themselves_are_read_on():
    logits = peaked(5000, 60, sharpness=9.0)
    a = sela_ext.assign(logits, storage="bfloat16", tol=1e-6)
    bits = ["bits" in entry for entry in a.history]
    last = max(i for i, found in enumerate(bits) if found)
    assert a.history[last + 1]["error"] > 1e-4 > a.error
    assert not any(bits[last + 1 :])
    assert "rounding left an error" in a.reason
    assert a.passes == pytest.approx(1 + a.history[-1]["passes"], abs=1.01)


def test_labels_are_of_the_logits_where_the_copy_cannot_tell():
    logits = np.zeros((4000, 2), np.float32)
    logits[:, 0] = np.random.default_rng(0).permutation(np.linspace(-2e-4, 2e-4, 4000))  # within 1/128 nat: copied as 0
    copied = sinkhorn_pass(store_logits(logits, lam=LAM), np.zeros(2), scale=LAM, want_labels=True)
    assert (copied.labels == 0).all()
    a = sela_ext.assign(logits, storage="fixed16", tol=0.02)
    assert a.storage == "fixed16"
    assert a.ties == 0
    assert np.array_equal(a.labels, (logits[:, 0] < 0).astype(np.int32))


def test_a_span_beyond_the_range_is_named_and_solved_all_the_same():
    logits = peaked(4000, 50, sharpness=25.0)
    a = sela_ext.assign(logits, storage="fixed16", tol=1e-5)
    assert a.converged
    assert "beyond the copy's range of 1,024 nats" in a.reason
    assert true_error(logits, a.potential) < 2e-5


def test_a_cluster_that_only_the_copy_finds_impossible_gets_its_images():
    logits = gaussian(2000, 5)
    logits[:, 4] -= 60.0  # 1,500 nats
    a = sela_ext.assign(logits, storage="fixed16", tol=1e-4)
    assert a.converged
    assert a.sizes.min() > 300


@pytest.mark.parametrize("method", ["newton", "anderson", "sinkhorn"])
@pytest.mark.parametrize("max_passes", [1, 2, 3, 5])
def test_the_limit_of_passes_counts_the_last_one_over_the_logits(method, max_passes):
    logits = peaked(3000, 40)
    a = sela_ext.assign(logits, storage="fixed16", tol=0.0, max_passes=max_passes, method=method)
    if max_passes == 1:
        assert a.storage == "float32"
        assert "max_passes=1" in a.reason
    else:
        assert a.storage == "fixed16"
        assert "bits" not in a.history[-1]
    assert a.passes <= max_passes + 1 + 0.5  # the read that made the copy
    assert a.error == pytest.approx(true_error(logits, a.potential), rel=0.02, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"row_weights": np.linspace(0, 3, 3000)},
        {"marginals": np.arange(1, 41)},
        {"relax": 0.05},
        {"size_bounds": (60, 90)},
        {"balance": "exact"},
        {"start": np.linspace(-3, 3, 40)},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_copy_goes_with_the_other_options(options):
    logits = peaked(3000, 40)
    a, plain = (
        sela_ext.assign(logits, storage="fixed16", tol=1e-5, **options),
        sela_ext.assign(logits, tol=1e-5, **options),
    )
    assert a.converged
    assert a.storage == "fixed16"
    assert (a.labels == plain.labels).mean() > 0.998
    assert np.abs(a.sizes - plain.sizes).max() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_computed_logits_is_that_of_the_stored_ones(kind):
    rng = np.random.default_rng(0)
    logits = FeatureLogits(gaussian(1001, 8), rng.standard_normal((20, 8)))
    found = stored_copy(logits, kind, LAM, 2)
    expected = store_logits(logits[:], kind, lam=LAM)
    assert np.array_equal(found.values, expected.values)
    assert np.array_equal(found.maxima, expected.maxima)
    assert found.saturated == expected.saturated


def test_masked_rows_stay_masked():
    logits = peaked(1000, 20)
    logits[3, 4], logits[700] = np.nan, -np.inf
    logits[10, 2] = -np.inf
    for kind in KINDS:
        a = sela_ext.assign(logits, storage=kind)
        assert a.masked == 2
        assert np.flatnonzero(a.labels < 0).tolist() == [3, 700]
        assert a.labels[10] != 2


def test_float64_logits_end_in_float64():
    logits = peaked(2000, 30).astype(np.float64)
    a = sela_ext.assign(logits, storage="fixed16", tol=1e-9)
    assert a.storage == "fixed16"
    assert a.converged
    assert true_error(logits, a.potential) < 2e-9


def test_auto_reads_logits_in_memory_as_they_are():
    for dtype in (np.float32, np.float16, np.float64):
        a = sela_ext.assign(peaked(1000, 20).astype(dtype))
        assert a.storage == np.dtype(dtype).name
        assert a.passes == a.history[-1]["passes"]
    half = torch.from_numpy(peaked(1000, 20)).bfloat16()
    assert sela_ext.assign(half).storage == sela_ext.assign(half, storage="bfloat16").storage == "bfloat16"
    assert not any("bits" in entry for entry in sela_ext.assign(half, storage="bfloat16").history)


def test_the_copy_is_solved_no_further_than_it_can_tell():
    assert copy_tolerance(0.0, "fixed16") == 0.0
    assert copy_tolerance(1e-3, "fixed16") == 5e-4
    assert copy_tolerance(1e-9, "fixed16") == 2e-5
    assert copy_tolerance(1e-9, "bfloat16") == 2e-4


def test_what_cannot_be_is_refused():
    logits = gaussian(100, 5)
    with pytest.raises(
        OptionError, match='storage: expected "auto" or "float32" with stop="official", found "fixed16"'
    ):
        sela_ext.assign(logits, storage="fixed16", stop="official")
    with pytest.raises(OptionError, match="storage: expected one of"):
        sela_ext.assign(logits, storage="int8")
    with pytest.raises(DataError, match="found StoredLogits; use storage="):
        sela_ext.assign(store_logits(logits, lam=LAM))


def test_progress_is_told_of_every_pass():
    told = []
    a = sela_ext.assign(peaked(2000, 30), storage="fixed16", progress=told.append)
    assert tuple(told) == a.history


def test_the_memory_of_the_copy_is_free_before_the_logits_are_read_again(monkeypatch):
    copies, alive = [], []
    made, at_end = solve.stored_copy, solve.evaluate_at_end

    def watched(*arguments):
        copy = made(*arguments)
        copies.append(weakref.ref(copy))
        return copy

    def looked(problem, *arguments, **options):
        alive.append([ref() for ref in copies])
        return at_end(problem, *arguments, **options)

    monkeypatch.setattr(solve, "stored_copy", watched)
    monkeypatch.setattr(solve, "evaluate_at_end", looked)
    logits = peaked(2000, 1000, sharpness=20.0, classes=300)  # wide and peaked: the copy gets chunk bounds
    assert sela_ext.assign(logits, storage="fixed16", method="sinkhorn", max_passes=20).labels.shape == (2000,)
    assert alive == [[None]]
