"""Candidates, parts of the rows and stored logits in the CUDA kernels, executed by the SIMT runner: equal to float64
numpy and to the CPU kernels, with the same bits for any grid and any order of the threads.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

TYPES = ("float32", "float16", "bfloat16", "float64")
FEW = (33, 1001, 1030, 8193)  # one of every mapping

spec = importlib.util.spec_from_file_location("logit_rows", Path(__file__).with_name("logit_rows.py"))
logit_rows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(logit_rows)
Rows, address, laid_out, stored = logit_rows.Rows, logit_rows.address, logit_rows.laid_out, logit_rows.stored
STEPS, IMPOSSIBLE = logit_rows.STEPS, logit_rows.IMPOSSIBLE


@dataclass
class Found:
    units: np.ndarray
    lse: np.ndarray
    labels: np.ndarray
    totals: np.ndarray
    masked: int
    offsets: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    marks: np.ndarray  # uint32 [rows read, words]: what the pass leaves for the search

    def same_bits(self, other, candidates=True):
        names = ("units", "lse", "labels", "totals", *(("offsets", "columns", "values") if candidates else ()))
        for name in names:
            assert getattr(self, name).tobytes() == getattr(other, name).tobytes(), name
        assert self.masked == other.masked


def run(simt, rows, potential, *, scale=1.0, weights=None, reference=None, level=0.0, every=1, first_row=0,
        rows_in_all=0, maxima=None, maxima_scale=0.0):  # fmt: skip
    """One pass on the runner and, with a level, the search for the candidates that it counted."""
    n, cols = rows.exact.shape
    real = np.float64 if rows.kind == "float64" else np.float32
    weights = None if weights is None else np.asarray(weights, np.float32)
    before = None if reference is None else np.asarray(reference, real)
    stored = maxima is not None
    count, scratch_bytes = simt.sinkhorn_workspace_cuda(*rows.where, first_row, every, level > 0, stored)
    potential = np.asarray(potential, np.float64)
    read = int((np.arange(first_row, first_row + n) // 4 % every == 0).sum())
    units, masked, totals = np.zeros(cols, np.int64), np.zeros(1, np.int64), np.zeros(count)
    lse, labels, counts = np.full(n, -777, real), np.full(n, -777, np.int32), np.zeros(read, np.int32)
    scratch = np.full(scratch_bytes // 4 + 4, np.nan, np.float32)
    largest = 1.0 if weights is None else max(float(weights.max()), 1e-30)
    simt.sinkhorn_pass_cuda(
        *(*rows.where, scale, address(potential), address(weights), largest, address(before), address(units)),
        *(address(lse), address(labels), address(totals), address(masked), address(scratch), 0, rows_in_all),
        *(first_row, every, level, address(counts), address(maxima), maxima_scale),
    )
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    columns, values = np.full(offsets[-1] + 1, -777, np.int32), np.full(offsets[-1] + 1, -777, np.float32)
    if level > 0:
        simt.sinkhorn_candidates_cuda(
            *(*rows.where, scale, address(potential), first_row, every, level, stored, address(scratch)),
            *(address(offsets), address(columns), address(values), 0),
        )
    assert columns[-1] == values[-1] == -777  # nothing behind the last
    assert np.isnan(scratch[-4:]).all()
    words = -(-cols // (32 * run_of(rows))) if level > 0 else 0
    marks = scratch.view(np.uint32)[scratch_bytes // 4 - read * words : scratch_bytes // 4].reshape(read, words)
    return Found(units, lse, labels, totals, int(masked[0]), offsets, columns[:-1], values[:-1], marks)


def run_of(rows):
    """Columns of a mark: those of 16 bytes, one where rows are unaligned."""
    size = rows.memory.itemsize
    return 1 if rows.address % 16 or rows.stride * size % 16 else 16 // size


def plan(rows, potential, scale):
    """log p in float64 of every row, with NaN where it is masked, and its log-sum-exp."""
    if rows.kind != "float64":
        scale, potential = float(np.float32(scale)), potential.astype(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):
        t = rows.exact * scale + potential
        bad = np.isnan(t).any(1) | (t == np.inf).any(1) | (t == -np.inf).all(1)
    t = np.where(bad[:, None], np.nan, t)
    top = t.max(1)
    lse = top + np.log(np.exp(t - top[:, None]).sum(1))
    return t - lse[:, None], lse


def check(found, rows, potential, scale, level, weights=None, every=1, first_row=0):
    """The candidates are those of float64, but for those at the very level, in the order of rows and columns."""
    log_p, _ = plan(rows, potential, scale)
    n = len(log_p)
    read = np.flatnonzero(np.arange(first_row, first_row + n) // 4 % every == 0)
    assert len(found.offsets) == len(read) + 1
    slack = (
        1e-9 if rows.kind == "float64" else 2e-5 * max(1.0, float(np.abs(np.nan_to_num(log_p, neginf=0)).max()) / 50)
    )
    for r, row in enumerate(read):
        part = slice(found.offsets[r], found.offsets[r + 1])
        columns, values = found.columns[part], found.values[part]
        if np.isnan(log_p[row]).any() or (weights is not None and weights[row] == 0):
            assert not len(columns)
            continue
        assert (np.diff(columns) > 0).all()
        wanted = set(np.flatnonzero(log_p[row] > -level + slack))
        allowed = set(np.flatnonzero(log_p[row] > -level - slack))
        assert wanted <= set(columns) <= allowed
        np.testing.assert_allclose(values, log_p[row][columns], atol=2 * slack, rtol=1e-6)


def case(n, cols, kind, aligned=True, spread=1.0, spoil=True):
    rng = np.random.default_rng([n, cols])
    values = spread * rng.standard_normal((n, cols))
    values[np.arange(n), rng.integers(0, cols, n)] += 3 * spread
    weights = rng.integers(0, 4, n).astype(np.float64)
    weights[0] = 1
    if spoil and n > 9:
        values[3, cols // 2] = np.nan
        values[7] = -np.inf
        values[8, 0] = np.inf
        values[9, cols - 1] = -np.inf
    return laid_out(values, kind, aligned), 0.5 * rng.standard_normal(cols), weights


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", [1, 31, 256, 257, 1001, 1024, 1025, 3001, 8193])
@pytest.mark.parametrize("kind", TYPES)
def test_candidates_are_those_of_float64_in_the_order_of_rows_and_columns(simt, kind, cols):
    n = 70 if cols < 3000 else 13
    for aligned in (True, False):
        for spread, level in ((0.5, 7.0), (6.0, 12.0)):
            rows, potential, weights = case(n, cols, kind, aligned, spread)
            first = run(simt, rows, potential, scale=2.0, weights=weights, level=level)
            check(first, rows, potential, 2.0, level, weights)
            off = np.where(np.arange(n) % 5 == 2, first.lse + 90, first.lse + 0.5)  # some are done again, with care
            second = run(simt, rows, potential, scale=2.0, weights=weights, reference=off, level=level)
            check(second, rows, potential, 2.0, level, weights)
            assert first.masked == second.masked == (4 if cols == 1 else 3)


@pytest.mark.plain_only
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("cols", FEW)
@pytest.mark.parametrize("kind", TYPES)
def test_marks_are_those_of_runs_with_a_candidate_and_no_others(simt, kind, cols, every):
    """The search reads what is marked: a mark too many costs time alone, which no result tells."""
    for aligned in (True, False):
        rows, potential, weights = case(67, cols, kind, aligned, spread=6.0)
        found = run(simt, rows, potential, scale=2.0, weights=weights, level=12.0, every=every)
        read = np.repeat(np.arange(len(found.marks)), np.diff(found.offsets))
        wanted = np.zeros((len(found.marks), 32 * found.marks.shape[1]), bool)
        wanted[read, found.columns // run_of(rows)] = True
        bits = found.marks[:, :, None] >> np.arange(32, dtype=np.uint32) & 1
        assert wanted.any()
        np.testing.assert_array_equal(bits.reshape(wanted.shape), wanted)


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", FEW)
@pytest.mark.parametrize("kind", TYPES)
def test_candidates_change_no_bit_of_the_other_results(simt, kind, cols):
    for aligned in (True, False):
        rows, potential, weights = case(67, cols, kind, aligned)
        for reference in (None, plan(rows, potential, 2.0)[1]):
            options = {"scale": 2.0, "weights": weights, "reference": reference}
            with_them = run(simt, rows, potential, level=9.0, **options)
            with_them.same_bits(run(simt, rows, potential, **options), candidates=False)


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", FEW)
def test_candidates_are_those_of_the_cpu(simt, cols):
    rows, potential, weights = case(131, cols, "float32", spread=3.0)
    lse = plan(rows, potential, 2.0)[1]
    weights = weights.astype(np.float32)
    for every in (1, 3):
        found = run(simt, rows, potential, scale=2.0, weights=weights, reference=lse, level=11.0, every=every)
        kept = simt.Candidates(level=11.0, limit=2**40)
        outputs = [np.zeros(cols, np.int64), np.zeros(131, np.float32), np.zeros(131, np.int32)]
        simt.sinkhorn_pass_cpu(
            *(*rows.where, 2.0, address(potential), address(weights), float(weights.max()), 0),
            *(*map(address, outputs), 1, "", every, kept),
        )
        assert np.abs(kept.values() + 11).min() > 1e-4  # none is at the very level
        np.testing.assert_array_equal(found.offsets, kept.offsets())
        np.testing.assert_array_equal(found.columns, kept.columns())
        np.testing.assert_allclose(found.values, kept.values(), atol=2e-5)


@pytest.mark.parametrize("cols", FEW)
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_bits_are_the_same_for_any_grid_and_any_schedule(simt, schedule, kind, cols):
    rows, potential, weights = case(133 if cols < 8193 else 9, cols, kind, cols % 2 == 1, spread=3.0)
    lse = np.where(np.arange(len(weights)) % 9 == 2, np.nan, plan(rows, potential, 1.0)[1])
    for every in (1, 2):
        options = {"weights": weights, "reference": lse, "level": 10.0, "every": every}
        try:
            simt.set_device(1, 1)
            one = run(simt, rows, potential, **options)
            simt.set_device(3, 2)
            run(simt, rows, potential, **options).same_bits(one)
        finally:
            simt.set_device(2, 2)


@pytest.mark.plain_only
@pytest.mark.parametrize("every", [2, 3, 5, 16, 17, 40, 1000])
@pytest.mark.parametrize("cols", FEW)
def test_every_so_many_groups_of_four_rows_are_read_and_no_others(simt, every, cols):
    n, first_row = 333 if cols < 8193 else 75, 1280
    for kind, aligned in (("float32", True), ("float16", True), ("bfloat16", False)):
        rows, potential, weights = case(n, cols, kind, aligned)
        log_p, lse = plan(rows, potential, 1.0)
        for first in (0, 128, first_row):
            read = np.arange(first, first + n) // 4 % every == 0
            for reference in (None, lse):
                options = {"weights": weights, "reference": reference, "every": every, "first_row": first}
                found = run(simt, rows, potential, level=9.0, rows_in_all=first + n, **options)
                check(found, rows, potential, 1.0, 9.0, weights, every, first)
                assert (found.lse[~read] == -777).all()
                assert (found.labels[~read] == -777).all()
                good = read & ~np.isnan(lse)
                np.testing.assert_allclose(found.lse[good], lse[good], rtol=1e-6, atol=1e-5)
                best = np.nanmax(log_p[good], axis=1)
                assert (best - log_p[good, found.labels[good]] < 1e-5).all()
                assert found.masked == (read & np.isnan(lse)).sum()
                total = found.totals.reshape(2, -1).sum(1)
                assert total[1] == weights[good].sum()
                np.testing.assert_allclose(total[0], (weights * lse)[good].sum(), rtol=1e-6, atol=1e-4)
                columns = found.units * simt.sinkhorn_resolution(first + n, float(weights.max()))
                wanted = (weights[good, None] * np.exp(log_p[good])).sum(0)
                np.testing.assert_allclose(columns, wanted, rtol=2e-5, atol=1e-12)


@pytest.mark.plain_only
@pytest.mark.parametrize("every", [1, 3, 20])
@pytest.mark.parametrize("cols", [33, 1001, 1030])
def test_parts_of_a_matrix_add_up_to_its_bits(simt, every, cols):
    rows, potential, weights = case(300, cols, "float32", spoil=False)
    weights[256:] = 0  # so that parts have the same largest weight
    weights[[0, 128]] = 3
    options = {"level": 9.0, "every": every, "rows_in_all": 300}
    whole = run(simt, rows, potential, weights=weights, **options)
    units, totals, values = 0, [], []
    for first in (0, 128):
        last = 128 if first == 0 else 300
        part = Rows(rows.memory, rows.address + first * rows.stride * 4, "float32", rows.stride, rows.exact[first:last])
        found = run(simt, part, potential, weights=weights[first:last], first_row=first, **options)
        units = units + found.units
        totals.append(found.totals.reshape(2, -1))
        values.append(found.values)
    assert units.tobytes() == whole.units.tobytes()
    assert np.concatenate(totals, axis=1).tobytes() == whole.totals.reshape(2, -1).tobytes()
    assert np.concatenate(values).tobytes() == whole.values.tobytes()


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", [8, 200, 1000, 1032, 5640, 8200])
@pytest.mark.parametrize("kind", ["fixed16", "float16", "bfloat16"])
def test_a_pass_over_stored_logits_is_one_over_what_they_stand_for(simt, kind, cols):
    rng = np.random.default_rng(cols)
    n, lam = 69, 20.0
    values = rng.standard_normal((n, cols)) + 100 * rng.standard_normal((n, 1))
    values[2, 1] = np.nan
    values[4, 0] = -np.inf
    values[5, 0] -= 1e3  # beyond the range of fixed16
    weights, potential = rng.integers(0, 3, n).astype(np.float64), 0.5 * rng.standard_normal(cols)
    weights[0] = 2
    raw, maxima, _ = stored(simt, laid_out(values, "float32"), kind, lam, -(-cols // 8) * 8)
    if kind == "fixed16":
        unit = lam / (STEPS * lam)
        rows = laid_out(raw, "fixed16")
    else:
        unit = lam
        decoded = raw.view(np.float16) if kind == "float16" else (raw.astype(np.uint32) << 16).view(np.float32)
        rows = laid_out(decoded.astype(np.float64), kind)
    log_p, lse = plan(rows, potential, unit)
    lse = lse + np.float64(lam) * maxima
    for every in (1, 3):
        read = np.arange(n) // 4 % every == 0
        good = read & ~np.isnan(lse)
        for reference in (None, lse, lse + 60):
            options = {"scale": unit, "weights": weights, "reference": reference, "level": 10.0, "every": every}
            found = run(simt, rows, potential, maxima=maxima, maxima_scale=lam, **options)
            np.testing.assert_allclose(found.lse[good], lse[good], rtol=3e-7, atol=1e-5)
            assert np.isnan(found.lse[read & np.isnan(lse)]).all()
            assert found.masked == (read & np.isnan(lse)).sum()
            check(found, rows, potential, unit, 10.0, weights, every)
            best = np.nanmax(log_p[good], axis=1)
            assert (best - log_p[good, found.labels[good]] < 1e-5).all()
            total = found.totals.reshape(2, -1).sum(1)
            np.testing.assert_allclose(total[0], (weights * lse)[good].sum(), rtol=1e-6, atol=1e-3)
            columns = found.units * simt.sinkhorn_resolution(n, float(weights.max()))
            wanted = (weights[good, None] * np.exp(log_p[good])).sum(0)
            np.testing.assert_allclose(columns, wanted, rtol=3e-5, atol=1e-12)


@pytest.mark.plain_only
def test_all_steps_of_fixed16_are_read_exactly(simt):
    steps = np.arange(0, 65536, 7, dtype=np.uint16)
    values = np.stack([np.zeros_like(steps), steps], axis=1)
    rows = laid_out(values, "fixed16")
    scale = 2.0**-10  # logs that float32 tells apart
    found = run(simt, rows, np.zeros(2), scale=scale)
    t = np.where(steps == IMPOSSIBLE, -np.inf, -steps.astype(np.float64) * scale)
    np.testing.assert_allclose(found.lse, np.log1p(np.exp(t)), rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"every": 0}, "expected every in 1 .. 2.30"),
        ({"level": 24.5}, "expected a level of candidates in 0 .. 24"),
        ({"first_row": 64}, "expected first_row at a multiple of 128"),
    ],
)
def test_what_cannot_be_is_refused(simt, change, words):
    rows, potential, _ = case(9, 33, "float32")
    arguments = {"first_row": 0, "every": 1, "level": 0.0, **change}
    with pytest.raises(ValueError, match=words):
        simt.sinkhorn_pass_cuda(
            *(*rows.where, 1.0, address(potential), 0, 1.0, *[0] * 9, arguments["first_row"]),
            *(arguments["every"], arguments["level"], 0, 0, 0.0),
        )


def test_rows_of_fixed16_must_be_aligned(simt):
    rows = laid_out(np.zeros((5, 9)), "fixed16", aligned=False)
    with pytest.raises(ValueError, match="expected rows of fixed16 at multiples of 16 bytes"):
        run(simt, rows, np.zeros(9))
