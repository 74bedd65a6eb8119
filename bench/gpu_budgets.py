"""What every CUDA kernel may use and must do, and the work it has at the standard sizes: data for gpu_static.py.

A kernel without a budget is an error there, so a new kernel gets its line here in the same change. Numbers are the most
that any shipped architecture's code needs, with little room above: who needs more raises them and says why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# ---- The machines.


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor has (CUDA C programming guide, technical specifications per compute capability)."""

    warps: int
    blocks: int
    shared: int  # bytes for all blocks
    reserved: int  # bytes of shared memory that the system takes per block
    reported: int  # how much of that the compiler's report counts as the kernel's own
    registers: int = 65536


MULTIPROCESSORS = {
    "75": Multiprocessor(warps=32, blocks=16, shared=64 << 10, reserved=0, reported=0),
    "80": Multiprocessor(warps=64, blocks=32, shared=164 << 10, reserved=1024, reported=0),
    "86": Multiprocessor(warps=48, blocks=16, shared=100 << 10, reserved=1024, reported=0),
    "90": Multiprocessor(warps=64, blocks=32, shared=228 << 10, reserved=1024, reported=1024),
    "100": Multiprocessor(warps=64, blocks=32, shared=228 << 10, reserved=1024, reported=1024),
    "120": Multiprocessor(warps=48, blocks=24, shared=100 << 10, reserved=1024, reported=1024),
}


@dataclass(frozen=True)
class Card:
    """What the floors are computed with."""

    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz, under load
    copy: float  # bytes/s that a copy moves
    exponentials: float  # per second
    latency: float  # seconds from a load to its data, memory busy

    @property
    def issue(self) -> float:
        """Instructions/s, counted per thread: four schedulers, a warp of 32 threads per clock each."""
        return 4 * 32 * self.multiprocessors * self.clock

    @property
    def bytes_in_flight(self) -> float:
        """Bytes that each multiprocessor must have on their way to keep the memory busy (Little's law)."""
        return self.copy * self.latency / self.multiprocessors


H100 = Card("H100", "90", 132, clock=1.7e9, copy=3.0e12, exponentials=3.7e12, latency=0.8e-6)

# ---- The kernels.

SIZES = {"half": 2, "bfloat16": 2, "float": 4, "double": 8}
EXPONENTIAL = re.compile(r"MUFU\.EX2")
DOUBLE_EXPONENTIAL = re.compile(r"DFMA")  # exp() of a double is a polynomial: at least 8 of these
DOUBLE_TERMS = 8


