"""What a label step costs on many ranks: a model of its parts, in seconds and bytes, and the tables of docs/scaling.md.

Every number of the model is a `Parameter`, with its unit and where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 128  # rows of which one rank holds all or none
CUDA_ROWS = 64  # rows for which the CUDA kernels hand out one objective and one weight
EXTRA = 14  # int64 of the all-reduce beyond the columns
NODE = 8  # GPUs that share NVLink


@dataclass(frozen=True)
class Parameter:
    """One number of the model."""

    value: float
    unit: str
    meaning: str
    source: str


PARAMETERS = {
    "B": Parameter(3.0e12, "B/s", "read bandwidth of a GPU's memory", "assumed; H100 SXM: 3.35e12 by its data sheet"),
    "M": Parameter(72e9, "B", "memory of a GPU for logits, features and row state", "assumed; H100 SXM: 80e9"),
    "F": Parameter(6.0e14, "flop/s", "float16 matrix product of a GPU", "assumed; H100 SXM: 9.89e14 by its data sheet"),
    "D": Parameter(512, "", "features, where logits are computed anew in each pass", "ResNet-18"),
    "a1": Parameter(4e-6, "s", "one hop of a message by NVLink", "assumed"),
    "a2": Parameter(8e-6, "s", "one hop of a message by InfiniBand", "assumed"),
    "b1": Parameter(3.0e11, "B/s", "bandwidth of a GPU by NVLink", "assumed; 4.5e11 one way by the data sheet"),
    "b2": Parameter(4.0e10, "B/s", "bandwidth of a GPU by InfiniBand", "assumed; 5e10 one way by the data sheet"),
    "h": Parameter(6e-5, "s", "a launch, results to the host, and sums back to the card", "assumed"),
    "p": Parameter(2.0e10, "B/s", "bandwidth from card to host", "assumed; PCIe 5 x16: 6.4e10 by the standard"),
    "s": Parameter(1.0e-8, "s", "exact sums of one block of rows on the host", "measured, one thread of an EPYC"),
    "e": Parameter(
        6.5e-12, "s", "one candidate in one Hessian product", "derived: its addition in the second-level cache"
    ),
    "u": Parameter(1.0e-5, "s", "a Hessian product at least: its columns, in one block", "derived"),
    "c": Parameter(3.1, "", "candidates per row, 16 nats", "measured, 60,000 x 1000 clustered logits; at most 64"),
    "c'": Parameter(40, "", "candidates per row on the way to lambda, for which there is room", "measured; as planned"),
    "P": Parameter(300, "", "Hessian products of a whole solve", "measured; 80 to 560"),
}
P = {name: parameter.value for name, parameter in PARAMETERS.items()}


@dataclass(frozen=True)
class Link:
    """What messages of a rank travel on: seconds per hop and bytes per second, inside of a node and between nodes."""

    hop: float
    rate: float
    far_hop: float
    far_rate: float


GPUS = Link(P["a1"], P["b1"], P["a2"], P["b2"])

ROWS = (10**6, 10**8, 10**9, 10**10)
RANKS = (1, 8, 64, 512, 4096)
CLUSTERS = (3000, 10_000)


def rows_per_rank(rows: int, ranks: int) -> int:
    """Rows of the largest shard."""
    blocks = -(-rows // BLOCK)
    return min(rows, -(-blocks // ranks) * BLOCK)


def message_bytes(clusters: int) -> int:
    """The all-reduce of a pass."""
    return 8 * (clusters + EXTRA)


def all_reduce_seconds(size: float, ranks: int, link: Link = GPUS) -> float:
    """Up and down a tree inside of each node, then between nodes; every byte goes twice."""
    inside, nodes = min(ranks, NODE), -(-ranks // NODE)
    seconds = 2 * math.ceil(math.log2(inside)) * link.hop + 2 * size * (inside - 1) / inside / link.rate
    return seconds + 2 * math.ceil(math.log2(nodes)) * link.far_hop + 2 * size * (nodes - 1) / nodes / link.far_rate


def gather_seconds(size: float, ranks: int, link: Link = GPUS) -> float:
    """An all-gather of so many bytes in all."""
    if ranks == 1:
        return 0.0
    bandwidth, hop = (link.rate, link.hop) if ranks <= NODE else (link.far_rate, link.far_hop)
    return math.ceil(math.log2(ranks)) * hop + size * (ranks - 1) / ranks / bandwidth


@dataclass(frozen=True)
class Pass:
    """One pass over logits in float16 on GPUs, in seconds."""

    read: float
    host: float
    message: float

    @property
    def seconds(self) -> float:
        return self.read + self.host + self.message


def stored_pass(rows: int, clusters: int, ranks: int, itemsize: int = 2) -> Pass:
    """Logits that lie in memory: 2 K bytes a row (of float32 4 K), reference, log-sum-exp and label of 4."""
    n = rows_per_rank(rows, ranks)
    read = n * (itemsize * clusters + 12) / P["B"]
    return Pass(read, host_seconds(n), all_reduce_seconds(message_bytes(clusters), ranks))


def computed_pass(rows: int, clusters: int, ranks: int, features: float = P["D"]) -> Pass:
    """Logits that are computed from features in float16 by a matrix product, tile by tile."""
    n = rows_per_rank(rows, ranks)
    work = max(2.0 * n * features * clusters / P["F"], n * (2 * features + 12) / P["B"])
    return Pass(work, host_seconds(n), all_reduce_seconds(message_bytes(clusters), ranks))


def host_seconds(n: int) -> float:
    """Two doubles per block of rows go to the host and are added there, exactly."""
    return P["h"] + -(-n // CUDA_ROWS) * (16 / P["p"] + P["s"])


def memory_bytes(rows: int, width: float, ranks: int) -> float:
    """Of a rank: values in float16, two log-sum-exps and a label a row."""
    return rows_per_rank(rows, ranks) * (2 * width + 12)


def candidate_bytes(rows: float, device: bool = False) -> float:
    """What every rank holds in a stage of Newton's method: lengths, offsets, and columns and values of 6 bytes.

    On its device: as they are found and as rows, 14 bytes each, with room for those of small lambda.
    """
    return rows * (24 + 14 * P["c'"] if device else 4 + 6 * P["c"] + 8)


def candidate_seconds(rows: float, ranks: int, link: Link = GPUS) -> float:
    """Candidates of all rows to every rank, once: from its card, to all hosts, and all of them to each card."""
    if ranks == 1:
        return 0.0
    size = rows * (4 + 6 * P["c"])
    return size / ranks / P["p"] + gather_seconds(size, ranks, link) + size / P["p"]


def replicated_seconds(rows: float) -> float:
    """All Hessian products of a solve, on every card alike."""
    return P["P"] * (P["u"] + rows * P["c"] * P["e"])


def spread_seconds(rows: float, clusters: int, ranks: int) -> float:
    """The same with the candidates left where they are, and one all-reduce of K numbers per product."""
    return P["P"] * (P["u"] + rows / ranks * P["c"] * P["e"] + all_reduce_seconds(8 * clusters, ranks))


def break_even_rows(clusters: int, ranks: int) -> float:
    """Rows from which on spread products take less time than gathered candidates, one gather per solve."""
    low, high = 1.0, 1e12
    for _ in range(100):
        middle = math.sqrt(low * high)
        gathered = replicated_seconds(middle) + candidate_seconds(middle, ranks)
        low, high = (low, middle) if gathered > spread_seconds(middle, clusters, ranks) else (middle, high)
    return high


# ---- Tables.


def seconds_words(seconds: float) -> str:
    """Two digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{number_words(seconds / size)} {unit}"
    return f"{number_words(seconds * 1e6)} us"


