"""The CUDA kernels on a card: agreement, time, and the share of the card's own copy bandwidth.

    python bench/gpu.py [--quick]

One command, for any card. It prints the card, its driver and the bandwidths that the card reaches (copying 1 GiB,
reading 1 GiB). Then, row by row: first it compares results with the pure-torch twin or the CPU, and times nothing of
that row if they differ; then it times by CUDA events, medians of runs taken in turn, the second-level cache flushed
before each. The share of the copy bandwidth is that of the bytes which have to move. Competitors do the same work with
torch, and with torchvision for images, on the same card. At last the Loader and a training run, by
bench/gpu_training.py. A row that fails or does not fit the card is named at once and at the end; the others are
measured, and the exit status is 1 if any failed.

`--dry-run` runs all of it with tiny sizes on the processor, to test this file; its numbers mean nothing.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import torch
from gpu_columns import anderson_case, margins_case
from gpu_images import images_case, large_images_case, sample_case
from gpu_jpeg import jpeg_case
from gpu_logits import LAM, SEED, random_logits
from gpu_rounding import certificate_case, computed_case, lists_case
from gpu_rows import Outcome, Row, measure_rows, summary
from gpu_training import loader_case, photographs_case, training_case

import sela_ext
from sela_ext import kernels
from sela_ext.errors import ResourceError, SelaError
from sela_ext.kernels.check_newton import on_the_cpu, rows_difference, sums_difference
from sela_ext.kernels.device import CudaDevice, driver_version
from sela_ext.kernels.device_candidates import DeviceCandidates
from sela_ext.kernels.logits import bits_of
from sela_ext.kernels.newton_device import CudaRows, SolveOptions, Wanted
from sela_ext.kernels.reference.newton_device import TorchRows
from sela_ext.kernels.self_check import open_device
from sela_ext.kernels.sinkhorn import pass_in_torch, prepared_pass

# Rows and columns: CIFAR's and the paper's ImageNet, and a case for every mapping of threads to columns.
SOLVER_SIZES = ((50_000, 10), (50_000, 128), (200_000, 1000), (100_000, 3000), (40_000, 8192), (30_000, 10_000))
QUICK_SIZES = ((50_000, 128), (100_000, 3000))
IMAGENET = (1_281_167, 3000)


@dataclass
class Card:
    """Where everything runs, and how it is timed.

    Attributes:
        place: the device.
        device: the card as the kernels see it; None where the processor stands in for it.
        tiny: divisor of all sizes.
        flush: memory larger than the second-level cache; written before each timed run.
    """

    place: torch.device
    device: CudaDevice | None
    tiny: int
    flush: torch.Tensor

    @property
    def dry(self) -> bool:
        """Whether this is no card."""
        return self.place.type != "cuda"

    def seconds(self, function: Callable[[], Any]) -> float:
        """Time of one run, cache flushed: from the events on the stream before and after it."""
        self.flush.zero_()
        if self.dry:
            return common.timed(function)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # the work is queued before the device reaches it: its launch is not timed
        before.record()
        function()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def medians(self, competitors: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Median seconds of each, taken in turn after two warm runs."""
        times: dict[str, list[float]] = {name: [] for name in competitors}
        for function in competitors.values():
            function()
            function()
        self.wait()
        for _ in range(rounds):
            for name, function in competitors.items():
                times[name].append(self.seconds(function))
        return {name: statistics.median(values) for name, values in times.items()}

    def wait(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize(self.place)

    def free(self) -> float:
        """Free memory, bytes."""
        if self.dry:
            return 4e9
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(self.place)[0])


