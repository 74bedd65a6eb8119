"""Labels whose cluster sizes are exactly the floor or the ceiling of the wanted ones, at (nearly) no loss."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.sources import best_columns
from sela_ext.assign.ties import UnbalancedLabelsWarning
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
# When many images are misplaced, most columns would never be used: the first lists hold only those inside a window,
# set on a sample of rows so that so many columns per row lie in it; the number grows with the misplaced share.
MISPLACED = 0.01
FAR = 0.1  # a larger misplaced share needs the longer lists at once
LISTED, LISTED_MISPLACED = 0.4, 10.0
SAMPLE = 2048
PEAKED = 6.0  # nats: where the window would be wider, the plan is as good as labels, and most lists are short anyway
# Then sharper Sinkhorn iterations on the lists, (sharpness, iterations), bring the prices near those of the rounded
# problem: half of the rows are left to be moved one by one. More iterations cost more than the paths that they save.
SHARPER = ((4.0, 6),)
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
    """

    labels: Labels
    prices: Vector
    gap: float
    impossible: int


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

    The rows of least margin leave the clusters that are too full along shortest paths between clusters, on lists of a
    few good columns per row (`Rounding`); one more read of the matrix gives the gap to the bound of the dual linear
    program, and adds columns that the lists lack until it is small. The result depends on neither threads nor luck.

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
            threads=problem.threads,
            first_row=own.start,
            **options,
        )
        arrays = (lists.columns, lists.values, lists.found, lists.regret)
        return Candidates(*problem.shard.joined("lists of columns", arrays))

    window = math.inf
    smooth = True
    sizes = np.bincount(labels[rows], minlength=len(low))
    misplaced = float(np.maximum(sizes - high, 0).sum()) / total
    counts: tuple[int, ...] = (len(low),) if labels.size * len(low) <= SMALL else COUNTS
    if len(counts) > 1 and misplaced > MISPLACED:
        sample = rows[:: max(1, total // SAMPLE)]
        listed = (LISTED + LISTED_MISPLACED * misplaced) * len(sample)
        window = _window(search(potential, labels, COUNTS[0], selected=sample), labels[sample], potential, listed)
        if window > PEAKED or misplaced > FAR:
            smooth, window, counts = window <= PEAKED, math.inf, counts[1:]
    for count in counts:
        lists = search(potential, labels, count, floor=-window)
        prices, at = potential, labels
        for sharpness, iterations in SHARPER if smooth and misplaced > MISPLACED else ():
            prices, at = smooth_prices(
                lists, prices, wanted, at, sharpness=sharpness, iterations=iterations, threads=problem.threads
            )
        rounding = Rounding(len(labels), total, prices, low, high, threads=problem.threads)
        rounding.add(np.arange(len(labels)), at, lists)
        if rounding.solve() == 0 or count >= len(low):
            break
        window = math.inf

    best: Balanced | None = None
    impossible = 0
    for _ in range(ROUNDS):
        left = rounding.solve()
        while left:
            fresh = _open(rounding, search, active)
            if fresh == 0:
                impossible += rounding.force()
                break
            left = rounding.solve()
        prices, found = rounding.prices, rounding.labels
        lists = search(prices, found, COUNTS[0], slack=SLACK)
        if impossible:
            best = Balanced(found, prices, math.inf, impossible)
            break
        sizes_part = math.fsum(prices * rounding.sizes) - least_price(prices, low, high, total)
        loss = math.fsum(lists.regret.astype(np.float64)) + max(0.0, sizes_part)
        gap = loss / (problem.lam * total)
        if best is None or gap < best.gap:
            best = Balanced(found, prices, gap, 0)
        worse = np.flatnonzero(lists.found > 0)
        if gap <= GAP_GOAL or not len(worse):
            break
        rounding.add(worse, lists.columns[worse, 0], _part(lists, worse))
    assert best is not None
    if best.impossible:
        warnings.warn(
            f"assign: {best.impossible} of {total} images had to be given clusters that are impossible for them "
            "(logits of -inf): no other labels have the wanted cluster sizes",
            UnbalancedLabelsWarning,
            stacklevel=4,
        )
    return replace(best, labels=best.labels[own])


def _part(lists: Candidates, places: Longs) -> Candidates:
    return Candidates(lists.columns[places], lists.values[places], lists.found[places], lists.regret[places])


def _window(lists: Candidates, labels: Labels, prices: Vector, listed: float) -> float:
    """The loss inside which so many columns of these lists lie, labels not counted; nats."""
    inside = np.arange(lists.columns.shape[1]) < lists.found[:, None]
    others = inside & (lists.columns != labels[:, None])
    loss = prices[labels][:, None] - (lists.values + prices[lists.columns])  # values are relative to the label's
    losses = np.sort(loss[others])
    place = int(listed)
    return max(0.0, float(losses[place])) if place < len(losses) else math.inf


def _open(rounding: Rounding, search: Any, active: npt.NDArray[np.bool_]) -> int:
    """Offer all rows of closed clusters the best columns outside.

    Returns how many columns are new to a row; 0 when nothing leads out.
    """
    closed, prices, labels = rounding.closed, rounding.prices, rounding.labels
    if closed.all():
        return 0
    rows = np.flatnonzero(active & closed[labels])
    outside = np.where(closed, -np.inf, prices)
    lists = search(outside, labels, COUNTS[0], label_prices=prices, selected=rows)
    return rounding.add(rows, labels[rows], lists)
