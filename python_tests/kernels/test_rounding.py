"""The candidate search against its twin, and the transport problem against scipy's assignment."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sela_ext import build_info
from sela_ext.errors import OptionError
from sela_ext.kernels import Rounding, column_margins, find_candidates, reference, smooth_prices

ISAS = ["generic", "avx2", "avx512"]
ISAS = ISAS[: ISAS.index(build_info()["cpu_isa"]) + 1]


def problem(rows, cols, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)
    prices = torch.randn(cols, generator=generator, dtype=torch.float64).numpy()
    labels = torch.randint(-1, cols, (rows,), generator=generator, dtype=torch.int32).numpy()
    return logits, prices, labels


def listed(lists, place):
    return lists.columns[place, : lists.found[place]].tolist()


def check_lists(found, expected, scores, labels, count, tolerance):
    """Every list holds its twin's columns; what it holds more scores no less than what it leaves out."""
    finite = np.isfinite(expected.regret)
    np.testing.assert_allclose(found.regret[finite], expected.regret[finite], atol=tolerance)
    assert np.array_equal(found.regret[~finite], expected.regret[~finite])
    for place in range(len(labels)):
        mine, twin = listed(found, place), listed(expected, place)
        assert bool(mine) == bool(twin)
        if not mine:
            continue
        assert len(set(mine)) == len(mine) <= 2 * count + 2
        assert labels[place] in mine
        row = scores[place]
        assert row[mine[0]] >= row.max() - tolerance or mine[0] == labels[place]
        rest = [c for c in mine if c != labels[place]]
        missing = [c for c in twin if c not in mine]
        worst = min((row[c] for c in rest), default=np.inf)
        assert all(row[c] <= worst + tolerance for c in missing)
        assert len(rest) >= min(count, len([c for c in twin if c != labels[place]])) - 1
        values = dict(zip(twin, expected.values[place], strict=False))
        for c, v in zip(mine, found.values[place], strict=False):
            if c in values and np.isfinite(values[c]):
                assert v == pytest.approx(values[c], abs=tolerance)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "cols", "count"), [(1, 1, 1), (33, 31, 4), (130, 65, 8), (40, 1001, 4), (9, 3, 16)])
def test_lists_agree_with_the_twin(rows, cols, count, dtype, isa):
    logits, prices, labels = problem(rows, cols, dtype=dtype)
    found = find_candidates(logits, prices, labels, scale=7.0, count=count, isa=isa)
    expected = reference.find_candidates(logits, prices, labels, scale=7.0, count=count)
    scores = 7.0 * logits.double().numpy() + prices
    check_lists(found, expected, scores, labels, min(count, cols), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slack_floor_left_out_columns_and_selected_rows_agree_with_the_twin(dtype):
    logits, prices, labels = problem(300, 97, seed=5, dtype=dtype)
    logits[::7, ::3] = -torch.inf
    logits[5] = -torch.inf
    labels[5] = 3
    own = prices.copy()
    prices[10:60] = -np.inf
    for options in (
        {"slack": 5.0},
        {"floor": -2.0},
        {"floor": -2.0, "slack": 1.0, "selected": np.array([299, 5, 5, 17, 0])},
        {"floor": 0.0, "slack": -1.0},
    ):
        found = find_candidates(logits, prices, labels, scale=3.0, count=4, label_prices=own, **options)
        expected = reference.find_candidates(logits, prices, labels, scale=3.0, count=4, label_prices=own, **options)
        places = options.get("selected", np.arange(300))
        scores = 3.0 * logits.double().numpy()[places] + prices
        check_lists(found, expected, scores, labels[places], 4, 1e-4)
        assert (found.found > 0).any()
        assert (found.found == 0).any()


def test_equal_scores_are_listed_in_turn():
    lists = find_candidates(np.zeros((50, 40), np.float32), np.zeros(40), np.zeros(50, np.int32), count=4)
    expected = reference.find_candidates(np.zeros((50, 40), np.float32), np.zeros(40), np.zeros(50, np.int32), count=4)
    for place in range(50):
        assert listed(lists, place) == listed(expected, place)
    assert set(np.unique(lists.columns)) == set(range(40))


@pytest.mark.parametrize("isa", ISAS)
def test_columns_within_a_tie_are_listed_in_turn(isa):
    logits = np.random.default_rng(0).random((60, 200)).astype(np.float32) * 1e-4
    logits[:, 150:] -= 1.0
    lists = find_candidates(logits, np.zeros(200), np.zeros(60, np.int32), count=4, tie=1e-3, isa=isa)
    expected = reference.find_candidates(logits, np.zeros(200), np.zeros(60, np.int32), count=4, tie=1e-3)
    for place in range(60):
        turn = {(place * 4 + k) % 200 for k in range(4)}
        turn = turn if max(turn) < 150 else None  # otherwise it goes on at the beginning
        for found in (listed(lists, place), listed(expected, place)):
            assert max(found) < 150
            assert turn is None or turn <= set(found)
    assert len(np.unique(lists.columns)) == 150
    plain = find_candidates(logits, np.zeros(200), np.zeros(60, np.int32), count=4, isa=isa)
    assert (logits[np.arange(60)[:, None], plain.columns[:, :4]] > 0.8e-4).all()


def test_lists_depend_on_neither_threads_nor_strides():
    logits, prices, labels = problem(1000, 130, seed=2)
    one = find_candidates(logits, prices, labels, count=5, threads=1)
    wide = torch.zeros(1000, 200)
    wide[:, 30:160] = logits
    for other in (
        find_candidates(logits, prices, labels, count=5, threads=3),
        find_candidates(wide[:, 30:160], prices, labels, count=5),
        find_candidates(logits.T.contiguous().T, prices, labels, count=5),
        find_candidates(logits.numpy()[::-1][::-1], prices, labels, count=5),
    ):
        for field in ("columns", "values", "found", "regret"):
            assert np.array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (31, 33), (9001, 65)])
