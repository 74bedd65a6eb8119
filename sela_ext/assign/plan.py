"""How much memory a solve needs, and how much there is: asked before, so that no solve is killed half-way."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels.bounds import bounds_nbytes
from sela_ext.processors import available_processors

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
STORED = ("float16", "bfloat16", "fixed16")
# Bytes per row beside the logits: log-sum-exp of this pass, of the one before and of that one scaled; labels twice;
# what is counted of them. In float64 the three are twice as large.
PER_ROW, PER_ROW_MORE_64 = 24, 12
ROW_MAXIMUM = 4  # of a stored copy
# An entry of the plan that Newton's method keeps: 8 bytes as the pass finds it, 6 or 8 put together, 4 of the plan on
# them; and what each row has of them at the least. At lambda trained logits have 2 to 6 entries per row, at the smaller
# ones of the way there up to 40.
PER_ENTRY, PER_ROW_OF_ENTRIES, USUAL_ENTRIES = 14, 24, 40
# Exact balance: lists of 10 columns per row, twice, and the search on them; where far from balanced, up to 34.
PER_ROW_EXACT = 600
WORKSPACE = 32 << 20  # threads, tables of the columns, what Python and numpy allocate in passing
SPARE = 0.95  # so much of what is free may be planned with
UNCHECKED = 64 << 20  # solves that need less are begun without a look


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of memory that a solve needs; see `memory_plan`.

    Attributes:
        rows: N.
        cols: K.
        logits: the logits as they are; 0 where they are computed, or mapped from a file.
        copy: a 16-bit copy with its row maxima.
        bounds: chunk bounds of what passes read, made when few of its entries count, and only where there is room.
        vectors: log-sum-exp, labels and the like, O(N).
        candidates: entries that Newton's method keeps: what it usually takes.
        candidates_most: the same at its limit.
        balance: lists for exactly balanced labels.
        workspace: tiles of computed logits, parts of a mapped file, tables of the columns.
    """

    rows: int
    cols: int
    logits: int
    copy: int
    bounds: int
    vectors: int
    candidates: int
    candidates_most: int
    balance: int
    workspace: int

    @property
    def extra(self) -> int:
        """Beside the logits."""
        return self.copy + self.bounds + self.vectors + max(self.candidates, self.balance) + self.workspace

    @property
    def total(self) -> int:
        """With the logits."""
        return self.logits + self.extra

    @property
    def per_entry(self) -> float:
        """Bytes for each of the N K entries."""
        return self.total / max(1, self.rows * self.cols)

    def describe(self) -> str:
        """The plan in a line."""
        parts = {
            "logits": self.logits,
            "16-bit copy": self.copy,
            "bounds": self.bounds,
            "rows": self.vectors,
            "candidates": self.candidates,
            "balance": self.balance,
            "work": self.workspace,
        }
        named = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        return f"{gib(self.total)}: {named}; {self.per_entry:.2f} bytes per entry"


def memory_plan(
    rows: int,
    cols: int,
    *,
    dtype: str = "float32",
    storage: str = "float32",
    method: str = "auto",
    balance: str = "argmax",
    stop: str = "l1",
    source: str = "memory",
    weighted: bool = False,
) -> MemoryPlan:
    """Bytes that `assign` needs for logits [rows, cols] on the CPU.

    Args:
        rows: N.
        cols: K.
        dtype: of the logits.
        storage: "float32" (no copy), "float16", "bfloat16" or "fixed16".
        method: as in `assign`.
        balance: as in `assign`.
        stop: as in `assign`.
        source: "memory", "file" (mapped) or "features": where logits are that take no memory of their own.
        weighted: with row weights.

    Returns:
        MemoryPlan.

    Raises:
        OptionError: an unknown name, or a number below 1.

    Example:
        >>> from sela_ext import memory_plan
        >>> plan = memory_plan(1_281_167, 3000, dtype="float16", method="anderson")
        >>> plan.describe()
        '7.45 GiB: logits 7.16 GiB, bounds 0.23 GiB, rows 0.03 GiB, work 0.04 GiB; 2.08 bytes per entry'
        >>> memory_plan(1_281_167, 3000, source="features").per_entry < 0.25
        True
    """
    for name, value, choices in (
        ("dtype", dtype, tuple(ITEMSIZE)),
        ("storage", storage, ("float32", *STORED)),
        ("source", source, ("memory", "file", "features")),
    ):
        if value not in choices:
            raise OptionError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")
    if rows < 1 or cols < 1:
        raise OptionError(f"rows, cols: expected numbers >= 1, found {rows} and {cols}")
    double = dtype == "float64" or stop == "official"
    vectors = rows * (PER_ROW + double * PER_ROW_MORE_64 + weighted * 12)
    copy = rows * (2 * cols + ROW_MAXIMUM) if storage in STORED else 0
    if stop == "official":
        copy = rows * cols * 8
    read = storage if storage in STORED else dtype if source == "memory" and not double else None
    newton = method in ("auto", "newton") and stop == "l1"
    most = min(128, max(16, 2 * cols))
    workspace = WORKSPACE + 64 * 8 * 4 * cols
    if source == "features":
        workspace += 2 * (6 << 20)
    if source == "file":
        workspace += 2 * (64 << 20)
    return MemoryPlan(
        rows=rows,
        cols=cols,
        logits=rows * cols * ITEMSIZE[dtype] if source == "memory" else 0,
        copy=copy,
        bounds=0 if read is None else bounds_nbytes(rows, cols, read),
        vectors=vectors,
        candidates=rows * (PER_ROW_OF_ENTRIES + PER_ENTRY * min(USUAL_ENTRIES, cols)) if newton else 0,
        candidates_most=rows * (PER_ROW_OF_ENTRIES + PER_ENTRY * most) if newton else 0,
        balance=rows * PER_ROW_EXACT if balance == "exact" else 0,
        workspace=workspace,
    )


