"""Exact balance on a device: the CPU's lists and margins, number by number; certificates, ties and computed logits."""

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import FeatureLogits, build_info, kernels
from sela_ext.assign import features as feature_module
from sela_ext.assign.sources import logits_pass
from sela_ext.kernels import reference
from sela_ext.kernels.check_cases import list_difference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# One column, parts of a warp's turn, a cut piece at the end, several turns, and many of them.
SIZES = ((1, 1, 1), (33, 31, 4), (300, 65, 8), (1001, 257, 4), (130, 1001, 16), (67, 3000, 8), (20, 20_001, 4))
EXACT = build_info()["cpu_isa"] != "generic"  # whose loops round a fma twice


def case(rows, cols, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, cols, generator=generator).to(dtype)
    prices = torch.randn(cols, generator=generator, dtype=torch.float64).numpy()
    labels = torch.randint(-1, cols, (rows,), generator=generator, dtype=torch.int32).numpy()
    return logits, prices, labels


def both(card, logits, prices, labels, **options):
    """Lists of the device, and of the CPU: numpy logits never leave its kernels (bfloat16 as the same float32)."""
    found = kernels.find_candidates(card.put(logits), prices, labels, **options)
    host = logits.float() if logits.dtype == torch.bfloat16 else logits
    return found, kernels.find_candidates(host.numpy(), prices, labels, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_are_the_cpus_number_by_number(card, dtype):
    for rows, cols, count in SIZES:
        logits, prices, labels = case(rows, cols, dtype)
        for options in (
            {},
            {"tie": 2e-5, "floor": -2.0, "first_row": 128},
            {"slack": 2.0, "selected": np.arange(rows)[::-2]},
            {"bonus": np.abs(prices), "floor": -1.0},
        ):
            found, expected = both(card, logits, prices, labels, scale=3.0, count=count, **options)
            assert list_difference(found, expected) is None, (rows, cols, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_margins_are_the_cpus_number_by_number(card, dtype):
    for rows, cols, _ in SIZES:
        logits, prices, labels = case(rows, cols, dtype)
        host = (logits.float() if dtype == torch.bfloat16 else logits).numpy()
        for selected in (None, np.arange(0, rows, 3)):
            found = kernels.column_margins(card.put(logits), prices, labels, scale=3.0, selected=selected)
            expected = kernels.column_margins(host, prices, labels, scale=3.0, selected=selected)
            np.testing.assert_allclose(found, expected, rtol=0, atol=0 if EXACT else 1e-4)


def test_rows_at_odd_addresses_and_equal_columns(card):
    logits, prices, labels = case(200, 133)
    logits[::3] = logits[::3].round()
    wide = torch.full((200, 140), float("nan"))
    wide[:, 5:138] = logits
    found, expected = both(card, wide[:, 5:138], prices.round(), labels, scale=1.0, count=6, tie=1e-3)
    assert list_difference(found, expected) is None


def test_more_rows_than_a_card_takes_at_once(card):
    rows = 2001 if card.played else 300_001
    logits, prices, labels = case(rows, 5)
    found, expected = both(card, logits, prices, labels, count=2)
    assert list_difference(found, expected) is None


def test_lists_hold_what_the_twin_finds_best(card):
    logits, prices, labels = case(150, 90)
    found = kernels.find_candidates(card.put(logits), prices, labels, scale=5.0, count=6)
    expected = reference.find_candidates(logits, prices, labels, scale=5.0, count=6)
    np.testing.assert_allclose(found.regret, expected.regret, atol=1e-4)
    scores = 5.0 * logits.double().numpy() + prices
    for place in np.flatnonzero(expected.found > 0):
        mine = found.columns[place, : found.found[place]].tolist()
        worst = min(scores[place, c] for c in mine if c != labels[place] or scores[place, c] == scores[place].max())
        left = set(range(90)) - set(mine)
        assert all(scores[place, c] <= worst + 1e-4 for c in left)


@pytest.mark.parametrize("kind", ["stored", "computed"])
def test_labels_of_exact_sizes_certified_where_the_logits_are(card, kind):
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((3000, 24)).astype(np.float32)).to(card.place)
    weight = torch.from_numpy((0.4 * rng.standard_normal((50, 24))).astype(np.float32)).to(card.place)
    computed = FeatureLogits(features, weight)
    logits = computed if kind == "computed" else computed[:]
    found = sela_ext.assign(logits, balance="exact", tol=1e-4)
    assert found.backend == "cuda"
    assert sorted(set(found.sizes.tolist())) == [60]
    certificate = sela_ext.verify(logits, found)
    assert certificate.exact
    assert certificate.error < 1e-3
    assert certificate.label_gap < 2e-3
    on_host = sela_ext.verify(computed[:].cpu().numpy(), labels=found.labels, potential=found.potential, lam=found.lam)
    for name in ("error", "objective", "duality_gap", "label_value"):
        assert getattr(certificate, name) == pytest.approx(getattr(on_host, name), rel=1e-4, abs=1e-6)
    assert found.predict(logits).shape == (3000,)


def test_a_pass_over_tiles_is_one_over_stored_logits(card, monkeypatch):
    monkeypatch.setattr(feature_module, "DEVICE_ENTRIES", 1 << 14)
    rng = np.random.default_rng(1)
    features = torch.from_numpy(rng.standard_normal((3001, 20)).astype(np.float32)).to(card.place)
    weight = torch.from_numpy(rng.standard_normal((33, 20)).astype(np.float32)).to(card.place)
    computed = FeatureLogits(features, weight)
    assert computed.tile_rows < 3001
    potential = rng.standard_normal(33)
    found = logits_pass(computed, potential, scale=5.0, want_labels=True)
    expected = kernels.sinkhorn_pass(computed[:], potential, scale=5.0, want_labels=True)
    torch.testing.assert_close(found.column_sums, expected.column_sums, rtol=1e-6, atol=1e-6)
    assert (found.labels != expected.labels).float().mean() < 1e-3
    assert (found.masked, found.weight) == (expected.masked, expected.weight)


def test_heads_that_share_reads_are_those_alone(card, monkeypatch):
    monkeypatch.setattr(feature_module, "DEVICE_ENTRIES", 1 << 15)
    rng = np.random.default_rng(2)
    features = torch.from_numpy(rng.standard_normal((2000, 16)).astype(np.float32)).to(card.place)
    heads = [(torch.from_numpy(rng.standard_normal((k, 16)).astype(np.float32)).to(card.place), None) for k in (10, 40)]
    alone = sela_ext.assign_heads(features, heads, joint=False)
    together = sela_ext.assign_heads(features, heads, joint=True)
    for one, other in zip(alone, together, strict=True):
        assert (one.labels != other.labels).float().mean() < 1e-3
        assert one.passes == pytest.approx(other.passes, abs=2)


def test_ties_are_dealt_out_on_the_device(card):
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(np.minimum(np.round(rng.standard_normal((3, 7))), 0)[rng.integers(3, size=300)])
    found = sela_ext.assign(logits.float().to(card.place))
    expected = sela_ext.assign(logits.float().numpy())
    assert found.ties > 0
    assert abs(int(found.sizes.max()) - int(expected.sizes.max())) <= 1
