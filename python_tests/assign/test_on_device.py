"""What `assign` and its kin do of logits on a CUDA device, on a device that the host plays: the same, and there."""

import dataclasses
import importlib
import warnings

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import FeatureLogits
from sela_ext.assign import features as feature_module
from sela_ext.assign import sources
from sela_ext.assign.features import DEVICE_ENTRIES, device_tile_rows
from sela_ext.assign.shards import Shard
from sela_ext.assign.sources import best_columns, column_losses, logits_pass
from sela_ext.assign.ties import break_ties
from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels import device, find_candidates, sinkhorn_pass, tiled_pass
from sela_ext.kernels.sinkhorn_sums import exact_sums

sinkhorn_module = importlib.import_module("sela_ext.kernels.sinkhorn")
LAM = 25.0


@pytest.fixture
def card(host_card, as_cuda, monkeypatch):
    """A device; every tensor is on it. Whoever takes logits to the host in float64 fails."""
    monkeypatch.setenv("SELA_SELF_CHECK", "off")

    def refuse(block):
        raise AssertionError(f"a block of {tuple(block.shape)} came to the host")

    monkeypatch.setattr(sources, "as_double", refuse)
    return as_cuda(host_card)


def clustered(rows, cols, dim=16, seed=0, sharpness=2.0, classes=30):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, dim))
    features = centres[rng.integers(classes, size=rows)] + 0.3 * rng.standard_normal((rows, dim))
    weight = sharpness * rng.standard_normal((cols, dim)) / np.sqrt(dim)
    return features.astype(np.float32), weight.astype(np.float32), rng.standard_normal(cols).astype(np.float32)


