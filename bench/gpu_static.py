"""Inspects the CUDA kernels without a GPU: registers, shared memory, spills, what the machine code does per element.

`python bench/gpu_static.py` compiles every kernel for every shipped architecture (cmake/SelaCuda.cmake has the list
and the flags), disassembles it, holds each kernel to its budget (bench/gpu_budgets.py), and writes the tables in
docs/gpu.md. With --core FILE it looks into a built extension module instead of compiling, which takes seconds.

How the hot loop of a kernel and the straight way through it are found: bench/sass.py, Note [The hot loop].
Exit status: 0 all budgets kept; 1 a budget is exceeded or, with --check, the tables are out of date; 2 it could not
be done.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_budgets as budgets
import sass
from gpu_code import (
    JOBS,
    ROOT,
    InspectionError,
    Kernel,
    Resources,
    compile_kernels,
    cubins,
    demangle,
    find_program,
    kernel_of,
    nvcc_version,
    output,
    resources,
    shipped_architectures,
    template_parameters,
)

DOCUMENT = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- gpu_static:begin -->", "<!-- gpu_static:end -->"


# ---- Facts about one kernel on one architecture.


@dataclass
class Facts:
    """What is known of a kernel's code on an architecture; what is per element is of the hot loop's straight way."""

    kernel: Kernel
    arch: str
    resources: Resources
    shape: budgets.Shape
    local: int  # instructions that touch local memory, anywhere
    blocks: int  # resident on a multiprocessor
    wide_stores: int  # instructions that store 16 bytes, anywhere
    code_bytes: int
    hot: sass.HotLoop | None = None
    missing: str = ""  # why there is no hot loop

    @property
    def warps(self) -> int:
        return self.blocks * math.ceil(self.shape.threads / 32)

    @property
    def local_in_loop(self) -> int:
        return sum(i.local_memory for i in self.hot.busy) if self.hot else 0

    @property
    def needed_loads(self) -> int:
        """Loads of 16 bytes that bring the elements of one turn."""
        return self.shape.elements * self.shape.size // 16

    @property
    def wide_loads(self) -> int:
        return sum(i.bytes >= 16 for i in self.hot.global_loads) if self.hot else 0

    @property
    def narrow_loads(self) -> list[str]:
        """Loads of less than 16 bytes; of those under a predicate and under its opposite, the greater number."""
        loads = [i for i in self.hot.global_loads if i.bytes < 16] if self.hot else []
        by_guard = Counter(i.guard for i in loads)
        idle = [guard for guard in by_guard if guard.startswith("!") and by_guard[guard] <= by_guard.get(guard[1:], 0)]
        idle += [guard for guard in by_guard if guard and by_guard[guard] < by_guard.get("!" + guard, 0)]
        return [i.op for i in loads if i.guard not in idle]

    def in_flight(self, threads: int | None = None) -> int:
        """Loads of 16 bytes that a thread has under way, in blocks of so many threads (default: the widest)."""
        stages = self.shape.stages(threads or self.shape.threads)
        return self.hot.loads_in_flight(16, stages - 1) if self.hot else 0

    @property
    def bytes_in_flight(self) -> int:
        """Per multiprocessor, every resident thread waiting for its loads."""
        return self.in_flight() * 16 * self.blocks * self.shape.threads

    @property
    def exponentials(self) -> float:
        return self.hot.counted(budgets.EXPONENTIAL) / self.shape.elements if self.hot else 0.0

    def instructions(self, warps: int | None = None, marking: bool = False) -> float:
        """Issued per element: the straight way, sums over `warps` warps (default: all), one thread's bookkeeping.

        With `marking`, every warp also does what it does only where it has something to mark.
        """
        if not self.hot:
            return 0.0
        warps = self.shape.warps_per_group if warps is None else warps
        turn = (len(self.hot.code) * (warps - 1) + len(self.hot.busy)) / warps
        if marking:
            turn += len(self.hot.marking) - len(self.hot.busy)
        if warps > 1:
            turn += warps * sum_cost(self.hot, self.shape.rows)
        return turn / self.shape.elements

    def by_class(self) -> dict[str, float]:
        kinds = [*(name for name, _ in sass.CLASSES), "integer"]
        return {kind: self.hot.count(kind) / self.shape.elements for kind in kinds} if self.hot else {}


def sum_cost(hot: sass.HotLoop, rows: int) -> float:
    """Instructions per warp whose sums are added up, from the loop over shared memory that does it most cheaply."""
    costs = []
    for turn in hot.shared_loops:
        warps = sum(i.name == "FADD" for i in turn) // rows
        if warps:
            costs.append(len(turn) / warps)
    return min(costs, default=0.0)


def resident_blocks(limits: budgets.Multiprocessor, registers: int, shared: int, threads: int) -> int:
    """Blocks that fit on a multiprocessor (CUDA occupancy: registers go to warps in units of 256, by quarters)."""
    warps = math.ceil(threads / 32)
    per_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = limits.registers // 4 // per_warp * 4 // warps
    per_block = math.ceil((shared + limits.reserved) / 128) * 128
    by_shared = limits.shared // per_block if per_block else limits.blocks
    return min(limits.warps // warps, limits.blocks, by_registers, by_shared)


def facts_of(
    function: sass.Function, arch: str, used: Resources, kernel: Kernel, constants: budgets.Constants
) -> Facts:
    limits = budgets.MULTIPROCESSORS[arch]
    budget = budget_for(kernel)  # without one there is no rule for the shape either: violations() says so
    shape = budgets.shape(kernel.name, kernel.arguments, constants) if budget else budgets.Shape(threads=128)
    shared = used.shared + shape.dynamic(shape.threads)
    blocks = resident_blocks(limits, used.registers, shared, shape.threads)
    local = sum(i.local_memory for i in function.code)
    wide_stores = sum(i.name == "STG" and i.bytes == 16 for i in function.code)
    facts = Facts(kernel, arch, used, shape, local, blocks, wide_stores, 16 * len(function.code))
    if budget is not None and budget.instructions is not None:
        double = shape.size == 8
        marker = budget.marker or (budgets.DOUBLE_EXPONENTIAL if double else budgets.EXPONENTIAL)
        try:
            facts.hot = sass.hot_loop(function, marker, shape.elements * (budgets.DOUBLE_TERMS if double else 1))
        except sass.HotLoopError as error:
            facts.missing = str(error)
    return facts


def budget_for(kernel: Kernel) -> budgets.Budget | None:
    return next((b for b in budgets.BUDGETS if b.covers(kernel.name, kernel.arguments)), None)


def inspect(found: dict[str, list[Path]], sources: str) -> list[Facts]:
    """Facts of every kernel in the cubins, kernels in the order of their names, architectures as given."""
    constants, parameters = budgets.Constants(sources), template_parameters(sources)
    cuobjdump, nvdisasm = find_program("cuobjdump"), find_program("nvdisasm")
    jobs = [(arch, path) for arch, paths in found.items() for path in paths]

    def read(job: tuple[str, Path]) -> tuple[str, str]:
        return output(cuobjdump, "-res-usage", job[1]), output(nvdisasm, "-c", job[1])

    rows = []
    with ThreadPoolExecutor(JOBS) as pool:
        for (arch, _), (usage, code) in zip(jobs, pool.map(read, jobs), strict=True):
            used = resources(usage, arch)
            functions = [function for function in sass.functions(code) if function.name in used]
            for function, name in zip(functions, demangle([f.name for f in functions]), strict=True):
                kernel = kernel_of(name, parameters)
                rows.append(facts_of(function, arch, used[function.name], kernel, constants))
    order = list(found)
    return sorted(rows, key=lambda facts: (str(facts.kernel), order.index(facts.arch)))


# ---- Budgets.


def violations(facts: Facts) -> list[str]:
    """What a kernel's code does that its budget does not allow, one line each."""
    where = f"{facts.kernel} sm_{facts.arch}"
    budget = budget_for(facts.kernel)
    if budget is None:
        return [f"{where}: expected a budget in bench/gpu_budgets.py, found none: add a line for {facts.kernel.name}"]
    lines = []

    def hold(what: str, expected: str, value: object, remedy: str) -> None:
        lines.append(f"{where}: expected {expected} {what}, found {value}: {remedy}")

    raise_it = "or raise its budget in bench/gpu_budgets.py and say why"
    used = facts.resources
    if used.registers > budget.registers:
        hold("registers", f"at most {budget.registers}", used.registers, f"hold fewer values at a time, {raise_it}")
    if used.shared > budget.shared:
        hold("bytes of static shared memory", f"at most {budget.shared}", used.shared, f"share less, {raise_it}")
    if used.stack > budget.stack:
        hold(
            "bytes of stack",
            f"at most {budget.stack}",
            used.stack,
            "registers spill or an array is indexed by a variable: unroll, or hold less",
        )
    if facts.local_in_loop or (facts.local and not budget.stack):
        hold(
            "accesses to local memory (LDL, STL)",
            "0",
            facts.local,
            "registers spill: loosen __launch_bounds__, or hold less",
        )
    if facts.blocks == 0:
        hold(
            "blocks on a multiprocessor",
            "at least 1",
            0,
            "fewer registers, threads or bytes of shared memory per block",
        )
    if facts.wide_stores < budget.wide_stores:
        hold(
            "16-byte stores", f"at least {budget.wide_stores}", facts.wide_stores, "store 16 bytes per thread at a time"
        )
    if budget.instructions is None:
        return lines
    if facts.hot is None:
        hold("hot loop", "a", "none", f"{facts.missing}; see Note [The hot loop] in bench/sass.py")
        return lines
    if facts.shape.size < 8 and facts.exponentials > 1:
        hold("EX2 per element", "at most 1", f"{facts.exponentials:.2f}", "take each exponential once")
    issued = facts.instructions()
    if issued > budget.instructions:
        hold(
            "instructions per element",
            f"at most {budget.instructions:g}",
            f"{issued:.1f}",
            f"do less per element, {raise_it}",
        )
    marking = facts.instructions(marking=True)
    if budget.marking is not None and marking > budget.marking:
        hold(
            "instructions per element where every warp marks",
            f"at most {budget.marking:g}",
            f"{marking:.1f}",
            f"do less per candidate, {raise_it}",
        )
    if budget.wide_loads:
        needed = f"at least {facts.needed_loads}"
        if facts.wide_loads < facts.needed_loads:
            hold("16-byte loads per turn", needed, facts.wide_loads, "load 16 bytes per thread at a time")
        allowed = budget.other_loads * facts.shape.rows
        narrow = facts.narrow_loads
        if len(narrow) > allowed or (facts.shape.size < 4 and any(".U16" in op or ".S16" in op for op in narrow)):
            hold(
                "narrower loads per turn",
                f"at most {allowed}, none of 2 bytes,",
                " ".join(narrow),
                "the logits must come by 16-byte loads",
            )
    if facts.in_flight() < budget.in_flight and facts.arch not in budgets.NO_ASYNC_COPIES:
        hold(
            "16-byte loads in flight per thread",
            f"at least {budget.in_flight}",
            facts.in_flight(),
            "issue all loads before the first use of one",
        )
    return lines


