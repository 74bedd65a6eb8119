"""The targets of the solver, each read off the rows of one run of bench/solver.py; "question" says what a row answers.

Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import target_table
from target_table import Row, Target, Value, pick

HEADER = target_table.HEADER
SIXTEEN = ("float16", "fixed16")  # storages that are held to the same labels; bfloat16 has a gate of its own


def seconds_per_iteration(rows: Sequence[Row], case: str, what: str) -> float | None:
    found = pick(rows, question="iteration", case=case, what=what)
    return found[0]["seconds"] if found else None


def iteration_ratio(case: str, storages: Sequence[str], rival: str) -> Callable[[Sequence[Row]], Value]:
    """How many times as long the rival takes for one iteration, beside the best of the storages."""

    def value(rows: Sequence[Row]) -> Value:
        theirs = seconds_per_iteration(rows, case, rival)
        mine = [(t, s) for s in storages if (t := seconds_per_iteration(rows, case, f"fused {s}")) is not None]
        if theirs is None or not mine:
            return Value(None)
        best, storage = min(mine)
        return Value(theirs / best, storage)

    return value


def bandwidth_share(case: str) -> Callable[[Sequence[Row]], Value]:
    def value(rows: Sequence[Row]) -> Value:
        found = pick(rows, question="iteration", case=case, what="fused float32")
        return Value(100 * found[0]["share_of_bandwidth"]) if found else Value(None)

    return value


def solve(rows: Sequence[Row], case: str, what: str, threshold: float) -> Row | None:
    found = pick(rows, question="solve", case=case, what=what, threshold=threshold)
    return found[0] if found else None


def reads(case: str, threshold: float) -> Callable[[Sequence[Row]], Value]:
    def value(rows: Sequence[Row]) -> Value:
        found = solve(rows, case, "assign auto", threshold)
        if found is None:
            return Value(None)
        return Value(found["reads"] if found["reached"] else float("inf"), found["method"])

    return value


def faster_than_official(case: str, threshold: float) -> Callable[[Sequence[Row]], Value]:
    def value(rows: Sequence[Row]) -> Value:
        mine = solve(rows, case, "assign auto", threshold)
        found = pick(rows, question="solve", case=case, what="official float64, numpy")
        if mine is None or not found:
            return Value(None)
        if not mine["reached"]:
            return Value(0.0, "ours did not get there")
        theirs = next((row for row in found if row["threshold"] == threshold), found[-1])
        if theirs["reached"]:
            return Value(theirs["seconds"] / mine["seconds"])
        note = f"official at {theirs['true_l1']:.1e} after {theirs['seconds']:.0f} s"
        return Value(theirs["seconds"] / mine["seconds"], note, at_least=True)

    return value


def bytes_per_entry(recomputed: bool) -> Callable[[Sequence[Row]], Value]:
    """The most of the large cases, where the interpreter does not count; else of the smaller ones."""

    def value(rows: Sequence[Row]) -> Value:
        found = [row for row in pick(rows, question="large", recomputed=recomputed) if "bytes_per_entry" in row]
        note = "ImageNet's size, all of the process"
        if not found:
            kind = "features" if recomputed else "float16"
            found = [row for row in pick(rows, question="memory", kind=kind) if "bytes_per_entry" in row]
            note = "60k rows, above the interpreter"
        if not found:
            return Value(None)
        most = max(found, key=lambda row: row["bytes_per_entry"])
        return Value(most["bytes_per_entry"], f"{most['case']}; {note}")

    return value


def labels_equal(storages: Sequence[str]) -> Callable[[Sequence[Row]], Value]:
    """The least agreement of the finest solution in a storage, in per cent."""

    def value(rows: Sequence[Row]) -> Value:
        shares = []
        for storage in storages:
            by_case: dict[str, Row] = {}
            for row in pick(rows, question="solve", what=f"assign auto, {storage}"):
                if row.get("labels") is not None:
                    by_case[row["case"]] = row  # thresholds fall: the last one is the finest
            shares += [(row["labels"], f"{storage}, {case}") for case, row in by_case.items()]
        if not shares:
            return Value(None)
        least, note = min(shares)
        return Value(100 * least, note)

    return value


def l1_reached(rows: Sequence[Row]) -> Value:
    found = pick(rows, question="accuracy")
    if not found:
        return Value(None)
    worst = max(found, key=lambda row: row["true_l1"])
    return Value(worst["true_l1"], f"{worst['case']}, span {worst['span']:.0f} nats")


def same_bits(what: str) -> Callable[[Sequence[Row]], Value]:
    def value(rows: Sequence[Row]) -> Value:
        found = pick(rows, question="bits", what=what)
        if not found:
            return Value(None)
        return Value(float(all(row["equal"] for row in found)), ", ".join(sorted({row["numbers"] for row in found})))

    return value


def large(case: str, tol: float, key: str) -> Callable[[Sequence[Row]], Value]:
    def value(rows: Sequence[Row]) -> Value:
        found = pick(rows, question="large", case=case, tol=tol, recomputed=False)
        if not found or key not in found[0]:
            return Value(None)
        if key == "seconds" and not found[0]["true_l1"] <= tol:
            return Value(float("inf"), f"at {found[0]['true_l1']:.1e}")
        return Value(found[0][key], f"{found[0]['reads']:.2g} reads" if key == "seconds" else "")

    return value


def most_resident(rows: Sequence[Row]) -> Value:
    found = [row for row in pick(rows, question="large", recomputed=False) if "resident_gb" in row]
    if not found:
        return Value(None)
    most = max(found, key=lambda row: row["resident_gb"])
    return Value(most["resident_gb"], most["case"])


LSE, SUM, OFFICIAL = "torch logsumexp", "torch softmax + sum", "official float64, numpy"

F32 = ("float32",)
BOUNDED = ("float32", "float32, bounds")  # the bounds are of float32 logits, too
TARGETS = (
    Target("dense iteration, float32, against logsumexp", "x", 18, 28, True, iteration_ratio("dense", F32, LSE)),
    Target("... against softmax + sum", "x", 8, 12, True, iteration_ratio("dense", F32, SUM)),
    Target("dense iteration, 16 bits, against logsumexp", "x", 26, 40, True, iteration_ratio("dense", SIXTEEN, LSE)),
    Target("... against softmax + sum", "x", 11, 17, True, iteration_ratio("dense", SIXTEEN, SUM)),
    Target(
        "peaked iteration, float32, against logsumexp", "x", 100, 150, True, iteration_ratio("peaked", BOUNDED, LSE)
    ),
    Target("... against softmax + sum", "x", 30, 42, True, iteration_ratio("peaked", BOUNDED, SUM)),
    Target("... against official float64", "x", 8, 12, True, iteration_ratio("peaked", BOUNDED, OFFICIAL)),
    Target("share of the read bandwidth, peaked float32, without bounds", "%", 85, 95, True, bandwidth_share("peaked")),
    Target("share of the read bandwidth, dense float32", "%", 42, 60, True, bandwidth_share("dense")),
    Target("reads to L1 1e-6, trained 60k x 128", "", 12, 7, False, reads("trained 60k x 128", 1e-6)),
    Target("reads to L1 1e-6, trained 60k x 1000", "", 14, 9, False, reads("trained 60k x 1000", 1e-6)),
    Target("reads to L1 1e-6, hard 60k x 1000", "", 14, 9, False, reads("hard 60k x 1000", 1e-6)),
    Target("reads to L1 1e-6, synthetic 20k x 3000", "", 20, 14, False, reads("synthetic 20k x 3000", 1e-6)),
    Target(
        "time against official float64, trained 60k x 128 to 1e-3",
        "x",
        20,
        50,
        True,
        faster_than_official("trained 60k x 128", 1e-3),
    ),
    Target("... synthetic 20k x 3000 to 1e-6", "x", 5, 12, True, faster_than_official("synthetic 20k x 3000", 1e-6)),
    Target("... first round 60k x 1000 to 1e-6", "x", 3, 5, True, faster_than_official("first-round 60k x 1000", 1e-6)),
    Target("bytes per entry, all included, float16", "B", 2.2, 2.1, False, bytes_per_entry(False)),
    Target("bytes per entry, recomputed from features", "B", 2.2, 0.2, False, bytes_per_entry(True)),
    Target("labels as converged float64, fixed16 and float16", "%", 99.99, 99.999, True, labels_equal(SIXTEEN)),
    Target("labels as converged float64, bfloat16", "%", 99.9, None, True, labels_equal(("bfloat16",))),
    Target("true L1 reached in float32, spans up to 1,600 nats", "", 1e-6, 1e-7, False, l1_reached),
    Target("the same bits for any number of threads", "", 1, None, True, same_bits("threads")),
    Target("the same bits for any number of ranks", "", 1, None, True, same_bits("ranks")),
    Target("ImageNet's size, easy first round to 1e-4", "s", 6, 1.5, False, large("easy", 1e-4, "seconds")),
    Target("ImageNet's size, peaked to 2e-6", "s", 10, 3, False, large("peaked", 2e-6, "seconds")),
    Target("ImageNet's size, resident in all", "GB", 9, None, False, most_resident),
)


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table: measure, gate, stretch, ours, verdict, note."""
    return target_table.lines(TARGETS, rows)
