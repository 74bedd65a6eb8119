"""The accelerated step is its twin's, and many passes in one call are the same iteration as pass by pass."""

import itertools

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import kernels
from sela_ext.assign import anderson, problem
from sela_ext.errors import OptionError
from sela_ext.kernels import reference
from sela_ext.kernels.anderson import anderson_passes


def peaked(rows, cols, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((cols, 8))
    points = centres[rng.integers(0, cols, rows) ** 2 % cols] + 0.6 * rng.standard_normal((rows, 8))
    return (spread * points @ centres.T / 8).astype(np.float32)


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 1), (1, 31), (3, 2), (10, 10), (10, 33), (10, 1001), (63, 64)])
def test_step_is_that_of_the_twin(count, size):
    rng = np.random.default_rng(count + size)
    f, steps, changes = rng.standard_normal(size), *rng.standard_normal((2, count, size))
    found = kernels.anderson_step(f, steps, changes)
    if count <= size:
        np.testing.assert_allclose(found, reference.anderson_step(f, steps, changes), rtol=1e-7, atol=1e-9)
    else:  # many gammas do: the best fit is the same, which step it is is not
        gamma = np.linalg.lstsq((steps + changes).T, f - found, rcond=None)[0]
        np.testing.assert_allclose((steps + changes).T @ gamma, f - found, atol=1e-9)


def test_changes_that_say_the_same_count_once():
    rng = np.random.default_rng(0)
    f, steps, changes = rng.standard_normal(20), *rng.standard_normal((2, 4, 20))
    again = np.array([0, 1, 1, 2, 3, 3])
    found = kernels.anderson_step(f, steps[again], changes[again])
    np.testing.assert_allclose(found, kernels.anderson_step(f, steps, changes), atol=1e-9)
    assert kernels.anderson_step(f, np.ones((2, 20)), np.zeros((2, 20))).tolist() == f.tolist()


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1.0, 1e8, 1e150])
def test_the_size_of_changes_does_not_matter(scale):
    rng = np.random.default_rng(1)
    f, steps, changes = rng.standard_normal(20), *rng.standard_normal((2, 4, 20))
    found = kernels.anderson_step(f, scale * steps, scale * changes)
    np.testing.assert_allclose(found, kernels.anderson_step(f, steps, changes), rtol=1e-9)


def test_step_solves_a_linear_problem_exactly():
    rng = np.random.default_rng(0)
    matrix, solution = 0.5 * rng.standard_normal((4, 4)), rng.standard_normal(4)

    def residual(x):
        return matrix @ (x - solution)

    points = [np.zeros(4)] + [rng.standard_normal(4) for _ in range(4)]
    steps = np.array([b - a for a, b in itertools.pairwise(points)])
    changes = np.array([residual(b) - residual(a) for a, b in itertools.pairwise(points)])
    last = points[-1]
    np.testing.assert_allclose(last + kernels.anderson_step(residual(last), steps, changes), solution, atol=1e-8)


@pytest.mark.parametrize(
    ("steps", "changes"), [(np.zeros((1, 3)), np.zeros((2, 3))), (np.zeros((1, 4)),) * 2, (np.zeros((64, 3)),) * 2]
)
def test_step_refuses_what_does_not_fit_together(steps, changes):
    with pytest.raises(OptionError, match=r"steps and changes: expected \[m, K\]"):
        kernels.anderson_step(np.zeros(3), steps, changes)


def watched(logits, **options):
    """The same solve pass by pass: somebody looks at every pass."""
    seen = []
    found = sela_ext.assign(logits, progress=seen.append, **options)
    assert len(seen) == len(found.history)
    return found


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (31, 2), (33, 10), (1001, 31), (1437, 128)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_many_passes_in_one_call_are_the_iteration_pass_by_pass(rows, cols, dtype):
    logits = peaked(rows, cols).astype(dtype)
    options = {"method": "anderson", "tol": 1e-4, "threads": 1}
    once, single = sela_ext.assign(logits, **options), watched(logits, **options)
    assert once.converged
    assert once.passes == single.passes
    np.testing.assert_array_equal(once.potential, single.potential)
    np.testing.assert_array_equal(once.labels, single.labels)
    for name in ("passes", "error", "objective"):
        assert [entry[name] for entry in once.history] == [entry[name] for entry in single.history]
    errors = [entry["error"] for entry in once.history]
    assert errors[-1] == once.error
    assert [entry["passes"] for entry in once.history] == list(range(1, len(errors) + 1))
    seconds = [entry["seconds"] for entry in once.history]
    assert seconds == sorted(seconds)


