"""The CUDA kernels of Newton's method on candidates, executed by the SIMT runner: equal to the CPU's rows, sums,
products and solves, with the same bits for any grid and any order of the threads.

What a kernel writes lies between sentinels. A few small cases run under the sanitizers; the others are plain_only.
"""

import math

import numpy as np
import pytest

from sela_ext.kernels.newton_device import DONE, FIRST, STATE, units_of

GUARD, SENTINEL = 16, -77
HEIGHTS = (1, 31, 127, 128, 129, 1001)
LANES = {2: (1, 6), 8: (5, 12), 32: (20, 70)}  # entries of a row, from and to, for so many lanes per row


class Guarded:
    """An array with sentinels on both sides (AddressSanitizer watches its ends itself)."""

    def __init__(self, simt, shape, dtype, fill=None):
        guard = 0 if simt.variant == "address" else GUARD
        count = int(np.prod(shape))
        self._whole = np.full(count + 2 * guard, SENTINEL, dtype)
        self._guard = guard
        self.array = self._whole[guard : guard + count].reshape(shape)
        if fill is not None:
            self.array[...] = fill

    @property
    def address(self):
        return self.array.ctypes.data

    def check(self):
        guard = self._guard
        ends = np.concatenate([self._whole[:guard], self._whole[len(self._whole) - guard :]])
        assert (ends == SENTINEL).all(), "written beside an array"
        return self.array


