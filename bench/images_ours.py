"""This package's ways through a task of bench/images.py, and what they are checked against."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import images_targets as names
import numpy as np
import torch
from images_cases import Absent, Task

from sela_ext import kernels
from sela_ext.data.loader import Batch, Loader
from sela_ext.data.opening import open_source

Epoch = Callable[[], Iterator[torch.Tensor]]
SEED = 7


@dataclass(frozen=True)
class Shown:
    """A batch, as `sela_ext.Batch` without what only training needs."""

    images: torch.Tensor
    index: torch.Tensor
    params: np.ndarray
    effects: np.ndarray | None


Way = Callable[[int], Iterator["Shown | Batch"]]


def planes_for(data: bytes, header: kernels.JpegHeader, box: Any, index: bytes | None) -> kernels.Planes:
    """The planes that `augment_planes` needs for a box (top, left, bottom, right)."""
    step = (1, 1) if header.colour == "grey" else tuple(max(s[1 - k] for s in header.sampling) for k in (0, 1))
    top, left = (int(edge) // s * s for edge, s in zip(box[:2], step, strict=True))
    found = kernels.decode_planes(data, (top, left, int(box[2]) - top, int(box[3]) - left), index=index)
    planes = []
    for plane in found.planes:
        y, x = top // plane.step_y - plane.top, left // plane.step_x - plane.left
        planes.append(plane.samples[y:, x:])
    first = found.planes[-1]
    smooth = (first.smooth_y, first.smooth_x) if len(planes) > 1 else None
    steps = (first.step_y, first.step_x) if len(planes) > 1 else (1, 1)
    size = found.planes[0]
    return kernels.Planes(tuple(planes), size.full_height, size.full_width, top, left, steps, smooth=smooth)


def planes_of(data: bytes) -> kernels.Planes:
    """All of a baseline file."""
    header = kernels.jpeg_header(data)
    assert header is not None, "not a baseline file"
    return planes_for(data, header, (0, 0, header.height, header.width), None)


def reader_alone(task: Task) -> Way:
    """The compiled reader without the loader, one batch ahead: what the loader's own work adds shows beside it."""
    augment = task.augment()
    files = task.files[: task.count] * task.repeat
    if any(kernels.jpeg_header(Path(path).read_bytes()) is None for path in set(files)):
        raise Absent("some files are not baseline JPEG, which the reader leaves to its caller")
    reader = kernels.Reader([augment], threads=task.threads, index=kernels.IndexStore())
    turns = itertools.cycle([torch.empty(task.batch, 3, task.size, task.size) for _ in range(3)])

    def begin(epoch: int, rows: np.ndarray) -> tuple[np.ndarray, torch.Tensor, kernels.Ticket]:
        out = next(turns)[: len(rows)]
        return rows, out, reader.submit([files[row] for row in rows], rows, [out], seed=SEED, epoch=epoch)

    def batches(epoch: int) -> Iterator[Shown]:
        order = kernels.permutation(len(files), seed=SEED, epoch=epoch)
        begun = deque([begin(epoch, order[: task.batch])])
        for start in range(task.batch, len(order) + task.batch, task.batch):
            if start < len(order):
                begun.append(begin(epoch, order[start : start + task.batch]))
            rows, out, ticket = begun.popleft()
            found = ticket.wait()
            assert (found.status == kernels.READ_OK).all(), "an image was not read"
            yield Shown(out, torch.from_numpy(rows), found.params[0], found.effects[0])

    return after_one(batches)


def after_one(way: Way) -> Way:
    """A way that has been through an epoch."""
    for _ in way(0):
        pass
    return way


def loader_of(task: Task, *, packed: bool = False, **options: Any) -> Loader:
    """The public loader on a task's files, pack or array."""
    source = open_source(np.load(task.array) if task.array else task.pack if packed else list(task.files))
    if (task.count, task.repeat) != (len(source), 1):
        source = source.subset(np.tile(np.arange(task.count), task.repeat))
    return Loader(source, batch_size=task.batch, augment=task.augment(), seed=SEED, threads=task.threads, **options)


WAYS: dict[str, Callable[[Task], Way]] = {
    names.EXACT_PLAIN: lambda task: loader_of(task, exact=True, index=None).epoch,
    names.PLANAR_PLAIN: lambda task: loader_of(task, index=None).epoch,
    names.PLANAR_FIRST: lambda task: lambda epoch: loader_of(task).epoch(epoch),
    names.EXACT_LATER: lambda task: after_one(loader_of(task, exact=True).epoch),
    names.PLANAR_LATER: lambda task: after_one(loader_of(task).epoch),
    names.EXACT_PACKED: lambda task: loader_of(task, exact=True, packed=True).epoch,
    names.PLANAR_PACKED: lambda task: loader_of(task, packed=True).epoch,
    names.READER_LATER: reader_alone,
    names.FROM_ARRAY: lambda task: loader_of(task).epoch,
}


def epochs(way: Way) -> Epoch:
    """The images of one epoch after the other."""
    numbers = itertools.count()
    return lambda: (batch.images for batch in way(next(numbers)))


OURS: dict[str, Callable[[Task], Epoch]] = {
    name: lambda task, make=make: epochs(make(task)) for name, make in WAYS.items()
}
