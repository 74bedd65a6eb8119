"""Relaxed and bounded column marginals: their optima satisfy the optimality conditions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sela_ext
from sela_ext.assign import UnbalancedLabelsWarning

LAM = 10.0


def plan_shares(logits, potential, weights=None):
    t = LAM * logits.astype(np.float64) + potential
    p = np.exp(t - t.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.average(p, axis=0, weights=weights)


problems = given(
    rows=st.integers(1, 80),
    cols=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    method=st.sampled_from(["newton", "newton", "anderson", "sinkhorn"]),
    weighted=st.booleans(),
    strength=st.floats(0.02, 5.0),
)


def make(rows, cols, seed, weighted):
    rng = np.random.default_rng(seed)
    logits = 0.3 * rng.standard_normal((rows, cols)) + 0.2 * rng.standard_normal(cols)
    return logits, rng.random(cols) + 0.1, rng.random(rows) + 0.1 if weighted else None


@settings(max_examples=80, deadline=None)
@problems
def test_relaxed_optima_satisfy_their_condition(rows, cols, seed, method, weighted, strength):
    logits, marginals, weights = make(rows, cols, seed, weighted)
    a = sela_ext.assign(
        logits,
        lam=LAM,
        relax=strength,
        marginals=marginals,
        row_weights=weights,
        tol=1e-9,
        max_passes=5000,
        method=method,
    )
    assert a.converged
    b = marginals / marginals.sum()
    shares = plan_shares(logits, a.potential, weights)
    # w = g - log b = lambda rho log(b / col)
    np.testing.assert_allclose(
        a.potential - np.log(b), LAM * strength * np.log(b / shares), atol=1e-6 * (1 + LAM * strength) / b.min()
    )


@settings(max_examples=80, deadline=None)
@problems
def test_bounded_optima_satisfy_their_conditions(rows, cols, seed, method, weighted, strength):
    logits, marginals, weights = make(rows, cols, seed, weighted)
    b = marginals / marginals.sum()
    total = rows if weights is None else float(weights.astype(np.float32).sum())
    width = 0.2 * strength
    low, high = total * b / (1 + width), total * b * (1 + width)
    a = sela_ext.assign(
        logits,
        lam=LAM,
        size_bounds=(low, high),
        marginals=marginals,
        row_weights=weights,
        tol=1e-9,
        max_passes=20_000,
        method=method,
    )
    assert a.converged
    sizes = total * plan_shares(logits, a.potential, weights)
    w = a.potential - np.log(b)
    slack = 1e-6 * total
    assert (sizes >= low - slack).all()
    assert (sizes <= high + slack).all()
    assert (np.abs(sizes - low) <= slack)[w > 1e-4].all()  # pulled up: only just filled
    assert (np.abs(sizes - high) <= slack)[w < -1e-4].all()  # pushed down: only just not full


def test_the_objective_is_largest_at_the_solution():
    logits, marginals, _ = make(200, 8, 3, False)
    rng = np.random.default_rng(0)
    for options in ({"relax": 0.3}, {"size_bounds": (15, 40)}):
        a = sela_ext.assign(logits, lam=LAM, marginals=marginals, tol=1e-10, max_passes=20_000, **options)
        for size in (1e-3, 0.1, 3.0):
            other = sela_ext.assign(
                logits,
                lam=LAM,
                marginals=marginals,
                max_passes=1,
                start=a.potential + size * rng.standard_normal(8),
                **options,
            )
            assert other.objective < a.objective


def test_a_strong_pull_is_the_balanced_solution_and_a_weak_one_lets_images_choose():
    logits = np.random.default_rng(1).standard_normal((500, 10)).astype(np.float32)
    logits[:, 0] += 1.0
    exact = sela_ext.assign(logits, tol=1e-5)
    strict = sela_ext.assign(logits, relax=1e4, tol=1e-5)
    assert (strict.labels == exact.labels).mean() > 0.995
    free = sela_ext.assign(logits, relax=1e-4, tol=1e-5)
    assert (free.labels == logits.argmax(axis=1)).mean() > 0.98
    middle = sela_ext.assign(logits, relax=0.2, tol=1e-5)
    assert exact.sizes[0] < middle.sizes[0] < free.sizes[0]
    wide = sela_ext.assign(logits, size_bounds=(0, 500), tol=1e-5)
    assert (wide.labels == logits.argmax(axis=1)).all()
    tight = sela_ext.assign(logits, size_bounds=(50, 50), tol=1e-5)
    assert (tight.labels == exact.labels).mean() > 0.995


@pytest.mark.parametrize("options", [{"relax": 0.5}, {"size_bounds": (10, 120)}])
def test_threads_kinds_dead_clusters_and_bad_rows(options):
    logits = np.random.default_rng(2).standard_normal((600, 9)).astype(np.float32)
    logits[4] = np.nan
    first = sela_ext.assign(logits, threads=1, **options)
    assert first.converged
    assert first.labels[4] == -1
    other = sela_ext.assign(torch.from_numpy(logits), threads=3, **options)
    assert np.array_equal(other.labels.numpy(), first.labels)
    assert np.array_equal(other.potential.numpy(), first.potential)
    logits[:, 2] = -np.inf
    with pytest.warns(UnbalancedLabelsWarning, match="1 of 9 clusters receive nothing"):
        dead = sela_ext.assign(logits, **options)
    assert dead.sizes[2] == 0
    assert dead.converged


@pytest.mark.parametrize("options", [{"relax": 0.5}, {"size_bounds": (900, 1300)}])
@pytest.mark.parametrize("method", ["newton", "anderson", "auto"])
def test_a_part_whose_rows_all_have_weight_zero_is_read_with_the_others(options, method):
    logits = np.random.default_rng(6).standard_normal((20_000, 12)).astype(np.float32)
    group = np.arange(20_000) // 4
    weights = ((group % 4 > 0) & (group % 9 > 0)).astype(float)  # parts are every 4th or every 9th group
    a = sela_ext.assign(logits, lam=40.0, tol=1e-4, method=method, row_weights=weights, **options)
    alone = sela_ext.assign(logits[weights > 0], lam=40.0, tol=1e-4, method=method, **options)
    assert a.converged
    assert a.objective == pytest.approx(alone.objective, abs=1e-5)
    assert all(entry.get("rows", 20_000) == 20_000 for entry in a.history)


@pytest.mark.parametrize("options", [{}, {"relax": 0.5}, {"size_bounds": (10, 120)}])
def test_progress_is_told_what_the_history_holds(options):
    logits = np.random.default_rng(7).standard_normal((600, 9)).astype(np.float32)
    told = []
    a = sela_ext.assign(logits, progress=lambda entry: told.append(dict(entry)), **options)
    assert told == list(a.history)
    assert told[-1]["error"] == a.error
    assert told[-1]["objective"] == a.objective


@pytest.mark.parametrize("max_passes", [3, 42, 60])
def test_bounded_solves_keep_to_their_passes(max_passes):
    logits = (3 * np.random.default_rng(8).standard_normal((20_000, 12))).astype(np.float32)
    for method in ("auto", "anderson"):
        a = sela_ext.assign(logits, size_bounds=(1600, 1700), tol=0.0, max_passes=max_passes, method=method)
        assert a.passes <= max_passes
