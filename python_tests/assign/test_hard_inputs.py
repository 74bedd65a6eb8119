"""Inputs at the edges end well: finite and valid results, an honest error, convergence where there is a solution."""

import warnings

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext.assign import UnbalancedLabelsWarning
from sela_ext.errors import OptionError

METHODS = ("auto", "newton", "anderson", "sinkhorn")
FAST = ("auto", "newton")  # what hard inputs are for; the others may stop at max_passes
all_methods = pytest.mark.parametrize("method", METHODS)
fast_methods = pytest.mark.parametrize("method", FAST)


def gaussian(rows, cols, sd=1.0, seed=1):
    return (sd * np.random.default_rng(seed).standard_normal((rows, cols))).astype(np.float32)


def trained(rows, cols, sharpness=3.0, seed=0):
    """Images of a class share their favourite clusters: about one entry per row counts."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((40, 24))[rng.integers(40, size=rows)] + 0.5 * rng.standard_normal((rows, 24))
    weight = rng.standard_normal((24, cols)) / np.sqrt(24)
    return (sharpness * (features @ weight + 0.3 * rng.standard_normal(cols))).astype(np.float32)


def solved(logits, method="auto", tol=1e-6, max_passes=60, marginals=None, **options):
    """The assignment, after everything that holds for any input was checked against the float64 certificate."""
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("ignore", UnbalancedLabelsWarning)
        a = sela_ext.assign(
            logits, method=method, tol=tol, max_passes=max_passes, marginals=marginals, threads=1, **options
        )
    array = logits.double().numpy() if isinstance(logits, torch.Tensor) else np.asarray(logits, np.float64)
    usable = ~(np.isnan(array).any(1) | np.isposinf(array).any(1) | np.isneginf(array).all(1))
    potential, labels = np.asarray(a.potential), np.asarray(a.labels)
    assert np.isfinite(potential).all()
    assert np.isfinite(a.objective)
    assert ((labels >= 0) == usable).all()
    assert labels.max() < array.shape[1]
    assert a.masked == (~usable).sum()
    assert np.array_equal(np.asarray(a.sizes), np.bincount(labels[usable], minlength=array.shape[1]))
    certificate = sela_ext.verify(logits, a, marginals=marginals)
    spread = float(np.ptp(potential[potential > -1e30]))  # what float32 rounds the potential to grows with it
    assert certificate.error == pytest.approx(a.error, rel=0.02, abs=1e-6 + 3e-8 * spread)
    assert certificate.impossible == 0
    assert certificate.wrongly_labelled == 0
    assert np.nanmin(certificate.margin, initial=np.inf) >= -2e-3 - 1e-6 * spread  # the label is the best cluster
    return a


# ---- Spans, deviations, lambda.


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 7.0, 9.0])
@fast_methods
def test_spans_up_to_2000_nats_end_below_1e_7_in_float32(sharpness, method):
    logits = trained(20_000, 128, sharpness)
    if sharpness >= 7:
        assert 25 * float((logits.max(1) - logits.min(1)).max()) > 1600
    a = solved(logits, method, tol=1e-7)
    assert a.converged
    assert a.passes <= 9
    assert sela_ext.verify(logits, a).error <= 1.2e-7


@pytest.mark.parametrize("sharpness", [1.0, 7.0])
@pytest.mark.parametrize("method", ["anderson", "sinkhorn"])
def test_other_methods_stay_finite_and_honest_there(sharpness, method):
    logits = trained(3000, 128, sharpness)
    a = solved(logits, method)
    assert a.passes <= 61
    assert a.error < 0.6


@pytest.mark.parametrize("sd", [30.0, 100.0])
@all_methods
def test_wild_logits_end_well(sd, method):
    a = solved(gaussian(2000, 50, sd), method)
    assert a.converged or method not in FAST
    assert a.error < 0.3


@pytest.mark.parametrize("lam", [1.0, 10.0, 100.0, 1000.0])
@fast_methods
def test_lambda_from_1_to_1000_converges(lam, method):
    for logits in (trained(4000, 64), gaussian(2000, 64, 0.3)):
        assert solved(logits, method, lam=lam).converged


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
@fast_methods
def test_a_column_25_000_nats_off_gets_its_share(shift, method):
    logits = trained(3000, 40)
    logits[:, 3] += shift
    a = solved(logits, method, tol=1e-7, max_passes=100)
    assert a.converged
    assert a.reason.endswith("stalled in float32, went on in float64")
    assert a.history[-1]["bits"] == 64
    assert sela_ext.verify(logits, a).error <= 1.1e-7
    assert abs(int(a.sizes[3]) - 75) <= 5


def test_fewer_wild_rows_than_clusters_are_solved_in_float64():
    for rows, cols in ((33, 129), (100, 400)):
        logits = gaussian(rows, cols, 30.0)
        a = solved(logits, tol=1e-6, max_passes=100)
        assert a.converged
        assert sela_ext.verify(logits, a).error <= 1.1e-6
        expected = solved(logits.astype(np.float64), tol=1e-9, max_passes=100)
        assert expected.converged
        np.testing.assert_allclose(a.objective, expected.objective, rtol=1e-5)


# ---- Shapes.


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (1, 33), (1001, 1), (31, 33), (33, 31), (31, 1001), (1001, 33), (33, 33), (129, 1001)]
)
@all_methods
def test_any_shape_ends_well(rows, cols, method):
    a = solved(gaussian(rows, cols), method, tol=1e-5, max_passes=200)
    assert a.converged or method not in FAST
    if cols == 1:
        assert (a.labels == 0).all()
        assert a.error <= 1e-6


@pytest.mark.parametrize("sd", [1.0, 100.0])
@fast_methods
def test_as_many_clusters_as_images(sd, method):
    a = solved(gaussian(200, 200, sd), method, tol=1e-5, max_passes=200)
    assert a.converged
    assert a.sizes.max() <= 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@all_methods
def test_views_give_the_result_of_their_copy(dtype, method):
    wide = gaussian(303, 132).astype(dtype)
    views = {
        "strided": wide[::3, 2:35],
        "every other column": wide[:101, 0:66:2],
        "reversed": wide[100::-1, 40:73],
        "transposed": np.ascontiguousarray(wide[:101, :33].T).T,
    }
    for name, view in views.items():
        copy = np.ascontiguousarray(view)
        expected = sela_ext.assign(copy, method=method, tol=1e-4, max_passes=40, threads=1)
        for given in (
            view,
            torch.from_numpy(copy.T.copy()).T if name == "transposed" else torch.from_numpy(view.copy()),
        ):
            a = sela_ext.assign(given, method=method, tol=1e-4, max_passes=40, threads=1)
            assert np.array_equal(np.asarray(a.potential), expected.potential), name
            assert np.array_equal(np.asarray(a.labels), expected.labels), name
    torch_view = torch.from_numpy(wide)[::3, 2:35]
    a = sela_ext.assign(torch_view, method=method, tol=1e-4, max_passes=40, threads=1)
    b = sela_ext.assign(views["strided"].copy(), method=method, tol=1e-4, max_passes=40, threads=1)
    assert np.array_equal(a.potential.numpy(), b.potential)


# ---- Values.


# D18
@all_methods
def test_a_row_of_nan_takes_part_in_nothing(method):
    logits = trained(3000, 40, 1.0)
    spoiled = logits.copy()
    spoiled[5] = np.nan
    spoiled[77, 3] = np.nan
    a = solved(spoiled, method, max_passes=300)
    alone = solved(np.delete(logits, [5, 77], axis=0), method, max_passes=300)
    assert a.labels[5] == a.labels[77] == -1
    assert a.converged == alone.converged
    assert np.mean(np.delete(a.labels, [5, 77]) == alone.labels) > 0.999


# D18
@all_methods
def test_single_impossible_entries_are_never_labels(method):
    logits = gaussian(3000, 40, 0.3)
    holes = np.random.default_rng(0).random(logits.shape) < 0.3
    holes[np.arange(3000), np.arange(3000) % 40] = False
    logits[holes] = -np.inf
    a = solved(logits, method, tol=1e-5, max_passes=300)
    assert a.converged
    assert not holes[np.arange(3000), a.labels].any()


# D19
@all_methods
def test_a_dead_cluster_is_said_and_the_others_share_the_images(method):
    logits = gaussian(3000, 40, 0.3)
    logits[:, 7] = -np.inf
    a = solved(logits, method, max_passes=300)
    assert not a.converged
    assert a.error == pytest.approx(2 / 40, abs=1e-5)
    assert a.passes < 60
    assert a.sizes[7] == 0
    with pytest.warns(UnbalancedLabelsWarning, match="1 of 40 clusters receive nothing, the first is 7"):
        sela_ext.assign(logits, method=method, max_passes=20)


# D19
@pytest.mark.parametrize("sd", [1.0, 100.0])
@all_methods
def test_identical_rows_are_dealt_out_evenly(sd, method):
    for rows, cols in ((1001, 33), (33, 33)):
        # All rows are on the edge between all clusters: their shares are as exact as the potential, up to 4,000 nats,
        # which in float32 is not enough; Newton's method goes on in float64.
        tol = 1e-5 if sd == 1 else 1e-7 if method in FAST else 1e-3
        a = solved(np.tile(gaussian(1, cols, sd), (rows, 1)), method, tol=tol, max_passes=100)
        assert a.converged
        assert a.sizes.max() - a.sizes.min() <= 1


@all_methods
def test_identical_columns_share_evenly(method):
    for logits in (np.tile(gaussian(1001, 1), (1, 33)), np.zeros((100, 10), np.float32), np.full((100, 9), 1e30, "f4")):
        a = solved(logits, method, tol=1e-5)
        assert a.converged
        np.testing.assert_allclose(a.potential, 0, atol=1e-3)
        assert a.sizes.max() - a.sizes.min() <= 1
    logits = trained(3000, 40)
    logits[:, 1] = logits[:, 0]
    a = solved(logits, method, max_passes=100)
    assert a.potential[0] == pytest.approx(a.potential[1], abs=1e-2)
    assert a.converged or method not in FAST


# ---- Marginals.


@all_methods
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_cluster_of_share_zero_stays_empty(method, dtype):
    logits = gaussian(3000, 40, 0.3).astype(dtype)
    logits[:, 3] += 20  # it would have every image
    marginals = np.ones(40)
    marginals[[3, 17]] = 0
    a = solved(logits, method, tol=1e-5, max_passes=300, marginals=marginals)
    assert a.converged
    assert (a.sizes[[3, 17]] == 0).all()
    others = np.setdiff1d(np.arange(40), [3, 17])
    without = solved(logits[:, others], method, tol=1e-5, max_passes=300)
    assert np.mean(others[without.labels] == a.labels) > 0.999
    assert not np.isin(a.predict(logits), [3, 17]).any()
    again = solved(logits, method, tol=1e-4, marginals=marginals, start=a)
    assert again.passes <= 2
    exact = sela_ext.assign(logits, method=method, marginals=marginals, balance="exact", tol=1e-3)
    assert (exact.sizes[[3, 17]] == 0).all()
    assert np.ptp(exact.sizes[others]) <= 1


def test_rows_that_only_an_empty_cluster_could_take_have_no_label():
    logits = gaussian(300, 4, 0.3)
    logits[:5, 1:] = -np.inf
    with np.errstate(all="raise", under="ignore"):
        a = sela_ext.assign(logits, marginals=[0, 1, 1, 1], max_passes=20)
    assert (a.labels[:5] == -1).all()
    assert (a.labels[5:] > 0).all()
    assert np.isfinite(a.potential).all()
    assert not a.converged


def test_marginals_that_leave_nothing_and_zeros_where_none_can_be_are_refused():
    logits = gaussian(30, 3)
    for bad in ([0, 0, 0], [1, -1, 1], [1, np.nan, 1]):
        with pytest.raises(OptionError, match="marginals: expected "):
            sela_ext.assign(logits, marginals=bad)
    for options in ({"relax": 1.0}, {"size_bounds": (0, 30)}, {"stop": "official"}):
        with pytest.raises(OptionError, match=r"marginals: expected numbers > 0, found 0\.0 at 1"):
            sela_ext.assign(logits, marginals=[1, 0, 2], **options)


# ---- Few passes.


# D20
@pytest.mark.parametrize("limit", [1, 2, 3, 5])
@all_methods
def test_few_passes_give_a_valid_state_and_its_true_error(limit, method):
    for logits in (trained(3000, 40, 7.0), gaussian(300, 100, 30.0), gaussian(40_000, 20, 0.1), gaussian(1, 5)):
        a = solved(logits, method, tol=1e-9, max_passes=limit)
        assert a.passes <= limit + 0.1 or (len(a.history) <= limit and a.passes <= 2 * limit)  # faint columns, again
