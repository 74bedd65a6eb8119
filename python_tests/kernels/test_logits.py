"""Logits stored in 16 bits: equal to the twin's, and passes over them equal to passes over what they stand for."""

import itertools

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import kernels
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import reference
from sela_ext.kernels.logits import KINDS

ISAS = ("generic", "avx2", "avx512")
BEST = ISAS.index(sela_ext.build_info()["cpu_isa"])
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = ((1, 1), (2, 31), (31, 33), (300, 1), (130, 1001), (257, 300))


def case(rows, cols, dtype=torch.float32, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, cols, generator=generator)).to(dtype)
    return logits, spread * torch.randn(cols, generator=generator, dtype=torch.float64)


def spoil(logits):
    """A NaN, both infinities, a row of -inf and single -inf, at the ends and in the middle."""
    rows, cols = logits.shape
    inf = float("inf")
    bad = {0: float("nan"), rows // 3: inf, rows - 1: float("nan"), rows // 2: float("nan")}
    for place, (row, value) in zip(itertools.cycle((cols - 1, 0, cols // 2)), bad.items(), strict=False):
        logits[row, place] = value
    logits[rows // 4] = -inf
    logits[1, ::2] = -inf
    return logits


def assert_same(found, expected):
    np.testing.assert_array_equal(found.values.view(np.uint16), expected.values.view(np.uint16))
    np.testing.assert_array_equal(found.maxima, expected.maxima)
    assert (found.kind, found.lam, found.saturated) == (expected.kind, expected.lam, expected.saturated)


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_stored_bits_are_those_of_the_twin(isa, dtype, kind):
    for (rows, cols), spread, lam in itertools.product(SIZES, (0.1, 10.0, 6e3), (1.0, 25.0)):
        logits, _ = case(rows, cols, dtype, spread)
        if rows > 30:
            spoil(logits)
        expected = reference.store_logits(logits, kind, lam=lam)
        found = kernels.store_logits(logits, kind, lam=lam, isa=isa)
        assert_same(found, expected)
        for threads in (1, 2, 5):
            assert_same(kernels.store_logits(logits, kind, lam=lam, isa=isa, threads=threads), expected)


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_rounding_to_16_bits_is_that_of_torch_for_all_sizes_of_numbers(isa, kind):
    bits = np.random.default_rng(0).integers(0x00800000, 0x7F800000, 40_000, dtype=np.uint32)
    edges = np.float32(
        [6e-8, 2.98e-8, 2.9803e-8, 6.1e-5, 65503, 65504, 65519.9, 65520, 3.3961e38, 3.4e38, 1.00048828125]
    )
    x = -np.concatenate([bits.view(np.float32), edges, np.zeros(1, np.float32)])[None]
    found = kernels.store_logits(x, kind, isa=isa)
    expected = torch.from_numpy(x).to(getattr(torch, kind)).view(torch.int16).numpy().view(np.uint16)
    different = found.values.view(np.uint16) != expected
    assert not (different & ~((expected & 0x7FFF == 0) & (found.values.view(np.uint16) & 0x7FFF == 0))).any()


def test_distances_are_kept_to_half_a_step_and_saturation_is_counted():
    logits = torch.tensor([[0.0, -1.0, -40.959, -40.97, -41.0, -float("inf"), -1e30]])
    stored = kernels.store_logits(logits, lam=25.0)
    assert stored.saturated == 3
    assert stored.values[0].tolist() == [0, 1600, 65534, 65535, 65535, 65535, 65535]
    logits, _ = case(300, 100, spread=3.0)
    stored = kernels.store_logits(logits, lam=25.0)
    assert stored.saturated == 0
    error = np.abs(stored.decoded(0, 300) - logits.double().numpy()) * 25.0
    assert error.max() <= (0.5 + 0.005) / 64
    np.testing.assert_array_equal(stored.decoded(7, 9, [5, 3]), stored.decoded(0, 300)[7:9, [5, 3]])


def test_any_strides_types_of_arrays_and_parts_store_the_same(tmp_path):
    wide = np.random.default_rng(0).standard_normal((50, 200)).astype(np.float32)
    expected = kernels.store_logits(wide[:, 3:180].copy(), lam=3.0)
    np.save(tmp_path / "logits.npy", wide)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    tensor = torch.from_numpy(wide)
    for view in (
        wide[:, 3:180],
        np.asfortranarray(wide)[:, 3:180],
        mapped[:, 3:180],
        wide[:, 3:180].astype(">f4"),
        tensor[:, 3:180],
        tensor.t().contiguous().t()[:, 3:180],
        wide[::-1][::-1, 3:180],
    ):
        assert_same(kernels.store_logits(view, lam=3.0), expected)
    for store in (kernels.store_logits, reference.store_logits):
        out = kernels.empty_stored(50, 177, lam=3.0)
        for first, last in ((0, 20), (20, 21), (21, 50)):
            out = store(wide[first:last, 3:180], lam=3.0, out=out, first_row=first)
        assert_same(out, expected)


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.1, 20.0])
@pytest.mark.parametrize("lam", [10.0, 2.5])
def test_a_pass_over_stored_logits_is_one_over_what_they_stand_for(isa, kind, spread, lam):
    for rows, cols in SIZES:
        logits, potential = case(rows, cols, spread=spread)
        if rows > 30:
            spoil(logits)
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(1))
        stored = kernels.store_logits(logits, kind, lam=10.0)
        arguments = {"scale": lam, "row_weights": weights, "want_labels": True, "keep": 16.0}
        twin = reference.sinkhorn_pass(stored, potential, **arguments)
        decoded = stored.decoded(0, rows)
        exact = reference.sinkhorn_pass(np.where(np.isnan(decoded[:, :1]), np.nan, decoded), potential, **arguments)
        before = None
        for _ in range(3):
            found = kernels.sinkhorn_pass(stored, potential, isa=isa, reference=before, **arguments)
            before = found.lse
            for expected in (twin, exact):
                total = max(expected.weight, 1e-30)
                assert np.abs(found.column_sums - expected.column_sums).sum() <= 2e-6 * total
                assert found.masked == expected.masked
                np.testing.assert_allclose(found.lse, expected.lse, rtol=3e-7, atol=1e-5)
                assert found.objective == pytest.approx(expected.objective, rel=3e-7, abs=4e-6 * total)
                assert (found.labels == expected.labels).mean() > 0.99  # equal terms
                assert found.candidates.entries == pytest.approx(expected.candidates.entries, abs=2)


def test_parts_and_threads_keep_the_bits_of_a_pass_over_stored_logits():
    logits, potential = case(1337, 301, spread=20.0)
    stored = kernels.store_logits(logits, lam=10.0)
    for every in (1, 2):
        arguments = {"scale": 10.0, "want_labels": True, "every": every}
        whole = kernels.sinkhorn_pass(stored, potential, **arguments)
        parts = [
            kernels.sinkhorn_pass(
                stored.rows(first, last), potential, first_row=first, rows_in_all=1337, threads=1, **arguments
            )
            for first, last in ((0, 256), (256, 1024), (1024, 1337))
        ]
        found = kernels.add_sums(parts)
        np.testing.assert_array_equal(found.exact, whole.exact)
        np.testing.assert_array_equal(found.lse, whole.lse)
        np.testing.assert_array_equal(found.labels, whole.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_stored_logits_are_those_of_the_logits(kind):
    logits, potential = case(4000, 500, spread=1.0)
    stored = kernels.store_logits(logits, kind, lam=25.0)
    plain = kernels.sinkhorn_pass(logits, potential, scale=25.0, want_labels=True)
    found = kernels.sinkhorn_pass(stored, potential, scale=25.0, want_labels=True)
    assert (found.labels == plain.labels.numpy()).mean() >= (0.995 if kind == "bfloat16" else 0.9995)


def test_an_impossible_label_stays_impossible():
    logits, potential = case(64, 301)
    logits[:, 1] = -float("inf")
    for kind, scale in itertools.product(KINDS, (1.0, 1e-3)):
        found = kernels.sinkhorn_pass(kernels.store_logits(logits, kind), potential, scale=scale, want_labels=True)
        assert found.masked == 0
        assert found.column_sums[1] == 0
        assert not (found.labels == 1).any()


def test_what_cannot_be_stored_is_refused():
    good = np.zeros((4, 3), np.float32)
    stored = kernels.store_logits(good)
    with pytest.raises(OptionError, match="kind: expected one of fixed16"):
        kernels.store_logits(good, "int8")
    with pytest.raises(OptionError, match="lam: expected"):
        kernels.store_logits(good, lam=0.0)
    with pytest.raises(OptionError, match="found StoredLogits"):
        kernels.store_logits(stored)
    with pytest.raises(OptionError, match="first_row: expected 0 without"):
        kernels.store_logits(good, first_row=1)
    with pytest.raises(OptionError, match=r"first_row: expected 0 \.\. 0"):
        kernels.store_logits(good, out=stored, first_row=1)
    with pytest.raises(OptionError, match="out: expected fixed16 of lam 2"):
        kernels.store_logits(good, out=stored, lam=2.0)
    with pytest.raises(OptionError, match="threads: expected"):
        kernels.store_logits(good, threads=-1)
    with pytest.raises(OptionError, match="expected a tensor on cpu or cuda, found meta"):
        kernels.store_logits(torch.zeros(4, 3, device="meta"))
    with pytest.raises(DataError, match="found int64"):
        kernels.store_logits(np.zeros((4, 3), np.int64))
