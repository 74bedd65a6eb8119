"""Candidates of a pass and Newton's method on them: equal to dense formulas, to the twin, and on any threads."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import kernels
from sela_ext.errors import OptionError
from sela_ext.kernels import reference

ISAS = ("generic", "avx2", "avx512")
BEST = ISAS.index(sela_ext.build_info()["cpu_isa"])
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAM = 25.0


def case(rows, cols, dtype=torch.float32, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, cols, generator=generator)).to(dtype)
    return logits, spread * torch.randn(cols, generator=generator, dtype=torch.float64)


def peaked_rows(rows=900, cols=60, *, spread=0.2, weights=None, keep=16.0):
    """Rows for Newton, the pass they are of, and the weight of all."""
    logits, _ = case(rows, cols, spread=spread, seed=3)
    found = kernels.sinkhorn_pass(logits.numpy(), np.zeros(cols), scale=LAM, row_weights=weights, keep=keep)
    return found, reference.newton_rows(found.candidates, cols), kernels.newton_rows(found.candidates)


def arrays(candidates):
    return candidates.offsets(), candidates.columns(), candidates.values(), candidates.weights()


# ---- Candidates.


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.05, 1.0, 20.0])
def test_candidates_are_those_of_the_twin(isa, dtype, spread):
    for rows, cols in ((1, 1), (2, 31), (129, 33), (130, 1001), (257, 300), (3, 70_001)):
        logits, potential = case(rows, cols, dtype, spread)
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(1))
        weights[rows // 2] = 0
        expected = reference.sinkhorn_pass(logits, potential, scale=LAM, row_weights=weights, keep=16.0).candidates
        before = None
        for want_labels in (False, True):
            found = kernels.sinkhorn_pass(
                logits,
                potential,
                scale=LAM,
                row_weights=weights,
                keep=16.0,
                want_labels=want_labels,
                isa=isa,
                reference=before,
            )
            before = found.lse
            offsets, columns, values, kept_weights = arrays(found.candidates)
            # an entry at the threshold may fall on either side of it; all others must be there
            same = np.array_equal(offsets, expected.offsets())
            assert same or abs(len(values) - expected.entries) <= 1 + 2e-5 * expected.entries
            assert columns.dtype == (np.uint16 if cols <= 65536 else np.uint32)
            assert np.array_equal(kept_weights, weights.numpy())
            if same:
                assert np.array_equal(columns, expected.columns())
                np.testing.assert_allclose(values, expected.values(), atol=3e-5 * max(spread, 1.0))


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.05, 20.0])
def test_keeping_candidates_changes_no_bit_and_threads_change_none_of_theirs(isa, dtype, spread):
    logits, potential = case(1201, 301, dtype, spread)
    weights = torch.rand(1201)
    plain = kernels.sinkhorn_pass(logits, potential, scale=LAM, row_weights=weights, isa=isa)
    kept = [
        kernels.sinkhorn_pass(logits, potential, scale=LAM, row_weights=weights, isa=isa, keep=16.0, threads=threads)
        for threads in (1, 2, 3)
    ]
    for found in kept:
        assert torch.equal(found.column_sums, plain.column_sums)
        assert torch.equal(found.lse, plain.lse)
        assert found.objective == plain.objective
        for mine, first in zip(arrays(found.candidates), arrays(kept[0].candidates), strict=True):
            assert np.array_equal(mine, first)


def test_too_many_candidates_are_not_kept_on_any_number_of_threads():
    logits, potential = case(1000, 64, spread=0.05)
    count = kernels.sinkhorn_pass(logits, potential, keep=16.0).candidates.entries
    assert count > 10_000
    for threads in (1, 2, 3):
        full = kernels.sinkhorn_pass(logits, potential, keep=16.0, keep_at_most=count, threads=threads).candidates
        assert (full.overflow, full.entries) == (False, count)
        less = kernels.sinkhorn_pass(logits, potential, keep=16.0, keep_at_most=count - 1, threads=threads).candidates
        assert (less.overflow, less.entries, len(less.offsets())) == (True, 0, 0)
    with pytest.raises(OptionError, match="more than keep_at_most"):
        kernels.newton_rows(less)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_rows_and_rows_of_weight_zero_have_no_candidates(dtype):
    for cols in (31, 400):
        logits, potential = case(200, cols, dtype, 20.0)
        logits[3, 4] = float("nan")
        logits[150] = -float("inf")
        logits[7, 1] = float("inf")
        logits[8, 1] = -float("inf")
        weights = torch.ones(200)
        weights[11] = 0
        found = kernels.sinkhorn_pass(logits, potential, scale=LAM, row_weights=weights, keep=16.0)
        lengths = np.diff(found.candidates.offsets())
        assert np.flatnonzero(lengths == 0).tolist() == [3, 7, 11, 150]
        assert found.masked == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nth_group_of_rows_is_read_and_the_rest_keeps_its_reference(dtype):
    logits, potential = case(1100, 65, dtype, 20.0)
    for every in (2, 3, 8, 45, 100):
        read = (np.arange(1100) // 4) % every == 0
        expected = reference.sinkhorn_pass(logits, potential, scale=LAM, every=every, keep=16.0, want_labels=True)
        found = kernels.sinkhorn_pass(logits, potential, scale=LAM, every=every, keep=16.0, want_labels=True)
        alone = kernels.sinkhorn_pass(logits[read], potential, scale=LAM, keep=16.0)
        assert found.weight == expected.weight == alone.weight == read.sum()
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        assert float((found.column_sums - expected.column_sums).abs().sum()) < tolerance * read.sum()
        assert torch.equal(found.labels, expected.labels)
        assert np.array_equal(np.isnan(found.lse.numpy()), ~read)
        assert found.candidates.rows == read.sum()
        for mine, theirs in zip(arrays(found.candidates), arrays(alone.candidates), strict=True):
            assert np.array_equal(mine, theirs)
        known = torch.arange(1100).to(found.lse.dtype)
        later = kernels.sinkhorn_pass(logits, potential, scale=LAM, every=every, reference=known).lse
        assert torch.equal(later[~read], known[~read])
        whole = kernels.sinkhorn_pass(logits, potential, scale=LAM)
        partly_known = kernels.sinkhorn_pass(logits, potential, scale=LAM, reference=found.lse)
        torch.testing.assert_close(partly_known.lse, whole.lse)


def test_candidates_are_refused_where_they_are_not_available():
    logits = np.zeros((4, 3), np.float32)
    with pytest.raises(OptionError, match=r"keep: expected a number of nats in 0 .. 24 for float32 logits, found 25"):
        kernels.sinkhorn_pass(logits, np.zeros(3), keep=25)
    with pytest.raises(OptionError, match="every: expected an integer >= 1, found 0"):
        kernels.sinkhorn_pass(logits, np.zeros(3), every=0)


# ---- Sums and products.


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 2.5, 16.0])
def test_sums_and_products_are_those_of_the_dense_formulas(isa, weighted, ratio):
    weights = np.random.default_rng(2).random(900).astype(np.float32) if weighted else None
    _, twin, rows = peaked_rows(weights=weights)
    assert (rows.rows, rows.entries) == (twin.rows, twin.entries)
    assert rows.weight == pytest.approx(twin.weight, rel=1e-12)
    np.testing.assert_allclose(rows.counts(), twin.counts(), rtol=1e-12)
    d = np.random.default_rng(1).standard_normal(60) * 3
    found = kernels.newton_sums(rows, d, ratio=ratio, isa=isa)
    expected = reference.newton_sums(twin, d, ratio=ratio)
    np.testing.assert_allclose(found.columns, expected.columns, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.diagonal, expected.diagonal, rtol=1e-9, atol=1e-12)
    assert found.objective == pytest.approx(expected.objective, rel=1e-12)
    np.testing.assert_allclose(found.plan, expected.plan, rtol=2e-6, atol=1e-37)
    x = np.random.default_rng(5).standard_normal(60)
    product = kernels.newton_product(rows, found.plan, x, isa=isa)
    np.testing.assert_allclose(product, reference.newton_product(twin, found.plan, x), atol=2e-4)
    assert np.abs(product.sum()) < 1e-9  # the vector of ones is in the kernel of the Hessian, from both sides
    assert np.abs(kernels.newton_product(rows, found.plan, np.ones(60), isa=isa)).max() < 1e-9


def test_more_columns_than_16_bits_count():
    logits, potential = case(60, 70_001, spread=0.5)
    found = kernels.sinkhorn_pass(logits, potential, scale=LAM, keep=16.0)
    assert found.candidates.columns().max() > 65_536
    twin, rows = reference.newton_rows(found.candidates, 70_001), kernels.newton_rows(found.candidates)
    d = np.random.default_rng(0).standard_normal(70_001)
    sums, expected = kernels.newton_sums(rows, d), reference.newton_sums(twin, d)
    np.testing.assert_allclose(sums.columns, expected.columns, rtol=1e-9, atol=1e-12)
    product = kernels.newton_product(rows, sums.plan, d)
    np.testing.assert_allclose(product, reference.newton_product(twin, sums.plan, d), atol=1e-5)
    kernels.newton_prune(rows, sums.plan, 5.0)
    reference.newton_prune(twin, sums.plan, 5.0)
    assert (rows.rows, rows.entries) == (twin.rows, twin.entries)
    np.testing.assert_allclose(kernels.newton_sums(rows, d).columns, reference.newton_sums(twin, d).columns, rtol=1e-9)


def test_gradient_and_hessian_are_the_differences_of_the_objective():
    _, _, rows = peaked_rows()
    rng = np.random.default_rng(0)
    d, step = rng.standard_normal(60), 1e-4
    at = kernels.newton_sums(rows, d, ratio=1.5)
    for _ in range(5):
        x = rng.standard_normal(60)
        up = kernels.newton_sums(rows, d + step * x, ratio=1.5)
        down = kernels.newton_sums(rows, d - step * x, ratio=1.5)
        assert (up.objective - down.objective) / (2 * step) == pytest.approx(at.columns @ x, rel=1e-7)
        product = kernels.newton_product(rows, at.plan, x)
        np.testing.assert_allclose((up.columns - down.columns) / (2 * step), product, atol=2e-4)
    unit = np.eye(60)[17]
    assert at.diagonal[17] == pytest.approx(kernels.newton_product(rows, at.plan, unit)[17], rel=1e-5)


def test_bits_of_sums_products_and_solutions_do_not_depend_on_threads():
    logits, _ = case(6000, 300, spread=0.3, seed=1)
    found = kernels.sinkhorn_pass(logits.numpy(), np.zeros(300), scale=LAM, keep=16.0)
    offsets = found.candidates.offsets()
    rows = kernels.newton_rows(found.candidates)
    assert rows.entries > 100_000  # enough for several pieces and threads
    assert offsets[-1] >= rows.entries
    target, d = np.full(300, 20.0), np.linspace(-1, 1, 300)
    results = []
    for threads in (1, 2, 3):
        sums = kernels.newton_sums(rows, d, threads=threads)
        product = kernels.newton_product(rows, sums.plan, d, threads=threads)
        solution = kernels.newton_solve(rows, target, np.zeros(300), d, threads=threads)
        assert not solution.stalled
        results.append((sums.columns, sums.diagonal, np.float64(sums.objective), sums.plan, product, solution.d))
    for other in results[1:]:
        for mine, first in zip(other, results[0], strict=True):
            assert mine.tobytes() == first.tobytes()


def test_pruning_drops_small_entries_and_counts_the_rows_that_have_one_left():
    weights = np.random.default_rng(4).random(900).astype(np.float32)
    _, twin, rows = peaked_rows(weights=weights)
    d = np.random.default_rng(1).standard_normal(60)
    plan = kernels.newton_sums(rows, d, ratio=4.0).plan
    before = rows.entries
    kernels.newton_prune(rows, plan, 9.0)
    reference.newton_prune(twin, plan, 9.0)
    assert 0 < rows.entries < before
    assert (rows.rows, rows.entries) == (twin.rows, twin.entries)
    np.testing.assert_allclose(rows.counts(), twin.counts(), rtol=1e-12)
    pruned = kernels.newton_sums(rows, d, ratio=4.0)
    np.testing.assert_allclose(pruned.columns, reference.newton_sums(twin, d, ratio=4.0).columns, rtol=1e-10)
    assert pruned.columns.sum() == pytest.approx(rows.weight, rel=1e-12)


def test_a_solve_can_prune_at_its_solution():
    found, twin, rows = peaked_rows()
    target = np.full(60, found.weight / 60)
    solution = kernels.newton_solve(rows, target, np.zeros(60), np.zeros(60), ratio=2.0, prune=9.0)
    expected = reference.newton_solve(twin, target, np.zeros(60), np.zeros(60), ratio=2.0, prune=9.0)
    assert rows.entries == twin.entries
    again = reference.newton_rows(kernels.sinkhorn_pass(case(900, 60, spread=0.2, seed=3)[0], np.zeros(60), scale=LAM,
                                                        keep=16.0).candidates, 60)  # fmt: skip
    assert rows.entries < again.entries
    reference.newton_prune(again, reference.newton_sums(again, expected.d, ratio=2.0).plan, 9.0)
    assert rows.entries == again.entries
    np.testing.assert_allclose(solution.d, expected.d, atol=1e-4)


# ---- The inner solve.


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 1.4])
def test_the_inner_solve_reaches_the_wanted_columns(weighted, ratio):
    weights = np.random.default_rng(2).random(900).astype(np.float32) if weighted else None
    found, twin, rows = peaked_rows(weights=weights)
    target = np.random.default_rng(3).random(60) + 0.5
    target *= found.weight / target.sum()
    defect = found.column_sums - kernels.newton_sums(rows, np.zeros(60)).columns
    assert np.abs(defect).sum() < 1e-3 * found.weight
    solution = kernels.newton_solve(rows, target, defect, np.zeros(60), ratio=ratio, tolerance=1e-9)
    expected = reference.newton_solve(twin, target, defect, np.zeros(60), ratio=ratio, tolerance=1e-9)
    assert not solution.stalled
    assert solution.error <= 1e-9
    assert solution.steps < 15
    assert solution.products > 0
    np.testing.assert_allclose(solution.d, expected.d, atol=1e-6)
    columns = kernels.newton_sums(rows, solution.d, ratio=ratio).columns
    assert np.abs(columns + defect - target).sum() < 1e-3 * found.weight


def test_a_column_without_candidates_takes_a_sinkhorn_step():
    # two columns share all rows; the third is far below: what it will get is known from the defect alone
    logits = np.zeros((300, 3), np.float32)
    logits[:, :2] = np.random.default_rng(0).standard_normal((300, 2))
    logits[:, 2] = -10.0
    found = kernels.sinkhorn_pass(logits, np.zeros(3), scale=20.0, keep=16.0)
    rows = kernels.newton_rows(found.candidates)
    defect = found.column_sums - kernels.newton_sums(rows, np.zeros(3)).columns
    defect[2] = 1e-7
    solution = kernels.newton_solve(rows, np.array([140.0, 150.0, 10.0]), defect, np.zeros(3), tolerance=1e-8)
    assert not solution.stalled
    assert solution.d[2] == pytest.approx(np.log(10.0 / 1e-7), abs=0.01)
    assert np.abs(solution.d[:2]).max() < 1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 1.4])
@pytest.mark.parametrize("kind", ["weak", "strong", "bounds", "tight", "wide"])
def test_columns_that_are_pulled_or_bounded_end_where_their_law_says(weighted, ratio, kind):
    rng = np.random.default_rng(2)
    found, twin, rows = peaked_rows(weights=rng.random(900).astype(np.float32) if weighted else None)
    target = rng.random(60) + 0.5
    if kind != "tight":
        target[5] = 0  # stays where it is
    target *= found.weight / target.sum()
    defect = found.column_sums - kernels.newton_sums(rows, np.zeros(60)).columns
    offset = 0.5 * rng.standard_normal(60)
    offset[::3] = 0.0
    strength = {"weak": 0.3, "strong": 100.0}.get(kind, 0.0)
    width = {"bounds": 1.2, "tight": 1.0, "wide": 50.0}.get(kind)
    bounds = None if width is None else (target / width, target * width)
    law = kernels.ColumnLaw(offset, strength, bounds)
    solution = kernels.newton_solve(rows, target, defect, np.zeros(60), ratio=ratio, tolerance=1e-9, law=law)
    assert not solution.stalled
    assert solution.error <= 1e-9
    assert solution.steps < 25
    assert (solution.d[5] == 0) == (kind != "tight")
    columns = kernels.newton_sums(rows, solution.d, ratio=ratio).columns + defect
    w, others = offset + solution.d, target > 0
    if bounds is None:
        np.testing.assert_allclose(columns[others], (target * np.exp(-w / strength))[others], rtol=1e-3, atol=1e-3)
    else:
        low, high = bounds
        np.testing.assert_allclose(columns[(w > 0) & others], low[(w > 0) & others], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(columns[(w < 0) & others], high[(w < 0) & others], rtol=1e-3, atol=1e-3)
        rest = (w == 0) & others
        assert ((low <= columns + 1e-3) & (columns <= high + 1e-3))[rest].all()
        assert rest.any() == (kind != "tight")
    expected = reference.newton_solve(twin, target, defect, np.zeros(60), ratio=ratio, tolerance=1e-9, law=law)
    free = kind in ("tight", "bounds")  # a constant may be free where no column rests
    change = (solution.d - expected.d)[others]
    np.testing.assert_allclose(change - (change.mean() if free else 0), 0, atol=1e-5)


def test_reach_limits_how_far_a_column_moves_and_target_zero_holds_it():
    found, _, rows = peaked_rows()
    target = np.ones(60)
    target[:30] = 1e-3
    target[7] = 0
    target *= found.weight / target.sum()
    free = kernels.newton_solve(rows, target, np.zeros(60), np.zeros(60), tolerance=1e-6)
    assert np.abs(free.d).max() > 2
    assert free.d[7] == 0
    held = kernels.newton_solve(rows, target, np.zeros(60), np.zeros(60), tolerance=1e-6, reach=1.0)
    assert held.stalled
    assert 0.5 < np.abs(held.d).max() <= 1.0 + 1e-12
    start = kernels.newton_sums(rows, np.zeros(60))
    assert held.error < np.abs(start.columns - target).sum() / found.weight


def test_the_best_point_is_returned_when_steps_run_out():
    found, _, rows = peaked_rows()
    target = np.full(60, found.weight / 60)
    errors = [
        kernels.newton_solve(rows, target, np.zeros(60), np.zeros(60), tolerance=1e-12, steps=steps).error
        for steps in (0, 1, 2, 30)
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    none = kernels.newton_solve(rows, target, np.zeros(60), np.zeros(60), steps=0)
    assert none.stalled
    assert not none.d.any()


def test_rows_without_any_choice_are_solved_at_once():
    logits = np.where(np.eye(40, dtype=bool), 100.0, 0.0).astype(np.float32)
    found = kernels.sinkhorn_pass(logits, np.zeros(40), keep=16.0)
    rows = kernels.newton_rows(found.candidates)
    assert (rows.rows, rows.entries) == (0, 0)
    assert rows.counts().tolist() == [1.0] * 40
    solution = kernels.newton_solve(rows, np.ones(40), np.zeros(40), np.zeros(40))
    assert (solution.stalled, solution.error, solution.steps) == (False, 0.0, 0)


def test_denormals_are_the_callers_own_again_after_a_call():
    _, _, rows = peaked_rows()
    sums = kernels.newton_sums(rows, np.zeros(60), threads=1)
    kernels.newton_product(rows, sums.plan, np.ones(60), threads=1)
    tiny = np.array([1e-310]) * np.array([0.5])
    assert tiny[0] == 5e-311


def test_arguments_are_refused_in_one_line():
    _, _, rows = peaked_rows(cols=60)
    ones = np.ones(60)
    with pytest.raises(OptionError, match=r"d: expected shape \(60,\), found \(3,\)"):
        kernels.newton_sums(rows, np.zeros(3))
    with pytest.raises(OptionError, match=r"ratio: expected a number in 1 .. 65536, found 0.5"):
        kernels.newton_sums(rows, np.zeros(60), ratio=0.5)
    with pytest.raises(OptionError, match="plan: expected shape"):
        kernels.newton_product(rows, np.zeros(3, np.float32), ones)
    with pytest.raises(OptionError, match="target: expected numbers >= 0 and one above"):
        kernels.newton_solve(rows, -ones, ones, ones)
    with pytest.raises(OptionError, match="clip: expected a number > 0, found 0"):
        kernels.newton_solve(rows, ones, ones, ones, clip=0)
    for law, message in (
        (kernels.ColumnLaw(ones), "law: expected a strength > 0 or bounds"),
        (kernels.ColumnLaw(ones, 1.0, (ones, ones)), "law: expected a strength > 0 or bounds"),
        (kernels.ColumnLaw(ones, 0.0, (2 * ones, ones)), "bounds: expected 0 <= low <= high"),
        (kernels.ColumnLaw(ones[:3], 1.0), r"offset: expected shape \(60,\)"),
    ):
        with pytest.raises(OptionError, match=message):
            kernels.newton_solve(rows, ones, ones, ones, law=law)
    with pytest.raises(OptionError, match="level: expected a number of nats > 0"):
        kernels.newton_prune(rows, np.zeros(rows.entries, np.float32), 0)
    with pytest.raises(OptionError, match="defect: expected finite numbers"):
        kernels.newton_solve(rows, ones, ones * np.nan, ones)


def test_twin_and_kernel_have_the_same_arguments():
    assert {f.name for f in dataclasses.fields(kernels.SinkhornSums)} >= {"candidates", "lse"}
    logits, potential = case(50, 9)
    found = reference.sinkhorn_pass(logits.numpy(), potential.numpy(), keep=16.0)
    rows = reference.newton_rows(found.candidates)
    target = np.full(9, 50 / 9)
    assert not reference.newton_solve(rows, target, np.zeros(9), np.zeros(9), reach=30.0).stalled
