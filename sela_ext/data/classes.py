"""Classes: from names, or numbers, to the numbers 0..C-1 that true labels are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sela_ext.data.safe_files import read_bounded
from sela_ext.data.source import Int64Array
from sela_ext.errors import DataError

Value: TypeAlias = str | int | None
CLASS_FILES = ("classes.txt", "class_names.txt")
MOST_CLASSES = 1 << 31
MOST_CLASS_BYTES = 1 << 26


@dataclass(frozen=True)
class ClassList:
    """Names of the classes known beforehand; the position of a name is its number.

    Attributes:
        names: Without repetition.
        fixed: Whether there are no others; else classes of other names are numbered after these.
        where: Where they come from, for messages.
    """

    names: tuple[str, ...]
    fixed: bool = True
    where: str = "classes"


def read_classes(classes: Any) -> ClassList:
    """Bring a list of classes into one form.

    Args:
        classes: Names, or the path of a text file with one per line.

    Raises:
        DataError: No name, one that is repeated, or a file that cannot be read.
    """
    if isinstance(classes, ClassList):
        return classes
    where = "classes"
    if isinstance(classes, (str, os.PathLike)):
        where = f"classes file {os.fspath(classes)}"
        try:
            lines = read_bounded(classes, MOST_CLASS_BYTES).decode("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: expected a text file with one class per line: {error}") from error
        names = [line.strip() for line in lines if line.strip()]
    elif isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes):
        names = list(classes)
    else:
        raise DataError(f"{where}: expected names or the path of a text file, found {type(classes).__name__}")
    if not names:
        raise DataError(f"{where}: expected at least one name, found none")
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{where}: expected each class once, found {twice!r} twice")
    return ClassList(tuple(names), where=where)


def class_file_in(folder: Path, found: Sequence[str]) -> ClassList | None:
    """The class list that lies in a folder, if it names all classes found there."""
    for name in CLASS_FILES:
        path = folder / name
        if path.is_file():
            try:
                listed = read_classes(path)
            except DataError:
                continue  # a file of that name about something else
            if set(found) <= set(listed.names):
                return listed
    return None


def parse_value(text: str) -> Value:
    """A label as it is written: an integer, a name, or None for nothing."""
    text = text.strip()
    digits = text.removeprefix("-").removeprefix("+")
    if digits.isascii() and digits.isdigit() and len(digits) < 12:
        return int(text)
    return text or None


def number_classes(
    values: Sequence[Value], where: str, classes: ClassList | None = None
) -> tuple[Int64Array, list[str] | None]:
    """Numbers of the classes.

    Args:
        values: Per image an integer >= 0, -1 or None where unknown; or a name. Names in one place make names of all.
        where: What to call them in messages.
        classes: Names known beforehand.

    Returns:
        int64 [N], -1 where unknown; and the names, where there are any.

    Raises:
        DataError: A number or name out of range.

    Example:
        >>> number_classes(["dog", "cat", None], "x")
        (array([ 1,  0, -1]), ['cat', 'dog'])
    """
    if not any(isinstance(value, str) for value in values):
        integers = [-1 if value is None else int(value) for value in values]
        low, high = min(integers, default=-1), max(integers, default=-1)
        most = len(classes.names) if classes is not None and classes.fixed else MOST_CLASSES
        if low < -1 or high >= most:
            raise DataError(f"{where}: expected labels in 0..{most - 1}, or -1 for unknown, found {low}..{high}")
        numbers = np.fromiter(integers, np.int64, len(integers))
        return numbers, None if classes is None else list(classes.names)
    texts = [None if value is None or value == -1 else str(value) for value in values]
    known = [] if classes is None else list(classes.names)
    others = sorted({text for text in texts if text is not None} - set(known))
    if others and classes is not None and classes.fixed:
        raise DataError(f"{where}: expected the {len(known)} classes of {classes.where}, found {others[0]!r}")
    names = known + others
    number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    number[None] = -1
    return np.fromiter((number[text] for text in texts), np.int64, len(texts)), names