def check_memory(plan: MemoryPlan, available: int | None = None) -> float:
    """See that a plan fits, beside logits that are there already, and how many candidates do.

    Args:
        plan: of the solve.
        available: bytes; None: what this process can have.

    Returns:
        Candidates per row that there is room for; inf where memory is no limit.

    Raises:
        ResourceError: it does not fit.
    """
    if plan.extra <= UNCHECKED:
        return math.inf
    free = available_memory() if available is None else available
    if free is None:
        return math.inf
    room = SPARE * free
    needed = plan.extra - plan.bounds  # which a solve does without
    if needed > room:
        remedies = []
        if plan.copy:
            remedies.append('storage="float32" (the logits as they are, no copy)')
        if plan.balance:
            remedies.append('balance="argmax"')
        if plan.logits:
            remedies.append("logits in a memory-mapped file or FeatureLogits")
        remedy = " or ".join(remedies) or 'method="anderson" or a machine with more memory'
        raise ResourceError(
            f"memory: expected {gib(needed)} beside the logits for {plan.rows:,} x {plan.cols:,}, "
            f"found {gib(free)} available; use {remedy}"
        )
    if not plan.candidates or needed - plan.candidates + plan.candidates_most <= room:
        return math.inf
    left = room - (needed - plan.candidates)
    return max(1.0, (left / plan.rows - PER_ROW_OF_ENTRIES) / PER_ENTRY)


def available_memory(proc: Path = Path("/proc"), control: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process can still have: of the machine, the control groups it is in, and its limits (ulimit -v).

    Page cache counts as available, since the kernel gives it back.

    Args:
        proc: where the kernel tells of processes.
        control: where it tells of control groups.

    Returns:
        None where neither says.
    """
    found = []
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
    except (OSError, ValueError, IndexError):
        pass
    try:
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for line in groups:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, files = control, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = control / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / name.lstrip("/")
        while True:
            left = _left_in_group(folder, *files)
            if left is not None:
                found.append(left)
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent
    found += _left_in_limits(proc / "self" / "statm")
    return min(found) if found else None


def _left_in_limits(sizes: Path) -> list[int]:
    """Bytes up to the limits of this process itself, where it has any.

    Args:
        sizes: the process's own, in pages, as the kernel tells them.
    """
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    try:
        pages = [int(word) for word in sizes.read_text().split()]
        used = [pages[0] * resource.getpagesize(), pages[5] * resource.getpagesize()]
    except (OSError, ValueError, IndexError):
        return []
    return [max(limit - size, 0) for limit, size in zip(limits, used, strict=True) if limit != resource.RLIM_INFINITY]


def _left_in_group(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes up to the limit of a control group, cache that can be given back counted as free."""
    try:
        most = int((folder / limit).read_text())  # "max": no limit
        used = int((folder / usage).read_text())
    except (OSError, ValueError):
        return None
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == cache:
                used -= int(value)
    except (OSError, ValueError):
        pass
    return max(0, most - max(0, used))


def gib(size: Any) -> str:
    """Bytes in GiB, for people."""
    return f"{size / (1 << 30):.2f} GiB"


def threads_of(threads: int) -> int:
    """Threads that 0 stands for."""
    return threads or available_processors()
