"""Twins of the candidate search (torch) and of the transport problem behind balanced labels (scipy)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sela_ext.errors import OptionError
from sela_ext.kernels.rounding import Candidates, check_bonus, check_search

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

ENTRIES_AT_ONCE = 1 << 24


def find_candidates(
    logits: Any,
    prices: Any,
    labels: Any,
    *,
    scale: float = 1.0,
    count: int = 16,
    label_prices: Any = None,
    slack: float = -math.inf,
    floor: float = -math.inf,
    bonus: Any = None,
    tie: float = 0.0,
    selected: Any = None,
    threads: int = 0,
    isa: str = "",
    first_row: int = 0,
) -> Candidates:
    """The same as `sela_ext.kernels.find_candidates`, in torch, in float64, on the device of the logits.

    Lists hold exactly the `count` best of the good columns, beside the label. `threads` and `isa` change nothing.

    Args:
        logits: [N, K].
        prices: [K] nats, -inf leaves a column out.
        labels: int32 [N], -1 leaves a row out.
        scale: lambda > 0.
        count: columns per list.
        label_prices: [K] nats or None.
        slack: rows with a larger regret get a list.
        floor: columns of at least the best score + floor are good.
        bonus: [K] or None: added to the scores when columns are compared for the list.
        tie: nats: columns so little below the best equal it.
        selected: int64 [n] or None.
        threads: unused.
        isa: unused.
        first_row: number of the first row in the matrix that the rows are a part of.

    Returns:
        Candidates, numpy.
    """
    name, scale, price, own, label, chosen, count = check_search(
        logits, prices, label_prices, labels, scale, count, selected
    )
    rows, cols = (int(n) for n in logits.shape)
    if name != "float64":
        scale = float(np.float32(scale))
    extra = None if bonus is None else torch.from_numpy(check_bonus(bonus, cols))
    index = np.arange(rows) if chosen is None else chosen
    n, width = len(index), 2 * count + 2
    lists = Candidates(
        np.zeros((n, width), np.int32), np.zeros((n, width), np.float32), np.zeros(n, np.int32), np.zeros(n, np.float32)
    )
    step = max(1, ENTRIES_AT_ONCE // cols)
    for first in range(0, n, step):
        places = first + np.flatnonzero(label[index[first : first + step]] >= 0)
        if not len(places):
            continue
        part = (
            logits[index[places]]
            if isinstance(logits, np.ndarray)
            else logits.detach()[torch.from_numpy(index[places]).to(logits.device)]
        )
        x = torch.as_tensor(part).double()
        device = x.device
        mine = torch.from_numpy(label[index[places]]).long().to(device)
        base = scale * x.gather(1, mine[:, None])
        possible = torch.isfinite(base)
        value = scale * x - torch.where(possible, base, 0.0)
        score = value + (torch.from_numpy(price).to(device) - torch.from_numpy(own).to(device)[mine][:, None])
        best, at = score.max(1)
        has_any = best > -math.inf
        regret = torch.where(has_any, best - torch.where(possible[:, 0], 0.0, -math.inf), -math.inf)
        lists.regret[places] = regret.float().cpu().numpy()
        wanted = has_any & (regret > slack)
        if extra is not None:
            score = score + extra.to(device)
        good = (score >= (best + floor)[:, None]) & (score > -math.inf)
        if tie > 0:
            top_score = score.amax(1, keepdim=True)
            score = torch.where(score >= top_score - tie, top_score, score)
        # Best first; of equals, those that follow `start`, cyclically: a stable sort of the turned row.
        start = torch.from_numpy((first_row + index[places]) * count % cols).to(device)
        turned = (start[:, None] + torch.arange(cols, device=device)) % cols
        order = torch.where(good, score, -math.inf).gather(1, turned).argsort(dim=1, descending=True, stable=True)
        top = turned.gather(1, order[:, :count])
        listed = good.gather(1, top)
        for k in torch.nonzero(wanted)[:, 0].tolist():
            others = sorted(int(c) for c, is_in in zip(top[k].tolist(), listed[k].tolist(), strict=True) if is_in)
            head = int(at[k]) if bool(good[k, at[k]]) else int(mine[k])
            columns = [head, *(c for c in others if c != head)]
            if int(mine[k]) not in columns:
                columns.append(int(mine[k]))
            lists.columns[places[k], : len(columns)] = columns
            lists.values[places[k], : len(columns)] = value[k, columns].float().cpu().numpy()
            lists.found[places[k]] = len(columns)
    return lists


def column_margins(
    logits: Any,
    prices: Any,
    labels: Any,
    *,
    scale: float = 1.0,
    selected: Any = None,
    threads: int = 0,
    isa: str = "",
) -> npt.NDArray[np.float32]:
    """The same as `sela_ext.kernels.column_margins`, in torch, in float64; `threads` and `isa` change nothing.

    Args:
        logits: [N, K].
        prices: [K] nats.
        labels: int32 [N], -1 leaves a row out.
        scale: lambda > 0.
        selected: int64 [n] or None.
        threads: unused.
        isa: unused.

    Returns:
        float32 [4, K].
    """
    name, scale, price, _, label, chosen, _ = check_search(
        logits, prices, np.zeros_like(prices), labels, scale, 1, selected
    )
    if name != "float64":
        scale = float(np.float32(scale))
    cols = int(logits.shape[1])
    index = np.arange(len(label)) if chosen is None else chosen
    index = index[label[index] >= 0]
    smallest: Any = torch.full((4, cols), torch.inf, dtype=torch.float64)
    step = max(1, ENTRIES_AT_ONCE // cols)
    for first in range(0, len(index), step):
        places = index[first : first + step]
        part = (
            logits[places]
            if isinstance(logits, np.ndarray)
            else logits.detach()[torch.from_numpy(places).to(logits.device)]
        )
        score = scale * torch.as_tensor(part).double() + torch.from_numpy(price).to(getattr(part, "device", "cpu"))
        loss = score.amax(1, keepdim=True) - score
        loss = torch.where(loss > 0, loss, torch.inf)
        smallest = torch.cat([smallest.to(loss.device), loss]).topk(4, dim=0, largest=False).values
    margins: npt.NDArray[np.float32] = smallest.sort(0).values.float().cpu().numpy()
    return margins


def smooth_prices(
    lists: Candidates,
    prices: Any,
    wanted: Any,
    labels: Any,
    *,
    stages: Sequence[tuple[float, int]],
    relaxation: float = 1.0,
    tolerance: float = 0.0,
    tie: float = 0.0,
    threads: int = 0,
    isa: str = "",
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """The same as `sela_ext.kernels.smooth_prices`, in torch and in float64; `threads` changes nothing.

    Args:
        lists: of n rows.
        prices: [K] nats.
        wanted: [K] sizes.
        labels: int32 [n].
        stages: pairs of sharpness and iterations.
        relaxation: length of a step.
        tolerance: of the sizes, ends a stage.
        tie: nats.
        threads: unused.
        isa: unused.

    Returns:
        New prices [K] and labels [n].
    """
    columns = torch.from_numpy(lists.columns).long()
    outside = torch.arange(columns.shape[1]) >= torch.from_numpy(lists.found)[:, None]
    p, sizes = torch.as_tensor(prices).double().clone(), torch.as_tensor(wanted).double()
    values = torch.from_numpy(lists.values).double()
    listed = torch.from_numpy(lists.found > 0)

    def scores() -> torch.Tensor:
        return (values + p[columns]).masked_fill(outside, -torch.inf)[listed]

    for sharpness, iterations in stages:
        begin = scores()
        far = begin < begin.amax(1, keepdim=True) - 20.0 / sharpness
        for _ in range(iterations):
            q = (sharpness * scores()).masked_fill(far, -torch.inf).softmax(1)
            sums = torch.zeros_like(p).index_add(0, columns[listed].flatten(), q.flatten())
            step = relaxation * (sizes.log() - sums.log()).clamp(-3.0, 3.0) / sharpness
            p = torch.where(sizes > 0, p + step, p)
            if float((sums - sizes)[sizes > 0].abs().sum()) <= tolerance * float(sizes.sum()):
                break
    found = np.asarray(labels, np.int32).copy()
    final = scores()
    ties = (final >= final.amax(1, keepdim=True) - tie) & ~outside[listed]
    rows = np.flatnonzero(listed.numpy())
    first = torch.where(final == final.amax(1, keepdim=True), columns[listed], len(p)).amin(1).numpy()
    found[rows] = first
    single = (ties.sum(1) == 1).numpy()
    lacking = sizes.numpy() - np.bincount(first[single], minlength=len(p))
    for place in np.flatnonzero(~single):
        row = rows[place]
        best = found[row]
        for column in lists.columns[row, : columns.shape[1]][ties[place].numpy()]:
            if (lacking[column], -column) > (lacking[best], -best):
                best = column
        found[row] = best
        lacking[best] -= 1
    return p.numpy(), found


def best_labels(scores: Any, low: Any, high: Any) -> npt.NDArray[np.int64]:
    """Labels [N] of the largest total score with low[k] .. high[k] images in cluster k; what `Rounding` solves.

    By scipy's dense assignment of images to places: small problems only.

    Args:
        scores: [N, K] finite.
        low: int [K], sum at most N.
        high: int [K], sum at least N.

    Raises:
        OptionError: no sizes sum to N.
    """
    from scipy.optimize import linear_sum_assignment

    values = np.asarray(scores, np.float64)
    smallest, largest = np.asarray(low, np.int64), np.asarray(high, np.int64)
    if not smallest.sum() <= len(values) <= largest.sum():
        raise OptionError(f"low, high: expected sums around {len(values)}, found {smallest.sum()} and {largest.sum()}")
    clusters = np.arange(values.shape[1])
    forced = np.repeat(clusters, smallest)
    free = np.repeat(clusters, largest - smallest)
    bonus = 1.0 + 2.0 * float(values.max() - values.min())  # more than any exchange can gain: forced places fill first
    rows, places = linear_sum_assignment(
        np.concatenate([values[:, forced] + bonus, values[:, free]], axis=1), maximize=True
    )
    labels = np.empty(len(values), np.int64)
    labels[rows] = np.concatenate([forced, free])[places]
    return labels
