"""What the report says in words and tables, worked out from the run folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sela_ext.report.charts import Chart, Series, line_chart, short_number, size_chart
from sela_ext.report.metrics import Event, columns, head_columns, heads_of, number
from sela_ext.report.run_folder import RunFolder, cluster_counts, last_event

# Longer values of options are cut: a list of 100,000 paths is no reading matter.
_LONGEST_VALUE = 600
_DEEPEST_VALUE = 8
# More label passes than this are not listed one by one.
_MOST_PASSES = 200

# Key in an evaluation event -> what readers call it, and what it is.
SCORES = {
    "nmi": ("NMI", "mutual information with true labels"),
    "ami": ("AMI", "the same, adjusted for chance"),
    "ari": ("ARI", "pairs alike in both, adjusted for chance"),
    "accuracy": ("Accuracy", "each cluster matched to one class"),
    "purity": ("Purity", "in the main class of their cluster"),
    "knn": ("kNN", "nearest neighbours by features"),
    "linear": ("Linear", "linear probe on features"),
    "agreement": ("Agreement", "of the network with the labels given"),
    "rotation_accuracy": ("Rotations", "told right, of images as they are"),
}


@dataclass(frozen=True)
class Tile:
    """A number to be seen at a glance, its label and a line about it."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class HeadRow:
    """A head of the network: its clusters, and how they came out."""

    head: int
    clusters: int
    used: int
    size_min: int
    size_max: int
    cross_entropy: float
    ln_k: float
    nmi: float
    chosen: bool


@dataclass(frozen=True)
class PassRow:
    """A label pass: the solver's word on all heads that it labelled."""

    number: int
    epoch: float
    step: int
    heads: int
    methods: str
    converged: int
    error: float
    reads: float
    changed: float
    masked: int
    seconds: float


@dataclass(frozen=True)
class OptionRow:
    """An option, its value as text, and why "auto" became that."""

    name: str
    value: str
    reason: str


