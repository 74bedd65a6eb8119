"""Newton's method and the choice of the method: few reads, the optimum, hard inputs, a way on when it stalls."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import sela_ext
from sela_ext.assign import UnbalancedLabelsWarning, continuation, problem
from sela_ext.errors import DataError
from sela_ext.kernels import device

LAM = 25.0


def gaussian_logits(rows, cols, sd=1.0, seed=0, dtype=np.float32):
    return (sd * np.random.default_rng(seed).standard_normal((rows, cols))).astype(dtype)


def trained_logits(rows, cols, seed=0, classes=40, sharpness=3.0):
    """Images of a class share their favourite clusters: about one entry per row counts, spans of hundreds of nats."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, 24))
    features = centres[rng.integers(classes, size=rows)] + 0.5 * rng.standard_normal((rows, 24))
    weight = rng.standard_normal((24, cols)) / np.sqrt(24)
    return (sharpness * (features @ weight + 0.3 * rng.standard_normal(cols))).astype(np.float32)


def plan_shares(logits, potential, lam=LAM, weights=None):
    """Column shares in float64, and the scores."""
    score = lam * np.asarray(logits, np.float64) + potential
    p = np.exp(score - score.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    w = np.ones(len(p)) if weights is None else np.asarray(weights, np.float64)
    return w @ p / w.sum(), score


def true_error(logits, potential, target=None, lam=LAM, weights=None):
    shares = plan_shares(logits, potential, lam, weights)[0]
    return float(np.abs(shares - (1 / len(shares) if target is None else target)).sum())


def optimum(logits, lam=LAM):
    """The potential that maximises the semi-dual, by a library's quasi-Newton method in float64."""
    t = lam * logits.astype(np.float64)
    cols = t.shape[1]

    def negative(g):
        score = t + g
        top = score.max(axis=1, keepdims=True)
        e = np.exp(score - top)
        lse = np.log(e.sum(axis=1)) + top[:, 0]
        return lse.mean() - g.mean(), (e / e.sum(axis=1, keepdims=True)).mean(axis=0) - 1 / cols

    found = minimize(negative, np.zeros(cols), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "gtol": 1e-10})
    return found.x - found.x.mean()


# ---- The optimum, in few reads.


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 12.0])
def test_newton_reaches_1e_6_in_few_reads(sharpness):
    logits = trained_logits(8000, 100, sharpness=sharpness)
    a = sela_ext.assign(logits, tol=1e-6, method="newton")
    assert a.converged
    assert a.method == "newton"
    assert a.passes <= 9
    assert true_error(logits, a.potential) <= 2e-6
    assert np.array_equal(a.labels, plan_shares(logits, a.potential)[1].argmax(axis=1))
    assert a.potential @ np.full(100, 0.01) == pytest.approx(0, abs=1e-3)
    if sharpness >= 3:
        assert a.passes < sela_ext.assign(logits, tol=1e-6, method="anderson", max_passes=200).passes / 4


