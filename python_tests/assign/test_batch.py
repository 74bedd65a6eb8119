"""`assign_batch`: the published iteration where that does not overflow, and finite targets where it does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sela_ext
from sela_ext.errors import DataError, OptionError


def published(scores, queue=None, iterations=3, epsilon=0.05):
    """The published iteration, in linear space and float64, prototypes first."""
    q = np.exp(np.concatenate([scores] if queue is None else [scores, queue]).astype(np.float64) / epsilon).T
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= prototypes
        q /= q.sum(axis=0, keepdims=True)
        q /= samples
    return (q * samples).T[: len(scores)]


def cosines(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((rows, 16)), rng.standard_normal((cols, 16))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 33),
    past=st.integers(0, 40),
    iterations=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)
def test_targets_are_the_published_ones(rows, cols, past, iterations, seed):
    scores = cosines(rows + past, cols, seed)
    scores, queue = scores[:rows], scores[rows:]
    expected = published(scores, queue, iterations)
    found = sela_ext.assign_batch(scores, queue=queue, iterations=iterations)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    single = sela_ext.assign_batch(scores.astype(np.float32), queue=queue.astype(np.float32), iterations=iterations)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, atol=1e-4)
    if not past:
        np.testing.assert_array_equal(sela_ext.assign_batch(scores, iterations=iterations), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0, 6e4])
def test_nothing_overflows_in_any_type(dtype, size):
    scores = (size * torch.from_numpy(cosines(101, 31))).to(dtype)
    targets = sela_ext.assign_batch(scores, queue=scores[:7] * 0.5)
    assert targets.dtype == dtype
    assert targets.shape == (101, 31)
    assert bool(torch.isfinite(targets).all())
    assert bool((targets >= 0).all())
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        targets.double().sum(1), torch.ones(101, dtype=torch.float64), atol=16 * rounding, rtol=0
    )
    if size <= 1:
        same = published(scores.double().numpy(), scores[:7].double().numpy() * 0.5)
        np.testing.assert_allclose(targets.double().numpy(), same, atol=4 * max(rounding, 1e-5))


def test_many_iterations_balance_batch_and_queue_together():
    scores = cosines(300, 12)
    together = sela_ext.assign_batch(scores, iterations=3000)
    np.testing.assert_allclose(together.sum(axis=0), 300 / 12, atol=1e-6)
    sizes = np.arange(1, 13)
    wanted = sela_ext.assign_batch(scores, iterations=3000, marginals=sizes)
    np.testing.assert_allclose(wanted.sum(axis=0), 300 * sizes / sizes.sum(), atol=1e-6)
    a = sela_ext.assign(scores, lam=20.0, tol=1e-10, max_passes=3000)
    assert np.array_equal(together.argmax(axis=1), a.labels)
    parts = [sela_ext.assign_batch(scores[:100], queue=scores[100:], iterations=3000)]
    np.testing.assert_allclose(parts[0], together[:100], atol=1e-12)


def test_bad_rows_get_zeros_and_leave_the_others_alone():
    scores = cosines(60, 9)
    bad = scores.copy()
    bad[3, 4], bad[20], bad[41, 0] = np.nan, -np.inf, np.inf
    rest = np.setdiff1d(np.arange(60), [3, 20, 41])
    queue = np.full((5, 9), np.nan)
    found = sela_ext.assign_batch(bad, queue=queue)
    assert (found[[3, 20, 41]] == 0).all()
    np.testing.assert_array_equal(found[rest], sela_ext.assign_batch(scores[rest]))
    assert (sela_ext.assign_batch(np.full((4, 3), np.nan)) == 0).all()


def test_impossible_clusters_get_nothing():
    scores = cosines(60, 9)
    scores[:, 2] = -np.inf
    scores[:30, 5] = -np.inf
    found = sela_ext.assign_batch(scores, iterations=200)
    assert (found[:, 2] == 0).all()
    assert (found[:30, 5] == 0).all()
    assert found[30:, 5].sum() > 5
    np.testing.assert_allclose(found.sum(axis=1), 1.0)


def test_kinds_and_awkward_shapes():
    for rows, cols in ((0, 3), (1, 1), (1, 31), (33, 1)):
        scores = np.zeros((rows, cols), np.float32)
        assert sela_ext.assign_batch(scores).shape == (rows, cols)
    scores = torch.from_numpy(cosines(20, 5)).requires_grad_()
    targets = sela_ext.assign_batch(scores)
    assert not targets.requires_grad
    assert isinstance(sela_ext.assign_batch(cosines(20, 5)[::2, ::-1]), np.ndarray)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iterations": 0}, OptionError, "iterations: expected an integer in 1 .. 1e6, found 0"),
        ({"iterations": 2.5}, OptionError, "iterations: expected an integer"),
        ({"lam": 0.0}, OptionError, "lam: expected a number in"),
        ({"lam": float("inf")}, OptionError, "lam: expected a number in"),
        ({"marginals": [1, 2]}, OptionError, "marginals: expected shape"),
        ({"queue": np.zeros((4, 2), np.float32)}, DataError, r"queue: expected a numpy array \[Q, 3\]"),
        ({"queue": torch.zeros(4, 3)}, DataError, r"queue: expected a numpy array \[Q, 3\]"),
        ({"queue": np.zeros((4, 3), np.int32)}, DataError, "expected float32, float16"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        sela_ext.assign_batch(np.zeros((5, 3), np.float32), **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_targets_equal_cpu_targets():
    scores = torch.from_numpy(cosines(64, 30)).float()
    found = sela_ext.assign_batch(scores.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), sela_ext.assign_batch(scores), atol=1e-5, rtol=1e-4)
