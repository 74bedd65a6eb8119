"""The label assignment beside the alternatives on the same work: one iteration, whole solves, memory, exact balance.

    python bench/solver.py [--quick] [--only NAME ...] [--no-record]

Agreement is checked first: nothing is timed that does not give float64's columns, and what counts as reached is the
true error of a potential in float64 on the logits as they are, computed outside of the timed calls. All competitors use
the same number of threads and take turns in one process; memory, and logits of ImageNet's size, have processes of their
own. The targets of the project are printed at the end, from the rows of this run. What is solved: solver_cases.py; the
competitors: solver_peers.py; the targets: solver_targets.py. `python bench/performance.py` writes docs/performance.md.

The first run trains two small networks, which takes some minutes and is kept in the cache folder.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
if "numpy" not in sys.modules:  # numpy's products with the kernels that OpenBLAS takes for this processor by itself
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)

import common
import numpy as np
import solver_cases as cases
import solver_child as child
import solver_peers as peers
import solver_targets as targets
import torch

import sela_ext
from sela_ext import kernels
from sela_ext.assign.balance import balance_exactly
from sela_ext.assign.problem import PEAKED, Problem
from sela_ext.assign.ties import UnbalancedLabelsWarning
from sela_ext.errors import SelaError

LAM = cases.LAM
THRESHOLDS = (1e-1, 1e-3, 1e-6)
# Ours is asked for a little less than a threshold, so that its float32 error may be off and the true one below.
ASKED = 0.9
STORAGES = ("float32", "float16", "bfloat16", "fixed16")
METHODS = ("auto", "newton", "anderson", "sinkhorn")
# Passes over the data in one iteration; torch's forms and the libraries make temporaries of the same size besides.
READS = {"torch softmax + sum": 1}
# The cases where the targets compare times: more time for the authors' form, and the libraries run.
COMPARED = ("first-round-1000", "trained-128", "synthetic-3000")
LARGE = {f"large-{name.replace(' ', '-')}": name for name in cases.LARGE}
LARGE_TOLS = {"easy": [1e-4], "peaked": [1e-4, 2e-6], "first round": [1e-4, 1e-6]}
PLAIN = "plain read"  # torch's fastest reduction of the whole matrix: what its memory gives
BALANCED = (60_000, 1000)
ITERATIONS = ("dense", "peaked")
PARTS = (*ITERATIONS, *cases.CASES, "accuracy", "balance", "memory", "bits", *LARGE)


@dataclass
class Run:
    """What all parts of a run share, and the rows that they add."""

    threads: int
    quick: bool
    mode: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def add(self, question: str, case: str, what: str, **values: Any) -> None:
        """Keep one row."""
        self.rows.append(
            {"question": question, "case": case, "what": what, "mode": self.mode, "threads": self.threads, **values}
        )

    def skip(self, what: str, reason: str) -> None:
        """Say once that something is left out, and why."""
        if what not in self.refused:
            self.refused.add(what)
            print(f"  {what}: skipped, {reason}")


# ---------------------------------------------------------------- one iteration


def stored(logits: np.ndarray, storage: str) -> Any:
    """The logits as a pass reads them in this storage; raises SelaError where this version has none such."""
    if storage == "float32":
        return logits
    make = getattr(kernels, "store_logits", None)
    if make is not None:
        return make(logits, storage, lam=LAM)
    if storage == "fixed16":
        raise sela_ext.errors.OptionError("this version has no such storage")
    x = torch.from_numpy(logits)
    return x.half() if storage == "float16" else x.bfloat16()


def percent(share: float | None) -> str:
    """A share of labels."""
    return "-" if share is None else f"{share:.3%}"


BOUNDED = ", bounds"


class Fused:
    """The fused pass as an iteration, with its row reference, and chunk bounds where a solve would use them."""

    def __init__(self, logits: Any, threads: int, *, bounded: bool = False) -> None:
        self.logits, self.threads, self.reference = logits, threads, None
        self.bounds = kernels.chunk_bounds(logits) if bounded else None

    def __call__(self, g: np.ndarray) -> np.ndarray:
        """Column sums at a potential."""
        sums = kernels.sinkhorn_pass(
            self.logits, g, scale=LAM, reference=self.reference, threads=self.threads, bounds=self.bounds
        )
        self.reference, self.live_share = sums.lse, sums.live_share
        return np.asarray(sums.column_sums)

    def labels(self, g: np.ndarray) -> np.ndarray:
        """Labels at a potential."""
        return np.asarray(
            kernels.sinkhorn_pass(self.logits, g, scale=LAM, want_labels=True, threads=self.threads).labels
        )


def column_distance(columns: np.ndarray, exact: cases.Truth) -> float:
    """L1 between column sums, as shares, and the exact ones."""
    return float(np.abs(columns / columns.sum() - exact.columns).sum())


def implied_columns(stepper: peers.Stepper, g: np.ndarray) -> np.ndarray:
    """The columns at a potential, as one iteration from there tells: it adds log b - log col."""
    stepper.start(g)
    stepper.step()
    change = stepper.potential() - g
    return np.exp(-(change - change.mean()))


def iteration_case(run: Run, name: str, logits: np.ndarray, rounds: int) -> None:
    """Time one iteration of everything at a potential part of the way."""
    rows, cols = logits.shape
    g = np.asarray(sela_ext.assign(logits, tol=0, max_passes=5, method="sinkhorn", threads=run.threads).potential)
    g = g.astype(np.float32).astype(np.float64)
    exact = cases.truth(logits, g)
    span = cases.span(logits)
    x = torch.from_numpy(logits)
    plain = min((x.sum, x.amax), key=lambda read: min(common.timed(read) for _ in range(3)))
    competitors: dict[str, Callable[[], Any]] = {PLAIN: plain}
    size: dict[str, float] = {}
    distance: dict[str, float] = {}
    labels: dict[str, float] = {}
    for storage in STORAGES:
        try:
            data = stored(logits, storage)
        except SelaError as error:
            run.skip(f"storage {storage}", str(error))
            continue
        for bounded in (False, True):
            what = f"fused {storage}" + (BOUNDED if bounded else "")
            fused = Fused(data, run.threads, bounded=bounded)
            distance[what] = column_distance(fused(g), exact)
            labels[what] = float((fused.labels(g) == exact.labels).mean())
            competitors[what] = lambda fused=fused: fused(g)
            size[what] = rows * cols * (4 if storage == "float32" else 2) / 1e9
            fused(g)  # the first pass writes the bounds, the second uses them
            if fused.live_share >= PEAKED:
                break
    for what, make in peers.STEPPERS.items():
        if what.endswith("torch") and run.quick:
            continue
        stepper = make(x)
        distance[what] = column_distance(implied_columns(stepper, g), exact)
        stepper.start(g)
        competitors[what] = stepper.step
    for what, far in distance.items():
        limit = 2e-6 if what.startswith("fused float32") else 0.05 if what in size else 1e-4
        if not far < limit:
            raise SystemExit(f"no agreement, {name}: columns of {what} are {far:.2g} in L1 from float64")
    times = common.taken_in_turn(competitors, rounds=rounds)
    bandwidth = 1e-9 * logits.nbytes / statistics.median(times.pop(PLAIN))
    seconds = {what: statistics.median(values) for what, values in times.items()}
    table = []
    for what, value in seconds.items():
        share = size[what] / value / bandwidth if what in size else None
        ratio, best = value / seconds["fused float32"], min(times[what])
        cells = (f"{share:.0%}" if share else "-", f"{distance[what]:.0e}", percent(labels.get(what)))
        table.append((what, value * 1e3, best * 1e3, ratio, *cells))
        run.add(
            "iteration",
            name,
            what,
            rows=rows,
            cols=cols,
            seconds=value,
            best_seconds=best,
            ratio=ratio,
            share_of_bandwidth=share,
            bandwidth_gb_s=bandwidth,
            columns_l1=distance[what],
            labels=labels.get(what),
            span=span,
            live=exact.live,
        )
    common.table(
        f"One iteration, {name}: {rows} x {cols}, row span {span:.0f} nats, {exact.live:.3g} live entries a row; "
        f"plain reads {bandwidth:.1f} GB/s",
        ("", "median ms", "best ms", "x fused float32", "of read bandwidth", "columns, L1 from float64", "labels"),
        table,
    )


# ---------------------------------------------------------------- whole solves


def ours(run: Run, case: cases.Case, logits: np.ndarray) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """What `assign` is run on: name, logits, options."""
    for method in METHODS:
        yield f"assign {method}", logits, {"method": method}
    for storage in STORAGES:
        yield f"assign auto, {storage}", logits, {"storage": storage}
    if not hasattr(sela_ext, "FeatureLogits"):
        run.skip("assign auto, features", "this version has no FeatureLogits")
        return
    yield "assign auto, features", sela_ext.FeatureLogits(case.features, case.weight, case.bias), {}


def solve_case(run: Run, key: str, thresholds: Sequence[float]) -> None:
    """Reads and seconds to a true L1 error for everything on one case, and the labels beside converged float64's."""
    case = cases.CASES[key]()
    logits = case.logits()
    converged = sela_ext.assign(logits.astype(np.float64), tol=1e-10, max_passes=400, threads=run.threads)
    exact = cases.truth(logits, converged.potential)
    if not exact.l1 < 1e-8:
        raise SystemExit(f"no agreement, {case.name}: float64 says L1 {exact.l1:.2g} of what should be converged")
    x = torch.from_numpy(logits)
    lines: dict[str, list[dict[str, Any]]] = {}

    def add(what: str, threshold: float, labels: Any, **values: Any) -> None:
        same = None if labels is None else float((np.asarray(labels) == exact.labels).mean())
        row = {"threshold": threshold, "labels": same, "shape": [case.rows, case.cols], "live": exact.live, **values}
        lines.setdefault(what, []).append(row)
        run.add("solve", case.name, what, **row)

    cap = 0.7 if run.quick else 4.0
    for what, data, options in ours(run, case, logits):
        most = 100
        for threshold in thresholds:
            try:
                seconds, a = timed_solve(data, ASKED * threshold, most, run, **options)
            except SelaError as error:
                run.skip(what, str(error))
                break
            l1 = cases.truth(logits, a.potential, labels=False).l1
            values = {"reached": l1 <= threshold, "true_l1": l1, "seconds": seconds, "reads": a.passes}
            values |= {"method": a.method, "error": a.error, "note": "" if l1 <= threshold else f"{a.passes:.0f} reads"}
            add(what, threshold, a.labels, **values)
            if not l1 <= threshold:
                break
            most = int(np.clip(cap / (seconds / a.passes), 60, 3000))

    counts: list[int | None] = [None] * len(thresholds)
    caps = {"torch logsumexp": 4.0, "torch softmax + sum": 5.0, "official float64, torch": 8.0}
    for what, make in peers.STEPPERS.items():
        if what == "official float64, torch" and (run.quick or key not in COMPARED):
            continue
        limit = caps.get(what, 20.0 if key in COMPARED else 5.0)
        found = peers.step_until(make(x), x, thresholds, min(limit, 2.0) if run.quick else limit)
        if what == "official float64, numpy":
            counts = [r.iterations if r.reached else None for r in found]
            counts += [None] * (len(thresholds) - len(counts))
        for r in found:
            add_reached(add, logits, what, r)
    if key in COMPARED and not run.quick:
        for method in ("sinkhorn", "sinkhorn_log"):
            for r in peers.pot(x, method, thresholds, counts, 8.0) or ():
                add_reached(add, logits, f"POT {method}", r)
        for variant in peers.OTT:
            for r in peers.ott(x, variant, thresholds, 8.0, run.threads) or ():
                add_reached(add, logits, f"OTT-JAX {variant}", r)

    mine = {row["threshold"]: row["seconds"] for row in lines["assign auto"] if row["reached"]}
    common.table(
        f"Whole solves, {case.name}: {case.about}; {exact.live:.3g} live entries a row, span {cases.span(logits):.0f}",
        ("", *(f"s to {t:g}" for t in thresholds), "reads", "ms a read", "true L1", "labels", "x assign auto"),
        [solve_line(what, rows, thresholds, mine) for what, rows in lines.items()],
    )