def gaussian(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def assert_same_certificate(found, expected):
    for field in dataclasses.fields(expected):
        mine, wanted = getattr(found, field.name), getattr(expected, field.name)
        if wanted is None or isinstance(wanted, (bool, int)):
            assert mine == wanted, field.name
        elif isinstance(wanted, dict):
            assert mine == pytest.approx(wanted, rel=1e-9, abs=1e-9), field.name
        else:
            np.testing.assert_allclose(mine, wanted, rtol=1e-9, atol=1e-9, err_msg=field.name)


@pytest.mark.parametrize("kind", ["plain", "masked", "weights", "labels only", "potential only", "prices"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (31, 33), (1001, 10)])
def test_a_certificate_is_that_of_the_host(request, monkeypatch, rows, cols, kind):
    logits = gaussian(rows, cols)
    rng = np.random.default_rng(1)
    labels, potential = rng.integers(-1, cols, rows), rng.standard_normal(cols)
    options = {"labels": labels, "potential": potential, "lam": 3.0}
    if kind == "masked" and rows > 1:
        logits[3, 1], logits[9, 0], logits[17], logits[20, 1:] = np.nan, np.inf, -np.inf, -np.inf
    elif kind == "weights":
        options |= {
            "row_weights": rng.random(rows) * (rng.random(rows) < 0.7) + (rows == 1),
            "marginals": rng.random(cols) + 0.1,
        }
    elif kind == "labels only":
        del options["potential"]
    elif kind == "potential only":
        del options["labels"]
    elif kind == "prices":
        options["prices"] = rng.standard_normal(cols)
    expected = sela_ext.verify(logits, **options)
    request.getfixturevalue("card")
    monkeypatch.setattr(
        importlib.import_module("sela_ext.assign.certificate_device"), "DEVICE_ENTRIES_AT_ONCE", 50 * cols
    )
    assert_same_certificate(sela_ext.verify(torch.from_numpy(logits), **options), expected)


def test_computed_logits_are_judged_where_they_are_computed(request):
    features, weight, bias = clustered(1500, 33)
    solved = sela_ext.assign(FeatureLogits(features, weight, bias), tol=1e-5)
    expected = sela_ext.verify(FeatureLogits(features, weight, bias)[:], solved)
    request.getfixturevalue("card")
    logits = FeatureLogits(torch.from_numpy(features), torch.from_numpy(weight), torch.from_numpy(bias))
    assert logits.on_cuda
    found = sela_ext.verify(logits, solved)
    assert found.error == pytest.approx(expected.error, abs=1e-6)
    assert found.disagreements == expected.disagreements
    assert not found.faults(1e-4)


@pytest.mark.parametrize("kinds", [1, 3, 40])
def test_ties_are_broken_as_on_the_host(request, kinds):
    rng = np.random.default_rng(kinds)
    logits = np.minimum(np.round(rng.standard_normal((kinds, 7))), 0)[rng.integers(kinds, size=300)].astype(np.float32)
    potential, target = np.zeros(7), np.full(7, 1 / 7)
    first = logits.argmax(1).astype(np.int32)
    first[::11] = -1
    expected, found = first.copy(), first.copy()
    count = break_ties(logits, expected, potential, LAM, target, Shard())
    request.getfixturevalue("card")
    assert break_ties(torch.from_numpy(logits), found, potential, LAM, target, Shard()) == count
    np.testing.assert_array_equal(found, expected)
    assert count > 0


@pytest.mark.parametrize("case", ["clustered", "gaussian", "equal rows", "many misplaced"])
def test_exact_balance_is_that_of_the_host(request, case):
    options = {"balance": "exact", "tol": 1e-3, "method": "anderson"}
    if case == "clustered":
        features, weight, bias = clustered(3000, 50)
        logits = features @ weight.T + bias
    elif case == "gaussian":
        logits = gaussian(2000, 300)
    elif case == "equal rows":
        logits = gaussian(20, 60)[np.random.default_rng(0).integers(20, size=10_000)] * 0.1
    else:
        rng = np.random.default_rng(2)
        logits = (0.03 * rng.standard_normal((9000, 6)) @ rng.standard_normal((6, 64))).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sela_ext.assign(logits, **options)
        card = request.getfixturevalue("card")
        before = card.core.calls
        found = sela_ext.assign(torch.from_numpy(logits), **options)
    assert found.backend == "cuda"
    assert card.core.calls > before
    assert found.gap <= max(2 * expected.gap, 1e-3)
    assert (found.sizes.numpy() == expected.sizes).mean() > 0.9 or case != "clustered"
    assert int(found.sizes.max() - found.sizes.min()) <= 1
    certificate = sela_ext.verify(torch.from_numpy(logits), found)
    assert certificate.exact
    assert certificate.label_gap <= max(2 * expected.gap, 1e-3) + 1e-6


def test_lists_of_a_part_of_the_rows_at_a_time_are_those_of_all(card, monkeypatch):
    logits = torch.from_numpy(gaussian(101, 20))
    prices, labels = np.linspace(-1, 1, 20), np.arange(101) % 20 - (np.arange(101) % 7 == 0)
    labels = labels.astype(np.int32)
    labels[::9] = -1
    for selected in (None, np.arange(100, 0, -3)):
        options = {"scale": 2.0, "count": 3, "selected": selected, "slack": 1.5, "first_row": 128}
        whole = find_candidates(logits, prices, labels, **options)
        with monkeypatch.context() as patch:
            patch.setattr("sela_ext.kernels.rounding_device.LIST_BYTES", 8 * 8 * 10)
            parts = find_candidates(logits, prices, labels, **options)
        wanted = find_candidates(logits.numpy(), prices, labels, **options)
        for name in ("columns", "values", "found", "regret"):
            np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
            np.testing.assert_array_equal(getattr(wanted, name), getattr(whole, name))
        assert 0 < (whole.found > 0).sum() < len(whole.found)


def test_read_only_and_backward_arguments_are_taken(card):
    logits = torch.from_numpy(gaussian(1, 4))
    prices, labels, selected = np.zeros(4)[::-1], np.zeros(1, np.int32)[::-1], np.zeros(1, np.int64)[::-1]
    for one in (prices, labels, selected):
        one.setflags(write=False)
    found = find_candidates(logits, prices, labels, count=2, selected=selected)
    assert found.columns[0, 0] == int(logits.argmax())
    assert sela_ext.kernels.column_margins(logits, prices, labels, selected=selected).shape == (4, 4)


def test_columns_that_are_not_adjacent_are_searched(card):
    logits = torch.from_numpy(gaussian(20, 31)).T
    found = find_candidates(logits, np.zeros(20), np.zeros(31, np.int32), count=2)
    expected = find_candidates(np.ascontiguousarray(logits.numpy()), np.zeros(20), np.zeros(31, np.int32), count=2)
    np.testing.assert_array_equal(found.columns, expected.columns)


def test_a_failed_launch_says_so(card):
    def fails(*arguments):
        raise RuntimeError("lists_kernel: launch failed: out of order; run with CUDA_LAUNCH_BLOCKING=1\nmore")

    card.core.find_candidates_cuda = card.core.column_margins_cuda = fails
    with pytest.raises(ResourceError, match="lists_kernel: launch failed: out of order"):
        find_candidates(torch.zeros(3, 2), np.zeros(2), np.zeros(3, np.int32))
    with pytest.raises(ResourceError, match="launch failed"):
        sela_ext.kernels.column_margins(torch.zeros(3, 2), np.zeros(2), np.zeros(3, np.int32))


def test_a_refused_device_is_searched_by_torch(card, monkeypatch):
    logits = torch.from_numpy(gaussian(50, 30))
    labels = np.zeros(50, np.int32)
    expected = find_candidates(logits, np.zeros(30), labels, count=4)
    margins = sela_ext.kernels.column_margins(logits, np.zeros(30), labels)
    monkeypatch.setattr(device, "_usable", {card.place: None})
    before = card.core.calls
    found = find_candidates(logits, np.zeros(30), labels, count=4)
    np.testing.assert_allclose(found.regret, expected.regret, atol=1e-5)
    np.testing.assert_array_equal(found.columns[:, 0], expected.columns[:, 0])
    np.testing.assert_allclose(sela_ext.kernels.column_margins(logits, np.zeros(30), labels), margins, atol=1e-5)
    assert card.core.calls == before


# ---- Logits that are computed on the device.


def as_tensors(*arrays):
    return [torch.from_numpy(one) for one in arrays]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (127, 33), (1001, 300), (3000, 10)])
