"""`assign`: from logits to balanced labels."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.anderson import parts_of, solve_anderson
from sela_ext.assign.balance import balance_exactly
from sela_ext.assign.marginals import cluster_shares
from sela_ext.assign.newton import choose_method, evaluate_at_end, solve_newton
from sela_ext.assign.official import solve_official
from sela_ext.assign.problem import Evaluation, Problem
from sela_ext.assign.relaxed import RelaxedProblem, relaxed_problem, solve_bounded
from sela_ext.assign.result import Assignment
from sela_ext.assign.shards import RankShard, Shard
from sela_ext.assign.sinkhorn import solve_sinkhorn
from sela_ext.assign.sources import backend_of, in_numpy, model_of
from sela_ext.assign.storage import STORAGES, choose_storage, copy_tolerance, source_of, stored_copy
from sela_ext.assign.ties import UNBALANCED, UnbalancedLabelsWarning, break_ties, misplaced, words_on_balance
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels.logits import StoredLogits
from sela_ext.kernels.sinkhorn import check_logits, check_vector, check_weights

if TYPE_CHECKING:
    from collections.abc import Callable

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
    progress: Callable[[dict[str, float]], None] | None = None,
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
        logits: [N, K] float32, float16, bfloat16 or float64; numpy or torch, CPU or CUDA; or FeatureLogits, which are
            never stored. Of arrays mapped from a file (np.load(mmap_mode="r"), torch.from_file) only the parts being
            read are resident. Any row shift is allowed: log-probabilities, raw logits, logits without bias give the
            same labels.
        lam: lambda > 0, the inverse of the entropy's weight. float32 unless the logits are float64.
        tol: stop="l1" ends at sum_k |column share_k - b_k| <= tol, 0 .. 2, measured on the logits themselves.
            0 runs max_passes. float32 arithmetic reaches about 1e-6.
        max_passes: at most so many reads of the logits, or of their copy, which takes one more to make; default 1000,
            for stop="official" 10,000.
        method: "newton" (few reads: Newton's method on the entries that count, for peaked logits),
            "anderson" (accelerated Sinkhorn, for smooth ones), "sinkhorn" (plain), or "auto": newton or anderson, as
            the number of entries per row says; `reason` in the result says why.
        storage: "float16", "bfloat16" or "fixed16" (1/64 nat of lambda * logits): the solve works on a 16-bit copy,
            each row relative to its maximum, which takes 2 bytes per entry and half the time per read. The last pass,
            and so `error` and the labels, are of the logits themselves; where the copy's rounding left too much, the
            solve goes on on them. "float32": the logits are read as they are, whatever their type. "auto": as they
            are, but for a mapped file that memory cannot hold when it can hold a fixed16 copy, and tol >= 1e-4.
            CPU only.
        marginals: [K] sizes or shares of the clusters; None: equal. A cluster of share 0 stays empty, at a potential of
            -1e37; not with relax, size_bounds or stop="official", where all must be positive.
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
        progress: called after every pass with its entry of `history`.

    Returns:
        Assignment.

    Raises:
        OptionError: an unknown or unavailable option, or a value out of range.
        DataError: logits of a wrong shape or type, without any usable row, or in a file that is cut off.
        ResourceError: the solve does not fit into memory (see `sela_ext.memory_plan`).
        DistributedError: another rank of the group failed, died, or got out of step.

    Example:
        >>> import numpy as np, sela_ext
        >>> logits = np.array([[2.0, 1.9], [2.0, 1.0], [2.0, 1.8], [2.0, 0.0]], np.float32)
        >>> a = sela_ext.assign(logits)
        >>> a.labels.tolist(), a.sizes.tolist(), a.converged
        ([1, 0, 1, 0], [2, 2], True)

    Source: SeLa, section 3.2, equations 3-7.
    """
    found = assign_silently(
        logits,
        lam=lam,
        tol=tol,
        max_passes=max_passes,
        method=method,
        storage=storage,
        marginals=marginals,
        relax=relax,
        size_bounds=size_bounds,
        row_weights=row_weights,
        start=start,
        balance=balance,
        stop=stop,
        group=group,
        threads=threads,
        progress=progress,
    )
    for line in found.warnings:
        warnings.warn(line, UnbalancedLabelsWarning, stacklevel=2)
    return found


