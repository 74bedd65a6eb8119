"""One competitor of bench/images.py in a process of its own, which goes through a round whenever it is told to.

The first line that it reads says what and which task, as JSON; it answers with a `Look`, and every further line with a
`Spent`. The processor time of a round is what the
whole process spent since the end of the round before: what is prepared ahead between two rounds is not free.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from images_cases import Absent, Task

Epoch = Callable[[], Iterator[torch.Tensor]]
FIRST = 3  # batches whose arrival does not count by the wall clock


@dataclass(frozen=True)
class Spent:
    """One round.

    Attributes:
        images: that came.
        processor: seconds of processor time of the whole process.
        steady: images after the first `FIRST` batches; all, where there are hardly more batches.
        wall: seconds by the clock that these took: from the arrival of the batch before them.
    """

    images: int
    processor: float
    steady: int
    wall: float


def went_through(epoch: Epoch) -> tuple[int, int, float]:
    """Take all batches of an epoch: (images, steady, wall) as in `Spent`.

    What some have prepared before the epoch, and others begin with it, is over with the first batches.
    """
    sizes, arrived = [], [time.perf_counter()]
    for batch in epoch():
        sizes.append(len(batch))
        arrived.append(time.perf_counter())
    first = FIRST if len(sizes) >= 3 * FIRST else 0
    return sum(sizes), sum(sizes[first:]), arrived[-1] - arrived[first]


@dataclass(frozen=True)
class Look:
    """What the batches of an epoch are.

    Attributes:
        images: how many.
        shape: of the first batch.
        dtype: of the first batch.
        low: least value, normalisation undone, of 255.
        high: largest value, likewise.
        mean: of all values, likewise.
        deviation: of the images' own means, likewise.
    """

    images: int
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    mean: float
    deviation: float


def look(epoch: Epoch, task: Task) -> Look:
    """Go through an epoch and say what came."""
    augment = task.augment()
    mean, std = (torch.tensor(values)[:, None, None] for values in augment.channel_values(3))
    means, low, high, first = [], float("inf"), -float("inf"), None
    for batch in epoch():
        first = batch if first is None else first
        pixels = 255 * (batch.float() * std + mean)
        low, high = min(low, float(pixels.amin())), max(high, float(pixels.amax()))
        means.append(pixels.mean((1, 2, 3)))
    assert first is not None, "no batch came"
    of_images = torch.cat(means)
    return Look(
        len(of_images),
        tuple(first.shape),
        str(first.dtype).removeprefix("torch."),
        low,
        high,
        float(of_images.mean()),
        float(of_images.std(correction=0)),
    )


class Here:
    """A competitor in this process."""

    def __init__(self, epoch: Epoch, task: Task) -> None:
        self.epoch, self.task = epoch, task

    def look(self) -> Look:
        """See `look`."""
        return look(self.epoch, self.task)

    def go(self) -> Spent:
        """One round."""
        before = time.process_time()
        images, steady, wall = went_through(self.epoch)
        return Spent(images, time.process_time() - before, steady, wall)

    def close(self) -> None:
        """Nothing is left behind."""


class Apart:
    """A competitor in a process of its own.

    Raises:
        Absent: It is not installed, or cannot do the task.
    """

    def __init__(self, what: str, task: Task, environment: Mapping[str, str] | None = None) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=env,
        )
        try:
            self.seen = Look(**self._ask(json.dumps({"what": what, "task": asdict(task)})))
        except BaseException:
            self.close()
            raise

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its errors say why
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                if "refused" in found:
                    raise Absent(found["refused"])
                return found
        self.errors.seek(0)
        raise Absent((self.errors.read().strip().splitlines() or ["its process ended"])[-1])

    def look(self) -> Look:
        """What its first epoch was."""
        return self.seen

    def go(self) -> Spent:
        """One round."""
        return Spent(**self._ask("go"))

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError, ValueError):
            self.process.communicate()  # the end of its input is the end of its work
        self.process.wait()
        self.errors.close()


def epoch_of(what: str, task: Task) -> Epoch:
    """The epoch of one of `images_peers.PEERS` or `images_ours.OURS`.

    Raises:
        Absent: It is not installed, or cannot do the task.
    """
    import images_ours
    import images_peers

    made = images_ours.OURS.get(what) or images_peers.PEERS[what]
    return made(task)


def main() -> None:
    given = json.loads(sys.stdin.readline())
    task = Task(**{**given["task"], "files": tuple(given["task"]["files"])})
    answers = os.fdopen(os.dup(1), "w")  # what libraries print must not be taken for an answer
    os.dup2(2, 1)

    def say(values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        epoch = epoch_of(given["what"], task)
    except Absent as error:
        say({"refused": str(error)})
        return
    say(asdict(look(epoch, task)))
    before = time.process_time()
    for _ in sys.stdin:
        images, steady, wall = went_through(epoch)
        now = time.process_time()
        say(asdict(Spent(images, now - before, steady, wall)))
        before = now


if __name__ == "__main__":
    main()
