"""Labels whose cluster sizes are exactly the floor or the ceiling of the wanted ones, at (nearly) no loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.sources import best_columns, column_losses, logits_pass
from sela_ext.kernels.rounding import Candidates, Rounding, smooth_prices

if TYPE_CHECKING:
    import numpy.typing as npt

    from sela_ext.assign.problem import Problem

    Vector = npt.NDArray[np.float64]
    Longs = npt.NDArray[np.int64]
    Labels = npt.NDArray[np.int32]

# Columns that a row lists, tried one after the other while images are left over. More make the solution better, fewer
# make it faster; what is missing shows in the gap and is added.
COUNTS = (4, 8, 16)
SMALL = 1 << 19  # entries of a matrix up to which every column is listed
MISPLACED = 0.01  # with a smaller share the prices move too little for a sample to pay
# A sample of the rows tells by its margins which sharpness and which window the problem needs. When a larger share than
# FAR is misplaced, the prices are first improved by passes at a larger lambda over a part of the rows, so many per
# cluster: the rounded problem has other prices than the plan, and lists made at those would have to be long. When a
# smaller share is misplaced, what a part of the rows says is worse than what is known.
SAMPLE, SAMPLE_PER_CLUSTER, SAMPLE_COUNT = 2048, 8, 16
FAR = 0.12
# Sharpness of the Sinkhorn iterations: at least so much (1 is the plan itself), and so many times 1 / (the margin that
# NEARBY columns per row lie within); and iterations. At the last of them few rows are undecided, and most of the
# misplaced ones have found their place.
NEARBY = 0.25
SAMPLE_SHARPNESS, SAMPLE_PASSES, SAMPLE_ERROR = 0.25, 6, 0.1
STAGES = ((1.0, 0.75, 6), (2.0, 1.5, 6), (4.0, 3.0, 6), (8.0, 6.0, 6))
# Rows are many times the same when a sample has fewer different ones than this part of it, as the first SAME values of
# their lists tell. All columns that one kind of row must share are listed then, if they are at most MOST, and a sharper
# plan finds the prices at which they are equally good.
DIFFERENT, SAME, MOST = 0.5, 4, 64
STAGES_OF_EQUALS = ((32.0, 24.0, 8), (128.0, 96.0, 8), (512.0, 384.0, 8))
RELAXATION = 1.8  # of the iterations: half as many reach as far
TOLERANCE = 2e-3  # of the sizes, where a stage ends
LARGEST_STEP = 3.0  # nats of the sharpened score, as smooth_prices has it
# Columns per row inside the window, beside the best; and so many more times the misplaced share.
LISTED, LISTED_MISPLACED, LISTED_FAR = 0.4, 10.0, 3.0
# Every cluster should be listed by so many times its share of the images, beside those that like it best: clusters that
# few images know would otherwise become far too dear before one of these comes. This happens in plans that are nearly
# labels: margins are wider than PEAKED nats.
KNOWN_BY, PEAKED = 1.3, 5.0
COLUMN_MARGINS = 4  # the loss that column_margins returns
LEFT = 0.05  # a larger share of images left over needs longer lists
FEW_LEFT = 64  # so many images left over are moved from where the others are
# Clusters that lack images and that no list leads to are offered so many images, and so many more per image they lack.
OFFERED, OFFERED_PER_IMAGE = 64, 8
TIE = 2e-5  # nats: two clusters that differ by less are the same to a row
INDIFFERENT = 2e-4  # nats: margins so small mean that all columns are the same to most rows
SLACK = 1e-3  # nats: a row that loses less to its best cluster is at its best
GAP_GOAL = 1e-3  # nats per image: good enough to stop
ROUNDS = 10  # looks at the whole matrix at most


@dataclass(frozen=True)
class Balanced:
    """Exactly balanced labels.

    Attributes:
        labels: int32 [N], -1 for rows that take no part.
        prices: float64 [K], nats: the dual solution that the gap is measured with.
        gap: at most so many nats per image (of logits) are lost to the best labels of admissible sizes; inf when
            images had to be given impossible clusters.
        impossible: images that had to be given a cluster at -inf.
        images: that were counted.
    """

    labels: Labels
    prices: Vector
    gap: float
    impossible: int
    images: int = 0


def admissible_sizes(shares: Vector, total: int) -> tuple[Longs, Longs]:
    """Smallest and largest sizes [K]: floor and ceiling of total * share; equal where that is a whole number."""
    wanted = shares * total
    whole = np.rint(wanted)
    exact = np.abs(wanted - whole) <= 1e-9 * np.maximum(1.0, wanted)
    low = np.where(exact, whole, np.floor(wanted)).astype(np.int64)
    high = np.where(exact, whole, np.ceil(wanted)).astype(np.int64)
    return low, high


def least_price(prices: Vector, low: Longs, high: Longs, total: int) -> float:
    """Return min sum_j n_j prices_j over sizes low <= n <= high that sum to total: the rest goes to the cheapest."""
    value = math.fsum(prices * low)
    left = total - int(low.sum())
    order = np.argsort(prices, kind="stable")
    room = np.cumsum((high - low)[order])
    taken = np.diff(np.minimum(room, left), prepend=0)
    return value + math.fsum(prices[order] * taken)


def balance_exactly(problem: Problem, labels: Labels, potential: Vector, dead: npt.NDArray[np.bool_]) -> Balanced:
    """Round a plan to labels of admissible sizes, starting from its potential and argmax labels.

    A few good columns per row are listed, in one read of the matrix. Sinkhorn iterations at a growing sharpness bring
    the prices on the lists near those of the rounded problem; then the rows of least margin leave the clusters that are
    still too full along shortest paths between clusters (`Rounding`). One more read gives the gap to the bound of the
    dual linear program, and columns that the lists lack, until it is small. The result depends on neither threads nor
    luck.

    Args:
        problem: the logits, lambda, shares, threads; its count of passes goes on.
        labels: int32 [N] argmax of the plan; rows at -1 take no part. With rows spread over ranks those of this rank,
            which gathers labels and lists of all of them.
        potential: [K] nats, for lambda * logits.
        dead: bool [K]: clusters that no row can go to; the others share the images in proportion.

    Source: Jonker and Volgenant (1987), A shortest augmenting path algorithm, for transport instead of assignment.
    """
    own = problem.own
    (labels,) = problem.shard.joined("labels", [labels])
    active = labels >= 0
    total = int(active.sum())
    shares = np.where(dead, 0.0, problem.target)
    if not total or not shares.sum() > 0:  # no image, or none that a cluster with a share may get
        return Balanced(labels[own], potential, 0.0, 0)
    wanted = shares / shares.sum() * total
    low, high = admissible_sizes(shares / shares.sum(), total)
    rows = np.flatnonzero(active)

    def search(prices: Vector, at: Labels, count: int, **options: Any) -> Candidates:
        selected = options.get("selected")
        problem.passes += (len(labels) if selected is None else len(selected)) / len(labels)
        if selected is not None:
            options["selected"] = selected[(selected >= own.start) & (selected < own.stop)] - own.start
        lists = best_columns(
            problem.logits,
            prices,
            at[own],
            scale=problem.lam,
            count=count,
            tie=TIE,
            threads=problem.threads,
            first_row=own.start,
            **options,
        )
        arrays = (lists.columns, lists.values, lists.found, lists.regret)
        return Candidates(*problem.shard.joined("lists of columns", arrays))

    def rounded(lists: Candidates, prices: Vector, at: Labels, unit: float) -> tuple[Rounding, int]:
        """Labels from these lists, after Sinkhorn iterations on them; and how many images are left over."""
        prices, at = smooth_prices(
            lists,
            prices,
            wanted,
            at,
            stages=[(max(least, often / unit), iterations) for least, often, iterations in stages],
            relaxation=RELAXATION,
            tolerance=TOLERANCE,
            tie=TIE,
            threads=problem.threads,
        )
        rounding = Rounding(len(labels), total, prices, low, high, threads=problem.threads)
        rounding.add(np.arange(len(labels)), at, lists)
        return rounding, rounding.solve()

    start = potential
    window = math.inf
    bonus: Vector | None = None
    stages: tuple[tuple[float, float, int], ...] = STAGES
    sizes = np.bincount(labels[rows], minlength=len(low))
    misplaced = float(np.maximum(sizes - high, 0).sum()) / total
    counts: tuple[int, ...] = (len(low),) if labels.size * len(low) <= SMALL else COUNTS
    few = rows[:: max(1, total // SAMPLE)]
    if len(counts) > 1 and misplaced > MISPLACED:
        listed = LISTED + LISTED_MISPLACED * misplaced
        margins = search(start, labels, SAMPLE_COUNT, selected=few)
        unit = _margin(margins, start, NEARBY)
        # Where all columns are the same to most rows, lists take them in turn.
        if misplaced > FAR and unit > INDIFFERENT:
            listed = LISTED_FAR
            kinds = len(np.unique(margins.values[:, :SAME], axis=0))
            needed = int(len(low) / kinds) + COUNTS[-1]
            if kinds < DIFFERENT * len(few) and needed <= MOST:
                counts, stages = (min(needed, len(low)), len(low)), STAGES + STAGES_OF_EQUALS
            every = max(1, total // max(SAMPLE, SAMPLE_PER_CLUSTER * len(low)))
            start = _improved(problem, start, active, shares, max(1.0, SAMPLE_SHARPNESS / unit), every)
            margins = search(start, labels, SAMPLE_COUNT, selected=few, label_prices=potential)
            unit = _margin(margins, start, NEARBY)
        if stages is STAGES and unit > INDIFFERENT:
            window = _margin(margins, start, listed)
        if unit > PEAKED and window < math.inf:
            bonus = _bonus(problem, start, labels, rows, window)
    for count in counts:
        lists = search(start, labels, count, floor=-window, label_prices=potential, bonus=bonus)
        unit = _margin(_part(lists, few), start, NEARBY)
        rounding, left = rounded(lists, start, labels, unit)
        if left <= LEFT * total or count >= len(low):
            break
        window, bonus = math.inf, None

    best: Balanced | None = None
    impossible = 0
    offered = OFFERED
    for _ in range(ROUNDS):
        while left:
            more = _open(rounding, search, active, offered)
            offered *= 2
            lists, fresh = (lists, 0) if more is None else _merged(lists, *more, rounding.labels)
            if more is None or fresh == 0:
                impossible += rounding.force()
                break
            if left <= FEW_LEFT:  # not worth a new start
                at, part = more
                rounding.add(at, rounding.labels[at], part)
                left = rounding.solve()
            else:
                rounding, left = rounded(lists, rounding.prices, rounding.labels, unit)
        prices, found = rounding.prices, rounding.labels
        looked = search(prices, found, COUNTS[0], slack=SLACK)
        if impossible:
            best = Balanced(found, prices, math.inf, impossible)
            break
        sizes_part = math.fsum(prices * rounding.sizes) - least_price(prices, low, high, total)
        loss = math.fsum(looked.regret.astype(np.float64)) + max(0.0, sizes_part)
        gap = loss / (problem.lam * total)
        if best is None or gap < best.gap:
            best = Balanced(found, prices, gap, 0)
        worse = np.flatnonzero(looked.found > 0)
        if gap <= GAP_GOAL or not len(worse):
            break
        lists, _ = _merged(lists, worse, _part(looked, worse), found)
        rounding, left = rounded(lists, start, found, unit)
    assert best is not None
    return replace(best, labels=best.labels[own], images=total)


def _part(lists: Candidates, places: Longs) -> Candidates:
    return Candidates(lists.columns[places], lists.values[places], lists.found[places], lists.regret[places])


def _bonus(problem: Problem, prices: Vector, labels: Labels, rows: Longs, window: float) -> Vector:
    """What columns need beside the window to be listed by KNOWN_BY times their share of rows, as few rows tell."""
    wanted = KNOWN_BY * len(rows) / len(prices)
    few = rows[:: max(1, int(wanted / COLUMN_MARGINS))]
    problem.passes += len(few) / len(labels)
    own = problem.own
    here = few[(few >= own.start) & (few < own.stop)] - own.start
    found = column_losses(problem.logits, prices, labels[own], here, scale=problem.lam, threads=problem.threads)
    (everywhere,) = problem.shard.joined("margins of columns", [found])
    margins = np.sort(everywhere, axis=0)[COLUMN_MARGINS - 1]
    return np.maximum(np.where(np.isfinite(margins), margins, 0.0).astype(np.float64) - window, 0.0)


def _improved(
    problem: Problem, prices: Vector, active: npt.NDArray[np.bool_], shares: Vector, sharpness: float, every: int
) -> Vector:
    """Sinkhorn iterations at sharpness * lambda on every so many groups of rows."""
    weights = None if active.all() else active[problem.own].astype(np.float32)
    reference = None
    wanted = shares / shares.sum()
    for _ in range(SAMPLE_PASSES):
        sums = logits_pass(
            problem.logits,
            sharpness * prices,
            scale=sharpness * problem.lam,
            row_weights=weights,
            reference=reference,
            threads=problem.threads,
            every=every,
            first_row=problem.shard.first_row,
            rows_in_all=problem.rows,
            largest_weight=1.0,
        )
        sums = problem.shard.add(sums, prices, f"over 1/{every} of the rows, for sharper prices")
        problem.passes += 1 / every
        if not sums.weight > 0:
            return prices
        reference = sums.lse
        columns = sums.column_sums
        found = np.asarray(columns.cpu().numpy() if hasattr(columns, "cpu") else columns) / sums.weight
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.clip(np.log(wanted / found), -LARGEST_STEP, LARGEST_STEP)
        prices = prices + np.where(wanted > 0, RELAXATION / sharpness * step, 0.0)
        if float(np.abs(found - wanted).sum()) < SAMPLE_ERROR:
            break
    return prices


def _margin(lists: Candidates, prices: Vector, others: float) -> float:
    """The distance from the row's best column inside which so many other columns of a row lie; nats."""
    inside = np.arange(lists.columns.shape[1]) < lists.found[:, None]
    score = np.where(inside, lists.values + prices[lists.columns], -np.inf)
    loss = np.sort((score.max(axis=1, keepdims=True) - score)[inside])
    place = int((1.0 + others) * len(score))  # the best columns themselves lose nothing
    return max(INDIFFERENT, float(loss[place])) if place < len(loss) else math.inf


