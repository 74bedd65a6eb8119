"""Training runs on one rank and two here, beside what the model of docs/scaling.md makes of one rank's times.

Called by `python bench/scaling.py --run`. One rank alone, two of half the size side by side that know nothing of each
other, and two ranks of one run take turns, each rank with one thread. The pair says what a rank takes for its half
while another one is at work on this machine; bare messages say what their link takes; the model adds both, and what
every rank does for all rows. The bytes that a rank sends are counted by the kernel.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import common
import numpy as np
import scaling_model
import scaling_run_model as model

ROUNDS, SECONDS = 5, 50.0  # of each case: rounds, and seconds after which no further one begins
LIMIT = 300  # seconds for a run
PIECES = 10  # sums of a head beside those of its passes: room, sizes of clusters, the end
GATHERS = 9  # of a head, small: shapes, options, numbers of rows; an object is two messages
SMALL = 2  # small messages of a step: signals and clock; losses, which these runs log at every step
NUMBERS = 5  # float64 of a small message
COMPARED = 20_000  # embeddings at most whose spread is told


@dataclass(frozen=True)
class Case:
    """A run to compare.

    Attributes:
        name: in words.
        images: N.
        batch: of all ranks together.
        options: of `sela_ext.train`.
        bank: whether labels come from the bank; else every label pass looks at all images.
    """

    name: str
    images: int
    batch: int
    options: Mapping[str, Any]
    bank: bool = True

    def half(self) -> Case:
        """What each of two ranks has to do."""
        return replace(self, images=self.images // 2, batch=self.batch // 2)


_OPTIONS: dict[str, Any] = {
    "clusters": 64,
    "projection": 0,
    "label_method": "anderson",
    "init": "random",
    "half_resolution": 0.0,
    "precision": "bfloat16",
    "log_every": 1,
    "threads": 1,
    "progress": False,
}
CASES = (
    Case("small-resnet, bank", 2048, 256, {**_OPTIONS, "model": "small-resnet", "heads": 4, "epochs": 3}),
    Case(
        "resnet18, label passes that look",
        512,
        64,
        {**_OPTIONS, "model": "resnet18", "heads": 2, "epochs": 1, "label_source": "eval", "label_passes": 2},
        bank=False,
    ),
)


def pictures(count: int) -> np.ndarray[Any, Any]:
    """Colour images uint8 [N, 32, 32, 3]: coarse noise, each in a tone of its own."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (count, 8, 8, 3))
    tone = rng.integers(0, 56, (count, 1, 1, 3))
    return (np.kron(coarse, np.ones((1, 4, 4, 1), np.int64)) + tone).astype(np.uint8)


# ---- One run.


@dataclass(frozen=True)
class Run:
    """What a run's folder says of it.

    Attributes:
        step: seconds of a step, the lower quartile of all but the first two: others may be at work on the machine.
        label_pass: seconds of a label pass, the mean.
        solve: seconds of it without the look at the images.
        evaluation: seconds of the evaluation at the end.
        steps: how many.
        passes: how many label passes.
        reads: passes of the solver, of all heads and label passes.
        parameters: of the network.
        features: of an image; the embedding is the same in 16 bits.
        sent: bytes that one rank sent; None where that was not counted.
    """

    step: float
    label_pass: float
    solve: float
    evaluation: float
    steps: int
    passes: int
    reads: float
    parameters: int
    features: int
    sent: float | None = None


def read_run(folder: Path) -> Run:
    """From metrics.jsonl and options.json."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event["interval_seconds"] for event in events if event["event"] == "step"]
    passes = [event for event in events if event["event"] == "label_pass"]
    end = next(event for event in events if event["event"] == "end")
    resolved = json.loads((folder / "options.json").read_text(encoding="utf-8"))["resolved"]
    return Run(
        step=float(np.quantile(steps[2:], 0.25)),
        label_pass=end["label_pass_seconds"] / len(passes),
        solve=statistics.mean(event["solve_seconds"] for event in passes),
        evaluation=end["evaluation_seconds"],
        steps=len(steps),
        passes=len(passes),
        reads=sum(head["passes"] for event in passes for head in event["heads"]),
        parameters=resolved["parameters"],
        features=resolved["feature_dim"],
    )


def train_here(case: Case, out: str, environment: Mapping[str, str]) -> float | None:
    """Train in this process; what it sent as the second rank of a run, in bytes."""
    import sela_ext

    for name in RANK_NAMES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    before = written_bytes()
    sela_ext.train(pictures(case.images), out=out, batch_size=case.batch, **case.options)
    # Rank 0 writes the run folder, this one messages alone.
    return None if before is None or environment.get("RANK") != "1" else written_bytes() - before


def written_bytes() -> int | None:
    """Bytes that this process has given to write calls, to files and sockets; None where the kernel does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if line.startswith("wchar:"):
                return int(line.split(":")[1])
    return None


RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environments(ranks: int) -> list[dict[str, str]]:
    """What the processes of a run find in their environment, as torchrun sets it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(ranks)]


def worker(work: Callable[[Case, str, Mapping[str, str]], float | None], tasks: Any, answers: Any) -> None:
    """A process that trains what it is told to, until it is told None."""
    while (task := tasks.get()) is not None:
        try:
            answers.put((None, work(*task)))
        except BaseException as error:
            answers.put((f"{type(error).__name__}: {error}", None))


class Workers:
    """Two processes that train one run after the other: libraries are loaded once."""

    def __init__(self, work: Callable[[Case, str, Mapping[str, str]], float | None] = train_here) -> None:
        context = multiprocessing.get_context("spawn")
        self._answers = context.Queue()
        self._tasks = [context.Queue() for _ in range(2)]
        self._processes = [context.Process(target=worker, args=(work, queue, self._answers)) for queue in self._tasks]

    def __enter__(self) -> Workers:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *error: object) -> None:
        for queue in self._tasks:
            queue.put(None)
        for process in self._processes:
            process.join(0 if any(error) else LIMIT)
            if process.is_alive():
                process.kill()
                process.join()

    def train(self, case: Case, processes: int, *, together: bool = False) -> list[Run]:
        """Train in one process or both at once, as ranks of one run or each by itself; what each run took."""
        with tempfile.TemporaryDirectory() as folder:
            outs = [f"{folder}/{0 if together else number}" for number in range(processes)]
            settings = environments(processes) if together else [{}] * processes
            for queue, out, environment in zip(self._tasks, outs, settings, strict=False):
                queue.put((case, out, environment))
            told = [self._answers.get(timeout=LIMIT) for _ in range(processes)]
            problems = [problem for problem, _ in told if problem is not None]
            if problems:
                raise SystemExit(f"{case.name}, {processes} processes: {problems[0]}")
            if not together:
                return [read_run(Path(out)) for out in outs]
            sent = next((sent for _, sent in told if sent is not None), None)
            return [replace(read_run(Path(outs[0])), sent=sent)]


TIMES = ("step", "label_pass", "solve", "evaluation")


def in_the_middle(runs: Sequence[Run]) -> Run:
    """Medians of the times; the rest is the same in all."""
    times = {name: statistics.median(getattr(run, name) for run in runs) for name in TIMES}
    return replace(runs[-1], **times)


# ---- The link.


def link_rank(rank: int, meeting: str, size: int, answers: Any) -> None:
    """Time bare all-reduces of a small message and of `size` bytes; rank 0 answers."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(LIMIT))
    small, large = torch.zeros(NUMBERS, dtype=torch.float64), torch.zeros(size // 4)
    found = []
    for message, times in ((small, 60), (large, 15)):
        seconds = []
        for _ in range(times):
            dist.barrier()
            seconds.append(common.timed(lambda message=message: dist.all_reduce(message)))
        found.append(statistics.median(seconds))
    dist.destroy_process_group()
    if rank == 0:
        answers.put(found)


def measured_link(size: int) -> tuple[float, float]:
    """Seconds of a small all-reduce between two ranks, and bytes per second of one of `size` bytes."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=link_rank, args=(r, f"{folder}/meeting", size, answers)) for r in range(2)]
        for process in ranks:
            process.start()
        try:
            small, large = answers.get(timeout=LIMIT)
            for process in ranks:
                process.join(LIMIT)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
    return small, size / max(large - small, 1e-6)


def record_seconds(labels: int = 200_000) -> float:
    """Seconds of the records of one label of one head."""
    from sela_ext.training.labelling import head_record

    rng = np.random.default_rng(0)
    before = rng.integers(0, 64, labels).astype(np.int32)
    now = np.where(rng.random(labels) < 0.1, rng.integers(0, 64, labels), before).astype(np.int32)
    return min(common.timed(lambda: head_record(0, 64, {}, before, now, 1.0, None)) for _ in range(3)) / labels


# ---- One rank and two, and the model between them.


def expected(case: Case, one: Run, pair: Run, message: float, rate: float, record: float) -> Run:
    """Two ranks, from what one of a pair took for its half, the link, and what one rank does for all rows.

    Args:
        case: the run.
        one: what one rank took for all.
        pair: what one of a pair took for its half.
        message: seconds of a small message.
        rate: bytes per second of large ones.
        record: seconds of the records of one label.
    """
    link = scaling_model.Link(message / 2, rate, message / 2, rate)
    rates = model.Rates(
        image=pair.step / (case.batch // 2), look=0.0, load=0.0, overlap=0.0, link=link, host_hop=message / 2
    )
    step = model.step_cost(case.batch // 2, pair.parameters, 2, rates)
    heads, clusters, half = int(case.options["heads"]), int(case.options["clusters"]), case.images // 2
    reads = pair.reads / (pair.passes * heads)  # of a head in a pass
    sums = scaling_model.all_reduce_seconds(scaling_model.message_bytes(clusters), 2, link)
    told = scaling_model.gather_seconds(8.0 * case.images * heads, 2, link)
    others = record * heads * (case.images - half)
    solving = heads * ((reads + PIECES) * sums + GATHERS * message) + told + spread_bytes(case, pair) / rate + others
    # At the end rank 0 gets all features and embeddings, and solves for all rows alone.
    alone = max(one.solve - pair.solve, 0.0) + final_bytes(case, pair) / rate
    return replace(
        pair,
        # The small messages follow the step: there is nothing else to do meanwhile.
        step=step.seconds + SMALL * model.small_seconds(2, rates),
        label_pass=pair.label_pass + solving + dealt_bytes(case, pair) / rate,
        solve=pair.solve + solving,
        evaluation=pair.evaluation + alone,
        sent=sent_bytes(case, pair),
    )


def dealt_bytes(case: Case, run: Run) -> float:
    """Of one of two ranks in a label pass: half of its rows are the other's."""
    return (case.images // 4) * (2.0 * run.features + (16 if case.bank else 8))


def kept_bytes(case: Case, run: Run) -> float:
    """Of the second rank's rows of the bank in a checkpoint: embeddings, and whether they are valid."""
    return (case.images // 2) * (2.0 * run.features + 1) if case.bank else 0.0


def spread_bytes(case: Case, run: Run) -> float:
    """Of one of two ranks in a label pass: some embeddings, whose spread is told."""
    return min(case.images // 2, COMPARED // 2) * 2.0 * run.features


def final_bytes(case: Case, run: Run) -> float:
    """Of the second rank at the end: features in float32, embeddings, whether they are valid, numbers of the rows."""
    return (case.images // 2) * (4.0 * run.features + 2.0 * run.features + 1 + 8)


def sent_bytes(case: Case, run: Run) -> float:
    """What the second of two ranks sends.

    Gradients and small messages of each step; in a label pass embeddings to the other rank, sums, and labels with
    probabilities; for a bank embeddings of the first look and of the last epoch, and a checkpoint; at the end
    everything of its rows. A rank halves a sum with the other one: it sends as many bytes as the message has.
    """
    heads, clusters = int(case.options["heads"]), int(case.options["clusters"])
    of_steps = run.steps * (model.gradient_bytes(run.parameters) + SMALL * 8 * NUMBERS)
    of_solves = (run.reads + run.passes * heads * PIECES) * scaling_model.message_bytes(clusters)
    of_labels = 8.0 * heads * (case.images // 2) + spread_bytes(case, run) + dealt_bytes(case, run)
    of_bank = dealt_bytes(replace(case, bank=False), run) + dealt_bytes(case, run) if case.bank else 0.0
    of_end = kept_bytes(case, run) + final_bytes(case, run)
    return of_steps + of_solves + run.passes * of_labels + of_bank + of_end


def compared(case: Case, one: Run, pair: Run, two: Run, message: float, rate: float, record: float) -> dict[str, Any]:
    """A row: one rank, a pair, two ranks, and the model's."""
    guess = expected(case, one, pair, message, rate, record)
    row: dict[str, Any] = {
        "question": "run",
        "case": case.name,
        "images": case.images,
        "batch": case.batch,
        "threads": 1,
        "parameters": two.parameters,
        "steps": two.steps,
        "passes": two.passes,
        "reads": two.reads,
        "message_seconds": message,
        "bytes_per_second": rate,
        "record_seconds": record,
        "sent_2": two.sent,
        "sent_2_model": guess.sent,
    }
    for name in TIMES:
        row |= {f"{name}_{key}": getattr(run, name) for key, run in (("1", one), ("pair", pair), ("2", two))}
        row[f"{name}_2_model"] = getattr(guess, name)
    return row


def rows(cases: Sequence[Case] = CASES, rounds: int = ROUNDS) -> Iterator[dict[str, Any]]:
    """Measure the cases in turn, and compare."""
    record = record_seconds()
    with Workers() as workers:
        for case in cases:
            one: list[Run] = []
            pair: list[Run] = []
            two: list[Run] = []
            start = time.perf_counter()
            while len(one) < rounds and (not one or time.perf_counter() - start < SECONDS):
                one += workers.train(case, 1)
                pair += workers.train(case.half(), 2)
                two += workers.train(case, 2, together=True)
            message, rate = measured_link(int(min(model.gradient_bytes(two[0].parameters), model.R["k"])))
            row = compared(case, *(in_the_middle(runs) for runs in (one, pair, two)), message, rate, record)
            yield {**row, "rounds": len(one)}


def measure(quick: bool, keep: bool) -> int:
    """What --run does: measure, print, append rows."""
    facts = common.machine() | {"load": round(os.getloadavg()[0], 2)}
    common.print_machine(facts, 1)
    start = time.perf_counter()
    found = list(rows(CASES[:1] if quick else CASES, 1 if quick else ROUNDS))
    facts["load_after"] = round(os.getloadavg()[0], 2)
    common.table(
        "seconds; model: two ranks from what one of a pair took, and bare messages",
        ["case", "", "1 rank", "pair", "2 ranks", "model", "2 / model", "1 / 2"],
        [
            [row["case"], name.replace("_", " "), *(row[f"{name}_{key}"] for key in ("1", "pair", "2", "2_model")),
             row[f"{name}_2"] / row[f"{name}_2_model"], row[f"{name}_1"] / row[f"{name}_2"]]
            for row in found
            for name in ("step", "label_pass", "evaluation")
        ],
    )  # fmt: skip
    common.table(
        "messages",
        ["case", "small all-reduce", "GB/s", "sent", "model"],
        [
            [row["case"], scaling_model.seconds_words(row["message_seconds"]), row["bytes_per_second"] / 1e9,
             None if row["sent_2"] is None else scaling_model.bytes_words(row["sent_2"]),
             scaling_model.bytes_words(row["sent_2_model"])]
            for row in found
        ],
    )  # fmt: skip
    print(f"\n{time.perf_counter() - start:.0f} s in all, load now {os.getloadavg()[0]:.1f}")
    if keep:
        print(f"rows appended to {common.record('scaling', found, facts)}")
    return 0


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The newest recorded rows, for the document."""
    recorded = [line for line in lines if line.get("question") == "run"]
    if not recorded:
        return "Runs measured: nothing is recorded yet; `python bench/scaling.py --run` does it."
    newest = [line for line in recorded if line["time"] == recorded[-1]["time"]]
    facts = newest[0]["machine"]
    cells = []
    for row in newest:
        rates = [row["batch"] / row[f"step_{key}"] for key in ("1", "pair", "2", "2_model")]
        rates[1] /= 2  # a batch of its own, half as large
        cells.append(
            [row["case"], "images/s", *(f"{rate:,.0f}" for rate in rates), f"{rates[2] / rates[3]:.2f}",
             f"{rates[2] / rates[0]:.2f}"]
        )  # fmt: skip
        for name, words in (("step", "a step"), ("label_pass", "a label pass"), ("evaluation", "the evaluation")):
            one, pair, two, guess = (row[f"{name}_{key}"] for key in ("1", "pair", "2", "2_model"))
            cells.append(
                ["", words, *(scaling_model.seconds_words(x) for x in (one, pair, two, guess)), f"{two / guess:.2f}",
                 f"{one / two:.2f}"]
            )  # fmt: skip
        if row["sent_2"] is not None:
            cells.append(
                ["", "sent by a rank", "-", "-", scaling_model.bytes_words(row["sent_2"]),
                 scaling_model.bytes_words(row["sent_2_model"]), f"{row['sent_2'] / row['sent_2_model']:.2f}", "-"]
            )  # fmt: skip
    links = "; ".join(
        f"{row['case']}: {row['images']:,} images in batches of {row['batch']}, messages of "
        f"{scaling_model.bytes_words(model.gradient_bytes(row['parameters']))} at "
        f"{row['bytes_per_second'] / 1e9:.1f} GB/s, small ones in {scaling_model.seconds_words(row['message_seconds'])}"
        for row in newest
    )
    load = f"load {facts['load']:.1f} before and {facts['load_after']:.1f} after"
    head = (
        f"**Runs measured** on {facts['cpu']}, {facts['cores']} cores, one thread per rank, gloo on the same machine "
        f"({newest[0]['time'][:10]}, {load}, medians; {links}). *Pair*: each of two runs of half the size, side by "
        "side, that know nothing of each other."
    )
    header = ["", "", "1 rank", "pair", "2 ranks", "2 ranks by the model", "measured / model", "gain"]
    return f"{head}\n\n{scaling_model.markdown(header, cells)}"
