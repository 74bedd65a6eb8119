"""What is learnt, in figures: SeLa beside other methods, against its goals, with parts of it changed.

    python bench/results.py --quick                        # digits, a few epochs, every method: a minute
    python bench/results.py --list                         # what would run, in which order, and for how long
    python bench/results.py --studies methods --data digits --jobs 2
    python bench/results.py --write | --check              # docs/results.md from the rows; nothing is run

Runs are as long as their number of epochs says, so that a busy machine changes nothing but seconds. Each is a process
of its own with one thread (`--threads`), `--jobs` of them at a time. A row goes to bench/results/learning.jsonl as soon
as its run is over, and the run's files are removed; runs that have a row are passed over, so the script can be stopped
and started at will. Methods that the installed package does not have, and data that are not there, are named and
skipped. True labels judge, and teach nothing but the network that is called supervised.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import results_cases as cases
import results_run
import results_tables as tables
from results_cases import DATA, Case

BENCH = "learning"
DOCUMENT = cases.ROOT / "docs" / "results.md"
RUN = Path(results_run.__file__)
NOT_AVAILABLE = 3
QUICK_EPOCHS = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = common.arguments(__doc__.splitlines()[0])
    found.set_defaults(threads=1)
    found.add_argument("--studies", nargs="+", choices=cases.STUDIES, default=list(cases.STUDIES), metavar="STUDY",
                       help=f"of {', '.join(cases.STUDIES)}; default all")  # fmt: skip
    found.add_argument("--data", nargs="+", choices=list(DATA), metavar="DATA",
                       help=f"of {', '.join(DATA)}; default: what each study looks at")  # fmt: skip
    found.add_argument("--seeds", nargs="+", type=int, default=list(cases.SEEDS), help="default 0 1 2")
    found.add_argument("--only", help="runs whose name contains this text")
    found.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    found.add_argument("--minutes", type=float, help="start no run after so many minutes")
    found.add_argument("--folder", type=Path, help="where the files of runs are while they last")
    found.add_argument("--again", action="store_true", help="rows of other commits do not count: run these again")
    found.add_argument("--list", action="store_true", help="say what would run, and stop")
    found.add_argument("--write", action="store_true", help="write docs/results.md from the rows, and stop")
    found.add_argument("--check", action="store_true", help="status 1 when docs/results.md is not what the rows give")
    return found


def rows_path() -> Path:
    """Where the rows are."""
    return common.RESULTS / f"{BENCH}.jsonl"


def write(check: bool) -> int:
    """Write the page from the rows, or only compare."""
    old = DOCUMENT.read_text(encoding="utf-8")
    new = tables.filled(old, tables.newest(tables.read_rows(rows_path())))
    if check:
        if new != old:
            print("docs/results.md is not what bench/results/learning.jsonl gives; run python bench/results.py --write")
        return int(new != old)
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


@dataclass
class Started:
    """A run under way."""

    case: Case
    process: subprocess.Popen[bytes]
    folder: Path
    row: Path
    log: Path


class Runs:
    """Works through a list of runs, some at a time."""

    def __init__(self, todo: Sequence[Case], done: Iterable[str], folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.done = set(done)
        self.absent: set[str] = set()
        self.failed: list[str] = []
        self.under_way: list[Started] = []
        taught = {case.teacher.key for case in todo if case.teacher is not None and case.key not in self.done}
        # A teacher whose labels are gone is run again.
        self.todo = [
            case
            for case in todo
            if case.key not in self.done or (case.key in taught and not self.labels(case).exists())
        ]
        self.teachers = taught

    def labels(self, case: Case) -> Path:
        """Where the labels of a teacher stay while others need them."""
        return self.folder / f"{case.key}.npz"

    def ready(self) -> Case | None:
        """The next run whose teacher, if it has one, is done; it leaves the list."""
        for place, case in enumerate(self.todo):
            if case.teacher is None or self.labels(case.teacher).exists():
                return self.todo.pop(place)
        return None

    def start(self, case: Case) -> None:
        """Start a run as a process."""
        folder = self.folder / case.key
        row, log = self.folder / f"{case.key}.json", self.folder / f"{case.key}.log"
        labels = None if case.teacher is None else self.labels(case.teacher)
        number = str(self.options.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": number,
            "MKL_NUM_THREADS": number,
            "OPENBLAS_NUM_THREADS": number,
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, str(RUN), str(row)],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(results_run.described(case, folder, self.options.threads, labels).encode())
        process.stdin.close()
        self.under_way.append(Started(case, process, folder, row, log))

    def finish(self, one: Started, facts: dict[str, Any]) -> None:
        """Keep the row of a run that is over, and remove its files."""
        title = one.case.title
        if one.process.returncode == 0:
            row = json.loads(one.row.read_text(encoding="utf-8"))
            common.record(BENCH, [row], facts)
            try:
                write(check=False)
            except ValueError as error:  # a page that someone is working on is no reason to stop
                print(f"docs/results.md is not written: {error}", flush=True)
            self.done.add(one.case.key)
            if one.case.key in self.teachers:
                shutil.copyfile(one.folder / "labels.npz", self.labels(one.case))
            print(f"{title}: {summary(row)}", flush=True)
        elif one.process.returncode == NOT_AVAILABLE:
            print(f"{title}: skipped; {last_line(one.log)}", flush=True)
            self.leave_out(one.case)
        else:
            print(f"{title}: failed; {last_line(one.log)}", flush=True)
            self.failed.append(title)
        for path in (one.row, one.log):
            path.unlink(missing_ok=True)
        shutil.rmtree(one.folder, ignore_errors=True)

    def leave_out(self, case: Case) -> None:
        """Other seeds of what is not available would say the same."""
        self.todo = [
            other
            for other in self.todo
            if (other.data, other.options) != (case.data, case.options)
            and (other.teacher is None or (other.teacher.data, other.teacher.options) != (case.data, case.options))
        ]

    def work(self) -> int:
        """Do all; 1 where a run failed."""
        facts, began = common.machine(), time.monotonic()
        try:
            while self.todo or self.under_way:
                for one in [one for one in self.under_way if one.process.poll() is not None]:
                    self.under_way.remove(one)
                    self.finish(one, facts)
                late = self.options.minutes is not None and time.monotonic() - began > 60 * self.options.minutes
                while not late and len(self.under_way) < self.options.jobs and (case := self.ready()) is not None:
                    self.start(case)
                if not self.under_way:
                    break  # what is left waits for a teacher that failed, or it is late
                time.sleep(0.2)
        finally:
            for one in self.under_way:
                one.process.terminate()
                one.process.wait()
                shutil.rmtree(one.folder, ignore_errors=True)
        if self.todo:
            print(f"{len(self.todo)} runs are left")
        return int(bool(self.failed))


def last_line(path: Path) -> str:
    """What a process said last."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def summary(row: dict[str, Any]) -> str:
    """A row in a line."""
    shown = {
        "knn": "kNN",
        "linear": "linear",
        "few_nmi": "NMI",
        "many_nmi": "NMI, K = 128",
        "features_nmi": "k-means NMI",
    }
    scores = [f"{text} {row['metrics'][name]:.3f}" for name, text in shown.items() if name in row["metrics"]]
    return ", ".join([*scores, f"{row['processor_seconds_in_all'] / 60:.2g} processor minutes"])


