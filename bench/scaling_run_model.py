"""What a whole run costs on many ranks: a model of its parts, in seconds and bytes; its tables in docs/scaling.md.

One process per device. A batch is shared by all ranks, gradients are averaged while the backward pass runs, every rank
keeps the embeddings of its own rows, solves label passes with the others and holds all labels. The label step itself
is that of bench/scaling_model.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import scaling_model as step_model
from scaling_model import Link, P, Parameter, count_words, markdown, rows_per_rank

RUN_PARAMETERS = {
    "G": Parameter(
        8e13,
        "flop/s",
        "what a training step and a forward pass reach in mixed precision",
        "assumed; 6.0e13 by the 2,470 images/s published for ResNet-50 on an A100, and an H100 reads memory 1.6 times "
        "as fast",
    ),
    "o": Parameter(
        2.5e-2,
        "s",
        "launches of a step: no step takes less",
        "assumed; 1.3e-2 published for a forward pass of one image, ResNet-50 in mixed precision on a V100",
    ),
    "C": Parameter(12, "", "cores per GPU that load images", "assumed; DGX H100: 112 for 8 GPUs by its data sheet"),
    "v": Parameter(
        2400, "images/s", "one core, JPEG files to 224 pixels", "measured, later epochs: docs/performance.md"
    ),
    "v'": Parameter(250_000, "images/s", "one core, 32 pixels", "measured, later epochs: docs/performance.md"),
    "j": Parameter(1.1e5, "B", "a JPEG file", "assumed; ImageNet's mean"),
    "d": Parameter(1e9, "B/s", "images from storage into a rank", "assumed"),
    "S": Parameter(1e12, "B/s", "images from storage into all ranks", "assumed; a large parallel file system"),
    "w": Parameter(0.7, "", "share of the backward pass that hides messages", "assumed"),
    "k": Parameter(2.5e7, "B", "a message of gradients; the last one has nothing to hide behind", "PyTorch's default"),
    "a3": Parameter(5e-5, "s", "one hop of a message between hosts, for signals and losses", "assumed"),
    "A": Parameter(100, "", "passes of a solve with Anderson's method", "40 to 250 measured on the CPU"),
    "A'": Parameter(6, "", "passes of a solve with Newton's method", "4 to 7 measured on the CPU"),
    "z": Parameter(
        9e-8, "s", "records of one label: what changed, sizes, information", "measured, one thread, K = 3,000"
    ),
    "z'": Parameter(1.5e-8, "s", "the same", "measured, one thread, K = 128"),
    "q": Parameter(1.5e-8, "s", "one image of the order of an epoch", "measured, one thread of an EPYC"),
    "y": Parameter(1.0e-6, "s", "one label written to labels.csv and labels.npz", "measured, one thread of an EPYC"),
    "W": Parameter(1e9, "B/s", "a checkpoint: made, summed and written by rank 0", "assumed"),
    "X": Parameter(1e12, "flop/s", "products of float32 on a host, for nearest neighbours", "assumed"),
    "H": Parameter(2e12, "B", "memory of a node of 8 GPUs", "DGX H100: 2 TB by its data sheet"),
}
R = {name: parameter.value for name, parameter in RUN_PARAMETERS.items()}

GPU_COUNTS = (8, 64, 512, 4096)
IMAGENET = 1_281_167
JUDGED = 50_000  # images that nearest neighbours and probe judge on ImageNet
FIXED_BATCH = 4096
CHECKPOINT_SECONDS, CHECKPOINT_SHARE = 60.0, 20  # a minute between checkpoints, and a twentieth of the time at most
STATE_BYTES = 16  # of a parameter on a device: weight, gradient, momentum, message
SAVED_BYTES = 8  # of a parameter in a checkpoint: weight, momentum
LOOK_BATCH = 512  # images of a batch where all are looked at
STORED_SHARE = 0.5  # of the free memory that the logits of a head may take; else they are computed in every pass


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        name: in words.
        forward: flops of a forward pass of one image, without the heads; a multiply-add is two.
        step: flops of forward and backward pass of one image, without the heads.
        parameters: all of them, heads included.
        activation: bytes that a step keeps per image.
        embedding: E, what the heads see.
        features: what the backbone gives.
        clusters: K.
        heads: number of heads.
        passes: label passes per epoch.
        looks: whether a label pass looks at all images; else the embeddings of the steps are kept.
        image_seconds: of one core, to load one image.
        image_bytes: from storage, for one image.
        batch: images per GPU and step.
        record_seconds: of the records of one label.
    """

    name: str
    forward: float
    step: float
    parameters: int
    activation: float
    embedding: int
    features: int
    clusters: int
    heads: int
    passes: float
    looks: bool
    image_seconds: float
    image_bytes: float
    batch: int
    record_seconds: float = R["z"]

    @property
    def head_flops(self) -> float:
        """Flops of all heads for one image, forward."""
        return 2.0 * self.embedding * self.clusters * self.heads