def test_the_potential_is_that_of_an_independent_optimiser():
    logits = trained_logits(600, 12, sharpness=0.3)
    a = sela_ext.assign(logits.astype(np.float64), tol=1e-11, method="newton")
    assert a.converged
    assert a.method == "newton"
    expected = optimum(logits)
    assert true_error(logits, expected) < 1e-5
    np.testing.assert_allclose(a.potential, expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_storage_is_solved_as_it_is(dtype):
    logits = torch.from_numpy(trained_logits(3000, 65)).to(dtype)
    tol = 1e-10 if dtype == torch.float64 else 1e-6
    a = sela_ext.assign(logits, tol=tol, method="newton")
    assert a.converged
    assert a.passes <= 9
    assert true_error(logits.double().numpy(), a.potential.numpy()) <= tol + 1e-6 * (dtype != torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_threads_do_not_change_a_bit(dtype):
    logits = torch.from_numpy(trained_logits(6000, 301, sharpness=1.0)).to(dtype)
    results = [sela_ext.assign(logits, threads=threads, tol=1e-6, method="newton") for threads in (1, 2, 3)]
    for other in results[1:]:
        assert torch.equal(other.labels, results[0].labels)
        assert torch.equal(other.potential, results[0].potential)
        assert (other.error, other.passes) == (results[0].error, results[0].passes)


@pytest.mark.parametrize("lam", [1.0, 10.0, 200.0, 1000.0])
def test_any_lambda_is_solved(lam):
    logits = trained_logits(4000, 64)
    a = sela_ext.assign(logits, lam=lam, tol=1e-5, method="newton")
    assert a.converged
    assert a.passes <= 15
    assert true_error(logits, a.potential, lam=lam) <= 3e-5


def test_spans_of_1600_nats_end_below_1e_6():
    logits = trained_logits(20_000, 128, sharpness=7.0)
    span = LAM * float((logits.max(1) - logits.min(1)).max())
    assert span > 1600
    a = sela_ext.assign(logits, tol=1e-6)
    assert (a.method, a.converged) == ("newton", True)
    assert a.passes <= 9
    assert true_error(logits, a.potential) <= 2e-6


@pytest.mark.parametrize("sd", [30.0, 100.0])
def test_wild_logits_are_solved(sd):
    logits = gaussian_logits(2000, 50, sd)
    a = sela_ext.assign(logits, tol=1e-5, method="newton")
    assert a.converged
    assert a.passes <= 12
    assert a.sizes.max() - a.sizes.min() <= 4


def test_marginals_and_row_weights_are_met():
    logits = trained_logits(5000, 60)
    rng = np.random.default_rng(0)
    shares, weights = rng.random(60) + 0.05, rng.integers(0, 3, 5000).astype(np.float64)
    a = sela_ext.assign(logits, marginals=shares, row_weights=weights, tol=1e-6, method="newton")
    assert a.converged
    assert a.passes <= 9
    assert true_error(logits, a.potential, shares / shares.sum(), weights=weights) <= 2e-6
    assert (a.labels >= 0).all()
    repeated = sela_ext.assign(
        np.repeat(logits, weights.astype(int), axis=0), marginals=shares, tol=1e-6, method="newton"
    )
    assert np.mean(a.labels == repeated.predict(logits)) > 0.998


def test_stages_read_more_rows_each():
    assert continuation.samples(1_281_167, 1000) == [160, 20, 2, 1]
    assert continuation.samples(60_000, 1000) == [7, 1]
    assert continuation.samples(20_000, 3000) == [1]
    assert continuation.samples(1, 1) == [1]
    logits = trained_logits(60_000, 30, sharpness=1.0)
    a = sela_ext.assign(logits, tol=1e-6)
    assert a.converged
    assert a.passes < 5
    read = [h.get("rows", 60_000) for h in a.history]
    assert len(set(read)) >= 3
    assert read[-1] == 60_000


def test_rows_sorted_by_class_need_no_more_reads():
    logits = trained_logits(40_000, 64, sharpness=2.0)
    mixed = sela_ext.assign(logits, tol=1e-6)
    order = np.argsort(mixed.labels, kind="stable")
    ordered = sela_ext.assign(logits[order], tol=1e-6)
    assert mixed.passes < 7
    assert ordered.passes < 7
    assert np.mean(ordered.labels == mixed.labels[order]) > 0.9999


def test_views_and_memory_mapped_logits_are_solved_in_place(tmp_path):
    wide = trained_logits(3000, 80)
    expected = sela_ext.assign(wide[:, 3:70].copy(), tol=1e-5, method="newton")
    np.save(tmp_path / "logits.npy", wide)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    for view in (wide[:, 3:70], np.asfortranarray(wide)[:, 3:70], mapped[:, 3:70]):
        a = sela_ext.assign(view, tol=1e-5, method="newton")
        assert np.array_equal(a.potential, expected.potential)


# ---- Starts.


def test_a_near_start_is_improved_at_once_and_the_solution_is_confirmed_by_one_read():
    logits = trained_logits(9000, 100)
    rough = sela_ext.assign(logits, tol=1e-2, method="newton")
    fine = sela_ext.assign(logits, tol=1e-6, method="newton")
    again = sela_ext.assign(logits, tol=1e-6, start=fine, method="newton")
    assert again.passes == 1
    assert np.array_equal(again.potential, fine.potential)
    continued = sela_ext.assign(logits, tol=1e-6, start=rough, method="newton")
    assert continued.converged
    assert continued.passes <= 3
    assert np.mean(continued.labels == fine.labels) > 0.9999


def test_a_start_from_other_logits_or_far_away_does_no_harm():
    logits = trained_logits(9000, 100)
    other = sela_ext.assign(trained_logits(9000, 100, seed=5), tol=1e-4)
    for start in (other, 300 * np.random.default_rng(0).standard_normal(100)):
        a = sela_ext.assign(logits, tol=1e-6, start=start, method="newton")
        assert a.converged
        assert a.passes <= 20
        assert true_error(logits, a.potential) <= 2e-6


# ---- The choice.


def test_auto_takes_newton_for_sparse_plans_and_anderson_for_smooth_ones_and_says_why():
    sparse = sela_ext.assign(trained_logits(3000, 100), tol=1e-3)
    assert sparse.method == "newton"
    assert "a sparse plan: " in sparse.reason
    assert "of 100 entries per row" in sparse.reason
    smooth = sela_ext.assign(gaussian_logits(3000, 100, 0.05), tol=1e-3)
    assert smooth.method == "anderson"
    assert smooth.reason == "a smooth plan: more than 16 of 100 entries per row above exp(-16)"
    # the look is the first pass: it costs Anderson nothing
    asked = sela_ext.assign(gaussian_logits(3000, 100, 0.05), tol=1e-3, method="anderson")
    assert smooth.passes == asked.passes
    assert np.array_equal(smooth.potential, asked.potential)
    assert asked.reason == 'method="anderson" was asked for'
    assert "plain Sinkhorn" in sela_ext.assign(gaussian_logits(30, 5), stop="official").reason


def test_auto_looks_at_a_part_of_many_rows_only():
    a = sela_ext.assign(gaussian_logits(50_000, 20, 0.05), tol=1e-3)
    assert a.method == "anderson"
    assert a.history[0]["rows"] < 6000
    assert a.history[0]["passes"] == a.history[0]["rows"] / 50_000


def test_anderson_begins_with_a_part_of_many_rows_and_needs_fewer_reads_for_it():
    logits = gaussian_logits(60_000, 20, 0.05) + np.linspace(0, 0.3, 20, dtype=np.float32)
    a = sela_ext.assign(logits, tol=1e-5)
    whole = sela_ext.assign(logits, tol=1e-5, method="anderson", start=np.zeros(20))
    assert a.converged
    assert true_error(logits, a.potential) <= 2e-5
    assert a.passes < whole.passes
    assert [h["rows"] for h in a.history if "rows" in h][1] < 6000
    assert "rows" not in a.history[-1]
    assert all("rows" not in h for h in whole.history)


@pytest.mark.parametrize("refused", [False, True])
def test_cuda_logits_are_solved_by_newton_where_they_are(as_cuda, host_card, monkeypatch, refused):
    card = as_cuda(host_card)
    monkeypatch.setitem(device._usable, card.place, None if refused else card)
    logits = trained_logits(700, 30)
    expected = sela_ext.assign(logits, tol=1e-6)
    for options in ({}, {"relax": 0.5}, {"size_bounds": (15, 40)}, {"row_weights": np.arange(700) % 3}):
        expected = sela_ext.assign(logits, tol=1e-6, method="newton", **options)
        found = sela_ext.assign(torch.from_numpy(logits), tol=1e-6, method="newton", **options)
        assert (found.method, found.backend) == ("newton", "torch" if refused else "cuda")
        assert found.converged == expected.converged
        assert abs(found.passes - expected.passes) <= 2
        assert int((found.labels.numpy() != expected.labels).sum()) <= 1
    auto = sela_ext.assign(torch.from_numpy(logits))
    assert (auto.method, auto.reason) == ("newton", sela_ext.assign(logits).reason)


# ---- Passes are counted honestly.


def test_passes_are_the_rows_that_were_read_and_the_history_names_every_pass(monkeypatch):
    read = []
    kernel = problem.Problem._pass

    def counted(self, potential, **options):
        sums = kernel(self, potential, **options)
        read.append(np.isfinite(sums.lse).sum() if options["every"] == 1 else sums.weight)
        return sums

    monkeypatch.setattr(problem.Problem, "_pass", counted)
    logits = trained_logits(20_000, 64, sharpness=2.0)
    a = sela_ext.assign(logits, tol=1e-6)
    assert a.converged
    assert len(a.history) == len(read)
    own = np.array([h["passes"] for h in a.history]) - np.cumsum(read) / 20_000
    assert (own > -1e-9).all()  # single columns that are too faint for the pass may be read once more
    assert own[-1] < 0.1
    parts = [h for h in a.history if "rows" in h]
    assert min(h["rows"] for h in parts) < 20_000
    assert min(h["lam"] for h in parts) <= LAM / 4
    assert "lam" not in a.history[-1]
    assert a.error == a.history[-1]["error"]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_the_limit_of_passes_is_kept_and_the_best_state_is_returned(limit):
    for rows in (1000, 30_000):
        logits = trained_logits(rows, 50)
        a = sela_ext.assign(logits, tol=1e-12, max_passes=limit, method="newton")
        assert a.passes <= limit + 0.1  # single columns may be read once more
        assert not a.converged
        whole = [h["error"] for h in a.history if "rows" not in h]
        assert a.error == min(whole)
        assert true_error(logits, a.potential) == pytest.approx(a.error, abs=2e-6)
        assert (a.labels >= 0).all()


# ---- The way on when Newton does not get any further.


def test_anderson_goes_on_where_newton_stalls(monkeypatch):
    solve = continuation.newton_solve
    monkeypatch.setattr(
        continuation, "newton_solve", lambda rows, t, r, d, **k: dataclasses.replace(solve(rows, t, r, d, **k), d=0 * d)
    )
    logits = trained_logits(3000, 40, sharpness=0.5)
    a = sela_ext.assign(logits, tol=1e-5, method="newton", max_passes=300)
    assert a.converged
    assert a.reason.endswith("stalled, Anderson's method went on")
    assert true_error(logits, a.potential) <= 2e-5
    cut = sela_ext.assign(logits, tol=1e-5, method="newton", max_passes=12)
    assert not cut.converged
    assert cut.passes <= 12
    assert cut.error == min(h["error"] for h in cut.history if "rows" not in h and "lam" not in h)


def test_a_wrong_newton_step_is_survived(monkeypatch):
    rng = np.random.default_rng(0)
    solve = continuation.newton_solve
    monkeypatch.setattr(
        continuation,
        "newton_solve",
        lambda rows, t, r, d, **k: dataclasses.replace(
            solve(rows, t, r, d, **k), d=d + 50 * rng.standard_normal(len(d))
        ),
    )
    logits = trained_logits(3000, 40, sharpness=0.5)
    a = sela_ext.assign(logits, tol=1e-4, method="newton")
    assert a.converged
    assert "Anderson's method went on" in a.reason


def test_a_plan_that_is_smooth_at_the_end_is_anderson_s():
    logits = gaussian_logits(3000, 100, 0.05)
    a = sela_ext.assign(logits, tol=1e-5, method="newton")
    assert a.converged
    assert a.reason == 'method="newton" was asked for; smooth at the end, where Anderson\'s method went on'


# ---- Hard inputs.


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (1, 31), (31, 1), (3, 10), (33, 1001), (129, 33), (60, 60), (1001, 999)]
)
@pytest.mark.parametrize("sd", [0.01, 1.0, 20.0])
def test_any_shape_is_returned_finite(rows, cols, sd):
    a = sela_ext.assign(gaussian_logits(rows, cols, sd), method="newton", max_passes=60, tol=1e-4)
    assert a.labels.shape == (rows,)
    assert a.sizes.shape == (cols,)
    assert np.isfinite(a.potential).all()
    assert 0 <= a.error <= 1.0
    if rows >= 2 * cols:
        assert a.converged