def number_words(value: float) -> str:
    """Two digits at least; whole numbers from 10 on."""
    return f"{value:.1f}" if value < 9.95 else f"{float(f'{value:.2g}') if value < 100 else round(value):,.0f}"


def bytes_words(size: float) -> str:
    """Two digits and a unit, powers of 1000."""
    for unit, power in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= 0.9995 * power:
            return f"{number_words(size / power)} {unit}"
    return f"{number_words(size / 1e3)} kB"


def count_words(count: float) -> str:
    """1 M, 10 B."""
    for unit, power in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * power:
            return f"{number_words(count / power)} {unit}".replace(".0 ", " ")
    return number_words(count)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def pass_cell(rows: int, clusters: int, ranks: int) -> str:
    """Seconds per pass: logits stored, or else computed from features, or nothing of it."""
    if memory_bytes(rows, clusters, ranks) <= P["M"]:
        return seconds_words(stored_pass(rows, clusters, ranks).seconds)
    if memory_bytes(rows, P["D"], ranks) <= P["M"]:
        return f"*{seconds_words(computed_pass(rows, clusters, ranks).seconds)}*"
    return "-"


def tables() -> str:
    """All tables of the model, for the document."""
    parts = ["**Parameters**", ""]
    parts.append(
        markdown(
            ["", "value", "meaning", "source"],
            [[f"`{k}`", f"{v.value:g} {v.unit}".strip(), v.meaning, v.source] for k, v in PARAMETERS.items()],
        )
    )
    gpus = [f"{ranks:,} GPU{'s' if ranks > 1 else ''}" for ranks in RANKS]
    for clusters in CLUSTERS:
        parts += [
            "",
            f"**Seconds per pass, K = {clusters:,}**, float16. *Slanted*: the logits do not fit and are computed anew "
            f"from {P['D']:.0f} features. -: neither fits.",
            "",
            markdown(
                ["N", *gpus],
                [[count_words(n), *(pass_cell(n, clusters, ranks) for ranks in RANKS)] for n in ROWS],
            ),
        ]
    clusters = CLUSTERS[0]
    parts += ["", f"**Memory per GPU, K = {clusters:,}**: logits and row state / features and row state.", ""]
    parts.append(
        markdown(
            ["N", *gpus],
            [
                [
                    count_words(n),
                    *(
                        f"{bytes_words(memory_bytes(n, clusters, r))} / {bytes_words(memory_bytes(n, P['D'], r))}"
                        for r in RANKS
                    ),
                ]
                for n in ROWS
            ],
        )
    )
    parts += ["", f"**Where the time of a pass goes, K = {clusters:,}**, logits stored: reading / host / messages.", ""]
    parts.append(
        markdown(
            ["N", *gpus],
            [
                [
                    count_words(n),
                    *(
                        " / ".join(f"{100 * x / cost.seconds:.0f}%" for x in (cost.read, cost.host, cost.message))
                        if memory_bytes(n, clusters, ranks) <= P["M"]
                        else "-"
                        for ranks in RANKS
                        for cost in [stored_pass(n, clusters, ranks)]
                    ),
                ]
                for n in ROWS
            ],
        )
    )
    parts += [
        "",
        f"**Newton's method, K = {clusters:,}**: candidates on every host, and room for them on every card; one gather "
        "of them, from cards to cards; all Hessian products of a solve, on every card alike (as it is), and spread "
        "over the ranks (as it could be).",
        "",
        markdown(
            [
                "N",
                "host",
                "card",
                *(f"gather, {r}" for r in (8, 64)),
                "products",
                *(f"spread, {r:,}" for r in (8, 64, 512)),
            ],
            [
                [
                    count_words(n),
                    bytes_words(candidate_bytes(n)),
                    bytes_words(candidate_bytes(n, device=True)),
                    *(seconds_words(candidate_seconds(n, r)) for r in (8, 64)),
                    seconds_words(replicated_seconds(n)),
                    *(seconds_words(spread_seconds(n, clusters, r)) for r in (8, 64, 512)),
                ]
                for n in ROWS
            ],
        ),
        "",
        "Spread products would be faster from "
        + ", ".join(f"{count_words(break_even_rows(clusters, r))} rows on {r:,} ranks" for r in (8, 64, 512))
        + " on.",
    ]
    return "\n".join(parts)
