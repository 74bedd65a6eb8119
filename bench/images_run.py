"""What the parts of bench/images.py share: a run and its rows, competitors, looks before and rounds of timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import images_agreement as agreement
import images_cases as cases
import images_child as child
import images_ours as ours
import images_peers as peers
import images_targets as names
import numpy as np
from images_cases import Task

import sela_ext

PEERS = tuple(peers.PEERS)
FROM_FILES = (
    names.EXACT_PLAIN,
    names.PLANAR_PLAIN,
    names.PLANAR_FIRST,
    names.EXACT_LATER,
    names.PLANAR_LATER,
    names.EXACT_PACKED,
    names.PLANAR_PACKED,
    names.READER_LATER,
)
OURS_AGAIN = 4  # times that ours go through the files in a round, which takes them as much less time than the others
CHECKED = 48  # images compared one by one with torchvision's, per pipeline
RANGE = 0.5  # of 255: how far beyond 0 and 255 float arithmetic may go


@dataclass
class Run:
    """What all parts of a run share, and the rows that they add."""

    folder: Path
    quick: bool = False
    mode: str = "full"
    photographs: int = 240
    smalls: int = 50_000
    rounds: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    made: dict[str, Any] = field(default_factory=dict)

    def add(self, question: str, case: str, what: str, **values: Any) -> None:
        """Keep one row."""
        self.rows.append({"question": question, "case": case, "what": what, "mode": self.mode, **values})

    def skip(self, what: str, reason: str) -> None:
        """Say once that something is left out, and why."""
        if what not in self.refused:
            self.refused.add(what)
            print(f"  {what}: skipped, {reason}")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What several parts use, made when the first one asks for it."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def photograph_files(self) -> tuple[str, ...]:
        """Photographs, or generated files where there are none."""

        def make() -> tuple[str, ...]:
            found = cases.photographs(self.folder / "photographs", self.photographs)
            if not found:
                print("  no photographs (SELA_DATA_DIR): generated files in their place")
                return self.generated_files()
            return tuple(found)

        found: tuple[str, ...] = self.once("photographs", make)
        return found

    def generated_files(self) -> tuple[str, ...]:
        """JPEG files made here."""
        found: tuple[str, ...] = self.once(
            "generated", lambda: tuple(cases.generated(self.folder / "generated", self.photographs))
        )
        return found

    def small_array(self) -> str:
        """A file with 32 px images cut out of the photographs."""

        def make() -> str:
            path = self.folder / "small.npy"
            np.save(path, cases.patches([cases.pixels(file) for file in self.photograph_files()[:60]], self.smalls))
            return str(path)

        return str(self.once("small", make))

    def small_files(self) -> tuple[str, ...]:
        """Some of them as JPEG files."""
        found: tuple[str, ...] = self.once(
            "small files",
            lambda: tuple(cases.small_files(self.folder / "small", np.load(self.small_array())[: self.smalls // 10])),
        )
        return found

    def packed(self, files: tuple[str, ...]) -> str:
        """A folder with a pack of the files."""

        def make() -> str:
            folder = self.folder / f"pack_{len(self.made)}"
            sela_ext.pack(list(files), folder)
            return str(folder)

        return str(self.once(f"pack of {hash(files)}", make))


Competitor = child.Here | child.Apart


# ---------------------------------------------------------------- one case


@contextmanager
def competitors(run: Run, tasks: Mapping[str, Task], *, apart: bool = False) -> Iterator[dict[str, Competitor]]:
    """Everything that there is of a case, name -> competitor; processes end with the block.

    apart: all of them in processes of their own.
    """
    made: dict[str, Competitor] = {}
    try:
        for what, task in tasks.items():
            plain = what.split(", two")[0].split(", one")[0]
            try:
                if apart or plain in peers.APART:
                    made[what] = child.Apart(plain, task)
                else:
                    made[what] = child.Here(child.epoch_of(plain, task), task)
            except cases.Absent as error:
                run.skip(plain, str(error))
        yield made
    finally:
        for one in made.values():
            one.close()


def is_ours(what: str) -> bool:
    """Whether a way is this package's."""
    return what not in (*PEERS, names.TORCHVISION_IO, names.SIMPLEJPEG, names.PILLOW)


def sane(case: str, found: Mapping[str, Competitor], tasks: Mapping[str, Task]) -> None:
    """Look at what comes from everybody before it is timed.

    Raises:
        DisagreementError: The wrong shape, type or range, images missing, or a mean that chance does not explain.
    """
    first = next(iter(found))
    wanted = found[first].look()
    table = []
    for what, one in found.items():
        seen = wanted if what == first else one.look()
        task = tasks[what]
        shape = (min(task.batch, task.images), 3, task.size, task.size)
        chance = 4 * np.hypot(seen.deviation / seen.images**0.5, wanted.deviation / wanted.images**0.5)
        # DALI's contrast turns about the middle of the range, uint8 arithmetic cuts off: a few levels are the method.
        limit = 2.0 if task.preset == "eval" else 8.0 + chance
        difference = seen.mean - wanted.mean
        table.append((what, seen.images, f"{seen.low:.1f}..{seen.high:.1f}", seen.mean, seen.deviation, difference))
        fits = tuple(seen.shape) == shape and seen.dtype == "float32" and seen.images == task.images
        fits &= seen.low >= -RANGE and seen.high <= 255 + RANGE and abs(difference) <= limit
        if not fits:
            raise agreement.DisagreementError(
                f"{case}: expected {task.images} images float32 {shape} within 0..255 whose mean is {wanted.mean:.1f} "
                f"+- {limit:.1f}, found {seen} from {what}"
            )
    common.table(
        f"{case}: what comes, normalisation undone, of 255",
        ("", "images", "range", "mean", "deviation of images' means", "mean beside ours"),
        table,
    )


