"""Chunk bounds spare reading, and change no bit of any result."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sela_ext
from sela_ext import kernels
from sela_ext.errors import OptionError

ISAS = ("generic", "avx2", "avx512")
BEST = ISAS.index(sela_ext.build_info()["cpu_isa"])
KINDS = ("float32", "float16", "bfloat16", "fixed16", "stored float16", "stored bfloat16")


def as_kind(logits, kind):
    if kind == "fixed16" or kind.startswith("stored"):
        return kernels.store_logits(logits, kind.removeprefix("stored "), lam=1.0)
    return logits.to(getattr(torch, kind))


def same_bits(one, other):
    for name in ("column_sums", "lse", "labels"):
        a, b = (np.asarray(getattr(s, name)) for s in (one, other))
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.exact, other.exact)
    assert (one.objective, one.weight, one.masked, one.live) == (
        other.objective,
        other.weight,
        other.masked,
        other.live,
    )
    if one.candidates is not None:
        for name in ("offsets", "columns", "values"):
            np.testing.assert_array_equal(getattr(one.candidates, name)(), getattr(other.candidates, name)())


def peaked(rows, cols, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, cols, generator=generator)
    return logits, spread * torch.randn(cols, generator=generator, dtype=torch.float64)


def spoil(logits):
    rows, cols = logits.shape
    for row, place, value in ((3, 0, np.nan), (17, cols - 1, np.inf), (42, cols // 2, np.nan), (43, 5, -np.inf)):
        logits[row % rows, place] = value
    logits[rows // 2] = -np.inf
    logits[rows - 1, ::3] = -np.inf
    return logits


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (300, 257), (389, 1001), (130, 3000), (5, 70_001)])
def test_bits_are_the_same_with_bounds_and_without(isa, kind, rows, cols):
    for spread, bad in ((0.05, False), (3.0, True), (40.0, True), (40.0, False)):
        logits, potential = peaked(rows, cols, spread)
        if bad:
            spoil(logits)
        x = as_kind(logits, kind)
        bounds = kernels.chunk_bounds(x)
        arguments = {"want_labels": True, "isa": isa, "row_weights": np.linspace(0, 2, rows)}
        before = None
        moves = np.random.default_rng(1).standard_normal((6, cols))
        for k, size in enumerate((0.0, 0.0, 1.0, 20.0, 100.0, 3.0)):
            keep = 16.0 if k % 2 else None
            g = potential.numpy() + size * moves[k]
            scale = (1.0, 1.0, 0.3, 1.0, 2.0, 1.0)[k]
            plain = kernels.sinkhorn_pass(x, g, reference=before, scale=scale, keep=keep, **arguments)
            found = kernels.sinkhorn_pass(x, g, reference=before, scale=scale, keep=keep, bounds=bounds, **arguments)
            assert bounds.complete
            same_bits(found, plain)
            before = plain.lse


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 140),
    st.integers(256, 700),
    st.floats(-2, 3),
    st.floats(-2, 3),
    st.integers(0, 2**31),
)
def test_bits_are_the_same_for_any_numbers(kind, rows, cols, log_spread, log_move, seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy((10**log_spread * rng.standard_t(2, (rows, cols))).astype(np.float32))
    for _ in range(rng.integers(0, 4)):
        value = rng.choice([np.nan, np.inf, -np.inf, 0.0, -3e38, 3e38, 1e-42])
        logits[rng.integers(rows), rng.integers(cols)] = float(value)
    x = as_kind(logits, kind)
    bounds = kernels.chunk_bounds(x)
    lse = None
    for k in range(4):
        g = 10**log_move * rng.standard_t(3, cols) + float(rng.choice([0.0, 500.0]))
        reference = None if k == 0 else np.where(rng.random(rows) < 0.1, rng.choice([np.nan, np.inf, -np.inf, 0]), lse)
        arguments = {"reference": reference, "want_labels": True, "keep": 12.0, "scale": float(rng.choice([1.0, 0.25]))}
        plain = kernels.sinkhorn_pass(x, g, **arguments)
        same_bits(kernels.sinkhorn_pass(x, g, bounds=bounds, **arguments), plain)
        lse = np.asarray(plain.lse)


def test_bounds_hold_and_are_tight():
    logits, potential = peaked(200, 1001, 5.0)
    bounds = kernels.chunk_bounds(logits)
    kernels.sinkhorn_pass(logits, potential, bounds=bounds)
    values = (bounds.values.astype(np.uint32) << 16).view(np.float32)
    padded = np.pad(logits.numpy(), ((0, 0), (0, 23)), constant_values=-np.inf)
    top = padded.reshape(200, 32, 32).max(2)
    assert (values >= top).all()
    assert (values <= top + np.abs(top) / 127).all()


def test_threads_strides_and_parts_of_the_rows_change_nothing():
    wide, potential = peaked(1337, 700, 20.0)
    logits = wide[:, 11:690]
    potential = potential[11:690]
    whole = kernels.sinkhorn_pass(logits, potential, want_labels=True)
    bounds = kernels.chunk_bounds(logits)
    few = kernels.sinkhorn_pass(logits, potential, every=3, bounds=bounds)
    assert not bounds.complete  # a pass over some of the rows leaves them
    for threads in (1, 3, 2):
        same_bits(kernels.sinkhorn_pass(logits, potential, want_labels=True, bounds=bounds, threads=threads), whole)
    np.testing.assert_array_equal(
        kernels.sinkhorn_pass(logits, potential, every=3, bounds=bounds).exact,
        few.exact,
    )
    parts = []
    for first, last in ((0, 640), (640, 1337)):
        part = kernels.chunk_bounds(logits[first:last])
        for _ in range(2):
            found = kernels.sinkhorn_pass(
                logits[first:last], potential, want_labels=True, bounds=part, first_row=first, rows_in_all=1337
            )
        parts.append(found)
    same_bits(kernels.add_sums(parts), whole)


def test_peaked_rows_are_mostly_not_read():
    """Chunks that the bounds rule out may hold anything from then on."""
    logits, _ = peaked(256, 1024, 100.0)
    bounds = kernels.chunk_bounds(logits)
    before = kernels.sinkhorn_pass(logits, np.zeros(1024), bounds=bounds)
    assert before.live < 0.1 * logits.numel()
    again = kernels.sinkhorn_pass(logits, np.zeros(1024), bounds=bounds, reference=before.lse)
    far = (logits < logits.amax(1, keepdim=True) - 100).view(256, 32, 32).all(2).repeat_interleave(32, 1)
    assert far.double().mean() > 0.5
    spoiled = torch.where(far, torch.nan, logits)
    found = kernels.sinkhorn_pass(spoiled, np.zeros(1024), bounds=bounds, reference=before.lse)
    assert found.masked <= 5  # rows that look dense where they are probed are read as a whole
    same = ~found.lse.isnan()
    assert torch.equal(found.lse[same], again.lse[same])


def test_there_are_no_bounds_where_they_are_no_use():
    assert kernels.chunk_bounds(np.zeros((3, 255), np.float32)) is None
    assert kernels.chunk_bounds(np.zeros((3, 500))) is None
    assert kernels.bounds_nbytes(3, 500, "float64") == 0
    assert kernels.bounds_nbytes(3, 3000, "float16") == 3 * 96 * 2
    assert kernels.chunk_bounds(np.zeros((3, 3000), np.float16)).nbytes == 3 * 96 * 2


def test_bounds_of_something_else_are_refused():
    x = np.zeros((4, 300), np.float32)
    for other in (x[:3], np.zeros((4, 301), np.float32), x.astype(np.float16)):
        with pytest.raises(OptionError, match="bounds: expected those of"):
            kernels.sinkhorn_pass(x, np.zeros(300), bounds=kernels.chunk_bounds(other))
    with pytest.raises(OptionError, match="bounds: expected ChunkBounds or None, found int"):
        kernels.sinkhorn_pass(x, np.zeros(300), bounds=3)
