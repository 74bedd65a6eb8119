"""The CUDA kernels of the fused Sinkhorn pass, executed by the SIMT runner: equal to the CPU kernel and to float64
numpy in every mapping and at its edges, with the same bits for any grid and any order of the threads.

Whatever a kernel reads lies between NaNs, whatever it writes between sentinels: reading or writing beside it shows.
Only a few small cases run under the sanitizers, which are slow; the others are marked plain_only.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

TYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = ("aligned", "odd stride", "odd base")

# Widths of rows: one warp up to 256, one block up to 1024, wide block up to 8192 (rows on their way in two stages up to
# 5632), two kernels beyond; and what lies at those edges and at those of warps and of 16 bytes.
ONE_WARP = (1, 7, 8, 31, 33, 255, 256)
ONE_BLOCK = (257, 511, 1000, 1001, 1024)
WIDE_BLOCK = (1025, 3000, 3072, 3073, 5632, 5633, 6144, 6145, 8191, 8192)
TWO_KERNELS = (8193, 10_000, 16_385)
WIDTHS = ONE_WARP + ONE_BLOCK + WIDE_BLOCK + TWO_KERNELS
HEIGHTS = (1, 2, 63, 64, 65, 129, 200)  # tiles have 64 rows
FEW = (33, 1001, 1030, 8193)  # one of every mapping
TILE = 64

GUARD = 24  # elements before and behind every array
SENTINEL = -777


def to_bfloat16(values):
    """float32 to the nearest bfloat16, of two the even one, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def stored(values, kind):
    """Values as the kernel finds them in memory, and as float64."""
    with np.errstate(over="ignore"):
        if kind != "bfloat16":
            raw = np.asarray(values).astype(kind)
            return raw, raw.astype(np.float64)
        raw = to_bfloat16(values)
    return raw, (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def place(values, kind, layout):
    """Rows of `values` amid NaNs: the whole memory, the address of the first element, elements from row to row."""
    rows, cols = values.shape
    size = {"float64": 8, "float32": 4}.get(kind, 2)
    per = 16 // size
    stride = (cols + per - 1) // per * per + {"aligned": per, "odd stride": 1, "odd base": per}[layout]
    spare = per if layout != "odd base" else per + 1
    raw, exact = stored(values, kind)
    memory = stored(np.full(spare + rows * stride + 2 * per, np.nan), kind)[0]
    start = -(memory.ctypes.data // size) % per + spare
    for row in range(rows):
        memory[start + row * stride : start + row * stride + cols] = raw[row]
    address = memory.ctypes.data + start * size
    assert (address % 16 == 0) == (layout != "odd base")
    return memory, address, stride, exact


class Guarded:
    """An array between sentinels (or NaNs, which spoil whatever reads them). None stays a null pointer."""

    def __init__(self, simt, count, dtype, fill, around):
        guard = 0 if simt.variant == "address" else GUARD  # AddressSanitizer watches the ends of the memory itself
        self.whole = np.full(count + 2 * guard, around, dtype)
        self.array = self.whole[guard : guard + count]
        self.array[...] = fill
        self.around = self.whole.copy()
        self.inside = slice(guard, guard + count)

    @property
    def address(self):
        return self.array.ctypes.data

    def take(self):
        ends = self.whole.copy()
        ends[self.inside] = self.around[self.inside]
        np.testing.assert_array_equal(ends, self.around, err_msg="written beside an array")
        return self.array.copy()


@dataclass
class Sums:
    units: np.ndarray  # int64 [K]
    columns: np.ndarray  # float64 [K]
    lse: np.ndarray | None
    labels: np.ndarray | None
    objectives: np.ndarray  # of each tile (one number from the CPU)
    weights: np.ndarray
    masked: int

    def same_bits(self, other):
        assert self.units.tobytes() == other.units.tobytes()
        assert self.objectives.tobytes() == other.objectives.tobytes()
        assert self.weights.tobytes() == other.weights.tobytes()
        assert self.masked == other.masked
        for mine, its in ((self.lse, other.lse), (self.labels, other.labels)):
            if mine is not None and its is not None:
                assert mine.tobytes() == its.tobytes()


class Problem:
    """Logits with all that belongs to them; runs them through the kernels and through float64 numpy."""

    def __init__(self, values, kind="float32", layout="aligned", scale=1.0, potential=None, weights=None):
        self.kind, self.scale = kind, scale
        self.rows, self.cols = values.shape
        self.memory, self.address, self.stride, self.exact = place(values, kind, layout)
        self.potential = np.zeros(self.cols) if potential is None else np.asarray(potential, np.float64)
        self.weights = None if weights is None else np.asarray(weights, np.float32)
        self.largest = 1.0 if weights is None else max(float(self.weights.max()), 1e-30)
        self.real = np.float64 if kind == "float64" else np.float32

    def inputs(self, simt, reference):
        keep = [Guarded(simt, self.cols, np.float64, self.potential, np.nan)]
        addresses = [keep[0].address]
        for value, dtype in ((self.weights, np.float32), (reference, self.real)):
            keep.append(None if value is None else Guarded(simt, self.rows, dtype, value, np.nan))
            addresses.append(0 if value is None else keep[-1].address)
        potential, weights, before = addresses
        return keep, (
            *(self.address, self.kind, self.rows, self.cols, self.stride, self.scale),
            *(potential, weights, self.largest, before),
        )

    def outputs(self, simt, labels, lse):
        return (
            Guarded(simt, self.cols, np.int64, 0, SENTINEL),
            Guarded(simt, self.rows, self.real, SENTINEL, SENTINEL) if lse else None,
            Guarded(simt, self.rows, np.int32, SENTINEL, SENTINEL) if labels else None,
        )

    def cuda(self, simt, reference=None, labels=True, lse=True):
        keep, inputs = self.inputs(simt, reference)
        out = self.outputs(simt, labels, lse)
        tiles = -(-self.rows // TILE)
        shape = (self.address, self.kind, self.rows, self.cols, self.stride)
        count, scratch_bytes = simt.sinkhorn_workspace_cuda(*shape)
        assert count == 2 * tiles
        totals = Guarded(simt, count, np.float64, 0, SENTINEL)
        masked = Guarded(simt, 1, np.int64, 0, SENTINEL)
        scratch = Guarded(simt, max(scratch_bytes // 8, 1), np.float64, np.nan, np.nan)
        addresses = [0 if array is None else array.address for array in (*out, totals, masked, scratch)]
        simt.sinkhorn_pass_cuda(*inputs, *addresses, 0)
        scratch.take()
        for array in keep:
            if array is not None:
                array.take()
        return self.sums(simt, out, totals.take().reshape(2, tiles), int(masked.take()[0]))

    def cpu(self, simt, reference=None):
        _keep, inputs = self.inputs(simt, reference)
        out = self.outputs(simt, True, True)
        addresses = [array.address for array in out]
        objective, weight, masked, _ = simt.sinkhorn_pass_cpu(*inputs, *addresses, 1, "")
        return self.sums(simt, out, np.array([[objective], [weight]]), masked)

    def sums(self, simt, out, totals, masked):
        units, lse, labels = (None if array is None else array.take() for array in out)
        columns = units * simt.sinkhorn_resolution(self.rows, self.largest)
        return Sums(units, columns, lse, labels, totals[0], totals[1], masked)

    def terms(self):
        """scale * logits + potential in float64, and which rows are masked."""
        scale, potential = self.scale, self.potential
        if self.kind != "float64":
            scale, potential = float(np.float32(scale)), potential.astype(np.float32).astype(np.float64)
        largest = float(np.finfo(self.real).max)
        with np.errstate(over="ignore", invalid="ignore"):
            product = self.exact * scale
            t = product + potential
            bad = np.isnan(product).any(1) | (product > largest).any(1) | (product < -largest).all(1)
        return t, bad

    def twin(self):
        """The pass as float64 numpy, with the totals of every tile."""
        t, bad = self.terms()
        t = np.where(bad[:, None], 0.0, t)
        w = np.ones(self.rows) if self.weights is None else self.weights.astype(np.float64)
        w = np.where(bad, 0.0, w)
        top = t.max(1)
        e = np.exp(t - top[:, None])
        lse = top + np.log(e.sum(1))
        columns = (w[:, None] * e / e.sum(1)[:, None]).sum(0)
        labels = np.where(bad, -1, t.argmax(1)).astype(np.int32)
        starts = range(0, self.rows, TILE)
        objectives = np.array([(w * lse)[i : i + TILE].sum() for i in starts])
        weights = np.array([w[i : i + TILE].sum() for i in starts])
        return Sums(np.zeros(0), columns, np.where(bad, np.nan, lse), labels, objectives, weights, int(bad.sum()))

    def check(self, found, expected, totals=True):
        """Found sums are right up to the rounding of the type's arithmetic."""
        double = self.kind == "float64"
        weight = max(float(expected.weights.sum()), 1e-30)
        assert np.abs(found.columns - expected.columns).sum() <= (1e-13 if double else 1e-6) * weight
        np.testing.assert_allclose(found.columns, expected.columns, rtol=1e-11 if double else 2e-5, atol=1e-15 * weight)
        assert found.masked == expected.masked
        if found.lse is not None:
            np.testing.assert_allclose(
                found.lse, expected.lse, rtol=1e-15 if double else 2e-7, atol=1e-13 if double else 2e-6
            )
        if totals:
            np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-15)
            np.testing.assert_allclose(
                found.objectives,
                expected.objectives,
                rtol=1e-13 if double else 2e-7,
                atol=(1e-13 if double else 2e-6) * self.largest * TILE,
            )
        if found.labels is not None:
            different = np.flatnonzero(found.labels != expected.labels)
            t, bad = self.terms()
            for row in different:  # allowed where two columns are equal up to rounding
                assert not bad[row]
                assert 0 <= found.labels[row] < self.cols
                assert t[row].max() - t[row, found.labels[row]] < 2e-7 * np.abs(t[row]).max()


def problem(rows, cols, kind="float32", layout="aligned", spread=1.0, scale=1.0, weights=True):
    rng = np.random.default_rng([rows, cols])
    w = None
    if weights:
        w = np.round(rng.uniform(0, 4, rows) * 8) / 8  # few bits: their sums are exact
        w[rng.uniform(size=rows) < 0.2] = 0
    values = spread * rng.standard_normal((rows, cols))
    return Problem(values, kind, layout, scale, potential=0.5 * rng.standard_normal(cols), weights=w)


@pytest.fixture(autouse=True)
def device(simt):
    """A device of 2 multiprocessors unless a test asks for another."""
    simt.set_device(2, 2)
    yield simt.set_device
    simt.set_device(2, 2)


def counted(simt, action):
    """What the runner counted meanwhile."""
    before = simt.statistics()
    result = action()
    after = simt.statistics()
    return result, {name: after[name] - before[name] for name in after}


@pytest.mark.parametrize("cols", FEW)
@pytest.mark.parametrize("kind", TYPES)
def test_small_passes_equal_float64(simt, schedule, kind, cols):
    # The case for the sanitizers: more than one block and tile, a tail in rows and columns, rows with and without care.
    p = problem(67, cols, kind, LAYOUTS[schedule])
    expected = p.twin()
    near = np.where(np.arange(p.rows) % 7 == 3, 1e4, expected.lse)
    p.check(p.cuda(simt, near), expected)


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("kind", TYPES)
def test_pass_equals_cpu_and_float64(simt, kind, cols):
    for number, layout in enumerate(LAYOUTS):
        rows = HEIGHTS[(number + WIDTHS.index(cols) + 2 * TYPES.index(kind)) % len(HEIGHTS)]
        p = problem(rows, cols, kind, layout, weights=number != 1)
        expected = p.twin()
        first = p.cuda(simt)
        p.check(first, expected)
        p.check(first, p.cpu(simt), totals=False)
        second = p.cuda(simt, first.lse)
        p.check(second, expected)
        p.check(second, p.cpu(simt, first.lse), totals=False)


@pytest.mark.plain_only
@pytest.mark.parametrize("rows", HEIGHTS)
@pytest.mark.parametrize("cols", FEW)
def test_any_number_of_rows(simt, rows, cols):
    for kind in TYPES:
        p = problem(rows, cols, kind, LAYOUTS[rows % 3])
        expected = p.twin()
        p.check(p.cuda(simt, expected.lse), expected)
        p.check(p.cuda(simt), expected)


@pytest.mark.plain_only
@pytest.mark.parametrize(
    ("kind", "cols"),
    [*itertools.product(TYPES[:3], (31, 264, 1030, 6000, 8193)), ("float16", 200), ("float64", 31), ("float64", 1030)],
)
def test_bits_are_the_same_for_any_grid_and_any_schedule(simt, device, kind, cols):
    rows = 321 if cols < 1030 else 193 if cols < 6000 else 129
    p = problem(rows, cols, kind, "aligned" if cols % 8 == 0 else "odd stride", scale=3.0)
    for reference in (None, np.where(np.arange(rows) % 5 == 2, np.nan, p.twin().lse)):
        device(1, 1)
        one = p.cuda(simt, reference)
        grids = []
        for seed, grid in enumerate(((1, 1), (1, 2), (132, 8))):
            device(*grid)
            simt.set_schedule(seed)
            try:
                other, count = counted(simt, lambda before=reference: p.cuda(simt, before))
            finally:
                simt.set_schedule(0)
            other.same_bits(one)
            grids.append(count["blocks"])
        assert len(set(grids)) >= 2


def test_bits_are_the_same_for_any_schedule_in_small(simt, schedule):
    for cols in FEW:
        p = problem(66, cols)
        simt.set_schedule(0)
        reference = np.where(np.arange(66) % 9 == 2, np.nan, p.twin().lse)
        in_order = p.cuda(simt, reference)
        simt.set_schedule(schedule)
        p.cuda(simt, reference).same_bits(in_order)


@pytest.mark.parametrize(
    ("kind", "cols", "threads"),
    [
        ("float32", 1, [128]),
        ("float16", 256, [128]),
        ("float16", 257, [64]),
        ("bfloat16", 512, [64]),
        ("float32", 513, [96]),
        ("float32", 1024, [128]),
        ("float32", 1025, [96]),
        ("float16", 3000, [192]),
        ("float16", 8192, [512]),
        ("float16", 8193, [256, 128 * 9]),
        ("float64", 5, [256, 128]),
        ("float64", 1025, [256, 128 * 2]),
    ],
)
def test_width_decides_the_mapping(simt, kind, cols, threads):
    p = problem(3, cols, kind)
    _, count = counted(simt, lambda: p.cuda(simt))
    assert count["launches"] == len(threads)
    assert count["threads"] == sum(threads)
    scratch = simt.sinkhorn_workspace_cuda(p.address, kind, 3, cols, p.stride)[1]
    assert scratch == (0 if len(threads) == 1 else 3 * 4 * (8 if kind == "float64" else 4))


@pytest.mark.plain_only
def test_grid_is_what_is_resident_but_never_more_than_the_work(simt, device):
    def blocks(rows, cols, kind="float32"):
        p = problem(rows, cols, kind)
        return counted(simt, lambda: p.cuda(simt, p.twin().lse))[1]["blocks"]

    device(3, 2)
    assert blocks(640, 257) == 6  # 10 tiles
    assert blocks(320, 257) == 5
    assert blocks(321, 257) == 6
    assert blocks(640, 31) == 3  # four tiles in a block of four warps
    assert blocks(257, 31) == 2
    assert blocks(64, 31) == 1
    assert blocks(321, 2049, "float64") == 6 + 3 * 2  # the second kernel has three blocks for one tile
    device(1, 1)
    assert blocks(200, 2049, "float64") == 1 + 3


def fast_operations(rows, cols, kind, layout, labels):
    """Barriers, and shuffles of the one-warp mapping, of a pass in which no row needs care."""
    aligned = layout == "aligned"
    if cols <= 1024 and kind != "float64":
        together = (8 if aligned else 4) // (4 if kind == "float32" else 2)
    elif cols <= 8192 and kind != "float64":
        together = 2 if aligned and kind != "float32" else 1
    else:
        together = 1 if kind == "float64" else 4 if aligned else 2
    tiles = [min(TILE, rows - first) for first in range(0, rows, TILE)]
    turns = sum(-(-tile // together) for tile in tiles)
    if cols > 256 or kind == "float64":
        one_read = cols <= 8192 and kind != "float64"
        return {"barriers": turns + (len(tiles) if one_read else 0)}  # labels are there, and weights have been read
    return {"warp_operations": turns * together * 5 * (2 if labels else 1) + (3 * 5 + 3) * len(tiles)}


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", [31, 256, 257, 1024, 1025, 5632, 5633, 8193])
@pytest.mark.parametrize("kind", TYPES)
def test_a_row_near_its_reference_is_read_once_and_without_care(simt, kind, cols):
    # The careful form would hide whatever goes wrong in the fast one, were it not counted.
    for layout, labels, rows in itertools.product(("aligned", "odd stride"), (False, True), (66,)):
        p = problem(rows, cols, kind, layout)
        expected = p.twin()
        found, count = counted(simt, lambda p=p, e=expected, labels=labels: p.cuda(simt, e.lse + 0.25, labels=labels))
        p.check(found, expected)
        for name, wanted in fast_operations(rows, cols, kind, layout, labels).items():
            assert count[name] == wanted, name


@pytest.mark.parametrize("cols", FEW)
def test_care_is_taken_of_sums_out_of_range_and_of_no_others(simt, cols):
    # In range: 1e-20 (46.05 nats) to 1e30 (69.08 nats). What lies beyond would lose terms on a device.
    p = problem(9, cols)
    lse = p.twin().lse
    for nats, careful in ((46.0, 0), (46.1, 9), (-69.0, 0), (-69.2, 9)):
        found, count = counted(simt, lambda nats=nats: p.cuda(simt, lse + nats))
        np.testing.assert_allclose(found.columns, p.twin().columns, rtol=2e-5)
        for name, wanted in fast_operations(9, cols, "float32", "aligned", True).items():
            each = 2 if name == "barriers" else 3 * 5  # its best column, then its sum
            assert count[name] == wanted + careful * each, (name, nats)


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", FEW)
@pytest.mark.parametrize("kind", TYPES)
def test_any_reference_gives_the_same_sums(simt, kind, cols):
    rows = 72
    for layout in LAYOUTS[:2]:
        p = problem(rows, cols, kind, layout, scale=25.0)
        expected = p.twin()
        off = [0, 1, -3, 30, 45, 47, 60, 80, 95, 110, 300, 1e5, -30, -45, -60, -68, -70, -80, -88, -95, -300, -1e5]
        off += [np.nan, np.inf, -np.inf]
        # every offset meets every place among the rows in flight, in both orders
        for step in (1, 2):
            wrong = expected.lse + np.array([off[(i * step) % len(off)] for i in range(rows)])
            p.check(p.cuda(simt, wrong), expected)


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", FEW)
def test_labels_and_lse_are_optional_and_change_nothing(simt, cols):
    for kind, layout in itertools.product(TYPES, LAYOUTS[:2]):
        p = problem(66 if cols < 1024 else 5, cols, kind, layout)
        for reference in (None, p.twin().lse):
            everything = p.cuda(simt, reference)
            for labels, lse in ((False, True), (True, False), (False, False)):
                p.cuda(simt, reference, labels=labels, lse=lse).same_bits(everything)


def spoil(values):
    """Rows that must be masked, in a copy: NaN or +inf at either end and amid, or nothing above -inf."""
    rows, cols = values.shape
    bad = {0: np.nan, 17: np.nan, 42: np.inf, 63: np.nan, 64: np.inf, rows - 1: np.inf}
    spoiled = values.copy()
    for (row, value), column in zip(bad.items(), itertools.cycle((0, cols // 2, cols - 1))):
        spoiled[row, column] = value
    spoiled[65] = -np.inf
    spoiled[66, 0], spoiled[66, 1:] = np.nan, -np.inf
    spoiled[30, 0], spoiled[30, cols - 1] = np.inf, np.nan
    return spoiled, np.array(sorted([*bad, 30, 65, 66]))


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", [7, 250, 1001, 1030, 8193])
@pytest.mark.parametrize("kind", TYPES)
def test_bad_rows_are_masked_and_leave_the_others_bits_alone(simt, kind, cols):
    rows = 70
    rng = np.random.default_rng(cols)
    values = rng.standard_normal((rows, cols))
    spoiled, bad = spoil(values)
    good = np.setdiff1d(np.arange(rows), bad)
    weights = np.ones(rows)
    weights[bad] = 0
    for layout in LAYOUTS[:2]:
        clean = Problem(values, kind, layout, 2.0, weights=weights)
        p = Problem(spoiled, kind, layout, 2.0, weights=np.ones(rows))
        lse = clean.twin().lse
        for reference in (None, lse, np.where(np.arange(rows) % 2, lse, -1e9)):
            found, expected = p.cuda(simt, reference), clean.cuda(simt, reference)
            assert found.masked == len(bad)
            assert (found.labels[bad] == -1).all()
            assert np.isnan(found.lse[bad]).all()
            assert found.lse[good].tobytes() == expected.lse[good].tobytes()
            assert found.labels[good].tobytes() == expected.labels[good].tobytes()
            assert found.units.tobytes() == expected.units.tobytes()
            assert found.weights.sum() == len(good)
            p.check(found, p.twin())


@pytest.mark.parametrize("cols", FEW)
@pytest.mark.parametrize("kind", TYPES)
def test_single_minus_infinity_is_an_impossible_label(simt, kind, cols):
    values = np.random.default_rng(0).standard_normal((6, cols))
    values[:, 1] = -np.inf
    values[2] = -np.inf
    values[2, cols - 1] = 0
    p = Problem(values, kind)
    expected = p.twin()
    for reference in (None, expected.lse):
        found = p.cuda(simt, reference)
        p.check(found, expected)
        assert found.masked == 0
        assert found.units[1] == 0
        assert found.labels[2] == cols - 1


@pytest.mark.parametrize("cols", FEW)
def test_scale_that_overflows_masks_as_infinity_does(simt, cols):
    for kind, huge in (("float32", 1e38), ("bfloat16", 1e38), ("float64", 1e308)):
        values = np.zeros((5, cols))
        values[0, cols - 1] = huge  # +inf: masked
        values[1, 0] = -huge  # one -inf: legal
        values[2] = -huge  # nothing but -inf: masked
        values[3, 2] = huge / 100
        p = Problem(values, kind, scale=25.0)
        for reference in (None, np.zeros(5)):
            found = p.cuda(simt, reference)
            assert found.masked == 2
            assert found.labels.tolist() == [-1, 1, -1, 2, 0]
            p.check(found, p.twin())


@pytest.mark.plain_only
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("cols", FEW)
def test_huge_logits_stay_finite(simt, size, cols):
    for kind in TYPES:
        values = np.random.default_rng(3).uniform(-1, 1, (9, cols))
        values[np.arange(8), np.arange(8)] += size
        values[8] += size
        p = Problem(values, kind, scale=25.0)
        expected = p.twin()
        for reference in (None, expected.lse, np.zeros(9)):
            found = p.cuda(simt, reference)
            assert found.masked == 0
            double = kind == "float64"
            assert found.columns.sum() == pytest.approx(9, rel=1e-12 if double else 1e-6)
            # float32 knows 250,000 nats to 1/64 only: that cancels in the plan, but it is what lse can be
            np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-15 if double else 1.3e-7, atol=1e-6)
            np.testing.assert_array_equal(found.labels, expected.labels)
            assert np.abs(found.columns - expected.columns).sum() < (1e-9 if double else 2e-5)


def tied(cols):
    """Rows whose best score is in two columns or more; the lowest of each."""
    pairs = [(0, cols - 1), (cols - 2, cols - 1), (1, 2), (7, 8), (3, 4), (15, 16), (31, 32), (5, 5 + cols // 2)]
    pairs += [(a, b) for a, b in ((255, 256), (9, 255), (8, 263), (127, 640), (511, 1024), (8, 2056), (2047, 2048))]
    pairs += [(2050, 4100), (4095, 8190), (100, 8192)]
    pairs = [(a, b) for a, b in pairs if 0 <= a < b < cols]
    values = np.zeros((len(pairs) + 1, cols))
    for row, (a, b) in enumerate(pairs):
        values[row, [a, b]] = 2
    return values, [a for a, _ in pairs] + [0]


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", [7, 33, 256, 300, 1001, 1024, 1030, 4104, 8192, 8193, 10_000])
def test_lowest_column_wins_a_tie(simt, schedule, cols):
    values, lowest = tied(cols)
    for kind, layout in itertools.product(TYPES, ("aligned", "odd base")):
        p = Problem(values, kind, layout)
        for reference in (None, p.twin().lse):
            assert p.cuda(simt, reference).labels.tolist() == lowest


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", [5, 33, 256, 300, 1001, 1024, 1030, 8193, 9000])
def test_every_column_is_found_where_it_is(simt, cols):
    # One entry per row stands out: its column gets the row's weight and the row its number.
    columns = np.unique(np.r_[0:5, cols - 5 : cols, np.random.default_rng(1).integers(0, cols, 50)])
    for kind, layout in itertools.product(TYPES, LAYOUTS):
        values = np.zeros((len(columns), cols))
        values[np.arange(len(columns)), columns] = 60
        weights = 1 + np.arange(len(columns)) % 16
        p = Problem(values, kind, layout, weights=weights)
        for reference in (None, np.full(len(columns), 60.0)):
            found = p.cuda(simt, reference)
            assert found.labels.tolist() == columns.tolist()
            expected = np.zeros(cols)
            expected[columns] = weights
            np.testing.assert_allclose(found.columns, expected, rtol=1e-6, atol=1e-20)
            # potentials move the choice from there to another column, by the same amount
            moved = Problem(np.zeros((1, cols)), kind, layout, potential=expected)
            assert moved.cuda(simt).labels.tolist() == [int(expected.argmax())]


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", FEW)
def test_a_row_shift_changes_neither_labels_nor_the_bits_of_the_sums(simt, cols):
    rng = np.random.default_rng(cols)
    values = np.round(rng.uniform(-1, 1, (66, cols)) * 16) / 16  # exact in every type, shifted too
    shift = np.round(rng.uniform(-1, 1, 66) * 3)
    potential = np.round(rng.uniform(-2, 2, cols) * 16) / 16
    for kind, layout in itertools.product(TYPES, LAYOUTS[:2]):
        plain = Problem(values, kind, layout, potential=potential)
        moved = Problem(values + shift[:, None], kind, layout, potential=potential)
        reference = np.round(plain.twin().lse * 16) / 16
        for before in (None, reference):
            a = plain.cuda(simt, before)
            b = moved.cuda(simt, None if before is None else before + shift)
            assert a.units.tobytes() == b.units.tobytes()
            assert a.labels.tobytes() == b.labels.tobytes()
            np.testing.assert_allclose(b.lse - shift, a.lse, atol=1e-6)


@pytest.mark.plain_only
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("cols", [1, 256, 1024, 3001, 9000])
def test_column_sums_add_up_to_the_weight(simt, kind, cols):
    for spread in (0.1, 20.0):
        p = problem(130, cols, kind, "odd stride", spread)
        for reference in (None, p.twin().lse):
            found = p.cuda(simt, reference)
            weight = float(p.weights.sum())
            assert found.weights.sum() == weight
            assert found.columns.sum() == pytest.approx(weight, rel=1e-13 if kind == "float64" else 2e-7)


@pytest.mark.parametrize("cols", FEW)
def test_zero_weight_takes_a_row_out_of_the_sums_but_not_out_of_the_labels(simt, cols):
    for kind in TYPES:
        p = problem(66, cols, kind)
        p.weights = np.ones(66, np.float32)
        everything = p.cuda(simt)
        p.weights[10:] = 0
        few = p.cuda(simt)
        assert few.labels.tobytes() == everything.labels.tobytes()
        assert few.lse.tobytes() == everything.lse.tobytes()
        assert few.weights.tolist() == [10, 0]
        assert few.objectives[1] == 0
        p.check(few, p.twin())


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", FEW)
def test_weights_of_any_size_neither_overflow_nor_vanish(simt, cols):
    plain = problem(130, cols, weights=False)
    once = plain.cuda(simt)
    for size in (1e-20, 1e20):
        p = Problem(plain.exact, potential=plain.potential, weights=np.full(130, size))
        found = p.cuda(simt)
        np.testing.assert_allclose(found.columns / size, once.columns, rtol=1e-6)
        np.testing.assert_allclose(found.weights / size, once.weights, rtol=1e-6)


@pytest.mark.plain_only
@pytest.mark.parametrize("size", [1e-30, 1.9e-8, 2.1e-8, 9e16, 1.1e17, 1e30])
@pytest.mark.parametrize("cols", FEW)
def test_no_reference_makes_weights_overflow_or_vanish(simt, size, cols):
    # The row's sum is near an end of the range in which no care is taken of it, and weight / sum far from 1.
    for kind in ("float32", "float16", "float64"):
        plain = problem(66, cols, kind, weights=False)
        p = Problem(plain.exact, kind, potential=plain.potential, weights=np.full(66, size))
        expected = p.twin()
        for nats in (46.0, -69.0):
            for found in (p.cuda(simt, expected.lse + nats), p.cpu(simt, expected.lse + nats)):
                np.testing.assert_allclose(found.columns, expected.columns, rtol=1e-4)
                np.testing.assert_allclose(found.lse, expected.lse, rtol=2e-6)


def test_weights_that_add_up_to_one_keep_the_fast_form(simt):
    plain = problem(66, 1001, weights=False)
    p = Problem(plain.exact, potential=plain.potential, weights=np.full(66, 1 / 14_197_122))
    _, count = counted(simt, lambda: p.cuda(simt, p.twin().lse))
    assert count["barriers"] == fast_operations(66, 1001, "float32", "aligned", True)["barriers"]


@pytest.mark.plain_only
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("cols", [2, 300, 1026, 8200])
def test_sums_are_rounded_to_the_nearest_unit(simt, kind, cols):
    # Shares of a few units each, where cutting off instead of rounding shows.
    for nats in np.linspace(36.0, 42.0, 13):
        values = np.full((1, cols), -float(nats))
        values[0, 0] = 0
        p = Problem(values, kind)
        found = p.cuda(simt)
        t = p.terms()[0][0]
        wanted = np.exp(t[1]) / (1 + (cols - 1) * np.exp(t[1])) / simt.sinkhorn_resolution(1, 1.0)
        assert 1 < wanted < 600
        assert (found.units[1:] == found.units[1]).all()
        assert abs(found.units[1] - wanted) <= 0.5 + 1e-4 * wanted


@pytest.mark.plain_only
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_numbers_of_16_bits_are_read_exactly(simt, kind):
    bits = np.arange(0, 65536, 13, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float64)
    if kind == "bfloat16":
        bits[(bits & 0x7F80) == 0x7F80] = 0  # neither infinity nor NaN
        values = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    values = values[np.isfinite(values) & (np.abs(values) < 1e30)]
    p = Problem(values[:, None], kind)  # one column: lse is the logit
    for reference in (None, values.astype(np.float32)):
        np.testing.assert_allclose(p.cuda(simt, reference).lse, values, rtol=1.2e-7, atol=2e-7)


@pytest.mark.plain_only
def test_double_logits_are_not_cut_to_float(simt):
    values = 1000 + np.random.default_rng(0).standard_normal((66, 40)) * 1e-3
    p = Problem(values, "float64", scale=1 / 3, potential=np.linspace(0, 1e-9, 40))
    expected = p.twin()
    for reference in (None, expected.lse):
        p.check(p.cuda(simt, reference), expected)


def test_no_rows_launch_nothing(simt):
    _, count = counted(simt, lambda: simt.sinkhorn_pass_cuda(0, "float32", 0, 5, 5, 1.0, 0, 0, 1.0, *[0] * 8))
    assert count["launches"] == 0


@pytest.mark.parametrize(("cols", "stride"), [(0, 4), (5, 4)])
def test_impossible_shapes_are_refused(simt, cols, stride):
    with pytest.raises(ValueError, match=f"expected 1 <= cols <= stride, found cols {cols}, stride {stride}"):
        simt.sinkhorn_pass_cuda(0, "float32", 3, cols, stride, 1.0, 0, 0, 1.0, *[0] * 8)
