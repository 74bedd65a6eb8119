"""The candidate search behind exactly balanced labels, and the transport problem that is solved on its lists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext import _core
from sela_ext.errors import OptionError
from sela_ext.kernels.device import cuda_place, is_tensor, usable
from sela_ext.kernels.logits import StoredLogits, check_logits, rows_of
from sela_ext.kernels.sinkhorn import check_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """Lists of columns for n rows; numpy, width = 2 * count + 2.

    Attributes:
        columns: int32 [n, width]: best column first, the others ascending, the label last if it is not among them.
        values: float32 [n, width]: scale * (logit of the column - logit of the label), nats, without prices.
        found: int32 [n]: length of each list; 0 for rows left out.
        regret: float32 [n]: best score minus the label's score, nats; 0 for rows left out, -inf without any column.
    """

    columns: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    found: npt.NDArray[np.int32]
    regret: npt.NDArray[np.float32]


def check_search(
    logits: Any, prices: Any, label_prices: Any, labels: Any, scale: float, count: int, selected: Any
) -> tuple[str, float, Vector, Vector, npt.NDArray[np.int32], npt.NDArray[np.int64] | None, int]:
    """Check the arguments of `find_candidates`; return them as used, after the name of the logits' type."""
    name = check_logits(logits)
    if isinstance(logits, StoredLogits):
        raise OptionError("logits: expected logits in floating point, found StoredLogits")
    rows, cols = (int(n) for n in logits.shape)
    scale = check_scale(scale, name)
    price = np.ascontiguousarray(prices, np.float64)
    if price.shape != (cols,) or np.isnan(price).any() or (price == np.inf).any():
        raise OptionError(f"prices: expected {cols} numbers, finite or -inf, found shape {price.shape}")
    own = price if label_prices is None else np.ascontiguousarray(label_prices, np.float64)
    if own.shape != (cols,) or not np.isfinite(own).all():
        raise OptionError(f"label_prices: expected {cols} finite numbers, found shape {own.shape}")
    label = np.ascontiguousarray(labels, np.int32)
    if label.shape != (rows,) or (rows and not -1 <= int(label.min()) <= int(label.max()) < cols):
        raise OptionError(f"labels: expected {rows} numbers in -1 .. {cols - 1}, found shape {label.shape}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OptionError(f"count: expected an integer >= 1, found {count!r}")
    chosen = None
    if selected is not None:
        chosen = np.ascontiguousarray(selected, np.int64)
        if chosen.ndim != 1 or (len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < rows):
            raise OptionError(f"selected: expected row numbers in 0 .. {rows - 1}, found shape {chosen.shape}")
    return name, scale, price, own, label, chosen, min(count, cols)


def check_bonus(bonus: Any, cols: int) -> Vector:
    """Check the bonus of `find_candidates`."""
    extra = np.ascontiguousarray(bonus, np.float64)
    if extra.shape != (cols,) or not (np.isfinite(extra).all() and (extra >= 0).all()):
        raise OptionError(f"bonus: expected {cols} finite numbers >= 0, found shape {extra.shape}")
    return extra


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
    """The best few columns of each row, by score = scale * logits + prices, and what each label loses to the best one.

    In torch: ``score.topk(count)``; up to 2 * count columns when that comes cheaper, but none is left out that scores
    more than one that is in. Of equal scores those columns come first that follow ((first_row + row) * count) % K,
    cyclically. Columns at -inf are not listed. Logits on CUDA are searched there: the lists are the CPU's, number by
    number (unless its instruction set is "generic"); on a device whose self-check failed, by torch, with lists of
    exactly the best `count`.

    Args:
        logits: [N, K] float32, float16, bfloat16 or float64, numpy or torch.
        prices: [K] nats; -inf leaves a column out.
        labels: int32 [N]; -1 leaves a row out.
        scale: lambda > 0. float32, unless the logits are float64.
        count: columns per list, beside the label.
        label_prices: [K] nats, finite: the prices that the labels' own scores are taken with; None: `prices`.
        slack: only rows with a larger regret, best score minus the label's score, get a list. Nats.
        floor: only columns that score at least the row's best score + floor are listed. Nats, <= 0.
        bonus: [K] nats, finite and >= 0: added to the scores when `floor` is asked and when the best are chosen.
        tie: nats, >= 0: where many columns score so little less than the best, they count as its equals.
        selected: int64 [n] row numbers, or None for all rows.
        threads: CPU threads, 0 for all.
        isa: CPU instruction set, "" for the one in use (for tests).
        first_row: number of the first row in the matrix that the rows are a part of.

    Returns:
        Candidates, by place in `selected`.

    Raises:
        DataError: logits of a wrong shape or type.
        OptionError: another argument of a wrong shape or value.

    Example:
        >>> import numpy as np
        >>> lists = find_candidates(np.eye(3, dtype=np.float32), np.zeros(3), np.array([0, 0, -1]), count=1)
        >>> lists.columns[:2, :2].tolist(), lists.found.tolist(), lists.regret.tolist()
        ([[0, 0], [1, 0]], [1, 2, 0], [0.0, 1.0, 0.0])
    """
    name, scale, price, own, label, chosen, count = check_search(
        logits, prices, label_prices, labels, scale, count, selected
    )
    extra = None if bonus is None else check_bonus(bonus, len(price))
    place = cuda_place(logits)
    card = None if place is None else usable(place)
    if card is not None:
        from sela_ext.kernels.rounding_device import candidates_on_device

        return candidates_on_device(
            card,
            logits,
            name,
            prices=price,
            label_prices=own,
            bonus=extra,
            labels=label,
            selected=chosen,
            scale=scale,
            count=count,
            slack=slack,
            floor=floor,
            tie=tie,
            first_row=first_row,
        )
    if is_tensor(logits) and (place is not None or logits.device.type != "cpu"):
        from sela_ext.kernels.reference.rounding import find_candidates as in_torch

        return in_torch(
            logits,
            price,
            label,
            scale=scale,
            count=count,
            label_prices=own,
            slack=slack,
            floor=floor,
            bonus=extra,
            tie=tie,
            selected=chosen,
            first_row=first_row,
        )
    return candidates_on_cpu(
        logits,
        price,
        label,
        scale=scale,
        count=count,
        label_prices=own,
        slack=slack,
        floor=floor,
        bonus=extra,
        tie=tie,
        selected=chosen,
        threads=threads,
        isa=isa,
        first_row=first_row,
    )


def candidates_on_cpu(
    logits: Any,
    prices: Vector,
    labels: npt.NDArray[np.int32],
    *,
    scale: float,
    count: int,
    label_prices: Vector,
    slack: float,
    floor: float,
    bonus: Vector | None,
    tie: float,
    selected: npt.NDArray[np.int64] | None,
    threads: int,
    isa: str = "",
    first_row: int = 0,
) -> Candidates:
    """`find_candidates` by the CPU kernels; the logits are on the host, all arguments are checked."""
    rows, cols = (int(n) for n in logits.shape)
    n = rows if selected is None else len(selected)
    lists = Candidates(
        np.zeros((n, 2 * count + 2), np.int32),
        np.zeros((n, 2 * count + 2), np.float32),
        np.empty(n, np.int32),
        np.empty(n, np.float32),
    )
    # `keep` holds whatever memory the address points into until the call is over.
    keep, address, stride = rows_of(logits)
    _core.find_candidates_cpu(
        address,
        check_logits(logits),
        rows,
        cols,
        stride,
        scale,
        prices.ctypes.data,
        label_prices.ctypes.data,
        0 if bonus is None else bonus.ctypes.data,
        labels.ctypes.data,
        0 if selected is None else selected.ctypes.data,
        n,
        count,
        slack,
        floor,
        tie,
        lists.columns.ctypes.data,
        lists.values.ctypes.data,
        lists.found.ctypes.data,
        lists.regret.ctypes.data,
        threads,
        isa,
        first_row,
    )
    del keep
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
    """How far columns are from rows that have another best column: the four smallest losses among the rows.

    In torch, with score = scale * logits + prices and loss = score.amax(1, keepdim=True) - score:
    ``loss.where(loss > 0, inf).sort(0).values[:4]``. Logits on CUDA are read there.

    Args:
        logits: [N, K] float32, float16, bfloat16 or float64, numpy or torch.
        prices: [K] nats, finite or -inf.
        labels: int32 [N]; -1 leaves a row out.
        scale: lambda > 0.
        selected: int64 [n] row numbers, or None for all rows.
        threads: CPU threads, 0 for all; the result does not depend on it.
        isa: CPU instruction set, "" for the one in use (for tests).

    Returns:
        float32 [4, K] nats, > 0, ascending; inf where fewer rows lose something finite.

    Raises:
        DataError: logits of a wrong shape or type.
        OptionError: another argument of a wrong shape or value.
    """
    name, scale, price, _, label, chosen, _ = check_search(
        logits, prices, np.zeros_like(prices), labels, scale, 1, selected
    )
    place = cuda_place(logits)
    card = None if place is None else usable(place)
    if card is not None:
        from sela_ext.kernels.rounding_device import margins_on_device

        return margins_on_device(card, logits, name, prices=price, labels=label, selected=chosen, scale=scale)
    if is_tensor(logits) and (place is not None or logits.device.type != "cpu"):
        from sela_ext.kernels.reference.rounding import column_margins as in_torch

        return in_torch(logits, price, label, scale=scale, selected=chosen)
    return margins_on_cpu(logits, price, label, scale=scale, selected=chosen, threads=threads, isa=isa)


def margins_on_cpu(
    logits: Any,
    prices: Vector,
    labels: npt.NDArray[np.int32],
    *,
    scale: float,
    selected: npt.NDArray[np.int64] | None,
    threads: int,
    isa: str = "",
) -> npt.NDArray[np.float32]:
    """`column_margins` by the CPU kernels; the logits are on the host, all arguments are checked."""
    rows, cols = (int(n) for n in logits.shape)
    keep, address, stride = rows_of(logits)
    margins = _core.column_margins_cpu(
        address,
        check_logits(logits),
        rows,
        cols,
        stride,
        scale,
        prices,
        labels,
        np.arange(rows) if selected is None else selected,
        threads,
        isa,
    )
    del keep
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
) -> tuple[Vector, npt.NDArray[np.int32]]:
    """Sharp Sinkhorn iterations on candidate lists: prices at which the best columns have nearly the wanted sizes.

    Each iteration: ``prices += relaxation / sharpness * log(wanted / softmax(sharpness * (values + prices)).sum(0))``,
    with logarithms of at most 3. Columns of which nothing is wanted keep their price. Entries that are 20 nats of the
    sharpened score below the best of their row, when a stage begins, are left out of that stage.

    Args:
        lists: of n rows.
        prices: [K] nats, where to start.
        wanted: [K] sizes >= 0.
        labels: int32 [n], kept for rows without a list.
        stages: pairs of the sharpness, > 0 (1 is the softmax of the scores themselves), and of the largest number of
            iterations, >= 0.
        relaxation: 0 .. 2, the length of a step; above 1, errors that fade slowly do so twice as fast and more.
        tolerance: a stage ends when the sizes miss the wanted ones by no more than this, sum |.| / sum wanted.
        tie: nats, >= 0; columns within this of a row's best are as good.
        threads: CPU threads, 0 for all; the result does not depend on it.
        isa: CPU instruction set, "" for the one in use (for tests).

    Returns:
        New prices [K], and labels [n]: the best column of each list at them, the lowest of equals; a row to which
        several are as good takes the one that lacks most rows, the rows in their order.
    """
    for sharpness, iterations in stages:
        if not sharpness > 0 or iterations < 0:
            raise OptionError(f"stages: expected sharpness > 0, iterations >= 0, found {sharpness}, {iterations}")
    return _core.smooth_prices(
        lists.columns,
        lists.values,
        lists.found,
        np.ascontiguousarray(wanted, np.float64),
        np.ascontiguousarray(prices, np.float64),
        np.ascontiguousarray(labels, np.int32),
        list(stages),
        relaxation,
        tolerance,
        tie,
        threads,
        isa,
    )