def timed_solve(logits: Any, tol: float, most: int, run: Run, **options: Any) -> tuple[float, Any]:
    """Median seconds of up to three calls of `assign`, and the last result."""
    times: list[float] = []
    while not times or (len(times) < 3 and sum(times) < 0.7 and not run.quick):
        time.sleep(common.PAUSE)
        start = time.perf_counter()
        a = sela_ext.assign(logits, tol=tol, max_passes=most, threads=run.threads, **options)
        times.append(time.perf_counter() - start)
    return statistics.median(times), a


def add_reached(add: Callable[..., None], logits: np.ndarray, what: str, r: peers.Reached) -> None:
    """The row of a competitor: its labels are those of its potential, in float64."""
    labels = None if r.potential is None else cases.truth(logits, r.potential).labels
    reads = READS.get(what, 2) * r.iterations
    values = {"reached": r.reached, "true_l1": r.l1, "seconds": r.seconds, "reads": float(reads)}
    add(what, r.threshold, labels, iterations=r.iterations, note=r.note, **values)


def solve_line(
    what: str, rows: Sequence[dict[str, Any]], thresholds: Sequence[float], mine: dict[float, float]
) -> tuple[Any, ...]:
    """One line of the table: a competitor, its seconds to each threshold, and its last state."""
    seconds = {row["threshold"]: row["seconds"] for row in rows if row["reached"]}
    last = rows[-1]
    common_ones = [t for t in thresholds if t in seconds and t in mine]
    ratio = seconds[common_ones[-1]] / mine[common_ones[-1]] if common_ones else None
    cells = []
    for t in thresholds:
        gave_up = f"> {last['seconds']:.3g}" if t == last["threshold"] else "-"
        cells.append(seconds.get(t, gave_up))
    a_read = 1e3 * last["seconds"] / max(last["reads"], 1)
    return (what, *cells, last["reads"], a_read, f"{last['true_l1']:.1e}", percent(last["labels"]), ratio)


