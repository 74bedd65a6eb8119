"""sela_ext/_core.pyi says what the compiled module offers.

What is compared: names, parameters (order, kind, whether they have a default) and annotations, overload by overload;
not the formatting, the documentation or the way a type is imported. pybind11 2 and 3 write some types in different
words ("int" and "typing.SupportsInt"), which count as equal. Where the module only knows `dict`, `object` or an array
without its type, the stub may say more.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

STUB = Path(__file__).resolve().parents[1] / "sela_ext" / "_core.pyi"
REMEDY = "write sela_ext/_core.pyi anew with `nox -s stubs`, or edit it by hand"

ARRAY = {"ndarray", "NDArray", "ArrayLike", "array"}
SAME = {"SupportsInt": "int", "SupportsFloat": "float", "object": "Any", **dict.fromkeys(ARRAY, "array")}


def type_words(node, aliases):
    """An annotation as text without module names and without the differences between pybind11's versions."""
    if node is None:
        return "Any"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        quoted = node.value.isidentifier() or "[" in node.value or "." in node.value  # a type in quotes, or a note
        return type_words(ast.parse(node.value, mode="eval").body, aliases) if quoted else repr(node.value)
    if isinstance(node, ast.BinOp):
        members = set()
        while isinstance(node, ast.BinOp):
            members.add(type_words(node.right, aliases))
            node = node.left
        members.add(type_words(node, aliases))
        if "SupportsIndex" in members:  # always beside the number that it stands for
            members -= {"SupportsIndex"}
        return " | ".join(sorted(members))
    if isinstance(node, ast.Subscript):
        name = type_words(node.value, aliases)
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        words = [type_words(item, aliases) for item in inside]
        if name == "Optional":
            return " | ".join(sorted({words[0], "None"}))
        if name == "Union":
            return " | ".join(sorted(words))
        if name == "Annotated" and words[0] != "array":  # a note beside the type, such as "FixedSize(2)"
            return words[0]
        if name in ("array", "Annotated"):  # np.ndarray[Any, np.dtype[T]], NDArray[T], Annotated[ArrayLike, T]
            kinds = re.findall(r"\b(?:u?int|float|bool|complex)\d*\b", " ".join(words))
            return f"array[{kinds[0]}]" if kinds else "array"
        return f"{name}[{', '.join(words)}]"
    if isinstance(node, ast.Attribute):
        return SAME.get(node.attr, node.attr)
    if isinstance(node, ast.List):
        return f"[{', '.join(type_words(item, aliases) for item in node.elts)}]"
    text = ast.unparse(node)
    text = aliases.get(text, text)
    return SAME.get(text, text)


def signature(function, aliases):
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    words = []
    for number, argument in enumerate(positional):
        kind = "/" if number < len(arguments.posonlyargs) else ""
        default = " = ..." if number >= required else ""
        words.append(f"{argument.arg}{kind}: {type_words(argument.annotation, aliases)}{default}")
    if arguments.vararg:
        words.append(f"*{arguments.vararg.arg}")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        words.append(f"*{argument.arg}: {type_words(argument.annotation, aliases)}{' = ...' if default else ''}")
    if arguments.kwarg:
        words.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(words)}) -> {type_words(function.returns, aliases)}"


def offered(text):
    """{dotted name: list of what it is} of a stub: one entry per overload of a function, per attribute, per class."""
    tree = ast.parse(text)
    aliases = {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    found = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.setdefault(prefix + node.name, []).append(signature(node, aliases))
            elif isinstance(node, ast.ClassDef):
                bases = sorted(type_words(base, aliases) for base in node.bases)
                found[prefix + node.name] = [f"class({', '.join(bases)})"]
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                annotation = type_words(node.annotation, aliases)
                found[prefix + node.target.id] = ["value" if annotation.startswith("ClassVar") else annotation]

    visit(tree.body, "")
    return {name: entry for name, entry in found.items() if name.split(".")[-1] != "__all__"}


def says_at_least(written, generated):
    """Whether a signature in the stub is the module's, with more detail only where the module has none."""
    pattern = re.escape(generated)
    pattern = re.sub(r"\b(dict|list|tuple|set|array|Callable)\b(?!\\\[)", r"\1(?:\\[.*\\])?", pattern)
    return re.fullmatch(re.sub(r"\bAny\b", ".+", pattern), written) is not None


def differences(written, generated):
    """One line for each name that the two stubs do not say the same of."""
    written, generated = offered(written), offered(generated)
    faults = [f"{name}: in the stub, but not in the module" for name in sorted(written.keys() - generated.keys())]
    faults += [f"{name}: in the module, but not in the stub" for name in sorted(generated.keys() - written.keys())]
    for name in sorted(written.keys() & generated.keys()):
        pairs = zip(written[name], generated[name], strict=False)
        if len(written[name]) != len(generated[name]) or not all(says_at_least(*pair) for pair in pairs):
            faults.append(f"{name}: the stub says {'; '.join(written[name])}, the module {'; '.join(generated[name])}")
    return faults


def test_the_stub_says_what_the_compiled_module_offers(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pybind11_stubgen", "sela_ext._core", "--output-dir", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    generated = (tmp_path / "sela_ext" / "_core.pyi").read_text(encoding="utf-8")
    faults = differences(STUB.read_text(encoding="utf-8"), generated)
    assert not faults, "\n".join([*faults, REMEDY])


WRITTEN = """
import numpy as np
from typing import Any

class Box:
    top: int
    def area(self, scale: float = 1.0) -> float: ...

def names(count: int, *, kind: str | None = None) -> list[str]: ...
def rows(x: np.ndarray[np.float32], n: int) -> dict[str, Any]: ...
def pick(rows: NDArray[np.int64], how: str) -> dict[str, int]: ...
def crop(ratio: Sequence[float]) -> None: ...
"""


def test_other_words_for_the_same_types_are_no_difference():
    generated = """
from __future__ import annotations
import numpy
import numpy.typing
import typing
__all__: list[str] = ['Box', 'names', 'rows']
def rows(x: typing.Annotated[numpy.typing.ArrayLike, numpy.float32],
         n: typing.SupportsInt | typing.SupportsIndex) -> dict[str, typing.Any]:
    '''Rows.'''
def names(count: typing.SupportsInt, *, kind: typing.Optional[str] = None) -> list[str]: ...
class Box:
    top: int
    def area(self, scale: typing.SupportsFloat | typing.SupportsIndex = 1.0) -> float:
        '''Area.'''
def pick(rows: numpy.ndarray, how: object) -> dict: ...
def crop(ratio: typing.Annotated[collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
                                 "FixedSize(2)"]) -> None: ...
"""
    assert differences(WRITTEN, generated) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("def rows(", "def cols(", "rows: in the stub, but not in the module"),
        ("n: int)", "m: int)", "rows: the stub says"),
        ("n: int)", "n: float)", "rows: the stub says"),
        ("n: int)", "n: int = 3)", "rows: the stub says"),
        ("np.float32", "np.float64", "rows: the stub says"),
        ("*, kind", "kind", "names: the stub says"),
        ("str | None", "str", "names: the stub says"),
        ("top: int", "left: int", "Box.left: in the module, but not in the stub"),
        ("-> float", "-> int", "Box.area: the stub says"),
        ("dict[str, int]", "list", "pick: the stub says"),
        ("Sequence[float]", "Sequence[int]", "crop: the stub says"),
        ("how: str", "how: str, why: str", "pick: the stub says"),
    ],
)
def test_a_planted_difference_is_found(old, new, expected):
    assert old in WRITTEN
    assert expected in "\n".join(differences(WRITTEN, WRITTEN.replace(old, new)))
