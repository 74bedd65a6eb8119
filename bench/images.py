"""Loading and augmenting images beside the alternatives: whole pipelines from JPEG files, small images, decoding alone.

    python bench/images.py [--quick] [--only NAME ...] [--no-record]

Agreement is checked first, and nothing is timed without it: on the drawn parameters the exact way equals torchvision v2
run in float within 0.01 of 255, the planar way is within 0.3 of the exact one in the mean, the decoder has Pillow's
pixels, and what the competitors return has the right shape, type and range, and a mean near ours.

Rates are images per second of processor time of the whole process, one thread each, medians of rounds that the
competitors take in turn; with two threads (or workers) it is the wall clock. Everything is read from files that the
system has in memory. The targets of the project are printed at the end, from the rows of this run. What is read:
images_cases.py; the competitors: images_peers.py; our own ways: images_ours.py; what is checked: images_agreement.py;
the targets: images_targets.py. `python bench/performance.py` writes docs/performance.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common
import images_agreement as agreement
import images_child as child
import images_targets as names
import torch
from images_alone import ISAS, behind, decode
from images_cases import Absent, Task
from images_run import PEERS, Run, add_rates, agree, competitors, even, files_task, in_turn, pipeline, sane

PARTS = (
    "decode",
    "sela",
    "generated",
    "aug_plus",
    "eval",
    "threads",
    "small",
    "small-files",
    "small-threads",
    "isa",
    "behind",
)
QUICK = ("decode", "sela", "aug_plus", "eval", "small", "small-files")
QUICK_PHOTOGRAPHS, QUICK_SMALLS = 60, 10_000

# ---------------------------------------------------------------- the parts


def sela(run: Run) -> None:
    """The paper's augmentation of photographs."""
    files = run.photograph_files()
    pipeline(run, names.SELA, files_task(run, "sela", files), 2 if run.quick else 7)


def generated(run: Run) -> None:
    """The same of files that anybody can make."""
    files = run.generated_files()
    pipeline(run, names.SELA_GENERATED, files_task(run, "sela", files), 2 if run.quick else 5)