def accuracy(run: Run) -> None:
    """The smallest true error that float32 logits give, on the widest spans."""
    table = []
    for key in ("trained-1000", "trained-128", "hard-1000"):
        case = cases.CASES[key]()
        logits = case.logits()
        a = sela_ext.assign(logits, tol=1e-7, max_passes=60, threads=run.threads)
        found = cases.truth(logits, a.potential, labels=False)
        widest = LAM * float((logits.max(1) - logits.min(1)).max())
        table.append((case.name, widest, a.passes, f"{a.error:.1e}", f"{found.l1:.1e}"))
        run.add("accuracy", case.name, "assign auto", true_l1=found.l1, error=a.error, reads=a.passes, span=widest)
    common.table("What float32 reaches", ("", "widest span, nats", "reads", "error", "true L1"), table)


# ---------------------------------------------------------------- exact balance


def balance_cases() -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """Name, logits of BALANCED's shape, and how the potential is solved that the rounding starts from."""
    rows, cols = BALANCED
    random = np.random.default_rng(2)
    yield "independent entries", cases.dense_logits(rows, cols), {}
    low = random.standard_normal((rows, 16), np.float32) @ random.standard_normal((16, cols), np.float32)
    low *= np.float32(0.1 / 4)
    yield "16 dimensions", low, {}
    yield "16 dimensions, stopped at 1e-2", low, {"tol": 1e-2}
    del low
    hard = cases.peaked_case(rows, cols).logits()
    yield "peaked", hard, {}
    yield "peaked, 200 plain iterations", hard, {"method": "sinkhorn", "max_passes": 200}
    del hard
    few = np.float32(0.1) * random.standard_normal((50, cols), np.float32)
    yield "50 different rows", few[random.integers(0, 50, rows)], {}
    yield "all rows equal", few[np.zeros(rows, np.int64)], {}


