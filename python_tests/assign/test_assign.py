"""`assign`: parity with float64 Sinkhorn, properties, hard inputs, refusals."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sela_ext
from sela_ext.assign import UnbalancedLabelsWarning, anderson, problem
from sela_ext.assign.solve import assign_silently
from sela_ext.errors import DataError, OptionError

LAM = 25.0


def gaussian_logits(rows, cols, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(dtype)


def peaked_logits(rows, cols, seed=0, classes=40, sharpness=3.0):
    """Logits as after some training: images of a class share their favourite clusters; spans of hundreds of nats."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, 24))
    features = centres[rng.integers(classes, size=rows)] + 0.5 * rng.standard_normal((rows, 24))
    weight = rng.standard_normal((24, cols)) / np.sqrt(24)
    return (sharpness * (features @ weight + 0.3 * rng.standard_normal(cols))).astype(np.float32)


def official_linear_space(logits, lam):
    """The authors' rule, written from their description: float64, linear space, P^lambda."""
    p = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    kernel = (p / p.sum(axis=1, keepdims=True)) ** lam  # [N, K]
    rows, cols = kernel.shape
    c = np.full(rows, 1.0 / rows)
    error, iterations = np.inf, 0
    while error > 0.1:
        r = (1.0 / cols) / (kernel.T @ c)
        c_new = (1.0 / rows) / (kernel @ r)
        if iterations % 10 == 0:
            error = np.abs(c / c_new - 1).sum()
        c = c_new
        iterations += 1
    return np.argmax(kernel * r * c[:, None], axis=1), iterations


def log_space_sinkhorn(logits, lam, tol, shares, weights=None, limit=5000):
    """Float64 alternating Sinkhorn from g = 0; returns labels, potential and the number of evaluations."""
    t = lam * logits.astype(np.float64)
    a = np.ones(len(t)) / len(t) if weights is None else weights / weights.sum()
    g = np.zeros(t.shape[1])
    passes = 0
    while passes < limit:
        passes += 1
        score = t + g
        top = score.max(axis=1, keepdims=True)
        p = np.exp(score - top)
        p /= p.sum(axis=1, keepdims=True)
        col = a @ p
        if np.abs(col - shares).sum() <= tol:
            break
        g = g + np.log(shares) - np.log(col)
    return score.argmax(axis=1), g, passes


def test_labels_equal_the_official_ones_at_the_official_stop():
    logits = gaussian_logits(3000, 100)
    expected, iterations = official_linear_space(logits, LAM)
    for given_logits in (logits, logits.astype(np.float64), torch.from_numpy(logits)):
        a = sela_ext.assign(given_logits, stop="official")
        assert a.converged
        assert int((np.asarray(a.labels) != expected).sum()) == 0
        assert a.passes == iterations + 1  # and one read for the log-softmax


def test_float32_labels_equal_the_official_ones():
    logits = gaussian_logits(3000, 100)
    expected, _ = official_linear_space(logits, LAM)
    for method in ("sinkhorn", "anderson"):
        a = sela_ext.assign(logits, tol=1e-6, method=method)
        assert a.converged
        assert int((a.labels != expected).sum()) == 0


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("logits", [gaussian_logits(3000, 100), peaked_logits(2000, 33)], ids=["gaussian", "peaked"])
def test_sinkhorn_takes_as_many_passes_as_float64_does(logits, tol):
    shares = np.full(logits.shape[1], 1 / logits.shape[1])
    labels, _, passes = log_space_sinkhorn(logits, LAM, tol, shares)
    a = sela_ext.assign(logits, tol=tol, method="sinkhorn")
    assert a.converged
    assert a.passes == passes == len(a.history)
    assert int((a.labels != labels).sum()) == 0


