"""Labels and confidence of the heads, from the run or by its network, as a table and as cluster sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from sela_ext.data.csv_file import csv_writer
from sela_ext.errors import OptionError
from sela_ext.export.destination import Exported, new_file


@dataclass(frozen=True)
class Labels:
    """Labels of N images by some of a run's heads.

    Attributes:
        labels: int32 [heads, N]; -1 = skipped image.
        confidence: float32 [heads, N], in [0, 1]; NaN where unknown.
        names: of the images, N.
        heads: their numbers in the run.
        clusters: number of clusters of each.
        where: where they come from.
    """

    labels: NDArray[np.int32]
    confidence: NDArray[np.float32]
    names: list[str]
    heads: list[int]
    clusters: list[int]
    where: str

    def of(self, heads: list[int]) -> Labels:
        """Those of some heads, by their numbers in the run."""
        rows = [self.heads.index(head) for head in heads]
        return Labels(
            self.labels[rows],
            self.confidence[rows],
            self.names,
            heads,
            [self.clusters[row] for row in rows],
            self.where,
        )

    def columns(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Names and values of the columns: label and confidence, with a number behind them if heads are several."""
        several = len(self.heads) > 1
        for name, values in (("label", self.labels), ("confidence", self.confidence)):
            for row in range(len(self.heads)):
                yield f"{name}_{row}" if several else name, values[row]

    def sizes(self, row: int) -> NDArray[np.int64]:
        """Images in each cluster of the head in a row, [K]."""
        labels = self.labels[row]
        return np.bincount(labels[labels >= 0], minlength=self.clusters[row]).astype(np.int64)

    def told(self) -> list[str]:
        """What to know of them, for people."""
        lines = [f"labels: {self.where}"]
        for row, head in enumerate(self.heads):
            sizes = self.sizes(row)
            lines.append(
                f"head {head}: {int((sizes > 0).sum()):,} of {len(sizes):,} clusters used, {sizes.min():,} to "
                f"{sizes.max():,} images"
            )
        skipped = int((self.labels < 0).all(axis=0).sum())
        if skipped:
            lines.append(f"{skipped:,} images have no label (-1)")
        return lines


def choose_heads(head: Any, count: int, best: int | None, default: str) -> list[int]:
    """The numbers of the heads that are meant.

    Args:
        head: a number, "best", "all", "none", or None for the default.
        count: heads that there are.
        best: the one that the run chose, if it is known.
        default: what None stands for.

    Raises:
        OptionError: no such head.

    Example:
        >>> choose_heads("best", 4, 2, "all"), choose_heads(None, 3, None, "all"), choose_heads("none", 3, 0, "all")
        ([2], [0, 1, 2], [])
    """
    wanted = default if head is None else head
    if isinstance(wanted, str) and wanted.isascii() and wanted.isdigit():
        wanted = int(wanted)
    if wanted == "none":
        return []
    if count and wanted == "all":
        return list(range(count))
    if count and wanted == "best":
        if best is None and count > 1:
            raise OptionError(f"head: the run does not say yet which is best; expected a number in 0 .. {count - 1}")
        return [best or 0]
    if isinstance(wanted, (int, np.integer)) and not isinstance(wanted, bool) and 0 <= wanted < count:
        return [int(wanted)]
    known = f"best, all, none or a number in 0 .. {count - 1}" if count else "none, as there are no heads"
    raise OptionError(f"head: expected {known}, found {wanted!r}")


def sizes_path(path: Path) -> Path:
    """The file of the cluster sizes beside a table of labels.

    Example:
        >>> sizes_path(Path("a/labels.csv")).name
        'labels.sizes.csv'
    """
    return path.with_name(f"{path.stem}.sizes{path.suffix}")


def write_csv(path: Path, labels: Labels, *, overwrite: bool) -> Exported:
    """Write labels as `fixed_labels` and any spreadsheet take them, and the cluster sizes beside them.

    Raises:
        OptionError: a file that is there.
        ResourceError: it cannot be written.
    """
    columns = list(labels.columns())
    shown = [_shares(values) if values.dtype.kind == "f" else values.tolist() for _, values in columns]
    header = ["index", "name", *(name for name, _ in columns)]
    rows = zip(range(len(labels.names)), labels.names, *shown, strict=True)
    with new_file(path, overwrite=overwrite) as partial, open(partial, "x", encoding="utf-8", newline="") as file:
        _write_rows(file, header, rows)
    with (
        new_file(sizes_path(path), overwrite=overwrite) as partial,
        open(partial, "x", encoding="utf-8", newline="") as file,
    ):
        _write_rows(file, ["head", "cluster", "size", "confidence"], _sizes(labels))
    return Exported(
        path,
        "csv",
        [*labels.told(), f"cluster sizes  {sizes_path(path)}"],
        {"heads": labels.heads, "clusters": labels.clusters, "rows": len(labels.names), "sizes": sizes_path(path)},
    )


def _shares(values: NDArray[np.float32]) -> list[str]:
    """Numbers in [0, 1] as text; nothing for those that are unknown."""
    shown: list[str] = np.where(np.isnan(values), "", np.char.mod("%.4f", values)).tolist()
    return shown


def _sizes(labels: Labels) -> Iterator[list[Any]]:
    """Rows of head, cluster, number of images, and their mean confidence."""
    for row, head in enumerate(labels.heads):
        sizes = labels.sizes(row)
        known = (labels.labels[row] >= 0) & np.isfinite(labels.confidence[row])
        weights = labels.confidence[row][known].astype(np.float64)
        sums = np.bincount(labels.labels[row][known], weights, minlength=len(sizes))
        counts = np.bincount(labels.labels[row][known], minlength=len(sizes))
        for cluster, size in enumerate(sizes.tolist()):
            mean = f"{sums[cluster] / counts[cluster]:.4f}" if counts[cluster] else ""
            yield [head, cluster, size, mean]


def _write_rows(file: TextIO, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    writer = csv_writer(file)
    writer.writerow(header)
    writer.writerows(rows)