def duration(seconds: float) -> str:
    """Write a time in the units that people use.

    Example:
        >>> duration(58.4), duration(343), duration(7380), duration(200000)
        ('58.4 s', '5 min 43 s', '2 h 3 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def sizes_of(labels: npt.NDArray[np.int32], clusters: int) -> npt.NDArray[np.int64]:
    """Count the images of each cluster: int64 [K]; label -1 is left out."""
    return np.bincount(labels[labels >= 0], minlength=clusters).astype(np.int64)


def sentences(run: RunFolder) -> list[str]:
    """Tell the run in plain words: images, clusters, head, agreement with true labels, solver, time."""
    total = run.labels.shape[1]
    labels = run.labels[run.head]
    sizes = sizes_of(labels, run.clusters)
    labelled = int(sizes.sum())
    used = int((sizes > 0).sum())
    end = last_event(run.metrics)
    said = []
    skipped = f" ({_count(total - labelled, 'more image')} got no label)" if labelled < total else ""
    groups = f"all {run.clusters:,}" if used == run.clusters else f"{used:,} of {run.clusters:,}"
    fixed = run.options.get("fixed_labels") is not None
    how = "by labels that were given" if fixed else "without using any labels"
    said.append(
        f"{_count(labelled, 'image')} {'was' if labelled == 1 else 'were'} sorted into "
        f"{_count(run.clusters, 'cluster')} {how}{skipped}; "
        f"{groups} hold images, between {int(sizes.min()):,} and {int(sizes.max()):,} each, "
        f"where an even split would be {short_number(round(labelled / run.clusters, 1))}."
    )
    purity = number(end.get("purity"))
    if math.isfinite(purity):
        said.append(
            f"Measured against true labels{'' if fixed else ', which training never saw'}: {purity:.1%} of the images "
            "belong to the most frequent class of their cluster."
        )
    if run.labels.shape[0] > 1:
        why = (
            ", because its labels fit the network best (lowest cross-entropy); true labels play no part in that choice"
        )
        told = isinstance(end.get("head"), int) or run.metrics.of("label_pass")
        said.append(f"Of heads 0 to {run.labels.shape[0] - 1}, head {run.head} is shown{why if told else ''}.")
    agree = end.get("stability_by_clusters")
    agree = {k: v for k, v in agree.items() if k.isdecimal() and len(k) < 10} if isinstance(agree, dict) else {}
    if agree:
        known = [f"{number(value):.3f} for {_count(int(k), 'cluster')}" for k, value in agree.items()]
        said.append(
            f"Heads that began differently agree to {', '.join(known)} (adjusted mutual information: 1 is the same "
            "clusters, 0 is chance); more agreement speaks for a number of clusters that the data have."
        )
    rows = pass_rows(run)
    if run.metrics.events and not rows:
        said.append("No label pass was logged: the labels were given, or stayed as they were drawn.")
    elif rows and all(row.converged == row.heads for row in rows):
        times = "its one label pass" if len(rows) == 1 else f"all {len(rows):,} label passes"
        said.append(f"{_solver(rows)[:1].upper()}{_solver(rows)[1:]} converged in {times}.")
    elapsed, epochs = number(end.get("elapsed_seconds")), number(end.get("epoch"))
    if math.isfinite(elapsed) and math.isfinite(epochs):
        said.append(f"Training took {duration(elapsed)} over {_count(epochs, 'epoch')}.")
    return said


def notices(run: RunFolder) -> list[str]:
    """Tell what a reader must not overlook: labels close to guessing, a solver that stopped early, a run cut short."""
    said = []
    shown = head_rows(run)[run.head]
    if shown.cross_entropy > 0.8 * shown.ln_k > 0:
        said.append(
            f"The network can hardly tell these clusters apart: its cross-entropy is {shown.cross_entropy:.2f}, where "
            f"guessing among {run.clusters:,} clusters gives {shown.ln_k:.2f}. Training longer may help."
        )
    rows = pass_rows(run)
    short = [row for row in rows if row.converged < row.heads]
    if short:
        worst = max((row.error for row in short if math.isfinite(row.error)), default=math.nan)
        by = f" (largest error {worst:.2g})" if math.isfinite(worst) else ""
        which = f"In {len(short):,} of {len(rows):,} label passes" if len(rows) > 1 else "In the one label pass"
        said.append(f"{which} {_solver(rows)} stopped before it converged{by}.")
    masked = max((row.masked for row in rows), default=0)
    if masked:
        said.append(f"Up to {_count(masked, 'image')} had no usable output in a label pass and got no label there.")
    end = run.metrics.last("end") or {}
    for name in ("warnings", "wait_warnings"):
        found = end.get(name)
        said += [_sentence(one) for one in found if isinstance(one, str)] if isinstance(found, list) else []
    if not run.metrics.events:
        said.append("The run has no log (metrics.jsonl): how training went is not known.")
    elif run.metrics.last("end") is None:
        epoch = _over(columns(run.metrics.events, "epoch")["epoch"], np.max)
        reached = f" after epoch {short_number(round(epoch, 2))}" if math.isfinite(epoch) else ""
        said.append(f"The log has no end{reached}: training was interrupted or is still running.")
    return said


def _solver(rows: list[PassRow]) -> str:
    """What made the labels: k-means balances nothing and is no solver."""
    return "k-means" if all(row.methods == "kmeans" for row in rows) else "the label solver"


def _sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _count(count: float, noun: str) -> str:
    return f"{short_number(round(count, 2))} {noun}{'' if count == 1 else 's'}"


def tiles(run: RunFolder) -> list[Tile]:
    """Choose the numbers for the head of the page."""
    sizes = sizes_of(run.labels[run.head], run.clusters)
    end = last_event(run.metrics)
    found = [
        Tile(f"{int(sizes.sum()):,}", "Images", "with a label"),
        Tile(f"{int((sizes > 0).sum()):,}", "Clusters in use", f"of {run.clusters:,}"),
    ]
    for key, (name, meaning) in SCORES.items():
        value = number(end.get(key))
        if math.isfinite(value):
            found.append(Tile(f"{value:.3f}", name, meaning))
    elapsed = number(end.get("elapsed_seconds"))
    if math.isfinite(elapsed):
        found.append(Tile(duration(elapsed), "Time", "of training"))
    return found


def head_rows(run: RunFolder) -> list[HeadRow]:
    """Describe every head: sizes from its labels, the rest from its newest events."""
    newest: dict[int, dict[str, Any]] = {}
    for event in run.metrics.of("label_pass", "evaluation", "end"):
        for entry in heads_of(event):
            newest.setdefault(entry["head"], {}).update(entry)
    counts = cluster_counts(run.metrics, run.labels.shape[1])
    rows = []
    for head in range(run.labels.shape[0]):
        clusters = max(1, counts.get(head, 0), int(run.labels[head].max()) + 1)
        sizes = sizes_of(run.labels[head], clusters)
        entry = newest.get(head, {})
        rows.append(
            HeadRow(
                head=head,
                clusters=clusters,
                used=int((sizes > 0).sum()),
                size_min=int(sizes.min()),
                size_max=int(sizes.max()),
                cross_entropy=number(entry.get("cross_entropy")),
                ln_k=math.log(clusters),
                nmi=number(entry.get("nmi")),
                chosen=head == run.head,
            )
        )
    return rows


def pass_rows(run: RunFolder) -> list[PassRow]:
    """Sum up each label pass over the heads that it labelled."""
    rows = []
    for event in run.metrics.of("label_pass"):
        heads = heads_of(event)
        values = columns(heads, "error", "passes", "changed")
        rows.append(
            PassRow(
                number=_whole(event.get("pass")),
                epoch=number(event.get("epoch")),
                step=_whole(event.get("step")),
                heads=len(heads),
                methods=", ".join(sorted({str(entry["method"]) for entry in heads if entry.get("method")})),
                converged=sum(entry.get("converged") is True for entry in heads),
                error=_over(values["error"], np.max),
                reads=_over(values["passes"], np.sum),
                changed=_over(values["changed"], np.mean),
                masked=_whole(event.get("masked")),
                seconds=number(event.get("solve_seconds")),
            )
        )
    return rows


def listed_passes(rows: list[PassRow]) -> list[PassRow]:
    """Choose the passes to list: all, or the last ones and every one that did not converge, up to a limit."""
    if len(rows) <= _MOST_PASSES:
        return rows
    failed = [i for i, row in enumerate(rows) if row.converged < row.heads][-_MOST_PASSES // 2 :]
    recent = range(len(rows) - (_MOST_PASSES - len(failed)), len(rows))
    return [rows[i] for i in sorted({*failed, *recent})]


def _over(values: npt.NDArray[np.float64], how: Callable[[npt.NDArray[np.float64]], Any]) -> float:
    """Reduce the finite values, NaN where there are none."""
    finite = values[np.isfinite(values)]
    return float(how(finite)) if finite.size else math.nan


def _whole(value: Any) -> int:
    found = number(value)
    return int(found) if math.isfinite(found) else 0


def option_rows(run: RunFolder) -> list[OptionRow]:
    """List the options, those that were "auto" first, each with its reason."""
    rows = [OptionRow(name, value_text(value), run.reasons.get(name, "")) for name, value in run.options.items()]
    known = {row.name for row in rows}
    rows += [
        OptionRow(name, value_text(run.resolved.get(name, "")), why)
        for name, why in run.reasons.items()
        if name not in known
    ]
    return sorted(rows, key=lambda row: (row.reason == "", row.name))


def fact_rows(resolved: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the derived facts of a run as (name, value)."""
    return [(name.replace("_", " "), value_text(value)) for name, value in resolved.items()]