def test_error_is_the_true_one():
    logits = peaked_logits(1500, 64)
    a = sela_ext.assign(logits, tol=1e-5)
    t = LAM * logits.astype(np.float64) + a.potential
    p = np.exp(t - t.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    true = np.abs(p.mean(axis=0) - 1 / 64).sum()
    assert a.error <= 1e-5
    assert a.error == pytest.approx(true, abs=1e-6)
    lse = np.log(np.exp(t - t.max(axis=1, keepdims=True)).sum(axis=1)) + t.max(axis=1)
    assert a.objective == pytest.approx(a.potential.mean() - lse.mean(), rel=1e-6)
    assert np.array_equal(a.labels, t.argmax(axis=1))


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 12.0])
def test_anderson_reaches_1e_6_in_float32(sharpness):
    logits = peaked_logits(4000, 100, sharpness=sharpness)
    a = sela_ext.assign(logits, tol=1e-6, method="anderson")
    assert a.converged
    assert a.method == "anderson"
    t = LAM * logits.astype(np.float64) + a.potential
    p = np.exp(t - t.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    assert np.abs(p.mean(axis=0) - 0.01).sum() <= 2e-6


def test_anderson_needs_fewer_passes_than_sinkhorn():
    logits = peaked_logits(3000, 64)
    anderson = sela_ext.assign(logits, tol=1e-4, method="anderson")
    sinkhorn = sela_ext.assign(logits, tol=1e-4, method="sinkhorn", max_passes=2000)
    assert anderson.converged
    assert anderson.passes < sinkhorn.passes / 3


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    shift=st.floats(-50, 50, width=32),
    lam=st.floats(0.5, 30),
)
def test_labels_are_unchanged_by_a_row_shift(rows, cols, seed, shift, lam):
    logits = np.random.default_rng(seed).standard_normal((rows, cols))
    shifts = shift * np.random.default_rng(seed + 1).standard_normal((rows, 1))
    a = sela_ext.assign(logits, lam=lam, tol=1e-2, method="sinkhorn", max_passes=200)
    b = sela_ext.assign(logits + shifts, lam=lam, tol=1e-2, method="sinkhorn", max_passes=200)
    np.testing.assert_allclose(a.potential, b.potential, atol=1e-8)
    # With fewer rows than clusters all may tie (a single row is spread as the marginals ask): rounding decides.
    best = np.sort(lam * logits + a.potential, axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-6 if cols > 1 else np.ones(rows, bool)
    assert np.array_equal(a.labels[clear], b.labels[clear])
    # A plan is a forest of rows and clusters: with fewer rows than clusters every row may be divided.
    assert clear.any() or rows < cols


# D22
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_threads_do_not_change_a_bit(dtype):
    logits = torch.from_numpy(peaked_logits(2000, 101)).to(dtype)
    results = [sela_ext.assign(logits, threads=threads, max_passes=20, tol=0) for threads in (1, 2, 3, 4, 7)]
    for other in results[1:]:
        assert torch.equal(other.labels, results[0].labels)
        assert torch.equal(other.potential, results[0].potential)
        assert other.error == results[0].error


def test_marginals_give_clusters_their_shares():
    logits = gaussian_logits(2000, 10)
    sizes = np.arange(1, 11)
    a = sela_ext.assign(logits, marginals=sizes, tol=1e-5)
    shares = sizes / sizes.sum()
    labels, _, _ = log_space_sinkhorn(logits, LAM, 1e-7, shares)
    assert a.converged
    assert int((a.labels != labels).sum()) <= 1
    assert np.abs(a.sizes - 2000 * shares).max() < 15
    official = sela_ext.assign(logits, marginals=sizes, stop="official")
    assert int((official.labels != labels).sum()) == 0


def test_row_weights_count_and_zero_weight_rows_are_labelled():
    logits = gaussian_logits(900, 12)
    weights = np.random.default_rng(3).integers(0, 3, 900).astype(np.float64)
    labels, _, _ = log_space_sinkhorn(logits, LAM, 1e-6, np.full(12, 1 / 12), weights)
    for stop in ("l1", "official"):
        a = sela_ext.assign(logits, row_weights=weights, tol=1e-6, stop=stop)
        assert a.converged
        assert np.array_equal(a.labels, labels)
    repeated = sela_ext.assign(np.repeat(logits, weights.astype(int), axis=0), tol=1e-6)
    np.testing.assert_allclose(a.potential, repeated.potential, atol=1e-2)


def test_a_warm_start_is_taken():
    logits = gaussian_logits(2000, 50)
    cold = sela_ext.assign(logits, tol=1e-4)
    for start in (cold, cold.potential, cold.potential + 7.0, torch.from_numpy(cold.potential)):
        warm = sela_ext.assign(logits, tol=1e-4, start=start)
        assert warm.passes == 1
        assert np.array_equal(warm.labels, cold.labels)
    later = sela_ext.assign(logits + 0.01 * gaussian_logits(2000, 50, seed=1), tol=1e-3, start=cold)
    assert later.passes < cold.passes


def test_predict_labels_new_images_and_repeats_the_old_ones():
    logits = peaked_logits(500, 20)
    for given_logits in (logits, torch.from_numpy(logits)):
        a = sela_ext.assign(given_logits)
        assert type(a.predict(given_logits)) is type(given_logits)
        assert np.array_equal(a.predict(given_logits), a.labels)
        assert np.array_equal(a.predict(given_logits[7:9]), a.labels[7:9])
    bad = logits[:3].copy()
    bad[1, 0] = np.nan
    assert a.predict(bad)[1] == -1
    with pytest.raises(DataError, match="expected 20 columns, as in the solve, found 19"):
        a.predict(logits[:, :19])


def test_soft_predictions_are_the_rows_of_the_plan(tmp_path):
    logits = peaked_logits(5001, 20)
    a = sela_ext.assign(logits)
    t = LAM * logits.astype(np.float64) + a.potential
    plan = np.exp(t - t.max(axis=1, keepdims=True))
    plan /= plan.sum(axis=1, keepdims=True)
    np.save(tmp_path / "logits.npy", logits)
    for given_logits in (logits, torch.from_numpy(logits), np.load(tmp_path / "logits.npy", mmap_mode="r")):
        soft = a.predict(given_logits, soft=True)
        assert isinstance(soft, torch.Tensor) == isinstance(given_logits, torch.Tensor)
        np.testing.assert_allclose(soft, plan, atol=1e-5)
    assert a.predict(logits.astype(np.float64), soft=True).dtype == np.float64
    assert a.predict(logits[:0], soft=True).shape == (0, 20)
    bad = logits[:3].copy()
    bad[0, 0], bad[1, 1], bad[2] = np.nan, np.inf, -np.inf
    assert (a.predict(bad, soft=True) == 0).all()
    assert np.array_equal(a.predict(np.load(tmp_path / "logits.npy", mmap_mode="r")), a.labels)


def test_every_field_is_there_and_of_the_kind_of_the_input():
    logits = gaussian_logits(300, 7)
    a = sela_ext.assign(logits)
    names = {field.name for field in dataclasses.fields(a)}
    assert names >= {"labels", "potential", "error", "converged", "passes", "sizes", "objective", "seconds"}
    assert names >= {"backend", "method", "reason", "history", "masked", "ties", "lam"}
    assert (a.labels.dtype, a.potential.dtype, a.sizes.dtype) == (np.int32, np.float64, np.int64)
    assert a.backend == "cpu-" + sela_ext.build_info()["cpu_isa"]
    assert a.sizes.sum() == 300
    assert [h["passes"] for h in a.history] == list(range(1, int(a.passes) + 1))
    assert a.history[-1]["error"] == a.error
    t = sela_ext.assign(torch.from_numpy(logits))
    assert (t.labels.dtype, t.potential.dtype, t.sizes.dtype) == (torch.int32, torch.float64, torch.int64)
    assert np.array_equal(t.labels.numpy(), a.labels)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.error = 0.0


def test_memory_mapped_logits_are_solved_in_place(tmp_path):
    logits = gaussian_logits(700, 31)
    np.save(tmp_path / "logits.npy", logits)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    assert np.array_equal(sela_ext.assign(mapped).labels, sela_ext.assign(logits).labels)


def test_the_function_is_not_hidden_by_its_package():
    import sela_ext.assign.solve

    assert callable(sela_ext.assign)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 31), (31, 1), (3, 10), (33, 1001), (129, 33)])
