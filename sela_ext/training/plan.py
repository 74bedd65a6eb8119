"""What a run will need: bytes of each part, beside what is free, and time. Known before any long work."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sela_ext.assign.plan import SPARE, available_memory, memory_plan
from sela_ext.data import Augment
from sela_ext.data.loader import BATCHES_AHEAD, Loader
from sela_ext.errors import ResourceError
from sela_ext.kernels.device import free_memory, on_card
from sela_ext.training.clock import words
from sela_ext.training.crops import parse_crops
from sela_ext.training.run import Run

# When a part is needed. Parts of different times replace one another; those of ALWAYS stay.
ALWAYS, STEPS, PASSES, EVALUATION, CHECKPOINTS = "always", "steps", "label passes", "evaluation", "checkpoints"
# Batches of the trial that activations are told from: what does not grow with the batch falls out of their difference.
_TRIALS = 2, 4
# What convolution libraries and the allocator take beside that. On the CPU, four networks took 30 to 86 MiB more at
# their peak than was counted; cuDNN's workspaces are larger.
_LIBRARIES = {"cpu": 80 << 20, "cuda": 256 << 20}
# Seconds spent on measuring steps, and batches looked at, at most.
_MEASURE_SECONDS, _MEASURE_BATCHES = 3.0, 8


@dataclass(frozen=True)
class Part:
    """Memory that a part of a run takes.

    Attributes:
        name: what it is.
        nbytes: how much.
        device: where: "cpu", or "cuda".
        when: see the constants of this module.
        remedy: what makes it smaller.
        there: it was allocated before free memory was asked for.
    """

    name: str
    nbytes: int
    device: str
    when: str
    remedy: str
    there: bool = False


@dataclass(frozen=True)
class RunPlan:
    """Memory and time of a run.

    Attributes:
        parts: of the memory.
        free: bytes that can still be had, by device; None where nobody says.
        seconds: of the whole run, None where it was not measured.
        speed: what `seconds` was told from, in words.
        notes: what could not be told, and why.
        opening: the run in a line.

    Example:
        >>> part = Part("activations", 3 << 30, "cpu", STEPS, "lower batch_size")
        >>> RunPlan((part,), {"cpu": 4 << 30}).peak("cpu")
        (3221225472, 'steps')
    """

    parts: tuple[Part, ...]
    free: dict[str, int | None]
    seconds: float | None = None
    speed: str = ""
    notes: tuple[str, ...] = ()
    opening: str = ""

    def peak(self, device: str) -> tuple[int, str]:
        """The most that is needed at once on a device, and when."""
        here = [part for part in self.parts if part.device == device]
        stays = sum(part.nbytes for part in here if part.when == ALWAYS)
        at_times = {
            name: sum(part.nbytes for part in here if part.when == name)
            for name in (STEPS, PASSES, EVALUATION, CHECKPOINTS)
        }
        when = max(at_times, key=lambda name: at_times[name])
        return stays + at_times[when], when

    def check(self) -> None:
        """See that everything fits.

        Raises:
            ResourceError: it does not; names the largest part and what makes it smaller.
        """
        for device, free in self.free.items():
            needed, when = self.peak(device)
            there = sum(part.nbytes for part in self.parts if part.device == device and part.there)
            if free is None or needed - there <= SPARE * free:
                continue
            here = [p for p in self.parts if p.device == device and p.when in (ALWAYS, when) and not p.there]
            largest = max(here, key=lambda part: part.nbytes)
            place = "memory" if device == "cpu" else "GPU memory"
            raise ResourceError(
                f"{place}: expected {size(needed - there)} for the {when}, found {size(free)} free; the largest part "
                f"is {size(largest.nbytes)} for {largest.name}: {largest.remedy}"
            )

    def table(self) -> str:
        """The plan as text: a line per part, sums beside what is free, the time."""
        width = max(len(part.name) for part in self.parts)
        lines = [self.opening] if self.opening else []
        for device in self.free:
            lines.append("memory" if device == "cpu" else "GPU memory")
            here = sorted((p for p in self.parts if p.device == device and p.nbytes), key=lambda p: -p.nbytes)
            lines += [f"  {part.name:{width}}  {size(part.nbytes):>9}  {part.when}" for part in here]
            needed, when = self.peak(device)
            free = self.free[device]
            has = "" if free is None else f", {size(free)} free"
            lines.append(f"  {'most at once':{width}}  {size(needed):>9}  {when}{has}")
        if self.seconds is not None:
            lines.append(f"time  about {words(self.seconds)}: {self.speed}")
        lines += [f"note  {note}" for note in self.notes]
        return "\n".join(lines)


def size(nbytes: float) -> str:
    """Write bytes for people.

    Example:
        >>> size(900), size(5_400_000), size(7 << 30)
        ('900 B', '5.1 MiB', '7.0 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def plan_run(run: Run, views: Sequence[Augment], *, opening: str = "") -> RunPlan:
    """Add up what a run will need, from its options and a trial of a few images on a copy of the network.

    Neither the network nor the random state changes.

    Args:
        run: the run.
        views: of a training step, one per view of an image.
        opening: the run in a line.
    """
    notes, ranks, device = [], run.ranks, run.arithmetic.device.type
    try:
        activations = activation_bytes(run, views)
    except Exception as error:  # a module of the user's, which may refuse a copy or two images in any way
        activations = 0, 0
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        notes.append(f"activations are not known: {reason}")
    arena = arena_bytes(run, views)
    parts = _parts(run, views, activations, arena, first=ranks.first)
    if ranks.local_world_size > 1:
        others = _parts(run, views, activations, arena, first=False)
        parts += _of_neighbours([part for part in others if part.device == "cpu"], ranks.local_world_size - 1)
    free: dict[str, int | None] = {"cpu": available_memory()}
    if device == "cuda":
        free = {"cuda": free_memory(run.arithmetic.device), **free}
    return RunPlan(tuple(parts), free, notes=tuple(notes), opening=opening)


def _of_neighbours(parts: Sequence[Part], ranks: int) -> list[Part]:
    """What so many other ranks of the machine take of its memory, which each of them needs `parts` of."""
    return [
        Part(
            f"{ranks} more rank{'s' * (ranks > 1)} of this machine",
            ranks * sum(part.nbytes for part in parts if part.when == when and not part.there),
            "cpu",
            when,
            "fewer ranks on this machine",
        )
        for when in (ALWAYS, STEPS, PASSES, EVALUATION, CHECKPOINTS)
    ]


def arena_bytes(run: Run, views: Sequence[Augment]) -> int:
    """Bytes of a batch's decoded samples, where a device makes the views of them; some files are looked at."""
    if _is_vectors(run) or not on_card(run.arithmetic.device) or not run.source.encoded:
        return 0
    loader = run.make_loader(views)
    assert isinstance(loader, Loader)
    try:
        return loader.arena_nbytes
    finally:
        loader.close()


def _parts(run: Run, views: Sequence[Augment], activations: tuple[int, int], arena: int, *, first: bool) -> list[Part]:
    """What one rank needs: the first, or another one."""
    opt, network, count, ranks = run.options, run.network, len(run.source), run.ranks
    several, (fixed, per_image) = ranks.world_size > 1, activations
    batch_size, own = opt.batch_size // ranks.world_size, -(-count // ranks.world_size)  # of this rank
    gathered = count if first else 0  # at the end of the run
    device, item = run.arithmetic.device.type, run.arithmetic.dtype.itemsize
    weights = _nbytes([*network.parameters(), *network.buffers()])
    learnt = _nbytes([p for p in network.parameters() if p.requires_grad])
    parts = [
        Part("network", weights, device, ALWAYS, "a smaller model", there=True),
        # Of the last step: they stay until the next one, through label passes and checkpoints.
        Part(
            "gradients",
            learnt * (2 if several else 1),  # and as they are exchanged
            device,
            ALWAYS,
            "a smaller model, fewer clusters or heads",
        ),
        Part(
            "optimiser",
            learnt * _moments(run),
            device,
            ALWAYS,
            "a smaller model, or optimizer=sgd",
        ),
        Part("averaged network", weights if opt.ema else 0, device, ALWAYS, "ema=0"),
        Part(
            "activations",
            fixed + batch_size * per_image,
            device,
            STEPS,
            f"lower batch_size (now {opt.batch_size}) or image_size, or use precision=bfloat16",
        ),
    ]
    parts.append(Part("work of libraries", _LIBRARIES[device], device, STEPS, "a smaller model"))
    # Batches: those ahead in memory, and on a GPU the same again.
    batch = batch_size * sum(math.prod(shape) for shape in _shapes(run, views)) * item
    smaller = f"lower batch_size (now {opt.batch_size}) or image_size"
    parts.append(Part("batches of images", (BATCHES_AHEAD + 1) * batch, "cpu", STEPS, smaller))
    if device != "cpu":
        parts.append(Part("batches of images", (BATCHES_AHEAD + 1) * batch, device, STEPS, smaller))
    # Samples for them, on their way to a GPU: those ahead, and those that wait there.
    parts.append(Part("decoded samples, page-locked", (BATCHES_AHEAD + 1) * arena, "cpu", STEPS, smaller))
    if device != "cpu":
        parts.append(Part("decoded samples", (BATCHES_AHEAD + 1) * arena, device, STEPS, smaller))
    # Label passes. Feature vectors whose embeddings are no more than themselves are read where they lie.
    as_they_lie = _is_vectors(run) and isinstance(network.projection, nn.Identity)
    kept_rows = 0 if as_they_lie else own
    wide = network.embedding_dim * item
    narrower = "a narrower projection, fewer images, or label_source=eval"
    bank = kept_rows * wide
    if opt.method == "sela-v2":  # one bank per large crop, in 16 bits
        bank = parse_crops(opt.crops)[0].count * own * network.embedding_dim * 2
    if opt.label_source == "bank":
        waiting = bank if several else 0  # what an epoch writes for other ranks
        parts.append(Part("bank of embeddings", bank + waiting, device, ALWAYS, narrower))
    else:
        parts.append(Part("embeddings of all images", kept_rows * wide, device, PASSES, narrower))
    solver = _solver_bytes(run, own, ranks.local_world_size)
    fewer = f"fewer clusters (now up to {max(opt.clusters)})"
    parts.append(Part("label solver", solver, device, PASSES, fewer))
    parts.append(Part("labels", count * len(opt.clusters) * (4 + 4 + 4), "cpu", ALWAYS, "fewer heads"))
    if device != "cpu":
        parts.append(Part("labels", count * len(opt.clusters) * 4, device, ALWAYS, "fewer heads"))
    # Evaluation keeps features beside the embeddings, and solves too.
    per_row = network.feature_dim * 4 + wide
    seen = (0 if as_they_lie else own + (gathered if several else 0)) * per_row
    parts.append(Part("features of all images", seen, device, EVALUATION, "fewer images, or a narrower model"))
    others = 0 if as_they_lie else _other_images(run)
    rows = -(-others // ranks.world_size) + (others if first and several else 0)
    beside = "fewer images in holdout or eval_data"
    parts.append(Part("features of held-out and judged images", rows * per_row, device, EVALUATION, beside))
    parts.append(
        Part("label solver at the end", _solver_bytes(run, gathered, 1) if gathered else 0, device, EVALUATION, fewer)
    )
    # A checkpoint is written from one piece of memory.
    whole_bank = bank * ranks.world_size if opt.label_source == "bank" else 0
    kept = (weights + learnt * _moments(run) + whole_bank) if first else 0
    parts.append(Part("checkpoint being written", 2 * kept, "cpu", CHECKPOINTS, "a smaller model or label_source=eval"))
    return parts


def _other_images(run: Run) -> int:
    """Images that evaluations look at beside those of the training."""
    held, judged = run.images.held, run.images.judged
    return sum(len(part) for part in (held, None if judged is held else judged) if part is not None)


def activation_bytes(run: Run, views: Sequence[Augment]) -> tuple[int, int]:
    """Bytes that a step keeps for the backward pass, from two forward passes of a few images on a copy.

    Args:
        run: the run.
        views: of a training step.

    Returns:
        Bytes that do not depend on the batch, and bytes per image.
    """
    network = copy.deepcopy(run.network).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    found = []
    with torch.random.fork_rng(devices=_devices(run)):
        for images in _TRIALS:
            kept: dict[int, int] = {}

            def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = _forward(run, network, views, images)
            # The backward pass holds the gradient of what it is at beside that: twice the largest of these.
            found.append(sum(kept.values()) + 2 * max(kept.values(), default=0))
            del loss
    few, more = found
    per_image = max(0, (more - few) // (_TRIALS[1] - _TRIALS[0]))
    return max(0, few - _TRIALS[0] * per_image), per_image


def with_time(plan: RunPlan, run: Run, views: Sequence[Augment]) -> RunPlan:
    """The plan with an estimate of the time, from a few steps on a copy of the network and a few batches of images.

    Args:
        plan: what `plan_run` gave.
        run: the run.
        views: of a training step.
    """
    opt, count, ranks = run.options, len(run.source), run.ranks.world_size
    try:
        step, forward = _step_seconds(run, views)
    except Exception as error:  # as in plan_run
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return replace(plan, notes=(*plan.notes, f"the time is not known: {reason}"))
    load = _load_seconds(run, views)
    limit = "the network" if step >= load else "the loader"
    step, forward, load = step / ranks, forward / ranks, load / ranks
    rate = 1.0 / max(step, load, 1e-9)
    speed = f"{rate:,.0f} images/s, by {limit}"
    if ranks > 1:
        speed += f"; {ranks} processes that never wait for each other"
    if run.plan.budget_seconds is not None:
        seconds = run.plan.budget_seconds + count * forward
        return replace(plan, seconds=seconds, speed=f"the budget, then an evaluation; {speed}")
    looks = 1 + (opt.epochs // opt.evaluate_every if opt.evaluate_every else 0)
    if opt.label_source != "bank":
        looks += min(opt.label_passes, 10**6)
    seconds = opt.epochs * run.per_epoch / rate + looks * count * max(forward, load)
    return replace(plan, seconds=seconds, speed=f"{opt.epochs} epochs at {speed}; label solver not counted")


def _forward(run: Run, network: Any, views: Sequence[Augment], images: int) -> Tensor:
    """A forward pass of random images, up to a loss."""
    device = run.arithmetic.device
    losses = []
    for shape in _shapes(run, views):
        pictures = torch.rand(images, *shape, device=device).to(run.arithmetic.dtype)
        if len(shape) == 3:
            pictures = pictures.to(memory_format=torch.channels_last)
        with run.arithmetic.autocast():
            embedding = network(pictures)
        target = torch.zeros(images, dtype=torch.int64, device=device)
        losses += [F.cross_entropy(part, target) for part in network.heads.split(network.heads(embedding))]
    return torch.stack(losses).mean()


def _is_vectors(run: Run) -> bool:
    """Whether the data are feature vectors."""
    return run.source.vectors is not None


def _shapes(run: Run, views: Sequence[Augment]) -> list[tuple[int, ...]]:
    """Shape of what a step sees of an image, for every view: [C, S, S], or [D] of a feature vector."""
    vectors = run.source.vectors
    if vectors is not None:
        return [(int(vectors.width),)] * len(views)
    return [(view.output_channels(run.source.channels), view.size, view.size) for view in views]


def _step_seconds(run: Run, views: Sequence[Augment]) -> tuple[float, float]:
    """Seconds per image of a step, and of a forward pass alone; the fastest of a few."""
    network = copy.deepcopy(run.network).train()
    batch = run.options.batch_size // run.ranks.world_size

    def now() -> float:
        if run.arithmetic.device.type == "cuda":
            torch.cuda.synchronize(run.arithmetic.device)
        return time.perf_counter()

    steps: list[float] = []
    forwards: list[float] = []
    began = time.perf_counter()
    with torch.random.fork_rng(devices=_devices(run)):
        while len(steps) < _MEASURE_BATCHES and (len(steps) < 2 or time.perf_counter() - began < _MEASURE_SECONDS):
            first = now()
            loss = _forward(run, network, views, batch)
            second = now()
            loss.backward()  # type: ignore[no-untyped-call]
            third = now()
            network.zero_grad(set_to_none=True)
            steps.append(third - first)
            forwards.append(second - first)
    return min(steps) / batch, min(forwards) / batch


def _load_seconds(run: Run, views: Sequence[Augment]) -> float:
    """Seconds per image of the loader, without what it takes to get going where there is enough to tell."""
    loader = run.make_loader(views)
    images, began = 0, time.perf_counter()
    for number, batch in enumerate(loader.epoch(0)):
        if number == 0 and len(loader) > 1:
            began = time.perf_counter()
        else:
            images += len(batch.index)
        if number >= _MEASURE_BATCHES or time.perf_counter() - began > _MEASURE_SECONDS:
            break
    seconds = time.perf_counter() - began
    loader.close()
    return seconds / max(images, 1)


def _solver_bytes(run: Run, count: int, ranks: int) -> int:
    """Memory of a label pass of so many rows beside the embeddings, on a machine with so many ranks at it.

    Heads are solved one after the other.
    """
    clusters = max(run.options.clusters)
    stored = memory_plan(count, clusters, balance=run.options.balance)
    free = available_memory() if run.arithmetic.device.type == "cpu" else None
    if free is not None and stored.logits > free / ranks / 2:  # as the label pass decides: computed when they are read
        stored = memory_plan(count, clusters, balance=run.options.balance, source="features")
    return stored.total


def _moments(run: Run) -> int:
    """Copies of the parameters that the optimiser keeps."""
    if run.options.optimizer == "adamw":
        return 2
    return 1 if run.options.momentum or run.options.optimizer == "lars" else 0


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _devices(run: Run) -> list[torch.device]:
    return [run.arithmetic.device] if run.arithmetic.device.type == "cuda" else []
