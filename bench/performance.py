"""Write the tables of docs/performance.md from the rows in bench/results; the prose between them is kept.

    python bench/performance.py [--check]

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. They show the latest full run of
bench/solver.py, of bench/images.py and of bench/training.py (all rows of a run have one time). Exit status: 0; with
--check 1 when the document is not what the rows give.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import images_targets
import solver_targets as targets
import training_targets

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
NOTHING = "*No full run is recorded yet.*"

Row = Mapping[str, Any]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; none when it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def latest_full(rows: Sequence[Row]) -> list[Row]:
    """The rows of the latest full run of a benchmark, but for parts that were run again alone since then.

    A part is a question and a case.
    """
    full = [row for row in rows if row.get("mode") == "full"]
    last = max((row["time"] for row in full), default=None)
    if last is None:
        return []
    shown = [row for row in full if row["time"] == last]
    alone = [row for row in rows if row.get("mode") == "only" and row["time"] > last]
    for time in sorted({row["time"] for row in alone}):
        again = [row for row in alone if row["time"] == time]
        parts = {(row["question"], row["case"]) for row in again}
        shown = [row for row in shown if (row["question"], row["case"]) not in parts] + again
    return shown


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def seconds(value: float) -> str:
    """Seconds with three digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2g}" if value < 0.1 else f"{value:.3g}"


def small(value: float | None) -> str:
    """An error."""
    return "-" if value is None else f"{value:.1e}"


def percent(value: float | None) -> str:
    """A share of labels: so many digits that what is not all does not read as all."""
    if value is None:
        return "-"
    return f"{100 * value:.4f}%".replace(".0000%", "%")


def in_order(values: Sequence[Any]) -> list[Any]:
    """Each once, as they come."""
    return list(dict.fromkeys(values))


# ---------------------------------------------------------------- the solver


def machine(rows: Sequence[Row]) -> str:
    """Where and with what."""
    if not rows:
        return NOTHING
    facts = rows[0]["machine"]
    names = (("torch", "torch"), ("numpy", "numpy"), ("POT", "POT"), ("ott-jax", "OTT-JAX"), ("jax", "JAX"))
    versions = ", ".join(f"{shown} {facts[name]}" for name, shown in names if facts.get(name))
    absent = ", ".join(shown for name, shown in names if name in facts and not facts[name])
    gb_s = max((row["bandwidth_gb_s"] for row in rows if row.get("bandwidth_gb_s")), default=None)
    lines = [
        f"{facts['cpu']} with {facts['cores']} cores and {facts['memory_gib']} GiB, {rows[0]['threads']} threads for "
        f"every competitor; {rows[0]['time'][:10]}.",
        f"sela_ext {facts['sela_ext']} ({facts['isa']}, {facts['compiler']}), {versions}, Python {facts['python']};",
        f"numpy's products: {facts['blas']}." + (f" Not installed: {absent}." if absent else ""),
        f"Load before the run: {facts['load']}." + (f" Plain reads: {gb_s:.1f} GB/s." if gb_s else ""),
    ]
    return "\n".join(lines)


def target_table(rows: Sequence[Row]) -> str:
    """The targets."""
    if not rows:
        return NOTHING
    header = ("Measure", "Gate", "Stretch", "Here", "Met", "")
    return table(header, targets.lines(rows))


def iterations(rows: Sequence[Row]) -> str:
    """One iteration of each competitor."""
    rows = targets.pick(rows, question="iteration")
    if not rows:
        return NOTHING
    out = []
    for case in in_order([row["case"] for row in rows]):
        part = targets.pick(rows, case=case)
        first = part[0]
        out.append(
            f"**{case.capitalize()}**, {first['rows']:,} x {first['cols']:,}: {first['live']:.3g} live entries a row, "
            f"whose median span is {first['span']:.0f} nats.\n"
        )
        lines = [
            (
                row["what"],
                f"{1e3 * row['seconds']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['share_of_bandwidth']:.0%}" if row["share_of_bandwidth"] else "-",
                small(row["columns_l1"]),
                percent(row["labels"]),
            )
            for row in part
        ]
        header = ("", "ms", "x fused float32", "of the read bandwidth", "columns, L1 from float64", "labels")
        out.append(table(header, lines) + "\n")
    return "\n".join(out).rstrip()


