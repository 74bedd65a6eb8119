"""One run of docs/results.md: train, measure, and a row of figures. `results.py` starts it as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from results_cases import DATA, ROOT, TEACHER, TRUE_LABELS, Case

# Directions in which features are clustered, and starts of that k-means: as `sela evaluate` has it.
DIRECTIONS, STARTS = 64, 10
NEIGHBOURS = 20
# Options of a run that say nothing of what is learnt, or that rows have elsewhere.
_ELSEWHERE = (
    "data", "eval_data", "seed", "fixed_labels", "device", "devices", "threads", "progress", "resume", "overwrite",
    "checkpoint_seconds", "index", "log_every",
)  # fmt: skip


class NotAvailableError(Exception):
    """This version has no such method or option."""


def run_case(case: Case, folder: Path, *, threads: int = 1, labels: Path | None = None) -> dict[str, Any]:
    """Do a run, and measure it.

    Args:
        case: the run.
        folder: for its files; need not exist.
        threads: processor threads.
        labels: of the teacher, labels.npz.

    Returns:
        The row, without the machine.

    Raises:
        NotAvailableError: the installed package does not have what the run needs.
    """
    from sela_ext import build_info

    data = DATA[case.data]
    where = data.find()
    if where is None:
        raise FileNotFoundError(f"{data.title}: not there; {data.missing}")
    began, work = time.perf_counter(), time.process_time()
    if case.kind == "train":
        row = _trained(case, where, folder, threads, labels)
    else:
        row = _untrained(case, where, threads)
    return {
        "key": case.key,
        "name": case.name,
        **case.identity(),
        **row,
        "version": build_info()["version"],
        "commit": commit(),
        "threads": threads,
        "seconds_in_all": round(time.perf_counter() - began, 1),
        "processor_seconds_in_all": round(time.process_time() - work, 1),
    }


def commit() -> str | None:
    """The commit of the tree that this file belongs to, "+" where package or core were changed since; None: no git."""
    try:
        asked = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
        name = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], **asked).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", "sela_ext", "csrc"], **asked).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+" if changed else "")


# ---------------------------------------------------------------- a trained network


def _trained(case: Case, where: str, folder: Path, threads: int, labels: Path | None) -> dict[str, Any]:
    from sela_ext import train
    from sela_ext.errors import OptionError

    options = {**case.options, "eval_data": DATA[case.data].test()}
    if options.get("fixed_labels") == TRUE_LABELS:
        options["fixed_labels"] = str(_written_classes(where, folder))
    elif options.get("fixed_labels") == TEACHER:
        if labels is None:
            raise FileNotFoundError(f"{case.title}: the teacher's labels are not there")
        options["fixed_labels"] = str(labels)
    began, work = time.perf_counter(), time.process_time()
    try:
        result = train(where, out=folder, seed=case.seed, threads=threads, progress=False, **options)
    except OptionError as error:
        if "not available" in str(error) or "unknown option" in str(error):
            raise NotAvailableError(str(error)[:160]) from error
        raise
    trained = {
        "run_seconds": round(time.perf_counter() - began, 1),
        "run_processor_seconds": round(time.process_time() - work, 1),
    }
    row = read_run(folder, DATA[case.data].classes)
    if case.options.get("fixed_labels") == TRUE_LABELS:
        row["metrics"]["test_accuracy"] = _own_accuracy(folder, case, threads)
    if "imbalance" not in case.options:
        row["metrics"].update(_clustered(folder, where, case, threads))
    row["class_sizes"], row["cluster_sizes"] = _sizes(result.labels, _training_classes(where), row["metrics"])
    return {**row, **trained}


def read_run(folder: Path, classes: int) -> dict[str, Any]:
    """What a run folder says of its run: metrics, heads by number of clusters, shares of the time.

    Args:
        folder: the run folder.
        classes: true classes: heads of so many clusters are "few", the others "many".
    """
    from sela_ext.report.metrics import read_metrics

    written = json.loads((folder / "options.json").read_text(encoding="utf-8"))
    log = read_metrics(folder / "metrics.jsonl")
    end = log.last("end")
    if end is None:
        raise ValueError(f"{folder}: the run has no end")
    metrics = {name: end[name] for name in ("knn", "linear") if name in end}
    heads = [head for head in end.get("heads", []) if "nmi" in head]
    few = [head for head in heads if head["clusters"] == classes]
    most = max((head["clusters"] for head in heads if head["clusters"] != classes), default=0)
    metrics.update(_of_heads("few", few))
    metrics.update(_of_heads("many", [head for head in heads if head["clusters"] == most]))
    seconds = float(end.get("elapsed_seconds") or 0.0)
    passes = log.of("label_pass")
    steps = log.of("step")
    row: dict[str, Any] = {
        "metrics": metrics,
        "epochs_done": end["epoch"],
        "images_seen": round(end["epoch"] * written["resolved"]["training_images"]),
        "label_passes": len(passes),
        "seconds": round(seconds, 1),
        "resolved": _resolved(written["options"]),
    }
    if seconds and passes:
        parts = ("solve_seconds", "embed_seconds")
        row["label_share"] = sum(float(one.get(part) or 0.0) for one in passes for part in parts) / seconds
    if steps and "data_wait_share" in steps[-1]:
        row["data_share"] = float(steps[-1]["data_wait_share"])
    return row


def _resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's options became, where that is not their default."""
    from sela_ext.training import Options

    defaults = {spec.name: spec.default for spec in fields(Options)}
    return {
        name: value
        for name, value in options.items()
        if name not in _ELSEWHERE and (name not in defaults or value != defaults[name])
    }


