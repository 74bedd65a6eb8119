"""What bench/solver.py measures in processes of their own: memory, and solves of ImageNet's size.

    python bench/solver_child.py '{"question": "large", "case": "easy", "tols": [1e-4], "threads": 2}'

prints one line of JSON per finished part. Torch is imported after the memory was measured, for the float64 truth only.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import solver_cases as cases

import sela_ext
from sela_ext import kernels

READS = 3  # timed passes, the least of which counts


def resident() -> tuple[float, float]:
    """Bytes of this process in memory now, and the most since the last `forget_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return 1024.0 * kib["VmRSS"], 1024.0 * kib["VmHWM"]
    except (OSError, KeyError):
        peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak


def forget_peak() -> bool:
    """Let the peak begin anew; False where the system does not allow it: then the peak is that of the whole life."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available() -> float:
    """Bytes of memory that are free for use, or 0 where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return 0.0


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def large(task: Mapping[str, Any]) -> None:
    """Generate one of the large cases, time a read and the solves, measure the memory, and check in float64."""
    rows, cols = task.get("shape") or cases.LARGE_SHAPE
    threads = task["threads"]
    fill = cases.LARGE[task["case"]]
    if task["case"] == "first round":
        cases.network_arrays(1000, 0)
    products = None
    start = time.perf_counter()
    if task.get("recomputed"):
        products = cases.Products(*cases.peaked_arrays(rows, cols))
        logits: Any = sela_ext.FeatureLogits(products.features, products.weight)
    else:
        logits = np.empty((rows, cols), np.float16)
        fill(logits, threads)
    generated = time.perf_counter() - start
    read = None
    if products is None:
        lse, read = None, float("inf")
        for _ in range(READS + 1):
            start = time.perf_counter()
            lse = kernels.sinkhorn_pass(logits, np.zeros(cols), scale=cases.LAM, reference=lse, threads=threads).lse
            read = min(read, time.perf_counter() - start)
        del lse
    whole = forget_peak()
    found = []
    for tol in task["tols"]:
        start = time.perf_counter()
        a = sela_ext.assign(logits, tol=tol, threads=threads, max_passes=task.get("max_passes", 60))
        found.append((tol, time.perf_counter() - start, a))
    peak = resident()[1]
    for tol, seconds, a in found:
        values = {"tol": tol, "seconds": seconds, "reads": a.passes, "method": a.method, "error": a.error}
        values |= {"resident_gb": peak / 1e9, "peak_is_of_solves": whole, "bytes_per_entry": peak / rows / cols}
        values |= {"seconds_per_read": read, "generate_seconds": generated, "reason": a.reason}
        exact = cases.truth(logits if products is None else products, a.potential, labels=tol == found[-1][0])
        values |= {"true_l1": exact.l1, "live": exact.live if exact.labels is not None else None}
        if products is None:
            values["span"] = cases.span(logits)
        say(**values)


def memory(task: Mapping[str, Any]) -> None:
    """Memory of one solve above what the interpreter and the packages take, logits included."""
    case = cases.CASES[task["case"]]()
    tiny = case.features[:1000], case.weight, case.bias
    sela_ext.assign(tiny[0] @ tiny[1].T, threads=task["threads"])  # loads what a solve loads, torch for features, too
    if task["kind"] == "features":
        sela_ext.assign(sela_ext.FeatureLogits(*tiny), threads=task["threads"])
    before = resident()[0]  # the features are counted where they are what is solved, below
    if task["kind"] == "features":
        logits: Any = sela_ext.FeatureLogits(case.features, case.weight, case.bias)
        held = case.features.nbytes + case.weight.nbytes + case.bias.nbytes
    else:
        logits, held = case.logits(np.dtype(task["kind"])), 0
    forget_peak()
    options = {"storage": task["storage"]} if task.get("storage") else {}
    a = sela_ext.assign(logits, tol=task["tol"], threads=task["threads"], max_passes=200, **options)
    above = resident()[1] - before + held
    entries = case.rows * case.cols
    say(bytes_per_entry=above / entries, peak_gb=above / 1e9, reads=a.passes, method=a.method, error=a.error)


def threads_agree(task: Mapping[str, Any]) -> None:
    """Whether the potential and the labels are the same bits with every number of threads."""
    case = cases.CASES[task["case"]]()
    logits = case.logits()
    results = [
        sela_ext.assign(logits, tol=task["tol"], threads=n, method=method, max_passes=40)
        for method in task["methods"]
        for n in task["numbers"]
    ]
    step = len(task["numbers"])
    equal = all(
        a.potential.tobytes() == results[i // step * step].potential.tobytes()
        and a.labels.tobytes() == results[i // step * step].labels.tobytes()
        for i, a in enumerate(results)
    )
    say(equal=equal)


def rank(task: Mapping[str, Any]) -> None:
    """One rank of a sharded solve; rank 0 compares with the solve of everything in one process."""
    import torch.distributed as dist

    case = cases.CASES[task["case"]]()
    logits = case.logits()
    dist.init_process_group("gloo", init_method=f"file://{task['file']}", rank=task["rank"], world_size=task["ranks"])
    try:
        blocks = -(-case.rows // 128)
        edges = [min(case.rows, 128 * (blocks * i // task["ranks"])) for i in range(task["ranks"] + 1)]
        shard = logits[edges[task["rank"]] : edges[task["rank"] + 1]]
        a = sela_ext.assign(shard, tol=task["tol"], threads=1, group=dist.group.WORLD, max_passes=40)
        if task["rank"] == 0:
            b = sela_ext.assign(logits, tol=task["tol"], threads=1, max_passes=40)
            say(equal=a.potential.tobytes() == b.potential.tobytes())
        dist.barrier()
    finally:
        dist.destroy_process_group()


QUESTIONS = {"large": large, "memory": memory, "threads": threads_agree, "rank": rank}


def start(task: Mapping[str, Any]) -> subprocess.Popen[str]:
    """Start a task in a process of its own."""
    threads = str(task["threads"])
    env = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(dict(task))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def answers(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What a started task says, once it has ended; a failed one says {"failed": last line of its error}."""
    try:
        out, err = process.communicate()
    finally:
        process.kill()  # it has ended, unless this process was told to
    for line in out.splitlines():
        if line.startswith("{"):
            yield json.loads(line)
        else:
            print(f"  {line}")
    if process.returncode:
        last = err.strip().splitlines()[-1:] or [f"status {process.returncode}"]
        yield {"failed": last[0]}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    QUESTIONS[given["question"]](given)
