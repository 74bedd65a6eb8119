"""`doctor`, from data to result: open, look at every image, compare, measure, advise."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sela_ext.assign.plan import threads_of
from sela_ext.data import Augment, Source, find_eval_source, open_source
from sela_ext.data.source import Int64Array
from sela_ext.doctor.capacity import disk, memory, throughput
from sela_ext.doctor.duplicates import Duplicates, Group, find_duplicates
from sela_ext.doctor.findings import find
from sela_ext.doctor.other_files import other_files
from sela_ext.doctor.page import write_page
from sela_ext.doctor.scan import scan
from sela_ext.doctor.sizes import extreme_rows, size_facts, tiny_rows
from sela_ext.doctor.suggestions import suggestions, training_plan
from sela_ext.doctor.table import FIRST, Noted, Table
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels.build import build_info
from sela_ext.training.options import Options
from sela_ext.training.progress import RunProgress

# Number of the layout of the result; it grows when a key changes its meaning or goes, not when one is added.
SCHEMA = 1
# Images looked at by `quick`.
QUICK_SAMPLE = 2000
# Bad images, groups and members of a group that the result lists one by one.
LISTED_BAD, LISTED_GROUPS, LISTED_MEMBERS, LISTED_CLASSES = 10_000, 200, 50, 10_000


def check(
    data: Any,
    *,
    labels: Any,
    eval_data: Any,
    json_file: str | os.PathLike[str] | None,
    out: str | os.PathLike[str] | None,
    threads: int,
    sample: int | None,
    quick: bool,
    progress: bool,
) -> dict[str, Any]:
    """See `sela_ext.doctor`."""
    began = time.perf_counter()
    for name, value, low in (("threads", threads, 0), ("sample", 1 if sample is None else sample, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
            raise OptionError(f"{name}: expected a whole number >= {low}, found {value!r}")
    for target in (json_file, out):
        if target is not None and not Path(target).absolute().parent.is_dir():
            raise OptionError(f"{target}: expected a file in a folder that exists, found none; create the folder first")
        if target is not None and Path(target).is_dir():
            raise OptionError(f"{target}: expected a file, found a folder; name a file in it")
    source = open_source(data, labels=labels)
    if source.vectors is not None:
        raise DataError(f"data: expected images, found {source.describe()}, which train looks through by itself")
    held = find_eval_source(data) if eval_data is None else open_source(eval_data)
    size = int(sample) if sample is not None else QUICK_SAMPLE if quick else None
    workers = threads_of(int(threads))
    with RunProgress(progress) as bar:
        table = scan(
            source,
            held,
            sample=size,
            threads=workers,
            progress=lambda done, of: bar.update(done / of, f"{done:,} of {of:,} images looked at"),
        )
        looked_seconds = time.perf_counter() - began
        bar.update(1.0, "comparing images")
        result, duplicates = _result(data, source, held, table, workers)
    result["seconds"] = {
        "looking": round(looked_seconds, 3),
        "total": round(time.perf_counter() - began, 3),
    }
    if json_file is not None:
        _write_json(Path(json_file), result)
    if out is not None:
        write_page(Path(out), result, table, duplicates, lambda row: _read(source, held, table, row))
    return result


def _read(source: Source, held: Source | None, table: Table, row: int) -> Any:
    images = held if held is not None and table.held[row] else source
    return images.read(int(table.index[row]))


def _result(
    data: Any, source: Source, held: Source | None, table: Table, threads: int
) -> tuple[dict[str, Any], Duplicates]:
    def name(row: int) -> str:
        images = held if held is not None and table.held[row] else source
        return images.name(int(table.index[row]))

    own = np.flatnonzero(~table.held)
    good = np.flatnonzero(table.good)
    own_good = table.index[good[~table.held[good]]]
    labels = _labels(source, held, table)
    duplicates = find_duplicates(table, labels)
    plan, why_not = training_plan(data, source, own_good)
    augment = Augment.eval(224) if plan is None else plan.augment
    pixels = float((table.height[good].astype(np.int64) * table.width[good]).mean()) if len(good) else 0.0
    speed = throughput(source, own_good, pixels, augment, threads)
    bad_here = int((~table.good[own]).sum())
    most_bad = float(Options().max_bad_fraction)
    files = len(source) if _are_files(source) else 0
    advice = suggestions(plan, why_not, bad=bad_here, looked_at=len(own), max_bad_fraction=most_bad, files=files)
    listing = _Listing(table, labels, source.class_names, name)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "version": build_info()["version"],
        "usable": bool(len(own_good)),
        "encoded": source.encoded,
        "data": {
            "path": str(data) if isinstance(data, (str, os.PathLike)) else None,
            "kind": source.kind,
            "description": source.describe(),
            "images": len(source),
            "channels": source.channels,
            "looked_at": len(table),
            "readable": len(good),
            "sampled": bool(len(own) < len(source)),
            "held_out": None
            if held is None
            else {"kind": held.kind, "images": len(held), "looked_at": int(table.held.sum())},
        },
        "files": {
            "bytes": int(table.bytes[own].sum()),
            "formats": _counted(table.formats),
            "modes": _counted(table.modes),
            "orientations": {str(kind): table.orientations[kind] for kind in sorted(table.orientations)},
            "wrong_suffix": listing.noted(table.wrong_suffix),
            "animated": listing.noted(table.animated),
            "sixteen_bit": listing.noted(table.deep),
            "cmyk": listing.noted(table.cmyk),
            "by_pillow": listing.noted(table.by_pillow),
            "other": _other(data, source, held),
        },
        "bad": {
            "count": len(table.faults),
            "fraction": round(len(table.faults) / max(1, len(table)), 6),
            "images": [
                {
                    "index": int(table.index[row]),
                    "name": name(row),
                    "held_out": bool(table.held[row]),
                    "reason": reason,
                }
                for row, reason in table.faults[:LISTED_BAD]
            ],
        },
        "odd": {
            "one_colour": listing.rows(np.flatnonzero(table.one_colour)),
            "tiny": listing.rows(tiny_rows(table)),
            "extreme_aspect": listing.rows(extreme_rows(table)),
        },
        "sizes": size_facts(table, good) if len(good) else None,
        "classes": _classes(None if labels is None else labels[own], source.class_names),
        "duplicates": _duplicates(duplicates, listing),
        "suggestions": [{"option": s.option, "value": s.value, "reason": s.reason} for s in advice],
        "command": _command(data, advice),
        "throughput": speed,
        "memory": None if plan is None else memory(len(source), source.channels, plan, table),
        "disk": disk(
            table,
            len(source),
            len(own),
            None if speed is None else speed["index_share_of_bytes"],
            encoded=source.encoded,
        ),
    }
    result["findings"] = [one.as_dict() for one in find(result)]
    return result, duplicates


def _are_files(source: Source) -> bool:
    """Whether each image is a file of its own."""
    try:
        return source.encoded and source.locate(0).path is not None
    except DataError:  # a row of a table without image
        return False


class _Listing:
    """Rows of the table as JSON."""

    def __init__(self, table: Table, labels: Int64Array | None, class_names: list[str] | None, name: Any) -> None:
        self._table, self._labels, self._class_names, self._name = table, labels, class_names, name

    def noted(self, noted: Noted) -> dict[str, Any]:
        words = [f" ({words})" if words else "" for _, words in noted.first]
        names = [self._name(row) for row, _ in noted.first]
        return {"count": noted.count, "first": [a + b for a, b in zip(names, words, strict=True)]}

    def rows(self, rows: Int64Array) -> dict[str, Any]:
        return {"count": len(rows), "first": [self._name(int(row)) for row in rows[:FIRST]]}

    def group(self, group: Group) -> dict[str, Any]:
        return {
            "count": len(group.rows),
            "same_bytes": group.same_bytes,
            "across_split": group.across,
            "labels_differ": group.contradicts,
            "images": [self._one(int(row)) for row in group.rows[:LISTED_MEMBERS]],
        }

    def _one(self, row: int) -> dict[str, Any]:
        label = None if self._labels is None or self._labels[row] < 0 else int(self._labels[row])
        names = self._class_names
        return {
            "index": int(self._table.index[row]),
            "name": self._name(row),
            "held_out": bool(self._table.held[row]),
            "label": label,
            "class": names[label] if names is not None and label is not None and label < len(names) else None,
            "height": int(self._table.height[row]),
            "width": int(self._table.width[row]),
            "bytes": int(self._table.bytes[row]),
        }


def _labels(source: Source, held: Source | None, table: Table) -> Int64Array | None:
    """True label of each row, -1 where unknown; None where there are none at all."""
    found = np.full(len(table), -1, np.int64)
    known = False
    for images, mine in ((source, ~table.held), (held, table.held)):
        if images is None:
            continue
        try:
            rows = np.flatnonzero(mine)
            values = images.labels_of(table.index[rows])
        except DataError:  # of a Dataset that cannot give an item, nor therefore its label
            rows = np.flatnonzero(mine & table.good)
            values = images.labels_of(table.index[rows])
        if values is not None:
            found[rows], known = values, True
    return found if known and (found >= 0).any() else None


def _counted(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _other(data: Any, source: Source, held: Source | None) -> dict[str, Any] | None:
    if source.kind != "folder" or not isinstance(data, (str, os.PathLike)) or not Path(data).is_dir():
        return None
    found = other_files(Path(data))
    inside = 0 if held is None or held.kind != "folder" else len(held)
    return {
        "count": found.count,
        "first": [os.fsencode(name).decode("utf-8", "backslashreplace") for name in found.first],
        "hidden": found.hidden,
        "special": found.special,
        "images_not_used": max(0, found.images - len(source) - inside),
    }


def _classes(labels: Int64Array | None, names: list[str] | None) -> dict[str, Any] | None:
    if labels is None or not (labels >= 0).any():
        return None
    counts = np.bincount(labels[labels >= 0], minlength=len(names or ()))
    used = counts[counts > 0]
    return {
        "count": len(used),
        "largest": int(used.max()),
        "smallest": int(used.min()),
        "imbalance": round(float(used.max() / used.min()), 3),
        "unknown": int((labels < 0).sum()),
        "without_images": int((counts == 0).sum()) if names is not None else 0,
        "classes": [
            {"label": k, "name": names[k] if names is not None and k < len(names) else None, "images": int(counts[k])}
            for k in np.flatnonzero(counts if names is None else np.ones_like(counts))[:LISTED_CLASSES].tolist()
        ],
    }


def _duplicates(found: Duplicates, listing: _Listing) -> dict[str, Any]:
    def part(groups: list[Group]) -> dict[str, Any]:
        images = sum(len(group.rows) for group in groups)
        return {
            "groups": len(groups),
            "images": images,
            "spare": images - len(groups),
            "same_bytes": sum(group.same_bytes for group in groups),
            "listed": [listing.group(group) for group in groups[:LISTED_GROUPS]],
        }

    search = found.search
    return {
        "exact": part(found.exact),
        "near": {
            **part(found.near),
            "threshold": round(search.threshold, 4),
            "usual_similarity": None if search.usual is None else round(search.usual, 4),
            "hash_distance": search.distance,
        },
        "leakage": {
            "held_out_images": found.held_exact + found.held_near,
            "exact": found.held_exact,
            "near": found.held_near,
        },
        "contradictions": {"groups": sum(group.contradicts for group in (*found.exact, *found.near))},
        "left_out": search.left_out,
    }


def _command(data: Any, advice: list[Any]) -> str | None:
    if not isinstance(data, (str, os.PathLike)):
        return None
    skip = any(one.option == "on_bad_image" and one.value == "skip" for one in advice)
    out = Path(os.path.abspath(data)).name or "run"
    words = ["sela", "train", "--data", os.fspath(data), "--out", f"runs/{out}"]
    return shlex.join(words + (["--on-bad-image", "skip"] if skip else []))


def _write_json(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}; name another file") from error
