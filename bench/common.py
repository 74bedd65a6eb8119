"""What every benchmark shares: the machine in words, medians of interleaved timings, tables, and rows on disk."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

# Seconds before each timed call. OpenMP workers of one competitor keep a processor busy for some milliseconds after
# their work is done, and would take it from the next one.
PAUSE = 0.03
RESULTS = Path(__file__).resolve().parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have: --quick, --threads, --no-record."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="less than a minute in all")
    parser.add_argument("--threads", type=int, default=2, help="threads of every competitor (default 2)")
    parser.add_argument("--no-record", action="store_true", help="do not append to bench/results")
    return parser


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and the versions of what is timed."""
    cpu = platform.processor() or platform.machine()
    memory = 0.0
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    import sela_ext

    info = sela_ext.build_info()
    facts: dict[str, Any] = {
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "sela_ext": info["version"],
        "isa": info["cpu_isa"],
        "compiler": info["compiler"],
    }
    for name in ("torch", "torchvision", "numpy"):
        facts[name] = version(name)
    return facts


def version(package: str) -> str | None:
    """Installed version of a package, or None; the package is not imported."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peer(module: str, shown_as: str | None = None) -> ModuleType | None:
    """Import a competitor; say in one line that it is skipped when it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError:
        print(f"peer {shown_as or module}: not installed, skipped")
        return None


def print_machine(facts: Mapping[str, Any], threads: int) -> None:
    """The head of every report."""
    print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; {threads} threads each; "
        f"sela_ext {facts['sela_ext']} ({facts['isa']}, {facts['compiler']}); "
        f"torch {facts['torch']}, numpy {facts['numpy']}, python {facts['python']}"
    )


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    competitors: Mapping[str, Callable[[], Any]], *, rounds: int = 5, seconds: float | None = None
) -> dict[str, float]:
    """Median seconds of each competitor, taken in turn, so that a busy moment hits all of them."""
    times = taken_in_turn(competitors, rounds=rounds, seconds=seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def taken_in_turn(
    competitors: Mapping[str, Callable[[], Any]], *, rounds: int = 5, seconds: float | None = None
) -> dict[str, list[float]]:
    """All timings of `interleaved`, in seconds.

    Args:
        competitors: name -> call. Each is called once before the timing starts.
        rounds: how many timed calls each gets.
        seconds: stop adding rounds after this time (at least one round is run).
    """
    for function in competitors.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in competitors}
    start = time.perf_counter()
    for _ in range(rounds):
        for name, function in competitors.items():
            time.sleep(PAUSE)
            times[name].append(timed(function))
        if seconds is not None and time.perf_counter() - start > seconds:
            break
    return times


def read_bandwidth(threads: int, *, gigabytes: float = 0.5) -> float:
    """Measured read bandwidth in GB/s: the best of torch.sum and torch.amax far outside the caches."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(int(gigabytes * 1e9 / 4))
        size = data.numel() * 4 / 1e9
        best = min(min(timed(data.sum) for _ in range(5)), min(timed(data.amax) for _ in range(5)))
    finally:
        torch.set_num_threads(before)
    return size / best


def show(value: Any) -> str:
    """One table cell: floats with three significant digits or as many as they need."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a header, first column to the left, the others to the right."""
    cells = [[show(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [list(header), *cells]:
        print(
            "  "
            + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        )


def record(bench: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Append one JSON line per row, with the machine and the time, to bench/results/<bench>.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{bench}.jsonl"
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"time": stamp, "machine": dict(facts), **row}) + "\n")
    return path
