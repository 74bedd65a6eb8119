"""Twins of the candidate search (torch) and of the transport problem behind balanced labels (scipy)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sela_ext.errors import OptionError
from sela_ext.kernels.rounding import Candidates, check_search

if TYPE_CHECKING:
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
        floor: columns of at least the label's score + floor are good.
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
        good = (score >= torch.where(possible, floor, -math.inf)) & (score > -math.inf)
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


def smooth_prices(
    lists: Candidates,
    prices: Any,
    wanted: Any,
    labels: Any,
    *,
    sharpness: float,
    iterations: int,
    threads: int = 0,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """The same as `sela_ext.kernels.smooth_prices`, in torch and in float64; `threads` changes nothing.

    Args:
        lists: of n rows.
        prices: [K] nats.
        wanted: [K] sizes.
        labels: int32 [n].
        sharpness: > 0.
        iterations: >= 0.
        threads: unused.

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

    for _ in range(iterations):
        q = (sharpness * scores()).softmax(1)
        sums = torch.zeros_like(p).index_add(0, columns[listed].flatten(), q.flatten())
        step = (sizes.log() - sums.log()).clamp(-3.0, 3.0) / sharpness
        p = torch.where(sizes > 0, p + step, p)
    found = np.asarray(labels, np.int32).copy()
    ties = (scores() == scores().amax(1, keepdim=True)) & ~outside[listed]
    found[listed.numpy()] = torch.where(ties, columns[listed], len(p)).amin(1).numpy()
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
