"""Label steps on one and two ranks here, beside the cost model of docs/scaling.md, and the tables of that document.

    python bench/scaling.py [--quick] [--no-record]    measure, compare, append rows, write the tables
    python bench/scaling.py --run [--quick] [...]      the same with whole training runs
    python bench/scaling.py --tables                   write the tables, measure nothing
    python bench/scaling.py --check                    exit status 1 if the tables are out of date

Ranks are processes of one thread each in a gloo group. Agreement comes first: both must end with the same potential,
bit for bit. One rank and two take turns. The model (bench/scaling_model.py) is then given what one rank measures alone
and what a bare exchange of messages takes, and says what two ranks should take.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import common
import numpy as np
import scaling_model as model
import scaling_run
import scaling_run_model

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
RESULTS = common.RESULTS / "scaling.jsonl"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"
RUN_BEGIN, RUN_END = "<!-- runs:begin -->", "<!-- runs:end -->"
SIZES = {"dense": (60_000, 1000), "peaked": (60_000, 1000)}
QUICK = {"dense": (20_000, 500), "peaked": (20_000, 500)}
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {"method": "anderson", "tol": 0.0, "max_passes": 12},
    "peaked": {"method": "newton", "tol": 1e-6},
}
ROUNDS = 5
LIMIT = 300  # seconds for all of a rank's work


# ---- One rank.


def dense_logits(rows: int, cols: int) -> np.ndarray:
    """The first label pass: an untrained network, a few hundred live entries per row."""
    return (0.1 * np.random.default_rng(0).standard_normal((rows, cols), np.float32)).astype(np.float16)


def peaked_logits(rows: int, cols: int) -> np.ndarray:
    """After some training: images of a class share their favourites; sorted by class."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((40, 24), np.float32)
    features = centres[np.sort(rng.integers(40, size=rows))] + 0.5 * rng.standard_normal((rows, 24), np.float32)
    weight = rng.standard_normal((24, cols), np.float32) / np.float32(24**0.5)
    return 3.0 * (features @ weight + 0.3 * rng.standard_normal(cols, np.float32))


LOGITS = {"dense": dense_logits, "peaked": peaked_logits}