# ---- The tables in docs/gpu.md.


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def group_name(kernel: Kernel) -> str:
    """Types of 16 bits share a row of the tables."""
    return re.sub(r"\b(?:half|bfloat16)\b", "16-bit", str(kernel))


def document(rows: Sequence[Facts], version: str) -> str:
    """The generated part of docs/gpu.md."""
    archs = list(dict.fromkeys(facts.arch for facts in rows))
    groups: dict[str, dict[str, list[Facts]]] = {}
    for facts in rows:
        groups.setdefault(group_name(facts.kernel), {}).setdefault(facts.arch, []).append(facts)
    lines = [f"Written by `python bench/gpu_static.py`, nvcc {version}.", ""]
    lines += ["### What the kernels claim", "", *claims(rows), ""]
    lines += ["### Registers, resident blocks, instructions per element", ""]
    lines += [
        "Registers per thread · blocks that fit on a multiprocessor · instructions issued per element in the hot loop. "
        "Of 16-bit types the worse one.",
        "",
    ]

    def by_arch(group: dict[str, list[Facts]], arch: str) -> str:
        same = group.get(arch, [])
        if not same:
            return "-"
        words = [str(max(f.resources.registers for f in same)), str(min(f.blocks for f in same))]
        if any(f.hot for f in same):
            words.append(f"{max(f.instructions() for f in same):.1f}")
        return " · ".join(words)

    lines += markdown(
        ["kernel", *(f"sm_{arch}" for arch in archs)],
        ([f"`{name}`", *(by_arch(group, arch) for arch in archs)] for name, group in groups.items()),
    )
    lines += ["", f"### In detail, sm_{budgets.H100.arch}", ""]
    lines += [
        "Shared: static, bytes. Spills: bytes of stack per thread + instructions on local memory. Warps: resident on a "
        "multiprocessor. Loads: of 16 bytes + narrower ones in a turn of the hot loop. In flight: loads of 16 bytes "
        "that a thread has under way at once, and what that makes per multiprocessor. The last columns are "
        "instructions per element.",
        "",
    ]
    kinds = ["memory", "fp32", "mufu", "integer", "shuffle", "control"]
    detail = []
    for name, group in groups.items():
        same = group.get(budgets.H100.arch, [])
        if not same:
            continue
        worst = max(same, key=lambda f: (f.instructions(), f.resources.registers))
        spills = f"{max(f.resources.stack for f in same)} + {max(f.local for f in same)}"
        words = [f"`{name}`", str(worst.resources.shared), spills, str(min(f.warps for f in same))]
        if worst.hot:
            by_class = worst.by_class()
            words += [
                f"{worst.wide_loads} + {len(worst.narrow_loads)}",
                f"{worst.in_flight()}, {worst.bytes_in_flight / 1024:.0f} KiB" if worst.in_flight() else "-",
                f"{worst.exponentials:.2f}" if worst.shape.size < 8 else "-",
                *(f"{by_class[kind]:.1f}" for kind in kinds),
            ]
        else:
            words += ["-"] * (3 + len(kinds))
        detail.append(words)
    lines += markdown(["kernel", "shared", "spills", "warps", "loads", "in flight", "EX2", *kinds], detail)
    lines += ["", *floors(rows)]
    return "\n".join(lines)


