"""Properties of every solve, on drawn problems: marginals, symmetries, restarts, bits, optimality conditions."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sela_ext
from sela_ext.assign import UnbalancedLabelsWarning

LAM = 25.0
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


@st.composite
def problems(draw, dtypes=tuple(DTYPES), most_rows=300, most_cols=30, sds=(0.02, 0.3, 2.0)):
    """Logits of a kind, as torch: smooth to peaked, more rows than columns, so that a solution is not at infinity."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    cols = draw(st.integers(1, most_cols))
    rows = draw(st.integers(4 * cols, max(4 * cols, most_rows)))
    sd = draw(st.sampled_from(sds))
    logits = sd * rng.standard_normal((rows, cols)) + 0.5 * sd * rng.standard_normal(cols)
    return torch.from_numpy(logits).to(DTYPES[draw(st.sampled_from(dtypes))])


@st.composite
def marginals_of(draw, cols):
    """Shares of clusters, up to a factor of 10 apart, some of them 0 where there are several."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    shares = rng.random(cols) + 0.1
    if draw(st.booleans()) and cols > 1:
        shares[rng.integers(cols)] = 0
    return shares


methods = st.sampled_from(["auto", "newton", "anderson"])


def assign(logits, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnbalancedLabelsWarning)
        return sela_ext.assign(logits, **{"threads": 1, "tol": 1e-5, "max_passes": 400} | options)


def shares_of(logits, potential, lam=LAM, weights=None):
    """Column shares in float64, at float64 logits."""
    score = lam * logits.double().numpy() + np.asarray(potential, np.float64)
    p = np.exp(score - score.max(axis=1, keepdims=True))
    return np.average(p / p.sum(axis=1, keepdims=True), axis=0, weights=weights)


def margins(logits, potential):
    """Best minus second best score of each row; infinite with one column."""
    score = LAM * logits.double().numpy() + np.asarray(potential, np.float64)
    best = np.sort(score, axis=1)[:, ::-1]
    return best[:, 0] - best[:, 1] if score.shape[1] > 1 else np.full(len(score), np.inf)


# ---- Marginals.


@settings(max_examples=60, deadline=None)
@given(data=st.data(), logits=problems(), method=methods, weighted=st.booleans())
def test_the_plan_has_the_wanted_marginals(data, logits, method, weighted):
    rows, cols = logits.shape
    marginals = data.draw(marginals_of(cols))
    weights = np.random.default_rng(0).integers(0, 4, rows).astype(np.float64) if weighted else None
    if weighted:
        weights[: max(1, 2 * cols)] = 1
    a = assign(logits, method=method, marginals=marginals, row_weights=weights)
    wanted = marginals / marginals.sum()
    error = np.abs(shares_of(logits, a.potential, weights=weights) - wanted).sum()
    assert error == pytest.approx(a.error, rel=0.02, abs=2e-6)
    assert a.converged
    assert not np.isin(a.labels.numpy(), np.flatnonzero(marginals == 0)).any()
    certificate = sela_ext.verify(logits, a, marginals=marginals, row_weights=weights)
    assert certificate.duality_gap <= 2 * LAM * float(np.ptp(logits.double().numpy())) * a.error + 1e-4


# ---- Symmetries.


@settings(max_examples=40, deadline=None)
@given(
    logits=problems(dtypes=("float32", "float64")), method=methods, shift=st.floats(0.1, 100.0), seed=st.integers(0, 99)
)
def test_a_shift_of_every_row_changes_no_label(logits, method, shift, seed):
    shifts = shift * torch.from_numpy(np.random.default_rng(seed).standard_normal((len(logits), 1)))
    shifted = (logits.double() + shifts).to(logits.dtype)
    a, b = assign(logits, method=method), assign(shifted, method=method)
    assert a.converged
    assert b.converged
    # float32 rounds the shifted logits
    rounding = LAM * float((shifted.double() - shifts - logits.double()).abs().max())
    clear = margins(logits, a.potential) > 1e-2 + 4 * rounding + 4 * np.abs((a.potential - b.potential).numpy()).max()
    assert (a.labels == b.labels).numpy()[clear].all()
    if logits.dtype == torch.float64:
        np.testing.assert_allclose(shares_of(logits, b.potential), shares_of(logits, a.potential), atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(logits=problems(), method=methods, seed=st.integers(0, 99))
def test_permuted_rows_and_columns_give_the_permuted_result(logits, method, seed):
    rng = np.random.default_rng(seed)
    rows, cols = (torch.from_numpy(rng.permutation(n)) for n in logits.shape)
    a, b = assign(logits, method=method), assign(logits[rows][:, cols], method=method)
    assert a.converged
    assert b.converged
    moved = torch.empty_like(b.potential)
    moved[cols] = b.potential
    np.testing.assert_allclose(shares_of(logits, moved), shares_of(logits, a.potential), atol=3e-5)
    difference = float((moved - a.potential).abs().max())
    clear = margins(logits, a.potential)[rows] > 1e-3 + 4 * difference
    assert (cols[b.labels.long()] == a.labels[rows]).numpy()[clear].all()
    if logits.shape[1] > 1 and LAM * float(logits.double().std()) < 20:  # the optimum is unique and not at the edge
        assert difference < 0.5


# ---- Restarts.


@settings(max_examples=40, deadline=None)
@given(data=st.data(), logits=problems(), method=methods)
def test_a_solution_is_confirmed_by_one_read_and_stays_as_it_is(data, logits, method):
    marginals = data.draw(marginals_of(logits.shape[1]))
    a = assign(logits, method=method, marginals=marginals)
    again = assign(logits, method=method, marginals=marginals, start=a)
    assert a.converged
    assert again.history[0]["error"] == pytest.approx(a.error, abs=1e-6)
    if again.history[0]["error"] <= 1e-5:
        assert len(again.history) == 1
        assert torch.equal(again.potential, a.potential)
        assert torch.equal(again.labels, a.labels)


@settings(max_examples=40, deadline=None)
@given(logits=problems(), method=methods, limit=st.integers(1, 6))
def test_going_on_from_where_passes_ran_out_ends_at_the_solution(logits, method, limit):
    cut = assign(logits, method=method, max_passes=limit)
    assert cut.converged or len([h for h in cut.history if "rows" not in h]) <= limit
    on = assign(logits, method=method, start=cut)
    whole = assign(logits, method=method)
    assert on.converged
    assert on.error <= max(cut.error, 1e-5)
    np.testing.assert_allclose(shares_of(logits, on.potential), shares_of(logits, whole.potential), atol=3e-5)
    clear = margins(logits, whole.potential) > 1e-3 + 4 * float((on.potential - whole.potential).abs().max())
    assert (on.labels == whole.labels).numpy()[clear].all()


# ---- Bits.


@settings(max_examples=25, deadline=None)
@given(
    logits=problems(most_rows=3000, most_cols=40),
    options=st.sampled_from(
        [
            {"method": "newton"},
            {"method": "anderson"},
            {"method": "auto", "balance": "exact"},
            {"method": "newton", "relax": 0.5},
            {"method": "newton", "size_bounds": (0.5, 2.0)},
        ]
    ),
)
def test_the_number_of_threads_changes_no_bit(logits, options):
    if "size_bounds" in options:
        share = logits.shape[0] / logits.shape[1]
        options = options | {"size_bounds": tuple(share * x for x in options["size_bounds"])}
    one = assign(logits, **options)
    for threads in (2, 3):
        other = assign(logits, **options | {"threads": threads})
        assert torch.equal(other.potential, one.potential)
        assert torch.equal(other.labels, one.labels)
        assert (other.error, other.passes, other.objective) == (one.error, one.passes, one.objective)


# ---- Optimality of relaxed and bounded columns.


@settings(max_examples=60, deadline=None)
@given(data=st.data(), logits=problems(), method=methods, strength=st.floats(0.01, 50.0))
def test_relaxed_optima_satisfy_their_condition_in_every_type(data, logits, method, strength):
    marginals = np.maximum(data.draw(marginals_of(logits.shape[1])), 0.1)
    a = assign(logits, method=method, marginals=marginals, relax=strength, max_passes=2000)
    b = marginals / marginals.sum()
    shares = shares_of(logits, a.potential)
    # w = lambda rho log(b / share), that is share = b exp(-w / (lambda rho)); the distance is what `error` says
    asked = b * np.exp(-(a.potential.numpy() - np.log(b)) / (LAM * strength))
    assert a.converged or method == "anderson"
    # The step of one iteration, which `error` is measured by, is tau of the way to the condition.
    tau = LAM * strength / (1 + LAM * strength)
    floor = 1e-6 * (1 + np.abs(a.potential.numpy()).max() / (LAM * strength))
    assert np.abs(shares - asked).sum() <= (2 * a.error / min(tau, 1 - tau) + floor) * (1 + 1 / tau)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), logits=problems(), method=methods, width=st.floats(1.0, 20.0))
def test_bounded_optima_satisfy_complementary_slackness_in_every_type(data, logits, method, width):
    marginals = np.maximum(data.draw(marginals_of(logits.shape[1])), 0.1)
    b = marginals / marginals.sum()
    sizes = len(logits) * b
    a = assign(logits, method=method, marginals=marginals, size_bounds=(sizes / width, sizes * width), max_passes=2000)
    assert a.converged or method == "anderson"
    shares, w = shares_of(logits, a.potential), a.potential.numpy() - np.log(b)
    slack = 2 * a.error + 3e-6
    assert (shares >= b / width - slack).all()
    assert (shares <= b * width + slack).all()
    # Pulled up: just filled; pushed down: just not full. Only what rounds to nothing may be left of w elsewhere.
    assert (np.abs(shares - b / width) <= slack)[w > 1e-2].all()
    assert (np.abs(shares - b * width) <= slack)[w < -1e-2].all()
    assert a.labels.min() >= 0