def assign_silently(logits: Any, *, group: Any = None, **options: Any) -> Assignment:
    """`assign`, which has the same arguments, without warnings: they are in the result alone.

    For callers in several threads: what Python's warnings go through is the whole process's.
    """
    with Shard() if group is None else RankShard(group) as shard:
        return _assign(logits, shard, **options)


def _assign(
    logits: Any,
    shard: Shard,
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
    threads: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Assignment:
    name = check_logits(logits)
    rows, cols = (int(n) for n in logits.shape)
    if isinstance(logits, StoredLogits):
        raise DataError("logits: expected the logits themselves, found StoredLogits; use storage= to solve on a copy")
    _check_choice("method", method, METHODS)
    _check_choice("stop", stop, ("l1", "official"))
    _check_choice("balance", balance, ("argmax", "exact"))
    _check_choice("storage", storage, STORAGES)
    if stop == "official" and isinstance(shard, RankShard):
        raise OptionError('group: expected stop "l1" with it, found "official", a rule for one process')
    relaxed = relax is not None or size_bounds is not None
    if relaxed and (stop == "official" or balance == "exact"):
        raise OptionError('relax, size_bounds: expected stop "l1" and balance "argmax" with them')
    lam = _number("lam", lam, 1e-6, 1e6)
    tol = _number("tol", tol, 0.0, 2.0)
    if max_passes is None:
        max_passes = MAX_PASSES[stop]
    if isinstance(max_passes, bool) or not isinstance(max_passes, (int, np.integer)) or not 1 <= max_passes <= 10**9:
        raise OptionError(f"max_passes: expected an integer in 1 .. 1e9, found {max_passes!r}")
    target = cluster_shares(marginals, cols, empty=not relaxed and stop == "l1")
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

    plan = {
        "dtype": name,
        "method": method,
        "balance": balance,
        "stop": stop,
        "source": source_of(logits),
        "weighted": weights is not None,
    }
    kind, why, room = choose_storage(logits, storage, tol=tol, stop=stop, max_passes=int(max_passes), plan=plan)
    room, same = shard.agreed_storage(room, STORAGES.index(kind or "float32"), rows)
    if not same:
        kind, why = "", "read as it is: not all ranks would take a copy"
    read = logits if stop == "official" else in_numpy(logits)
    problem = Problem(read, lam, target, weights, threads, int(max_passes), tol, shard)
    warm = start is not None
    if relaxed:
        problem = relaxed_problem(problem, relax, size_bounds)
        start = start if warm else np.log(target)
    problem.most_candidates, problem.progress = room, progress
    if stop == "official":
        if method not in ("auto", "sinkhorn") or start is not None:
            raise OptionError('stop="official": expected method "auto" or "sinkhorn" and no start; use stop="l1"')
        if max_passes < 2:
            raise OptionError('stop="official": expected max_passes >= 2 (one read makes the log-softmax), found 1')
        method, reason = "sinkhorn", 'stop="official" is a rule for plain Sinkhorn iterations'
        final, converged = solve_official(problem)
    else:
        potential = _start_potential(start, cols)
        if kind:
            final, method, reason = _solve_on_copy(problem, kind, method, potential, warm=warm)
        else:
            final, method, reason = _solve(problem, method, potential, warm=warm)
        converged = final.error <= tol
    reason += f"; storage: {why}" if why else ""
    if problem.stored is not None and problem.dtype == "float64":
        reason += "; stalled in float32, went on in float64"
    if final.sums.labels is None:
        final = problem.evaluate(final.potential, labels=True)
    if relaxed:  # the clusters' shares are what came out
        target = np.maximum(final.shares, 1e-300)

    model = model_of(logits)
    labels = _numpy(final.sums.labels)
    if not problem.all_wanted:
        labels = np.where((labels >= 0) & (target[labels] == 0), -1, labels)  # nothing else is possible for these
    sizes = shard.total("sizes", _sizes(labels, cols))
    share = misplaced(sizes, target)
    ties = 0
    balanced = None
    if balance == "exact":
        part = labels if weights is None else np.where(weights > 0, labels, -1).astype(np.int32)
        balanced = balance_exactly(problem, part, final.potential, final.log_shares == -np.inf)
        labels = np.where(part >= 0, balanced.labels, labels).astype(np.int32)
        sizes = shard.total("sizes", _sizes(labels, cols))
        share = misplaced(sizes, target)
    elif share > UNBALANCED:
        labels = labels.copy()
        ties = break_ties(problem.logits, labels, final.potential, lam, target, shard)
        sizes = shard.total("sizes", _sizes(labels, cols))
        share = misplaced(sizes, target)
    found = words_on_balance(sizes, np.flatnonzero((final.log_shares == -np.inf) & (target > 0)), target, converged)
    if balanced is not None and balanced.impossible:
        found.insert(
            0,
            f"assign: {balanced.impossible} of {balanced.images} images had to be given clusters that are impossible "
            "for them (logits of -inf): no other labels have the wanted cluster sizes",
        )

    return Assignment(
        labels=_like(model, labels),
        potential=_like(model, problem.centred(final.potential) if stop == "official" else final.potential),
        error=final.error,
        converged=converged,
        passes=problem.passes,
        sizes=_like(model, sizes.astype(np.int64)),
        objective=final.objective,
        seconds=problem.seconds,
        backend=backend_of(problem.logits),
        method=method,
        reason=reason,
        history=tuple(problem.history),
        storage=kind or name,
        masked=final.sums.masked,
        ties=ties,
        lam=float(np.float32(lam)) if name != "float64" and stop != "official" else lam,
        gap=None if balanced is None else balanced.gap,
        prices=None if balanced is None else _like(model, balanced.prices),
        warnings=tuple(found),
    )


def _solve(
    problem: Problem, method: str, start: Any, *, warm: bool, first: Evaluation | None = None
) -> tuple[Evaluation, str, str]:
    """Solve by a method, or by the one that "auto" becomes.

    Args:
        problem: to be solved.
        method: see `assign`.
        start: potential [K].
        warm: whether the start is worth something.
        first: the evaluation at the start, where there is one already.

    Returns:
        The last evaluation, the method, and the reason for it.
    """
    reason = f'method="{method}" was asked for'
    if method == "auto" and isinstance(problem, RelaxedProblem) and problem.is_weak:
        method, reason = "anderson", "a weak pull: lam * relax is below 1"
    elif method == "auto":
        method, reason, first = choose_method(problem, start, warm=warm)
    if method == "newton":
        final, given_up = solve_newton(problem, start, warm=warm, first=first)
        return final, method, reason + given_up
    if method == "anderson" and isinstance(problem, RelaxedProblem) and problem.bounds is not None:
        return solve_bounded(problem, start), method, reason
    if method == "anderson":
        return solve_anderson(problem, start, first, () if warm else parts_of(problem)), method, reason
    return solve_sinkhorn(problem, start), method, reason


def _solve_on_copy(problem: Problem, kind: str, method: str, start: Any, *, warm: bool) -> tuple[Evaluation, str, str]:
    """Solve on a 16-bit copy, then on the logits themselves as far as that left an error; see `_solve`."""
    tol, max_passes = problem.tol, problem.max_passes
    problem.stored = stored_copy(problem.logits, kind, problem.lam, problem.threads)
    problem.passes += 1
    saturated = int(problem.shard.total("saturated entries", np.array([problem.stored.saturated]))[0])
    note = f"; {saturated} entries beyond the copy's range of 1,024 nats" if saturated else ""
    problem.tol, problem.max_passes = copy_tolerance(tol, kind), max_passes - 1  # the last pass reads the logits
    on_copy, method, reason = _solve(problem, method, start, warm=warm)
    problem.drop_copy()
    problem.tol, problem.max_passes = tol, max_passes
    final = evaluate_at_end(problem, on_copy.potential, candidates=method == "newton")
    if tol == 0 or final.excess(problem.target) <= tol or problem.exhausted:
        return final, method, reason + note
    note += f"; the copy's rounding left an error of {final.error:.2g}, so the logits themselves were read on"
    further, method, _ = _solve(problem, method, final.potential, warm=True, first=final)
    return (further if further.error < final.error else final), method, reason + note


def _check_choice(option: str, value: Any, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    names = ", ".join(f'"{c}"' for c in choices)
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


def _sizes(labels: Any, clusters: int) -> Any:
    """Images per cluster, int64 [K]; -1 is none."""
    return np.bincount(labels if not len(labels) or labels.min() >= 0 else labels[labels >= 0], minlength=clusters)


def _numpy(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _like(model: Any, value: Any) -> Any:
    """A numpy result in the kind, and on the device, of the logits."""
    if not hasattr(model, "detach"):
        return value
    import torch

    return torch.from_numpy(np.ascontiguousarray(value)).to(model.device)
