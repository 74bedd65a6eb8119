"""From the rows of bench/results/learning.jsonl to the tables of docs/results.md. Nothing is measured here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import results_cases as cases
from results_cases import DATA, Case
from target_table import Target, Value

Row = Mapping[str, Any]
NOTHING = "Nothing is recorded yet."
# Clusters of the larger heads, unless a table says otherwise.
MANY = 128
# Metric of a row -> heading.
HEADINGS = {
    "knn": "kNN",
    "linear": "linear",
    "few_nmi": "NMI",
    "few_ari": "ARI",
    "few_accuracy": "accuracy",
    "many_nmi": "NMI, K = 128",
    "many_purity": "purity, K = 128",
    "features_nmi": "k-means: NMI",
    "features_accuracy": "accuracy",
}


def read_rows(path: Path) -> list[Row]:
    """All rows of the file, oldest first; none without the file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def newest(rows: Iterable[Row]) -> dict[str, Row]:
    """The newest row of every run."""
    return {row["key"]: row for row in rows}


def rows_of(case: Case, rows: Mapping[str, Row], seeds: Sequence[int] = cases.SEEDS) -> list[Row]:
    """The rows of a case, one per seed, all with the options of the newest: no mean is taken over two recipes."""
    found = []
    for one in cases.cases_of([case.study], [case.data], seeds):
        if one.name == case.name and one.key in rows:
            found.append(rows[one.key])
    latest = max(found, key=lambda row: str(row.get("time", "")), default=None)
    return [row for row in found if latest is not None and row.get("resolved") == latest.get("resolved")]


def values(rows: Iterable[Row], metric: str) -> list[float]:
    """One metric of some rows, where they have it."""
    return [float(row["metrics"][metric]) for row in rows if row["metrics"].get(metric) is not None]


def spread(found: Sequence[float]) -> str:
    """Mean and deviation of a few values, without the zero in front."""
    if not found:
        return "-"
    return three(fmean(found)) + (f" ± {three(stdev(found))}" if len(found) > 1 else "")


