"""The fused pass on a device: equal to its twin for every mapping, storage type, alignment and kind of row."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sela_ext import kernels
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import reference
from sela_ext.kernels.logits import bits_of
from sela_ext.kernels.sinkhorn import pass_in_torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SCALE = 25.0
# On either side of every change of the mapping (one warp to 256 columns, one block to 1024, a wide one to 8192, rows
# split over blocks beyond), and multiples of nothing.
SIZES = (
    *((1, 1), (2, 31), (31, 33), (129, 128), (300, 1), (1000, 256)),
    *((999, 257), (130, 1001), (500, 1024), (67, 1025), (300, 3000), (131, 4099), (65, 8192)),
    *((65, 8193), (50, 20_001), (5, 70_001)),
)
FEW_SIZES = ((31, 33), (130, 1001), (67, 4099), (65, 8193))


def case(rows, cols, dtype=torch.float32, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, cols, generator=generator)).to(dtype)
    potential = spread * torch.randn(cols, generator=generator, dtype=torch.float64)
    return logits, potential


def twin(logits, potential, **options):
    return reference.sinkhorn_pass(logits, potential, scale=SCALE, **options)


def assert_same_bits(one, other):
    assert torch.equal(one.column_sums, other.column_sums)
    assert torch.equal(one.lse.nan_to_num(), other.lse.nan_to_num())
    assert (one.objective, one.weight, one.masked) == (other.objective, other.weight, other.masked)
    assert (one.labels is None) == (other.labels is None)
    if one.labels is not None:
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
def test_pass_equals_twin_and_repeats_its_bits(card, assert_equal_to_twin, dtype, spread):
    for rows, cols in SIZES:
        logits, potential = case(rows, cols, dtype, spread)
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(1))
        expected = twin(logits, potential, row_weights=weights, want_labels=True)
        on_card, before = logits.to(card.place), None
        for _ in range(2):  # from the maximum, then from the reference
            options = {"scale": SCALE, "row_weights": weights, "reference": before, "want_labels": True}
            found, again = (kernels.sinkhorn_pass(on_card, potential, **options) for _ in range(2))
            assert found.column_sums.device == found.lse.device == found.labels.device == on_card.device
            assert_same_bits(found, again)
            assert_equal_to_twin(found, expected, logits, potential, SCALE)
            before = found.lse


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_need_not_be_asked_for(card, assert_equal_to_twin, dtype):
    for rows, cols in FEW_SIZES:
        logits, potential = case(rows, cols, dtype)
        expected, before = twin(logits, potential), None
        for _ in range(2):
            found = kernels.sinkhorn_pass(logits.to(card.place), potential, scale=SCALE, reference=before)
            assert_equal_to_twin(found, expected, logits, potential, SCALE)
            before = found.lse


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_start_anywhere_and_what_lies_between_them_does_not_matter(card, assert_equal_to_twin, dtype):
    for rows, cols in FEW_SIZES:
        plain, potential = case(rows, cols, dtype)
        expected = twin(plain, potential, want_labels=True)
        padded = -(-cols // 16) * 16
        for offset, step in ((0, padded), (0, cols + 1), (1, cols | 1), (3, padded + 8), (8, padded)):
            room = torch.full((offset + rows * step,), float("nan"), dtype=dtype)
            logits = room.as_strided((rows, cols), (step, 1), offset)
            logits.copy_(plain)
            on_card = card.put(logits)
            assert (on_card.storage_offset(), on_card.stride()) == (offset, (step, 1))
            found = kernels.sinkhorn_pass(on_card, potential, scale=SCALE, want_labels=True)
            assert_equal_to_twin(found, expected, plain, potential, SCALE)


def test_columns_that_are_not_adjacent_are_copied_together(card, assert_equal_to_twin):
    logits, potential = case(65, 301)
    expected = twin(logits, potential, want_labels=True)
    turned = logits.t().contiguous().to(card.place).t()
    every_other = torch.zeros(65, 602)
    every_other[:, ::2] = logits
    repeated = logits[:1].to(card.place).expand(65, -1)
    for tensor in (turned, every_other.to(card.place)[:, ::2]):
        assert not tensor.is_contiguous()
        found = kernels.sinkhorn_pass(tensor, potential, scale=SCALE, want_labels=True)
        assert_equal_to_twin(found, expected, logits, potential, SCALE)
    found = kernels.sinkhorn_pass(repeated, potential, scale=SCALE, want_labels=True)
    same = logits[:1].expand(65, -1)
    assert_equal_to_twin(found, twin(same, potential, want_labels=True), same, potential, SCALE)


@pytest.mark.parametrize("cols", [31, 256, 1001, 4099, 9001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_rows_are_masked_and_bad_references_survived(card, assert_equal_to_twin, dtype, cols):
    logits, potential = case(300, cols, dtype, spread=3.0)
    clean = logits.clone()
    bad = {0: float("nan"), 7: float("inf"), 64: float("nan"), 199: float("inf")}
    for place, (row, value) in zip((0, cols - 1, cols // 2, 0), bad.items(), strict=True):
        logits[row, place] = value
    logits[299] = -float("inf")
    logits[5, 1] = clean[5, 1] = -float("inf")
    expected = twin(logits, potential, want_labels=True)
    assert expected.masked == 5
    on_card = logits.to(card.place)
    untouched = kernels.sinkhorn_pass(clean.to(card.place), potential, scale=SCALE, want_labels=True)
    good = expected.labels >= 0
    lse_type = torch.float64 if dtype == torch.float64 else torch.float32
    lse = expected.lse
    references = (None, torch.zeros(300), torch.full((300,), 1e6), torch.full((300,), float("nan")), lse + 60, lse - 60)
    for before in references:
        before = None if before is None else before.to(card.place, lse_type)
        found = kernels.sinkhorn_pass(on_card, potential, scale=SCALE, reference=before, want_labels=True)
        assert_equal_to_twin(found, expected, logits, potential, SCALE)
        assert found.labels.cpu()[~good].tolist() == [-1] * 5
        if before is None:
            assert torch.equal(found.lse.cpu()[good], untouched.lse.cpu()[good])
            assert torch.equal(found.labels.cpu()[good], untouched.labels.cpu()[good])


def test_rows_of_weight_zero_count_for_nothing_but_their_label(card, assert_equal_to_twin):
    for rows, cols in FEW_SIZES:
        logits, potential = case(rows, cols)
        weights = torch.zeros(rows)
        weights[::3] = 1e-6
        weights[1::3] = 1e6
        logits[2, 0] = float("nan")
        expected = twin(logits, potential, row_weights=weights, want_labels=True)
        found = kernels.sinkhorn_pass(
            logits.to(card.place), potential, scale=SCALE, row_weights=weights.to(card.place), want_labels=True
        )
        assert_equal_to_twin(found, expected, logits, potential, SCALE)
        nothing = kernels.sinkhorn_pass(logits.to(card.place), potential, scale=SCALE, row_weights=weights * 0)
        assert nothing.weight == nothing.objective == 0
        assert not nothing.column_sums.any()


def test_of_equal_columns_the_first_one_is_the_label(card):
    for cols in (7, 257, 1025, 8193):
        logits = torch.zeros(70, cols)
        logits[:, cols // 2 :] = 1.0
        found = kernels.sinkhorn_pass(logits.to(card.place), np.zeros(cols), scale=SCALE, want_labels=True)
        assert found.labels.tolist() == [cols // 2] * 70


def test_nan_between_dead_columns_of_a_peaked_row_is_found(card):
    logits = torch.full((8, 1024), -50.0)
    logits[:, 5] = 0.0
    for place in (5, 6, 500, 511, 512, 1023):
        spoiled = logits.clone()
        spoiled[3, place] = float("nan")
        found = kernels.sinkhorn_pass(
            spoiled.to(card.place), torch.zeros(1024), scale=SCALE, reference=torch.zeros(8, device=card.place)
        )
        assert found.masked == 1
        assert found.column_sums[5] == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_and_bfloat16_number_is_read_exactly(card, dtype):
    values = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16)).view(dtype)
    values = values[torch.isfinite(values) & (values.abs() < 1e30)]
    found = kernels.sinkhorn_pass(values[:, None].contiguous().to(card.place), [0.0])  # one column: lse = logit
    expected = values.float()
    expected[expected.abs() < 1.2e-38] = 0.0  # float32 denormals may count as zero
    torch.testing.assert_close(found.lse.cpu(), expected, rtol=1.2e-7, atol=2e-7)


@pytest.mark.parametrize("size", [1e4, 1e9, 1e30])
@pytest.mark.parametrize("cols", [7, 500, 4000, 9000])
def test_huge_logits_stay_finite(card, size, cols):
    logits = torch.zeros(5, cols)
    logits[torch.arange(5), torch.arange(5)] = size
    logits[4] = -size
    before = None
    for _ in range(2):
        found = kernels.sinkhorn_pass(
            logits.to(card.place), np.zeros(cols), scale=SCALE, reference=before, want_labels=True
        )
        assert found.masked == 0
        assert found.labels.tolist() == [0, 1, 2, 3, 0]
        assert bool(torch.isfinite(found.lse).all())
        assert float(found.column_sums.sum()) == pytest.approx(5, rel=1e-5)
        before = found.lse


@pytest.mark.parametrize(("rows", "cols"), [(1_000_001, 10), (300_001, 257), (60_001, 3000), (60_001, 9000)])
def test_more_tiles_than_blocks_are_all_done(card, assert_equal_to_twin, rows, cols):
    if card.played:
        rows //= 97  # a processor has no blocks: this only sees to it that the test itself works
    generator = torch.Generator(card.place).manual_seed(0)
    logits = torch.randn(rows, cols, generator=generator, dtype=torch.float16, device=card.place)
    potential = torch.randn(cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = pass_in_torch(logits, potential, scale=SCALE, want_labels=True)
    found = kernels.sinkhorn_pass(logits, potential, scale=SCALE, want_labels=True)
    assert_equal_to_twin(found, expected, logits, potential, SCALE)
    assert float(found.column_sums.sum()) == pytest.approx(rows, rel=1e-5)


def test_no_rows_are_an_answer_too(card):
    found = kernels.sinkhorn_pass(torch.zeros(0, 5, device=card.place), np.zeros(5), want_labels=True)
    assert found.column_sums.tolist() == [0.0] * 5
    assert found.labels.shape == found.lse.shape == (0,)
    assert (found.objective, found.weight, found.masked) == (0.0, 0.0, 0)


def test_arguments_may_live_anywhere_and_gradients_are_left_behind(card, assert_equal_to_twin):
    logits, potential = case(70, 33)
    weights = torch.rand(70, generator=torch.Generator().manual_seed(1))
    expected = twin(logits, potential, row_weights=weights)
    on_card = logits.to(card.place).requires_grad_()
    arguments = (
        (potential, weights),
        (potential.to(card.place), weights.to(card.place)),
        (potential.numpy(), weights.numpy()),
        (potential.tolist(), weights.tolist()),
        (potential.numpy()[::-1].copy()[::-1], np.broadcast_to(weights.numpy(), (70,))),  # backwards, and read-only
        (potential.to(card.place).requires_grad_(), weights.double()),
    )
    for g, w in arguments:
        found = kernels.sinkhorn_pass(on_card, g, scale=SCALE, row_weights=w)
        assert not found.lse.requires_grad
        assert_equal_to_twin(found, expected, logits, potential, SCALE)


def test_arguments_are_refused_in_one_line(card):
    good = torch.zeros(4, 3, device=card.place)
    with pytest.raises(DataError, match=r"\[N, K\], found shape \(4,\)"):
        kernels.sinkhorn_pass(good[:, 0], np.zeros(3))
    with pytest.raises(DataError, match="found int64; convert"):
        kernels.sinkhorn_pass(good.long(), np.zeros(3))
    with pytest.raises(OptionError, match=r"potential: expected shape \(3,\), found \(2,\)"):
        kernels.sinkhorn_pass(good, np.zeros(2))
    with pytest.raises(OptionError, match="potential: expected 3 numbers, found str"):
        kernels.sinkhorn_pass(good, "abc")
    with pytest.raises(OptionError, match="potential: expected finite numbers, found"):
        kernels.sinkhorn_pass(good, [0, np.nan, 0])
    with pytest.raises(OptionError, match="row_weights: expected numbers"):
        kernels.sinkhorn_pass(good, np.zeros(3), row_weights=[1.0, 1, -1, 1])
    with pytest.raises(OptionError, match="row_weights: expected numbers"):
        kernels.sinkhorn_pass(good, np.zeros(3), row_weights=[1.0, 1, np.nan, 1])
    with pytest.raises(OptionError, match=r"row_weights: expected shape \(4,\), found \(3,\)"):
        kernels.sinkhorn_pass(good, np.zeros(3), row_weights=np.ones(3))
    with pytest.raises(OptionError, match=r"reference: expected shape \(4,\)"):
        kernels.sinkhorn_pass(good, np.zeros(3), reference=np.zeros(5))
    with pytest.raises(OptionError, match=r"scale: expected a finite number > 0, found 0\.0"):
        kernels.sinkhorn_pass(good, np.zeros(3), scale=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [1, 3, 20])
def test_candidates_are_those_of_the_twin_and_repeat_their_bits(card, assert_equal_to_twin, dtype, every):
    for rows, cols in FEW_SIZES:
        logits, potential = case(rows, cols, dtype, spread=0.3)
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(1))
        weights[1::5] = 0
        options = {"row_weights": weights, "every": every, "keep": 9.0}
        expected = twin(logits, potential, want_labels=True, **options)
        on_card, before = logits.to(card.place), None
        for _ in range(2):
            found, again = (
                kernels.sinkhorn_pass(on_card, potential, scale=SCALE, reference=before, want_labels=True, **options)
                for _ in range(2)
            )
            kept, wanted = found.candidates, expected.candidates
            for name in ("offsets", "columns", "values"):
                assert getattr(kept, name).device == on_card.device
                assert torch.equal(getattr(kept, name), getattr(again.candidates, name))
            assert_equal_candidates(kept, wanted)
            if every == 1:
                assert_equal_to_twin(found, expected, logits, potential, SCALE)
            before = found.lse


def assert_equal_candidates(kept, wanted):
    """The same entries but for those at the very level, in the same order."""
    keys, others = (
        np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * wanted.cols + columns
        for offsets, columns in (
            (kept.offsets.cpu().numpy(), kept.columns.cpu().numpy().astype(np.int64)),
            (wanted.offsets(), wanted.columns().astype(np.int64)),
        )
    )
    values = kept.values.cpu().numpy()
    assert (np.diff(keys) > 0).all()
    assert (np.abs(values[~np.isin(keys, others)] + wanted.level) < 1e-3).all()
    assert (np.abs(wanted.values()[~np.isin(others, keys)] + wanted.level) < 1e-3).all()
    _, mine, theirs = np.intersect1d(keys, others, return_indices=True)
    np.testing.assert_allclose(values[mine], wanted.values()[theirs], atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["fixed16", "float16", "bfloat16"])
def test_stored_logits_have_the_bits_of_the_cpu_and_passes_over_them_its_sums(card, assert_equal_to_twin, dtype, kind):
    for rows, cols in FEW_SIZES:
        logits, potential = case(rows, cols, dtype)
        logits[2, 0], logits[3, cols - 1] = float("nan"), -float("inf")
        expected = kernels.store_logits(
            logits.float().numpy() if dtype == torch.bfloat16 else logits.numpy(), kind, lam=SCALE
        )
        found = kernels.store_logits(logits.to(card.place), kind, lam=SCALE)
        assert found.saturated == expected.saturated
        np.testing.assert_array_equal(bits_of(found.values).view(np.uint16), expected.values.view(np.uint16))
        np.testing.assert_array_equal(found.maxima.cpu().numpy(), expected.maxima)
        stands_for = torch.from_numpy(expected.decoded(0, rows))
        wanted = twin(stands_for, potential, want_labels=True)
        wanted = replace(wanted, lse=wanted.lse.float())
        before = None
        for _ in range(2):
            sums = kernels.sinkhorn_pass(found, potential, scale=SCALE, reference=before, want_labels=True)
            assert sums.lse.device == found.values.device
            assert_equal_to_twin(sums, wanted, stands_for.float(), potential, SCALE)
            before = sums.lse