def solves(rows: Sequence[Row]) -> str:
    """Whole solves, one table per case."""
    rows = targets.pick(rows, question="solve")
    if not rows:
        return NOTHING
    out = []
    for case in in_order([row["case"] for row in rows]):
        part = targets.pick(rows, case=case)
        thresholds = sorted({row["threshold"] for row in part}, reverse=True)
        mine = {row["threshold"]: row for row in targets.pick(part, what="assign auto") if row["reached"]}
        lines = []
        for what in in_order([row["what"] for row in part]):
            found = {row["threshold"]: row for row in targets.pick(part, what=what)}
            last = list(found.values())[-1]
            cells = []
            for t in thresholds:
                row = found.get(t)
                cells.append("-" if row is None else ("" if row["reached"] else "> ") + seconds(row["seconds"]))
            both = [t for t in thresholds if t in mine and t in found and found[t]["reached"]]
            ratio = f"{found[both[-1]]['seconds'] / mine[both[-1]]['seconds']:.3g}" if both else "-"
            a_read = 1e3 * last["seconds"] / max(last["reads"], 1)
            reads = f"{last['reads']:,.1f}".removesuffix(".0")
            lines.append((what, *cells, reads, f"{a_read:.3g}", small(last["true_l1"]), percent(last["labels"]), ratio))
        header = ("", *(f"s to {t:g}" for t in thresholds), "reads", "ms per read", "true L1", "labels", "x auto")
        live = part[0]["live"]
        out.append(f"**{case[:1].upper() + case[1:]}**, {live:.3g} live entries per row.\n\n{table(header, lines)}\n")
    return "\n".join(out).rstrip()


def large(rows: Sequence[Row]) -> str:
    """ImageNet's size."""
    rows = targets.pick(rows, question="large")
    if not rows:
        return NOTHING
    live = {row["case"]: row["live"] for row in rows if row.get("live")}
    lines = []
    for row in rows:
        name = f"{row['case']}, {row['what']}, to {row['tol']:g}"
        a_read = "-" if row["seconds_per_read"] is None else f"{row['seconds_per_read']:.2f}"
        entries = f"{live[row['case']]:.3g}" if row["case"] in live else "-"
        lines.append(
            (
                name,
                seconds(row["seconds"]),
                f"{row['reads']:.2f}",
                a_read,
                small(row.get("true_l1")),
                row["method"],
                entries,
                f"{row['resident_gb']:.2f}",
                f"{row['bytes_per_entry']:.2f}",
            )
        )
    header = ("", "s", "reads", "s per read", "true L1", "method", "live entries", "resident GB", "bytes per entry")
    return table(header, lines)


def memory(rows: Sequence[Row]) -> str:
    """Memory of smaller solves."""
    rows = targets.pick(rows, question="memory")
    if not rows:
        return NOTHING
    lines = [
        (f"{row['case']}, {row['what']}", f"{row['bytes_per_entry']:.2f}", f"{row['peak_gb']:.3f}", f"{row['tol']:g}")
        for row in rows
    ]
    return table(("", "bytes per entry", "GB", "L1 asked for"), lines)


def accuracy(rows: Sequence[Row]) -> str:
    """What float32 reaches."""
    rows = targets.pick(rows, question="accuracy")
    if not rows:
        return NOTHING
    lines = [(row["case"], f"{row['span']:,.0f}", f"{row['reads']:.1f}", small(row["true_l1"])) for row in rows]
    return table(("", "widest span, nats", "reads", "true L1"), lines)


def balance(rows: Sequence[Row]) -> str:
    """Exact balance."""
    rows = targets.pick(rows, question="balance")
    if not rows:
        return NOTHING
    lines = [
        (
            row["case"],
            small(row["error_before"]),
            "..".join(map(str, row["sizes_before"])),
            f"{row['misplaced']:.1%}",
            f"{1e3 * row['seconds']:.0f}",
            f"{row['dense_passes']:.1f}",
            f"{row['reads']:.1f}",
            small(row["gap"]),
        )
        for row in rows
    ]
    return table(
        ("", "L1 before", "sizes", "misplaced", "ms", "in dense passes", "reads", "gap, nats per image"), lines
    )


# ---------------------------------------------------------------- images