def value_text(value: Any, depth: int = 0) -> str:
    """Write a value as a reader expects it, cut where it is very long.

    Example:
        >>> value_text(True), value_text([128, 10]), value_text(None), value_text({"mean": [0.5, 1 / 3]})
        ('yes', '128, 10', 'none', 'mean: 0.5, 0.333333')
    """
    if value is None:
        text = "none"
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, str):
        text = value
    elif isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, (list, dict)) and depth > _DEEPEST_VALUE:
        text = "..."
    elif isinstance(value, list):
        text = ", ".join(value_text(item, depth + 1) for item in value[:_LONGEST_VALUE])
    elif isinstance(value, dict):
        parts = ((str(name).replace("_", " "), value_text(item, depth + 1)) for name, item in value.items())
        text = "; ".join(f"{name}: {item}" for name, item in parts)
    else:
        text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} ... (cut)"


def charts(run: RunFolder) -> list[Chart]:
    """Draw what the log holds: loss, learning rate, labels, cross-entropies, scores."""
    metrics = run.metrics
    steps, passes = metrics.of("step"), metrics.of("label_pass")
    evaluations = metrics.of("evaluation", "end")
    step = columns(steps, "epoch", "loss", "lr")
    drawn = [
        line_chart("Training loss", [Series(step["epoch"], step["loss"])], x_label="epoch", y_label="loss (nats)"),
        line_chart(
            "Learning rate",
            [Series(step["epoch"], step["lr"], colour=1)],
            x_label="epoch",
            y_label="learning rate",
            from_zero=True,
        ),
        line_chart(
            "Labels that changed",
            _head_series(run, passes, "changed"),
            x_label="epoch",
            y_label="share of images",
            from_zero=True,
            ceiling=1.0,
        ),
        line_chart(
            "Cross-entropy of each head against its labels",
            _head_series(run, passes, "cross_entropy", ln_k=True),
            x_label="epoch",
            y_label="cross-entropy (nats)",
            from_zero=True,
        ),
        line_chart(
            "Agreement with true labels",
            _head_series(run, passes, "nmi") or _head_series(run, evaluations, "nmi"),
            x_label="epoch",
            y_label="NMI",
            from_zero=True,
            ceiling=1.0,
        ),
    ]
    if len(evaluations) > 1:
        drawn.append(
            line_chart(
                "Scores during training",
                _score_series(evaluations),
                x_label="epoch",
                y_label="score",
                from_zero=True,
                ceiling=1.0,
            )
        )
    return [chart for chart in drawn if chart is not None]


