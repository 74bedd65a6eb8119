"""Which small faults can be planted into a kernel's source: one rule per kind of fault, wherever it applies.

A rule looks at the source with comments, strings, preprocessor lines and template headers blanked out and yields edits
(start, end, replacement). It relies on the formatting that clang-format keeps: binary operators stand between blanks,
angle brackets of templates do not. The order of the mutants is that of the rules, then that of the places.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

EQUIVALENTS = Path(__file__).with_name("equivalents.json")

Key = tuple[str, str, str, str]
Edit = tuple[int, int, str]


@dataclass(frozen=True)
class Mutant:
    """One fault: text[start:end] of `file` becomes `replacement`."""

    file: str
    line: int
    function: str  # the enclosing function, "" outside
    rule: str
    start: int
    end: int
    replacement: str
    before: str  # the lines touched, without comments, blanks collapsed
    after: str

    @property
    def key(self) -> Key:
        """What says which mutant it is, wherever the line has moved to."""
        return self.rule, self.function, self.before, self.after

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.rule}: {self.before} -> {self.after}"

    def apply(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]


class Source:
    """A kernel file: `code` is `text` with everything blanked that no rule should touch, of the same length."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.code = blanked(text)
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]
        self._functions = list(functions(self.code))

    def line(self, at: int) -> int:
        return bisect_right(self._lines, at)

    def function(self, at: int) -> str:
        return next((name for start, end, name in self._functions if start <= at < end), "")

    def body(self, at: int) -> str:
        """The code of the enclosing function up to here."""
        return next((self.code[start:at] for start, end, _ in self._functions if start <= at < end), "")

    def mutant(self, rule: str, edit: Edit) -> Mutant:
        start, end, replacement = edit
        line_start = self.text.rfind("\n", 0, start) + 1
        line_end = self.text.find("\n", end)
        line_end = len(self.text) if line_end < 0 else line_end
        before = self.text[line_start:line_end]
        after = self.text[line_start:start] + replacement + self.text[end:line_end]
        where = (self.file, self.line(start), self.function(start))
        return Mutant(*where, rule, start, end, replacement, plain(before), plain(after))


def plain(lines: str) -> str:
    """Lines as they are compared: without comments, blanks collapsed."""
    return " ".join(re.sub(r"//[^\n]*", "", lines).split())


def blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def blanked(text: str) -> str:
    """The text without comments, strings, preprocessor lines, device-only branches, template headers, static_assert."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", lambda m: blank(m.group()), text, flags=re.DOTALL)
    # What g++ does not see: between `#if defined(__CUDA...)` or `#ifdef __CUDA...` and its #else or #endif.
    device = r"^[ \t]*#if[^\n]*__CUDA(?:_ARCH|CC)__.*?(?=^[ \t]*#(?:else|endif))"
    code = re.sub(device, lambda m: blank(m.group()), code, flags=re.DOTALL | re.MULTILINE)
    code = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: blank(m.group()), code, flags=re.MULTILINE)
    code = re.sub(r"\btemplate <[^{};]*?>(?=\s*\n)", lambda m: blank(m.group()), code)
    for head in ("static_assert", "__launch_bounds__", "throw"):
        for match in re.finditer(rf"\b{head}\b", code):
            end = code.index(";", match.start()) if head == "throw" else closing(code, code.index("(", match.start()))
            code = code[: match.start()] + blank(code[match.start() : end]) + code[end:]
    return code


def closing(code: str, opening: int) -> int:
    """Place behind the bracket that closes the one at `opening`."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    depth = 0
    for at in range(opening, len(code)):
        if code[at] == code[opening]:
            depth += 1
        elif code[at] == pairs[code[opening]]:
            depth -= 1
            if depth == 0:
                return at + 1
    raise ValueError(f"no closing bracket for {code[opening : opening + 40]!r}")


def functions(code: str) -> Iterator[tuple[int, int, str]]:
    """(start of the body, its end, name) of every function, those of structures too."""
    at = 0
    while (brace := code.find("{", at)) >= 0:
        head = code[max(code.rfind(mark, 0, brace) for mark in ";{}") + 1 : brace]
        at = brace + 1
        if re.search(r"\b(?:namespace|struct|class|union)\b", head):
            continue
        found = re.search(r"(\w+)\s*\(", head)
        if found:
            at = closing(code, brace)
            yield brace, at, found.group(1)


# ---- Parts of a source that several rules look at.


def for_headers(source: Source) -> Iterator[tuple[int, int]]:
    """Spans inside the parentheses of `for (a; b; c)`."""
    for match in re.finditer(r"\bfor \(", source.code):
        end = closing(source.code, match.end() - 1)
        if source.code.count(";", match.end(), end) == 2:
            yield match.end(), end - 1


