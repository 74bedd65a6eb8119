"""The CUDA kernels of the candidate search, executed by the SIMT runner: the CPU's lists, values, regrets and margins,
number by number, for all types, awkward sizes and any order of the threads.

Whatever a kernel reads lies between NaNs or sentinels, whatever it writes between sentinels.
"""

import numpy as np
import pytest

KINDS = ("float32", "float16", "bfloat16", "float64")
GUARD = 16
FIELDS = ("columns", "values", "found", "regret")


def bits_of_bfloat16(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored(values, kind):
    return bits_of_bfloat16(values) if kind == "bfloat16" else np.ascontiguousarray(values).astype(kind)


class Guarded:
    """An array between sentinels, at a multiple of 16 bytes; under AddressSanitizer with nothing around it."""

    def __init__(self, simt, array, around):
        array = np.ascontiguousarray(array)
        size, guard = array.dtype.itemsize, 0 if simt.variant == "address" else GUARD
        spare = 16 // size
        self.whole = np.full(array.size + 2 * guard + spare, around, array.dtype)
        self.begin = guard + (-(self.whole.ctypes.data // size + guard) % spare)
        self.shape = array.shape
        self.array[...] = array
        self.before = self.whole.copy()

    @property
    def array(self):
        return self.whole[self.begin : self.begin + int(np.prod(self.shape))].reshape(self.shape)

    @property
    def address(self):
        return self.array.ctypes.data

    def take(self):
        now = self.whole.copy()
        end = self.begin + int(np.prod(self.shape))
        now[self.begin : end] = self.before[self.begin : end]
        np.testing.assert_array_equal(now, self.before, err_msg="written beside an array")
        return self.array.copy()


class Problem:
    """Logits, prices and labels; the search over them on the runner and on the CPU."""

    def __init__(self, values, kind="float32", aligned=True, scale=1.0, prices=None, labels=None):
        self.kind, self.scale = kind, scale
        self.rows, self.cols = values.shape
        raw = stored(values, kind)
        size, per = raw.dtype.itemsize, 16 // raw.dtype.itemsize
        self.stride = -(-self.cols // per) * per if aligned else self.cols | 1
        # Between the rows there is what no score may see: NaN.
        self.memory = np.full(self.rows * self.stride + 2 * per, stored(np.array([np.nan]), kind)[0], raw.dtype)
        begin = -(self.memory.ctypes.data // size) % per + (0 if aligned else 1)
        self.logits = self.memory[begin : begin + self.rows * self.stride].reshape(self.rows, self.stride)
        self.logits[:, : self.cols] = raw
        self.address = self.logits.ctypes.data
        rng = np.random.default_rng([self.rows, self.cols])
        self.prices = rng.standard_normal(self.cols) if prices is None else np.asarray(prices, np.float64)
        if labels is None:
            labels = rng.integers(-1, self.cols, self.rows)
        self.labels = np.asarray(labels, np.int32)

    def matrix(self):
        return self.address, self.kind, self.rows, self.cols, self.stride, self.scale

    def given(self, options):
        """The options with all that may be left out."""
        infinity = float("inf")
        known = {"count": 4, "slack": -infinity, "floor": -infinity, "tie": 0.0, "bonus": None, "selected": None}
        known |= {"label_prices": self.prices, "first_row": 0}
        return known | options

    def rounded(self, prices):
        return np.ascontiguousarray(prices, np.float64 if self.kind == "float64" else np.float32)

    def cuda(self, simt, **options):
        given = self.given(options)
        selected, bonus, count = given["selected"], given["bonus"], given["count"]
        n = self.rows if selected is None else len(selected)
        width = 2 * count + 2
        prices, own = (Guarded(simt, self.rounded(p), np.nan) for p in (self.prices, given["label_prices"]))
        extra = None if bonus is None else Guarded(simt, np.float32(bonus), np.nan)
        labels = Guarded(simt, self.labels, 10**9)
        numbers = None if selected is None else Guarded(simt, np.int64(selected), 10**12)
        out = (
            Guarded(simt, np.zeros((n, width), np.int32), -777),
            Guarded(simt, np.zeros((n, width), np.float32), -777),
            Guarded(simt, np.full(n, -777, np.int32), -777),
            Guarded(simt, np.full(n, -777, np.float32), -777),
        )
        simt.find_candidates_cuda(
            *self.matrix(),
            *(prices.address, own.address, 0 if extra is None else extra.address, labels.address),
            *(0 if numbers is None else numbers.address, n, count, given["slack"], given["floor"], given["tie"]),
            *(one.address for one in out),
            *(given["first_row"], 0),
        )
        return dict(zip(FIELDS, (one.take() for one in out), strict=True))

    def cpu(self, simt, **options):
        given = self.given(options)
        selected, bonus, count = given["selected"], given["bonus"], given["count"]
        n = self.rows if selected is None else len(selected)
        out = (
            np.zeros((n, 2 * count + 2), np.int32),
            np.zeros((n, 2 * count + 2), np.float32),
            np.empty(n, np.int32),
            np.empty(n, np.float32),
        )
        own = np.ascontiguousarray(given["label_prices"], np.float64)
        extra = None if bonus is None else np.float64(bonus)
        numbers = None if selected is None else np.int64(selected)
        simt.find_candidates_cpu(
            *self.matrix(),
            *(self.prices.ctypes.data, own.ctypes.data, 0 if extra is None else extra.ctypes.data),
            *(self.labels.ctypes.data, 0 if numbers is None else numbers.ctypes.data, n, count),
            *(given["slack"], given["floor"], given["tie"]),
            *(one.ctypes.data for one in out),
            *(1, "", given["first_row"]),
        )
        return dict(zip(FIELDS, out, strict=True))

    def margins_cuda(self, simt, selected=None):
        numbers = None if selected is None else Guarded(simt, np.int64(selected), 10**12)
        n = self.rows if selected is None else len(selected)
        prices, labels = Guarded(simt, self.rounded(self.prices), np.nan), Guarded(simt, self.labels, 10**9)
        room = simt.column_margins_workspace_cuda(n, self.cols)
        assert room % 4 == 0
        scratch = Guarded(simt, np.full(room // 4, np.nan, np.float32), -777)
        out = Guarded(simt, np.full((4, self.cols), np.nan, np.float32), -777)
        simt.column_margins_cuda(
            *self.matrix(),
            *(prices.address, labels.address, 0 if numbers is None else numbers.address, n),
            *(out.address, scratch.address, 0),
        )
        scratch.take()
        return out.take()

    def margins_cpu(self, simt, selected=None):
        selected = np.arange(self.rows) if selected is None else np.int64(selected)
        return simt.column_margins_cpu(*self.matrix(), self.prices, self.labels, selected, 1, "")


def problem(rows, cols, kind="float32", aligned=True, scale=3.0, seed=0, **options):
    values = np.random.default_rng([seed, rows, cols]).standard_normal((rows, cols))
    return Problem(values, kind, aligned, scale, **options)


def exact_cpu(simt):
    """Whether the CPU's loops round a fma once, as the GPU does."""
    return simt.build_info()["cpu_isa"] != "generic"


def assert_same(simt, found, expected):
    if not exact_cpu(simt):
        pytest.skip("the generic loops round a fma twice")
    for field in FIELDS:
        np.testing.assert_array_equal(found[field], expected[field], err_msg=field)


def assert_as_on_the_cpu(simt, one, **options):
    found, expected = one.cuda(simt, **options), one.cpu(simt, **options)
    assert_same(simt, found, expected)
    return found


# One column, a part of a warp, a cut piece, groups that are not full, several turns of the sweep (256 columns of two
# bytes, 128 of four), and more than four of them.
SIZES = (
    (1, 1, 1),
    (2, 7, 4),
    (33, 31, 4),
    (5, 33, 8),
    (9, 64, 16),
    (6, 65, 6),
    (5, 257, 7),
    (7, 1001, 4),
    (4, 1301, 16),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("rows", "cols", "count"), SIZES)
def test_lists_are_the_cpus_number_by_number(simt, rows, cols, count, kind, aligned):
    found = assert_as_on_the_cpu(simt, problem(rows, cols, kind, aligned), count=min(count, cols))
    assert (found["found"] > 0).any() or rows < 3


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_lists_are_the_cpus_in_any_order_of_the_threads(simt, schedule, kind):
    assert_as_on_the_cpu(simt, problem(19, 70, kind, aligned=False), count=7)


@pytest.mark.plain_only
@pytest.mark.parametrize("cols", [3000, 8193])
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_are_listed_as_on_the_cpu(simt, cols, kind):
    assert_as_on_the_cpu(simt, problem(5, cols, kind), count=8)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_slack_floor_selected_rows_and_left_out_columns(simt, schedule, kind):
    values = np.random.default_rng(5).standard_normal((60, 97))
    values[::7, ::3] = -np.inf
    values[5] = -np.inf
    prices = np.random.default_rng(6).standard_normal(97)
    labels = np.random.default_rng(7).integers(-1, 97, 60)
    labels[5], labels[9] = 3, -1
    own = prices.copy()
    prices[10:60] = -np.inf
    one = Problem(values, kind, True, 3.0, prices, labels)
    for options in (
        {"slack": 5.0},
        {"floor": -2.0},
        {"floor": -2.0, "slack": 1.0, "selected": [59, 5, 5, 17, 0, 9]},
        {"floor": 0.0, "slack": -1.0},
        {"floor": -1.0, "selected": np.arange(0, 60, 3), "first_row": 10**10},
    ):
        found = assert_as_on_the_cpu(simt, one, label_prices=own, **options)
        assert (found["found"] > 0).any()
        assert (found["found"] == 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("floor", [-np.inf, -3.0, 0.0])
def test_a_bonus_decides_what_is_listed_but_not_what_is_first(simt, kind, floor):
    bonus = np.random.default_rng(1).random(130) * 4
    bonus[::3] = 0
    assert_as_on_the_cpu(simt, problem(40, 130, kind), bonus=bonus, floor=floor)
    assert_as_on_the_cpu(simt, problem(40, 130, kind), bonus=bonus, floor=floor, slack=6.0, count=16)


@pytest.mark.parametrize("count", [1, 4, 6, 7, 16, 63, 64, 100])
def test_equal_scores_are_listed_in_turn(simt, count):
    one = Problem(np.zeros((7, 330)), labels=np.arange(7) * 40, prices=np.zeros(330))
    found = assert_as_on_the_cpu(simt, one, count=count, first_row=17)
    assert (found["found"] <= count + 2).all()
    assert_as_on_the_cpu(simt, one, count=count, tie=2e-5)


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("count", [4, 8])
def test_columns_within_a_tie_are_listed_in_turn(simt, schedule, kind, count):
    values = np.random.default_rng(0).random((33, 200)) * 1e-4
    values[:, 150:] -= 1.0
    values[4] *= 1e5
    one = Problem(values, kind, prices=np.zeros(200), labels=np.zeros(33))
    for floor in (-np.inf, -5e-5):
        found = assert_as_on_the_cpu(simt, one, count=count, tie=1e-3, floor=floor)
        assert found["columns"].max() >= 120


@pytest.mark.parametrize("rounding", [1, 4])
@pytest.mark.parametrize("count", [1, 4, 7, 16, 40])
def test_of_columns_that_crowd_a_few_groups_the_best_are_chosen(simt, rounding, count):
    """Far more columns above the bound than a list may have; some of them in shared memory, some too many for it."""
    rng = np.random.default_rng(count)
    values = rng.standard_normal((12, 1001)) - 50
    for row in range(12):
        groups = rng.choice(64, 1 + row % 4, replace=False)
        where = np.isin(np.arange(1001) % 64, groups)
        values[row, where] += 49 + (rng.integers(0, 3, where.sum()) if row % 2 else rng.standard_normal(where.sum()))
    values[11] = np.round(values[11])
    one = Problem(np.round(values * rounding) / rounding, prices=np.zeros(1001), labels=rng.integers(0, 1001, 12))
    for options in ({}, {"floor": -1.0}, {"bonus": np.round(rng.random(1001))}):
        found = assert_as_on_the_cpu(simt, one, count=count, first_row=5, **options)
        assert (found["found"] > 0).all()
        assert found["found"].max() >= min(count, 16)


@pytest.mark.parametrize("cols", [300, 700])
def test_lists_of_all_columns_need_no_room_in_shared_memory(simt, schedule, cols):
    one = problem(3, cols, labels=[0, -1, cols - 1])
    found = assert_as_on_the_cpu(simt, one, count=cols)
    assert found["found"].tolist() == [cols, 0, cols]
    assert (np.sort(found["columns"][0, :cols]) == np.arange(cols)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_huge_and_negative_zero_numbers_are_treated_alike(simt, kind):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, 70))
    values[0] *= 1e-40
    values[1] *= 1e-38
    values[2] *= 3e4
    values[3] = -0.0
    values[4] = rng.integers(-1, 2, 70) * 1e-39
    values[5] *= 1e-6
    values[6, ::2] = -np.inf
    values[7] = 5e-324
    with np.errstate(over="ignore", under="ignore"):
        for scale in (1.0, 1e-3, 1e4):
            one = Problem(values, kind, True, scale, prices=rng.standard_normal(70) * 1e-3, labels=np.arange(20))
            assert_as_on_the_cpu(simt, one, count=5)
            one = Problem(values, kind, True, scale, prices=rng.standard_normal(70) * 1e-39, labels=np.arange(20))
            assert_as_on_the_cpu(simt, one, count=5, floor=-1e-38)


@pytest.mark.parametrize("multiprocessors", [1, 5])
def test_lists_do_not_depend_on_the_grid(simt, multiprocessors):
    one = problem(70, 33)
    simt.set_device(multiprocessors, 2)
    try:
        assert_as_on_the_cpu(simt, one)
        np.testing.assert_array_equal(one.margins_cuda(simt), one.margins_cpu(simt))
    finally:
        simt.set_device(2, 2)


def test_rows_that_hold_no_numbers_end_in_time(simt):
    """Callers give them no label; a list of such a row means nothing, but there is an end, and nothing else changes."""
    values = np.random.default_rng(0).standard_normal((8, 70))
    values[1] = np.nan
    values[2, 3] = np.inf
    values[3, 5] = np.nan
    values[4] = np.inf
    labels = np.arange(8)
    labels[[0, 7]] = 9, 60
    one = Problem(values, labels=labels)
    found = one.cuda(simt)
    expected = one.cpu(simt)
    for row in (0, 5, 6, 7):
        for field in FIELDS:
            np.testing.assert_array_equal(found[field][row], expected[field][row])
    assert ((found["found"] >= 0) & (found["found"] <= 10)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (31, 33), (201, 70), (70, 1001)])
@pytest.mark.parametrize("aligned", [True, False])
def test_margins_are_the_cpus_number_by_number(simt, rows, cols, kind, aligned):
    one = problem(rows, cols, kind, aligned)
    one.logits[:, cols // 2] = stored(np.array([-np.inf]), kind)[0]
    one.logits[rows // 2, :cols] = stored(np.array([-np.inf]), kind)[0]
    one.prices[cols // 3] = -np.inf
    for selected in (None, np.arange(rows)[::-2], np.zeros(0, np.int64)):
        found = one.margins_cuda(simt, selected)
        if exact_cpu(simt):
            np.testing.assert_array_equal(found, one.margins_cpu(simt, selected))
        assert (found > 0).all()


def test_margins_do_not_depend_on_the_order_of_the_threads(simt, schedule):
    one = problem(70, 33)
    if exact_cpu(simt):
        np.testing.assert_array_equal(one.margins_cuda(simt), one.margins_cpu(simt))


def test_margins_of_equal_columns_are_none(simt):
    one = Problem(np.ones((20, 6)), prices=np.zeros(6), labels=np.zeros(20))
    assert np.isinf(one.margins_cuda(simt)).all()


@pytest.mark.plain_only
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_lists_agree_with_the_torch_twin(simt, kind):
    """The twin lists exactly the best `count`: all of them, and nothing that is worse than what it leaves out."""
    torch = pytest.importorskip("torch")
    from sela_ext.kernels import reference

    one = problem(50, 130, kind)
    logits = torch.from_numpy(one.logits[:, :130].copy())
    expected = reference.find_candidates(logits, one.prices, one.labels, scale=3.0, count=8)
    found = one.cuda(simt, count=8)
    scores = 3.0 * logits.double().numpy() + one.prices
    np.testing.assert_allclose(found["regret"], expected.regret, atol=1e-4)
    for place in range(50):
        mine = found["columns"][place, : found["found"][place]].tolist()
        theirs = expected.columns[place, : expected.found[place]].tolist()
        assert bool(mine) == bool(theirs)
        if mine:
            least = min(scores[place, c] for c in mine if c != one.labels[place] or c in theirs[:-1])
            assert all(scores[place, c] <= least + 1e-4 for c in theirs if c not in mine)
            assert len(mine) >= 8
    margins = reference.column_margins(logits, one.prices, one.labels, scale=3.0)
    np.testing.assert_allclose(one.margins_cuda(simt), margins, atol=1e-4)


def test_bad_sizes_are_refused(simt):
    one = problem(3, 5)
    with pytest.raises(ValueError, match=r"expected 1 \.\. cols candidates, found 6"):
        one.cuda(simt, count=6)
    one.stride = 4
    with pytest.raises(ValueError, match="expected 1 <= cols <= stride"):
        one.cuda(simt)
    with pytest.raises(ValueError, match="expected 1 <= cols <= stride, cols < 2"):
        simt.column_margins_cuda(one.address, "float32", 3, 0, 5, 1.0, 0, 0, 0, 3, 0, 0, 0)
    with pytest.raises(ValueError, match="expected 1 <= cols <= stride, cols < 2"):
        simt.column_margins_cuda(one.address, "float32", 3, 2**31 - 1, 2**31, 1.0, 0, 0, 0, 3, 0, 0, 0)