def _open(
    rounding: Rounding, search: Any, active: npt.NDArray[np.bool_], offered: int
) -> tuple[Longs, Candidates] | None:
    """Lists of the images that the clusters to which no list leads get cheapest from the closed clusters.

    Returns rows and their lists; None when nothing leads out.
    """
    closed, prices, labels = rounding.closed, rounding.prices, rounding.labels
    if closed.all():
        return None
    rows = np.flatnonzero(active & closed[labels])
    lists = search(np.where(closed, -np.inf, prices), labels, COUNTS[0], label_prices=prices, selected=rows)
    # Far fewer images than all are needed: per cluster those of the largest regret.
    found = np.flatnonzero(lists.found > 0)
    first = lists.columns[found, 0]
    order = found[np.lexsort((-lists.regret[found], first))]
    column = lists.columns[order, 0]
    begin = np.concatenate([[0], np.cumsum(np.bincount(first, minlength=len(prices)))])
    lacking = np.maximum(rounding.wanted - rounding.sizes, 0)
    cheap = np.arange(len(order)) - begin[column] < offered + OFFERED_PER_IMAGE * lacking[column]
    places = np.sort(order[cheap])
    return rows[places], _part(lists, places)


def _merged(lists: Candidates, rows: Longs, more: Candidates, labels: Labels) -> tuple[Candidates, int]:
    """Append to the lists of these rows what is new in others, which hold the rows' labels and measure from them.

    Returns the lists, and how many columns are new to their row.
    """
    columns, length = lists.columns[rows], lists.found[rows]
    inside = np.arange(columns.shape[1]) < length[:, None]
    at = ((columns == labels[rows][:, None]) & inside).argmax(axis=1)
    known = np.zeros(more.columns.shape, np.bool_)
    for k in range(columns.shape[1]):
        known |= (more.columns == columns[:, k, None]) & inside[:, k, None]
    new = (np.arange(more.columns.shape[1]) < more.found[:, None]) & ~known
    to = length[:, None] + np.cumsum(new, axis=1) - 1
    wider = max(0, int((length + new.sum(axis=1)).max(initial=0)) - columns.shape[1])
    if wider:
        pad = ((0, 0), (0, wider))
        lists = Candidates(np.pad(lists.columns, pad), np.pad(lists.values, pad), lists.found, lists.regret)
    row = np.broadcast_to(rows[:, None], new.shape)[new]
    lists.columns[row, to[new]] = more.columns[new]
    lists.values[row, to[new]] = (more.values + lists.values[rows, at][:, None])[new]
    lists.found[rows] += new.sum(axis=1).astype(np.int32)
    return lists, int(new.sum())