def claims(rows: Sequence[Facts]) -> list[str]:
    """What the kernels claim of their machine code, and where that is not so."""

    def said(claim: str, but: Sequence[Facts]) -> str:
        found: dict[str, list[str]] = {}
        for facts in but:
            archs = found.setdefault(facts.kernel.name, [])
            if f"sm_{facts.arch}" not in archs:
                archs.append(f"sm_{facts.arch}")
        exceptions = "; ".join(f"`{name}` ({', '.join(archs)})" for name, archs in found.items())
        return f"- {claim}: " + (f"not so in some of {exceptions}." if exceptions else "holds everywhere.")

    looping = [facts for facts in rows if facts.hot]
    aligned = [facts for facts in looping if facts.kernel.arguments.get("kAligned") == "true"]
    planes = [facts for facts in rows if facts.kernel.name == "augment_kernel"]
    return [
        said("No local memory in a hot loop", [f for f in looping if f.local_in_loop]),
        said("No local memory at all, no stack", [f for f in rows if f.local or f.resources.stack]),
        said("Aligned rows come by loads of 16 bytes alone", [f for f in aligned if f.wide_loads < f.needed_loads]),
        said("All loads of a turn are under way together", [f for f in aligned if f.in_flight() < f.needed_loads]),
        said("One EX2 per element, or none", [f for f in looping if f.shape.size < 8 and f.exponentials not in (0, 1)]),
        said("Images leave by stores of 16 bytes", [f for f in planes if f.wide_stores < channels_stored(f)]),
    ]


