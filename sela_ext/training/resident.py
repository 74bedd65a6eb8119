"""Which images of a run are kept on its device: decided when it is known what else has to be there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sela_ext.assign.plan import SPARE
from sela_ext.data import Augment
from sela_ext.data.residency import Residency, ResidentImages, plan_residency
from sela_ext.errors import OptionError
from sela_ext.training.plan import ALWAYS, Part, RunPlan
from sela_ext.training.run import Run


def keep_images(memory: RunPlan, run: Run, views: Sequence[Augment]) -> RunPlan:
    """Keep images on the run's device where they fit beside everything else, those trained on first.

    The run has them from then on in `residents`, and its options say `resident`, with the reason. Nothing is sent yet.

    Args:
        memory: what the run needs without them.
        run: the run.
        views: of a training step.

    Returns:
        The plan with them.

    Raises:
        OptionError: the option `resident` is True, and they cannot be kept.
        ResourceError: it is True, and there is no room.
    """
    device, dtype = run.arithmetic.device, run.arithmetic.dtype
    wish: Any = run.options.resident
    if wish is False:
        return memory
    if run.source.vectors is not None:
        if wish is True:
            raise OptionError("resident: expected images, found feature vectors, whose rows are sent; leave it out")
        _settle(run, Residency(False, "not kept: feature vectors, whose rows are sent"))
        return memory
    images, plain = run.images, [run.plan.plain]
    judged = None if images.judged is images.held else images.judged
    room = room_for_images(memory, device.type)
    found = run.ranks.together(lambda: plan_residency(run.source, views, dtype, device, wish=wish, room=room))
    if not run.ranks.least(float(found.kept)) and found.kept:  # all do the same: pixels are not quite the same
        found = Residency(False, "not kept: another rank has no room for them")
    _settle(run, found)
    if not found.kept:
        return memory
    memory = _with_part(memory, "training images on the device", found, device.type)
    run.residents["train"] = ResidentImages(run.source, device)
    for name, source in (("held", images.held), ("judged", judged)):
        if source is None:
            continue
        room = room_for_images(memory, device.type)
        also = plan_residency(source, plain, dtype, device, wish="auto", room=room)
        if also.kept:
            memory = _with_part(memory, f"{name} images on the device", also, device.type)
            run.residents[name] = ResidentImages(source, device)
    return memory


def room_for_images(memory: RunPlan, device: str) -> float:
    """Bytes of a device that a plan leaves free."""
    free = memory.free.get(device)
    if free is None:
        return float("inf")
    there = sum(part.nbytes for part in memory.parts if part.device == device and part.there)
    return SPARE * free - (memory.peak(device)[0] - there)


def _settle(run: Run, found: Residency) -> None:
    run.plan = replace(
        run.plan,
        options=replace(run.plan.options, resident=found.kept),
        reasons={**run.plan.reasons, "resident": found.reason},
    )


def _with_part(memory: RunPlan, name: str, found: Residency, device: str) -> RunPlan:
    part = Part(name, found.nbytes, device, ALWAYS, "resident=False")
    return replace(memory, parts=(*memory.parts, part))