def balance(run: Run) -> None:
    """From a solved potential to exactly balanced labels: time in dense passes, and the certified gap."""
    rows, cols = BALANCED
    reference = Fused(cases.dense_logits(rows, cols), run.threads)
    zeros = np.zeros(cols)
    table = []
    warnings.simplefilter("ignore", UnbalancedLabelsWarning)  # the hard cases earn it
    for name, logits, options in balance_cases():
        if run.quick and name != "independent entries":
            break
        at = sela_ext.assign(logits, **{"tol": 1e-4, "max_passes": 100, "threads": run.threads, **options})
        potential = np.asarray(at.potential)
        best = kernels.sinkhorn_pass(logits, potential, scale=LAM, want_labels=True, threads=run.threads).labels
        found: dict[str, Any] = {}

        def rounding(logits: Any = logits, potential: Any = potential, best: Any = best, found: Any = found) -> None:
            problem = Problem(logits, LAM, np.full(cols, 1 / cols), None, run.threads, 1, 1e-4)
            found["exact"] = balance_exactly(problem, best, potential, np.zeros(cols, np.bool_))
            found["reads"] = problem.passes

        times = common.taken_in_turn(
            {"exact": rounding, "pass": lambda: reference(zeros)}, rounds=3 if run.quick else 7, seconds=6
        )
        seconds = {what: statistics.median(values) for what, values in times.items()}
        before, after = (np.bincount(labels, minlength=cols) for labels in (best, found["exact"].labels))
        misplaced = float(np.maximum(before - rows / cols, 0).sum() / rows)
        values = {
            "seconds": seconds["exact"],
            "dense_passes": seconds["exact"] / seconds["pass"],
            "reads": found["reads"],
            "gap": found["exact"].gap,
            "error_before": at.error,
            "sizes_before": [int(min(before)), int(max(before))],
            "sizes": [int(min(after)), int(max(after))],
            "misplaced": misplaced,
        }
        run.add("balance", name, "balance exact", **values)
        sizes = ["..".join(map(str, values[key])) for key in ("sizes_before", "sizes")]
        cells = (f"{at.error:.0e}", sizes[0], f"{misplaced:.1%}", sizes[1])
        cost = (values["seconds"] * 1e3, values["dense_passes"], values["reads"])
        table.append((name, *cells, *cost, f"{values['gap']:.1e}"))
    common.table(
        f"Exactly balanced labels: {rows} x {cols}",
        ("", "L1 before", "sizes", "misplaced", "after", "ms", "dense passes", "reads", "gap, nats per image"),
        table,
    )