def channels_stored(facts: Facts) -> int:
    return int(facts.kernel.arguments["kChannels"])


@dataclass(frozen=True)
class Floor:
    """Milliseconds that a card needs at least for a piece of work, by what could bind it."""

    work: budgets.Work
    memory: float
    exponentials: float
    issue: float
    in_flight: float  # bytes per multiprocessor

    @property
    def floor(self) -> float:
        return max(self.memory, self.exponentials)

    @property
    def binds(self) -> str:
        names = {"memory": self.memory, "EX2": self.exponentials, "issue": self.issue}
        return max(names, key=lambda name: names[name])


def floor_of(work: budgets.Work, facts: Facts, card: budgets.Card) -> Floor:
    shape = facts.shape
    group = 32 * shape.warps_per_group
    if work.kernel == "fused_kernel" and shape.warps_per_group > 1:
        group = min(group, math.ceil(work.elements / shape.columns / 32) * 32)
    sweep = group * shape.columns
    padded = math.ceil(work.elements / sweep) * sweep
    threads = max(group, shape.threads if shape.warps_per_group == 1 else group)
    limits = budgets.MULTIPROCESSORS[card.arch]
    blocks = resident_blocks(
        limits, facts.resources.registers, facts.resources.shared + shape.dynamic(threads), threads
    )
    issued = 32 * work.issued or padded * facts.instructions(group // 32, work.marking)
    return Floor(
        work,
        1e3 * work.items * work.bytes / card.copy,
        1e3 * work.items * work.exponentials / card.exponentials,
        1e3 * work.items * issued / card.issue,
        facts.in_flight(threads) * 16.0 * blocks * threads * work.elements / padded,
    )


def milliseconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.1g}"