def chosen(options: argparse.Namespace) -> list[Case]:
    """The runs that were asked for, whose data are there; data that are not are named."""
    found = cases.cases_of(options.studies, options.data, options.seeds)
    for name in dict.fromkeys(case.data for case in found):
        if DATA[name].find() is None:
            print(f"{DATA[name].title}: not there, skipped; {DATA[name].missing}")
            found = [case for case in found if case.data != name]
    if options.only:
        found = [case for case in found if options.only.lower() in case.name.lower()]
    return cases.once(found)


def done_before(again: bool) -> set[str]:
    """Keys of runs that have a row."""
    here = results_run.commit()
    return {row["key"] for row in tables.read_rows(rows_path()) if not again or row["commit"] == here}


def pace(rows: Iterable[tables.Row]) -> dict[str, float]:
    """By data set, how the processor time of runs recorded here compares with what was expected of them."""
    expected = {case.key: case.core_minutes() for case in cases.cases_of(data=list(DATA))}
    sums: dict[str, list[float]] = {}
    for row in rows:
        if row["key"] in expected and row["kind"] == "train":
            total = sums.setdefault(row["data"], [0.0, 0.0])
            total[0] += row["processor_seconds_in_all"] / 60
            total[1] += expected[row["key"]]
    return {name: took / wanted for name, (took, wanted) in sums.items()}


def plan(todo: Sequence[Case], done: set[str]) -> None:
    """Print what would run, and roughly for how long."""
    left, speed = dict.fromkeys(cases.STUDIES, 0.0), pace(tables.read_rows(rows_path()))
    for number, case in enumerate(todo, 1):
        expected = case.core_minutes() * speed.get(case.data, 1.0)
        if case.key not in done:
            left[case.study] += expected
        state = "there" if case.key in done else f"{expected:6.1f} min"
        print(f"{number:4d}  {state:>10}  {case.study:9}  {case.title}")
    sums = ", ".join(f"{name} {value:.0f}" for name, value in left.items() if value) or "none"
    print(f"processor minutes left, roughly: {sums}")


def quick(threads: int) -> int:
    """Every method on the digits for a few epochs, in this process; nothing is recorded."""
    facts = common.machine()
    common.print_machine(facts, threads)
    lines, started = [], time.monotonic()
    for case in cases.once(cases.cases_of(["methods"], ["digits"], [0])):
        options = {**case.options, "epochs": QUICK_EPOCHS} if case.kind == "train" else case.options
        try:
            row = results_run.in_this_process(replace(case, options=options), threads)
        except results_run.NotAvailableError as error:
            print(f"{case.name}: skipped; {error}")
            continue
        scores = (row["metrics"].get(metric) for metric in tables.HEADINGS)
        lines.append((case.name, *scores, row["seconds_in_all"]))
    title = f"digits, {QUICK_EPOCHS} epochs, seed 0: figures of a beginning"
    common.table(title, ("", *tables.HEADINGS.values(), "seconds"), lines)
    print(f"{time.monotonic() - started:.0f} s in all")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.check or options.write:
        return write(options.check)
    if options.quick:
        return quick(options.threads)
    if options.jobs < 1 or options.threads < 1:
        sys.exit("--jobs and --threads: expected at least 1")
    todo, done = chosen(options), done_before(options.again)
    if options.list:
        plan(todo, done)
        return 0
    if options.no_record:
        sys.exit("--no-record: expected with --quick alone; runs are kept, or they would be done twice")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs under way end too
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="results-", dir=options.folder) as folder:
        return Runs(todo, done, Path(folder), options).work()


if __name__ == "__main__":
    sys.exit(main())