# ---------------------------------------------------------------- processes of their own


def memory(run: Run) -> None:
    """Bytes per entry of whole solves, logits included, above what the interpreter takes."""
    table = []
    for key in ("first-round-1000", "trained-1000"):
        for kind, storage, tol in (
            ("float16", None, 1e-6),
            ("float32", None, 1e-6),
            ("float32", "fixed16", 1e-4),
            ("features", None, 1e-4),
        ):
            what = kind if storage is None else f"{kind}, storage {storage}"
            task = {"question": "memory", "case": key, "kind": kind, "storage": storage, "tol": tol}
            for found in child.answers(child.start({**task, "threads": run.threads})):
                if "failed" in found:
                    run.skip(f"memory, {what}", found["failed"])
                    continue
                run.add("memory", key, what, kind=kind, tol=tol, **found)
                table.append((f"{key}, {what}", found["bytes_per_entry"], found["peak_gb"], found["reads"]))
    common.table("Memory of a solve, logits included", ("", "bytes per entry", "GB", "reads"), table)


def bits(run: Run) -> None:
    """The same bits for any number of threads and ranks."""
    table = []
    for key in ("trained-128", "first-round-128") if not run.quick else ("synthetic-3000",):
        task = {"question": "threads", "case": key, "tol": 1e-6, "numbers": [1, 2, 3], "threads": run.threads}
        for found in child.answers(child.start({**task, "methods": ["newton", "anderson"]})):
            if "failed" in found:
                raise SystemExit(f"bits, {key}: {found['failed']}")
            run.add("bits", key, "threads", numbers="1, 2, 3 threads", equal=found["equal"])
            table.append((f"{key}: 1, 2, 3 threads", "equal" if found["equal"] else "differ"))
        if run.quick:
            continue
        for ranks in (2, 3):
            with tempfile.TemporaryDirectory() as folder:
                task = {"question": "rank", "case": key, "tol": 1e-6, "threads": 1, "ranks": ranks}
                task["file"] = str(Path(folder) / "meeting")
                started = [child.start({**task, "rank": rank}) for rank in range(ranks)]
                found_all = [found for process in started for found in child.answers(process)]
            failed = [found["failed"] for found in found_all if "failed" in found]
            if failed:
                run.skip(f"{ranks} ranks", failed[0])
                continue
            equal = found_all[0]["equal"]
            run.add("bits", key, "ranks", numbers=f"1, {ranks} ranks", equal=equal)
            table.append((f"{key}: 1, {ranks} ranks", "equal" if equal else "differ"))
    common.table("The same bits", ("", ""), table)