def floors(rows: Sequence[Facts]) -> list[str]:
    card = budgets.H100
    lines = [
        f"### Bytes, operations and floors on an {card.name}",
        "",
        f"N = {budgets.IMAGENET:,} rows, or {budgets.CIFAR:,} images. Floor: the larger of the times for the bytes "
        f"({card.copy / 1e12:.1f} TB/s, what a copy moves) and the exponentials ({card.exponentials / 1e12:.1f}e12/s). "
        f"Issue: the instructions of this code, at 4 per clock, {card.multiprocessors} multiprocessors, "
        f"{card.clock / 1e9:.1f} GHz; where that is the largest, the code and not the memory binds. Of copy: the most "
        "of the copy's bandwidth that what binds leaves, were it busy all the time. In flight: bytes on their way per "
        "multiprocessor while all threads wait; a full memory needs about "
        f"{card.bytes_in_flight / 1024:.0f} KiB, if data take {card.latency * 1e6:.1f} µs to come. Nothing was timed.",
        "",
    ]
    table = []
    for work in budgets.WORK:
        facts = next(
            (
                f
                for f in rows
                if f.arch == card.arch
                and budgets.Budget(work.kernel, {n: (v,) for n, v in work.when.items()}).covers(
                    f.kernel.name, f.kernel.arguments
                )
            ),
            None,
        )
        if facts is None:
            raise InspectionError(
                f"{work.title}: expected {work.kernel} with {dict(work.when)}, found none: correct bench/gpu_budgets.py"
            )
        floor = floor_of(work, facts, card)
        table.append(
            [
                work.title,
                f"{work.items * work.bytes / 1e9:.2f} GB",
                milliseconds(floor.memory),
                milliseconds(floor.exponentials),
                f"**{milliseconds(floor.floor)}**",
                milliseconds(floor.issue),
                floor.binds,
                f"{floor.memory / max(floor.memory, floor.exponentials, floor.issue):.0%}",
                f"{floor.in_flight / 1024:.0f} KiB" if floor.in_flight else "-",
            ]
        )
    header = ["work", "bytes", "memory ms", "EX2 ms", "floor ms", "issue ms", "binds", "of copy", "in flight"]
    return lines + markdown(header, table)