def statements(source: Source) -> Iterator[tuple[int, int]]:
    """Spans of expression statements inside functions, with their semicolon; not declarations, not jumps."""
    code = source.code
    in_header: set[int] = set()
    for start, end in for_headers(source):
        in_header.update(range(start, end))
    begins = r"(?<=[;{}:)])(?=\s)|(?<=\belse)(?=\s)"
    for match in re.finditer(begins, code):
        start = match.end() + len(code[match.end() :]) - len(code[match.end() :].lstrip())
        if start in in_header or not source.function(start) or code[match.start() - 1] == ":":
            continue
        line = code[line_begin(code, start) : start]
        if code[match.start() - 1] == ")" and not re.search(r"\b(?:if|for|while)\b", line):
            continue
        end = code.find(";", start)
        span = code[start : end + 1]
        if end >= 0 and re.match(r"[A-Za-z_*(][^{}]*;$", span) and span.count("(") == span.count(")"):
            yield start, end + 1


def line_begin(code: str, at: int) -> int:
    """Start of the line of `at`, or of the line before where `at` is the first thing on its line."""
    begin = code.rfind("\n", 0, at) + 1
    return begin if code[begin:at].strip() else code.rfind("\n", 0, max(begin - 1, 0)) + 1


NO_EFFECT = re.compile(
    r"(?:const|constexpr|static|return|break|continue|using|union|auto|if|else|for|while|do|case|default|SELA_\w+)\b"
    r"|(?:[\w:<>]+[ *&]+)+\w+(?: = |\[|;|,|\(|\{)"  # a declaration
)


def effects(source: Source) -> Iterator[tuple[int, int]]:
    """Statements that change something: assignments and calls."""
    for start, end in sorted(set(statements(source))):
        code = source.code[start:end]
        if not NO_EFFECT.match(code) and re.search(r"[=(]|\+\+|--", code):
            yield start, end


def replace(pattern: str, text: str | Callable[[re.Match[str]], str]) -> Callable[[Source], Iterator[Edit]]:
    """The rule that rewrites every match of a pattern inside functions."""

    def rule(source: Source) -> Iterator[Edit]:
        for match in re.finditer(pattern, source.code):
            if source.function(match.start()):
                yield match.start(), match.end(), text(match) if callable(text) else match.expand(text)

    return rule


# ---- The rules.


def loop_bound(source: Source) -> Iterator[Edit]:
    """`i < n` of a for loop becomes `i <= n`, and `i < n - 1`."""
    for start, _ in for_headers(source):
        first = source.code.index(";", start) + 1
        second = source.code.index(";", first)
        match = re.search(r" < ", source.code[first:second])
        if match:
            yield first + match.start(), first + match.end(), " <= "
            yield second, second, " - 1"


def loop_start(source: Source) -> Iterator[Edit]:
    """A for loop starts one step late."""
    for start, end in for_headers(source):
        first = source.code.index(";", start)
        match = re.search(r" = (\w+)$", source.code[start:first])
        if match:
            step = re.search(r"\+= (\w+)$", source.code[start:end])
            yield first, first, f" + {step.group(1) if step else 1}"


def loop_step(source: Source) -> Iterator[Edit]:
    """A for loop with a stride skips every second piece."""
    for start, end in for_headers(source):
        match = re.search(r"\+= ([\w.]+)$", source.code[start:end])
        if match:
            yield start + match.start(1), start + match.end(1), f"2 * {match.group(1)}"


def comparison(source: Source) -> Iterator[Edit]:
    """Comparisons outside for headers admit or refuse the equal case, == and != change places."""
    headers: set[int] = set()
    for start, end in for_headers(source):
        headers.update(range(start, end))
    other = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
    for match in re.finditer(r" ([<>]=?|[=!]=) ", source.code):
        if match.start() not in headers and source.function(match.start()):
            yield match.start(1), match.end(1), other[match.group(1)]


def condition(source: Source) -> Iterator[Edit]:
    """An if that is always, or never, taken."""
    for match in re.finditer(r"\bif (?:constexpr )?\(", source.code):
        end = closing(source.code, match.end() - 1) - 1
        inside = source.text[match.end() : end]
        yield match.end(), end, f"true || ({inside})"
        yield match.end(), end, f"false && ({inside})"


def choice(source: Source) -> Iterator[Edit]:
    """`c ? a : b` always takes a, or always b."""
    code = source.code
    for match in re.finditer(r" \? ", code):
        depth, at = 0, match.start()
        while depth >= 0 and at > 0:
            at -= 1
            if code[at] in ")]}":
                depth += 1
            elif code[at] in "([{":
                depth -= 1
            elif depth == 0 and (
                code[at] in ",;" or code[at - 1 : at + 2] in (" = ", " : ", " ? ") or code[at - 5 : at + 1] == "return"
            ):
                break
        start = at + 1
        start += len(code[start:]) - len(code[start:].lstrip())
        # The types of both sides stay in the expression, so that it compiles as before.
        yield start, match.start(), f"(true || ({source.text[start : match.start()]}))"
        yield start, match.start(), f"(false && ({source.text[start : match.start()]}))"