def _of_heads(name: str, heads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of the head of lowest cross-entropy, and the NMI of all of them."""
    if not heads:
        return {}
    chosen = min(heads, key=lambda head: (head.get("cross_entropy", 0.0), head["head"]))
    found: dict[str, Any] = {f"{name}_{metric}": chosen[metric] for metric in ("nmi", "ari", "accuracy", "purity")}
    found[f"{name}_clusters"], found[f"{name}_head"] = chosen["clusters"], chosen["head"]
    found[f"{name}_nmi_of_heads"] = [round(float(head["nmi"]), 4) for head in heads]
    return found


def _sizes(labels: Any, classes: Any, metrics: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Images per class that have a label, and per cluster of the head chosen among those with few clusters."""
    chosen = labels[metrics.get("few_head", 0)]
    known = (chosen >= 0) & (classes >= 0)
    sizes = np.bincount(chosen[known], minlength=metrics.get("few_clusters", 0))
    return np.bincount(classes[known]).tolist(), sorted(sizes.tolist())


# ---------------------------------------------------------------- data, features


def _classes(where: str) -> Any:
    """True labels of the training data, int64 [N]."""
    from sela_ext.data import open_source

    return np.array(open_source(where).labels, np.int64)


def _training_classes(where: str) -> Any:
    """The same, -1 for digits that judge."""
    from sela_ext.data import digits_split

    classes = _classes(where)
    if where == "digits":
        classes[digits_split()[1]] = -1
    return classes


def _written_classes(where: str, folder: Path) -> Path:
    """A file of the true labels, as `fixed_labels` takes it."""
    path = folder.with_name(f"{folder.name}-classes.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, _training_classes(where))
    return path


def _test(case: Case) -> Any:
    """The images that judge: the held-out digits, or those beside the training images."""
    from sela_ext.data import digits_split, find_eval_source, open_source

    where, named = DATA[case.data].find(), DATA[case.data].test()
    if where == "digits":
        return open_source(where).subset(digits_split()[1])
    return find_eval_source(where) if named is None else open_source(named)


def _own_accuracy(folder: Path, case: Case, threads: int) -> float:
    """Share of the test images that a network trained on the true labels names rightly."""
    from sela_ext import predict

    test = _test(case)
    return float((predict(folder, test, head=0, threads=threads) == test.labels).mean())


def _clustered(subject: Any, where: str, case: Case, threads: int) -> dict[str, float]:
    """k-means on the features of the training images, one cluster per class: a yardstick for every network."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    from sela_ext import embed
    from sela_ext.evaluation import cluster_metrics

    features, classes = embed(subject, where, threads=threads, seed=case.seed), _training_classes(where)
    features, classes = features[classes >= 0], classes[classes >= 0]
    if features.shape[1] > DIRECTIONS:
        features = PCA(DIRECTIONS, random_state=0).fit_transform(features)
    means = KMeans(DATA[case.data].classes, n_init=STARTS, random_state=case.seed)
    scores = cluster_metrics(classes, means.fit_predict(features), DATA[case.data].classes)
    return {f"features_{name}": scores[name] for name in ("nmi", "ari", "accuracy")}


def _untrained(case: Case, where: str, threads: int) -> dict[str, Any]:
    """The same figures of a network as it is built, or of pixels."""
    from sela_ext import evaluate

    subject = "pixels" if case.kind == "pixels" else f"random:{case.options['model']}"
    asked = {"k": NEIGHBOURS, "threads": threads, "seed": case.seed}
    test = DATA[case.data].test()
    pair = where if test is None else (where, test)
    found = evaluate(subject, pair, ("clusters", "knn", "linear"), **asked)
    metrics = {name: found[name] for name in ("knn", "linear")}
    metrics.update({f"features_{name}": found[name] for name in ("nmi", "ari", "accuracy")})
    return {"metrics": metrics, "images_seen": 0, "epochs_done": 0.0}


def main() -> int:
    """Read a case as JSON from stdin, write its row to the file named first; 3: not available."""
    given = json.load(sys.stdin)
    case = Case(**{**given["case"], "teacher": Case(**given["case"]["teacher"]) if given["case"]["teacher"] else None})
    labels = Path(given["labels"]) if given["labels"] else None
    try:
        row = run_case(case, Path(given["folder"]), threads=given["threads"], labels=labels)
    except (NotAvailableError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 3
    Path(sys.argv[1]).write_text(json.dumps(row), encoding="utf-8")
    return 0


def described(case: Case, folder: Path, threads: int, labels: Path | None) -> str:
    """What `main` reads."""
    return json.dumps(
        {"case": asdict(case), "folder": str(folder), "threads": threads, "labels": str(labels) if labels else None}
    )


def in_this_process(case: Case, threads: int) -> dict[str, Any]:
    """A run whose files are thrown away at once."""
    with tempfile.TemporaryDirectory() as folder:
        return run_case(case, Path(folder) / "run", threads=threads)


if __name__ == "__main__":
    sys.exit(main())
