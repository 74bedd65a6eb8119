"""Passes, candidates and stored logits on a CUDA device, played by the CPU kernels: what the calls hand over and back,
and the pure-torch way of a refused device."""

import numpy as np
import pytest

from sela_ext import kernels
from sela_ext.errors import OptionError
from sela_ext.kernels import logits as logits_module
from sela_ext.kernels.device_candidates import DeviceCandidates
from sela_ext.kernels.sinkhorn import DevicePass, device_pass, pass_in_torch
from sela_ext.kernels.sinkhorn_sums import add_sums

torch = pytest.importorskip("torch")

ROWS, COLS, SCALE = 333, 70, 6.0
KINDS = ("fixed16", "float16", "bfloat16")


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, COLS, generator=generator)
    logits[5, 3], logits[6] = float("nan"), -float("inf")
    weights = torch.randint(0, 3, (ROWS,), generator=generator).float()
    weights[0] = 2
    return logits, torch.randn(COLS, generator=generator).double().numpy(), weights


@pytest.fixture
def device(request, monkeypatch):
    """A card that plays the device of all tensors, whose self-check is left out."""
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    card, as_cuda = request.getfixturevalue("host_card"), request.getfixturevalue("as_cuda")
    monkeypatch.setenv("SELA_SELF_CHECK", "off")
    return as_cuda(card)


def on_cpu(logits, potential, **options):
    if isinstance(logits, torch.Tensor):
        logits = logits.numpy()
    return kernels.sinkhorn_pass(logits, potential, scale=SCALE, threads=1, **options)


def assert_same(found, expected):
    """What a device's pass gives, and the CPU's with arrays of numpy."""
    assert isinstance(found.candidates, DeviceCandidates)
    kept = expected.candidates
    assert (found.candidates.rows, found.candidates.cols) == (kept.rows, kept.cols)
    assert found.candidates.overflow == kept.overflow
    if not kept.overflow:
        np.testing.assert_array_equal(found.candidates.offsets.numpy(), kept.offsets())
        np.testing.assert_array_equal(found.candidates.columns.numpy(), kept.columns())
        np.testing.assert_allclose(found.candidates.values.numpy(), kept.values(), atol=2e-5)
        weights = found.candidates.weights
        np.testing.assert_array_equal([] if weights is None else weights.numpy(), kept.weights())
    np.testing.assert_allclose(found.column_sums.numpy(), expected.column_sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.columns_on_host(), expected.column_sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.lse.numpy(), expected.lse, rtol=1e-6, atol=1e-5)
    assert (found.masked, found.entries) == (expected.masked, expected.entries)
    assert found.objective == pytest.approx(expected.objective, rel=1e-6)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_candidates_of_a_device_are_those_of_the_cpu(device, case, every, weighted):
    logits, potential, weights = case
    options = {"every": every, "keep": 7.0, "row_weights": weights.numpy() if weighted else None}
    expected = on_cpu(logits, potential, **options)
    found = kernels.sinkhorn_pass(logits, potential, scale=SCALE, want_labels=True, **options)
    assert_same(found, expected)
    assert_same(pass_in_torch(logits, potential, scale=SCALE, **options), expected)
    read = np.arange(ROWS) // 4 % every == 0
    assert (found.labels.numpy()[~read] == -1).all()
    assert np.isnan(found.lse.numpy()[~read]).all()
    again = kernels.sinkhorn_pass(logits, potential, scale=SCALE, reference=torch.ones(ROWS), **options)
    assert (again.lse.numpy()[~read] == 1).all()


def test_more_candidates_than_the_limit_are_not_kept(device, case):
    logits, potential, weights = case
    entries = on_cpu(logits, potential, keep=7.0).candidates.entries
    for run in (kernels.sinkhorn_pass, pass_in_torch):
        calls = device.core.calls
        found = run(logits, potential, scale=SCALE, keep=7.0, keep_at_most=entries - 1, row_weights=weights * 0 + 1)
        assert found.candidates.overflow
        assert found.candidates.entries == len(found.candidates.columns) == 0
        assert found.candidates.offsets.tolist() == [0] * (ROWS + 1)
        assert device.core.calls - calls == (run is kernels.sinkhorn_pass)  # nothing is searched for
        kept = run(logits, potential, scale=SCALE, keep=7.0, keep_at_most=entries).candidates
        assert kept.entries == entries


