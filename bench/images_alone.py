"""Parts of bench/images.py in which a piece of the pipeline is timed by itself: the decoder, and what follows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import images_agreement as agreement
import images_cases as cases
import images_child as child
import images_ours as ours
import images_peers as peers
import images_targets as names
import numpy as np
import torch
from images_cases import Task
from images_run import Run, add_rates, in_turn

import sela_ext
from sela_ext import kernels
from sela_ext.kernels import Augment

ISAS = ("avx512", "avx2", "generic")

# ---------------------------------------------------------------- decoding alone


class Loop:
    """A decoder over all files, which are in memory."""

    def __init__(self, one: Callable[[int], Any], count: int) -> None:
        self.one, self.count = one, count

    def go(self) -> child.Spent:
        """One round."""
        wall, processor = time.perf_counter(), time.process_time()
        for i in range(self.count):
            self.one(i)
        return child.Spent(self.count, time.process_time() - processor, self.count, time.perf_counter() - wall)


def crop_boxes(images: Sequence[np.ndarray]) -> list[tuple[int, int, int, int]]:
    """Boxes as the paper's augmentation draws them: RandomResizedCrop, 0.08 to 1 of the area."""
    heights, widths = np.array([image.shape[:2] for image in images]).T
    params = kernels.sample_parameters(Augment.sela(224), heights, widths, range(len(images)), seed=ours.SEED, epoch=0)
    return [tuple(int(p[name]) for name in ("top", "left", "height", "width")) for p in params]


def decode(run: Run) -> None:
    """Decoding alone: whole, the part that a crop needs, reduced."""
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg

    paths = run.photograph_files()
    files = [Path(path).read_bytes() for path in paths]
    images = [cases.pixels(path) for path in paths]
    unequal = agreement.unequal_pixels(files, images)
    run.add("agreement", names.DECODE, names.TO_RGB, unequal=unequal, beside="Pillow")
    print(f"  {names.DECODE}: {unequal} of {len(files)} files are not Pillow's pixels")
    if unequal:
        raise agreement.DisagreementError(
            f"{names.DECODE}: expected Pillow's pixels, found {unequal} files with others"
        )
    boxes = crop_boxes(images)
    indexes = [kernels.jpeg_index(d) for d in files]
    tensors = [torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in files]

    def pillow(i: int, scale: int = 1) -> np.ndarray:
        with Image.open(paths[i]) as image:
            if scale > 1:
                image.draft("RGB", (image.width // scale, image.height // scale))
            return np.array(image.convert("RGB"))

    whole: dict[str, Callable[[int], Any]] = {
        names.TO_PLANES: lambda i: kernels.decode_planes(files[i]),
        names.TO_RGB: lambda i: kernels.decode_jpeg(files[i]),
        names.CROP_PLAIN: lambda i: kernels.decode_planes(files[i], boxes[i]),
        names.CROP_INDEXED: lambda i: kernels.decode_planes(files[i], boxes[i], index=indexes[i]),
        "RGB of a crop, with an index": lambda i: kernels.decode_crop(files[i], boxes[i], index=indexes[i]),
        names.TORCHVISION_IO: lambda i: decode_jpeg(tensors[i], mode=ImageReadMode.RGB),
        names.PILLOW: pillow,
    }
    half: dict[str, Callable[[int], Any]] = {
        names.TO_PLANES: lambda i: kernels.decode_planes(files[i], scale=2),
        names.TO_RGB: lambda i: kernels.decode_jpeg(files[i], scale=2),
        names.PILLOW: lambda i: pillow(i, 2),
    }
    try:
        simplejpeg = peers.imported("simplejpeg")
    except cases.Absent as error:
        run.skip(names.SIMPLEJPEG, str(error))
    else:
        whole[names.SIMPLEJPEG] = lambda i: simplejpeg.decode_jpeg(files[i])

        def halved(i: int) -> Any:
            height, width = (-(-side // 2) for side in images[i].shape[:2])
            return simplejpeg.decode_jpeg(files[i], min_height=height, min_width=width, min_factor=1)

        half[names.SIMPLEJPEG] = halved
    for case, ways in ((names.DECODE, whole), (names.DECODE_HALF, half)):
        found = {what: Loop(one, len(files)) for what, one in ways.items()}
        in_turn(found, 1)
        add_rates(run, case, in_turn(found, run.rounds or (2 if run.quick else 9)))
    by_isa = {
        name: Loop(lambda i, name=name: kernels.decode_planes(files[i], isa=name), len(files)) for name in usable_isas()
    }
    add_rates(run, names.DECODE, in_turn(by_isa, run.rounds or (1 if run.quick else 5)), question="isa")


def usable_isas() -> list[str]:
    """The instruction sets that this processor has."""
    known = sela_ext.build_info()["cpu_isa"]
    return list(ISAS[ISAS.index(known) :]) if known in ISAS else [known]


# ---------------------------------------------------------------- behind the decoder


def behind(run: Run) -> None:
    """The part of a pipeline behind the decoder: from planes, from RGB, and torchvision's transforms alone."""
    files = run.photograph_files()[: 24 if run.quick else 64]
    for preset in ("sela", "aug_plus", "eval"):
        calls = behind_calls(Task(preset, 224, files, count=len(files)))
        found = {what: Loop(call, 1) for what, call in calls.items()}
        in_turn(found, 1)
        spent = in_turn(found, run.rounds or (2 if run.quick else 7))
        each = {what: [replace(s, images=len(files)) for s in rounds] for what, rounds in spent.items()}
        add_rates(run, f"behind the decoder, {preset}", each, question="behind")


def behind_calls(task: Task) -> dict[str, Callable[[int], Any]]:
    """All images of a task, decoded before: name -> one call for all of them."""
    augment = task.augment()
    images = [cases.pixels(path) for path in task.files]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    index = np.arange(len(images))
    params = kernels.sample_parameters(augment, heights, widths, index, seed=ours.SEED, epoch=0)
    effects = kernels.sample_effects(augment, index, seed=ours.SEED, epoch=0) if augment.draws_effects else None
    planes = [ours.planes_of(Path(path).read_bytes()) for path in task.files]
    out = torch.empty(len(images), 3, task.size, task.size)
    options: dict[str, Any] = {"effects": effects, "out": out, "threads": 1}
    transform = peers.v2_transform(task)
    tensors = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
    return {
        "from planes": lambda _: kernels.augment_planes(planes, params, augment, **options),
        "from planes, exact": lambda _: kernels.augment_planes(planes, params, augment, exact=True, **options),
        "from RGB": lambda _: kernels.augment(images, params, augment, **options),
        names.V2: lambda _: [transform(tensor) for tensor in tensors],
    }
