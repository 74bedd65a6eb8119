"""The competitors of bench/solver.py: plain torch, the authors' form, POT and OTT-JAX.

All but OTT-JAX's accelerated variants are Sinkhorn's iterations in another arithmetic; none of them uses code of this
package. Nobody pays for compilation or for preparing a kernel matrix: only iterations are timed.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import common
import numpy as np
import torch
from solver_cases import LAM, truth

# ---------------------------------------------------------------- iterations in plain torch and numpy


class Stepper(Protocol):
    """Sinkhorn's iterations one at a time."""

    def start(self, potential: np.ndarray) -> None:
        """Go on from a potential [K]."""

    def step(self) -> None:
        """One iteration: all of the data once, or as often as the form needs."""

    def potential(self) -> np.ndarray:
        """Log beta [K], nats, after the iterations so far."""


class LogSumExp:
    """torch.logsumexp over rows and columns in turn, float32."""

    def __init__(self, logits: torch.Tensor, lam: float = LAM) -> None:
        self.kernel = lam * logits
        self.shift = float(np.log(logits.shape[0] / logits.shape[1]))
        self.g = torch.zeros(logits.shape[1], dtype=logits.dtype)

    def start(self, potential: np.ndarray) -> None:
        self.g = torch.from_numpy(potential).to(self.kernel.dtype)

    def step(self) -> None:
        f = -torch.logsumexp(self.kernel + self.g, dim=1, keepdim=True)
        self.g = self.shift - torch.logsumexp(self.kernel + f, dim=0)

    def potential(self) -> np.ndarray:
        return self.g.double().numpy()


class SoftmaxSum(LogSumExp):
    """The same iterates by softmax over rows and a sum over columns."""

    def step(self) -> None:
        self.g = self.g + self.shift - torch.softmax(self.kernel + self.g, dim=1).sum(0).log()


class Official:
    """The authors' linear form in float64, in numpy, on the kernel P^lambda [K, N]; two reads per iteration."""

    def __init__(self, logits: torch.Tensor, lam: float = LAM) -> None:
        kernel = torch.log_softmax(logits.double(), 1).mul_(lam).exp_().t().contiguous()
        self.kernel: Any = self.held(kernel)
        self.cols, self.rows = kernel.shape
        self.c: Any = self.held(torch.full((self.rows,), 1 / self.rows, dtype=torch.float64))
        self.r: Any = self.held(torch.full((self.cols,), 1 / self.cols, dtype=torch.float64))

    def held(self, value: torch.Tensor) -> Any:
        return value.numpy()

    def start(self, potential: np.ndarray) -> None:
        self.r = self.held(torch.from_numpy(np.exp(potential - potential.max())))
        self.c = (1.0 / self.rows) / (self.r @ self.kernel)

    def step(self) -> None:
        self.r = (1.0 / self.cols) / (self.kernel @ self.c)
        self.c = (1.0 / self.rows) / (self.r @ self.kernel)

    def potential(self) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.log(np.asarray(self.r))


class OfficialTorch(Official):
    """The same with torch's matrix-vector products."""

    def held(self, value: torch.Tensor) -> Any:
        return value


STEPPERS: dict[str, Callable[[torch.Tensor], Stepper]] = {
    "torch logsumexp": LogSumExp,
    "torch softmax + sum": SoftmaxSum,
    "official float64, numpy": Official,
    "official float64, torch": OfficialTorch,
}


# ---------------------------------------------------------------- reaching an error


@dataclass(frozen=True)
class Reached:
    """When a competitor was at most at an error, or what it was at when its time was over.

    Attributes:
        threshold: the L1 error that was wanted.
        reached: whether it was.
        iterations: until then, or in all.
        seconds: until then, or in all; iterations only.
        l1: the true error there, by float64.
        potential: where that is; None when it is not finite.
        note: why it ended, when it did not get there.
    """

    threshold: float
    reached: bool
    iterations: int
    seconds: float
    l1: float
    potential: np.ndarray | None
    note: str = ""