def images_machine(rows: Sequence[Row]) -> str:
    """Where and with what."""
    if not rows:
        return NOTHING
    facts = rows[0]["machine"]
    names = images_targets.PACKAGES
    versions = ", ".join(f"{shown} {facts[name]}" for name, shown in names.items() if facts.get(name))
    absent = ", ".join(shown for name, shown in names.items() if not facts.get(name))
    lines = [
        f"{facts['cpu']} with {facts['cores']} cores and {facts['memory_gib']} GiB; {rows[0]['time'][:10]}.",
        f"sela_ext {facts['sela_ext']} ({facts['isa']}, {facts['compiler']}), torch {facts['torch']}, {versions},",
        f"Python {facts['python']}. Load before the run: {facts['load']}."
        + (f" Not installed: {absent}." if absent else ""),
    ]
    return "\n".join(lines)


def images_target_table(rows: Sequence[Row]) -> str:
    """The targets."""
    if not rows:
        return NOTHING
    return table(("Measure", "Gate", "Stretch", "Here", "Met", ""), images_targets.lines(rows))


def per_second(value: float) -> str:
    """A rate with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rate_table(rows: Sequence[Row]) -> str:
    """Images per second of one case, and how many times those of each competitor that is."""
    rivals = [row for row in rows if not row["ours"]]
    header = ("", "images per second", *(f"x {row['what']}" for row in rivals))
    lines = []
    for row in rows:
        rate = row["images_per_second"]
        ratios = (f"{rate / rival['images_per_second']:.3g}" for rival in rivals)
        lines.append((row["what"], per_second(rate), *ratios))
    return table(header, lines)


def rates_where(wanted: Callable[[Row], bool], **picked: Any) -> Callable[[Sequence[Row]], str]:
    """A function that writes one table of rates per case."""

    def write(rows: Sequence[Row]) -> str:
        rows = [row for row in targets.pick(rows, **picked) if wanted(row)]
        if not rows:
            return NOTHING
        cases = in_order([row["case"] for row in rows])
        capital = {case: case[:1].upper() + case[1:] for case in cases}
        return "\n\n".join(f"**{capital[case]}**\n\n{rate_table(targets.pick(rows, case=case))}" for case in cases)

    return write


def images_isa(rows: Sequence[Row]) -> str:
    """The instruction sets, as shares of the best one."""
    rows = targets.pick(rows, question="isa")
    if not rows:
        return NOTHING
    isas = in_order([row["what"] for row in rows])
    lines = []
    for case in in_order([row["case"] for row in rows]):
        rates = {row["what"]: row["images_per_second"] for row in targets.pick(rows, case=case)}
        best = max(rates.values())
        lines.append((case, *(f"{per_second(rates[i])} ({rates[i] / best:.0%})" if i in rates else "-" for i in isas)))
    return table(("", *isas), lines)


def images_agreement(rows: Sequence[Row]) -> str:
    """What was compared before anything was timed."""
    rows = targets.pick(rows, question="agreement")
    if not rows:
        return NOTHING
    lines = []
    for row in rows:
        mean, largest = row.get("mean"), row.get("largest")
        cells = ("-" if mean is None else f"{mean:.3f}", "-" if largest is None else f"{largest:.2g}")
        if "unequal" in row:
            cells = ("0", "0") if row["unequal"] == 0 else ("-", f"{row['unequal']} files differ")
        lines.append((f"{row['case']}: {row['what']}", row["beside"], *cells))
    return table(("", "beside", "mean difference, of 255", "largest"), lines)


def is_decoding(row: Row) -> bool:
    return str(row["case"]).startswith("decoding")


def by_wall(row: Row) -> bool:
    return row["clock"] == "wall"


# ---------------------------------------------------------------- the training


def training_machine(rows: Sequence[Row]) -> str:
    """Where and with what."""
    if not rows:
        return NOTHING
    facts = rows[0]["machine"]
    clock = "processor time" if rows[0]["clock"] == "processor" else "the wall clock"
    loads = {row["case"]: str(row["machine"]["load"]) for row in rows}  # parts may have been run again alone
    return (
        f"{facts['cpu']} with {facts['cores']} cores and {facts['memory_gib']} GiB, {rows[0]['threads']} thread(s), by "
        f"{clock}; {rows[0]['time'][:10]}.\nsela_ext {facts['sela_ext']} ({facts['isa']}, {facts['compiler']}), torch "
        f"{facts['torch']}, torchvision {facts['torchvision']}, Python {facts['python']}. Load before the run: "
        f"{', '.join(f'{load} ({case})' for case, load in loads.items())}."
    )


def training_target_table(rows: Sequence[Row]) -> str:
    """The targets."""
    if not rows:
        return NOTHING
    return table(("Measure", "Gate", "Stretch", "Here", "Met", ""), training_targets.lines(rows))


def training_rates(rows: Sequence[Row]) -> str:
    """The step and its parts, one table per case."""
    rows = targets.pick(rows, question="rate")
    out = []
    for case in in_order([row["case"] for row in rows]):
        of_case = targets.pick(rows, case=case)
        first = of_case[0]
        parts = in_order([row["part"] for row in of_case])
        out.append(
            f"**{case}**: {first['network']} at {first['image_size']} px, {first['precision']}, {first['batch_size']} "
            "images per step\n"
        )
        lines = []
        for what in in_order([row["what"] for row in of_case]):
            rates = [training_targets.rate(rows, case, part, what) for part in parts]
            lines.append((what, *("-" if rate is None else f"{rate:,.0f}" for rate in rates)))
        out.append(table(("images per second", *parts), lines) + "\n")
    return "\n".join(out).rstrip() or NOTHING


def training_shares(rows: Sequence[Row]) -> str:
    """What an epoch spends beside its steps."""
    rows = targets.pick(rows, question="share")
    if not rows:
        return NOTHING
    lines = [
        (
            f"{row['case']}: {row['part']}",
            row["what"],
            seconds(row["seconds"]),
            f"{100 * row['share']:{'.0f' if row['share'] >= 1 else '.2g'}}%",
        )
        for row in rows
    ]
    return table(("", "", "seconds", "of an epoch of ours"), lines)


# ---------------------------------------------------------------- the document

SOLVER: dict[str, Callable[[Sequence[Row]], str]] = {
    "machine": machine,
    "targets": target_table,
    "iterations": iterations,
    "solves": solves,
    "large": large,
    "memory": memory,
    "accuracy": accuracy,
    "balance": balance,
}

IMAGES: dict[str, Callable[[Sequence[Row]], str]] = {
    "images_machine": images_machine,
    "images_targets": images_target_table,
    "images_agreement": images_agreement,
    "images_pipelines": rates_where(lambda row: not is_decoding(row) and not by_wall(row), question="rate"),
    "images_threads": rates_where(by_wall, question="rate"),
    "images_decode": rates_where(is_decoding, question="rate"),
    "images_behind": rates_where(lambda row: True, question="behind"),
    "images_isa": images_isa,
}


TRAINING: dict[str, Callable[[Sequence[Row]], str]] = {
    "training_machine": training_machine,
    "training_targets": training_target_table,
    "training_rates": training_rates,
    "training_shares": training_shares,
}


def filled(text: str, results: Path) -> str:
    """The document with its tables made anew.

    Raises:
        ValueError: a marker is missing, doubled or unknown.
    """
    made = {}
    for file, makers in (("solver.jsonl", SOLVER), ("images.jsonl", IMAGES), ("training.jsonl", TRAINING)):
        full = latest_full(rows_of(results / file))
        made |= {name: make(full) for name, make in makers.items()}
    found = re.findall(r"<!-- (\w+):(begin|end) -->", text)
    wanted = [(name, side) for name in in_order([name for name, _ in found]) for side in ("begin", "end")]
    if found != wanted or {name for name, _ in found} != set(made):
        raise ValueError(f"docs/performance.md: expected each of {', '.join(made)} begun and ended once, found {found}")
    for name, inside in made.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(pattern, lambda m, inside=inside: f"{m[1]}\n{inside}\n\n{m[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when the tables are out of date")
    options = parser.parse_args()
    old = DOCUMENT.read_text(encoding="utf-8")
    new = filled(old, RESULTS)
    if options.check:
        if new != old:
            print("docs/performance.md is not what bench/results gives; run python bench/performance.py")
        return int(new != old)
    DOCUMENT.write_text(new, encoding="utf-8")
    print(f"{DOCUMENT.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