def size_drawing(run: RunFolder) -> Chart:
    """Draw the cluster sizes of the shown head."""
    sizes = sizes_of(run.labels[run.head], run.clusters)
    return size_chart(sizes, even=float(sizes.sum()) / run.clusters, title=f"Cluster sizes, head {run.head}")


def _head_series(run: RunFolder, events: list[Event], name: str, *, ln_k: bool = False) -> list[Series]:
    """One curve per head, coloured by its number of clusters; the shown head bold and last."""
    curves = head_columns(events, name)
    if not curves:
        return []
    counts = cluster_counts(run.metrics, run.labels.shape[1])
    kinds = sorted({counts.get(head, 0) for head in curves})
    colour = {clusters: i % 6 for i, clusters in enumerate(kinds)}
    series = []
    for clusters in kinds:
        heads = [head for head in curves if counts.get(head, 0) == clusters and head != run.head]
        for place, head in enumerate(heads):
            text = f"K = {clusters:,}" if clusters else "other heads"
            group = f"{text} ({_count(len(heads), 'head')})"
            series.append(
                Series(
                    *curves[head],
                    legend=group if place == 0 else "",
                    colour=colour[clusters],
                    strong=False,
                    name=f"head {head}",
                    group=group,
                )
            )
    if run.head in curves:
        clusters = counts.get(run.head, 0)
        title = f"head {run.head}" + (f" (shown, K = {clusters:,})" if clusters else " (shown)")
        series.append(Series(*curves[run.head], legend=title, colour=colour[clusters], name=f"head {run.head}"))
    if ln_k:
        every = np.concatenate([x for x, _ in curves.values()])
        every = every[np.isfinite(every)]
        if every.size:
            ends = np.array([every.min(), every.max()])
            series += [
                Series(ends, np.full(2, math.log(k)), f"ln {k:,}: pure guessing", colour[k], dashed=True)
                for k in kinds
                if k > 1
            ]
    return series


def _score_series(evaluations: list[Event]) -> list[Series]:
    values = columns(evaluations, "epoch", "knn", "linear", "accuracy", "ari")
    return [
        Series(values["epoch"], values[key], SCORES[key][0], colour)
        for colour, key in enumerate(("knn", "linear", "accuracy", "ari"))
        if np.isfinite(values[key]).any()
    ]