def csr(rows, cols, few, many, *, weights=False, seed=0):
    """Candidates of so many rows as arrays: rows of `few` to `many` entries, some single, some without any."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.integers(few, many + 1, rows), cols)
    lengths[rng.random(rows) < 0.2] = 1
    lengths[rng.random(rows) < 0.1] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # Like rows sorted by class: columns of neighbours are neighbours, or the same.
    columns = [np.sort((rng.permutation(cols)[:n] + i) % cols) for i, n in enumerate(lengths)]
    values = -10 * rng.random(offsets[-1]) ** 2
    for i in range(rows):
        part = slice(offsets[i], offsets[i + 1])
        values[part] -= np.log(np.exp(values[part]).sum()) if lengths[i] else 0.0
    return {
        "offsets": offsets.astype(np.int64),
        "columns": np.concatenate([np.zeros(0, np.int64), *columns]).astype(np.int32),
        "values": values.astype(np.float32),
        "weights": (2 * rng.random(rows)).astype(np.float32) if weights else np.zeros(0, np.float32),
        "cols": cols,
    }


class Rows:
    """Candidates on the device that the runner plays, as sela_ext.kernels.newton_device.CudaRows holds them."""

    def __init__(self, simt, given):
        self.simt, self.cols = simt, given["cols"]
        self.offsets, self.columns, self.values = (given[name].copy() for name in ("offsets", "columns", "values"))
        self.weights = given["weights"].copy()
        there = np.diff(self.offsets) > 0
        weights = self.weights.astype(np.float64) if len(self.weights) else np.ones(len(there))
        self.weight = float(weights[there].sum())
        self.units = units_of(self.weight)
        self.counts = Guarded(simt, self.cols, np.int64, 0)
        self.compact(None, 0.0)

    @property
    def rows(self):
        return len(self.offsets) - 1

    def arguments(self):
        weights = self.weights.ctypes.data if len(self.weights) else 0
        arrays = (self.offsets.ctypes.data, self.columns.ctypes.data, self.values.ctypes.data, weights)
        return (*arrays, self.rows, self.cols, len(self.values), self.units)

    def compact(self, plan, level):
        simt, rows = self.simt, self.rows
        at = 0 if plan is None else plan.ctypes.data
        kept = Guarded(simt, (2, rows), np.int64)
        simt.newton_count_cuda(self.arguments(), at, level, kept.address, self.counts.address, 0)
        self.counts.check()
        ends = np.cumsum(kept.check(), axis=1)
        entries, several = (int(n) for n in ends[:, -1]) if rows else (0, 0)
        offsets = Guarded(simt, several + 1, np.int64, 0)
        columns, values = Guarded(simt, entries, np.int32), Guarded(simt, entries, np.float32)
        weights = Guarded(simt, several if len(self.weights) else 0, np.float32)
        simt.newton_compact_cuda(
            *(self.arguments(), at, level, ends.ctypes.data, offsets.address, columns.address, values.address),
            *(weights.address if len(self.weights) else 0, 0),
        )
        self.offsets, self.columns, self.values = (array.check().copy() for array in (offsets, columns, values))
        self.weights = weights.check().copy()

    def outputs(self):
        tiles = -(-self.rows // self.simt.NEWTON_TILE_ROWS)
        columns = Guarded(self.simt, (2, self.cols), np.int64, 0)
        return columns, Guarded(self.simt, tiles, np.float64), Guarded(self.simt, len(self.values), np.float32)

    def sums(self, ratio, d):
        """Integer sums [2, K], objectives of tiles, plan."""
        outputs = self.outputs()
        addresses = tuple(array.address for array in outputs)
        self.simt.newton_sums_cuda(self.arguments(), ratio, d.ctypes.data, addresses, 0)
        return tuple(array.check() for array in outputs)

    def product(self, plan, x):
        columns = Guarded(self.simt, self.cols, np.int64, 0)
        largest = float(np.abs(x).max())
        addresses = (columns.address, 0, plan.ctypes.data)
        self.simt.newton_product_cuda(self.arguments(), x.ctypes.data, largest, addresses, 0)
        return columns.check() / math.ldexp(self.units, -(math.frexp(largest)[1] + 2))

    def solve(self, target, defect, d, *, law=None, rounds=7, looks=1000, plan=True, **options):
        """The state at the end (or after so many looks at it), d and the plan."""
        simt = self.simt
        asked = {"ratio": 1.0, "tolerance": 1e-9, "steps": 40, "products": 400, "clip": 4.0, "reach": 1e300, **options}
        vectors = Guarded(simt, (simt.NEWTON_VECTORS, self.cols), np.float64, np.nan)
        vectors.array[simt.NEWTON_POINT] = d
        state = Guarded(simt, STATE.itemsize // 8, np.int64, 0)
        state.array.view(STATE)["phase"] = FIRST
        offset, strength, low, high = law or (None, 0.0, None, None)
        columns = [0 if v is None else v.ctypes.data for v in (target, defect, offset, low, high)]
        outputs = self.outputs()
        for look in range(looks):
            simt.newton_rounds_cuda(
                *(self.arguments(), (*columns, strength), self.counts.address, self.weight, float(target.sum())),
                *(asked[name] for name in ("ratio", "tolerance", "steps", "products", "clip", "reach")),
                *(plan, vectors.address, state.address, tuple(a.address for a in outputs), rounds, 0),
            )
            found = state.check().view(STATE)[0]
            if found["phase"] == DONE:
                break
            assert look < 999, "the solve does not end"
        for array in (vectors, *outputs):
            array.check()
        assert found["phase"] != DONE or not outputs[0].array.any()  # as the next solve wants it
        at = simt.NEWTON_POINT + found["at"] * simt.NEWTON_PER_POINT
        return found.copy(), vectors.array[at].copy(), outputs[2].array.copy()


def cpu_rows(simt, given):
    names = ("offsets", "columns", "values", "weights", "cols")
    return simt.NewtonRows(simt.Candidates.of(**{n: given[n] for n in names}, level=16.0, limit=2**40))


def problem(rows, seed=0):
    """Targets near the sums, a defect of both signs and a start, for rows of the CPU."""
    rng = np.random.default_rng(seed)
    d = rng.normal(0, 0.5, rows.cols)
    sums = rows.sums(1.0, np.zeros(rows.cols), 1, "")[0]
    several = sums - rows.counts()  # what can be moved
    moved = several * np.exp(rng.normal(0, 0.2, rows.cols)) + 1e-3 * rows.weight / rows.cols
    defect = 1e-4 * rows.weight / rows.cols * rng.normal(0, 1, rows.cols)
    return rows.counts() + moved * max(several.sum(), 1e-3) / moved.sum(), defect, d


def device_grid(simt, multiprocessors=2, blocks=2):
    simt.set_device(multiprocessors, blocks)


@pytest.fixture(autouse=True)
def small_device(simt):
    device_grid(simt)
    yield
    device_grid(simt)


# ---- Rows.


@pytest.mark.plain_only
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("height", HEIGHTS)
def test_rows_of_several_candidates_are_kept_and_the_others_counted(simt, height, lanes, weights):
    given = csr(height, 77, *LANES[lanes], weights=weights, seed=height)
    rows, expected = Rows(simt, given), cpu_rows(simt, given)
    lengths = np.diff(given["offsets"])
    several = np.flatnonzero(lengths > 1)
    kept = np.concatenate([np.arange(given["offsets"][i], given["offsets"][i + 1]) for i in [*several]] or [[]])
    kept = kept.astype(int)
    assert (rows.rows, len(rows.values)) == (expected.rows, expected.entries) == (len(several), len(kept))
    np.testing.assert_array_equal(rows.offsets, np.concatenate([[0], np.cumsum(lengths[several])]))
    np.testing.assert_array_equal(rows.columns, given["columns"][kept])
    np.testing.assert_array_equal(rows.values, given["values"][kept])
    np.testing.assert_array_equal(rows.weights, given["weights"][several] if weights else given["weights"])
    np.testing.assert_allclose(rows.counts.array / rows.units, expected.counts(), rtol=1e-12, atol=1e-13)
    assert rows.weight == pytest.approx(expected.weight, rel=1e-14)


@pytest.mark.parametrize("weights", [False, True])
def test_pruned_rows_are_those_of_the_cpu(simt, schedule, weights):
    given = csr(300, 33, 2, 9, weights=weights, seed=5)
    rows, expected = Rows(simt, given), cpu_rows(simt, given)
    d = np.random.default_rng(0).normal(0, 2, 33)
    plan = rows.sums(1.5, d)[2].copy()
    plan[::17] = np.float32(math.exp(-3.0))  # at the level itself: dropped
    rows.compact(plan, 3.0)
    expected.prune(plan, 3.0)
    assert (rows.rows, len(rows.values)) == (expected.rows, expected.entries)
    assert 0 < rows.rows < 250
    np.testing.assert_allclose(rows.counts.array / rows.units, expected.counts(), rtol=1e-12, atol=1e-13)
    after, of_cpu = rows.sums(2.0, d), expected.sums(2.0, d, 1, "")
    np.testing.assert_allclose((after[0][0] + rows.counts.array) / rows.units, of_cpu[0], rtol=1e-12, atol=1e-12)


# ---- How the work is laid out.


def rows_of(simt, lengths):
    """Candidates of rows with so many entries each."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    columns = np.concatenate([np.arange(n) for n in lengths])
    values = np.full(offsets[-1], -1.0)
    of_all = {"offsets": offsets.astype(np.int64), "columns": columns.astype(np.int32), "cols": 40}
    return Rows(simt, {**of_all, "values": values.astype(np.float32), "weights": np.zeros(0, np.float32)})