def test_the_result_is_that_of_one_pass_at_its_potential():
    logits, weights = peaked(500, 20), np.linspace(0, 3, 500, dtype=np.float32)
    logits[7] = np.nan
    found = sela_ext.assign(logits, method="anderson", row_weights=weights, threads=1)
    assert found.converged
    one = kernels.sinkhorn_pass(logits, found.potential, scale=25.0, row_weights=weights, want_labels=True)
    np.testing.assert_array_equal(found.labels, one.labels)
    assert found.masked == one.masked == 1
    assert np.abs(one.column_sums / one.weight - 1 / 20).sum() == pytest.approx(found.error, rel=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads):
    logits = peaked(1437, 33)
    one, many = (sela_ext.assign(logits, method="anderson", threads=n) for n in (1, threads))
    np.testing.assert_array_equal(one.potential, many.potential)
    np.testing.assert_array_equal(one.labels, many.labels)
    assert [e["error"] for e in one.history] == [e["error"] for e in many.history]


def test_a_copy_in_sixteen_bits_and_tensors_take_the_same_way():
    logits = peaked(1001, 31)
    plain = sela_ext.assign(logits, method="anderson")
    stored = sela_ext.assign(logits, method="anderson", storage="float16")
    tensor = sela_ext.assign(torch.from_numpy(logits), method="anderson")
    assert stored.converged
    assert (stored.labels == plain.labels).mean() > 0.995
    assert isinstance(tensor.labels, torch.Tensor)
    np.testing.assert_array_equal(tensor.labels.numpy(), plain.labels)


def calls_of(monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(anderson_passes(*arguments, **options))
        return calls[-1]

    monkeypatch.setattr(problem, "anderson_passes", counted)
    return calls


def test_small_problems_take_one_call_and_others_none(monkeypatch):
    calls = calls_of(monkeypatch)
    logits = peaked(300, 10)
    options = {"method": "anderson", "threads": 1}
    assert sela_ext.assign(logits, **options).converged
    assert len(calls) == 1
    assert calls[0].converged
    sela_ext.assign(logits, marginals=[0.0] + [1 / 9] * 9, **options)
    sela_ext.assign(logits, relax=1.0, **options)
    sela_ext.assign(logits, size_bounds=(20, 40), **options)
    sela_ext.assign(logits, max_passes=2, **options)
    sela_ext.assign(logits, tol=0, max_passes=5, **options)
    watched(logits, **options)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["RESTART", "PATIENCE", "STEP_CAP"])
def test_odd_ends_are_the_same_pass_by_pass(monkeypatch, name):
    monkeypatch.setattr(anderson, name, {"RESTART": 1.0, "PATIENCE": 2, "STEP_CAP": 0.01}[name])
    logits = peaked(2000, 64, spread=1.5)
    once, single = (assign(logits, method="anderson", tol=1e-5, threads=1) for assign in (sela_ext.assign, watched))
    assert [entry["error"] for entry in once.history] == [entry["error"] for entry in single.history]
    np.testing.assert_array_equal(once.labels, single.labels)


def test_what_does_not_converge_in_one_call_goes_on_pass_by_pass(monkeypatch):
    calls = calls_of(monkeypatch)
    monkeypatch.setattr(anderson, "RESTART", 0.5)  # an error that is not half the best one ends the call
    logits = peaked(2000, 64, spread=1.5)
    found = sela_ext.assign(logits, method="anderson", tol=1e-4, threads=1)
    assert len(calls) == 1
    assert not calls[0].converged
    assert found.converged
    assert found.passes > len(calls[0].errors)


@pytest.mark.filterwarnings("ignore:assign")
def test_no_more_passes_than_allowed(monkeypatch):
    calls = calls_of(monkeypatch)
    logits = peaked(2000, 64, spread=1.5)
    for most in (4, 5, 9):
        found = sela_ext.assign(logits, method="anderson", tol=1e-9, max_passes=most, threads=1)
        assert found.passes <= most
        assert not found.converged
        assert (found.labels >= 0).all()
    assert len(calls) == 3


def test_a_column_that_is_nearly_empty_ends_the_call():
    logits = peaked(400, 12)
    logits[:, 3] -= 60  # 1,500 nats
    with_few = sela_ext.assign(logits, method="anderson", tol=1e-6, threads=1)
    assert with_few.converged
    assert with_few.sizes.min() > 0


def test_more_differences_than_the_memory_are_refused():
    logits = peaked(100, 4)
    prepared = kernels.sinkhorn.CpuPass(logits)
    vectors = [np.full(4, 0.25), np.zeros(4), np.zeros(4)]
    with pytest.raises(OptionError, match=r"memory: expected 1 \.\. 63 and at least the 3 steps given, found 2"):
        anderson_passes(
            prepared, *vectors, 1.0, scale=25.0, reference=None, steps=np.zeros((3, 4)), changes=np.zeros((3, 4)),
            tolerance=1e-4, passes=5, memory=2,
        )  # fmt: skip