def test_awkward_sizes_work(rows, cols):
    for method in ("sinkhorn", "anderson", "newton"):
        a = sela_ext.assign(gaussian_logits(rows, cols), method=method, max_passes=300)
        assert a.labels.shape == (rows,)
        assert a.sizes.shape == (cols,)
        assert np.isfinite(a.error)
        assert a.passes <= 300


# ---- D18: bad rows.


# D18
@pytest.mark.parametrize("stop", ["l1", "official"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_d18_bad_rows_are_masked_and_the_others_keep_their_labels(dtype, stop):
    logits = gaussian_logits(800, 33, dtype=dtype)
    spoiled = logits.copy()
    spoiled[3, 4] = np.nan
    spoiled[100] = -np.inf
    spoiled[500, 32] = np.inf
    spoiled[799] = np.nan
    good = np.setdiff1d(np.arange(800), [3, 100, 500, 799])
    a = sela_ext.assign(spoiled, stop=stop, tol=1e-6 if dtype != np.float64 else 1e-9)
    alone = sela_ext.assign(logits[good], stop=stop, tol=1e-6 if dtype != np.float64 else 1e-9)
    assert a.masked == 4
    assert a.converged
    assert (a.labels[[3, 100, 500, 799]] == -1).all()
    assert np.array_equal(a.labels[good], alone.labels)
    assert a.sizes.sum() == 796
    # with the potential of the whole, the good rows' labels are the same to the bit
    clean = sela_ext.assign(logits, start=a.potential, tol=2.0, method="sinkhorn")
    assert np.array_equal(a.labels[good], clean.labels[good])


# D18
@pytest.mark.parametrize("stop", ["l1", "official"])
def test_d18_single_minus_infinity_is_legal(stop):
    logits = gaussian_logits(600, 10)
    logits[:200, 0] = -np.inf
    a = sela_ext.assign(logits, stop=stop)
    assert a.converged
    assert a.masked == 0
    assert not (a.labels[:200] == 0).any()
    assert a.sizes.min() > 40


# D18
def test_d18_nothing_but_bad_rows_is_an_error():
    for stop in ("l1", "official"):
        with pytest.raises(DataError, match="3 of 3 rows hold NaN"):
            sela_ext.assign(np.full((3, 4), np.nan, np.float32), stop=stop)


# ---- D19: rows that cannot be told apart, clusters that nobody wants.


# D19
@pytest.mark.parametrize("stop", ["l1", "official"])
@pytest.mark.parametrize("kind", ["zeros", "same", "shifted"])
def test_d19_equal_rows_are_dealt_out_evenly(kind, stop):
    rng = np.random.default_rng(0)
    for rows, cols, dtype in ((100, 10, np.float32), (1001, 33, np.float64), (7, 31, np.float32)):
        row = np.zeros(cols) if kind == "zeros" else rng.standard_normal(cols)
        logits = np.tile(row, (rows, 1))
        if kind == "shifted":
            logits += rng.integers(-3, 3, (rows, 1))
        a = sela_ext.assign(logits.astype(dtype), stop=stop)
        assert a.converged
        assert a.sizes.max() - a.sizes.min() <= 1
        assert a.ties > 0
        assert np.array_equal(a.labels, sela_ext.assign(logits.astype(dtype), stop=stop).labels)


# D19
def test_d19_a_cluster_far_below_all_others_gets_its_share():
    logits = gaussian_logits(1000, 20)
    for depth in (3.0, 20.0, 60.0):
        low = logits.copy()
        low[:, 7] -= depth
        for method in ("sinkhorn", "anderson", "newton"):
            a = sela_ext.assign(low, method=method)
            assert a.converged
            assert a.sizes[7] > 25


# D19
def test_d19_an_impossible_cluster_is_an_explicit_warning():
    logits = gaussian_logits(500, 10)
    logits[:, 3] = -np.inf
    for stop in ("l1", "official"):
        with pytest.warns(
            UnbalancedLabelsWarning, match="1 of 10 clusters receive nothing, the first is 3: its logits"
        ):
            a = sela_ext.assign(logits, max_passes=60, stop=stop)
        assert not a.converged or stop == "official"
        assert stop == "official" or a.passes < 60  # it ends where nothing can be gained
        assert a.sizes[3] == 0
        assert a.sizes[np.arange(10) != 3].min() > 30


# D19
def test_d19_labels_in_one_cluster_are_never_silent():
    logits = gaussian_logits(500, 10)
    logits[:, 3] += 100
    with pytest.warns(UnbalancedLabelsWarning, match="90% of the images are in over-full clusters"):
        a = sela_ext.assign(logits, max_passes=1)
    assert not a.converged


# ---- D20: no convergence.


# D20
@pytest.mark.parametrize("method", ["sinkhorn", "anderson", "newton"])
def test_d20_not_converged_is_said_and_the_limit_is_kept(method):
    logits = peaked_logits(1000, 50)
    a = sela_ext.assign(logits, tol=1e-9, max_passes=6, method=method)
    assert not a.converged
    assert 6 <= a.passes < 7  # single columns may be read once more
    assert a.error > 1e-9
    assert (a.labels >= 0).all()
    zero = sela_ext.assign(logits, tol=0, max_passes=9, method=method)
    assert int(zero.passes) == len(zero.history) == 9


# D20
def test_d20_the_official_rule_has_a_limit_too():
    a = sela_ext.assign(peaked_logits(1000, 50), stop="official", max_passes=12)
    assert not a.converged
    assert a.passes == 12


def test_anderson_returns_its_best_point():
    a = sela_ext.assign(peaked_logits(2000, 64, sharpness=8.0), tol=0, max_passes=25, method="anderson")
    assert a.error == min(h["error"] for h in a.history)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, 'method: expected one of "auto", "newton", "anderson", "sinkhorn", found \'best\''),
        ({"stop": "never"}, 'stop: expected one of "l1", "official"'),
        ({"balance": "even"}, 'balance: expected one of "argmax", "exact", found \'even\''),
        ({"storage": "fixed8"}, "storage: expected one of"),
        ({"relax": 0.0}, "relax: expected a number in 1e-06 .. 1e.06, found 0.0"),
        ({"relax": 1.0, "size_bounds": (1, 2)}, "relax, size_bounds: expected one of them, found both"),
        ({"relax": 1.0, "balance": "exact"}, 'expected stop "l1" and balance "argmax" with them'),
        ({"size_bounds": (1, 2), "stop": "official"}, 'expected stop "l1" and balance "argmax" with them'),
        ({"size_bounds": 3}, r"size_bounds: expected \(low, high\), found 3"),
        ({"size_bounds": (2, 1)}, "size_bounds: expected 0 <= low <= high"),
        ({"size_bounds": (2, 3)}, "expected bounds whose sums lie around the 4 images, found 6 and 9"),
        ({"group": object()}, "group: expected torch.distributed to be started, found that it is not"),
        ({"lam": 0}, "lam: expected a number in 1e-06 .. 1e.06, found 0"),
        ({"lam": float("nan")}, "lam: expected a number"),
        ({"tol": -1}, "tol: expected a number in 0 .. 2, found -1"),
        ({"max_passes": 0}, "max_passes: expected an integer in 1 .. 1e9, found 0"),
        ({"marginals": [1, 2]}, r"marginals: expected shape \(3,\), found \(2,\)"),
        ({"marginals": [1, -1, 2]}, "marginals: expected numbers >= 0, one of them above, found -1.0 at 1"),
        ({"marginals": [1, float("inf"), 2]}, "marginals: expected finite numbers, found inf at 1"),
        ({"row_weights": [0, 0, 0, 0]}, "row_weights: expected at least one number > 0"),
        ({"row_weights": [1, -1, 1, 1]}, "row_weights: expected numbers >= 0"),
        ({"start": [0.0]}, r"start: expected shape \(3,\), found \(1,\)"),
        ({"stop": "official", "start": [0.0] * 3}, "and no start"),
        ({"stop": "official", "method": "newton"}, 'stop="official": expected method "auto" or "sinkhorn"'),
    ],
)
def test_options_are_refused_in_one_line(options, message):
    with pytest.raises(OptionError, match=message) as refusal:
        sela_ext.assign(np.zeros((4, 3), np.float32), **options)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_wrong_logits_are_refused():
    for wrong in ([[1.0, 2.0]], np.zeros(3, np.float32), np.zeros((2, 2), np.int32), np.zeros((0, 3), np.float32)):
        with pytest.raises(DataError, match="logits: expected"):
            sela_ext.assign(wrong)