def three(number: float) -> str:
    """Three decimals, as figures of scores are written here."""
    text = f"{number:.3f}"
    return text.replace("0.", ".", 1) if abs(number) < 1 else text


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left."""
    out = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*out, *("| " + " | ".join(line) + " |" for line in lines)])


def minutes(rows: Sequence[Row]) -> str:
    """Processor minutes of a run, in the mean."""
    found = [row.get("run_processor_seconds", row["processor_seconds_in_all"]) / 60 for row in rows]
    return f"{fmean(found):.2g}" if found and fmean(found) < 10 else f"{fmean(found):.0f}" if found else "-"


def recorded(study: str, rows: Mapping[str, Row], data: str) -> list[tuple[Case, list[Row]]]:
    """Cases of a study on a data set, each with its rows, in the order of the study; those without rows left out."""
    found = [(case, rows_of(case, rows)) for case in cases.cases_of([study], [data], [0])]
    return [(case, own) for case, own in found if own]


# ---------------------------------------------------------------- the parts of the page


def machines(rows: Mapping[str, Row]) -> str:
    """Where the rows were made."""
    if not rows:
        return NOTHING
    lines = []
    for text in dict.fromkeys(_machine(row) for row in rows.values()):
        own = [row for row in rows.values() if _machine(row) == text]
        days = sorted({str(row["time"])[:10] for row in own})
        commits = sorted({str(row["commit"]) for row in own})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        at = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
        lines.append(f"* {text}: {len(own)} runs, {when}, {at}.")
    return "\n".join(lines)


def _machine(row: Row) -> str:
    facts = row["machine"]
    threads = "one thread" if row["threads"] == 1 else f"{row['threads']} threads"
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; sela_ext {facts['sela_ext']} "
        f"({facts['isa']}), torch {facts['torch']}, Python {facts['python']}; {threads} a run"
    )


def short(rows: Mapping[str, Row]) -> str:
    """The tables of methods in a sentence or two per data set."""
    lines = []
    for data in DATA.values():
        found = {case.name: own for case, own in recorded("methods", rows, data.name)}
        means = {name: fmean(values(own, "knn")) for name, own in found.items() if values(own, "knn")}
        if "SeLa" not in means:
            continue
        others = [f"{name} {three(means[name])}" for name in _ORDER if name in means and name != "SeLa"]
        labels = "; ".join(
            f"{text} {three(fmean(scores))}"
            for text, metric in (("NMI", "few_nmi"), ("accuracy", "few_accuracy"))
            if (scores := values(found["SeLa"], metric))
        )
        lines.append(
            f"* **{data.title}**: SeLa's features name {three(means['SeLa'])} of the test images rightly by kNN"
            + (f" ({', '.join(others)})" if others else "")
            + (f". Its {data.classes} clusters against the classes: {labels}." if labels else ".")
        )
    return "\n".join(lines) or NOTHING


_ORDER = ("pixels", "random network", *cases.METHODS)


def methods(rows: Mapping[str, Row]) -> str:
    """Methods side by side, a table per data set."""
    parts = []
    for data in DATA.values():
        found = {case.name: own for case, own in recorded("methods", rows, data.name)}
        if not found:
            continue
        missing = [name for name in cases.METHODS if name not in found]
        lines = []
        for name in _ORDER:
            own = found.get(name)
            if own is None:
                continue
            scores = [_score(name, own, metric) for metric in HEADINGS]
            lines.append((name, *scores, minutes(own), str(len(own))))
        epochs = data.epochs["methods"]
        parts.append(
            f"**{data.title}**, {data.model}, {epochs} epochs.\n\n"
            + table(("", *HEADINGS.values(), "processor minutes", "seeds"), lines)
        )
        own = found.get("supervised network")
        if own:
            parts.append(
                f"The supervised network names {spread(values(own, 'test_accuracy'))} of the test images rightly."
            )
        if missing:
            parts.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n\n".join(parts) or NOTHING


def _score(name: str, rows: Sequence[Row], metric: str) -> str:
    """A cell of the table of methods."""
    part = metric.split("_")[0]
    # Heads of a network that was given the true labels would only give them back.
    if name == "supervised network" and part in ("few", "many"):
        return "-"
    own = {row["metrics"].get("many_clusters") for row in rows} - {None, MANY}
    note = f" (K = {min(own)})" if part == "many" and own else ""
    return spread(values(rows, metric)) + note


def behind(rows: Mapping[str, Row]) -> str:
    """Where SeLa loses: every figure in which another method, or no learning at all, has the higher mean."""
    lines, compared = [], 0
    rivals = ("pixels", "random network", *cases.UNSUPERVISED[1:])
    for data in DATA.values():
        found = {case.name: own for case, own in recorded("methods", rows, data.name)}
        for metric, heading in HEADINGS.items():
            ours = values(found.get("SeLa", []), metric)
            for name in rivals:
                theirs = values(found.get(name, []), metric)
                if not ours or not theirs or "K = " in _score(name, found[name], metric):
                    continue
                compared += 1
                gap = fmean(theirs) - fmean(ours)
                if gap <= 0:
                    continue
                if min(len(ours), len(theirs)) < 2:
                    words = "of one seed, so what it is worth is not known"
                else:
                    noise = (_variance(ours) + _variance(theirs)) ** 0.5
                    words = f"{'more' if gap > 2 * noise else 'less'} than twice its standard error"
                shown = "k-means on the features: accuracy" if metric == "features_accuracy" else heading
                lines.append(
                    f"* {data.title}, {shown}: {name} {three(fmean(theirs))}, SeLa {three(fmean(ours))}; the "
                    f"difference of {three(gap)} is {words}."
                )
    if not compared:
        return NOTHING
    if not lines:
        return f"In none of the {compared} comparisons of the tables above."
    return f"In {len(lines)} of {compared} comparisons of the tables above:\n\n" + "\n".join(lines)


def _variance(found: Sequence[float]) -> float:
    """Of the mean of these values."""
    return stdev(found) ** 2 / len(found) if len(found) > 1 else 0.0


# ---------------------------------------------------------------- goals


def _middle(name: str, data: str, metric: str, pick: Callable[[list[float]], float] = median) -> Callable[..., Value]:
    """A figure over the seeds of a case of the study `goals`."""

    def value(rows: Sequence[Row]) -> Value:
        by_key = newest(rows)
        case = next(one for one in cases.cases_of(["goals"], [data], [0]) if one.name == name)
        found = values(rows_of(case, by_key), metric)
        shown = " ".join(three(one) for one in found)
        return Value(pick(found) if found else None, shown)

    return value


def _share(data: str, part: str) -> Callable[..., Value]:
    """A share of the training time, in percent: the largest over the seeds."""

    def value(rows: Sequence[Row]) -> Value:
        case = next(one for one in cases.cases_of(["goals"], [data], [0]) if one.name == "SeLa")
        found = [100 * float(row[part]) for row in rows_of(case, newest(rows)) if part in row]
        return Value(max(found) if found else None, " ".join(f"{one:.2g}" for one in found))

    return value


def _lead(data: str, metric: str) -> Callable[..., Value]:
    """SeLa above k-means in the loop, medians, at the epochs of the study `methods`."""

    def value(rows: Sequence[Row]) -> Value:
        found = {case.name: own for case, own in recorded("methods", newest(rows), data)}
        ours, theirs = (values(found.get(name, []), metric) for name in ("SeLa", "k-means in the loop"))
        if not ours or not theirs:
            return Value(None)
        return Value(median(ours) - median(theirs), f"{three(median(ours))} against {three(median(theirs))}")

    return value


def _goal(measure: str, gate: float | None, stretch: float | None, value: Callable[..., Value]) -> Target:
    return Target(measure, "", float("-inf") if gate is None else gate, stretch, True, value)


def goals() -> list[Target]:
    """The goals, in the order of the table."""
    found = [
        _goal("digits: NMI", 0.82, 0.90, _middle("SeLa", "digits", "few_nmi")),
        _goal("digits: NMI, worst seed", 0.74, None, _middle("SeLa", "digits", "few_nmi", min)),
        _goal("digits: accuracy", 0.85, 0.94, _middle("SeLa", "digits", "few_accuracy")),
        _goal("digits: kNN", 0.98, 0.99, _middle("SeLa", "digits", "knn")),
        _goal("digits: linear", 0.98, 0.99, _middle("SeLa", "digits", "linear")),
    ]
    larger = (
        ("fashion-mnist", "knn", 0.857, 0.88),
        ("fashion-mnist", "linear", 0.865, 0.885),
        ("fashion-mnist", "few_nmi", 0.58, 0.70),
        ("fashion-mnist", "many_nmi", 0.475, 0.50),
        ("cifar10", "knn", 0.59, 0.64),
        ("cifar10", "linear", 0.615, 0.66),
        ("cifar10", "few_nmi", 0.24, 0.30),
        ("cifar10", "few_accuracy", 0.36, 0.42),
        ("cifar10", "many_nmi", 0.225, 0.25),
    )
    for data, metric, gate, stretch in larger:
        found.append(_goal(f"{DATA[data].title}: {HEADINGS[metric]}", gate, stretch, _middle("SeLa", data, metric)))
    for metric, stretch in (("knn", 0.62), ("knn", 0.68), ("linear", 0.645), ("linear", 0.71)):
        longer = _middle("SeLa, 25 minutes", "cifar10", metric)
        found.append(_goal(f"CIFAR-10 JPEG, 25 minutes: {HEADINGS[metric]}", None, stretch, longer))
    for data in ("fashion-mnist", "cifar10"):
        for metric, gate in (("knn", 0.03), ("linear", 0.03), ("few_nmi", None)):
            measure = f"{DATA[data].title}: {HEADINGS[metric]} above k-means in the loop"
            found.append(_goal(measure, gate, 0.03 if gate is None else None, _lead(data, metric)))
    for data in DATA.values():
        for what, part, gate, stretch in (("labels", "label_share", 5, 1), ("images", "data_share", 4, 2)):
            measure = f"{data.title}: share of the training time for {what}, %"
            found.append(Target(measure, "%", gate, stretch, False, _share(data.name, part)))
    return found


def goal_table(rows: Mapping[str, Row]) -> str:
    """Measure, gate, stretch, what was found."""
    if not rows:
        return NOTHING
    lines = []
    for target in goals():
        found = target.value(list(rows.values()))
        write = three if target.unit == "" else (lambda number: f"{number:.2g}")
        verdict = "not measured yet" if found.number is None else target.verdict(found)
        if target.gate == float("-inf") and verdict == "gate":
            verdict = "stretch not met"
        lines.append(
            (
                target.measure,
                "-" if target.gate == float("-inf") else write(target.gate),
                "-" if target.stretch is None else write(target.stretch),
                "-" if found.number is None else write(found.number),
                verdict,
                found.note,
            )
        )
    return table(("", "gate", "stretch", "here", "met", "each seed"), lines)


# ---------------------------------------------------------------- the other studies


def ablation(rows: Mapping[str, Row]) -> str:
    """One change at a time, with the command that makes it."""
    parts = []
    for data in DATA.values():
        lines = [
            (
                case.name,
                *(spread(values(own, m)) for m in ("knn", "linear", "few_nmi", "many_nmi", "features_nmi")),
                minutes(own),
                f"`{cases.command(case)}`",
            )
            for case, own in recorded("ablation", rows, data.name)
        ]
        if lines:
            header = (
                "",
                "kNN",
                "linear",
                "NMI",
                "NMI of more clusters",
                "k-means: NMI",
                "processor minutes",
                "command",
            )
            parts.append(f"**{data.title}**, {data.epochs['ablation']} epochs.\n\n" + table(header, lines))
    return "\n\n".join(parts) or NOTHING


def transfer(rows: Mapping[str, Row]) -> str:
    """Networks that were taught by the labels of another run."""
    parts = []
    for data in DATA.values():
        shown = ("knn", "linear", "features_nmi", "features_accuracy")
        lines = [
            (case.name, *(spread(values(own, metric)) for metric in shown), minutes(own), f"`{cases.command(case)}`")
            for case, own in recorded("transfer", rows, data.name)
        ]
        if lines:
            header = ("", *(HEADINGS[metric] for metric in shown), "processor minutes", "command")
            parts.append(f"**{data.title}**, {data.epochs['transfer']} epochs.\n\n" + table(header, lines))
    return "\n\n".join(parts) or NOTHING


def imbalance(rows: Mapping[str, Row]) -> str:
    """Ways to share images out among clusters, on subsets of unequal classes."""
    parts = []
    for data in DATA.values():
        shown = ("knn", "linear", "few_nmi", "few_ari", "few_accuracy", "many_nmi")
        lines = []
        for case, own in recorded("imbalance", rows, data.name):
            classes, clusters = _range(own, "class_sizes"), _range(own, "cluster_sizes")
            lines.append((case.name, *(spread(values(own, metric)) for metric in shown), classes, clusters))
        if lines:
            header = ("", *(HEADINGS[metric] for metric in shown), "classes", "clusters")
            parts.append(f"**{data.title}**, {data.epochs['imbalance']} epochs.\n\n" + table(header, lines))
    return "\n\n".join(parts) or NOTHING


def _range(rows: Sequence[Row], name: str) -> str:
    """Smallest and largest size over the seeds."""
    found = [row[name] for row in rows if row.get(name)]
    return f"{min(map(min, found)):,} to {max(map(max, found)):,}" if found else "-"


PARTS: dict[str, Callable[[Mapping[str, Row]], str]] = {
    "short": short,
    "machines": machines,
    "goals": goal_table,
    "methods": methods,
    "behind": behind,
    "ablation": ablation,
    "transfer": transfer,
    "imbalance": imbalance,
}


def filled(text: str, rows: Mapping[str, Row]) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: a marker is missing, doubled or unknown.
    """
    found = re.findall(r"<!-- (\w+):(begin|end) -->", text)
    wanted = [(name, side) for name in dict.fromkeys(name for name, _ in found) for side in ("begin", "end")]
    if found != wanted or {name for name, _ in found} != set(PARTS):
        raise ValueError(f"docs/results.md: expected each of {', '.join(PARTS)} begun and ended once, found {found}")
    for name, make in PARTS.items():
        inside = make(rows)
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(pattern, lambda m, inside=inside: f"{m[1]}\n{inside}\n\n{m[2]}", text, flags=re.DOTALL)
    return text
