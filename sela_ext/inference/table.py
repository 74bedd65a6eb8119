"""A report of `evaluate` as a table: its figures, the published ones and the trivial ones side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_NAMES = {
    "nmi": "NMI",
    "ami": "adjusted NMI",
    "ari": "adjusted Rand index",
    "accuracy": "accuracy, clusters and classes one to one",
    "majority_accuracy": "accuracy, clusters many to one (purity)",
    "class_entropy": "entropy of classes in a cluster, nats",
    "knn": "kNN",
    "knn_top5": "kNN, top-5",
    "linear": "linear probe",
    "linear_top5": "linear probe, top-5",
}


def figure_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, key, value) of every figure of one data set, in the order of the table."""
    rows = []
    for key, name in _NAMES.items():
        if key in report:
            shown = f"{name}, k = {report['knn_k']}" if key == "knn" else name
            rows.append((shown, key, _shown(report[key])))
    for count, found in report.get("knn_scores", {}).items():
        if int(count) != report["knn_k"]:
            rows.append((f"kNN, k = {count}", "", _shown(found["top1"])))
    for name, found in report.get("layers", {}).get("stages", {}).items():
        rows.append(
            (f"probe of {name} ({found['values']} values)", "", f"{_shown(found['top1'])} / {_shown(found['top5'])}")
        )
    for fraction, found in report.get("few_shot", {}).items():
        name = f"{float(fraction):.3g} of the labels ({found['images']} images)"
        rows.append((f"{name}, linear", "", _shown(found["linear"]["top1"])))
        if "fine_tuned" in found:
            rows.append((f"{name}, fine-tuned", "", _shown(found["fine_tuned"]["top1"])))
    return rows


def show_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print one table per data set.

    Args:
        report: what `evaluate` returned.
        console: where to; default: standard output.
    """
    target = console or Console(highlight=False, soft_wrap=False)
    for one in report["data_sets"]:
        published, trivial = one.get("published", []), one.get("trivial")
        clusters = one.get("clusters")
        notes = [f"{one['images']:,} images, {one['test_images']:,} test images, {one['classes']} classes"]
        if clusters is not None:
            notes.append(
                f"clusters: labels {clusters['labels']}; head {clusters['head']} of {len(clusters['heads'])}, chosen "
                "without true labels"
                if len(clusters["heads"]) > 1
                else f"clusters: {clusters['labels']}"
            )
        table = Table(
            title=f"{report['subject']['name']} on {one['name']}", caption="; ".join(notes), title_justify="left"
        )
        table.add_column("figure")
        table.add_column("found", justify="right")
        for entry in published:
            table.add_column(f"{entry['model']} ({entry['source']})", justify="right")
        if trivial is not None:
            table.add_column("pixels alone", justify="right")
        for name, key, value in figure_rows(one):
            cells = [_shown(entry[key]) if key in entry else "" for entry in published]
            if trivial is not None:
                cells.append(_shown(trivial[key]) if key in trivial else "")
            table.add_row(name, value, *cells)
        target.print(table)


def _shown(value: float) -> str:
    return f"{value:.3f}"
