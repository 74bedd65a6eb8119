"""Solves on peaked logits use chunk bounds, and end with the same bits."""

import numpy as np
import pytest

import sela_ext
from sela_ext import kernels
from sela_ext.assign import problem, sources


def peaked(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((cols, 16))
    features = centres[rng.integers(0, cols, rows)] + 0.2 * rng.standard_normal((rows, 16))
    return (1.6 * features @ centres.T).astype(np.float32)


@pytest.mark.parametrize("method", ["newton", "anderson", "sinkhorn"])
@pytest.mark.parametrize("storage", ["float32", "fixed16"])
def test_a_solve_ends_with_the_same_bits_with_bounds_and_without(monkeypatch, method, storage):
    logits = peaked(3000, 512)
    options = {"tol": 1e-4, "method": method, "storage": storage, "max_passes": 60}
    made = []

    def bounds_of(array):
        made.append(kernels.chunk_bounds(array))
        return made[-1]

    monkeypatch.setattr(problem, "bounds_of", bounds_of)
    found = sela_ext.assign(logits, **options)
    assert made
    assert all(bounds.complete for bounds in made)
    monkeypatch.setattr(problem, "PEAKED", -1.0)
    before = len(made)
    plain = sela_ext.assign(logits, **options)
    assert len(made) == before
    np.testing.assert_array_equal(found.potential, plain.potential)
    np.testing.assert_array_equal(found.labels, plain.labels)
    assert (found.error, found.passes) == (plain.error, plain.passes)


def test_dense_logits_computed_logits_and_full_memory_get_no_bounds(monkeypatch):
    dense = 0.01 * np.random.default_rng(0).standard_normal((1000, 300)).astype(np.float32)
    monkeypatch.setattr(problem, "bounds_of", lambda array: pytest.fail("dense logits"))
    sela_ext.assign(dense, tol=1e-3)
    assert isinstance(sources.bounds_of(dense), kernels.ChunkBounds)
    assert sources.bounds_of(dense.astype(np.float64)) is None
    assert (
        sources.bounds_of(sela_ext.FeatureLogits(np.ones((10, 3), np.float32), np.ones((300, 3), np.float32))) is None
    )
    monkeypatch.setattr(sources, "available_memory", lambda: 1000)
    assert sources.bounds_of(dense) is None