def test_smoothed_prices_agree_with_the_twin_and_balance_the_lists(rows, cols):
    logits, prices, labels = problem(rows, cols, seed=3)
    logits[: rows // 3, 0] = -torch.inf
    lists = find_candidates(logits, prices, labels, scale=5.0, count=6)
    wanted = np.full(cols, (labels >= 0).sum() / cols)
    wanted[cols // 2] *= 0 if cols > 1 else 1
    stages = [(1.0, 4), (4.0, 7)]
    options = {"stages": stages, "relaxation": 1.5}
    expected = reference.smooth_prices(lists, prices, wanted, labels, **options)
    for isa in ISAS:
        one = smooth_prices(lists, prices, wanted, labels, **options, threads=1, isa=isa)
        found = smooth_prices(lists, prices, wanted, labels, **options, threads=3, isa=isa)
        assert np.array_equal(found[0], one[0])
        assert np.array_equal(found[1], one[1])
        np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
        assert (found[1] == expected[1]).mean() > 0.999
        assert np.array_equal(found[1] == -1, labels == -1)
    at_start = smooth_prices(lists, prices, wanted, labels, stages=[])[1]
    before = np.bincount(at_start[labels >= 0], minlength=cols)
    after = np.bincount(found[1][labels >= 0], minlength=cols)
    assert rows < 9001 or np.abs(after - wanted)[wanted > 0].sum() < 0.5 * np.abs(before - wanted)[wanted > 0].sum()


def test_long_lists_are_smoothed_as_well():
    logits, prices, _ = problem(70, 90, seed=8)
    labels = np.zeros(70, np.int32)
    lists = find_candidates(logits, prices, labels, count=90)
    assert lists.found.max() > 32
    options = {"stages": [(1.0, 5)], "tolerance": 1e-9}
    expected = reference.smooth_prices(lists, prices, np.full(90, 70 / 90), labels, **options)
    for isa in ISAS:
        found = smooth_prices(lists, prices, np.full(90, 70 / 90), labels, **options, isa=isa)
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)


def test_smoothing_ends_at_its_tolerance():
    logits, prices, labels = problem(500, 20, seed=4)
    labels[:] = 0
    lists = find_candidates(logits, prices, labels, count=20)
    wanted = np.full(20, 25.0)
    one = smooth_prices(lists, prices, wanted, labels, stages=[(1.0, 1)])[0]
    for smooth in (smooth_prices, reference.smooth_prices):
        assert np.allclose(smooth(lists, prices, wanted, labels, stages=[(1.0, 9)], tolerance=2.0)[0], one, atol=1e-5)
        assert not np.allclose(smooth(lists, prices, wanted, labels, stages=[(1.0, 9)])[0], one, atol=1e-3)


def test_rows_with_equal_columns_are_dealt_out_in_their_order():
    lists = find_candidates(np.zeros((9, 3), np.float32), np.zeros(3), np.zeros(9, np.int32), count=3)
    wanted = np.array([2.0, 3.0, 4.0])
    for smooth in (smooth_prices, reference.smooth_prices):
        _, labels = smooth(lists, np.zeros(3), wanted, np.zeros(9, np.int32), stages=[], tie=1e-6)
        assert labels.tolist() == [2, 1, 2, 0, 1, 2, 0, 1, 2]
        # A column that is better by more than a tie is taken, whatever is wanted.
        _, labels = smooth(lists, np.array([1e-3, 0, 0]), wanted, np.zeros(9, np.int32), stages=[], tie=1e-6)
        assert labels.tolist() == [0] * 9


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "cols"), [(3, 5), (301, 33), (130, 129)])
def test_margins_of_columns_agree_with_the_twin(rows, cols, dtype, isa):
    logits, prices, labels = problem(rows, cols, seed=6, dtype=dtype)
    logits[:, 1] = -torch.inf
    prices[2] = -np.inf
    selected = np.arange(0, rows, 2)
    expected = reference.column_margins(logits, prices, labels, scale=3.0, selected=selected)
    found = column_margins(logits, prices, labels, scale=3.0, selected=selected, threads=1, isa=isa)
    assert np.array_equal(np.isfinite(found), np.isfinite(expected))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.array_equal(
        column_margins(logits, prices, labels, scale=3.0, selected=selected, threads=3, isa=isa), found
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bonus_makes_columns_good_but_not_best(dtype, isa):
    logits, prices, labels = problem(200, 77, seed=9, dtype=dtype)
    bonus = np.zeros(77)
    bonus[[3, 40]] = 2.5
    options = {"scale": 2.0, "count": 20, "floor": -0.5, "bonus": bonus}
    found = find_candidates(logits, prices, labels, **options, isa=isa)
    expected = reference.find_candidates(logits, prices, labels, **options)
    np.testing.assert_allclose(found.regret, expected.regret, atol=1e-4)
    scores = 2.0 * logits.double().numpy() + prices
    near = scores.max(axis=1, keepdims=True) - scores
    for row in np.flatnonzero(labels >= 0):
        mine = listed(found, row)
        assert mine[0] == scores[row].argmax()
        good = set(np.flatnonzero(near[row] < 0.5 + bonus - 1e-4)) | {int(labels[row])}
        maybe = set(np.flatnonzero(near[row] < 0.5 + bonus + 1e-4)) | {int(labels[row])}
        assert good <= set(mine) <= maybe
        assert good <= set(listed(expected, row)) <= maybe


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 12),
    seed=st.integers(0, 100_000),
    kind=st.sampled_from(["plain", "rounded", "equal"]),
    total_low=st.floats(0, 1),
)
def test_labels_are_the_best_of_admissible_sizes(rows, cols, seed, kind, total_low):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, cols))
    if kind == "rounded":
        logits = np.round(logits)
    if kind == "equal":
        logits[:] = logits[0]
    prices = 3 * rng.standard_normal(cols)
    low = np.bincount(rng.integers(cols, size=int(total_low * rows)), minlength=cols)
    high = low + np.bincount(rng.integers(cols, size=rows), minlength=cols)
    labels = (logits + prices).argmax(axis=1).astype(np.int32)
    lists = find_candidates(logits, prices, labels, count=cols)
    rounding = Rounding(rows, rows, prices, low, high)
    rounding.add(np.arange(rows), labels, lists)
    assert rounding.solve() == 0
    found = rounding.labels
    sizes = np.bincount(found, minlength=cols)
    assert (low <= sizes).all()
    assert (sizes <= high).all()
    assert np.array_equal(sizes, rounding.sizes)
    assert np.array_equal(sizes, rounding.wanted)
    best = reference.best_labels(logits, low, high)
    places = np.arange(rows)
    assert logits[places, found].sum() == pytest.approx(logits[places, best].sum(), abs=1e-4 * rows)
    # The prices prove it: every row is at its best, and odd places are where they are cheapest.
    score = logits + rounding.prices
    assert (score.max(axis=1) - score[places, found]).max() < 1e-5
    free = high > low
    more, less = rounding.prices[free & (sizes > low)], rounding.prices[free & (sizes < high)]
    assert len(more) == 0 or len(less) == 0 or more.max() <= less.min() + 1e-5