class Rounding:
    """Labels of admissible cluster sizes from candidate lists: successive shortest paths between clusters.

    Add the lists of all rows, call `solve`, look at `prices` and `labels`. Optimal among labels
    from the lists; a new search at the new prices shows what the lists lack. Not a pure function, since lists and
    heaps are kept from one `solve` to the next.

    Args:
        rows: N.
        total: rows that will get lists.
        prices: [K] float64, nats: the starting point, such as a potential.
        low: int64 [K] smallest sizes; sum at most total.
        high: int64 [K] largest sizes; sum at least total.
        threads: CPU threads, 0 for all; the result does not depend on it.
    """

    def __init__(self, rows: int, total: int, prices: Any, low: Any, high: Any, *, threads: int = 0) -> None:
        price = np.ascontiguousarray(prices, np.float64)
        smallest, largest = np.ascontiguousarray(low, np.int64), np.ascontiguousarray(high, np.int64)
        if not price.shape == smallest.shape == largest.shape or price.ndim != 1 or not len(price):
            raise OptionError(f"low, high: expected as many as prices, {price.shape}, found {smallest.shape}")
        if not (np.isfinite(price).all() and (smallest >= 0).all() and (smallest <= largest).all()):
            raise OptionError("prices, low, high: expected finite prices and 0 <= low <= high")
        if not int(smallest.sum()) <= total <= int(largest.sum()):
            raise OptionError(f"low, high: expected sums around {total}, found {smallest.sum()} and {largest.sum()}")
        self._core = _core.Rounding(rows, total, price, smallest, largest, threads)

    def add(self, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int32], lists: Candidates) -> int:
        """Add lists of rows, which go to these labels; both the new and the old label must be in a row's list.

        Returns how many columns are new to their row.
        """
        return self._core.add(
            np.ascontiguousarray(rows, np.int64),
            np.ascontiguousarray(labels, np.int32),
            lists.columns,
            lists.values,
            lists.found,
        )

    def solve(self) -> int:
        """Move rows until all sizes are admissible; returns how many are left over because no list leads further."""
        return self._core.solve()

    def force(self) -> int:
        """Place what is left over in clusters that lack images, whatever the logits say; returns how many."""
        return self._core.force()

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """int32 [N], -1 for rows without a list."""
        return self._core.labels()

    @property
    def prices(self) -> npt.NDArray[np.float64]:
        """float64 [K], nats: with them each label is the best of its row's list."""
        return self._core.prices()

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """int64 [K] rows per cluster."""
        return self._core.sizes()

    @property
    def wanted(self) -> npt.NDArray[np.int64]:
        """int64 [K] sizes aimed at; after a `solve` that left nothing over, equal to `sizes`."""
        return self._core.wanted()

    @property
    def closed(self) -> npt.NDArray[np.bool_]:
        """Bool [K]: clusters from which no list leads to one that lacks images, after `solve`."""
        return self._core.closed().astype(np.bool_)

    @property
    def paths(self) -> int:
        """Paths taken so far."""
        return self._core.paths()