def lost_statement(source: Source) -> Iterator[Edit]:
    """An assignment or a call is gone (barriers and waits have rules of their own)."""
    for start, end in effects(source):
        if not re.match(r"__sync|copy_async_(?:wait|commit)", source.code[start:end]):
            yield start, end, ";"


def plain_add(source: Source) -> Iterator[Edit]:
    """An atomic addition becomes an ordinary one."""
    for match in re.finditer(r"\batomicAdd\(", source.code):
        end = closing(source.code, match.end() - 1)
        depth = 0
        for at in range(match.end(), end):
            depth += (source.code[at] in "([{") - (source.code[at] in ")]}")
            if source.code[at] == "," and depth == 0:
                pointer, value = source.text[match.end() : at], source.text[at + 1 : end - 1].strip()
                yield match.start(), end, f"*({pointer}) += {value}"
                break


def warp_calls(source: Source) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Start of every shuffle or vote, and the spans of its arguments."""
    for match in re.finditer(r"\b__(?:shfl\w*|ballot|any|all)_sync\(", source.code):
        spans, begin, depth = [], match.end(), 0
        for at in range(match.end(), closing(source.code, match.end() - 1)):
            depth += (source.code[at] in "([{") - (source.code[at] in ")]}")
            if (source.code[at] == "," and depth == 0) or depth < 0:
                spans.append((begin, at))
                begin = at + 2
        yield match.start(), spans


def lane_mask(source: Source) -> Iterator[Edit]:
    """A shuffle or vote without the last lane in its mask."""
    for _, ((start, end), *_others) in warp_calls(source):
        yield start, end, f"({source.text[start:end]} >> 1)"


def no_exchange(source: Source) -> Iterator[Edit]:
    """A shuffle gives a thread its own value back."""
    for start, spans in warp_calls(source):
        if source.code.startswith("__shfl", start):
            yield start, spans[-1][1] + 1, f"({source.text[slice(*spans[1])]})"


def late_reduction(source: Source) -> Iterator[Edit]:
    """A reduction by halves starts with a quarter."""
    for start, end in for_headers(source):
        match = re.search(r" = ([\w ]+(?: / 2)?);.* /= 2$", source.code[start:end])
        if match:
            yield start + match.start(1), start + match.end(1), f"{match.group(1)} / 2"


def early_end(source: Source) -> Iterator[Edit]:
    """A reduction by halves leaves its last step out."""
    for start, end in for_headers(source):
        match = re.search(r" > 0; \w+ /= 2$", source.code[start:end])
        if match:
            yield start + match.start(), start + match.start() + len(" > 0"), " > 1"


def constant(source: Source) -> Iterator[Edit]:
    """A constant that is not 0: numbers with a point double, sizes at namespace level grow by one."""
    for match in re.finditer(r"(?<![\w.])(?:\d+\.\d*|\d+(?=e-?\d))(?:e-?\d+)?f?(?![\w.])", source.code):
        number = match.group().rstrip("f")
        if float(number) != 0.0:
            yield match.start(), match.end(), f"(2 * {match.group()})"
    for match in re.finditer(r"(?<=constexpr int )(\w+) = (\d+);", source.code):
        if int(match.group(2)) > 0 and not source.function(match.start()):
            yield match.start(2), match.end(2), str(int(match.group(2)) + 1)


def index(source: Source) -> Iterator[Edit]:
    """An element's index is 0, or one too high."""
    for match in re.finditer(r"(?<=[\w\])])\[", source.code):
        end = closing(source.code, match.start()) - 1
        inside = source.text[match.end() : end]
        first = line_begin(source.code, match.start())
        declares = re.match(r"\s*(?:const |static )*[\w:<>]+ [\w\[\], ]*$", source.code[first : match.start()])
        is_constant = re.fullmatch(r"\s*(?:k[A-Z]\w*(?: [*/+] [\w()]+)*|[A-Z]|\d+)\s*", inside)
        if source.function(match.start()) and inside.strip() and not declares and not is_constant:
            yield match.end(), end, "0"
            yield end, end, " + 1"


# Names of which one is easily taken for the other.
NEIGHBOURS = [
    ("i", "q"),
    ("row", "first"),
    ("j", "c"),
    ("w", "warp"),
    ("rows", "cols"),
    ("x", "y"),
    ("width", "height"),
]