def aug_plus(run: Run) -> None:
    """Aug++: with a blur."""
    files = run.photograph_files()
    pipeline(run, names.AUG_PLUS, files_task(run, "aug_plus", files[: len(files) // 2]), 2 if run.quick else 7)


def evaluation(run: Run) -> None:
    """The transform of an evaluation."""
    files = run.photograph_files()
    pipeline(run, names.EVAL, files_task(run, "eval", files), 2 if run.quick else 7)


def threads(run: Run) -> None:
    """Two threads of ours beside two workers, by the wall clock."""
    task = files_task(run, "sela", run.photograph_files(), threads=2)
    # An epoch begins and ends in every round, which should not be what is timed.
    theirs = replace(task, files=task.files * 6, count=6 * task.count)
    tasks = dict.fromkeys(names.LATER, replace(task, repeat=24)) | dict.fromkeys(PEERS, theirs)
    wall_clock(run, names.SELA + names.TWO, tasks, 2 if run.quick else 5)


def small_tasks(run: Run, threads: int) -> dict[str, Task]:
    """32 px from memory: a competitor's round takes about as long as another's."""
    shares = {names.V2: 0.05, names.V1: 0.08, names.ALBUMENTATIONS: 0.2, names.DALI: 0.5}
    tasks = {}
    for what in (names.FROM_ARRAY, *PEERS):
        count = round(run.smalls * shares.get(what, 1))
        tasks[what] = Task("small", 32, array=run.small_array(), count=count, batch=even(count, 256), threads=threads)
    return tasks


def small(run: Run) -> None:
    """32 px from memory."""
    tasks = small_tasks(run, 1)
    agree(run, names.SMALL, tasks[names.FROM_ARRAY], [names.FROM_ARRAY], [])
    with competitors(run, tasks) as found:
        sane(names.SMALL, found, tasks)
        add_rates(run, names.SMALL, in_turn(found, run.rounds or (2 if run.quick else 7)))


def small_files(run: Run) -> None:
    """32 px from a folder of JPEG files."""
    files = run.small_files()
    task = files_task(run, "small", files)
    pipeline(run, names.SMALL_FILES, task, 2 if run.quick else 5)


def small_threads(run: Run) -> None:
    """32 px from memory with two threads."""
    tasks = {}
    for number, word in ((1, "one thread"), (2, "two threads")):
        tasks[f"{names.FROM_ARRAY}, {word}"] = small_tasks(run, number)[names.FROM_ARRAY]
    tasks |= {what: task for what, task in small_tasks(run, 2).items() if what in PEERS}
    wall_clock(run, names.SMALL + names.TWO, tasks, 2 if run.quick else 7)


def wall_clock(run: Run, case: str, tasks: Mapping[str, Task], rounds: int) -> None:
    """A case by the wall clock, everybody in a process of its own."""
    with competitors(run, tasks, apart=True) as found:
        sane(case, found, tasks)
        add_rates(run, case, in_turn(found, run.rounds or rounds), wall=True)


def isa(run: Run) -> None:
    """The instruction sets, each in a process of its own."""
    files = run.photograph_files()
    jpeg = files_task(run, "sela", files)
    for case, what, task in (
        (names.SELA, names.PLANAR_LATER, jpeg),
        (names.SELA_EXACT, names.EXACT_PLAIN, jpeg),
        (names.SMALL, names.FROM_ARRAY, small_tasks(run, 1)[names.FROM_ARRAY]),
    ):
        found: dict[str, child.Apart] = {}
        try:
            for name in ISAS:
                try:
                    found[name] = child.Apart(what, task, {"SELA_CPU_ISA": name})
                except Absent as error:
                    run.skip(name, str(error))
            spent = in_turn(found, run.rounds or (2 if run.quick else 7))
        finally:
            for one in found.values():
                one.close()
        add_rates(run, case, spent, question="isa")


# ---------------------------------------------------------------- all of it


def parts_of(options: Any) -> tuple[str, ...]:
    """What is run, in order."""
    if options.only:
        unknown = [name for name in options.only if name not in PARTS]
        if unknown:
            raise SystemExit(f"--only: expected one of {', '.join(PARTS)}, found {unknown[0]}")
        return tuple(name for name in PARTS if name in options.only)
    return QUICK if options.quick else PARTS


def run_part(run: Run, part: str) -> None:
    """One of PARTS."""
    functions: dict[str, Callable[[Run], None]] = {
        "decode": decode,
        "sela": sela,
        "generated": generated,
        "aug_plus": aug_plus,
        "eval": evaluation,
        "threads": threads,
        "small": small,
        "small-files": small_files,
        "small-threads": small_threads,
        "isa": isa,
        "behind": behind,
    }
    functions[part](run)


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", "--part", nargs="+", metavar="NAME", help=f"run only these: {', '.join(PARTS)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = parts_of(options)
    facts = common.machine()
    facts |= {name: common.version(name) for name in names.PACKAGES}
    facts |= {"load": round(os.getloadavg()[0], 2)}
    common.print_machine(facts, 1)
    print(", ".join(f"{shown} {facts[name] or 'not installed'}" for name, shown in names.PACKAGES.items()))
    if facts["load"] > 0.5:
        print(f"the machine is busy (load {facts['load']}): believe ratios rather than seconds")
    start = time.perf_counter()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), options.quick, "only" if options.only else "quick" if options.quick else "full")
        if options.quick:
            run.photographs, run.smalls = QUICK_PHOTOGRAPHS, QUICK_SMALLS
        for part in chosen:
            begun = time.perf_counter()
            try:
                run_part(run, part)
            except agreement.DisagreementError as error:
                raise SystemExit(f"no agreement, {error}") from error
            except Exception as error:
                failed.append(part)
                print(f"\n{part}: failed, {type(error).__name__}: {error}")
            print(f"  ({part}: {time.perf_counter() - begun:.0f} s)", flush=True)
    common.table("Targets, from the rows of this run", names.HEADER, names.lines(run.rows))
    print(f"\n{time.perf_counter() - start:.0f} s in all, load now {os.getloadavg()[0]:.1f}")
    if not options.no_record:
        print(f"{len(run.rows)} rows appended to {common.record('images', run.rows, facts)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