# Flops, parameters and activations are counted by a test from the networks themselves. Of the paper's 100 label passes
# the last would come after the end of epoch 400.
PAPER = Recipe(
    "ResNet-50 at 224 px, 10 heads of 3,000, 99 label passes in 400 epochs, each with a look at all images",
    forward=8_174_272_512,
    step=24_286_789_632,
    parameters=84_948_032,
    activation=43.9e6,
    embedding=2048,
    features=2048,
    clusters=3000,
    heads=10,
    passes=99 / 400,
    looks=True,
    image_seconds=1 / R["v"],
    image_bytes=R["j"],
    batch=256,
)
BANK = Recipe(
    "ResNet-50 at 224 px, projection to 128, 10 heads of 3,000, a label pass each epoch from the bank",
    forward=8_174_272_512,
    step=24_286_789_632,
    parameters=27_610_560,
    activation=43.9e6,
    embedding=128,
    features=2048,
    clusters=3000,
    heads=10,
    passes=1.0,
    looks=False,
    image_seconds=1 / R["v"],
    image_bytes=R["j"],
    batch=256,
)
SMALL = Recipe(
    "ResNet-18 at 32 px, 10 heads of 128, a label pass each epoch from the bank",
    forward=74_022_912,
    step=217_251_840,
    parameters=11_176_512 + 10 * 128 * 512,
    activation=0.25e6,
    embedding=512,
    features=512,
    clusters=128,
    heads=10,
    passes=1.0,
    looks=False,
    image_seconds=1 / R["v'"],
    image_bytes=3072,
    batch=1024,
    record_seconds=R["z'"],
)
RECIPES = (PAPER, BANK, SMALL)


# ---- A step.


@dataclass(frozen=True)
class Rates:
    """What a rank does alone, and what its messages travel on.

    Attributes:
        image: seconds of forward and backward pass of one image.
        look: seconds of a forward pass of one image.
        load: seconds to load one image, with all threads of the rank.
        fixed: seconds of a step beside its images.
        floor: seconds that a step takes at least.
        overlap: share of the backward pass that hides messages.
        bucket: bytes of a message of gradients.
        link: of messages between devices.
        host_hop: seconds of a hop of the small messages between hosts.
    """

    image: float
    look: float
    load: float
    fixed: float = 0.0
    floor: float = 0.0
    overlap: float = 0.0
    bucket: float = R["k"]
    link: Link = step_model.GPUS
    host_hop: float = R["a3"]


def gpu_rates(recipe: Recipe, ranks: int) -> Rates:
    """Those of a card, by the parameters."""
    read = max(1 / R["d"], ranks / R["S"]) * recipe.image_bytes
    return Rates(
        image=(recipe.step + 3 * recipe.head_flops) / R["G"],
        look=recipe.forward / R["G"],
        load=max(recipe.image_seconds / R["C"], read),
        floor=R["o"],
        overlap=R["w"],
    )


def gradient_bytes(parameters: int) -> float:
    """Of a rank and step: float32."""
    return 4.0 * parameters


