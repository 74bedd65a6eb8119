"""What every CUDA kernel may use and must do, and the work it has at the standard sizes: data for gpu_static.py.

A kernel without a budget is an error there, so a new kernel gets its line here in the same change. Numbers are the most
that any shipped architecture's code needs, with little room above: who needs more raises them and says why.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
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

SIZES = {"half": 2, "bfloat16": 2, "Fixed16": 2, "float": 4, "double": 8}
EXPONENTIAL = re.compile(r"MUFU\.EX2")
DOUBLE_EXPONENTIAL = re.compile(r"DFMA")  # exp() of a double is a polynomial: at least 8 of these
DOUBLE_TERMS = 8
SCORE = re.compile(r"FFMA\.FTZ")  # one per score of the candidate search


@dataclass(frozen=True)
class Shape:
    """How a kernel is launched and what one turn of its hot loop handles, per thread."""

    threads: int  # per block, at its widest
    rows: int = 1
    columns: int = 1
    size: int = 2  # bytes of an element
    warps_per_group: int = 1  # warps that share a row
    stage: int = 0  # bytes per thread of rows on their way in dynamic shared memory
    slots: int = 0  # two such stages where a block needs no more bytes than that for them, otherwise one
    fixed: int = 0  # bytes of dynamic shared memory besides

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    def stages(self, threads: int) -> int:
        return 2 if 2 * self.stage * threads <= self.slots else 1

    def dynamic(self, threads: int) -> int:
        """Bytes of dynamic shared memory of a block."""
        return self.fixed + self.stage * threads * self.stages(threads)


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
    stack: int = 0  # bytes that a thread may keep in local memory, outside the hot loop
    wide_stores: int = 0  # stores of 16 bytes in the code, at least
    marker: re.Pattern[str] | None = None  # what the hot loop holds once per element; None: an exponential
    marking: float | None = None  # instructions where every warp marks candidates; None: nothing is marked

    def covers(self, kernel: str, arguments: Mapping[str, str]) -> bool:
        return kernel == self.kernel and all(arguments.get(name) in values for name, values in self.when.items())


# ---- Constants of the kernels' headers, so that shapes have one home.

_TOKEN = re.compile(
    r"\s*(?:sizeof\(\s*(?P<sizeof>\w+)\s*\)|static_cast<\w+>|(?P<name>[A-Za-z_]\w*)|(?P<number>\d+)"
    r"|(?P<sign>&&|\|\||==|!=|<=|>=|<<|>>|[-+*/%<>?:()!]))"
)
_LEVELS = (("||",), ("&&",), ("==", "!="), ("<", ">", "<=", ">="), ("<<", ">>"), ("+", "-"), ("*", "/", "%"))
_SIGNS: dict[str, Callable[[int, int], int]] = {
    "||": lambda a, b: bool(a or b),
    "&&": lambda a, b: bool(a and b),
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
    "%": operator.mod,
}


class Constants:
    """The `constexpr` integers in C++ text, alone and in structs, whose values may depend on template parameters."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        struct = re.compile(r"struct (\w+) \{(.*?)\n\};", re.DOTALL)
        self._structs = {found[1]: self._named(found[2]) for found in struct.finditer(text)}
        self._alone = self._named(struct.sub("", text))

    @staticmethod
    def _named(text: str) -> dict[str, str]:
        """{name: expression} of `constexpr int kA = 1, kB = 2;`."""
        declarations = re.findall(r"constexpr \w+ ([^;{}]*);", text)
        return dict(
            re.findall(r"\b(k[A-Z]\w*) = (.*?)(?=, k[A-Z]\w* = |,\s+k[A-Z]\w* = |$)", "\n".join(declarations), re.M)
        )

    def value(self, name: str, given: Mapping[str, int], struct: str = "") -> int:
        """A constant's value, where `given` has the template parameters: bytes of types, numbers of values.

        Raises:
            KeyError: no such constant in the text, or its expression is beyond this reader.
        """
        text = self._structs.get(struct, {}).get(name) or self._alone.get(name)
        if text is None:
            where = f"struct {struct}" if struct else "the kernels' headers"
            raise KeyError(f"expected constexpr {name} in {where}, found none: correct bench/gpu_budgets.py")
        tokens: list[tuple[str, str]] = []
        at = 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if not found:
                raise KeyError(f"{name}: expected integers and template parameters, found {text[at:].strip()!r}")
            at = found.end()
            if found.lastgroup:
                tokens.append((found.lastgroup, found[found.lastgroup]))
        result = self._choice(tokens, given, struct)
        if tokens:
            raise KeyError(f"{name}: expected an end after {result}, found {tokens[0][1]!r}")
        return result

    def _choice(self, tokens: list[tuple[str, str]], given: Mapping[str, int], struct: str) -> int:
        condition = self._level(0, tokens, given, struct)
        if not tokens or tokens[0][1] != "?":
            return condition
        tokens.pop(0)
        yes = self._choice(tokens, given, struct)
        tokens.pop(0)  # the colon
        no = self._choice(tokens, given, struct)
        return yes if condition else no

    def _level(self, level: int, tokens: list[tuple[str, str]], given: Mapping[str, int], struct: str) -> int:
        if level == len(_LEVELS):
            return self._operand(tokens, given, struct)
        left = self._level(level + 1, tokens, given, struct)
        while tokens and tokens[0][1] in _LEVELS[level]:
            sign = tokens.pop(0)[1]
            right = self._level(level + 1, tokens, given, struct)
            left = int(_SIGNS[sign](left, right))
        return left

    def _operand(self, tokens: list[tuple[str, str]], given: Mapping[str, int], struct: str) -> int:
        kind, word = tokens.pop(0)
        if kind == "number":
            return int(word)
        if kind == "sizeof":
            return given[word]
        if kind == "name":
            if word in ("true", "false"):
                return int(word == "true")
            return given[word] if word in given else self.value(word, given, struct)
        if word == "(":
            inside = self._choice(tokens, given, struct)
            tokens.pop(0)  # the closing one
            return inside
        if word == "!":
            return int(not self._operand(tokens, given, struct))
        raise KeyError(f"expected a number or a name, found {word!r}")