def written(text: str, part: str) -> str:
    """The document with its generated part replaced; appended under a heading where there is none yet."""
    if BEGIN in text:
        before, rest = text.split(BEGIN, 1)
        return f"{before}{BEGIN}\n{part}\n{END}{rest.split(END, 1)[1]}"
    return f"{text.rstrip()}\n\n## What the compiler made of the kernels\n\n{BEGIN}\n{part}\n{END}\n"


def generated(text: str) -> str:
    return text.split(BEGIN, 1)[1].split(END, 1)[0].strip() if BEGIN in text else ""


def compiler_of(text: str) -> str:
    """The version of nvcc whose code the document's tables describe; empty where there are none."""
    found = re.search(r", nvcc (\S+)\.$", generated(text), re.MULTILINE)
    return found[1] if found else ""


# ---- The command.


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--core", type=Path, help="look into this built extension module instead of compiling")
    parser.add_argument("--check", action="store_true", help="fail where the tables in docs/gpu.md are out of date")
    parser.add_argument("--json", type=Path, help="write one JSON object per kernel and architecture to this file")
    options = parser.parse_args(words)
    try:
        return run(options)
    except (InspectionError, KeyError, OSError) as error:
        print(f"gpu_static: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    sources = "\n".join(
        path.read_text() for path in sorted((ROOT / "csrc" / "cuda").iterdir()) if path.suffix in (".cu", ".cuh")
    )
    archs, version = shipped_architectures(), nvcc_version()
    binaries = [options.core] if options.core else compile_kernels()
    with tempfile.TemporaryDirectory() as folder:
        found = cubins(binaries, Path(folder))
        missing = [arch for arch in archs if arch not in found]
        if missing:
            raise InspectionError(
                f"expected machine code for sm_{', sm_'.join(archs)}, found none for sm_{', sm_'.join(missing)} in "
                f"{', '.join(str(path) for path in binaries)}: build with nvcc on the PATH and SELA_CUDA_ARCHS unset"
            )
        rows = inspect({arch: found[arch] for arch in archs}, sources)
    for arch in archs:
        absent = set(template_parameters(sources)) - {facts.kernel.name for facts in rows if facts.arch == arch}
        if absent:
            raise InspectionError(f"expected {', '.join(sorted(absent))} for sm_{arch}, found none: build anew")

    wrong = [line for facts in rows for line in violations(facts)]
    if options.json:
        options.json.write_text("".join(json.dumps(as_row(facts)) + "\n" for facts in rows))
    text = DOCUMENT.read_text()
    part = document(rows, version)
    kernels = len({str(facts.kernel) for facts in rows})
    print(f"{kernels} kernels for {len(archs)} architectures, nvcc {version}: {len(wrong)} budgets exceeded")
    if options.check:
        made_by = compiler_of(text)
        if made_by and made_by != version:
            print(f"docs/gpu.md: its tables are of nvcc {made_by}, this is {version or 'none'}: not compared")
        elif generated(text) != part.strip():
            wrong.append(
                "docs/gpu.md: expected the tables of this code, found others: run `python bench/gpu_static.py`"
            )
    elif written(text, part) != text:
        DOCUMENT.write_text(written(text, part))
        print(f"{DOCUMENT.relative_to(ROOT)}: tables written")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def as_row(facts: Facts) -> dict[str, object]:
    """One line of --json."""
    return {
        "kernel": str(facts.kernel),
        "arch": facts.arch,
        "registers": facts.resources.registers,
        "shared": facts.resources.shared,
        "stack": facts.resources.stack,
        "local": facts.local,
        "threads": facts.shape.threads,
        "blocks": facts.blocks,
        "elements": facts.shape.elements,
        "wide_loads": facts.wide_loads,
        "narrow_loads": facts.narrow_loads,
        "in_flight": facts.in_flight(),
        "exponentials": facts.exponentials,
        "instructions": round(facts.instructions(), 2),
        "marking": round(facts.instructions(marking=True), 2),
        **{kind: round(value, 2) for kind, value in facts.by_class().items()},
        "code_bytes": facts.code_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