def gradient_seconds(size: float, ranks: int, rates: Rates) -> float:
    """An average of so many bytes: a ring inside of each node, and for its part of them each GPU between nodes."""
    if ranks == 1:
        return 0.0
    inside, nodes, link = min(ranks, step_model.NODE), -(-ranks // step_model.NODE), rates.link
    hops = 2 * math.ceil(math.log2(inside)) * link.hop + 2 * math.ceil(math.log2(nodes)) * link.far_hop
    moved = 2 * size * (inside - 1) / inside / link.rate + 2 * size / inside * (nodes - 1) / nodes / link.far_rate
    return math.ceil(size / rates.bucket) * hops + moved


def small_seconds(ranks: int, rates: Rates) -> float:
    """A message of some numbers, from host to host: signals, the clock, losses."""
    return 2 * math.ceil(math.log2(ranks)) * rates.host_hop


@dataclass(frozen=True)
class Step:
    """One training step, in seconds: what it would take by each of its parts alone.

    Attributes:
        compute: forward and backward pass.
        launches: of the host, with the small message.
        load: of the images.
        gradients: of the messages, what nothing hides.
    """

    compute: float
    launches: float
    load: float
    gradients: float

    @property
    def seconds(self) -> float:
        """The slowest of the three that go on at once, and what comes after."""
        return max(self.compute, self.launches, self.load) + self.gradients

    @property
    def bound(self) -> str:
        """Which of the three."""
        parts = {"compute": self.compute, "launches": self.launches, "input": self.load}
        return max(parts, key=lambda name: parts[name])


def step_cost(images: float, parameters: int, ranks: int, rates: Rates) -> Step:
    """A step with so many images on each rank."""
    size = gradient_bytes(parameters)
    compute = rates.fixed + images * rates.image
    launches = rates.floor + small_seconds(ranks, rates)
    hidden = rates.overlap * 2 / 3 * max(compute, launches)
    last = gradient_seconds(min(size, rates.bucket), ranks, rates)
    exposed = max(last, gradient_seconds(size, ranks, rates) - hidden) if ranks > 1 else 0.0
    return Step(compute, launches, images * rates.load, exposed)


# ---- A label pass.


@dataclass(frozen=True)
class LabelPass:
    """One label pass, in seconds.

    Attributes:
        look: the network over all images, or none.
        solver: logits of every head, and passes over them.
        messages: embeddings to the ranks that hold their rows, and labels to all.
        records: what metrics.jsonl says of all labels, on every rank alike.
    """

    look: float
    solver: float
    messages: float
    records: float

    @property
    def seconds(self) -> float:
        return self.look + self.solver + self.messages + self.records


def look_images(images: int, ranks: int) -> int:
    """Images of the rank that looks at most of them: whole batches are dealt out, as one rank would have them."""
    return min(images, -(-math.ceil(images / LOOK_BATCH) // ranks) * LOOK_BATCH)


def stored(recipe: Recipe, images: int, ranks: int, free: float) -> bool:
    """Whether the logits of a head, in float32, lie in memory, of which so many bytes are free."""
    return 4.0 * rows_per_rank(images, ranks) * recipe.clusters <= STORED_SHARE * max(free, 0.0)


def methods(recipe: Recipe, images: int, ranks: int, free: float) -> dict[str, float]:
    """Seconds of one head beside its logits, by method; Newton's where the candidates of all rows fit on a card.

    One pass more is for the probabilities of the labels.
    """
    lie = stored(recipe, images, ranks, free)
    if lie:
        one = step_model.stored_pass(images, recipe.clusters, ranks, 4).seconds
    else:
        one = step_model.computed_pass(images, recipe.clusters, ranks, recipe.embedding).seconds
    found = {"anderson": (R["A"] + 1) * one}
    left = free - lie * 4.0 * rows_per_rank(images, ranks) * recipe.clusters
    if step_model.candidate_bytes(images, device=True) <= left:
        gathers = R["A'"] * step_model.candidate_seconds(images, ranks)
        found["newton"] = (R["A'"] + 1) * one + gathers + step_model.replicated_seconds(images)
    return found


def solve_seconds(recipe: Recipe, images: int, ranks: int, free: float) -> float:
    """One head: its logits, and the quicker method."""
    n, width, clusters = rows_per_rank(images, ranks), recipe.embedding, recipe.clusters
    product = 0.0
    if stored(recipe, images, ranks, free):
        product = max(2.0 * n * width * clusters / P["F"], n * (2.0 * width + 4 * clusters) / P["B"])
    return product + min(methods(recipe, images, ranks, free).values())


def bank_bytes(recipe: Recipe, images: int, ranks: int) -> float:
    """Embeddings of a rank's rows, in 16 bits."""
    return 2.0 * rows_per_rank(images, ranks) * recipe.embedding


def label_bytes(recipe: Recipe, images: int) -> float:
    """All labels of all heads, int32."""
    return 4.0 * images * recipe.heads


def dealt_bytes(recipe: Recipe, images: int, ranks: int) -> float:
    """What a rank sends to the owners of the rows that it looked at or trained on: embeddings, and whose they are."""
    return rows_per_rank(images, ranks) * (2.0 * recipe.embedding + (8 if recipe.looks else 16)) * (ranks - 1) / ranks


def told_bytes(recipe: Recipe, images: int) -> float:
    """What every rank is told after a pass: labels int32 and their probabilities float32, of all heads."""
    return 8.0 * images * recipe.heads


def label_pass_cost(recipe: Recipe, images: int, ranks: int, rates: Rates) -> LabelPass:
    """All heads."""
    link = rates.link
    deal = dealt_bytes(recipe, images, ranks) / (link.rate if ranks <= step_model.NODE else link.far_rate)
    free = P["M"] - resident_bytes(recipe, images, ranks)
    return LabelPass(
        look=look_images(images, ranks) * max(rates.look, rates.load) if recipe.looks else 0.0,
        solver=recipe.heads * solve_seconds(recipe, images, ranks, free),
        messages=step_model.gather_seconds(told_bytes(recipe, images), ranks, link) + deal,
        records=recipe.record_seconds * images * recipe.heads,
    )


# ---- Memory.


def resident_bytes(recipe: Recipe, images: int, ranks: int) -> float:
    """What stays on a device: network, table of labels, bank with what the steps put aside for it."""
    rows = 0.0 if recipe.looks else 2 * bank_bytes(recipe, images, ranks)
    return STATE_BYTES * recipe.parameters + label_bytes(recipe, images) + rows


def device_bytes(recipe: Recipe, images: int, ranks: int, batch: int) -> float:
    """Of a device at most: in a step, or in a label pass."""
    n, resident = rows_per_rank(images, ranks), resident_bytes(recipe, images, ranks)
    logits = 4.0 * n * recipe.clusters if stored(recipe, images, ranks, P["M"] - resident) else 0.0
    label_pass = logits + 12.0 * n + (bank_bytes(recipe, images, ranks) if recipe.looks else 0.0)
    return resident + max(recipe.activation * batch, label_pass)


def final_bytes(recipe: Recipe) -> float:
    """Of an image at the end, on the device of rank 0: its features in float32, and its embedding."""
    return 4.0 * recipe.features + 2.0 * recipe.embedding


def checkpoint_bytes(recipe: Recipe, images: int) -> float:
    """Network, momentum, labels, and the whole bank."""
    bank = 0.0 if recipe.looks else 2.0 * images * recipe.embedding
    return SAVED_BYTES * recipe.parameters + label_bytes(recipe, images) + bank


def node_bytes(recipe: Recipe, images: int, ranks: int) -> float:
    """Of the first node: on each rank old and new labels, their probabilities and the order; twice the checkpoint."""
    each = images * (12.0 * recipe.heads + 8)
    return min(ranks, step_model.NODE) * each + 2 * checkpoint_bytes(recipe, images)


# ---- An epoch.


def batch_of(recipe: Recipe, images: int, ranks: int) -> int:
    """Images per GPU and step: those of the recipe, or so many that an epoch has a hundred steps."""
    return max(1, min(recipe.batch, images // (100 * ranks)))


@dataclass(frozen=True)
class Epoch:
    """One epoch with its part of the label passes.

    Attributes:
        images: of the run.
        step: one step.
        parts: seconds by what they are spent on.
    """

    images: int
    step: Step
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def rate(self) -> float:
        """Images per second, label passes and all."""
        return self.images / self.seconds

    @property
    def bound(self) -> str:
        """What takes most of it."""
        return max(self.parts, key=lambda name: self.parts[name])

    def share(self, *names: str) -> float:
        """Share of the time."""
        return sum(self.parts[name] for name in names) / self.seconds


def epoch_cost(recipe: Recipe, images: int, ranks: int, batch: int | None = None) -> Epoch:
    """An epoch on GPUs, with `batch` images per GPU and step."""
    rates = gpu_rates(recipe, ranks)
    each = batch_of(recipe, images, ranks) if batch is None else batch
    step = step_cost(each, recipe.parameters, ranks, rates)
    steps = math.ceil(images / (each * ranks))
    labels = label_pass_cost(recipe, images, ranks, rates)
    parts = {
        "compute": 0.0,
        "launches": 0.0,
        "input": 0.0,
        "gradients": steps * step.gradients,
        "order": R["q"] * images,
        "look": recipe.passes * labels.look,
        "solver": recipe.passes * labels.solver,
        "labels sent": recipe.passes * labels.messages,
        "records": recipe.passes * labels.records,
    }
    parts[step.bound] = steps * (step.seconds - step.gradients)
    return Epoch(images, step, {**parts, "checkpoints": checkpoint_seconds(recipe, images, sum(parts.values()))})


LABELS = ("look", "solver", "labels sent", "records")


def checkpoint_seconds(recipe: Recipe, images: int, seconds: float) -> float:
    """Of all checkpoints in so many seconds of other work."""
    one = checkpoint_bytes(recipe, images) / R["W"]
    return seconds * one / max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * one)


def evaluation_seconds(recipe: Recipe, images: int, ranks: int) -> float:
    """All ranks look; rank 0 gets features and embeddings of all images, and solves for the final labels alone."""
    rates = gpu_rates(recipe, ranks)
    look = (look_images(images, ranks) + look_images(JUDGED, ranks)) * max(rates.look, rates.load)
    rate = rates.link.rate if ranks <= step_model.NODE else rates.link.far_rate
    sent = images * final_bytes(recipe) * (ranks - 1) / ranks / rate
    free = P["M"] - resident_bytes(recipe, images, ranks) - images * final_bytes(recipe)
    solver = recipe.heads * solve_seconds(recipe, images, 1, free)
    return look + sent + solver + recipe.record_seconds * images * recipe.heads


def run_parts(recipe: Recipe, images: int, ranks: int, epochs: int) -> dict[str, float]:
    """Seconds of a whole run: first look, epochs, evaluation with true labels, and what is written at the end."""
    rates, epoch = gpu_rates(recipe, ranks), epoch_cost(recipe, images, ranks)
    return {
        "first look": 0.0 if recipe.looks else look_images(images, ranks) * max(rates.look, rates.load),
        "steps": epochs * sum(epoch.parts[name] for name in ("compute", "launches", "input", "gradients", "order")),
        "label passes": epochs * sum(epoch.parts[name] for name in LABELS),
        "checkpoints": epochs * epoch.parts["checkpoints"],
        "evaluation": evaluation_seconds(recipe, images, ranks),
        "neighbours": 2.0 * images * JUDGED * recipe.features / R["X"],
        "labels written": R["y"] * images * recipe.heads,
    }


# ---- Tables.


def time_words(seconds: float) -> str:
    """Two digits and a unit, up to days."""
    for unit, size, above in (("d", 86400.0, 2.0), ("h", 3600.0, 2.0), ("min", 60.0, 2.0)):
        if seconds >= 0.9995 * size * above:
            return f"{step_model.number_words(seconds / size)} {unit}"
    return step_model.seconds_words(seconds)


def epoch_rows(recipe: Recipe, images: int) -> list[list[str]]:
    """A line for every number of GPUs; slanted: memory that there is not."""
    lines = []
    for ranks in GPU_COUNTS:
        batch = batch_of(recipe, images, ranks)
        epoch = epoch_cost(recipe, images, ranks)
        device, node = device_bytes(recipe, images, ranks, batch), node_bytes(recipe, images, ranks)
        lines.append(
            [
                count_words(images),
                f"{ranks:,}",
                f"{batch * ranks:,}",
                time_words(epoch.seconds),
                f"{count_words(epoch.rate)}",
                f"{100 * epoch.share(*LABELS):.0f}%",
                f"{epoch.bound}, {100 * epoch.parts[epoch.bound] / epoch.seconds:.0f}%",
                marked(device, P["M"]),
                marked(node, R["H"]),
            ]
        )
    return lines


def marked(size: float, there: float) -> str:
    """Bytes; slanted where they are more than there are."""
    words = step_model.bytes_words(size)
    return words if size <= there else f"*{words}*"


@functools.cache
def tables() -> str:
    """All tables of the model, for the document."""
    header = ["N", "GPUs", "batch", "epoch", "images/s", "label passes", "bound by", "GPU memory", "node memory"]
    parts = [
        "**Parameters**, beside those of a label step",
        "",
        markdown(
            ["", "value", "meaning", "source"],
            [[f"`{k}`", f"{v.value:g} {v.unit}".strip(), v.meaning, v.source] for k, v in RUN_PARAMETERS.items()],
        ),
    ]
    for recipe in RECIPES:
        parts += [
            "",
            f"**{recipe.name}.** Up to {recipe.batch:,} images per GPU and step. "
            "Bound by: what takes most of the epoch, and how much of it. *Slanted*: more memory than there is.",
            "",
            markdown(header, [line for images in step_model.ROWS for line in epoch_rows(recipe, images)]),
        ]
    parts += ["", fixed_batch_table(), "", whole_run_table(), "", limits_table()]
    return "\n".join(parts)


def fixed_batch_table() -> str:
    """The same batch on more and more GPUs."""
    cells = []
    for ranks in GPU_COUNTS:
        step = step_cost(FIXED_BATCH // ranks, BANK.parameters, ranks, gpu_rates(BANK, ranks))
        cells.append(
            [
                f"{ranks:,}",
                f"{FIXED_BATCH // ranks:,}",
                *(step_model.seconds_words(x) for x in (step.compute, step.launches, step.load, step.gradients)),
                step_model.seconds_words(step.seconds),
                count_words(FIXED_BATCH / step.seconds),
            ]
        )
    header = ["GPUs", "images each", "compute", "launches", "input", "gradients", "step", "images/s"]
    return (
        f"**One batch of {FIXED_BATCH:,} on more GPUs**, ResNet-50 with the projection: what each part of a step takes "
        "alone, and of the gradients what nothing hides.\n\n" + markdown(header, cells)
    )


def whole_run_table(epochs: int = 400) -> str:
    """ImageNet's size from beginning to end."""
    counts = GPU_COUNTS[:3]
    cells = []
    for recipe in (PAPER, BANK):
        runs = [run_parts(recipe, IMAGENET, ranks, epochs) for ranks in counts]
        source = "a look each" if recipe.looks else "bank"
        for name in runs[0]:
            cells.append([source, name, *(time_words(run[name]) if run[name] else "-" for run in runs)])
        cells.append([source, "in all", *(time_words(sum(run.values())) for run in runs)])
    return (
        f"**A whole run of {epochs} epochs at ImageNet's size**, {IMAGENET:,} images and {JUDGED:,} that are judged, "
        "ResNet-50.\n\n" + markdown(["labels from", "", *(f"{ranks} GPUs" for ranks in counts)], cells)
    )


def limits(recipe: Recipe) -> list[tuple[str, float, str]]:
    """What is held or done for all images on one rank or on every rank: up to how many images, and the remedy."""
    heads, ranks = recipe.heads, step_model.NODE
    on_device = P["M"] - STATE_BYTES * recipe.parameters - recipe.activation * recipe.batch
    return [
        (
            "features and embeddings of all images on the device of rank 0, at the end",
            (P["M"] - STATE_BYTES * recipe.parameters) / (final_bytes(recipe) + 4 * heads),
            "final labels by all ranks, features of some images",
        ),
        ("labels of all images on every device", on_device / (4 * heads), "a table that is shared out, see above"),
        (
            "labels, probabilities and order of all images on every rank",
            R["H"] / (ranks * (12 * heads + 8)),
            "one copy for a node, or shared out; an order that is computed image by image",
        ),
        (
            "the bank in a checkpoint, twice on rank 0",
            R["H"] / (2 * (2 * recipe.embedding + 4 * heads)),
            "every rank writes its own rows",
        ),
        (
            "room for the candidates of Newton's method on every device, beside the bank on 512 GPUs",
            on_device / (step_model.candidate_bytes(1, device=True) + 4 * heads + 4 * recipe.embedding / 512),
            'label_method="anderson", which "auto" then takes',
        ),
        ("labels.csv takes an hour", 3600 / (R["y"] * heads), "labels.npz alone"),
    ]


def records_ranks(recipe: Recipe) -> float:
    """Ranks from which on the records of the label passes take longer than computing the steps, however many images."""
    return gpu_rates(recipe, 1).image / (recipe.passes * recipe.record_seconds * recipe.heads)


def limits_table() -> str:
    """Where it stops."""
    cells = [[what, count_words(images) if images < math.inf else "-", remedy] for what, images, remedy in limits(BANK)]
    return (
        "**Where it stops**, ResNet-50 with the projection, labels from the bank: what is held or done for all images "
        "on one rank or on every rank, however many there are.\n\n"
        + markdown(["what", "up to N", "what would carry on"], cells)
        + "\n\nRecords of the labels, made by every rank for all images, take longer than computing the steps from "
        + f"{records_ranks(BANK):,.0f} GPUs on; with the paper's schedule from {records_ranks(PAPER):,.0f}."
    )