@dataclass(frozen=True)
class Shape:
    """How a kernel is launched and what one turn of its hot loop handles, per thread."""

    threads: int  # per block, at its widest
    rows: int = 1
    columns: int = 1
    size: int = 2  # bytes of an element
    dynamic: int = 0  # bytes of dynamic shared memory per block
    warps_per_group: int = 1  # warps that share a row

    @property
    def elements(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Budget:
    """What a kernel may use. `when` names template arguments and the values they must have."""

    kernel: str
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    registers: int = 255
    shared: int = 0  # static, bytes
    instructions: float | None = None  # per element, in the hot loop; None: no hot loop to be looked at
    wide_loads: bool = False  # all elements come by loads of 16 bytes
    other_loads: int = 0  # further loads on the straight way, per row: reference, weight, ...
    in_flight: int = 0  # loads of 16 bytes that a thread has under way at once, at least

    def covers(self, kernel: str, arguments: Mapping[str, str]) -> bool:
        return kernel == self.kernel and all(arguments.get(name) in values for name, values in self.when.items())


# ---- Constants of the kernels' headers, so that shapes have one home.


class Constants:
    """The `constexpr` numbers in C++ text, alone and in structs; expressions may use sizeof(T) and one another."""

    _CONSTANT = re.compile(r"\b(k[A-Z]\w*) = ([^;,()]*(?:\([^;]*?\)[^;,()]*)*)(?=[,;])")

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        self._structs = {
            found[1]: dict(self._CONSTANT.findall("\n".join(re.findall(r"constexpr [^;]*;", found[2]))))
            for found in re.finditer(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL)
        }
        outside = re.sub(r"struct \w+ \{.*?\n\};", "", text, flags=re.DOTALL)
        self._alone = dict(self._CONSTANT.findall("\n".join(re.findall(r"constexpr [^;{}]*;", outside))))

    def value(self, name: str, struct: str = "", size: int = 4) -> int:
        """The constant's value where elements have `size` bytes.

        Raises:
            KeyError: no such constant in the text.
        """
        inside = self._structs.get(struct, {})
        text = inside.get(name) or self._alone.get(name)
        if text is None:
            where = f"struct {struct}" if struct else "the kernels' headers"
            raise KeyError(f"expected constexpr {name} in {where}, found none: bench/gpu_budgets.py needs it")
        text = re.sub(r"sizeof\(\w+\)", str(size), text)
        text = re.sub(r"static_cast<\w+>|\bint\b", "", text).replace("/", "//")
        names = set(re.findall(r"\bk[A-Z]\w*", text))
        choice = re.fullmatch(r"(.*?)\?(.*?):(.*)", text, re.DOTALL)
        if choice:
            text = f"({choice[2]}) if ({choice[1]}) else ({choice[3]})"
        known = {other: self.value(other, struct, size) for other in names}
        return int(eval(text.strip().replace("true", "True").replace("false", "False"), {"__builtins__": {}}, known))


def shape(kernel: str, arguments: Mapping[str, str], constants: Constants, arch: str) -> Shape:
    """How a kernel is launched: what its launcher does, said once more. Threads are those of its widest rows.

    Raises:
        KeyError: a kernel without a rule here, or a constant that is no longer in the headers.
    """
    size = SIZES.get(arguments.get("T", ""), 4)
    if kernel == "fused_kernel":
        mapping = arguments["Mapping"]
        threads = constants.value("kThreads", mapping, size)
        rows = constants.value("kRows", mapping, size)
        columns = constants.value("kColumns", mapping, size)
        one_warp = constants.value("kOneWarp", mapping, size)
        return Shape(
            threads,
            rows,
            columns,
            size,
            dynamic=rows * columns * size * threads,
            warps_per_group=1 if one_warp else threads // 32,
        )
    if kernel in ("wide_rows_kernel", "wide_columns_kernel"):
        accumulator = SIZES[arguments["A"]]
        threads = constants.value("kWideThreads" if kernel == "wide_rows_kernel" else "kWideColumnThreads")
        return Shape(
            threads,
            constants.value("kWideRows", size=accumulator),
            constants.value("kWideColumns"),
            size,
            warps_per_group=threads // 32,
        )
    raise KeyError(f"{kernel}: no rule for its shape")


# Architectures without asynchronous copies: loads go through registers, their number in flight has no budget.
NO_ASYNC_COPIES = ("75",)

_HALVES, _FLOAT, _DOUBLE = ("half", "bfloat16"), ("float",), ("double",)
_ALIGNED, _EDGED = ("true",), ("false",)

BUDGETS = (
    Budget("fused_kernel", {"kAligned": _ALIGNED, "kLabels": ("false",)}, 128, 1792, 20, True, 2, 1),
    Budget("fused_kernel", {"kAligned": _ALIGNED, "kLabels": ("true",)}, 128, 1792, 30, True, 2, 1),
    Budget("fused_kernel", {"kAligned": _EDGED}, 128, 1792, 40),
    Budget("wide_rows_kernel", {"A": _FLOAT, "kAligned": _ALIGNED}, 128, 1792, 20, True, 10, 1),
    Budget("wide_rows_kernel", {"A": _FLOAT, "kAligned": _EDGED}, 128, 1792, 30),
    Budget("wide_rows_kernel", {"A": _DOUBLE}, 128, 1792, 60),
    Budget("wide_columns_kernel", {"A": _FLOAT, "kAligned": _ALIGNED}, 128, 0, 15, True, 4, 1),
    Budget("wide_columns_kernel", {"A": _FLOAT, "kAligned": _EDGED}, 128, 0, 25),
    Budget("wide_columns_kernel", {"A": _DOUBLE}, 128, 0, 60),
)

# ---- Work at the standard sizes.


@dataclass(frozen=True)
class Work:
    """What a kernel has to do once: the larger of the times for its bytes and its operations is the floor."""

    title: str
    kernel: str
    when: Mapping[str, str]
    items: int  # rows, or images
    elements: int  # per item: columns, or values
    bytes: int  # per item, read and written
    exponentials: int  # per item


IMAGENET, CIFAR = 1_281_167, 50_000


def solver(columns: int, type: str, mapping: str, labels: bool = False) -> Work:
    """One fused pass: the logits once; per row 4 bytes each of reference, log-sum-exp and, where asked for, label."""
    return Work(
        f"fused pass, K = {columns:,}, {type}" + (", labels" if labels else ""),
        "fused_kernel",
        {"T": type, "Mapping": mapping, "kAligned": "true", "kLabels": str(labels).lower()},
        IMAGENET,
        columns,
        columns * SIZES[type] + 8 + 4 * labels,
        columns,
    )


def wide(kernel: str, columns: int, type: str) -> Work:
    """One of the two passes over rows that no block can hold: the logits once, 16 bytes of scratch per row."""
    return Work(
        f"{kernel.removesuffix('_kernel').replace('_', ' ')}, K = {columns:,}, {type}",
        kernel,
        {"T": type, "A": "float", "kAligned": "true"},
        IMAGENET,
        columns,
        columns * SIZES[type] + 16 + 8 * (kernel == "wide_rows_kernel"),
        columns,
    )


WORK = (
    solver(3000, "half", "WideBlock"),
    solver(3000, "half", "WideBlock", labels=True),
    solver(3000, "float", "WideBlock"),
    solver(1000, "half", "OneBlock"),
    solver(128, "half", "OneWarp"),
    wide("wide_rows_kernel", 10_000, "half"),
    wide("wide_columns_kernel", 10_000, "half"),
)