def large(run: Run, part: str) -> None:
    """A solve of ImageNet's size in a process of its own, where there is memory for it."""
    name = LARGE[part]
    rows, cols = cases.LARGE_SHAPE
    needed = 2 * rows * cols * 1.25
    free = child.available()
    if free < needed:
        run.skip(part, f"{free / 1e9:.1f} GB of memory are available, {needed / 1e9:.1f} needed")
        return
    task = {"question": "large", "case": name, "tols": LARGE_TOLS[name], "threads": run.threads}
    tasks = [task]
    if name == "peaked" and hasattr(sela_ext, "FeatureLogits"):
        tasks.append({**task, "tols": [1e-4], "recomputed": True, "max_passes": 30})
    table = []
    for task in tasks:
        recomputed = bool(task.get("recomputed"))
        what = "recomputed from features" if recomputed else "float16"
        for found in child.answers(child.start(task)):
            if "failed" in found:
                run.skip(f"{part}, {what}", found["failed"])
                continue
            run.add("large", name, what, rows=rows, cols=cols, recomputed=recomputed, **found)
            read = found["seconds_per_read"]
            errors = (f"{found['error']:.1e}", f"{found['true_l1']:.1e}")
            cells = (found["seconds"], found["reads"], found["method"], read, *errors, found["resident_gb"])
            table.append((f"{what}, L1 {found['tol']:g}", *cells))
            if found["live"] is not None and not recomputed:
                print(f"\n{part}: {found['live']:.0f} live entries a row, median span {found['span']:.0f} nats")
    common.table(
        f"ImageNet's size, {name}: {rows} x {cols}",
        ("", "s", "reads", "method", "s a read", "error", "true L1", "resident GB, all of the process"),
        table,
    )


# ---------------------------------------------------------------- all of it


def parts_of(options: Any) -> tuple[str, ...]:
    """What is run, in order."""
    if options.only:
        unknown = [name for name in options.only if name not in PARTS]
        if unknown:
            raise SystemExit(f"--only: expected one of {', '.join(PARTS)}, found {unknown[0]}")
        return tuple(name for name in PARTS if name in options.only)
    if options.quick:
        made = ["trained-128"] if cases.is_kept(128, 5) else []
        if not made:
            print("trained-128: skipped, its network is trained in a full run")
        return (*ITERATIONS, *made, "synthetic-3000", "balance", "bits")
    return PARTS


def run_part(run: Run, part: str) -> None:
    """One of PARTS."""
    if part in ITERATIONS:
        logits = cases.dense_logits(60_000, 1000) if part == "dense" else cases.peaked_case(60_000, 1000).logits()
        iteration_case(run, part, logits, 3 if run.quick else 11)
    elif part in cases.CASES:
        solve_case(run, part, THRESHOLDS)
    elif part in LARGE:
        large(run, part)
    else:
        {"accuracy": accuracy, "balance": balance, "memory": memory, "bits": bits}[part](run)


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"run only these: {', '.join(PARTS)}")
    options = parser.parse_args()
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(options.threads)
    chosen = parts_of(options)
    run = Run(options.threads, options.quick, "only" if options.only else "quick" if options.quick else "full")
    with threadpool_limits(options.threads, user_api="blas"):
        facts = common.machine()
        facts |= {name: common.version(name) for name in ("POT", "ott-jax", "jax")}
        facts |= {"blas": peers.blas(), "load": round(os.getloadavg()[0], 2)}
        common.print_machine(facts, options.threads)
        print(f"numpy's products: {facts['blas']}; POT {facts['POT']}, OTT-JAX {facts['ott-jax']}")
        if facts["load"] > 0.5:
            print(f"the machine is busy (load {facts['load']}): believe ratios rather than seconds")
        start = time.perf_counter()
        failed = []
        for part in chosen:
            begun = time.perf_counter()
            try:
                run_part(run, part)
            except Exception as error:
                failed.append(part)
                print(f"\n{part}: failed, {type(error).__name__}: {error}")
            print(f"  ({part}: {time.perf_counter() - begun:.0f} s)", flush=True)
    common.table("Targets, from the rows of this run", targets.HEADER, targets.lines(run.rows))
    print(f"\n{time.perf_counter() - start:.0f} s in all, load now {os.getloadavg()[0]:.1f}")
    if not options.no_record:
        print(f"{len(run.rows)} rows appended to {common.record('solver', run.rows, facts)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