def launched(simt, task):
    """(blocks, warp operations) that a task is executed with."""
    before = simt.statistics()
    task()
    after = simt.statistics()
    return tuple(after[name] - before[name] for name in ("blocks", "warp_operations"))


@pytest.mark.plain_only
@pytest.mark.parametrize("entries", [4, 16])
def test_rows_of_few_entries_share_a_warp(simt, entries):
    """From an average of 4 and 16 entries on a row gets more lanes, which exchange more."""
    lengths = np.full(130, entries)
    operations = []
    for more in (0, 1):
        lengths[7] = entries + more
        rows = rows_of(simt, lengths)
        operations.append(launched(simt, lambda rows=rows: rows.sums(1.0, np.zeros(40)))[1])
    assert operations[1] > 1.5 * operations[0]


@pytest.mark.plain_only
@pytest.mark.parametrize(("height", "blocks"), [(1, 1), (128, 1), (129, 2), (512, 4), (513, 4)])
def test_a_grid_has_as_many_blocks_as_are_resident_or_as_there_are_tiles(simt, height, blocks):
    rows = rows_of(simt, np.full(height, 3))
    assert launched(simt, lambda: rows.sums(1.0, np.zeros(40)))[0] == blocks
    device_grid(simt, 1, 1)
    assert launched(simt, lambda: rows.sums(1.0, np.zeros(40)))[0] == 1


