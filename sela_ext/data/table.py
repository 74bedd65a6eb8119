"""Tables of images: CSV and TSV files with a path column, lists of paths, and tables of labels.

Note [Columns of a table]
    The first line names the columns; upper and lower case are the same. Exactly one of path, file, filename, file_name,
    filepath, file_path, image, image_path, img, img_path holds the path of an image, and at most one of label, labels,
    class, class_name, target, category, y its true label; other columns are ignored. Paths are relative to the table.
    Labels are integers, -1 or nothing where unknown; or names, which are numbered in sorted order. A .tsv file is
    divided by tabs, a .csv file by commas, or by semicolons if the first line has one and no comma. A .txt file is a
    list: one path per line, without a header, and behind a tab a label if there is one.

Note [Tables of labels]
    Labels of images that come from elsewhere are found by name: the path of a row is an image's name, or else its file
    name, or else its file name without suffix (as far as those are unique; there may be a column "id" or "name"
    instead of the path). Rows of other images are ignored, images without a row have the label -1.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sela_ext.data.classes import ClassList, Value, number_classes, parse_value
from sela_ext.data.folder import FileSource, printable_path
from sela_ext.data.memory import free_memory
from sela_ext.data.safe_files import read_bounded
from sela_ext.data.source import Int64Array, Source
from sela_ext.errors import DataError

PATH_COLUMNS = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "img",
    "img_path",
)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "category", "y")
NAME_COLUMNS = (*PATH_COLUMNS, "id", "name")
SUFFIXES = (".csv", ".tsv", ".txt")
# Files looked for when a table is opened, to notice paths that are relative to another folder.
PROBED = 20
LABEL_FILES = ("labels.csv", "labels.tsv")


def is_table(path: Path) -> bool:
    """Whether a file is a table, by its suffix."""
    return path.suffix.lower() in SUFFIXES


def open_table(path: Path, *, classes: ClassList | None = None) -> FileSource:
    """Open the images that a table lists: Note [Columns of a table].

    Args:
        path: A .csv, .tsv or .txt file.
        classes: Names of the classes, if they are known.

    Returns:
        A source in the table's order; names are the paths in the table.

    Raises:
        DataError: No path column or several, a line that does not fit, no image, or none of the first files is there.
    """
    paths, values = _rows(path, PATH_COLUMNS, need_paths=True)
    folder = str(path.parent)
    probed = [os.path.join(folder, name) for name in paths[:PROBED]]
    if not any(os.path.lexists(name) for name in probed):
        others = f", nor any of the next {len(probed) - 1}" if len(probed) > 1 else ""
        spaced = os.path.lexists(probed[0].rpartition(" ")[0])
        raise DataError(
            f"{path}: expected paths relative to {folder}, found no file {printable_path(probed[0])}{others}"
            + ("; put a tab, not a space, between path and label" if spaced else "")
        )
    labels: Int64Array | None = None
    names: list[str] | None = None
    if values is not None:
        labels, names = number_classes(values, str(path), classes)
    root = "" if folder == "." else folder
    try:
        return FileSource(paths, kind="table", root=root, labels=labels, class_names=names)
    except ValueError as error:  # a null character
        raise DataError(f"{path}: {error}") from error


def read_label_table(path: Path, source: Source, *, classes: ClassList | None = None) -> tuple[Int64Array, Any]:
    """True labels from a table: Note [Tables of labels]; or one label per image in order, if it has no other column.

    Returns:
        int64 [N], -1 where unknown, and the names of the classes or None.

    Raises:
        DataError: See `open_table`; no label column, two labels for one image, or no row that names an image.
    """
    names, values = _rows(path, NAME_COLUMNS, need_paths=False)
    if values is None:
        raise DataError(f"{path}: expected a label on each line, behind a tab, found only names")
    count = len(source)
    found: list[Value] = [None] * count
    if not names:
        if len(values) != count:
            raise DataError(f"{path}: expected one label per image, {count}, found {len(values)}")
        found = list(values)
    else:
        index = index_by_name(source, names)
        seen = np.zeros(count, bool)
        for name, value in zip(names, values, strict=True):
            at = index(name)
            if at is None:
                continue
            if seen[at] and found[at] != value:
                raise DataError(f"{path}: expected one label for {printable_path(name)}, found {found[at]} and {value}")
            seen[at] = True
            found[at] = value
        if not seen.any():
            raise DataError(
                f"{path}: expected names of images such as {source.name(0)}, found {printable_path(names[0])} and no "
                "row that names one"
            )
    return number_classes(found, str(path), classes)


def index_by_name(source: Source, wanted: Sequence[str]) -> Callable[[str], int | None]:
    """Position of an image by the name in a table: the first of three ways in which any row fits."""
    ways: tuple[Callable[[str], str], ...] = (
        lambda name: name.removeprefix("./"),
        lambda name: name.rsplit("/", 1)[-1],
        lambda name: os.path.splitext(name.rsplit("/", 1)[-1])[0],
    )
    for way in ways:
        places: dict[str, int] = {}
        for i, name in enumerate(source.iter_names()):
            key = way(name)
            places[key] = -1 if key in places else i  # a name of two images says nothing
        if any(places.get(way(name), -1) >= 0 for name in wanted):

            def find(name: str, way: Callable[[str], str] = way, places: dict[str, int] = places) -> int | None:
                at = places.get(way(name), -1)
                return at if at >= 0 else None

            return find
    return lambda name: None


def _rows(path: Path, wanted: Sequence[str], *, need_paths: bool) -> tuple[list[str], list[Value] | None]:
    """Paths (empty without such a column) and labels (None without such a column) of all lines."""
    text = _text(path)
    if path.suffix.lower() == ".txt":
        return _list_rows(path, text, need_paths=need_paths)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
    paths: list[str] = []
    values: list[Value] = []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        path_at = _column(path, header, wanted, "path", need=need_paths)
        label_at = _column(path, header, LABEL_COLUMNS, "label", need=not need_paths)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}: line {reader.line_num}: expected {len(header)} fields as in the first line, found "
                    f"{len(row)}"
                )
            if path_at is not None:
                if not row[path_at].strip():
                    raise DataError(f"{path}: line {reader.line_num}: expected a path, found nothing")
                paths.append(row[path_at].strip())
            if label_at is not None:
                values.append(parse_value(row[label_at]))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: expected a row of a table: {error}") from error
    if not paths and not values:
        raise DataError(f"{path}: expected at least one image, found only a header")
    return paths, values if label_at is not None else None


def _list_rows(path: Path, text: str, *, need_paths: bool) -> tuple[list[str], list[Value] | None]:
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path}: expected one path per line, found an empty file")
    if not need_paths and all("\t" not in line and isinstance(parse_value(line), int) for line in lines):
        return [], [parse_value(line) for line in lines]
    pairs = [line.split("\t") for line in lines]
    if any(len(pair) > 2 for pair in pairs) or len({len(pair) for pair in pairs}) != 1:
        raise DataError(f"{path}: expected one path per line, and a tab and a label in all lines or in none")
    paths = [pair[0] for pair in pairs]
    return paths, [parse_value(pair[1]) for pair in pairs] if len(pairs[0]) == 2 else None


def _column(path: Path, header: Sequence[str], wanted: Sequence[str], what: str, *, need: bool) -> int | None:
    found = [i for i, name in enumerate(header) if name in wanted]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(header)[:200]
    if len(found) > 1:
        twice = " and ".join(header[i] for i in found)
        raise DataError(f"{path}: expected one {what} column, found {twice}; rename the others")
    if need:
        raise DataError(
            f"{path}: expected a header with a {what} column ({', '.join(wanted)}) in the first line, found: {shown}"
        )
    return None


def _delimiter(path: Path, text: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    first = text.split("\n", 1)[0]
    return ";" if ";" in first and "," not in first else ","


def _text(path: Path) -> str:
    try:
        # Its rows become Python objects of several times their size.
        text = read_bounded(path, free_memory() // 8).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a table in UTF-8, found other bytes at {error.start}; convert it") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}, an eighth of the free memory") from error
    if "\0" in text:
        raise DataError(f"{path}: expected a table in UTF-8, found null characters; convert it")
    return text


def table_beside(folder: Path) -> Path | None:
    """`labels.csv` or `labels.tsv` in a folder of images, or None."""
    return next((path for name in LABEL_FILES if (path := folder / name).is_file()), None)