def step_until(
    stepper: Stepper, logits: torch.Tensor, thresholds: Sequence[float], cap: float, most: int = 20_000
) -> list[Reached]:
    """Iterate up to the smallest threshold or so many seconds; where each threshold was reached, by the true error.

    While it runs, the change of the potential tells about where it is: log b - log col is what an iteration adds. The
    error of the iterates that this points to is then computed in float64, outside of the timed iterations.
    """
    cols = logits.shape[1]
    clocks, iterates, guesses = [0.0], [np.zeros(cols)], []
    time.sleep(common.PAUSE)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        while clocks[-1] < cap and len(iterates) <= most:
            start = time.perf_counter()
            stepper.step()
            clocks.append(clocks[-1] + time.perf_counter() - start)
            iterates.append(stepper.potential())
            change = iterates[-1] - iterates[-2]
            if len(iterates) == 2:  # the first iterate may differ by any constant from the zeros before it
                change = change - np.log(np.exp(change).mean())
            guesses.append(float(np.abs(np.exp(-change) - 1).sum() / cols))  # the error of the iterate before
            if not np.isfinite(iterates[-1]).all() or guesses[-1] <= 0.7 * min(thresholds):
                break
    end = len(iterates) - 1
    ended = "time" if clocks[-1] >= cap or end >= most else ""
    if not np.isfinite(iterates[-1]).all():
        ended = "not finite"
        while end > 0 and not np.isfinite(iterates[end]).all():
            end -= 1
    out = []
    for threshold in thresholds:
        at = next((i for i, guess in enumerate(guesses) if 0 < i <= end and guess <= threshold), end)
        exact = truth(logits, iterates[at], labels=False).l1
        while exact <= threshold and at > 1:  # the guess may be late as well as early
            before = truth(logits, iterates[at - 1], labels=False).l1
            if before > threshold:
                break
            at, exact = at - 1, before
        while exact > threshold and at < end:
            at += max(1, min((end - at) // 2, at // 50))
            exact = truth(logits, iterates[at], labels=False).l1
        got = exact <= threshold
        note = "" if got else ended or "its arithmetic"
        out.append(Reached(threshold, got, at, clocks[at], exact, iterates[at], note))
        if not got:
            break
    return out


# ---------------------------------------------------------------- libraries


def pot(
    logits: torch.Tensor, method: str, thresholds: Sequence[float], counts: Sequence[int | None], cap: float
) -> list[Reached] | None:
    """POT's ot.sinkhorn on the cost -log softmax: the same iterates as the authors' form, so many as that one needed.

    Args:
        logits: [N, K].
        method: "sinkhorn" or "sinkhorn_log".
        thresholds: errors wanted, falling.
        counts: iterations for each, None where that is not known: then none are run.
        cap: seconds for one call; what would take longer is not run.

    Returns:
        What was reached; None without POT.
    """
    ot = common.peer("ot", "POT")
    if ot is None:
        return None
    cost = (-torch.log_softmax(logits.double(), 1)).numpy()
    rows, cols = cost.shape
    a, b = np.full(rows, 1 / rows), np.full(cols, 1 / cols)

    def solve(iterations: int) -> tuple[float, np.ndarray]:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            _, log = ot.sinkhorn(a, b, cost, 1 / LAM, method=method, numItermax=iterations, stopThr=0, log=True)
            seconds = time.perf_counter() - start
            return seconds, np.log(log["v"]) if method == "sinkhorn" else np.asarray(log["log_v"])

    least, potential = solve(1)  # preparation, one iteration, and the plan
    if least > cap:
        exact = truth(logits, potential, labels=False).l1
        return [Reached(thresholds[0], False, 1, least, exact, potential, "time")]
    more = max(0.0, (solve(11)[0] - least) / 10) if least < cap / 2 else least
    out = []
    for threshold, count in zip(thresholds, counts, strict=True):
        fits = int((cap - least) / max(more, 1e-9))
        wanted = max(1, fits) if count is None else count
        run = max(1, min(wanted, fits))
        seconds, potential = solve(run)
        exact = truth(logits, potential, labels=False).l1
        while exact > threshold and run < wanted and seconds < cap / 3:  # faster than it seemed
            run = min(2 * run, wanted)
            seconds, potential = solve(run)
            exact = truth(logits, potential, labels=False).l1
        if exact > threshold and count is not None and run == count and run + 2 <= fits:  # other rounding
            run += 2
            seconds, potential = solve(run)
            exact = truth(logits, potential, labels=False).l1
        got = exact <= threshold
        finite = np.isfinite(exact)
        ended = "time" if run < wanted or count is None else "its arithmetic"
        note = "" if got else ended if finite else "not finite"
        out.append(Reached(threshold, got, run, seconds, exact, potential if finite else None, note))
        if not got:
            break
    return out


OTT = ("plain", "momentum 1.5", "Anderson 5")


def start_jax(threads: int) -> Any:
    """OTT-JAX with so many threads: its pool is as large as the processors that this process may use at its start."""
    if not hasattr(os, "sched_setaffinity"):
        return common.peer("ott", "OTT-JAX")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        found = common.peer("ott", "OTT-JAX")
        if found is not None:
            import jax

            jax.numpy.zeros(8).sum().block_until_ready()
        return found
    finally:
        os.sched_setaffinity(0, allowed)


def ott(
    logits: torch.Tensor, variant: str, thresholds: Sequence[float], cap: float, threads: int
) -> list[Reached] | None:
    """OTT-JAX's Sinkhorn in the log domain, float32, compiled before it is timed; its errors are looked at every 10.

    Args:
        logits: [N, K].
        variant: one of OTT.
        thresholds: errors wanted, falling.
        cap: seconds for one solve.
        threads: of the processor.

    Returns:
        What was reached; None without OTT-JAX.
    """
    if start_jax(threads) is None:
        return None
    import jax
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration, sinkhorn

    options: dict[str, Any] = {}
    if variant.startswith("momentum"):
        options["momentum"] = acceleration.Momentum(value=float(variant.split()[1]))
    elif variant.startswith("Anderson"):
        options["anderson"] = acceleration.AndersonAcceleration(memory=int(variant.split()[1]))
    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=-logits.numpy(), epsilon=1 / LAM))
    compiled = jax.jit(lambda problem, solver: solver(problem))

    def solve(threshold: float, most: int) -> tuple[float, Any]:
        solver = sinkhorn.Sinkhorn(threshold=threshold, max_iterations=most, **options)
        start = time.perf_counter()
        out = compiled(problem, solver)
        out.g.block_until_ready()
        return time.perf_counter() - start, out

    solve(0.0, 10)
    pace = solve(0.0, 10)[0] / 10
    most = int(min(cap / pace, 5000)) // 10 * 10
    if most < 10:
        seconds, out = 10 * pace, solve(0.0, 10)[1]
        g = LAM * np.asarray(out.g, np.float64)
        return [Reached(thresholds[0], False, 10, seconds, truth(logits, g, labels=False).l1, g, "time")]
    solve(2.0, most)  # compiles, and ends at the first look
    found = []
    for threshold in thresholds:
        asked = threshold
        for _ in range(3):  # its own error is of the other marginal or of float32: ask for less where it is too kind
            seconds, out = solve(asked, most)
            g = LAM * np.asarray(out.g, np.float64)
            exact = truth(logits, g, labels=False).l1
            if exact <= threshold or not bool(out.converged):
                break
            asked *= 0.7 * threshold / exact
        iterations = int((np.asarray(out.errors) >= 0).sum()) * 10
        got = exact <= threshold
        note = "" if got else ("time" if np.isfinite(exact) else "not finite")
        found.append(Reached(threshold, got, iterations, seconds, exact, g if np.isfinite(exact) else None, note))
        if not got:
            break
    return found


def blas() -> str:
    """The library behind numpy's matrix products, its kernels and threads."""
    from threadpoolctl import threadpool_info

    np.ones((4, 4)) @ np.ones(4)
    for entry in threadpool_info():
        if entry["user_api"] == "blas" and "numpy" in entry["filepath"]:
            kernels = entry.get("architecture") or "default kernels"
            return f"{entry['internal_api']} {entry.get('version')} ({kernels}, {entry['num_threads']} threads)"
    return str(np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"])