def test_a_matrix_without_rows_has_no_candidates(device):
    found = kernels.sinkhorn_pass(torch.zeros(0, 5), np.zeros(5), keep=3.0, want_labels=True)
    assert found.candidates.offsets.tolist() == [0]
    assert found.candidates.entries == found.candidates.rows == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_a_part_without_rows_counts_in_the_units_of_the_others(device, weighted):
    largest = 0.25 if weighted else 1.0
    weights = np.zeros(0, np.float32) if weighted else None
    options = {"row_weights": weights, "largest_weight": largest, "rows_in_all": 512}
    found = kernels.sinkhorn_pass(torch.zeros(0, 5), np.zeros(5), **options)
    assert found.largest_weight == largest
    assert kernels.sinkhorn_pass(torch.zeros(0, 5), np.zeros(5), row_weights=weights).largest_weight == 1.0


def test_candidates_of_parts_are_joined_in_the_order_of_their_rows(device, case):
    logits, potential, weights = case
    options = {"scale": SCALE, "keep": 7.0, "rows_in_all": ROWS, "largest_weight": 2.0}
    whole = kernels.sinkhorn_pass(logits, potential, row_weights=weights, **options)
    for limit in (2**62, whole.candidates.entries - 1):
        parts = []
        for first in (0, 128, 256):
            part = slice(first, first + 128)
            own = {"row_weights": weights[part], "first_row": first, "keep_at_most": limit}
            parts.append(kernels.sinkhorn_pass(logits[part], potential, **options, **own))
        joined = add_sums(parts).candidates
        assert joined.overflow == (limit < 2**62)
        if not joined.overflow:
            for name in ("offsets", "columns", "values", "weights"):
                assert torch.equal(getattr(joined, name), getattr(whole.candidates, name))
        else:
            assert joined.entries == 0


def test_logits_are_looked_at_once_for_many_passes(device, case):
    logits, potential, weights = case
    many = device_pass(logits, row_weights=weights)
    assert isinstance(many, DevicePass)
    for every in (1, 2):
        found = many(potential, scale=SCALE, every=every, keep=7.0)
        assert_same(found, on_cpu(logits, potential, every=every, keep=7.0, row_weights=weights.numpy()))
    assert device_pass(logits.numpy()) is None


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_stored_where_they_are(device, case, kind):
    logits, potential, weights = case
    logits[9, 1] = -1e6
    expected = kernels.store_logits(logits.numpy(), kind, lam=SCALE)
    found = kernels.store_logits(logits, kind, lam=SCALE)
    assert isinstance(found.values, torch.Tensor)
    assert isinstance(found.maxima, torch.Tensor)
    assert found.values.stride(0) % 8 == 0
    assert found.saturated == expected.saturated > (0 if kind != "bfloat16" else -1)
    np.testing.assert_array_equal(logits_module.bits_of(found.values).view(np.uint16), expected.values.view(np.uint16))
    np.testing.assert_array_equal(found.maxima.numpy(), expected.maxima)
    np.testing.assert_array_equal(found.decoded(3, 20, np.array([1, 4])), expected.decoded(3, 20, np.array([1, 4])))

    into = kernels.empty_stored(ROWS, COLS, kind, lam=SCALE, place=torch.device("cpu"))
    for first in (0, 200):
        into = kernels.store_logits(logits[first : first + 200], kind, lam=SCALE, out=into, first_row=first)
    assert torch.equal(into.values.view(torch.int16), found.values.view(torch.int16))
    assert into.saturated == found.saturated

    options = {"every": 2, "keep": 7.0, "row_weights": weights.numpy()}
    wanted = on_cpu(expected, potential, **options)
    assert_same(kernels.sinkhorn_pass(found, potential, scale=SCALE, **options), wanted)
    assert_same(pass_in_torch(found, potential, scale=SCALE, **options), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_device_stores_logits_by_torch(device, case, kind, monkeypatch):
    logits, _, _ = case
    expected = kernels.store_logits(logits, kind, lam=SCALE)
    calls = device.core.calls
    monkeypatch.setattr(logits_module, "usable", lambda place: None)
    monkeypatch.setattr(logits_module, "_ROWS_AT_ONCE", 100)
    found = kernels.store_logits(logits, kind, lam=SCALE)
    assert torch.equal(found.values.view(torch.int16), expected.values.view(torch.int16))
    np.testing.assert_array_equal(found.maxima.numpy(), expected.maxima.numpy())
    assert device.core.calls == calls


def test_memory_elsewhere_and_bounds_are_refused(device, case):
    logits, potential, _ = case
    with pytest.raises(OptionError, match="out: expected memory where the logits are"):
        kernels.store_logits(logits, out=kernels.empty_stored(ROWS, COLS))
    with pytest.raises(OptionError, match="bounds: only for logits on the CPU"):
        kernels.sinkhorn_pass(logits, potential, bounds=object())