class Counted:
    """Calls, bytes and seconds of torch.distributed's exchanges, while it is entered."""

    names = ("all_reduce", "all_gather_single", "all_gather_into_tensor", "all_gather_object")

    def __enter__(self) -> Counted:
        import torch.distributed as dist

        self.calls, self.gathered, self.seconds = 0, 0, 0.0
        self.originals = {name: getattr(dist, name) for name in self.names if hasattr(dist, name)}
        for name, original in self.originals.items():
            setattr(dist, name, self._counting(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        import torch.distributed as dist

        for name, original in self.originals.items():
            setattr(dist, name, original)

    def _counting(self, name: str, original: Any) -> Any:
        def call(tensor: Any, *arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(tensor, *arguments, **options)
            finally:
                self.calls += 2 if name == "all_gather_object" else 1  # sizes, then bytes
                if "gather" in name and name != "all_gather_object":
                    self.gathered += tensor.numel() * tensor.element_size()
                self.seconds += time.perf_counter() - start

        return call


def bare_exchange(ranks: int, cols: int) -> tuple[float, float]:
    """Seconds of an all-reduce as a pass has it, and bytes per second of an all-gather; (0, inf) alone."""
    import torch
    import torch.distributed as dist

    message = torch.zeros(cols + model.EXTRA, dtype=torch.int64)
    block = torch.zeros(1 << 22, dtype=torch.uint8)
    everybody = torch.empty(ranks << 22, dtype=torch.uint8)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    small, large = [], []
    for _ in range(50):
        dist.barrier()
        small.append(common.timed(lambda: dist.all_reduce(message)))
    for _ in range(7):
        dist.barrier()
        large.append(common.timed(lambda: all_gather(everybody, block)))
    return statistics.median(small), everybody.numel() / statistics.median(large)


def solved(case: str, logits: np.ndarray, group: Any) -> tuple[dict[str, Any], Any]:
    """Times of one solve, and its result."""
    import sela_ext

    with Counted() as counted:
        a = sela_ext.assign(logits, threads=1, group=group, **OPTIONS[case])
    steps = np.diff([entry["seconds"] for entry in a.history])
    times = {"seconds": a.seconds, "step": statistics.median(steps[1:]), "waiting": counted.seconds}
    return {**times, "calls": counted.calls, "gathered": counted.gathered}, a


def pass_seconds(logits: np.ndarray, potential: Any, first_row: int, rows: int) -> float:
    """The fastest of a few passes."""
    import sela_ext

    one_pass = functools.partial(
        sela_ext.kernels.sinkhorn_pass,
        logits,
        potential,
        scale=25.0,
        threads=1,
        first_row=first_row,
        rows_in_all=rows,
    )
    return min(common.timed(one_pass) for _ in range(7))


def rank_main(rank: int, meeting: str, sizes: dict[str, tuple[int, int]], answers: Any) -> None:
    """Solve each case alone (rank 0) and together, in turn; rank 0 answers."""
    import torch
    import torch.distributed as dist

    import sela_ext

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(LIMIT))
    found = {}
    for case, (rows, cols) in sizes.items():
        part = sela_ext.shard_rows(rows, 2, rank)
        logits = LOGITS[case](rows, cols)
        runs: dict[str, list[dict[str, Any]]] = {"one": [], "two": []}
        for _ in range(ROUNDS):
            dist.barrier()
            if rank == 0:
                times, alone = solved(case, logits, None)
                times["pass"] = pass_seconds(logits, alone.potential, 0, rows)
                runs["one"].append(times)
            dist.barrier()
            times, together = solved(case, logits[part], True)
            dist.barrier()
            times["pass"] = pass_seconds(logits[part], together.potential, part.start, rows)
            runs["two"].append(times)
        message, bandwidth = bare_exchange(2, cols)
        if rank == 0:
            best = {
                name: {key: min(run[key] for run in several[1:]) for key in several[0]}  # the first touches the memory
                for name, several in runs.items()
            }
            best["one"]["passes"] = best["two"]["passes"] = alone.passes
            best["two"] |= {"message": message, "bandwidth": bandwidth}
            same = alone.potential.tobytes() == together.potential.tobytes() and alone.passes == together.passes
            found[case] = (same, best["one"], best["two"])
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def measured(sizes: dict[str, tuple[int, int]]) -> dict[str, tuple[bool, dict[str, Any], dict[str, Any]]]:
    """For each case: whether the bits are the same; what one rank took, and what two."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=rank_main, args=(rank, f"{folder}/meeting", sizes, answers)) for rank in range(2)
        ]
        for process in processes:
            process.start()
        try:
            found: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = answers.get(timeout=LIMIT)
            for process in processes:
                process.join(LIMIT)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
    return found


# ---- One rank and two, and the model between them.


def compared(one: dict[str, Any], two: dict[str, Any], case: str, rows: int, cols: int) -> dict[str, Any]:
    """Two ranks as the model expects them from one, and as they were."""
    share = model.rows_per_rank(rows, 2) / rows
    exchanges = two["calls"] * two["message"] + two["gathered"] / two["bandwidth"]
    step = one["step"] - one["pass"] * (1 - share) + two["message"]
    # Newton's solves are done on both ranks alike; only the passes are shared.
    solve = one["seconds"] - one["passes"] * one["pass"] * (1 - share) + exchanges
    return {
        "case": case,
        "rows": rows,
        "cols": cols,
        "threads": 1,
        "passes": two["passes"],
        "pass_1": one["pass"],
        "pass_2": two["pass"],
        "message_bytes": model.message_bytes(cols),
        "message_seconds": two["message"],
        "exchanges": two["calls"],
        "gathered_bytes": two["gathered"],
        "gather_bytes_per_second": two["bandwidth"],
        "waiting_seconds": two["waiting"],
        "step_1": one["step"],
        "step_2": two["step"],
        "step_2_model": step,
        "solve_1": one["seconds"],
        "solve_2": two["seconds"],
        "solve_2_model": solve,
    }


def recorded() -> list[dict[str, Any]]:
    """All rows of this benchmark."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.strip()]


def measured_table() -> str:
    """The newest recorded label steps, for the document."""
    lines = [line for line in recorded() if line.get("question") != "run"]
    if not lines:
        return "Measured: nothing is recorded yet; `python bench/scaling.py` does it."
    newest = [line for line in lines if line["time"] == lines[-1]["time"]]
    facts = newest[0]["machine"]
    cells = []
    for row in newest:
        steps = [("a pass and its step", "step")] if row["case"] == "dense" else []  # Newton's differ from one another
        for words, key in (*steps, ("the whole solve", "solve")):
            one, two, expected = row[f"{key}_1"], row[f"{key}_2"], row[f"{key}_2_model"]
            cells.append(
                [
                    f"{row['case']}, {row['rows']:,} x {row['cols']:,}, {words}",
                    *(model.seconds_words(x) for x in (one, two, expected)),
                    f"{two / expected:.2f}",
                    f"{one / two:.2f}",
                ]
            )
    head = f"**Measured** on {facts['cpu']}, {facts['cores']} cores, one thread per rank, gloo on the same machine"
    exchanges = ", ".join(
        f"{row['case']}: {row['exchanges']} exchanges, {model.seconds_words(row['message_seconds'])} each, and "
        f"{model.bytes_words(row['gathered_bytes'])} gathered"
        for row in newest
    )
    table = model.markdown(["", "1 rank", "2 ranks", "2 ranks by the model", "measured / model", "speed-up"], cells)
    return f"{head} ({newest[0]['time'][:10]}; {exchanges}).\n\n{table}"


def written(text: str) -> str:
    """The document with its generated parts replaced."""
    for begin, end, part in (
        (BEGIN, END, f"{model.tables()}\n\n{measured_table()}"),
        (RUN_BEGIN, RUN_END, f"{scaling_run_model.tables()}\n\n{scaling_run.table(recorded())}"),
    ):
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{part}\n{end}{rest.split(end, 1)[1]}"
    return text


def measure(quick: bool, keep: bool) -> int:
    """Label steps: measure, print, append rows."""
    facts = common.machine()
    common.print_machine(facts, 1)
    sizes = QUICK if quick else SIZES
    rows = []
    for case, (same, one, two) in measured(sizes).items():
        if not same:
            print(f"{case}: two ranks end at another potential than one; nothing is compared")
            return 1
        rows.append(compared(one, two, case, *sizes[case]))
    print("one rank and two end with the same bits")
    common.table(
        "seconds; model: two ranks from what one measured, and bare messages",
        ["case", "passes", "step 1", "step 2", "model", "ratio", "solve 1", "solve 2", "model", "ratio", "waiting"],
        [
            [
                f"{r['case']} {r['rows']} x {r['cols']}",
                *(r[key] for key in ("passes", "step_1", "step_2", "step_2_model")),
                r["step_2"] / r["step_2_model"],
                *(r[key] for key in ("solve_1", "solve_2", "solve_2_model")),
                r["solve_2"] / r["solve_2_model"],
                r["waiting_seconds"],
            ]
            for r in rows
        ],
    )
    common.table(
        "exchanges",
        ["case", "calls", "message", "seconds each", "gathered", "gather GB/s"],
        [
            [
                r["case"],
                r["exchanges"],
                model.bytes_words(r["message_bytes"]),
                r["message_seconds"],
                model.bytes_words(r["gathered_bytes"]),
                r["gather_bytes_per_second"] / 1e9,
            ]
            for r in rows
        ],
    )
    if keep:
        print(f"\nrows appended to {common.record('scaling', rows, facts)}")
    return 0


def main(words: list[str] | None = None) -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="measure training runs instead of label steps")
    parser.add_argument("--tables", action="store_true", help="write the tables of docs/scaling.md, measure nothing")
    parser.add_argument("--check", action="store_true", help="only say whether those tables are up to date")
    options = parser.parse_args(words)
    if options.check:
        text = DOCUMENT.read_text(encoding="utf-8")
        if written(text) == text:
            return 0
        print(f"{DOCUMENT}: the tables are out of date; run python bench/scaling.py --tables")
        return 1
    if not options.tables:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        status = (scaling_run.measure if options.run else measure)(options.quick, not options.no_record)
        if status or options.no_record:
            return status
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"tables written to {DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
