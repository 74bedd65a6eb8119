"""One iteration and whole solves of the label assignment, beside the alternatives on the same work.

    python bench/solver.py [--quick]

Agreement is checked first: nothing is timed that does not give the same columns or labels. All competitors use the
same number of threads and take turns in one process.
"""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch

import sela_ext
from sela_ext import kernels
from sela_ext.assign.balance import balance_exactly
from sela_ext.assign.problem import Problem

LAM = 25.0


def dense_logits(rows: int, cols: int) -> torch.Tensor:
    """The first label pass: an untrained network, a few hundred live entries per row."""
    return 0.1 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def peaked_logits(rows: int, cols: int) -> torch.Tensor:
    """After some training: images of a class share their favourites; spans of hundreds of nats, ~1 live entry a row."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(cols, 32, generator=generator)
    weight = torch.randn(32, cols, generator=generator) / 32**0.5 + 0.3 * centres.t()
    logits = torch.empty(rows, cols)
    for first in range(0, rows, 4096):
        n = min(4096, rows - first)
        kind = torch.randint(cols, (n,), generator=generator)
        features = centres[kind] + 0.3 * torch.randn(n, 32, generator=generator)
        logits[first : first + n] = 2.0 * (features @ weight)
    return logits


def alternating(logits: torch.Tensor, lam: float = LAM) -> Callable[[torch.Tensor], torch.Tensor]:
    """Sinkhorn by torch.logsumexp over rows and columns in turn: g -> next g."""
    kernel = lam * logits
    shift = float(np.log(logits.shape[0] / logits.shape[1]))

    def iterate(g: torch.Tensor) -> torch.Tensor:
        f = -torch.logsumexp(kernel + g, dim=1, keepdim=True)
        return shift - torch.logsumexp(kernel + f, dim=0)

    return iterate


def softmax_sum(logits: torch.Tensor, lam: float = LAM) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same iterates by softmax over rows and a sum over columns."""
    kernel = lam * logits
    shift = float(np.log(logits.shape[0] / logits.shape[1]))

    def iterate(g: torch.Tensor) -> torch.Tensor:
        return g + shift - torch.softmax(kernel + g, dim=1).sum(0).log()

    return iterate


def official(logits: torch.Tensor, lam: float = LAM) -> Callable[[torch.Tensor], torch.Tensor]:
    """The authors' linear form in float64 on the kernel P^lambda [K, N]; two reads of 8 bytes per iteration."""
    kernel = torch.log_softmax(logits.double(), 1).mul_(lam).exp_().t().contiguous().numpy()
    cols, rows = kernel.shape

    def iterate(c: torch.Tensor) -> torch.Tensor:
        r = (1.0 / cols) / (kernel @ c.numpy())
        return torch.from_numpy((1.0 / rows) / (r @ kernel))

    return iterate


class Fused:
    """The fused pass as an iteration, with its row reference."""

    def __init__(self, logits: torch.Tensor, threads: int) -> None:
        self.logits, self.threads, self.reference = logits, threads, None
        self.share = logits.shape[0] / logits.shape[1]

    def __call__(self, g: torch.Tensor) -> torch.Tensor:
        """The next potential."""
        sums = kernels.sinkhorn_pass(self.logits, g, scale=LAM, reference=self.reference, threads=self.threads)
        self.reference = sums.lse
        return g + np.log(self.share) - sums.column_sums.clamp_min(1e-300).log()


