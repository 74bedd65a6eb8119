"""This package's ways through a task of bench/images.py, and what they are checked against."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import images_targets as names
import numpy as np
import torch
from images_cases import Task

from sela_ext import kernels
from sela_ext.data.loader import Batch, Loader

Epoch = Callable[[], Iterator[torch.Tensor]]
Way = Callable[[int], Iterator[Batch]]
SEED = 7


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


def by_kernels(task: Task, *, exact: bool, indexed: bool) -> Way:
    """Baseline JPEG files read and decoded one after the other, augmented by batches."""
    augment = task.augment()
    files = task.files[: task.count]
    indexes = [kernels.jpeg_index(Path(path).read_bytes()) if indexed else None for path in files]

    def batches(epoch: int) -> Iterator[Batch]:
        order = kernels.permutation(len(files), seed=SEED, epoch=epoch)
        for begin in range(0, len(order), task.batch):
            rows = order[begin : begin + task.batch]
            data = [Path(files[row]).read_bytes() for row in rows]
            headers = [kernels.jpeg_header(d) for d in data]
            sizes = [h.height for h in headers], [h.width for h in headers]
            params = kernels.sample_parameters(augment, *sizes, rows, seed=SEED, epoch=epoch)
            effects = None
            if augment.draws_effects:
                effects = kernels.sample_effects(augment, rows, seed=SEED, epoch=epoch)
            boxes = kernels.needed_boxes(params, augment, *sizes)
            given = zip(data, headers, boxes, (indexes[row] for row in rows), strict=True)
            planes = [planes_for(*one) for one in given]
            images = kernels.augment_planes(planes, params, augment, effects=effects, exact=exact, threads=task.threads)
            yield Batch(images, torch.from_numpy(rows), None, params, begin + len(rows), effects)

    return batches


def by_loader(task: Task, **options: Any) -> Way:
    """The public loader."""
    data = list(task.files[: task.count]) if task.files else np.load(task.array)[: task.count]
    loader = Loader(data, batch_size=task.batch, augment=task.augment(), seed=SEED, threads=task.threads, **options)
    return loader.epoch


WAYS: dict[str, Callable[[Task], Way]] = {
    names.EXACT_PLAIN: lambda task: by_kernels(task, exact=True, indexed=False),
    names.PLANAR_PLAIN: lambda task: by_kernels(task, exact=False, indexed=False),
    names.EXACT_LATER: lambda task: by_kernels(task, exact=True, indexed=True),
    names.PLANAR_LATER: lambda task: by_kernels(task, exact=False, indexed=True),
    names.FROM_ARRAY: by_loader,
}


def epochs(way: Way) -> Epoch:
    """The images of one epoch after the other."""
    numbers = itertools.count()
    return lambda: (batch.images for batch in way(next(numbers)))


OURS: dict[str, Callable[[Task], Epoch]] = {
    name: lambda task, make=make: epochs(make(task)) for name, make in WAYS.items()
}
