"""Reads what nvdisasm prints: instructions, basic blocks, loops, and the straight way through a kernel's hot loop.

Note [The hot loop]. A kernel does its work in one loop that holds the marker instruction (an exponential, say) once per
element. Which of the loop's instructions are issued in the ordinary case is found from the control flow alone:

1. The hot loop is an innermost one of the loops that hold enough markers for the elements of one turn; of several
   (a second one may do with care what the first could not) the one whose turn is the cheapest.
2. The cheapest way from its head to its end that passes that many markers goes around everything that is there for the
   rare case: a careful fallback after a failed test, a slow division, a row's edge. Calls count as very expensive.
3. What synchronises or exponentiates off that way (exponentials, shuffles, votes, barriers, calls) marks a fallback;
   blocks that do so are closed.
4. Of the ways that are left, the one that loads most is the straight way, where loads under a predicate count half: it
   takes the full 16-byte loads where the edge of a row has guarded narrow ones, and reads what the kernel can be given.
   Of ways that load as much, it is the one with the most multiplications and additions in one: a row that is left out
   saves the sums of its columns, which is not the ordinary case.

Branches for a diverged warp (BRA.DIV) are not followed, those for a converged one (BRA.CONV) are. An inner loop on the
way is counted once; loops over shared memory are reported by themselves, since their turns depend on the block's size.
The busy way is the longest one past closed blocks and past loads that the straight way has not: the straight way and
the bookkeeping that is left to one thread of a row (logarithms, stores), which its warp issues and no other. The
marking way is the longest one that also takes what a warp does together off the straight way (the votes and the count
of a row's candidates): no calls, no further markers, no further loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

CALL_COST = 100_000  # instructions: no way with a call is taken where there is one without

_SECTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L_x_\d+|\$\S+|\.L_\d+):$")
_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+\{?\s*(?:@(?P<guard>!?U?P\w+)\s+)?(?P<op>[A-Z][A-Z0-9_.]*)(?P<rest>[^;]*);"
)
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)")
_REGISTER = re.compile(r"(?<![A-Z\w])R(\d+)\b")

# Instruction classes by the operation's first word, in the order in which they are asked.
CLASSES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("mufu", re.compile(r"MUFU$")),
    (
        "memory",
        re.compile(r"(LD|ST|LDG|STG|LDS|STS|LDSM|LDL|STL|LDGSTS|LDC|LDCU|ULDC|ATOM|ATOMG|ATOMS|RED|REDG|CCTL)$"),
    ),
    ("shuffle", re.compile(r"(SHFL|VOTE|VOTEU|MATCH|REDUX)$")),
    (
        "control",
        re.compile(
            r"(BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BAR|WARPSYNC|NOP|NANOSLEEP|YIELD|DEPBAR|LDGDEPBAR|MEMBAR|ERRBAR"
            r"|KILL|ENDCOLLECTIVE|BMOV|ACQBULK|CGAERRBAR|UCGABAR_\w+)$"
        ),
    ),
    ("fp64", re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)$")),
    (
        "fp32",
        re.compile(
            r"(FADD|FMUL|FFMA|FADD2|FMUL2|FFMA2|FSETP|FSEL|FMNMX|FMNMX3|FSET|FCHK|FSWZADD|HADD2|HMUL2|HFMA2|HMNMX2|HSETP2"
            r"|F2F|F2FP|F2I|I2F|I2FP|FRND)$"
        ),
    ),
)
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@!P0 BRA `(.L_x_1)` has guard "!P0", op "BRA", rest " `(.L_x_1) "."""

    op: str
    guard: str = ""
    rest: str = ""

    @cached_property
    def name(self) -> str:
        """The operation without its modifiers: LDG of LDG.E.128."""
        return self.op.split(".", 1)[0]

    @cached_property
    def kind(self) -> str:
        """Its class; what is in none of CLASSES works on integers or moves registers."""
        return next((name for name, pattern in CLASSES if pattern.match(self.name)), "integer")

    @cached_property
    def bytes(self) -> int:
        """Bytes that a load or store moves per thread (4 unless its modifiers say otherwise)."""
        return next((_WIDTHS[word] for word in self.op.split(".")[1:] if word in _WIDTHS), 4)

    @cached_property
    def target(self) -> str | None:
        found = _TARGET.search(self.rest)
        return found["label"] if found else None

    @cached_property
    def global_load(self) -> bool:
        return self.name in ("LDG", "LDGSTS")

    @cached_property
    def local_memory(self) -> bool:
        return self.name in ("LDL", "STL")

    @cached_property
    def collective(self) -> bool:
        """What only a whole warp or block does together, or what belongs to a slow case."""
        return self.name in ("SHFL", "VOTE", "BAR", "WARPSYNC", "CALL", "MATCH", "REDUX", "BRX")

    @cached_property
    def pending(self) -> int | None:
        """Groups of asynchronous copies that a wait lets pend."""
        found = re.match(r"\s*SB\d+,\s*(0x[0-9a-f]+|\d+)", self.rest) if self.name == "DEPBAR" else None
        return int(found[1], 0) if found else None

    @cached_property
    def registers(self) -> frozenset[int]:
        return frozenset(int(number) for number in _REGISTER.findall(self.rest))

    @cached_property
    def loaded(self) -> frozenset[int]:
        """Registers that a global load fills."""
        first = _REGISTER.search(self.rest)
        if self.name != "LDG" or first is None:
            return frozenset()
        return frozenset(range(int(first[1]), int(first[1]) + max(1, self.bytes // 4)))


@dataclass
class Block:
    """A basic block: instructions, and the blocks that may come next."""

    labels: list[str] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass
class Function:
    """One kernel: its mangled name and its blocks, in the order of their addresses; the first is the entry."""

    name: str
    blocks: list[Block]

    @cached_property
    def code(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block.code]

    @cached_property
    def loops(self) -> list[Loop]:
        return _loops(self.blocks)


@dataclass(frozen=True)
class Loop:
    """A natural loop: its head, the blocks whose last branch goes back to it, and all of its blocks."""

    head: int
    ends: frozenset[int]
    blocks: frozenset[int]


def functions(text: str) -> list[Function]:
    """The kernels in the output of `nvdisasm -c`."""
    found: list[Function] = []
    name: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        section = _SECTION.match(line)
        if section or line.startswith("//----"):
            if name is not None:
                found.append(_function(name, lines))
            name, lines = (section[1], []) if section else (None, [])
        elif name is not None:
            lines.append(line)
    if name is not None:
        found.append(_function(name, lines))
    return found


def _function(name: str, lines: Iterable[str]) -> Function:
    blocks = [Block()]
    for line in lines:
        label = _LABEL.match(line)
        if label:
            if blocks[-1].code:
                blocks.append(Block())
            blocks[-1].labels.append(label[1])
            continue
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        instruction = Instruction(found["op"], found["guard"] or "", found["rest"])
        blocks[-1].code.append(instruction)
        if instruction.name in ("BRA", "BRX", "JMP", "EXIT", "RET", "BSYNC", "BREAK"):
            blocks.append(Block())
    if not blocks[-1].code:
        blocks.pop()
    _connect(blocks)
    return Function(name, blocks)


def _connect(blocks: list[Block]) -> None:
    """Fills in which blocks may come next."""
    at = {label: number for number, block in enumerate(blocks) for label in block.labels}
    meeting: dict[str, str] = {}  # reconvergence register -> label, of the last BSSY above
    for number, block in enumerate(blocks):
        for instruction in block.code:
            if instruction.name == "BSSY" and instruction.target:
                meeting[instruction.rest.split(",")[0].strip()] = instruction.target
        after = number + 1 if number + 1 < len(blocks) else None
        last = block.code[-1] if block.code else Instruction("NOP")
        falls, jumps = True, None
        if last.name in ("BRA", "JMP"):
            modifier = last.op.split(".")[1:]
            if "DIV" in modifier:
                jumps = None
            elif "CONV" in modifier:
                falls, jumps = False, last.target
            else:
                jumps = last.target
                falls = bool(last.guard) or last.rest.split("`")[0].strip() not in ("", "UPT,", "PT,")
        elif last.name == "BSYNC" and not last.guard:
            jumps = meeting.get(last.rest.strip())
            falls = jumps is None
        elif last.name in ("EXIT", "RET"):
            falls = bool(last.guard)
        if jumps in at:
            block.next.append(at[jumps])
        if falls and after is not None and after not in block.next:
            block.next.append(after)


def _loops(blocks: Sequence[Block]) -> list[Loop]:
    """Natural loops, innermost (fewest blocks) first."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].next))]
    while stack:
        number, successors = stack[-1]
        for successor in successors:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(blocks[successor].next)))
                break
        else:
            order.append(number)
            stack.pop()
    order.reverse()
    rank = {number: place for place, number in enumerate(order)}
    before: dict[int, list[int]] = {number: [] for number in order}
    for number in order:
        for successor in blocks[number].next:
            before[successor].append(number)

    # Immediate dominators (Cooper, Harvey, Kennedy: A simple, fast dominance algorithm).
    above: dict[int, int] = {0: 0}
    changed = True
    while changed:
        changed = False
        for number in order[1:]:
            known = [p for p in before[number] if p in above]
            new = known[0]
            for other in known[1:]:
                a, b = new, other
                while a != b:
                    while rank[a] > rank[b]:
                        a = above[a]
                    while rank[b] > rank[a]:
                        b = above[b]
                new = a
            if above.get(number) != new:
                above[number] = new
                changed = True

    def dominates(a: int, b: int) -> bool:
        while rank[b] > rank[a]:
            b = above[b]
        return a == b

    ends: dict[int, set[int]] = {}
    for number in order:
        for successor in blocks[number].next:
            if dominates(successor, number):
                ends.setdefault(successor, set()).add(number)
    loops = []
    for head, tails in ends.items():
        body, work = {head}, list(tails)
        while work:
            number = work.pop()
            if number not in body:
                body.add(number)
                work.extend(before[number])
        loops.append(Loop(head, frozenset(tails), frozenset(body)))
    return sorted(loops, key=lambda loop: (len(loop.blocks), loop.head))


@dataclass
class HotLoop:
    """The straight way through a kernel's hot loop, see Note [The hot loop]."""

    code: list[Instruction]  # one turn, in the order of issue
    busy: list[Instruction]  # the same where a thread also keeps the books of its row
    shared_loops: list[list[Instruction]]  # loops over shared memory, one turn each
    marking: list[Instruction] = field(default_factory=list)  # the same with what only some warps do together
    waits: frozenset[int] = frozenset()  # groups of copies that waits in the loop let pend, those off the way too

    def count(self, kind: str) -> int:
        return sum(instruction.kind == kind for instruction in self.code)

    def counted(self, marker: re.Pattern[str]) -> int:
        return sum(bool(marker.match(instruction.op)) for instruction in self.code)

    @cached_property
    def global_loads(self) -> list[Instruction]:
        return [instruction for instruction in self.code if instruction.global_load]

    def loads_in_flight(self, narrowest: int = 16, pending: int | None = None) -> int:
        """Most loads of at least `narrowest` bytes that are under way when one of them is first waited for.

        A register load is waited for where one of its registers is first named again; an asynchronous copy where
        DEPBAR lets only some groups pend: `pending` of them, if a wait in the loop does so, else what the straight way
        says. The loop is walked several times, for loads of the turns before.
        """
        under_way: list[frozenset[int]] = []
        most = copies = open_copies = 0
        groups: list[int] = []
        for instruction in self.code * 4:
            for place in range(len(under_way) - 1, -1, -1):
                if under_way[place] & instruction.registers:
                    most = max(most, len(under_way))
                    del under_way[: place + 1]
                    break
            if instruction.name == "LDG" and not instruction.guard and instruction.bytes >= narrowest:
                under_way.append(instruction.loaded)
            elif instruction.name == "LDGSTS" and instruction.bytes >= narrowest:
                open_copies += 1
            elif instruction.name == "LDGDEPBAR":
                groups.append(open_copies)
                open_copies = 0
            elif instruction.pending is not None:
                copies = max(copies, sum(groups) + open_copies)
                left = pending if pending in self.waits else instruction.pending
                groups = groups[len(groups) - left :] if left < len(groups) else groups
        return max(most, copies)


class HotLoopError(ValueError):
    """No loop of a kernel holds the markers that its work needs."""


def hot_loop(function: Function, marker: re.Pattern[str], markers: int) -> HotLoop:
    """The straight way through the innermost loop with at least `markers` instructions that match, in one turn."""
    ways: list[tuple[int, Loop, list[int]]] = []
    for loop in function.loops:  # the smallest first
        held = sum(bool(marker.match(i.op)) for number in loop.blocks for i in function.blocks[number].code)
        if held < markers or any(inner.blocks < loop.blocks for _, inner, _ in ways):
            continue
        way = _cheapest(function, loop, marker, markers)
        if way:
            ways.append((sum(_cost(function.blocks[number]) for number in way), loop, way))
    if not ways:
        raise HotLoopError(f"expected a loop with {markers} instructions {marker.pattern}, found none")
    _, loop, way = min(ways, key=lambda found: found[0])
    return _straight(function, loop, marker, markers, way)


def _cost(block: Block) -> int:
    return len(block.code) + CALL_COST * sum(i.name == "CALL" for i in block.code)


def _forward(function: Function, loop: Loop) -> tuple[list[int], dict[int, list[int]]]:
    """The loop's blocks from head to end, and which come next, without going back."""
    blocks = function.blocks
    state: dict[int, int] = {}
    order: list[int] = []
    ahead: dict[int, list[int]] = {number: [] for number in loop.blocks}
    stack = [(loop.head, iter(blocks[loop.head].next))]
    state[loop.head] = 1
    while stack:
        number, successors = stack[-1]
        for successor in successors:
            if successor not in loop.blocks or state.get(successor) == 1:
                continue
            ahead[number].append(successor)
            if successor not in state:
                state[successor] = 1
                stack.append((successor, iter(blocks[successor].next)))
                break
        else:
            state[number] = 2
            order.append(number)
            stack.pop()
    return order[::-1], ahead


def _best_way(
    function: Function,
    loop: Loop,
    marker: re.Pattern[str],
    markers: int,
    closed: frozenset[int],
    gain: dict[int, tuple[int, ...]],
) -> list[int]:
    """The way from head to end with the greatest sum of gains that passes `markers` markers; empty if there is none."""
    order, ahead = _forward(function, loop)
    own = {n: sum(bool(marker.match(i.op)) for i in function.blocks[n].code) for n in loop.blocks}
    Key = tuple[int, int]
    best: dict[Key, tuple[tuple[int, ...], Key | None]] = {}
    states: dict[int, set[int]] = {number: set() for number in loop.blocks}
    start = (loop.head, min(own[loop.head], markers))
    best[start] = (gain[loop.head], None)
    states[loop.head].add(start[1])
    for number in order:
        for passed in states[number]:
            value = best[number, passed][0]
            for successor in ahead[number]:
                if successor in closed:
                    continue
                key = (successor, min(passed + own[successor], markers))
                new = tuple(a + b for a, b in zip(value, gain[successor], strict=True))
                if key not in best or new > best[key][0]:
                    best[key] = (new, (number, passed))
                    states[successor].add(key[1])
    finals = [(end, markers) for end in loop.ends if (end, markers) in best]
    if not finals:
        return []
    at: Key | None = max(finals, key=lambda key: best[key][0])
    way = []
    while at is not None:
        way.append(at[0])
        at = best[at][1]
    return way[::-1]


def _cheapest(function: Function, loop: Loop, marker: re.Pattern[str], markers: int) -> list[int]:
    gain = {number: (-_cost(function.blocks[number]),) for number in loop.blocks}
    return _best_way(function, loop, marker, markers, frozenset(), gain)


def _straight(function: Function, loop: Loop, marker: re.Pattern[str], markers: int, cheapest: list[int]) -> HotLoop:
    blocks = function.blocks
    closed = frozenset(
        number
        for number in loop.blocks.difference(cheapest)
        if any(i.collective or marker.match(i.op) for i in blocks[number].code)
    )
    # Where rows come by 16 bytes, narrower loads under a predicate are those of a row's end: not the straight way.
    wide = any(i.global_load and i.bytes >= 16 for number in loop.blocks for i in blocks[number].code)

    def worth(i: Instruction) -> int:
        if not i.guard:
            return 2 * i.bytes
        return 0 if wide and i.bytes < 16 else i.bytes

    gain = {
        number: (
            sum(worth(i) for i in blocks[number].code if i.global_load),
            sum(i.name in ("FFMA", "DFMA") for i in blocks[number].code),
            -_cost(blocks[number]),
        )
        for number in loop.blocks
    }
    way = _best_way(function, loop, marker, markers, closed, gain)

    # What can be reached from the head, and can reach an end, without passing a closed block.
    _, ahead = _forward(function, loop)
    forth = _reach([loop.head], ahead, closed)
    back: dict[int, list[int]] = {number: [] for number in loop.blocks}
    for number, successors in ahead.items():
        for successor in successors:
            back[successor].append(number)
    live = forth & _reach([n for n in loop.ends if n not in closed], back, closed)
    loads = {n for n in live.difference(way) if any(i.global_load for i in blocks[n].code)}
    longest = {number: (len(blocks[number].code),) for number in loop.blocks}
    busy = _best_way(function, loop, marker, markers, closed | (loop.blocks - live) | loads, longest)
    rare = frozenset(
        number
        for number in loop.blocks.difference(way)
        if any(i.name in ("CALL", "BRX") or i.global_load or marker.match(i.op) for i in blocks[number].code)
    )
    marking = _best_way(function, loop, marker, markers, rare, longest)
    shared = []
    for inner in function.loops:
        if inner.head != loop.head and inner.blocks <= live:
            turn = _cheapest(function, inner, marker, 0)
            code = [i for number in turn for i in blocks[number].code]
            if any(i.name == "LDS" for i in code):
                shared.append(code)
    code, all_code, marks = ([i for number in numbers for i in blocks[number].code] for numbers in (way, busy, marking))
    waits = {i.pending for number in live for i in blocks[number].code if i.pending is not None}
    return HotLoop(code, all_code, shared, marks, frozenset(waits))


def _reach(start: Iterable[int], ahead: dict[int, list[int]], closed: frozenset[int]) -> set[int]:
    seen = set(start)
    work = list(seen)
    while work:
        for successor in ahead[work.pop()]:
            if successor not in seen and successor not in closed:
                seen.add(successor)
                work.append(successor)
    return seen
