"""`verify`: an independent certificate for labels and potentials, in float64, without the compiled kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.balance import admissible_sizes, least_price
from sela_ext.assign.marginals import cluster_shares
from sela_ext.assign.result import Assignment
from sela_ext.assign.sources import on_cuda, row_blocks
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels.sinkhorn import check_logits, check_vector, check_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    Vector = npt.NDArray[np.float64]

ENTRIES_AT_ONCE = 1 << 20
QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Certificate:
    """What `verify` found; everything in float64 and from the logits themselves. None: nothing was given to judge.

    Attributes:
        rows: N.
        clusters: K.
        masked: rows with NaN, +inf or nothing but -inf.
        error: sum_k |column share_k - b_k| of the plan at the potential, 0 .. 2: the true L1 error.
        objective: sum_k b_k g_k - sum_i a_i lse_i, nats per image; the solution has the largest.
        duality_gap: the objective is at most this far below the largest one, nats per image: the cost of the plan,
            mended to have the wanted marginals, minus the objective. inf when mending reaches logits of -inf.
        column_shares: float64 [K] column sums of the plan, sum 1.
        sizes: int64 [K] labelled rows of positive weight per cluster.
        misplaced: share of them that would have to move for the wanted sizes, 0 .. 1; rounding to whole images is free.
        exact: whether every size is the floor or the ceiling of its share.
        disagreements: labelled rows whose label scores less than another cluster, at the potential.
        margin: float64 [N], score of the label minus that of the best other cluster, nats (lambda * logits); negative
            where they disagree, NaN for rows without a label, inf where no other cluster is possible.
        margin_quantiles: quantiles of the finite margins.
        wrongly_unlabelled: rows that could have a label and have none.
        wrongly_labelled: masked rows with a label.
        impossible: labels whose logit is -inf.
        label_value: mean logit at the label, over labelled rows of positive weight.
        label_gap: bound of the dual linear program, at the prices or else the potential, minus label_value: labels of
            admissible sizes can be better by at most this, nats per image (of logits). Labels whose sizes are not
            admissible may have a negative one.
    """

    rows: int
    clusters: int
    masked: int
    error: float | None
    objective: float | None
    duality_gap: float | None
    column_shares: Vector | None
    sizes: npt.NDArray[np.int64] | None
    misplaced: float | None
    exact: bool | None
    disagreements: int | None
    margin: Vector | None
    margin_quantiles: dict[float, float] | None
    wrongly_unlabelled: int | None
    wrongly_labelled: int | None
    impossible: int | None
    label_value: float | None
    label_gap: float | None

    def faults(self, tol: float = 1e-4, *, balance: str = "argmax") -> list[str]:
        """What contradicts a good solution, a line each; an empty list certifies it.

        Args:
            tol: largest L1 error.
            balance: "argmax": labels must agree with the potential up to 1 in 10,000 rows, which rounding may turn;
                "exact": they must have exact sizes instead.
        """
        faults = []
        if self.error is not None and not self.error <= tol:
            faults.append(f"the L1 error of the cluster shares is {self.error:.3g}, above {tol:g}")
        if self.disagreements is not None and balance == "argmax" and self.disagreements > 1e-4 * self.rows:
            faults.append(f"{self.disagreements} of {self.rows} labels are not the best cluster at the potential")
        if self.exact is not None and balance == "exact" and not self.exact:
            faults.append(f"the cluster sizes are not exact: {self.misplaced:.2%} of the images are misplaced")
        if self.wrongly_labelled:
            faults.append(f"{self.wrongly_labelled} rows with NaN, +inf or only -inf have a label")
        if self.wrongly_unlabelled:
            faults.append(f"{self.wrongly_unlabelled} rows that could have a label have none")
        if self.impossible:
            faults.append(f"{self.impossible} labels are impossible, their logits are -inf")
        return faults

    def as_dict(self) -> dict[str, Any]:
        """Numbers only, without the arrays; what JSON can hold (no inf or NaN)."""
        out: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name in ("column_shares", "sizes", "margin"):
                continue
            if isinstance(value, dict):
                value = {f"{key:g}": number for key, number in value.items()}
            out[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        if self.sizes is not None:
            out["smallest"], out["largest"] = int(self.sizes.min()), int(self.sizes.max())
        return out


def verify(
    logits: Any,
    assignment: Any = None,
    *,
    labels: Any = None,
    potential: Any = None,
    prices: Any = None,
    lam: float | None = None,
    marginals: Any = None,
    row_weights: Any = None,
) -> Certificate:
    """Judge labels and a potential by the logits alone: numpy in float64, a chunk of rows at a time.

    Uses nothing of the compiled kernels and nothing that a solver reported. Two reads of the logits. Those on a CUDA
    device are judged there, by torch in float64, and what comes to the host is the margin of every row.

    Args:
        logits: [N, K] of any float type, numpy (memory-mapped, too) or torch, or FeatureLogits: those that were solved.
        assignment: an Assignment; or give labels, a potential, or both.
        labels: int [N], -1: none.
        potential: [K], log beta for lambda * logits, nats.
        prices: [K] nats, for the label gap; default those of the assignment, or the potential.
        lam: lambda; default that of the assignment, or 25.
        marginals: [K] as in `assign`; None: equal shares.
        row_weights: [N] as in `assign`.

    Returns:
        Certificate.

    Raises:
        DataError: logits of a wrong shape or type, or without any usable row.
        OptionError: nothing to judge, or an argument of a wrong shape or value.

    Example:
        >>> import numpy as np, sela_ext
        >>> logits = np.random.default_rng(0).standard_normal((200, 5))
        >>> certificate = sela_ext.verify(logits, sela_ext.assign(logits, tol=1e-6))
        >>> certificate.error < 2e-6, certificate.disagreements, certificate.faults()
        (True, 0, [])

    Source: Altschuler, Weed and Rigollet (2017), algorithm 2, for mending a plan.
    """
    check_logits(logits)
    rows, cols = (int(n) for n in logits.shape)
    if assignment is not None and not isinstance(assignment, Assignment):
        if labels is not None:
            raise OptionError("labels: expected either an Assignment or labels, found both")
        assignment, labels = None, assignment
    if isinstance(assignment, Assignment):
        labels = assignment.labels if labels is None else labels
        prices = assignment.prices if prices is None and potential is None else prices
        potential = assignment.potential if potential is None else potential
        lam = assignment.lam if lam is None else lam
    if labels is None and potential is None:
        raise OptionError("verify: expected an Assignment, labels or a potential, found none of them")
    scale = 25.0 if lam is None else float(lam)
    if not 0 < scale < math.inf:
        raise OptionError(f"lam: expected a finite number > 0, found {lam!r}")
    given = None if labels is None else _check_labels(labels, rows, cols)
    g = None if potential is None else check_vector("potential", potential, cols)
    p = g if prices is None else check_vector("prices", prices, cols)
    weights = np.ones(rows) if row_weights is None else check_weights(row_weights, rows).astype(np.float64)
    target = cluster_shares(marginals, cols, empty=True)

    scores = np.zeros(cols) if g is None else g
    columns = np.zeros(cols)
    lse_sum, weight, best_sum, value_sum = [], [], [], []
    good = np.ones(rows, bool)
    margin = np.full(rows, np.nan)
    impossible = 0
    for part, look in _looks(logits, scale, scores, p, weights, given):
        good[part] = look.fine
        columns += look.columns
        lse_sum.append(look.lse)
        weight.append(look.weight)
        if given is not None:
            margin[np.arange(rows)[part][look.places]] = look.margins
            impossible += look.impossible
            value_sum.append(look.value)
            best_sum.append(look.best)
    total = math.fsum(weight)
    if not total > 0:
        raise DataError(f"logits: all of {rows} rows are masked or of weight 0: nothing to judge")

    error = objective = duality_gap = shares = None
    if g is not None:
        shares = columns / total
        error = float(np.abs(shares - target).sum())
        objective = float(target @ g) - math.fsum(lse_sum) / total
        duality_gap = _cost_of_mended_plan(logits, scale, g, weights * good / total, shares, target) - objective
    judged: dict[str, Any] = dict.fromkeys(
        (
            "sizes",
            "misplaced",
            "exact",
            "disagreements",
            "margin",
            "margin_quantiles",
            "wrongly_unlabelled",
            "wrongly_labelled",
            "impossible",
            "label_value",
            "label_gap",
        )
    )
    if given is not None:
        labelled = given[(given >= 0) & good & (weights > 0)]
        sizes = np.bincount(labelled, minlength=cols)
        count = len(labelled)
        low, high = admissible_sizes(target, count)
        judged |= {
            "sizes": sizes,
            "misplaced": float(np.maximum(sizes - high, 0).sum()) / max(1, count),
            "exact": bool(((low <= sizes) & (sizes <= high)).all()),
            "wrongly_unlabelled": int(((given < 0) & good).sum()),
            "wrongly_labelled": int(((given >= 0) & ~good).sum()),
            "impossible": impossible,
        }
        if count:
            judged["label_value"] = math.fsum(value_sum) / count
        if g is not None:
            finite = margin[np.isfinite(margin)]
            judged["margin"] = margin
            judged["disagreements"] = int((margin < 0).sum())
            judged["margin_quantiles"] = dict(
                zip(QUANTILES, np.quantile(finite, QUANTILES).tolist(), strict=True) if len(finite) else ()
            )
        if p is not None and count:
            bound = math.fsum(best_sum) - least_price(p, low, high, count)
            judged["label_gap"] = bound / (scale * count) - judged["label_value"]
    return Certificate(
        rows=rows,
        clusters=cols,
        masked=int((~good).sum()),
        error=error,
        objective=objective,
        duality_gap=duality_gap,
        column_shares=shares,
        **judged,
    )


def _check_labels(labels: Any, rows: int, cols: int) -> npt.NDArray[np.int64]:
    found = np.asarray(labels.detach().cpu().numpy() if hasattr(labels, "detach") else labels)
    if found.shape != (rows,) or found.dtype.kind not in "iu":
        raise OptionError(f"labels: expected {rows} integers, found {found.dtype} of shape {found.shape}")
    if rows and not -1 <= int(found.min()) <= int(found.max()) < cols:
        raise OptionError(f"labels: expected numbers in -1 .. {cols - 1}, found {found.min()} .. {found.max()}")
    return found.astype(np.int64)


@dataclass(frozen=True)
class Look:
    """What a block of rows adds to a certificate.

    Attributes:
        fine: bool [n]: rows that can have a label.
        columns: float64 [K], weighted sums of the plan's rows.
        lse: weighted sum of the rows' log-sum-exp.
        weight: sum of the weights.
        places: int [m]: labelled rows among them.
        margins: float64 [m] of these, nats.
        impossible: labels at -inf.
        value: sum of the logits at the labels of rows with a weight.
        best: sum of their best scores at the prices; 0 without prices.
    """

    fine: npt.NDArray[np.bool_]
    columns: Vector
    lse: float
    weight: float
    places: npt.NDArray[np.int64]
    margins: Vector
    impossible: int
    value: float
    best: float


def _looks(
    logits: Any, scale: float, scores: Vector, prices: Vector | None, weights: Vector, labels: Any
) -> Iterator[tuple[slice, Look]]:
    """Looks at all rows, block by block, where the logits are."""
    if on_cuda(logits):
        from sela_ext.assign.certificate_device import looks

        yield from looks(logits, scale, scores, prices, weights, labels)
        return
    for part, block in _chunks(logits):
        yield part, _look(block, scale, scores, prices, weights[part], None if labels is None else labels[part])


def _look(block: Vector, scale: float, scores: Vector, prices: Vector | None, weights: Vector, labels: Any) -> Look:
    fine = ~np.isnan(block).any(axis=1) & ~(block == np.inf).any(axis=1) & (block > -np.inf).any(axis=1)
    where = np.flatnonzero(fine)
    block, w = block[where], weights[where]
    t = scale * block + scores
    plan, lse = _softmax(t)
    nothing = np.zeros(0)
    sums: dict[str, Any] = {"columns": w @ plan, "lse": float(w @ lse), "weight": float(w.sum())}
    if labels is None:
        return Look(fine, **sums, places=nothing.astype(np.int64), margins=nothing, impossible=0, value=0.0, best=0.0)
    own = labels[where]
    places = np.flatnonzero(own >= 0)
    own = own[places]
    mine = t[places, own]
    others = t[places]
    others[np.arange(len(places)), own] = -np.inf
    with np.errstate(invalid="ignore"):
        margins = mine - others.max(axis=1, initial=-np.inf)
    counted = w[places] > 0
    logit = block[places, own]
    return Look(
        fine,
        **sums,
        places=where[places],
        margins=margins,
        impossible=int((logit == -np.inf).sum()),
        value=float(logit[counted].sum()),
        best=0.0
        if prices is None
        else float((scale * block[places[counted]] + prices).max(axis=1, initial=-np.inf).sum()),
    )


def _chunks(logits: Any) -> Iterator[tuple[slice, Vector]]:
    """Consecutive rows in float64, numpy."""
    return row_blocks(logits, max(1, ENTRIES_AT_ONCE // int(logits.shape[1])))


def _softmax(t: Vector) -> tuple[Vector, Vector]:
    """Softmax and log-sum-exp of rows without NaN and +inf, of which one entry at least is finite."""
    top = t.max(axis=1, keepdims=True)
    plan = np.exp(t - top)
    sums = plan.sum(axis=1, keepdims=True)
    plan /= sums
    return plan, (np.log(sums) + top)[:, 0]


def _cost_of_mended_plan(logits: Any, scale: float, g: Vector, mass: Vector, shares: Vector, target: Vector) -> float:
    """Cost sum_ij P_ij (log(P_ij / a_i) - lambda L_ij) of a plan P with row sums a and column sums b near that of g.

    Over-full columns are scaled down, and what the rows then lack is dealt out to the columns that lack mass.
    """
    keep = np.minimum(1.0, np.divide(target, shares, out=np.ones_like(target), where=shares > 0))
    lacking = np.maximum(target - shares * keep, 0.0)
    lacking /= max(float(lacking.sum()), 1e-300)
    if on_cuda(logits):
        from sela_ext.assign.certificate_device import mended_costs

        return math.fsum(mended_costs(logits, scale, g, mass, keep, lacking))
    cost = []
    for part, block in _chunks(logits):
        a = mass[part]
        used = a > 0
        block, a = scale * block[used], a[used]
        if not len(block):
            continue
        plan, _ = _softmax(block + g)
        plan *= keep
        plan += np.maximum(1.0 - plan.sum(axis=1, keepdims=True), 0.0) * lacking  # relative to a_i
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = plan * (np.log(plan) - block)
        terms[plan == 0] = 0.0
        cost.append(float(a @ terms.sum(axis=1)))
    return math.fsum(cost)