# Newton's and Anderson's methods: the constant of each kernel's threads.
NEWTON_THREADS = {
    "anderson_kernel": "kAndersonThreads",
    "newton_rows_kernel": "kNewtonRowThreads",
    "newton_columns_kernel": "kNewtonColumnThreads",
    "newton_count_kernel": "kNewtonCountThreads",
    "newton_compact_kernel": "kNewtonCountThreads",
}


def shape(kernel: str, arguments: Mapping[str, str], constants: Constants) -> Shape:
    """How a kernel is launched: what its launcher does, said once more. Threads are those of its widest rows.

    Raises:
        KeyError: a kernel without a rule here, or a constant that is no longer in the headers.
    """
    given = {name: SIZES.get(value, int(value == "true")) for name, value in arguments.items()}
    size = given.get("T", 4)
    if kernel == "fused_kernel":
        mapping = arguments["Mapping"]
        threads, rows, columns, one_warp = (
            constants.value(name, given, mapping) for name in ("kThreads", "kRows", "kColumns", "kOneWarp")
        )
        slots = constants.value("kSlotBytes", given) if given["kAligned"] else 0
        return Shape(threads, rows, columns, size, 1 if one_warp else threads // 32, rows * columns * size, slots)
    if kernel in ("wide_rows_kernel", "wide_columns_kernel"):
        name = "kWideThreads" if kernel == "wide_rows_kernel" else "kWideColumnThreads"
        threads, rows, columns = (constants.value(name, given) for name in (name, "kWideRows", "kWideColumns"))
        return Shape(threads, rows, columns, size, threads // 32)
    if kernel == "candidates_kernel":
        return Shape(constants.value("kCandidateThreads", given), size=size)
    if kernel == "store_kernel":
        return Shape(constants.value("kStoreThreads", given), size=size)
    if kernel == "reference_kernel":
        return Shape(constants.value("kReferenceThreads", given), size=4)
    if kernel in ("lists_kernel", "margin_rows_kernel"):
        columns = constants.value("kPiecesUnderWay", given) * 16 // size
        return Shape(constants.value("kListThreads", given), columns=columns, size=size)
    if kernel in ("margin_columns_kernel", "margin_merge_kernel"):
        return Shape(constants.value("kListThreads", given), size=size)
    if kernel == "augment_kernel":
        # lay_out(32, 32, 32, channels).bytes
        fixed = {"3": 17_440, "1": 7_200}[arguments["kChannels"]]
        return Shape(constants.value("kThreads", given), size=size, fixed=fixed)
    if kernel == "sample_kernel":
        return Shape(constants.value("kSampleThreads", given))
    if kernel in NEWTON_THREADS:
        return Shape(constants.value(NEWTON_THREADS[kernel], given), size=8)
    if kernel in ("tables_kernel", "entropy_kernel", "transform_kernel"):
        name = {"tables_kernel": "kTablesThreads", "entropy_kernel": "kEntropyThreads"}
        return Shape(constants.value(name.get(kernel, "kTransformThreads"), given), size=1)
    if kernel == "plan_kernel":
        return Shape(constants.value("kPlanThreads", given))
    if kernel in ("tile_kernel", "colour_kernel", "tone_kernel", "blur_kernel", "last_kernel", "sobel_kernel"):
        return Shape(constants.value("kLargeThreads", given))
    raise KeyError(f"{kernel}: expected a rule for its shape in bench/gpu_budgets.py, found none: add one")


# Architectures without asynchronous copies: loads go through registers, their number in flight has no budget.
NO_ASYNC_COPIES = ("75",)

_HALVES, _FLOAT, _DOUBLE, _FIXED = ("half", "bfloat16"), ("float",), ("double",), ("Fixed16",)
_ALIGNED, _EDGED = ("true",), ("false",)


def _fused(
    mapping: str, types: tuple[str, ...], shared: int, plain: float, labels: float, marking: float, in_flight: int
) -> list[Budget]:
    """Rows that begin at multiples of 16 bytes; per row there is also its reference to load."""
    return [
        Budget(
            "fused_kernel",
            {"Mapping": (mapping,), "T": types, "kAligned": _ALIGNED, "kFull": (full,)},
            registers=128,
            shared=shared,
            instructions=instructions,
            wide_loads=True,
            other_loads=1,
            in_flight=in_flight,
            stack=16 if full == "true" and mapping != "OneWarp" else 0,  # sm_75, sm_100; outside the loop
            marking=marking if full == "true" else None,
        )
        for full, instructions in (("false", plain), ("true", labels))
    ]


# Images of any size. kSource: 0 RGB, 1 one channel, 2 planes, 3 planes at full resolution. Blocks of RGB are to be four
# at a time, which takes 64 registers: sm_86 keeps two of them in local memory, outside the loops over inputs.
LARGE_IMAGES = (
    Budget("plan_kernel", {}, 64, 0),
    Budget("tile_kernel", {"kSource": ("0",)}, 64, 29_472, stack=8),
    Budget("tile_kernel", {"kSource": ("1",)}, 80, 12_832),
    Budget("tile_kernel", {"kSource": ("2",)}, 128, 38_432),
    Budget("tile_kernel", {"kSource": ("3",)}, 80, 29_472),
    Budget("colour_kernel", {"kChannels": ("3",)}, 80, 3_088, wide_stores=3),
    Budget("colour_kernel", {"kChannels": ("1",)}, 80, 1_040, wide_stores=1),
    Budget("tone_kernel", {}, 48, 2_064, stack=24),
    Budget("blur_kernel", {}, 48, 16),
    Budget("last_kernel", {}, 64, 16),
    Budget("sobel_kernel", {}, 40, 0),
)

BUDGETS = (
    # The 1.25 KiB (a warp's own: 5) are the rows of a tile, which are finished together. Fixed point costs five
    # instructions more: no conversion to float is as fast as that of half.
    *_fused("OneWarp", _FIXED, 5120, 23, 30, 36, in_flight=8),
    *_fused("OneBlock", _FIXED, 1664, 25, 33, 39, in_flight=8),
    *_fused("WideBlock", _FIXED, 2048, 22.5, 26.5, 30.5, in_flight=4),
    *_fused("OneWarp", _HALVES, 5120, 17, 25, 30.5, in_flight=8),
    *_fused("OneWarp", _FLOAT, 5120, 20, 28, 34.5, in_flight=8),
    *_fused("OneBlock", _HALVES, 1664, 19.5, 27.5, 33, in_flight=8),
    *_fused("OneBlock", _FLOAT, 1664, 23, 30.5, 37, in_flight=8),
    *_fused("WideBlock", _HALVES, 2048, 17, 21, 24.5, in_flight=4),
    *_fused("WideBlock", _FLOAT, 2048, 19.5, 23.5, 28, in_flight=4),
    # Unaligned rows come value by value: for correctness, not for speed.
    Budget("fused_kernel", {"kAligned": _EDGED, "Mapping": ("WideBlock",)}, 128, 1664, 50, stack=16),
    Budget("fused_kernel", {"kAligned": _EDGED, "Mapping": ("OneBlock",)}, 128, 1472, 63),
    Budget("fused_kernel", {"kAligned": _EDGED}, 128, 5120, 63),
    # Potentials (eight of 8 bytes per turn) come from the second-level cache. Where loads were not to be held apart
    # from their conversion (16-bit types on sm_100 and sm_120), many warps hide it.
    Budget("wide_rows_kernel", {"A": _FLOAT, "kAligned": _ALIGNED}, 128, 768, 19, True, 8, in_flight=1),
    Budget("wide_rows_kernel", {"A": _FLOAT, "kAligned": _EDGED}, 128, 384, 29),
    Budget("wide_columns_kernel", {"A": _FLOAT, "kAligned": _ALIGNED}, 128, 0, 20, True, 4, in_flight=1),
    Budget("wide_columns_kernel", {"A": _FLOAT, "kAligned": _EDGED}, 128, 0, 28),
    # exp() of a double is a polynomial; sm_120 has next to no units for doubles, and waits in between (NOP).
    Budget("wide_rows_kernel", {"A": _DOUBLE}, 168, 384, 140),
    Budget("wide_columns_kernel", {"A": _DOUBLE}, 128, 0, 134),
    # A few marked runs a row, or none: nothing in it is worth counting.
    Budget("candidates_kernel", {"A": _FLOAT}, 64, 0),
    Budget("candidates_kernel", {"A": _DOUBLE}, 80, 0, stack=8),  # sm_100
    Budget("reference_kernel", {}, 32, 0),
    # The candidate search: a row per warp; 96 registers, so that 20 warps have 40 KB under way. Prices and bonus, of 4
    # bytes each, come from the first-level cache by loads of 16 bytes, too. What follows the sweep is per row.
    *(
        Budget("lists_kernel", {"T": types}, 96, 6144, instructions, True, 0, in_flight=4, marker=SCORE)
        for types, instructions in ((_HALVES, 12.5), (_FLOAT, 14.0))
    ),
    Budget("lists_kernel", {"T": _DOUBLE}, 96, 6144),
    *(
        Budget("margin_rows_kernel", {"T": types}, 96, 0, instructions, True, 0, in_flight=4, marker=SCORE)
        for types, instructions in ((_HALVES, 9.0), (_FLOAT, 9.5))
    ),
    Budget("margin_rows_kernel", {"T": _DOUBLE}, 80, 0),
    Budget("margin_columns_kernel", {}, 64, 0),
    Budget("margin_merge_kernel", {}, 48, 0),
    # Two sweeps with a choice of the kind in the second: at most half of its slots are needed beside its memory.
    Budget("store_kernel", {"kAligned": _ALIGNED}, 80, 128, wide_stores=1),
    # Of unaligned rows of 16 bits, sm_80 and sm_86 put one number aside.
    Budget("store_kernel", {}, 80, 128, stack=8),
    # 64 registers: eight blocks of 128 threads.
    Budget("augment_kernel", {"kChannels": ("3",)}, 64, 0, wide_stores=3),
    Budget("augment_kernel", {"kChannels": ("1",)}, 64, 0, wide_stores=1),
    Budget("sample_kernel", {}, 56, 0),
    # Newton's method. Rows: no loop of a known length per entry; six blocks of 128 threads hide the latency of the
    # second-level cache. Columns: one block, whose registers cost nothing.
    Budget("anderson_kernel", {}, 128, 3600),
    Budget("newton_rows_kernel", {}, 80, 32),
    Budget("newton_columns_kernel", {}, 128, 512),
    Budget("newton_count_kernel", {}, 40, 0),
    Budget("newton_compact_kernel", {}, 40, 0),
    # JPEG. sm_75 has no asynchronous copies: what copies the tables there keeps many values at a time.
    Budget("tables_kernel", {}, 40, 0),
    Budget("entropy_kernel", {}, 88, 17_984),
    Budget("transform_kernel", {}, 48, 0),
    *LARGE_IMAGES,
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
    exponentials: int = 0  # per item
    issued: int = 0  # instructions of a warp per item, where no hot loop was found to count them
    marking: bool = False  # every warp has candidates


IMAGENET, CIFAR = 1_281_167, 50_000


def solver(columns: int, type: str, mapping: str, full: bool = False, marking: bool = False) -> Work:
    """One fused pass: the logits once; per row 4 bytes each of reference, log-sum-exp and, where asked for, label.

    Candidates are those of a row that has some in every warp: the worst case.
    """
    more = ", labels, candidates everywhere" if marking else ", labels" if full else ""
    return Work(
        f"fused pass, K = {columns:,}, {type}{more}",
        "fused_kernel",
        {"T": type, "Mapping": mapping, "kAligned": "true", "kFull": str(full).lower()},
        IMAGENET,
        columns,
        columns * SIZES[type] + 8 + 4 * full + (16 + columns * SIZES[type] // 128) * marking,
        columns,
        marking=marking,
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


# Per image of 32 x 32 RGB: the bytes in and the index, the image out; csrc/cuda/augment_kernels.cuh has the operations.
_RESIDENT = {"T": "half", "kChannels": "3", "kLast": "false"}

# Per RandomResizedCrop box of a photograph, as bench/jpeg_checkpoints.py counts them: bytes of the upload, coefficients
# cleared and read, samples out (the few bytes that are written of the coefficients stay in the second-level cache).
# Instructions: the turns that a warp takes, 253 symbols per entry of which the longest of 32 has 1.54 times as many,
# and about 120 in each, all its lanes' ways together; strips of four blocks.
_ENTRIES, _UPLOAD, _COEFFICIENTS, _SAMPLES = 287, 62_500, 476_000, 238_000
JPEG = (
    Work(
        "JPEG: entropy, box of a photograph",
        "entropy_kernel",
        {},
        CIFAR,
        _SAMPLES,
        _UPLOAD + _COEFFICIENTS,
        issued=int(_ENTRIES * 253 * 1.54 / 32) * 120,
    ),
    Work(
        "JPEG: transform, box of a photograph",
        "transform_kernel",
        {},
        CIFAR,
        _SAMPLES,
        _COEFFICIENTS + _SAMPLES,
        issued=_SAMPLES // 256 * 270,
    ),
)

# Two sweeps of about 15 and 22 instructions per entry, counted in the machine code by hand: 3,000 * 37 / 32.
_STORE = {"T": "float", "kAligned": "true"}

WORK = (
    solver(3000, "half", "WideBlock"),
    solver(3000, "half", "WideBlock", full=True),
    solver(3000, "half", "WideBlock", full=True, marking=True),
    solver(3000, "float", "WideBlock"),
    solver(1000, "half", "OneBlock"),
    solver(128, "half", "OneWarp"),
    Work("conversion to 16 bits, K = 3,000, float", "store_kernel", _STORE, IMAGENET, 3000, 3000 * 6 + 4, issued=3600),
    wide("wide_rows_kernel", 10_000, "half"),
    wide("wide_columns_kernel", 10_000, "half"),
    # Lists of 4 columns beside the label, padded to 10: 80 bytes; number, label, length and regret.
    *(
        Work(
            f"candidate lists, K = {columns:,}, {type}",
            "lists_kernel",
            {"T": type},
            IMAGENET,
            columns,
            columns * SIZES[type] + 20 + 80,
        )
        for columns, type in ((3000, "half"), (3000, "float"), (128, "half"))
    ),
    Work("augment 32 x 32, half", "augment_kernel", _RESIDENT, CIFAR, 3072, 3072 + 8 + 6144, issued=5700),
    # Per image of 224 x 224 RGB from a box of 300 x 300: instructions of a warp as augment_large_kernels.cuh and
    # docs/gpu.md add them up. The stage between the two launches is not counted: it stays in the cache.
    Work("tiles 224 x 224", "tile_kernel", {"kSource": "0"}, IMAGENET, 3 * 224**2, 3 * 300**2, issued=350_000),
    Work(
        "colours 224 x 224, half", "colour_kernel", {"kChannels": "3"}, IMAGENET, 3 * 224**2, 6 * 224**2, issued=90_000
    ),
    Work("sample parameters", "sample_kernel", {}, CIFAR, 1, 8 + 60, issued=1000 // 32),
    # Rows of 6 candidates: a product reads columns and plan; instructions from the disassembly, 8 lanes per row.
    Work("Newton, product, 6 entries a row", "newton_rows_kernel", {"G": "8"}, IMAGENET, 6, 6 * 8 + 8, issued=30),
    Work("Newton, pruning, 6 entries a row", "newton_compact_kernel", {}, IMAGENET, 6, 6 * 20 + 32, issued=4),
    *JPEG,
)