def test_anderson_leaves_a_circle_by_plain_iterations(monkeypatch):
    rng = np.random.default_rng(241)
    cols, rows = rng.integers(3, 6), rng.integers(8, 16)
    logits = (2.0 * rng.standard_normal((rows, cols))).astype(np.float32)
    assert sela_ext.assign(logits, tol=1e-5, method="anderson").converged
    monkeypatch.setattr(problem.Problem, "passes_to_spare", lambda *_: 0)  # as for large problems
    assert sela_ext.assign(logits, tol=1e-5, method="anderson").converged
    monkeypatch.setattr(anderson, "STALLED", 10**9)
    assert sela_ext.assign(logits, tol=1e-5, method="anderson").error > 0.1, "the case still goes in circles without"


def test_what_assign_warns_of_is_in_its_result_and_silently_only_there():
    logits = np.random.default_rng(0).standard_normal((100, 5)).astype(np.float32)
    logits[:, 3] = -np.inf
    with pytest.warns(UnbalancedLabelsWarning, match="the first is 3") as caught:
        found = sela_ext.assign(logits)
    assert [str(one.message) for one in caught] == list(found.warnings)
    assert caught[0].filename == __file__  # it points to who called
    assert assign_silently(logits).warnings == found.warnings  # a warning would be an error here
    assert sela_ext.assign(logits[:, :3]).warnings == ()


def test_images_that_exact_sizes_force_into_impossible_clusters_are_counted_without_those_of_weight_0():
    logits = np.zeros((7, 2), np.float32)
    logits[:5, 1] = -np.inf
    weights = np.array([1, 1, 1, 1, 1, 1, 0])
    with pytest.warns(UnbalancedLabelsWarning, match="2 of 6 images had to be given clusters that are impossible"):
        found = sela_ext.assign(logits, balance="exact", row_weights=weights)
    assert found.sizes.tolist() in ([3, 4], [4, 3])


def test_labels_and_potential_are_the_same_for_an_array_and_a_tensor_on_the_same_memory():
    logits = np.random.default_rng(1).standard_normal((1001, 33)).astype(np.float32)
    array, tensor = sela_ext.assign(logits), sela_ext.assign(torch.from_numpy(logits).requires_grad_())
    assert np.array_equal(array.labels, tensor.labels.numpy())
    assert array.potential.tobytes() == tensor.potential.numpy().tobytes()
    assert tensor.potential.dtype == torch.float64
