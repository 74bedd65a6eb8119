"""What a run folder holds, read once and checked, for the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sela_ext.data.npz import read_arrays
from sela_ext.data.safe_files import read_json
from sela_ext.errors import DataError
from sela_ext.report.metrics import Event, Metrics, heads_of, number, read_metrics

# Clusters that a run may have, however few its images are: labels that were given are not bound by them.
_MOST_CLUSTERS = 1 << 16


@dataclass(frozen=True)
class RunFolder:
    """A run as its files tell it.

    Attributes:
        path: the folder.
        version: the package version that wrote it, "" if unknown.
        options: every option with its resolved value.
        reasons: option -> why "auto" became that value.
        resolved: derived facts: images, channels, parameters, device, threads, ...
        metrics: the events of metrics.jsonl.
        labels: int32 [heads, N], -1 = skipped image.
        confidence: float32 [heads, N], NaN where unknown.
        names: str [N], or None: images are then told by their index.
        head: the head to show: the one that the run chose, else the one of lowest cross-entropy, else 0.
        clusters: number of clusters of that head.
    """

    path: Path
    version: str
    options: dict[str, Any]
    reasons: dict[str, str]
    resolved: dict[str, Any]
    metrics: Metrics
    labels: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]
    names: npt.NDArray[np.str_] | None
    head: int
    clusters: int

    def name(self, index: int) -> str:
        """Return the name of an image, or its index where the run has no names."""
        return str(self.names[index]) if self.names is not None else f"image {index}"


def read_run(path: Path) -> RunFolder:
    """Read a run folder: options.json and labels.npz must be there, metrics.jsonl may be missing.

    Args:
        path: the run folder.

    Raises:
        DataError: the folder, options.json or labels.npz is missing, unreadable or inconsistent.
    """
    if not path.is_dir():
        raise DataError(f"{path}: expected a run folder written by training, found no such folder")
    options = _read_options(path / "options.json")
    labels, confidence, names = _read_labels(path / "labels.npz")
    metrics = read_metrics(path / "metrics.jsonl")
    head = _shown_head(metrics, labels.shape[0])
    return RunFolder(
        path=path,
        version=str(options.get("version") or ""),
        options=_mapping(options, "options"),
        reasons={name: str(why) for name, why in _mapping(options, "reasons").items()},
        resolved=_mapping(options, "resolved"),
        metrics=metrics,
        labels=labels,
        confidence=confidence,
        names=names,
        head=head,
        clusters=_cluster_count(metrics, head, labels[head]),
    )


def _read_options(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: expected the options of a run, found no such file; is this a run folder that training wrote?"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected the options of a run as JSON, cannot read them: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("options"), dict):
        raise DataError(f'{path}: expected a JSON object with "options", found {type(value).__name__} without it')
    return value


def _mapping(value: dict[str, Any], name: str) -> dict[str, Any]:
    entry = value.get(name)
    return entry if isinstance(entry, dict) else {}


_Labels = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.str_] | None]


def _read_labels(path: Path) -> _Labels:
    if not path.exists():
        raise DataError(
            f"{path}: expected the labels of a run, found no such file; they are written when training has ended"
        )
    arrays = read_arrays(path, ["labels", "confidence", "names"], "the labels of a run")
    labels = arrays.get("labels")
    if labels is None or labels.ndim != 2 or labels.dtype.kind not in "iu" or 0 in labels.shape:
        found = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
        raise DataError(f"{path}: expected integer labels of shape [heads, N], found {found}")
    low, high, most = int(labels.min()), int(labels.max()), max(labels.shape[1], _MOST_CLUSTERS)
    if low < -1 or high >= most:  # a table of all clusters is made, whatever the file's size
        raise DataError(f"{path}: expected labels in -1 .. {most - 1}, found {low} .. {high}")
    confidence = arrays.get("confidence", np.full(labels.shape, np.nan, dtype=np.float32))
    if confidence.shape != labels.shape or confidence.dtype.kind != "f":
        raise DataError(
            f"{path}: expected a confidence per label, {list(labels.shape)}, "
            f"found {confidence.dtype} {list(confidence.shape)}"
        )
    names = arrays.get("names")
    if names is not None and (names.dtype.kind != "U" or names.shape != labels.shape[1:]):
        raise DataError(f"{path}: expected {labels.shape[1]} names as text, found {names.dtype} {list(names.shape)}")
    return labels.astype(np.int32), confidence.astype(np.float32), names


def _shown_head(metrics: Metrics, heads: int) -> int:
    """Take the run's own choice; before there is one, the head of lowest cross-entropy (never by true labels)."""
    chosen = metrics.last("evaluation", "end")
    if chosen is not None and isinstance(chosen.get("head"), int) and 0 <= chosen["head"] < heads:
        return int(chosen["head"])
    newest: dict[int, float] = {}
    for event in metrics.of("label_pass"):
        newest.update({entry["head"]: number(entry.get("cross_entropy")) for entry in heads_of(event)})
    known = {head: value for head, value in newest.items() if 0 <= head < heads and np.isfinite(value)}
    return min(known, key=lambda head: (known[head], head)) if known else 0


def cluster_counts(metrics: Metrics, images: int) -> dict[int, int]:
    """Return head -> number of clusters, as the events tell it; what no run of so many images has is left out."""
    counts: dict[int, int] = {}
    for event in metrics.of("label_pass", "evaluation", "end"):
        for entry in heads_of(event):
            clusters = entry.get("clusters")
            if isinstance(clusters, int) and 0 < clusters <= max(images, _MOST_CLUSTERS):
                counts[entry["head"]] = clusters
    return counts


def _cluster_count(metrics: Metrics, head: int, labels: npt.NDArray[np.int32]) -> int:
    """Return K of a head; without events the largest label tells the least that K can be."""
    return max(1, int(labels.max()) + 1, cluster_counts(metrics, labels.size).get(head, 0))


def last_event(metrics: Metrics) -> Event:
    """Return the newest evaluation or end, or an empty one."""
    return metrics.last("evaluation", "end") or {}