def test_as_many_clusters_as_images_give_each_image_its_own():
    logits = gaussian_logits(200, 200, 100.0)
    a = sela_ext.assign(logits, tol=1e-4, method="newton")
    assert a.converged
    assert a.passes < 60
    assert a.sizes.max() <= 2
    assert (a.sizes == 1).mean() > 0.9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bad_rows_are_masked_and_the_others_keep_their_labels(dtype):
    logits = trained_logits(6000, 33, sharpness=1.0).astype(dtype)
    spoiled = logits.copy()
    bad = [0, 3, 100, 500, 5999]
    spoiled[0, 4] = np.nan
    spoiled[3] = -np.inf
    spoiled[100, 32] = np.inf
    spoiled[[500, 5999]] = np.nan
    good = np.setdiff1d(np.arange(6000), bad)
    a = sela_ext.assign(spoiled, tol=1e-6, method="newton")
    alone = sela_ext.assign(logits[good], tol=1e-6, method="newton")
    assert a.masked == 5
    assert a.converged
    assert (a.labels[bad] == -1).all()
    assert np.mean(a.labels[good] == alone.labels) > 0.9995
    np.testing.assert_allclose(a.potential, alone.potential, atol=2e-2)


def test_a_look_at_nothing_but_bad_rows_goes_on_to_the_others():
    logits = trained_logits(20_000, 30)
    blocks = np.arange(20_000) // 4
    for every in (2, 4, 9):
        spoiled = logits.copy()
        spoiled[blocks % every == 0] = np.nan
        a = sela_ext.assign(spoiled, tol=1e-5)
        assert a.converged
        assert a.masked == (blocks % every == 0).sum()
    with pytest.raises(DataError, match="20000 of 20000 rows hold NaN"):
        sela_ext.assign(np.full((20_000, 4), np.nan, np.float32))


