"""`assign`: from logits to balanced labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sela_ext.assign.anderson import solve_anderson
from sela_ext.assign.balance import balance_exactly
from sela_ext.assign.marginals import cluster_shares
from sela_ext.assign.newton import choose_method, solve_newton
from sela_ext.assign.official import solve_official
from sela_ext.assign.problem import Problem
from sela_ext.assign.relaxed import RelaxedProblem, relaxed_problem, solve_bounded
from sela_ext.assign.result import Assignment
from sela_ext.assign.shards import RankShard, Shard
from sela_ext.assign.sinkhorn import solve_sinkhorn
from sela_ext.assign.ties import UNBALANCED, break_ties, misplaced, warn_if_unbalanced
from sela_ext.errors import OptionError
from sela_ext.kernels.sinkhorn import backend_of, check_logits, check_vector, check_weights

METHODS = ("auto", "newton", "anderson", "sinkhorn")
MAX_PASSES = {"l1": 1000, "official": 10_000}


def assign(
    logits: Any,
    *,
    lam: float = 25.0,
    tol: float = 1e-4,
    max_passes: int | None = None,
    method: str = "auto",
    storage: str = "auto",
    marginals: Any = None,
    relax: Any = None,
    size_bounds: Any = None,
    row_weights: Any = None,
    start: Any = None,
    balance: str = "argmax",
    stop: str = "l1",
    group: Any = None,
    threads: int = 0,
) -> Assignment:
    """Balanced labels: the optimal-transport plan between images and clusters, and its argmax per image.

    Finds column scalings beta such that diag(alpha) exp(lam * logits) diag(beta) has row sums a and column sums b.
    In torch, one iteration: ``q = softmax(lam * logits + g, 1); g += log(b) - log(q.mean(0))``. It always returns:
    look at `converged` and `error`. If it does not converge, raise max_passes or tol, or lower lam. A cluster whose
    logits are all -inf receives nothing, with a warning and converged=False; the others share the images.

    A row that holds NaN or +inf, or only -inf, is masked: label -1, left out of everything, counted in `masked`.
    Rows that are exactly indifferent between clusters (all rows equal, say) are dealt out evenly when the clusters
    would be far from balanced otherwise; `ties` counts them. Labels that stay far from balanced raise an
    UnbalancedLabelsWarning.

    Args:
        logits: [N, K] float32, float16, bfloat16 or float64; numpy (memory-mapped, too) or torch, CPU or CUDA. Any
            row shift is allowed: log-probabilities, raw logits, logits without bias give the same labels.
        lam: lambda > 0, the inverse of the entropy's weight. float32 unless the logits are float64.
        tol: stop="l1" ends at sum_k |column share_k - b_k| <= tol, 0 .. 2, measured on the logits themselves.
            0 runs max_passes. float32 arithmetic reaches about 1e-6.
        max_passes: at most so many reads of the logits; default 1000, for stop="official" 10,000.
        method: "newton" (few reads: Newton's method on the entries that count, for peaked logits on the CPU),
            "anderson" (accelerated Sinkhorn, for smooth ones), "sinkhorn" (plain), or "auto": newton or anderson, as
            the number of entries per row says; `reason` in the result says why.
        storage: "auto" or "float32": the logits are read as they are.
        marginals: [K] positive sizes or shares of the clusters; None: equal.
        relax: rho > 0: the clusters' shares need not be met, but their divergence costs lambda rho KL(shares | b): a
            large rho is strict, a small one lets the images choose. Then `error` is the distance to the shares that
            the optimum has at this potential, and the potential has no free constant.
        size_bounds: (low, high), numbers or [K], in images (units of row weight): sizes of the plan's columns are only
            kept within these; b is what they tend to where no bound is met. Not together with relax.
        row_weights: [N] >= 0; 0 takes an image out of the balance, it is labelled all the same. None: ones.
        start: a potential [K] (nats, for lam * logits) or an Assignment to start from.
        balance: "argmax", the label of an image is its largest entry in the plan; or "exact": every cluster gets the
            floor or the ceiling of its share of the images, at the least loss (see `gap`). Counted are the images that
            are neither masked nor of weight 0, each as one; images of weight 0 keep their argmax label. Clusters at
            -inf in every row get nothing, and the others their share. An image gets a cluster at -inf only when no
            other labels have these sizes, with an UnbalancedLabelsWarning.
        stop: "l1", or "official": the rule of the authors' code, in float64 from the log-softmax (N x K float64
            numbers in memory; plain Sinkhorn, no start, tol unused).
        group: a torch.distributed process group, or True for the default one: the logits and row_weights are the rows
            of this rank, consecutive parts of the matrix in the order of the ranks, cut by `shard_rows` (unevenly, too,
            but at multiples of 128 rows; a shard may be empty). All ranks call with the same options. Labels are those
            of this rank's rows; everything else is that of the whole matrix, with the bits that one process would get.
            An error on one rank raises on all of them. See docs/scaling.md. Not with stop="official".
        threads: CPU threads, 0 for all. The labels do not depend on it.

    Returns:
        Assignment.

    Raises:
        OptionError: an unknown or unavailable option, or a value out of range.
        DataError: logits of a wrong shape or type, or without any usable row.
        DistributedError: another rank of the group failed, died, or got out of step.

    Example:
        >>> import numpy as np, sela_ext
        >>> logits = np.array([[2.0, 1.9], [2.0, 1.0], [2.0, 1.8], [2.0, 0.0]], np.float32)
        >>> a = sela_ext.assign(logits)
        >>> a.labels.tolist(), a.sizes.tolist(), a.converged
        ([1, 0, 1, 0], [2, 2], True)

    Source: SeLa, section 3.2, equations 3-7.
    """
    with Shard() if group is None else RankShard(group) as shard:
        return _assign(
            logits,
            lam,
            tol,
            max_passes,
            method,
            storage,
            marginals,
            relax,
            size_bounds,
            row_weights,
            start,
            balance,
            stop,
            threads,
            shard,
        )


def _assign(
    logits: Any,
    lam: float,
    tol: float,
    max_passes: int | None,
    method: str,
    storage: str,
    marginals: Any,
    relax: Any,
    size_bounds: Any,
    row_weights: Any,
    start: Any,
    balance: str,
    stop: str,
    threads: int,
    shard: Shard,
) -> Assignment:
    name = check_logits(logits)
    rows, cols = (int(n) for n in logits.shape)
    _check_choice("method", method, METHODS)
    _check_choice("stop", stop, ("l1", "official"))
    _check_choice("balance", balance, ("argmax", "exact"))
    _check_choice("storage", storage, ("auto", "float32"), later=("float16", "bfloat16", "fixed16"))
    if stop == "official" and isinstance(shard, RankShard):
        raise OptionError('group: expected stop "l1" with it, found "official", a rule for one process')
    relaxed = relax is not None or size_bounds is not None
    if relaxed and (stop == "official" or balance == "exact"):
        raise OptionError('relax, size_bounds: expected stop "l1" and balance "argmax" with them')
    if relaxed and method == "newton":
        raise OptionError('relax, size_bounds: expected method "auto", "anderson" or "sinkhorn" with them')
    lam = _number("lam", lam, 1e-6, 1e6)
    tol = _number("tol", tol, 0.0, 2.0)
    if max_passes is None:
        max_passes = MAX_PASSES[stop]
    if isinstance(max_passes, bool) or not isinstance(max_passes, (int, np.integer)) or not 1 <= max_passes <= 10**9:
        raise OptionError(f"max_passes: expected an integer in 1 .. 1e9, found {max_passes!r}")
    target = cluster_shares(marginals, cols)
    weights = None if row_weights is None else check_weights(row_weights, rows)
    shard.begin(
        logits,
        weights,
        {
            "lam": lam,
            "tol": tol,
            "max_passes": int(max_passes),
            "method": method,
            "storage": storage,
            "marginals": target,
            "relax": relax,
            "size_bounds": size_bounds,
            "start": start,
            "balance": balance,
            "stop": stop,
        },
    )

    problem = Problem(logits, lam, target, weights, threads, int(max_passes), tol, shard)
    reason = f'method="{method}" was asked for'
    if relaxed:
        problem = relaxed_problem(problem, relax, size_bounds)
        start = np.log(target) if start is None else start
    if stop == "official":
        if method not in ("auto", "sinkhorn") or start is not None:
            raise OptionError('stop="official": expected method "auto" or "sinkhorn" and no start; use stop="l1"')
        if max_passes < 2:
            raise OptionError('stop="official": expected max_passes >= 2 (one read makes the log-softmax), found 1')
        method, reason = "sinkhorn", 'stop="official" is a rule for plain Sinkhorn iterations'
        final, converged = solve_official(problem)
    else:
        if method == "newton" and problem.on_cuda:
            raise OptionError(
                'method: "newton" needs logits on the CPU, found CUDA; use "anderson" or "auto", or pass logits.cpu()'
            )
        potential, first = _start_potential(start, cols), None
        if method == "auto" and relaxed:
            method, reason = "anderson", "newton does not take relax or size_bounds"
        elif method == "auto":
            method, reason, first = choose_method(problem, potential, warm=start is not None)
        if method == "newton":
            final, given_up = solve_newton(problem, potential, warm=start is not None, first=first)
            reason += given_up
        elif method == "anderson" and isinstance(problem, RelaxedProblem) and problem.bounds is not None:
            final = solve_bounded(problem, potential)
        elif method == "anderson":
            final = solve_anderson(problem, potential, first)
        else:
            final = solve_sinkhorn(problem, potential)
        converged = final.error <= tol
    if final.sums.labels is None:
        final = problem.evaluate(final.potential, labels=True)
    if relaxed:  # the clusters' shares are what came out
        target = np.maximum(final.shares, 1e-300)

    labels = _numpy(final.sums.labels)
    sizes = shard.total("sizes", np.bincount(labels[labels >= 0], minlength=cols))
    ties = 0
    balanced = None
    if balance == "exact":
        part = labels if weights is None else np.where(weights > 0, labels, -1).astype(np.int32)
        balanced = balance_exactly(problem, part, final.potential, final.log_shares == -np.inf)
        labels = np.where(part >= 0, balanced.labels, labels).astype(np.int32)
        sizes = shard.total("sizes", np.bincount(labels[labels >= 0], minlength=cols))
    elif misplaced(sizes, target) > UNBALANCED:
        labels = labels.copy()
        ties = break_ties(problem.logits, labels, final.potential, lam, target, shard)
        sizes = shard.total("sizes", np.bincount(labels[labels >= 0], minlength=cols))
    warn_if_unbalanced(sizes, np.flatnonzero(final.log_shares == -np.inf), target, converged)

    return Assignment(
        labels=_like(logits, labels),
        potential=_like(logits, problem.centred(final.potential) if stop == "official" else final.potential),
        error=final.error,
        converged=converged,
        passes=problem.passes,
        sizes=_like(logits, sizes.astype(np.int64)),
        objective=final.objective,
        seconds=problem.seconds,
        backend=backend_of(problem.logits),
        method=method,
        reason=reason,
        history=tuple(problem.history),
        masked=final.sums.masked,
        ties=ties,
        lam=float(np.float32(lam)) if name != "float64" and stop != "official" else lam,
        gap=None if balanced is None else balanced.gap,
        prices=None if balanced is None else _like(logits, balanced.prices),
    )


def _check_choice(option: str, value: Any, choices: tuple[str, ...], later: tuple[str, ...] = ()) -> None:
    if value in choices:
        return
    names = ", ".join(f'"{c}"' for c in choices)
    if value in later:
        raise OptionError(f'{option}: "{value}" is not available in this version; available: {names}')
    raise OptionError(f"{option}: expected one of {names}, found {value!r}")


def _number(option: str, value: Any, low: float, high: float) -> float:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise OptionError(f"{option}: expected a number in {low:g} .. {high:g}, found {value!r}")
    return float(value)


def _start_potential(start: Any, clusters: int) -> Any:
    if start is None:
        return np.zeros(clusters)
    return check_vector("start", start.potential if isinstance(start, Assignment) else start, clusters)


def _numpy(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _like(logits: Any, value: Any) -> Any:
    """A numpy result in the kind, and on the device, of the logits."""
    if not hasattr(logits, "detach"):
        return value
    import torch

    return torch.from_numpy(np.ascontiguousarray(value)).to(logits.device)