def swapped(source: Source) -> Iterator[Edit]:
    """In an index or an offset, a name is taken for its neighbour, which the function has too."""
    other = {name: pair[1 - k] for pair in NEIGHBOURS for k, name in enumerate(pair)}
    for match in re.finditer(r"(?<=[\[+*(] )(\w+)|(?<=\[)(\w+)(?=\]| [+*])|(?<![.\w])(\w+)(?= \* )", source.code):
        name = match.group()
        if name in other and re.search(rf"\b{other[name]}\b", source.body(match.start())):
            yield match.start(), match.end(), other[name]


# Faults of parallel code, applied at every place; of the others `chosen` keeps some per file.
PARALLEL = {
    "barrier removed",
    "barrier for a part",
    "wait removed",
    "wait too weak",
    "commit removed",
    "lane mask",
    "exchange removed",
    "reduction starts late",
    "reduction stops early",
    "atomic made plain",
}

RULES: dict[str, Callable[[Source], Iterator[Edit]]] = {
    "barrier removed": replace(r"\b__sync(?:threads|warp)\([^;]*\);", ";"),
    "barrier for a part": replace(r"\b__sync(?:threads|warp)\([^;]*\);", r"if (threadIdx.x != 0) \g<0>"),
    "wait removed": replace(r"\bcopy_async_wait(?:<\w+>)?\(\);", ";"),
    "wait too weak": replace(r"\bcopy_async_wait<(\w+)>\(\);", r"copy_async_wait<\g<1> + 1>();"),
    "commit removed": replace(r"\bcopy_async_commit\(\);", ";"),
    "lane mask": lane_mask,
    "exchange removed": no_exchange,
    "reduction starts late": late_reduction,
    "reduction stops early": early_end,
    "atomic made plain": plain_add,
    "loop bound": loop_bound,
    "loop start": loop_start,
    "loop stride": loop_step,
    "comparison": comparison,
    "condition forced": condition,
    "choice forced": choice,
    "and, or": replace(r" (&&|\|\|) ", lambda m: " || " if m.group(1) == "&&" else " && "),
    "negation lost": replace(r"(?<=[ (])!(?=[\w(])", ""),
    "statement lost": lost_statement,
    "sign": replace(r"(?<=[ (])-(?=[a-z_])", ""),
    "plus, minus": replace(r" ([+-]) (?![^\[\n]*\])", lambda m: " - " if m.group(1) == "+" else " + "),
    "times, over": replace(r" ([*/]) ", lambda m: " / " if m.group(1) == "*" else " * "),
    "remainder": replace(r" % ", " / "),
    "tail of a division": replace(r" [+-] \w+ - 1\) / ", ") / "),
    "smaller, larger": replace(
        r"\b(?:min|max|fminf|fmaxf|fmin|fmax)\b(?=[(<])",
        lambda m: m.group().replace("min", "m_x").replace("max", "min").replace("m_x", "max"),
    ),
    "bits": replace(r" ([|&]) ", lambda m: " & " if m.group(1) == "|" else " | "),
    "constant": constant,
    "index": index,
    "name swapped": swapped,
}


def mutants(file: str, text: str) -> list[Mutant]:
    """All mutants of a file, in the order of rules and places."""
    source = Source(file, text)
    found = []
    for rule, places in RULES.items():
        edits = sorted({edit for edit in places(source) if source.text[edit[0] : edit[1]] != edit[2]})
        found += [source.mutant(rule, edit) for edit in edits]
    return found


def chosen(found: list[Mutant], places: int) -> list[Mutant]:
    """Of each rule in each file `places` mutants, spread evenly over it; all of the PARALLEL ones; with 0: all."""
    groups: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in found:
        groups.setdefault((mutant.file, mutant.rule), []).append(mutant)
    kept = []
    for group in groups.values():
        every = places == 0 or group[0].rule in PARALLEL
        take = len(group) if every else min(places, len(group))
        kept += [group[(2 * k + 1) * len(group) // (2 * take)] for k in range(take)]
    return kept


class Equivalents:
    """The listed mutants that change nothing observable, each with its reason; found by content, not by line number."""

    def __init__(self, entries: list[dict[str, str]]) -> None:
        self.reasons: dict[Key, str] = {}
        for entry in entries:
            key = (entry["rule"], entry["function"], entry["line"], entry["becomes"])
            if not entry["reason"].strip() or key in self.reasons:
                raise ValueError(f"equivalents: expected each mutant once and with a reason, found {entry}")
            self.reasons[key] = entry["reason"]

    @classmethod
    def read(cls, path: Path) -> Equivalents:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def reason(self, mutant: Mutant) -> str | None:
        return self.reasons.get(mutant.key)

    def unmatched(self, found: list[Mutant]) -> list[Key]:
        """Entries that fit none of these mutants: the source has changed, and they need a second look."""
        known = {mutant.key for mutant in found}
        return [key for key in self.reasons if key not in known]