def test_a_pass_over_tiles_has_the_bits_of_one_over_stored_logits(card, monkeypatch, rows, cols, weighted):
    monkeypatch.setattr(feature_module, "DEVICE_ENTRIES", 256 * max(cols, 16))
    monkeypatch.setattr(feature_module, "device_tile_rows", lambda *sizes, **words: 256)
    features, weight, bias = as_tensors(*clustered(rows, cols))
    logits = FeatureLogits(features, weight, bias)
    assert logits.tile_rows == min(256, -(-rows // 128) * 128)
    stored = logits[:]
    weights = np.random.default_rng(0).random(rows) if weighted else None
    potential = np.random.default_rng(1).standard_normal(cols)
    looks = []  # at what a device gave

    def look(columns, *more):
        looks.append(len(columns))
        return exact_sums(columns, *more)

    monkeypatch.setattr(tiled_pass, "exact_sums", look)
    monkeypatch.setattr(sinkhorn_module, "exact_sums", look)
    before = None
    for _ in range(2):
        options = {"scale": LAM, "row_weights": weights, "reference": before, "want_labels": True, "first_row": 256}
        options |= {"rows_in_all": rows + 1000}
        calls = card.core.calls
        looks.clear()
        found = logits_pass(logits, potential, **options)
        assert card.core.calls - calls == -(-rows // logits.tile_rows)
        assert len(looks) == 1, "the host looked at single tiles"
        expected = sinkhorn_pass(stored, potential, **options)
        for name in ("column_sums", "lse", "labels"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        assert (found.objective, found.weight, found.masked) == (expected.objective, expected.weight, expected.masked)
        np.testing.assert_array_equal(found.exact, expected.exact)
        before = found.lse


@pytest.mark.parametrize("every", [2, 200])
def test_a_pass_over_some_rows_of_tiles_knows_of_all_rows(card, monkeypatch, every):
    monkeypatch.setattr(feature_module, "device_tile_rows", lambda *sizes, **words: 128)
    monkeypatch.setattr(feature_module, "DEVICE_ENTRIES", 1)
    logits = FeatureLogits(*as_tensors(*clustered(1001, 10)))
    options = {"scale": LAM, "every": every, "keep": 5.0, "want_labels": True}
    found, expected = logits_pass(logits, np.zeros(10), **options), sinkhorn_pass(logits[:], np.zeros(10), **options)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.lse.nan_to_num(), expected.lse.nan_to_num())
    np.testing.assert_array_equal(found.exact, expected.exact)
    assert found.candidates.entries == expected.candidates.entries


def test_wrong_arguments_of_a_pass_over_tiles_are_refused(card):
    logits = FeatureLogits(*as_tensors(*clustered(200, 5)))
    with pytest.raises(OptionError, match="potential: expected shape"):
        logits_pass(logits, np.zeros(4))
    with pytest.raises(OptionError, match="reference: expected shape"):
        logits_pass(logits, np.zeros(5), reference=np.zeros(3))
    with pytest.raises(OptionError, match="row_weights"):
        logits_pass(logits, np.zeros(5), row_weights=np.full(200, -1.0))


@pytest.mark.parametrize("balance", ["argmax", "exact"])
def test_a_solve_on_computed_logits_is_that_on_stored_ones(card, monkeypatch, balance):
    monkeypatch.setattr(feature_module, "DEVICE_ENTRIES", 512 * 64)
    features, weight, bias = as_tensors(*clustered(2000, 64))
    logits = FeatureLogits(features, weight, bias)
    found = sela_ext.assign(logits, balance=balance, method="anderson")
    expected = sela_ext.assign(logits[:], balance=balance, method="anderson")
    assert found.backend == expected.backend == "cuda"
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.potential, expected.potential)
    assert torch.equal(found.predict(logits), expected.predict(logits[:]))
    assert torch.allclose(found.predict(logits, soft=True), expected.predict(logits[:], soft=True), atol=1e-6)


def test_lists_and_margins_of_computed_logits_are_those_of_stored_ones(card, monkeypatch):
    monkeypatch.setattr(feature_module, "DEVICE_ENTRIES", 128 * 40)
    logits = FeatureLogits(*as_tensors(*clustered(700, 40)))
    stored, labels = logits[:], np.arange(700, dtype=np.int32) % 40
    chosen = np.arange(0, 700, 3)
    found = best_columns(logits, np.zeros(40), labels, scale=LAM, count=4, selected=chosen)
    expected = best_columns(stored, np.zeros(40), labels, scale=LAM, count=4, selected=chosen)
    for name in ("columns", "values", "found", "regret"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    found = column_losses(logits, np.zeros(40), labels, chosen, scale=LAM, threads=1)
    np.testing.assert_allclose(
        found, column_losses(stored, np.zeros(40), labels, chosen, scale=LAM, threads=1), atol=1e-4
    )


def test_heads_of_different_widths_share_one_read_of_the_features(card, monkeypatch):
    monkeypatch.setattr(feature_module, "DEVICE_ENTRIES", 512 * 33)
    features, first, _ = clustered(1500, 33)
    second, third = (clustered(1500, k, seed=k)[1] for k in (10, 70))
    heads = [(torch.from_numpy(one), None) for one in (first, second, third)]
    features = torch.from_numpy(features)
    alone = sela_ext.assign_heads(features, heads, joint=False, method="anderson")
    reads = []
    read = FeatureLogits.rows_read
    monkeypatch.setattr(FeatureLogits, "rows_read", lambda self, a, b: reads.append((a, b)) or read(self, a, b))
    together = sela_ext.assign_heads(features, heads, joint=True, method="anderson")
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.potential, other.potential)
        assert one.backend == other.backend == "cuda"
    begins = sum(first == 0 for first, _ in reads)
    assert begins == max(len(one.history) for one in together) < sum(len(one.history) for one in together)


def test_features_on_the_host_are_uploaded_for_all_heads_at_once(card, monkeypatch):
    monkeypatch.setattr(FeatureLogits, "uploaded_in_tiles", property(lambda self: True))
    features, weight, _ = clustered(600, 20)
    reads = []
    read = FeatureLogits.rows_read
    monkeypatch.setattr(FeatureLogits, "rows_read", lambda self, a, b: reads.append((a, b)) or read(self, a, b))
    heads = [(torch.from_numpy(weight), None), (torch.from_numpy(weight[:7]), None)]
    results = sela_ext.assign_heads(torch.from_numpy(features), heads, method="anderson")
    assert [len(one.sizes) for one in results] == [20, 7]
    assert reads


def test_a_copy_of_the_features_is_made_where_it_takes_little_room(monkeypatch):
    features, weight, bias = clustered(300, 10)
    logits = FeatureLogits(torch.from_numpy(features), torch.from_numpy(weight), torch.from_numpy(bias))
    expected = logits[:]
    monkeypatch.setattr(FeatureLogits, "on_cuda", property(lambda self: True))
    monkeypatch.setattr(FeatureLogits, "device", property(lambda self: torch.device("meta")))
    for room, fits in ((features.nbytes * 4, True), (features.nbytes * 4 - 4, False)):
        monkeypatch.setattr(feature_module, "free_on", lambda place, room=room: float(room))
        assert logits._fits_there() == fits
        assert logits.uploaded_in_tiles != fits
    assert expected.shape == (300, 10)


def test_tiles_fit_the_cache_and_fill_the_device():
    h100 = {"cache": 50 << 20, "multiprocessors": 132}
    # Long products: the tile fits into half of the cache that the weights leave.
    rows = device_tile_rows(3000, 512, **h100, exact=True)
    assert rows % 128 == 0
    assert rows & (rows - 1) == 0
    assert (50 << 20) // 4 < 4 * rows * 3000 < 0.6 * (50 << 20)
    # Short ones, and those in TF32: few launches.
    assert device_tile_rows(3000, 512, **h100, exact=False) * 3000 > DEVICE_ENTRIES // 2
    assert device_tile_rows(3000, 128, **h100, exact=True) * 3000 > DEVICE_ENTRIES // 2
    assert device_tile_rows(3000, 2048, **h100, exact=False) * 3000 <= 8 << 20
    # A small cache cannot hold what fills the device, which comes first.
    turing = device_tile_rows(3000, 512, cache=6 << 20, multiprocessors=68, exact=True)
    assert 2 * 68 * 128 * 128 <= turing * 3000 <= 5 * 68 * 128 * 128
    # Neither a tile nor its features grow beyond the largest tile.
    for cols in (1, 10, 3000, 10**6):
        for dim in (1, 64, 4096):
            rows = device_tile_rows(cols, dim, **h100, exact=True)
            assert rows == 128 or rows * max(cols, dim) <= DEVICE_ENTRIES