def agreement(logits: torch.Tensor, threads: int, iterations: int) -> tuple[torch.Tensor, float]:
    """Iterate the fused pass and float64 softmax + sum side by side; the potential, and the L1 distance of columns."""
    few = logits[:: max(1, logits.shape[0] // 4000)].contiguous()
    fused, twin = Fused(few, threads), softmax_sum(few.double())
    g = torch.zeros(logits.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        g = twin(g)
        g -= g.mean()
    g = g.float().double()
    mine, theirs = fused(g) - g, twin(g) - g
    share = few.shape[0] / logits.shape[1]
    distance = float((share * (-mine).exp() - share * (-theirs).exp()).abs().sum() / few.shape[0])
    if not distance < 2e-6:
        raise SystemExit(f"no agreement: columns differ by {distance:.2g} in L1 from float64 softmax + sum")
    return g, distance


def iteration_case(
    name: str, logits: torch.Tensor, threads: int, bandwidth: float, *, linear: bool, rounds: int
) -> list[dict[str, Any]]:
    """Time one iteration of everything at a potential part of the way; print a table; return rows to record."""
    rows, cols = logits.shape
    g, distance = agreement(logits, threads, 5)
    span = LAM * float((logits.amax(1) - logits.amin(1)).median())
    competitors: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, float] = {}
    for label, data in (
        ("fused float32", logits),
        ("fused float16", logits.half()),
        ("fused bfloat16", logits.bfloat16()),
    ):
        fused = Fused(data, threads)
        fused(g)
        competitors[label] = lambda fused=fused: fused(g)
        sizes[label] = data.numel() * data.element_size() / 1e9
    torch_lse, torch_sum, g32 = alternating(logits), softmax_sum(logits), g.float()
    competitors["torch logsumexp, alternating"] = lambda: torch_lse(g32)
    competitors["torch softmax + sum"] = lambda: torch_sum(g32)
    if linear:
        step = official(logits)
        c = torch.full((rows,), 1.0 / rows, dtype=torch.float64)
        competitors["official form, float64"] = lambda: step(c)
    times = common.taken_in_turn(competitors, rounds=rounds)
    seconds = {label: statistics.median(values) for label, values in times.items()}
    best = {label: min(values) for label, values in times.items()}
    table = []
    recorded = []
    for label, value in seconds.items():
        share = sizes[label] / value / bandwidth if label in sizes else None
        ratio, best_ratio = value / seconds["fused float32"], best[label] / best["fused float32"]
        table.append((label, value * 1e3, ratio, best[label] * 1e3, best_ratio, f"{share:.0%}" if share else "-"))
        recorded.append(
            {
                "case": name,
                "rows": rows,
                "cols": cols,
                "what": label,
                "seconds": value,
                "ratio": ratio,
                "best_seconds": best[label],
                "best_ratio": best_ratio,
                "share_of_bandwidth": share,
                "threads": threads,
                "bandwidth_gb_s": bandwidth,
            }
        )
    common.table(
        f"One iteration, {name}: {rows} x {cols}, median row span {span:.0f} nats; "
        f"columns agree with float64 to {distance:.1g}",
        ("", "median ms", "x fused f32", "best ms", "x fused f32", "of read bandwidth"),
        table,
    )
    for kind in ("float16", "bfloat16"):
        for what, values in (("median", seconds), ("best", best)):
            mine = values[f"fused {kind}"]
            print(
                f"  {kind}, {what}: {values['torch logsumexp, alternating'] / mine:.1f}x faster than logsumexp, "
                f"{values['torch softmax + sum'] / mine:.1f}x than softmax + sum"
            )
    return recorded


def solve_case(name: str, logits: torch.Tensor, threads: int, tols: tuple[float, ...]) -> list[dict[str, Any]]:
    """Whole solves: matrix reads and seconds to a true L1 error, and the labels' agreement with the first method's."""
    table, recorded = [], []
    for tol in tols:
        results = {
            method: sela_ext.assign(logits, tol=tol, method=method, threads=threads, max_passes=300)
            for method in ("auto", "newton", "anderson", "sinkhorn")
        }
        for method, a in results.items():
            same = float((a.labels == results["auto"].labels).double().mean())
            name_of = f"auto = {a.method}" if method == "auto" else method
            table.append(
                (f"{name_of}, tol {tol:g}", a.passes, a.seconds * 1e3, a.error, str(a.converged), f"{same:.3%}")
            )
            recorded.append(
                {
                    "case": name,
                    "what": f"assign {method}",
                    "method": a.method,
                    "tol": tol,
                    "passes": a.passes,
                    "seconds": a.seconds,
                    "error": a.error,
                    "converged": a.converged,
                    "threads": threads,
                }
            )
    header = ("", "reads", "ms", "true L1", "converged", "labels as auto")
    common.table(f"Whole solves, {name}: {logits.shape[0]} x {logits.shape[1]}", header, table)
    return recorded


def balance_case(name: str, logits: torch.Tensor, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Rounding to exactly balanced labels, against dense passes: seconds, reads, and the certified gap."""
    a = sela_ext.assign(logits, tol=1e-4, max_passes=100, threads=threads, balance="exact")
    plain = sela_ext.assign(logits, tol=1e-4, max_passes=100, threads=threads)
    target = np.full(logits.shape[1], 1 / logits.shape[1])
    labels, g = plain.labels.numpy(), plain.potential.numpy()
    reference = kernels.sinkhorn_pass(logits, g, scale=LAM, threads=threads).lse
    nothing_dead = np.zeros(len(target), bool)

    def rounding() -> None:
        problem = Problem(logits, LAM, target, None, threads, 1, 1e-4)
        balance_exactly(problem, labels, g, nothing_dead)

    def one_pass() -> None:
        kernels.sinkhorn_pass(logits, g, scale=LAM, reference=reference, want_labels=True, threads=threads)

    seconds = common.interleaved({"pass": one_pass, "rounding": rounding}, rounds=rounds)
    sizes = np.bincount(labels, minlength=len(target))
    row = {
        "case": name,
        "what": "balance exact",
        "seconds": seconds["rounding"],
        "passes": seconds["rounding"] / seconds["pass"],
        "reads": a.passes - plain.passes,
        "gap": a.gap,
        "gap_of_potential": sela_ext.verify(logits, labels=a.labels, potential=g).label_gap,
        "sizes_before": [int(sizes.min()), int(sizes.max())],
        "sizes": [int(min(a.sizes)), int(max(a.sizes))],
        "threads": threads,
    }
    common.table(
        f"Exactly balanced labels, {name}: {logits.shape[0]} x {logits.shape[1]}",
        ("sizes before", "after", "ms", "x one pass", "reads", "gap, nats per image", "at the potential"),
        [
            (
                f"{sizes.min()}..{sizes.max()}",
                "..".join(map(str, row["sizes"])),
                row["seconds"] * 1e3,
                row["passes"],
                row["reads"],
                row["gap"],
                row["gap_of_potential"],
            )
        ],
    )
    return [row]


def peers(logits: torch.Tensor, threads: int) -> list[dict[str, Any]]:
    """Libraries on a small dense case; absent ones are named and skipped."""
    table, recorded = [], []
    x = logits[:5000].contiguous()
    rows, cols = x.shape
    a = sela_ext.assign(x, tol=1e-4, method="sinkhorn", threads=threads)
    table.append(("assign, sinkhorn, L1 1e-4", a.seconds * 1e3, 1.0))
    ot = common.peer("ot", "POT")
    if ot is not None:
        cost = -x.numpy().astype(np.float64)
        uniform = np.full(rows, 1 / rows), np.full(cols, 1 / cols)
        for method in ("sinkhorn", "sinkhorn_log"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plan: list[Any] = []
                seconds = common.timed(
                    lambda method=method, plan=plan: plan.append(
                        ot.sinkhorn(*uniform, cost, 1 / LAM, method=method, numItermax=int(a.passes), stopThr=0)
                    )
                )
            same = float((plan[0].argmax(1) == a.labels.numpy()).mean())
            table.append(
                (f"POT {method}, {int(a.passes)} iterations, labels {same:.2%}", seconds * 1e3, seconds / a.seconds)
            )
            recorded.append({"case": "peers", "what": f"POT {method}", "seconds": seconds, "ours": a.seconds})
    ott = common.peer("ott", "OTT-JAX")
    if ott is not None:
        from ott.geometry import geometry
        from ott.solvers import linear

        geom = geometry.Geometry(cost_matrix=-x.numpy(), epsilon=1 / LAM)
        out = linear.solve(geom, threshold=1e-4)
        seconds = common.timed(lambda: linear.solve(geom, threshold=1e-4).f.block_until_ready())
        same = float((np.asarray(out.matrix).argmax(1) == a.labels.numpy()).mean())
        table.append((f"OTT-JAX, labels {same:.2%}", seconds * 1e3, seconds / a.seconds))
        recorded.append({"case": "peers", "what": "OTT-JAX", "seconds": seconds, "ours": a.seconds})
    common.table(f"Libraries: {rows} x {cols}", ("", "ms", "x ours"), table)
    return recorded


def main() -> None:
    options = common.arguments(__doc__.splitlines()[0]).parse_args()
    threads = options.threads
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)
    facts = common.machine()
    common.print_machine(facts, threads)
    bandwidth = common.read_bandwidth(threads)
    print(f"read bandwidth: {bandwidth:.1f} GB/s")
    rounds = 5 if options.quick else 11

    dense, peaked = dense_logits(60_000, 1000), peaked_logits(60_000, 1000)
    rows = iteration_case("dense", dense, threads, bandwidth, linear=not options.quick, rounds=rounds)
    rows += iteration_case("peaked", peaked, threads, bandwidth, linear=True, rounds=rounds)
    tols = (1e-4,) if options.quick else (1e-2, 1e-3, 1e-4, 1e-6)
    rows += solve_case("dense", dense, threads, tols)
    if not options.quick:
        rows += solve_case("peaked", peaked, threads, (1e-2, 1e-3, 1e-4, 1e-6))
    rows += balance_case("dense", dense, threads, rounds)
    rows += balance_case("peaked", peaked, threads, rounds)
    rows += peers(dense, threads)
    if not options.no_record:
        print(f"\nrows appended to {common.record('solver', rows, facts)}")


if __name__ == "__main__":
    main()