def in_turn(found: Mapping[str, Any], rounds: int) -> dict[str, list[child.Spent]]:
    """Rounds of everybody, taken in turn."""
    spent: dict[str, list[child.Spent]] = {what: [] for what in found}
    for _ in range(rounds):
        for what, one in found.items():
            time.sleep(common.PAUSE)
            spent[what].append(one.go())
    return spent


def add_rates(
    run: Run, case: str, spent: Mapping[str, Sequence[child.Spent]], *, question: str = "rate", wall: bool = False
) -> None:
    """Rows and a table of images per second."""
    clock = "wall" if wall else "processor"
    rates = {}
    for what, rounds in spent.items():
        each = [s.steady / s.wall if wall else s.images / max(s.processor, 1e-9) for s in rounds]
        rates[what] = statistics.median(each)
        run.add(
            question,
            case,
            what,
            ours=is_ours(what),
            clock=clock,
            images=rounds[0].images,
            rounds=len(rounds),
            images_per_second=rates[what],
            best_per_second=max(each),
        )
    rivals = {what: rate for what, rate in rates.items() if not is_ours(what)}
    table = [(what, rate, *(rate / other for other in rivals.values())) for what, rate in rates.items()]
    unit = "images / s by the wall clock" if wall else "images / s of processor time"
    common.table(case, ("", unit, *(f"x {what}" for what in rivals)), table)


def agree(run: Run, case: str, task: Task, exact: Sequence[str], planar: Sequence[str]) -> None:
    """Compare our ways with torchvision, and the planar ones with the exact one, image by image.

    Raises:
        DisagreementError: One is too far off.
    """
    task = replace(task, count=min(CHECKED, task.count), repeat=1, batch=16)
    augment = task.augment()
    image: Callable[[int], np.ndarray]
    if task.files:
        image = agreement.pillow(task.files)
    else:
        array = np.load(task.array)[: task.count]
        image = array.__getitem__
    reference: ours.Way | None = None
    for what in (*exact, *planar):
        try:
            way = ours.WAYS[what](task)
        except cases.Absent as error:
            run.skip(what, str(error))
            continue
        if what in exact:
            worst = agreement.from_torchvision(way(0), augment, image)
            run.add("agreement", case, what, largest=worst, beside="torchvision v2 in float")
            print(f"  {case}, {what}: at most {worst:.5f} of 255 from torchvision v2 in float")
            if not worst < agreement.LIMIT:
                raise agreement.DisagreementError(
                    f"{case}, {what}: expected less than {agreement.LIMIT} of 255 from torchvision v2, found {worst}"
                )
            reference = reference or way
            continue
        assert reference is not None
        mean, largest = agreement.apart(way(0), reference(0), augment)
        run.add("agreement", case, what, mean=mean, largest=largest, beside="exact")
        print(f"  {case}, {what}: {mean:.3f} of 255 from the exact way in the mean, at most {largest:.0f}")
        if not mean < agreement.PLANAR_LIMIT:
            raise agreement.DisagreementError(
                f"{case}, {what}: expected less than {agreement.PLANAR_LIMIT} of 255 from the exact way in the mean, "
                f"found {mean}"
            )


def repeats(task: Task, what: str) -> int:
    """How often a way of ours goes through the images in a round: a pack of small images is one array, taken whole."""
    array = task.preset == "small" and what in (names.EXACT_PACKED, names.PLANAR_PACKED)
    return 1 if array else OURS_AGAIN


def pipeline(run: Run, case: str, task: Task, rounds: int, ways: Sequence[str] = FROM_FILES) -> None:
    """All of a pipeline from files, one thread each."""
    exact = [what for what in ways if what.startswith("exact")]
    agree(run, case, task, exact, [what for what in ways if what not in exact])
    tasks = {what: replace(task, repeat=repeats(task, what)) for what in ways} | dict.fromkeys(PEERS, task)
    with competitors(run, tasks) as found:
        sane(case, found, tasks)
        add_rates(run, case, in_turn(found, run.rounds or rounds))


def even(count: int, most: int) -> int:
    """The largest batch size up to `most` of which all batches are full: DALI works on full ones only."""
    return max(size for size in range(1, min(count, most) + 1) if count % size == 0)


def files_task(run: Run, preset: cases.Preset, files: tuple[str, ...], *, threads: int = 1) -> Task:
    """All of the files, and a pack of them."""
    size, most = (32, 256) if preset == "small" else (224, 40)
    batch = even(len(files), most)
    return Task(preset, size, files, pack=run.packed(files), count=len(files), batch=batch, threads=threads)