def test_rows_that_no_list_leads_out_of_are_left_over_and_can_be_forced():
    logits = np.full((6, 3), -np.inf)
    logits[:, 0] = 0.0
    logits[5, 1] = 0.0
    labels = np.zeros(6, np.int32)
    rounding = Rounding(6, 6, np.zeros(3), np.full(3, 2), np.full(3, 2))
    rounding.add(np.arange(6), labels, find_candidates(logits, np.zeros(3), labels, count=3))
    assert rounding.solve() == 3
    assert rounding.labels.tolist() == [0, 0, 0, 0, 0, 1]
    assert rounding.closed.tolist() == [True, False, False]
    assert rounding.force() == 3
    assert rounding.labels.tolist() == [1, 2, 2, 0, 0, 1]
    assert rounding.sizes.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": np.full(4, 3, np.int32)}, "labels: expected 4 numbers in -1 .. 2"),
        ({"prices": np.full(3, np.inf)}, "prices: expected 3 numbers, finite or -inf"),
        ({"prices": np.zeros(2)}, "prices: expected 3 numbers"),
        ({"label_prices": np.full(3, -np.inf)}, "label_prices: expected 3 finite numbers"),
        ({"count": 0}, "count: expected an integer >= 1, found 0"),
        ({"selected": [4]}, "selected: expected row numbers in 0 .. 3"),
        ({"scale": -1.0}, "scale: expected a finite number > 0"),
        ({"bonus": [0.0, np.inf, 0.0]}, "bonus: expected 3 finite numbers >= 0"),
        ({"bonus": [0.0, -1.0, 0.0]}, "bonus: expected 3 finite numbers >= 0"),
    ],
)
def test_wrong_arguments_of_the_search_are_refused(options, message):
    given_options = {"prices": np.zeros(3), "labels": np.zeros(4, np.int32), **options}
    for search in (find_candidates, reference.find_candidates):
        with pytest.raises(OptionError, match=message):
            search(
                np.zeros((4, 3), np.float32),
                given_options["prices"],
                given_options["labels"],
                **{k: v for k, v in given_options.items() if k not in ("prices", "labels")},
            )


def test_wrong_sizes_and_lists_are_refused():
    with pytest.raises(OptionError, match="expected sums around 5, found 6 and 6"):
        Rounding(5, 5, np.zeros(2), [3, 3], [3, 3])
    with pytest.raises(OptionError, match="0 <= low <= high"):
        Rounding(5, 5, np.zeros(2), [3, 3], [2, 3])
    with pytest.raises(OptionError, match="expected sums around 2"):
        reference.best_labels(np.zeros((2, 2)), [2, 2], [2, 2])
    rounding = Rounding(4, 4, np.zeros(3), np.ones(3, int), np.full(3, 2))
    labels = np.zeros(4, np.int32)
    lists = find_candidates(np.eye(4, 3), np.zeros(3), labels, count=1)
    with pytest.raises(ValueError, match="new label"):
        rounding.add(np.arange(4), np.full(4, 2, np.int32), lists)
    with pytest.raises(ValueError, match="row 9 does not exist"):
        rounding.add(np.array([9, 0, 1, 2]), labels, lists)