def test_impossible_entries_and_clusters_are_respected():
    logits = trained_logits(3000, 40)
    logits[:1500, 0] = -np.inf
    a = sela_ext.assign(logits, tol=1e-6, method="newton")
    assert a.converged
    assert not (a.labels[:1500] == 0).any()
    logits[:, 7] = -np.inf
    with pytest.warns(UnbalancedLabelsWarning, match="1 of 40 clusters receive nothing, the first is 7"):
        b = sela_ext.assign(logits, tol=1e-6, method="newton")
    assert not b.converged
    assert b.passes < 12  # it ends where nothing can be gained
    assert b.error == pytest.approx(2 / 40, abs=1e-5)
    assert b.sizes[7] == 0
    assert np.isfinite(b.potential).all()


@pytest.mark.parametrize("depth", [3.0, 60.0, 1000.0])
def test_dead_clusters_come_back_to_life(depth):
    logits = trained_logits(4000, 50)
    logits[:, [7, 20]] -= depth
    a = sela_ext.assign(logits, tol=1e-4, method="newton")
    assert a.converged
    assert a.passes < 40
    assert a.sizes[[7, 20]].min() > 60


def test_identical_rows_are_dealt_out_evenly():
    for cols, rows in ((10, 100), (33, 1001)):
        row = np.random.default_rng(0).standard_normal(cols).astype(np.float32)
        a = sela_ext.assign(np.tile(row, (rows, 1)), method="newton")
        assert a.converged
        assert a.sizes.max() - a.sizes.min() <= 1


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    sd=st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]),
    lam=st.sampled_from([1.0, 25.0, 1000.0]),
    double=st.booleans(),
    holes=st.booleans(),
)
def test_whatever_comes_a_finite_best_state_is_returned(rows, cols, seed, sd, lam, double, holes):
    logits = gaussian_logits(rows, cols, sd, seed, np.float64 if double else np.float32)
    rng = np.random.default_rng(seed)
    if holes:
        logits[rng.random(logits.shape) < 0.1] = -np.inf
        logits[rng.random(rows) < 0.05] = np.nan
        logits[0] = 0
    with np.errstate(all="raise", under="ignore"):
        a = quietly(sela_ext.assign, logits, lam=lam, tol=1e-5, method="newton", max_passes=30)
    assert np.isfinite(a.potential).all()
    assert 0 <= a.error <= 2
    assert a.error <= min(h["error"] for h in a.history if "lam" not in h and "rows" not in h)
    assert a.masked == (np.isnan(logits).any(1) | np.isneginf(logits).all(1)).sum()
    assert ((a.labels >= 0) == ~(np.isnan(logits).any(1) | np.isneginf(logits).all(1))).all()


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnbalancedLabelsWarning)
        return function(*arguments, **options)