def open_card(dry: bool) -> Card:
    """The current CUDA device, or the processor.

    Raises:
        ResourceError: no card, or one whose kernels are not used.
    """
    if dry:
        return Card(torch.device("cpu"), None, 500, torch.empty(1 << 10))
    if not torch.cuda.is_available():
        raise ResourceError(
            "bench/gpu.py: expected a CUDA device, found none; `--dry-run` tests the script without one"
        )
    verdict = kernels.device_verdict()
    print(verdict)
    if not verdict.usable:
        raise ResourceError(f"bench/gpu.py: expected kernels that may be used, found {verdict}; nothing is timed")
    place = torch.device("cuda", torch.cuda.current_device())
    cache = int(getattr(torch.cuda.get_device_properties(place), "L2_cache_size", 0)) or 64 << 20
    return Card(place, open_device(place), 1, torch.empty(cache // 2, device=place))  # float32: twice the cache


def card_facts(card: Card) -> dict[str, Any]:
    """Name, architecture, driver, memory and clocks of the card; versions."""
    facts = common.machine()
    facts["cuda"] = sela_ext.build_info()["cuda_version"]
    facts["torch_cuda"] = torch.version.cuda
    if card.dry:
        return {**facts, "card": "none (dry run)"}
    properties = torch.cuda.get_device_properties(card.place)
    return {
        **facts,
        "card": properties.name,
        "architecture": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "card_memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(card.flush.numel() * 2 / 2**20, 1),
        "driver": driver_version(),
    }


def bandwidths(card: Card, rounds: int) -> dict[str, float]:
    """GB/s of a copy within the device (read and written bytes) and of a sum (read bytes), 1 GiB each where it fits."""
    count = (1 << 28) // (card.tiny * 20) if card.dry else min(1 << 28, int(card.free() / 12))
    source = torch.ones(count, device=card.place)
    target = torch.empty_like(source)
    size = source.numel() * 4 / 1e9
    seconds = card.medians({"copy": lambda: target.copy_(source), "read": lambda: source.sum()}, rounds)
    return {"copy": 2 * size / seconds["copy"], "read": size / seconds["read"]}


# ---------------------------------------------------------------- the solver


def steps(card: Card, logits: torch.Tensor, g: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """One pass as an iteration, with its row reference: the kernels alone, and as `assign` calls them.

    The call also checks its arguments and reads the sums back, which waits for the device.
    """
    before = kernels.sinkhorn_pass(logits, g, scale=LAM).lse
    found: dict[str, Callable[[], Any]] = {}
    for words, labels in (("", False), (", labels", True)):
        options: dict[str, Any] = {"scale": LAM, "reference": before, "want_labels": labels}
        if card.device is not None:
            found[f"sela_ext, kernel alone{words}"] = prepared_pass(card.device, logits, g, **options)[0]
        found[f"sela_ext{words}"] = lambda options=options: kernels.sinkhorn_pass(logits, g, **options)
    found["sela_ext, candidates"] = lambda: kernels.sinkhorn_pass(
        logits, g, scale=LAM, reference=before, want_labels=True, keep=16.0, keep_at_most=logits.numel() // 8
    )
    return found


def alternating(logits: torch.Tensor, g: torch.Tensor) -> Callable[[], Any]:
    """Sinkhorn by torch.logsumexp over rows and columns in turn, the scaled logits stored."""
    kernel, shift, start = LAM * logits, float(np.log(logits.shape[0] / logits.shape[1])), g.to(logits.dtype)

    def iterate() -> torch.Tensor:
        f = -torch.logsumexp(kernel + start, dim=1, keepdim=True)
        return shift - torch.logsumexp(kernel + f, dim=0)

    return iterate


def softmax_sum(logits: torch.Tensor, g: torch.Tensor) -> Callable[[], Any]:
    """The same iterates by softmax over rows and a sum over columns."""
    kernel, start = LAM * logits, g.to(logits.dtype)
    return lambda: torch.softmax(kernel + start, dim=1).sum(0, dtype=torch.float32).log()


def check_pass(card: Card, logits: torch.Tensor, g: torch.Tensor) -> float:
    """L1 distance of the columns from the float64 twin, per unit of weight, on up to 4,000 rows; stops if large."""
    some = logits[: 4000 // (10 if card.dry else 1)]
    expected = pass_in_torch(some, g, scale=LAM, want_labels=True)
    found = kernels.sinkhorn_pass(some, g, scale=LAM, want_labels=True)
    again = kernels.sinkhorn_pass(some, g, scale=LAM, reference=found.lse, want_labels=True)
    worst = 0.0
    for sums in (found, again):
        distance = float((sums.column_sums - expected.column_sums).abs().sum()) / expected.weight
        others = float((sums.labels != expected.labels).double().mean())
        if not (distance < 1e-5 and others < 1e-2):
            raise SystemExit(
                f"no agreement: {logits.dtype}, K = {logits.shape[1]}: columns differ by {distance:.2g} in L1 from the "
                f"float64 twin, {others:.2%} of the labels differ; nothing is timed"
            )
        worst = max(worst, distance)
    return worst


def solver_case(card: Card, rows: int, cols: int, dtype: torch.dtype, copy: float, rounds: int) -> list[dict[str, Any]]:
    """One pass over [rows, cols]. The bytes counted are those of the pass, whoever does it."""
    rows = max(600, rows // card.tiny)
    name = str(dtype).removeprefix("torch.")
    logits = random_logits(card, rows, cols, dtype)
    g = torch.randn(cols, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED)).to(card.place)
    distance = check_pass(card, logits, g)
    competitors = steps(card, logits, g)
    if card.free() > 6 * logits.numel() * max(4, logits.element_size()):
        competitors["torch logsumexp, alternating"] = alternating(logits, g)
        competitors["torch softmax + sum"] = softmax_sum(logits, g)
    else:
        print(f"\ntorch's own iterations on {rows} x {cols} {name} do not fit the card: left out")
    seconds = card.medians(competitors, rounds)
    moved = logits.numel() * logits.element_size() * (1 if cols <= 8192 else 2) + rows * 12
    table, recorded = [], []
    for label, value in seconds.items():
        share = moved / 1e9 / value / copy if label.startswith("sela_ext") else None
        ratio = value / seconds["sela_ext"]
        table.append((label, value * 1e3, share and f"{share:.0%}", ratio))
        recorded.append(
            {
                "case": "pass",
                "what": label,
                "rows": rows,
                "cols": cols,
                "type": name,
                "seconds": value,
                "bytes": moved,
                "share_of_copy": share,
                "ratio": ratio,
                "distance": distance,
            }
        )
    common.table(
        f"One pass, {rows} x {cols} {name}; columns agree with the float64 twin to {distance:.1g}",
        ("", "ms", "of copy bandwidth", "x sela_ext"),
        table,
    )
    return recorded


def stored_case(card: Card, rows: int, cols: int, copy: float, rounds: int) -> list[dict[str, Any]]:
    """Conversion of float32 logits to 16 bits, and a pass over each kind."""
    rows = max(600, rows // card.tiny)
    logits = random_logits(card, rows, cols, torch.float32)
    g = torch.randn(cols, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED)).to(card.place)
    some = logits[:500]
    table, recorded = [], []
    for kind in ("fixed16", "float16", "bfloat16"):
        expected = kernels.store_logits(some.cpu().numpy(), kind, lam=LAM)
        stored = kernels.store_logits(logits, kind, lam=LAM)
        values = bits_of(stored.values[:500]) if torch.is_tensor(stored.values) else stored.values[:500]
        if not np.array_equal(values.view(np.uint16), expected.values.view(np.uint16)):
            raise SystemExit(f"no agreement: {kind} has other bits than those of the CPU; nothing is timed")
        before = kernels.sinkhorn_pass(stored, g, scale=LAM).lse
        work = {
            f"store {kind}": lambda kind=kind: kernels.store_logits(logits, kind, lam=LAM),
            f"pass over {kind}, labels": lambda stored=stored, before=before: kernels.sinkhorn_pass(
                stored, g, scale=LAM, reference=before, want_labels=True
            ),
        }
        moved = (logits.numel() * 6 + rows * 4, logits.numel() * 2 + rows * 16)
        for (label, value), size in zip(card.medians(work, rounds).items(), moved, strict=True):
            share = size / 1e9 / value / copy
            table.append((label, value * 1e3, f"{share:.0%}"))
            recorded.append(
                {"case": "stored", "what": label, "rows": rows, "cols": cols, "seconds": value, "share_of_copy": share}
            )
    common.table(f"16-bit copies, {rows} x {cols} from float32", ("", "ms", "of copy bandwidth"), table)
    return recorded


def solve_case(card: Card, copy: float) -> list[dict[str, Any]]:
    """A whole solve at ImageNet's size, or as many rows as fit."""
    rows, cols = IMAGENET
    room = int(0.7 * card.free() / (cols * 2 + 24))
    rows, cols = (max(1500, rows // card.tiny // 2), 100) if card.dry else (min(rows, room), cols)
    if rows < IMAGENET[0] and not card.dry:
        print(f"\nImageNet's size does not fit: {rows} of {IMAGENET[0]} rows are taken")
    logits = random_logits(card, rows, cols, torch.float16)
    table, recorded = [], []
    for tol in (1e-2, 1e-4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few rows cannot be balanced
            sela_ext.assign(logits[:1000], tol=tol, max_passes=3)  # warm
        card.wait()
        begin = time.perf_counter()
        a = sela_ext.assign(logits, tol=tol, max_passes=300)
        seconds = time.perf_counter() - begin
        floor = a.passes * logits.numel() * 2 / 1e9 / copy
        table.append((f"tol {tol:g}", seconds, a.passes, a.error, str(a.converged), f"{floor / seconds:.0%}"))
        recorded.append(
            {
                "case": "solve",
                "rows": rows,
                "cols": cols,
                "type": "float16",
                "tol": tol,
                "seconds": seconds,
                "passes": a.passes,
                "error": a.error,
                "converged": a.converged,
                "backend": a.backend,
                "share_of_copy": floor / seconds,
            }
        )
    header = ("", "seconds", "passes", "true L1", "converged", "of copy bandwidth")
    common.table(f"A solve, {rows} x {cols} float16", header, table)
    return recorded


def newton_candidates(rows: int, cols: int, entries: int) -> dict[str, Any]:
    """Candidates as arrays: as many in every row, near one another, as in rows that come sorted by class."""
    rng = np.random.default_rng(SEED)
    first = (np.arange(rows) * cols // rows + rng.integers(0, 20, rows)) % cols
    log_p = -8.0 * rng.random((rows, entries)) ** 2
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    return {
        "offsets": entries * np.arange(rows + 1),
        "columns": ((first[:, None] + 7 * np.arange(entries)) % cols).astype(np.int32).ravel(),
        "values": log_p.astype(np.float32).ravel(),
        "weights": np.zeros(0, np.float32),
        "cols": cols,
    }


def newton_case(card: Card, copy: float, rounds: int) -> list[dict[str, Any]]:
    """Newton's method on candidates of ImageNet's size: rows, sums and a product, and a whole inner solve."""
    rows, cols, entries = max(2000, IMAGENET[0] // card.tiny), 100 if card.dry else IMAGENET[1], 6
    arrays = newton_candidates(rows, cols, entries)

    offsets, columns, values = (
        torch.from_numpy(arrays[name]).to(card.place) for name in ("offsets", "columns", "values")
    )

    def on_card() -> DeviceCandidates:  # rows take what they are made of, so others each time
        return DeviceCandidates(16.0, len(values), False, rows, cols, offsets, columns, values)

    makers: dict[str, Callable[[], Any]] = {"torch": lambda: TorchRows(on_card())}
    if card.device is not None:
        device = card.device
        makers = {"sela_ext": lambda: CudaRows(device, on_card()), **makers}
    kinds = {name: make() for name, make in makers.items()}
    expected = on_the_cpu(arrays)
    wave = np.sin(1.0 + 2.3 * np.arange(cols))
    for name, found in kinds.items():
        difference = rows_difference(found, expected) or sums_difference(found, expected, 1.3, wave)
        if difference is not None:
            raise SystemExit(f"no agreement: Newton's method, {name}: {difference}; nothing is timed")
    share = expected.sums(1.0, np.zeros(cols), 1, "")[0]
    wanted = Wanted(share * (1 + 0.2 * wave) * share.sum() / (share @ (1 + 0.2 * wave)), np.zeros(cols))
    options = SolveOptions(1.0, 1e-9, 40, 400, 4.0, math.inf, 0.0)
    count = rows * entries
    works: dict[str, tuple[int, Callable[[Any], Any]]] = {
        "rows counted and packed": (count * 16 + rows * 16, lambda made: made[2]()),
        "sums": (count * 12 + rows * 8, lambda made: made[0].sums(1.3, wave)),
        "product": (count * 8 + rows * 8, lambda made: made[0].product(made[1], wave)),
        "solve to 1e-9": (0, lambda made: made[0].solve(wanted, np.zeros(cols), options)),
    }
    table, recorded = [], []
    for what, (moved, work) in works.items():
        given = {name: (found, found.sums(1.3, wave)[3], makers[name]) for name, found in kinds.items()}
        competitors = {name: lambda made=made, work=work: work(made) for name, made in given.items()}
        seconds = card.medians(competitors, 3 if moved == 0 else rounds)
        for name, value in seconds.items():
            part = moved / 1e9 / value / copy if moved and name == "sela_ext" else None
            table.append((f"{what}, {name}", value * 1e3, part and f"{part:.0%}"))
            recorded.append(
                {
                    "case": "newton",
                    "what": f"{what}, {name}",
                    "rows": rows,
                    "cols": cols,
                    "entries": count,
                    "seconds": value,
                    "bytes": moved,
                    "share_of_copy": part,
                }
            )
    common.table(
        f"Newton's method, {rows} rows of {entries} candidates in {cols} columns; sums and products as the caller gets "
        "them, on the host; they agree with the CPU's",
        ("", "ms", "of copy bandwidth"),
        table,
    )
    return recorded


# The kernels behind each part, by their names in docs/gpu.md.
PASS = ("fused_kernel", "wide_rows_kernel", "wide_columns_kernel", "candidates_kernel")
NEWTON = ("newton_rows_kernel", "newton_columns_kernel", "newton_count_kernel", "newton_compact_kernel")
LARGE = ("plan_kernel", "tile_kernel", "colour_kernel", "tone_kernel", "blur_kernel", "last_kernel", "sobel_kernel")
MARGINS = ("margin_rows_kernel", "margin_columns_kernel", "margin_merge_kernel")
JPEG = ("tables_kernel", "entropy_kernel", "transform_kernel")


def plan(card: Card, copy: float, quick: bool, rounds: int) -> list[Row]:
    """Every row, in the order in which they are measured."""
    rows: list[Row] = []

    def add(name: str, kernels: tuple[str, ...], needs: float, case: Callable[..., Any], *arguments: Any) -> None:
        rows.append(Row(name, lambda: case(card, *arguments), kernels, 0.0 if card.dry else needs))

    types = (torch.float16,) if quick else (torch.float16, torch.bfloat16, torch.float32)
    passes = [(*size, dtype) for size in (QUICK_SIZES if quick else SOLVER_SIZES) for dtype in types]
    if not quick:
        passes.append((50_000, 1000, torch.float64))
    for n, k, dtype in passes:
        name = f"pass, {n} x {k} {str(dtype).removeprefix('torch.')}"
        # Logits, and entries of candidates; the comparison with float64 takes at most 4,000 rows.
        add(name, PASS, n * k * (dtype.itemsize + 2) + 4000 * k * 32, solver_case, n, k, dtype, copy, rounds)
    add("Newton's method", NEWTON, IMAGENET[0] * 6 * 120, newton_case, copy, rounds)
    for k in (3000,) if quick else (128, 1000, 3000, 10_000):
        add(f"Anderson's step, {k} columns", ("anderson_kernel",), 0, anderson_case, k, copy, rounds)
    lists = ((100_000, 3000),) if quick else ((100_000, 3000), (200_000, 1000), (50_000, 128))
    for n, k in lists:
        room = n * k * 2 + (1 << 27) * 16  # torch's parts
        add(f"candidate lists, {n} x {k}", ("lists_kernel",), room, lists_case, n, k, copy, rounds)
        add(f"margins of columns, {n} x {k}", MARGINS, room, margins_case, n, k, copy, rounds)
    for dim in (512,) if quick else (64, 256, 512, 2048):
        n, k = 100_000, 300 if card.dry else 3000
        add(f"computed logits, {dim} features", ("fused_kernel",), n * k * 20, computed_case, n, k, dim, copy, rounds)
    add("labels", ("lists_kernel", *MARGINS), 200_000 * 1000 * 12, certificate_case)
    stored = ("store_kernel", "reference_kernel", "fused_kernel")
    add("16-bit copies", stored, 100_000 * 3000 * 12, stored_case, 100_000, 3000, copy, rounds)
    add("augmentation to 32 px", ("augment_kernel",), 50_000 * 32 * 32 * 3 * 24, images_case, copy, rounds)
    add("drawn parameters", ("sample_kernel",), 0, sample_case, copy, rounds)
    add("JPEG to planes", JPEG, 0, jpeg_case, copy, rounds)
    add("augmentation to 224 px", LARGE, 512 * 256 * 256 * 3 * 24, large_images_case, copy, rounds)
    add("a solve", ("fused_kernel",), 0, solve_case, copy)
    add("Loader", ("augment_kernel",), 0, loader_case, rounds)
    add("photographs", LARGE, 0, photographs_case, rounds)
    add("training", ("fused_kernel", "augment_kernel"), 0, training_case)
    return rows


def run(quick: bool, dry: bool) -> tuple[Outcome, dict[str, Any]]:
    """Everything; what came of the rows, and the facts to record.

    Raises:
        ResourceError: no usable card.
    """
    card = open_card(dry)
    facts = card_facts(card)
    common.print_machine(facts, torch.get_num_threads())
    rounds = 3 if dry else 7 if quick else 21
    print(
        f"card: {facts['card']}"
        + (
            ""
            if dry
            else f", architecture {facts['architecture']}, {facts['multiprocessors']} multiprocessors, "
            f"{facts['card_memory_gib']} GiB, driver {facts['driver']}, kernels built by CUDA {facts['cuda']}, "
            f"torch by CUDA {facts['torch_cuda']}, torchvision {facts['torchvision']}"
        )
    )
    measured = bandwidths(card, rounds)
    print(f"bandwidth measured: copy {measured['copy']:.0f} GB/s, read {measured['read']:.0f} GB/s")
    outcome = measure_rows(card, plan(card, measured["copy"], quick, rounds))
    print(summary(outcome))
    return outcome, {**facts, **{f"{name}_gb_s": round(value, 1) for name, value in measured.items()}}


def main() -> None:
    parser = common.arguments("The CUDA kernels on this machine's card.")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the processor: tests this file only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        outcome, facts = run(options.quick, options.dry_run)
    except SelaError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    if not (options.no_record or options.dry_run):
        failed = [{"case": "failed", "what": name, "reason": reason} for name, reason in outcome.failed]
        print(f"\nrows appended to {common.record('gpu', outcome.recorded + failed, facts)}")
    if outcome.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
