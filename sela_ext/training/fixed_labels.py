"""`fixed_labels`: labels that come from elsewhere, and which a network is trained on as they are.

Note [Whose label is whose]
    Labels that come with names of images (of a run, of `sela predict`, of a table) are found by name, where the images
    have names of their own: a file's path, or else its file name, or else that without suffix, whichever fits first and
    as far as it is unique. Images may then come in another order, or be some of those that were labelled; but each of
    them needs a label. Where one side has no names (arrays, a checkpoint's labels, images numbered by this package) the
    labels are those of the images in order, and there must be as many.

    -1 is an image without a label in this head: no loss is taken there. Images without any label are not trained on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sela_ext.compat import load_released
from sela_ext.data import Source
from sela_ext.data.memory import free_memory
from sela_ext.data.npy import map_npy
from sela_ext.data.npz import read_arrays
from sela_ext.data.safe_files import read_bounded
from sela_ext.data.table import LABEL_COLUMNS, NAME_COLUMNS, index_by_name
from sela_ext.errors import DataError, OptionError
from sela_ext.report.run_folder import read_run
from sela_ext.training.options import AUTO

_EXPECTED = (
    "fixed_labels: expected a run folder, its labels.npz, a .npy, .csv or .tsv file, a released checkpoint with "
    "labels, or integers [N] or [heads, N]"
)
_LABEL_COLUMN = re.compile(r"label_([0-9]{1,9})")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True)
class FixedLabels:
    """Labels to train on.

    Attributes:
        labels: int32 [heads, N]; -1 = none.
        clusters: number of clusters of each head.
        where: where they come from, and how many of them are used.
    """

    labels: NDArray[np.int32]
    clusters: list[int]
    where: str

    @property
    def trained(self) -> NDArray[np.bool_]:
        """Whether an image has a label in any head, [N]."""
        return np.asarray((self.labels >= 0).any(axis=0))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of labels and numbers of clusters."""
        digest = hashlib.sha256(repr((self.labels.shape, self.clusters)).encode())
        digest.update(np.ascontiguousarray(self.labels, "<i4").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Given:
    """Labels as they were found."""

    labels: NDArray[np.int64]  # [heads, M]
    names: list[str] | None
    where: str
    best: int | None = None  # the head that a run chose


def read_fixed_labels(value: Any, source: Source, *, clusters: Any = AUTO, heads: Any = AUTO) -> FixedLabels:
    """Read labels, and find the one of every image: Note [Whose label is whose].

    Args:
        value: a run folder; a .npz file with "labels" (and "names"); a .npy file or an array of integers [N] or
            [heads, N]; a .csv or .tsv file with label_0, label_1, ... (or one column of labels), as runs and
            `sela predict` write them; a checkpoint with labels, released by the authors. All heads are taken;
            "runs/x:3" takes head 3, "runs/x:0,2" two of them, "runs/x:best" the one that the run chose.
        source: N images.
        clusters: number of clusters, of all heads or of each; default: one more than the largest label.
        heads: number of heads, if it is to be checked.

    Raises:
        DataError: nothing there or not readable, no integers, labels below -1 or beyond `clusters`, another number of
            labels than of images, or images without a label.
        CheckpointError: a damaged checkpoint.
        OptionError: a head that there is not, or numbers of heads or clusters that do not fit.

    Example:
        >>> from sela_ext.data import open_source
        >>> fixed = read_fixed_labels([0, 2, -1, 1], open_source(np.zeros((4, 8, 8), np.uint8)))
        >>> fixed.clusters, fixed.trained.tolist()
        ([3], [True, True, False, True])

    Source: SeLa paper, section 4 (labels of one network train another from scratch).
    """
    given = _read(value)
    labels, where = _matched(given, source)
    return FixedLabels(labels.astype(np.int32), _clusters(given, labels, clusters, heads), where)


def is_there(value: Any) -> bool:
    """Whether this is the path of a file or folder, with or without heads behind it, that exists."""
    return isinstance(value, (str, os.PathLike)) and _split(value)[0].exists()


def refuse_own_folder(value: Any, out: Path) -> None:
    """Refuse to write a run into the folder that its labels come from.

    Raises:
        OptionError: `out` is that folder, or holds the file.
    """
    if is_there(value):
        path, folder = _split(value)[0].resolve(), out.resolve()
        if folder in (path, *path.parents):
            raise OptionError(f"out: expected a folder of its own, found {out}, which holds fixed_labels; name another")


def _split(value: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Path, and what is said of heads behind it."""
    path = Path(os.fspath(value)).expanduser()
    name, colon, selection = path.name.rpartition(":")
    if path.exists() or not colon or not name:
        return path, None
    return path.with_name(name), selection


def _read(value: Any) -> _Given:
    if not isinstance(value, (str, os.PathLike)):
        return _Given(_integers(value, "fixed_labels"), None, "labels given as an array")
    path, selection = _split(value)
    if not path.exists():
        raise DataError(f"{_EXPECTED}, found no file or folder {path}")
    given = _read_path(path)
    return given if selection is None else _select(given, selection)


def _read_path(path: Path) -> _Given:
    if path.is_dir():
        if not (path / "labels.npz").is_file():
            raise DataError(f"{_EXPECTED}, found the folder {path} without labels.npz; has this run ended?")
        run = read_run(path)
        return _Given(
            run.labels.astype(np.int64),
            None if run.names is None else [str(name) for name in run.names],
            f"labels of the run {path}",
            run.head,
        )
    where, suffix = f"labels in {path}", path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _read_table(path)
    if suffix == ".npy":
        return _Given(_integers(map_npy(path, "a .npy file of labels"), str(path)), None, where)
    if suffix == ".npz":
        found = read_arrays(path, ["labels", "names"], "labels", needed="labels")
        labels = _integers(found["labels"], f"{path}: labels")
        names = [str(name) for name in found["names"].ravel()] if "names" in found else None
        if names is not None and len(names) != labels.shape[1]:
            raise DataError(f"{path}: expected a name per label, {labels.shape[1]}, found {len(names)}")
        return _Given(labels, names, where)
    _, released = load_released(path)
    if released is None:
        raise DataError(f"{path}: expected a checkpoint with labels, found weights alone")
    return _Given(released.numpy(), None, where)


def _integers(value: Any, where: str) -> NDArray[np.int64]:
    """Labels as int64 [heads, M]."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}: expected integers [N] or [heads, N], found a ragged list") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size == 0:
        raise DataError(f"{where}: expected integers [N] or [heads, N], found {array.dtype} {list(array.shape)}")
    low, high = int(array.min()), int(array.max())
    if low < -1 or high >= 2**31 - 1:
        raise DataError(f"{where}: expected labels >= 0, or -1 for none, found {low} .. {high}")
    return np.atleast_2d(array).astype(np.int64)


def _read_table(path: Path) -> _Given:
    try:
        text = read_bounded(path, free_memory() // 8).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a table of labels, the file cannot be read: {error}") from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        return _table(path, reader)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: expected a table of labels: {error}") from error


def _table(path: Path, reader: Any) -> _Given:
    """The labels in the lines of a table, which the reader splits."""
    header = [name.strip().lower() for name in next(reader, [])]
    twice = sorted({name for name in header if header.count(name) > 1 and _LABEL_COLUMN.fullmatch(name)})
    if twice:
        raise DataError(f"{path}: expected each column once, found {twice[0]} several times; rename or remove one")
    numbered = {int(found[1]): i for i, found in enumerate(map(_LABEL_COLUMN.fullmatch, header)) if found}
    if sorted(numbered) != list(range(len(numbered))):
        raise DataError(f"{path}: expected columns label_0, label_1, ... without a gap, found {sorted(numbered)}")
    columns = [numbered[head] for head in range(len(numbered))]
    if not columns:
        columns = [i for i, name in enumerate(header) if name in LABEL_COLUMNS]
        if len(columns) != 1:
            found = [name[:40] for name in header[:9]]
            raise DataError(f"{path}: expected columns label_0, label_1, ... or one column label, found {found}")
    named = next((header.index(name) for name in ("name", *NAME_COLUMNS) if name in header), None)
    index = header.index("index") if named is None and "index" in header else None
    rows: list[list[int]] = []
    names: list[str] = []
    order: list[int] = []
    for row in reader:
        if not row:
            continue
        line = f"{path}: line {reader.line_num}"
        if len(row) != len(header):
            raise DataError(f"{line}: expected {len(header)} fields as in the first line, found {len(row)}")
        try:
            rows.append([_whole(row[i].strip() or "-1") for i in columns])
            order.append(len(order) if index is None else _whole(row[index].strip()))
        except ValueError as error:
            raise DataError(f"{line}: expected whole numbers as labels, {error}") from error
        names.append("" if named is None else row[named])
    if not rows:
        raise DataError(f"{path}: expected a line per image, found none")
    places = np.argsort(np.asarray(order), kind="stable")
    if not np.array_equal(np.asarray(order)[places], np.arange(len(rows))):
        raise DataError(f"{path}: expected every index of 0 .. {len(rows) - 1} once")
    labels = _integers(np.asarray(rows).T[:, places], str(path))
    return _Given(labels, None if named is None else names, f"labels in {path}")


def _whole(text: str) -> int:
    """A number in plain digits: `int` reads 1_0 and other scripts' digits, too."""
    if not _WHOLE_NUMBER.fullmatch(text):
        raise ValueError(f"found {text[:40]!r}")
    return int(text)


def _select(given: _Given, selection: str) -> _Given:
    """Some of the heads: "best", or numbers with commas."""
    count = len(given.labels)
    if selection == "best":
        if given.best is None:
            raise OptionError(f"fixed_labels: {given.where} do not say which head is best; expected its number")
        chosen = [given.best]
    else:
        parts = selection.split(",")
        chosen = [int(part) if part.isascii() and part.isdigit() else -1 for part in parts]
        if not all(0 <= head < count for head in chosen) or len(set(chosen)) != len(chosen):
            raise OptionError(
                f"fixed_labels: expected best, or heads in 0 .. {count - 1} with commas, found {selection!r} behind "
                f"the {given.where}"
            )
    which = f"head{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))} of the {given.where}"
    return _Given(given.labels[chosen], given.names, which)


def _matched(given: _Given, source: Source) -> tuple[NDArray[np.int64], str]:
    """Labels in the order of the images, and what became of them."""
    count, found = len(source), given.labels.shape[1]
    names = given.names
    if names is None or _numbered(names) or _numbered(source.names):
        if found != count:
            turned = found != len(given.labels) == count
            raise DataError(
                f"{given.where}: expected one label per image, {count}, found {found}"
                + ("; turn the array round: [heads, N]" if turned else "")
            )
        return given.labels, given.where
    if names == source.names:
        return given.labels, given.where
    find: Callable[[str], int | None] = index_by_name(source, names)
    rows = np.full(count, -1, np.int64)
    for row, name in enumerate(names):
        at = find(name)
        if at is None:
            continue
        if rows[at] >= 0 and not np.array_equal(given.labels[:, rows[at]], given.labels[:, row]):
            raise DataError(f"{given.where}: expected each image once, found different labels for {source.name(at)}")
        rows[at] = row
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        shared = count - len(set(source.names))
        hint = "a name that several images share fits none; " if shared else ""
        raise DataError(
            f"{given.where}: expected a label for each of the {count} images, found none for {len(missing)}, such as "
            f"{source.name(int(missing[0]))}; the labels' names are such as {names[0]}; {hint}a label of -1 leaves an "
            "image out"
        )
    return given.labels[:, rows], f"{given.where}, by name: {count} of {found}"


def _numbered(names: Sequence[str]) -> bool:
    """Whether these are no names of files, but the numbers that this package gives to images of an array."""
    return all(
        name.endswith(str(i)) and name.rpartition("/")[2].isdigit() and int(name.rpartition("/")[2]) == i
        for i, name in enumerate(names)
    )


def _clusters(given: _Given, labels: NDArray[np.int64], clusters: Any, heads: Any) -> list[int]:
    """Number of clusters of every head."""
    count = len(labels)
    if heads != AUTO and heads != count:
        raise OptionError(f"heads: expected {count}, as the {given.where} have, found {heads}; or leave it out")
    asked = None if isinstance(clusters, str) else clusters if isinstance(clusters, list) else [clusters] * count
    if asked is not None and len(asked) != count:
        raise OptionError(f"clusters: expected one number per head of the {given.where}, {count}, found {len(asked)}")
    result = []
    for head, row in enumerate(labels):
        different = np.unique(row[row >= 0]).size
        if different < 2:
            raise DataError(f"{given.where}: expected at least 2 different labels in head {head}, found {different}")
        # Images may be some of those that were labelled, and lack the last clusters.
        largest = int(given.labels[head].max())
        if asked is not None and largest >= asked[head]:
            raise DataError(
                f"{given.where}: expected labels of head {head} in -1 .. {asked[head] - 1}, as clusters says, found "
                f"{largest}; leave clusters out to take their number from the labels"
            )
        if asked is None and largest >= max(given.labels.shape[1], 2):
            raise DataError(
                f"{given.where}: expected labels 0 .. K - 1 in head {head}, found {largest} among "
                f"{given.labels.shape[1]}; number them from 0 on, or say clusters"
            )
        result.append(largest + 1 if asked is None else int(asked[head]))
    return result