@pytest.mark.plain_only
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_rows_are_counted_by_as_many_threads(simt, more):
    threads = 256  # of a block
    rows = rows_of(simt, np.full(2 * threads + more, 2))
    plan = np.ones(len(rows.values), np.float32)
    assert launched(simt, lambda: rows.compact(plan, 3.0))[0] == 2 * (2 + (more > 0))  # of two kernels


# ---- Sums and products.


@pytest.mark.plain_only
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("height", HEIGHTS)
def test_sums_and_products_are_those_of_the_cpu(simt, height, lanes, weights):
    given = csr(height, 77, *LANES[lanes], weights=weights, seed=height + 1)
    rows, expected = Rows(simt, given), cpu_rows(simt, given)
    rng = np.random.default_rng(height)
    for ratio, spread in ((1.0, 0.0), (1.414, 1.0), (40.0, 300.0)):
        d, x = rng.normal(0, spread, 77), rng.normal(0, 10**spread if spread < 2 else 1e-30, 77)
        columns, totals, plan = rows.sums(ratio, d)
        of_cpu = expected.sums(ratio, d, 1, "")
        scale = 1e-12 * max(rows.weight, 1e-3)
        np.testing.assert_allclose((columns[0] + rows.counts.array) / rows.units, of_cpu[0], rtol=1e-12, atol=scale)
        np.testing.assert_allclose(columns[1] / rows.units, of_cpu[1], rtol=1e-11, atol=scale)
        objective = totals.sum() + rows.counts.array / rows.units @ d
        assert objective == pytest.approx(of_cpu[2], rel=1e-12, abs=1e-9)
        np.testing.assert_allclose(plan, of_cpu[3], rtol=2e-7, atol=1e-37)
        assert len(totals) == -(-rows.rows // 128)
        found, product = rows.product(plan, x), expected.product(plan, x, 1, "")
        np.testing.assert_allclose(found, product, rtol=1e-11, atol=scale * np.abs(x).max())


def test_bits_depend_on_neither_grid_nor_order_of_threads(simt, schedule):
    given = csr(300, 20, 2, 12, weights=True, seed=2)
    rng = np.random.default_rng(1)
    d, x = rng.normal(0, 1, 20), rng.normal(0, 1, 20)
    found = []
    for grid in ((1, 1), (2, 2)):
        device_grid(simt, *grid)
        rows = Rows(simt, given)
        sums = rows.sums(1.4, d)
        found.append([array.tobytes() for array in (*sums, rows.product(sums[2], x), rows.counts.array, rows.values)])
    assert found[0] == found[1]
    simt.set_schedule(0)
    rows = Rows(simt, given)
    sums = rows.sums(1.4, d)
    assert found[0] == [a.tobytes() for a in (*sums, rows.product(sums[2], x), rows.counts.array, rows.values)]


@pytest.mark.plain_only
def test_a_product_of_extremes_is_refused_and_one_near_them_is_not(simt):
    rows = Rows(simt, csr(20, 5, 2, 4))
    plan = rows.sums(1.0, np.zeros(5))[2]
    x = np.array([1.0, -0.5, 0.25, 0.0, 0.1])
    wanted = rows.product(plan, x)
    for factor in (1e-190, 1e190):
        np.testing.assert_allclose(rows.product(plan, x * factor) / factor, wanted, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="largest"):
        rows.product(plan, x * 1e-210)
    with pytest.raises(ValueError, match="rows"):
        simt.newton_sums_cuda((0, 0, 0, 0, -1, 5, 0, 1.0), 1.0, 0, (0, 0, 0), 0)
    with pytest.raises(ValueError, match="columns"):
        simt.newton_count_cuda((0, 0, 0, 0, 1, 0, 0, 1.0), 0, 1.0, 0, 0, 0)


# ---- Solves.


def laws(rows, target, seed=0):
    """Each law by name, as (offset, strength, low, high)."""
    rng = np.random.default_rng(seed)
    offset = rng.normal(0, 0.3, rows.cols)
    offset[::5] = 0.0
    return {
        "exact": None,
        "pulled": (offset, 3.0, None, None),
        "bounded": (offset, 0.0, target * 0.8, target * 1.3),
    }


@pytest.mark.plain_only
@pytest.mark.parametrize("law", ["exact", "pulled", "bounded"])
@pytest.mark.parametrize(("height", "cols", "lanes"), [(31, 3, 2), (200, 33, 2), (301, 40, 8), (500, 600, 32)])
def test_a_solve_is_that_of_the_cpu(simt, law, height, cols, lanes):
    given = csr(height, cols, *LANES[lanes], weights=lanes == 8, seed=cols)
    rows, expected = Rows(simt, given), cpu_rows(simt, given)
    target, defect, d = problem(expected)
    if cols == 33:
        target[[0, 7]] = 0.0  # stay where they are
    offset, strength, low, high = laws(expected, target)[law] or (None, 0.0, None, None)
    options = (1.2, 1e-9, 40, 400, 4.0, 1e300)
    of_cpu = expected.solve(target, defect, d, *options, 0.0, 1, "", offset, strength, low, high)
    names = ("ratio", "tolerance", "steps", "products", "clip", "reach")
    found, solution, plan = rows.solve(
        target,
        defect,
        d,
        law=None if offset is None else (offset, strength, low, high),
        **dict(zip(names, options, strict=True)),
    )
    assert bool(found["stalled"]) == of_cpu[5]
    assert not of_cpu[5] or law == "bounded"  # whose kinks may be in the way
    assert found["error"] <= 1e-9 or of_cpu[5]
    assert (found["steps"], found["sums"]) == (of_cpu[2], of_cpu[4])
    assert abs(found["products"] - of_cpu[3]) <= 2 + of_cpu[3] // 20
    np.testing.assert_allclose(solution, of_cpu[0], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(plan, rows.sums(1.2, solution)[2])


@pytest.mark.plain_only
@pytest.mark.parametrize("rounds", [1, 3, 64])
def test_a_solve_does_not_depend_on_how_often_the_host_looks(simt, rounds):
    given = csr(129, 20, 2, 9, weights=True, seed=4)
    rows = Rows(simt, given)
    target, defect, d = problem(cpu_rows(simt, given))
    wanted, found = rows.solve(target, defect, d, rounds=5), rows.solve(target, defect, d, rounds=rounds)
    assert wanted[0] == found[0]
    assert wanted[1].tobytes() == found[1].tobytes()
    assert wanted[2].tobytes() == found[2].tobytes()


def test_a_solve_has_the_same_bits_in_any_order_of_threads(simt, schedule):
    """Runs under the sanitizers: two blocks of rows, all ways of the columns' algebra."""
    given = csr(140, 40, 2, 6, seed=9)
    rows = Rows(simt, given)
    target, defect, d = problem(cpu_rows(simt, given))
    found = rows.solve(target, defect, d, products=12, steps=3, tolerance=1e-12)
    assert (found[0]["steps"], found[0]["stalled"]) == (3, 1)
    simt.set_schedule(0)
    again = rows.solve(target, defect, d, products=12, steps=3, tolerance=1e-12)
    assert found[0] == again[0]
    assert found[1].tobytes() == again[1].tobytes()


@pytest.mark.plain_only
def test_limits_of_a_solve_end_it_where_the_cpu_ends(simt):
    given = csr(200, 20, 2, 9, seed=11)
    expected = cpu_rows(simt, given)
    rows = Rows(simt, given)
    target, defect, d = problem(expected)
    names = ("ratio", "tolerance", "steps", "products", "clip", "reach")
    ends = []
    for options in (
        (1.0, 1e-9, 0, 400, 4.0, 1e300),  # no step
        (1.0, 1e-9, 2, 400, 4.0, 1e300),  # few steps
        (1.0, 1e-9, 40, 0, 4.0, 1e300),  # no product: nowhere to go
        (1.0, 1e-9, 40, 3, 4.0, 1e300),  # few of them
        (1.0, 1e-9, 40, 400, 0.05, 1e300),  # short steps
        (1.0, 1e-9, 40, 400, 4.0, 0.3),  # columns that may not go far
        (1.0, 5.0, 40, 400, 4.0, 1e300),  # good enough at the start
        (1.0, 0.0, 40, 400, 4.0, 1e300),  # never good enough: the line search gives up
    ):
        of_cpu = expected.solve(target, defect, d, *options, 0.0, 1, "")
        found, solution, _ = rows.solve(target, defect, d, **dict(zip(names, options, strict=True)))
        assert bool(found["stalled"]) == of_cpu[5]
        if options[1] > 0:
            assert (found["steps"], found["sums"]) == (of_cpu[2], of_cpu[4]), options
            np.testing.assert_allclose(solution, of_cpu[0], rtol=0, atol=1e-5)
            assert found["error"] == pytest.approx(of_cpu[1], rel=1e-3, abs=1e-9)
        ends.append((found["steps"] > 0, bool(found["stalled"])))
    assert set(ends) == {(False, True), (True, True), (False, False), (True, False)}


@pytest.mark.plain_only
@pytest.mark.parametrize("off", [1e-4, 0.01, 0.07, 0.4])
def test_conjugate_gradients_go_on_to_a_share_of_the_error(simt, off):
    given = csr(200, 20, 2, 9, seed=8)
    rows = Rows(simt, given)
    expected = cpu_rows(simt, given)
    several = expected.sums(1.0, np.zeros(20), 1, "")[0]
    target = several + np.where(np.arange(20) % 2, 1, -1) * off * expected.weight / 20  # an error of `off`
    found, _, _ = rows.solve(target, np.zeros(20), np.zeros(20), rounds=1, looks=1)
    assert found["error"] == pytest.approx(off, rel=1e-3)
    assert found["enough"] == pytest.approx(found["rz"] * min(found["error"], 0.05) ** 2, rel=1e-12)


def test_the_sums_of_the_last_point_have_the_same_bits_in_any_order_of_threads(simt, schedule):
    """Runs under the sanitizers: a line search that failed, after which the plan of the solution is made once more."""
    given = csr(30, 8, 2, 5, seed=6)
    rows = Rows(simt, given)
    target, defect, d = problem(cpu_rows(simt, given))
    found, solution, plan = rows.solve(target, defect, d, tolerance=0.0, rounds=64)
    assert found["plan_is_here"] == 1
    simt.set_schedule(0)
    np.testing.assert_array_equal(plan, rows.sums(1.0, solution)[2])
    without = rows.solve(target, defect, d, tolerance=0.0, rounds=64, plan=False)[0]
    assert (without["plan_is_here"], without["sums"]) == (0, found["sums"])


@pytest.mark.plain_only
def test_a_plan_is_that_of_the_solution_only_where_it_is_wanted(simt):
    given = csr(100, 20, 2, 6, seed=6)
    rows = Rows(simt, given)
    target, defect, d = problem(cpu_rows(simt, given))
    options = {"tolerance": 0.0, "steps": 40}  # ends in a line search that failed: the last sums are of another point
    found, solution, plan = rows.solve(target, defect, d, **options)
    without, same, _ = rows.solve(target, defect, d, plan=False, **options)
    assert found["plan_is_here"] == 1
    np.testing.assert_array_equal(plan, rows.sums(1.0, solution)[2])
    np.testing.assert_array_equal(solution, same)
    assert without["steps"] == found["steps"]


@pytest.mark.plain_only
def test_rows_without_several_candidates_are_solved_too(simt):
    given = csr(40, 7, 1, 1, seed=1)
    rows, expected = Rows(simt, given), cpu_rows(simt, given)
    assert rows.rows == 0
    target, _, d = problem(expected)
    defect = np.where(np.arange(7) % 2, 0.4, -0.1)
    of_cpu = expected.solve(target, defect, d, 1.0, 1e-9, 40, 400, 4.0, 1e300, 0.0, 1, "")
    found, solution, _ = rows.solve(target, defect, d)
    assert (found["steps"], bool(found["stalled"])) == (of_cpu[2], of_cpu[5])
    np.testing.assert_allclose(solution, of_cpu[0], atol=1e-7)


@pytest.mark.plain_only
def test_a_device_solve_through_the_package_is_the_twins_and_the_cpus(simt, request, monkeypatch):
    torch = pytest.importorskip("torch")
    from sela_ext import kernels
    from sela_ext.kernels import device
    from sela_ext.kernels.device_candidates import DeviceCandidates
    from sela_ext.kernels.newton import ColumnLaw

    card = request.getfixturevalue("host_card")
    card.core = simt
    given = csr(400, 50, 2, 8, weights=True, seed=3)

    def candidates():
        offsets, columns, values, weights = (
            torch.from_numpy(given[name].copy()) for name in ("offsets", "columns", "values", "weights")
        )
        return DeviceCandidates(16.0, 2**40, False, 400, 50, offsets, columns, values, weights)

    expected = kernels.newton_rows(simt_candidates(given))
    target, defect, d = problem(expected)
    offset, _, low, high = laws(expected, target)["bounded"]
    for law in (None, ColumnLaw(offset, 3.0), ColumnLaw(offset, 0.0, (low, high))):
        found = {}
        for name, usable in (("kernels", card), ("twin", None)):
            monkeypatch.setattr(device, "_usable", {torch.device("cpu"): usable})
            one = candidates()
            rows = kernels.newton_rows(one)
            assert one.entries == 0
            sums = kernels.newton_sums(rows, d, ratio=1.3)
            product = kernels.newton_product(rows, sums.plan, d)
            solution = kernels.newton_solve(rows, target, defect, d, ratio=1.3, tolerance=1e-9, prune=6.0, law=law)
            found[name] = (rows.rows, rows.entries, sums, product, solution, rows.counts(), rows.weight)
        again = simt_candidates(given)
        rows = kernels.newton_rows(again)
        sums = kernels.newton_sums(rows, d, ratio=1.3)
        product = kernels.newton_product(rows, sums.plan, d)
        solution = kernels.newton_solve(rows, target, defect, d, ratio=1.3, tolerance=1e-9, prune=6.0, law=law)
        for mine in found.values():
            assert mine[:2] == (rows.rows, rows.entries)
            np.testing.assert_allclose(mine[2].columns, sums.columns, rtol=1e-11)
            np.testing.assert_allclose(mine[2].diagonal, sums.diagonal, rtol=1e-10, atol=1e-11)
            assert mine[2].objective == pytest.approx(sums.objective, rel=1e-12)
            np.testing.assert_allclose(mine[2].plan.numpy(), sums.plan, rtol=2e-7)
            np.testing.assert_allclose(mine[3], product, rtol=1e-9, atol=1e-9)
            assert mine[4].stalled == solution.stalled
            assert (mine[4].steps, mine[4].sums) == (solution.steps, solution.sums)
            np.testing.assert_allclose(mine[4].d, solution.d, rtol=0, atol=1e-6)
            np.testing.assert_allclose(mine[5], rows.counts(), rtol=1e-12, atol=1e-12)
            assert mine[6] == pytest.approx(rows.weight, rel=1e-14)


def simt_candidates(given):
    from sela_ext import _core

    names = ("offsets", "columns", "values", "weights", "cols")
    return _core.Candidates.of(**{name: given[name] for name in names}, level=16.0, limit=2**40)
