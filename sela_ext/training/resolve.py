"""From what the user wrote to what the run does: every "auto" replaced, with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sela_ext.data import Augment, Source
from sela_ext.errors import DataError, OptionError, nearest, shown
from sela_ext.kernels import VectorView
from sela_ext.kernels.device import on_card
from sela_ext.models import BUILT_FOR_224
from sela_ext.processors import available_processors
from sela_ext.training.config import Kept
from sela_ext.training.crops import crop_views, default_crops, parse_crops, takes_sizes
from sela_ext.training.fixed_labels import FixedLabels
from sela_ext.training.idle import refuse_idle
from sela_ext.training.marginals import check_labelling, check_marginals
from sela_ext.training.options import AUTO, OF_LABEL_PASSES, Options, parse_budget
from sela_ext.training.presets import FAST, METHODS, PAPER, PRESETS
from sela_ext.training.ranks import Ranks
from sela_ext.training.schedule import MILESTONES
from sela_ext.training.split import has_labels
from sela_ext.training.vector_options import OF_IMAGES, settle_vectors, view_of

# Below this many pixels on the longer side a set counts as small: the fast recipe and its networks.
SMALL_IMAGES = 64
# Images seen in all, as far as that makes a reasonable number of epochs.
SEEN_IMAGES = 2_000_000
EPOCHS_RANGE = 20, 160
# Learning rates at 256 images per step, where another optimiser is asked for than the recipe's: SGD's would be far too
# large for AdamW, and far too small for LARS (SwAV's is 4.8 at 4,096).
_RATES = {"sgd": 0.05, "adamw": 0.001, "lars": 0.3}


@dataclass(frozen=True)
class Plan:
    """A run, fully decided.

    Attributes:
        options: no field is "auto" but `holdout` (see `sela_ext.training.split`) and, on a GPU, `resident` (see
            `sela_ext.training.resident`); `clusters` is a list with one entry per head.
        reasons: why each "auto", or default replaced by a recipe, became what it is.
        image_size: height and width of the images, as far as they were looked at.
        augment: of the training steps.
        plain: of the passes that look at images as they are.
        budget_seconds: wall-clock budget, or None.
        pass_each_epoch: make a label pass at the start of every epoch, however many there will be.
        given: names of the options that user or preset set.
        asked: those of them that the preset does not say, or says otherwise: the user's own.
        vectors: how feature vectors are seen in a step, where the data are such; image size and augmentations then
            mean nothing.
    """

    options: Options
    reasons: dict[str, str]
    image_size: tuple[int, int]
    augment: Augment
    plain: Augment
    budget_seconds: float | None
    pass_each_epoch: bool
    given: frozenset[str]
    asked: frozenset[str]
    vectors: VectorView | None = None


def probe_image_size(source: Source) -> tuple[int, int]:
    """Height and width of the images: of all where they are in memory, else the largest of a few."""
    if source.image_size is not None:
        return source.image_size
    shapes = []
    reason: DataError | None = None
    for i in np.unique(np.linspace(0, len(source) - 1, 8).astype(int)):
        try:
            shapes.append(source.read(int(i)).shape[:2])
        except DataError as error:
            reason = reason or error  # what happens to unreadable images is on_bad_image's business
    if not shapes:
        raise DataError(f"{source.kind}: none of the images looked at can be read: {reason}; sela doctor says more")
    height, width = np.max(shapes, axis=0)
    return int(height), int(width)


def resolve(
    options: Options,
    given: Collection[str],
    source: Source,
    *,
    digits: bool = False,
    fixed: FixedLabels | None = None,
    ranks: Ranks | None = None,
    kept: Kept | None = None,
) -> Plan:
    """Replace every "auto".

    Args:
        options: what the user and the preset say.
        given: names that the user or the preset set; a recipe replaces none of these.
        source: the training images.
        digits: the built-in digits, which must not be mirrored.
        fixed: the labels that `fixed_labels` gave.
        ranks: who shares the run; None: one process.
        kept: what an earlier run chose for itself and this one takes again.

    Raises:
        OptionError: options that do not fit the data, or that this version does not have.
    """
    _refuse_together(options, given)
    draft = _Draft.begin(options, given, source, fixed, ranks or Ranks())
    kept = (kept or Kept()).without(OF_IMAGES if source.vectors is not None else ())
    draft.keep(kept)
    _settle_recipe(draft)
    device = _settle_device(draft)
    _settle_network(draft, device)
    _settle_steps(draft)
    pass_each_epoch = _settle_labels(draft)
    augment, plain = _settle_augment(draft, digits)
    values, noisy = draft.values, None
    if source.vectors is not None:
        noise, dropout = values["feature_noise"], values["feature_dropout"]
        noisy = view_of(source.vectors, values["feature_scale"], noise, dropout, values["threads"])
    refuse_idle(values, draft.asked, source.vectors is not None)
    return Plan(
        Options(**values),
        {**{name: kept.reasons[name] for name in kept.values}, **draft.reasons_beside(kept)},
        draft.size,
        augment,
        plain,
        draft.budget,
        pass_each_epoch,
        frozenset(given),
        draft.asked,
        noisy,
    )


@dataclass
class _Draft:
    """Options that are being decided, and what that depends on.

    Attributes:
        options: what the user and the preset say.
        given: names that the user or the preset set.
        asked: those that the preset does not say, or says otherwise.
        recipe: what the preset says.
        source: the training images.
        images: how many there are.
        size: their height and width.
        small: they are small images.
        fast: the fast recipe's network is to be chosen for them.
        budget: seconds, or None.
        fixed: labels that `fixed_labels` gave.
        ranks: who shares the run.
        values: of all options; those that are "auto" are open.
        reasons: why they became what they are.
    """

    options: Options
    given: Collection[str]
    asked: frozenset[str]
    recipe: Mapping[str, Any]
    source: Source
    images: int
    size: tuple[int, int]
    small: bool
    fast: bool
    budget: float | None
    fixed: FixedLabels | None
    ranks: Ranks
    values: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def begin(
        options: Options, given: Collection[str], source: Source, fixed: FixedLabels | None, ranks: Ranks
    ) -> _Draft:
        """Nothing is decided.

        Raises:
            OptionError: both a budget and epochs.
        """
        size = (1, 1) if source.vectors is not None else probe_image_size(source)
        small = source.vectors is None and max(size) < SMALL_IMAGES
        fast = small and options.preset in (None, "fast", "sela-v2-small")
        budget = parse_budget(options.budget)
        recipe = {} if options.preset is None else PRESETS[options.preset].options
        if budget is not None and options.epochs not in (AUTO, recipe.get("epochs")):
            raise OptionError("budget and epochs: expected one of them, found both")
        values = {spec.name: getattr(options, spec.name) for spec in dataclasses.fields(Options)}
        asked = frozenset(name for name in given if name not in recipe or values.get(name) != recipe[name])
        return _Draft(
            options, given, asked, recipe, source, len(source), size, small, fast, budget, fixed, ranks, values
        )

    def keep(self, kept: Kept) -> None:
        """Begin with what an earlier run chose: no recipe replaces it, and nobody asked for it."""
        self.values.update(kept.values)
        self.given = {*self.given, *kept.values}

    def reasons_beside(self, kept: Kept) -> dict[str, str]:
        """Of what was chosen now."""
        return {name: reason for name, reason in self.reasons.items() if name not in kept.values}

    def settle(self, name: str, value: Any, reason: str) -> None:
        """Set an option that is still open."""
        if isinstance(self.values[name], str) and self.values[name] == AUTO:
            self.values[name], self.reasons[name] = value, reason


def _settle_recipe(draft: _Draft) -> None:
    """What small images, feature vectors, the method and fixed labels bring with them."""
    options, given, values, reasons = draft.options, draft.given, draft.values, draft.reasons
    images, size, small, fixed, settle = draft.images, draft.size, draft.small, draft.fixed, draft.settle
    if draft.source.vectors is not None:
        settle_vectors(values, reasons, given, draft.source.vectors, _count_classes(draft.source))
    if small and options.preset is None:
        for name, value in FAST.items():
            if name not in given and values[name] != value and not (fixed and name in OF_LABEL_PASSES):
                values[name] = value
                reasons[name] = f"the fast recipe: images of {size[0]} x {size[1]} are below {SMALL_IMAGES} pixels"

    for name, value in METHODS.get(options.method, {}).items():
        if name not in given and not (name == "heads" and isinstance(options.clusters, (list, tuple))):
            values[name], reasons[name] = value, f"what method {options.method} needs, or is usual with it"
    if fixed is not None:
        which = f"the {fixed.where}"
        values.update(clusters=fixed.clusters, heads=len(fixed.clusters), label_passes=0)
        reasons.update(clusters=which, heads=which, label_passes="labels are fixed")
        if "head_kind" not in given:
            values["head_kind"], reasons["head_kind"] = "linear", "plain cross-entropy on fixed labels"
    if values["init"] == "kmeans" and "init" not in draft.asked and values["head_kind"] == "linear":
        values["init"], reasons["init"] = "predictions", "linear heads have no prototypes to place"
    if small and options.preset in (None, "fast", "digits", "sela-v2-small"):
        wide = images >= 10_000
        width = [512, 128] if options.method == "sela-v2" else 512
        settle(
            "projection", width if wide else 0, f"{images} images" + ("" if wide else ": a projection memorises them")
        )
    elif options.method == "sela-v2":
        settle("projection", [2048, 128], "SeLa-v2's")
    values["projection"] = _check_projection(values["projection"])


def _settle_device(draft: _Draft) -> torch.device:
    """Device, threads and arithmetic.

    Raises:
        OptionError: what the device does not have.
    """
    values, ranks, settle = draft.values, draft.ranks, draft.settle
    settle("device", *choose_device())
    device = check_device(values["device"])
    settle(
        "threads",
        max(1, available_processors() // ranks.local_world_size),
        "processors this process may use" + (", shared with the other ranks" if ranks.local_world_size > 1 else ""),
    )
    settle("precision", *_choose_precision(device))
    if values["precision"] == "float16" and device.type == "cpu":
        raise OptionError("precision: expected float32 or bfloat16 on the CPU, found float16")
    values["devices"] = ranks.world_size
    if not on_card(device):
        if values["resident"] is True:
            raise OptionError(
                f"resident: expected False on {device}, where batches are made in the memory that they are read from, "
                "found True; leave it out"
            )
        settle("resident", False, "not kept: batches are made on the CPU, where the images are")
    if draft.options.sync_batch_norm and (device.type != "cuda" or ranks.world_size == 1):
        raise OptionError(
            f"sync_batch_norm: expected several CUDA devices, found {ranks.world_size} x {device.type}; leave it out"
        )
    return device


def _settle_network(draft: _Draft, device: torch.device) -> None:
    """The network, and the size of the images that it sees."""
    values, reasons, budget, size, settle = draft.values, draft.reasons, draft.budget, draft.size, draft.settle
    if draft.fast:
        grey = draft.source.channels == 1
        colour_minutes = budget is None or budget >= 600
        settle(
            "model",
            "small-resnet" if grey or not colour_minutes else "small-convnet",
            "small grey images" if grey else "small colour images" if colour_minutes else "a budget below ten minutes",
        )
    settle("model", "resnet18", f"images of {size[0]} x {size[1]}")
    _choose_image_size_of_crops(values, reasons)
    if str(values["model"]).startswith(BUILT_FOR_224):
        settle("image_size", 224, f"{values['model']} is built for 224 pixels")
    elif draft.small:
        settle("image_size", max(32, -(-max(size) // 8) * 8), f"images of {size[0]} x {size[1]}")
    elif device.type == "cpu":
        settle("image_size", 128, "on a CPU; 224 costs three times as much")
    else:
        settle("image_size", 224, "the paper's")


def _settle_steps(draft: _Draft) -> None:
    """Batch, optimiser, schedule and epochs.

    Raises:
        DataError: one image alone.
        OptionError: what does not go together.
    """
    options, given, asked, values, reasons = draft.options, draft.given, draft.asked, draft.values, draft.reasons
    images, small, budget, ranks, settle = draft.images, draft.small, draft.budget, draft.ranks, draft.settle
    batch = min(values["batch_size"], images)
    if "batch_size" not in given:
        batch = min(batch, max(16, images // 4))  # a set this small would otherwise see a handful of steps
    if batch < values["batch_size"]:
        reasons["batch_size"] = f"there are {images} images"
        values["batch_size"] = batch
    batch = _shared_batch(batch, values["batch_size"] if "batch_size" in given else None, images, ranks)
    if batch < values["batch_size"]:
        reasons["batch_size"] = f"a multiple of the {ranks.world_size} ranks; there are {images} images"
        values["batch_size"] = batch
    if batch < 2:
        raise DataError(f"expected at least 2 images, found {images}; batch norm needs two")
    settle("lr", PAPER["lr"] * batch / 256, f"the paper's {PAPER['lr']} at 256 images per step")
    if "lr" not in given and small and options.preset is None and batch != 256:
        values["lr"] = FAST["lr"] * batch / 256
        reasons["lr"] = f"the fast recipe's {FAST['lr']} at 256 images per step"
    if options.optimizer != draft.recipe.get("optimizer", "sgd") and "lr" not in asked:
        rate = _RATES[options.optimizer]
        values["lr"], reasons["lr"] = rate * batch / 256, f"{rate} at 256 images per step, for {options.optimizer}"
    settle(
        "lr_schedule", "step" if budget is None else "cosine", "the paper's" if budget is None else "a budget is set"
    )
    settle("lr_milestones", list(MILESTONES), "the paper's: epochs 150, 300 and 350 of 400")
    values["lr_milestones"] = _milestones(values["lr_milestones"])
    for name in (
        "warmup",
        "nesterov",
        "weight_decay",
        "decay_vectors",
        "half_resolution",
        "head_kind",
        "projection",
    ):
        settle(name, PAPER[name], "the paper's")
    if values["lr_schedule"] == "onecycle" and "warmup" not in asked:
        values["warmup"], reasons["warmup"] = 0.0, "one cycle has its own"
    _check_nesterov(values, reasons, asked)
    if budget is None:
        settle("epochs", *_choose_epochs(images))
    else:
        values["epochs"] = 1_000_000
        reasons["epochs"] = f"as many as fit into {options.budget}; such a run is not bit-reproducible"
    steps = -(-images // batch)
    settle("log_every", max(1, min(50, steps)), f"{steps} steps per epoch")


def _settle_labels(draft: _Draft) -> bool:
    """Heads, and where their labels come from; returns whether every epoch begins with a label pass.

    Raises:
        OptionError: what does not go together, or more clusters than images.
    """
    options, values, reasons, budget, fixed = draft.options, draft.values, draft.reasons, draft.budget, draft.fixed
    images, settle = draft.images, draft.settle
    if fixed is not None:  # whatever a recipe says of first labels, and of where label passes look
        values.update(init="random", label_source="eval")
        reasons.update(init="not used: labels are fixed", label_source="not used: labels are fixed")
    settle("sampler", "images", "every image once in an epoch")
    check_labelling(values)
    classes = _count_classes(draft.source)
    values["clusters"], values["heads"] = _choose_heads(values, reasons, draft.small, images, classes)
    if values["init"] == "kmeans" and values["head_kind"] != "cosine":
        raise OptionError("init: expected random or predictions with linear heads, found kmeans; or use cosine heads")
    for k in values["clusters"]:
        if k > images and fixed is None:
            raise OptionError(f"clusters: expected at most the number of images, {images}, found {k}")
    settle("label_source", "bank", "costs no extra pass over the images")
    pass_each_epoch = (
        budget is not None
        and (values["label_source"] == "bank" or options.method == "deepcluster")
        and values["label_spacing"] == "linear"
        and values["label_passes"] == AUTO
    )
    if options.method == "deepcluster" and (budget is None or pass_each_epoch):
        settle("label_passes", values["epochs"], "one at the start of every epoch")
    if values["label_source"] == "bank":
        if pass_each_epoch:
            settle("label_passes", values["epochs"], "one at the start of every epoch")
        elif budget is None:
            settle("label_passes", max(2, values["epochs"]), "as many as epochs: the bank makes them nearly free")
    settle(
        "label_passes",
        *((max(2, values["epochs"] // 2), "half as many as epochs") if budget is None else (50, "a budget is set")),
    )
    check_marginals(values)
    return pass_each_epoch


def _settle_augment(draft: _Draft, digits: bool) -> tuple[Augment, Augment]:
    """How images are seen in a step, and as they are.

    Raises:
        OptionError: what does not go together.
    """
    options, values, reasons, channels = draft.options, draft.values, draft.reasons, draft.source.channels
    augment, plain = _choose_augment(values, reasons, draft.small, channels, digits)
    if isinstance(values["augment"], Augment):
        if "image_size" in draft.given and options.image_size not in (AUTO, augment.size):
            raise OptionError(f"image_size: expected {augment.size}, the size of augment, found {options.image_size}")
        values["image_size"], reasons["image_size"] = augment.size, "the size of augment"
    _choose_crops(values, reasons, draft.asked, augment, channels)
    label_view = named_augment(values["label_augment"], 32, "label_augment")
    for option, view in (("augment", augment), ("label_augment", label_view)):
        if view.sobel:
            raise OptionError(f"{option}: expected sobel=False, since networks take the images' channels; found True")
    return augment, plain


def _check_projection(widths: Any) -> Any:
    """A width, or a list of several.

    Raises:
        OptionError: an MLP with an empty layer.
    """
    if not isinstance(widths, (list, tuple)):
        return widths
    if len(widths) > 1 and 0 in widths:
        raise OptionError(f"projection: expected widths of at least 1 in an MLP, found {shown(list(widths))}")
    return int(widths[0]) if len(widths) == 1 else [int(width) for width in widths]


def _choose_image_size_of_crops(values: dict[str, Any], reasons: dict[str, str]) -> None:
    """The first of the crops says how large the images of the training are.

    Raises:
        OptionError: another size was asked for, or crops that cannot be read.
    """
    if values["crops"] is None:
        return
    groups = parse_crops(values["crops"])
    values["crops"] = "+".join(map(str, groups))
    asked = values["augment"].size if isinstance(values["augment"], Augment) else values["image_size"]
    if asked not in (AUTO, groups[0].size):
        named = "augment" if isinstance(values["augment"], Augment) else "image_size"
        raise OptionError(f"{named}: expected {groups[0].size} pixels, the largest of crops, found {asked}")
    if values["image_size"] == AUTO:
        values["image_size"], reasons["image_size"] = groups[0].size, "the largest of crops"


def _choose_crops(
    values: dict[str, Any], reasons: dict[str, str], asked: Collection[str], augment: Augment, channels: int
) -> None:
    """Crops of SeLa-v2, and whether crops fit everything else.

    Raises:
        OptionError: they do not.
    """
    if values["method"] == "sela-v2":
        for name, wanted in (("head_kind", "cosine"), ("label_source", "bank")):
            if values[name] != wanted:
                raise OptionError(f"{name}: expected {wanted} with method sela-v2, found {values[name]}")
        if values["crops"] is None:
            groups = default_crops(augment.size)
            why = "two whole views, and four of half the size"
            if takes_sizes(values["model"], channels, [group.size for group in groups]):
                groups, why = groups[:1], f"the network does not take {groups[1].size} x {groups[1].size}"
            values["crops"], reasons["crops"] = "+".join(map(str, groups)), why
    if values["crops"] is None:
        return
    if values["method"] not in ("sela", "sela-v2"):
        raise OptionError(f"crops: expected method sela or sela-v2, found {values['method']}; leave crops out")
    if values["rotnet"]:
        raise OptionError("crops and rotnet: expected at most one of them, found both")
    groups = parse_crops(values["crops"])
    crop_views(augment, groups)
    problem = takes_sizes(values["model"], channels, [group.size for group in groups])
    if problem:
        raise OptionError(f"crops: expected a network that takes all of {values['crops']}; {problem}")
    if values["half_resolution"]:
        if "half_resolution" in asked:
            raise OptionError("half_resolution and crops: expected one of them, found both")
        values["half_resolution"], reasons["half_resolution"] = 0.0, "crops has several sizes"


def _refuse_together(options: Options, given: Collection[str]) -> None:
    """Options that exclude each other, or that a preset cannot do without."""
    for name in PRESETS[options.preset].needs if options.preset is not None else ():
        if getattr(options, name) is None:
            raise OptionError(f"{name}: expected labels of another run with preset {options.preset}, found none")
    if options.rotnet:
        if options.method in ("deepcluster", "sela-v2"):
            raise OptionError(f"rotnet: expected method sela or kmeans beside it, found {options.method}")
        if options.crops is not None:
            raise OptionError("rotnet: expected one view of every image beside it, found crops; leave one of them out")
    if options.fixed_labels is None:
        return
    if options.method != "sela":
        raise OptionError(
            f"fixed_labels: expected no other source of labels, found method {options.method}; leave one of them out"
        )
    defaults = {spec.name: spec.default for spec in dataclasses.fields(Options)}
    for name in OF_LABEL_PASSES:
        value = getattr(options, name)
        harmless = value == 0 if name == "label_passes" else name in ("clusters", "heads") or value == defaults[name]
        if name in given and not harmless:
            raise OptionError(f"{name}: expected none with fixed_labels, which no label pass changes, found {value!r}")


def _check_nesterov(values: dict[str, Any], reasons: dict[str, str], asked: Collection[str]) -> None:
    """Nesterov momentum, where there is such a thing.

    Raises:
        OptionError: it was asked for, and there is none.
    """
    if not values["nesterov"]:
        return
    problem = ""
    if values["optimizer"] == "adamw":
        problem = "optimizer adamw has no such momentum"
    elif values["optimizer"] == "sgd" and not values["momentum"]:
        problem = "momentum is 0"
    if problem and "nesterov" in asked:
        raise OptionError(f"nesterov: expected False, since {problem}, found True")
    if problem:
        values["nesterov"], reasons["nesterov"] = False, problem


def _milestones(given: Any) -> list[float]:
    """Milestones of the step schedule: ascending shares of the run."""
    shares = [float(share) for share in (given if isinstance(given, (list, tuple)) else [given])]
    if sorted(set(shares)) != shares:
        raise OptionError(f"lr_milestones: expected ascending shares of the run, found {shown(given)}")
    return shares


def _choose_epochs(images: int) -> tuple[int, str]:
    wanted = SEEN_IMAGES // images
    low, high = EPOCHS_RANGE
    if wanted < low:
        return low, f"the fewest that are chosen by themselves, for {images} images"
    if wanted > high:
        return high, f"the most that are chosen by themselves, for {images} images"
    return wanted, f"about {SEEN_IMAGES // 1_000_000} million images seen, of {images}"


def choose_device() -> tuple[str, str]:
    """The device that is used where none is asked for, and why."""
    if torch.cuda.is_available():
        return "cuda", "a CUDA device is there"
    return "cpu", "no CUDA device is usable"


def check_device(name: str) -> torch.device:
    """The device of an option.

    Raises:
        OptionError: another name than cpu, cuda or cuda:N, or a device that is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"device: expected cpu, cuda or cuda:N, found {shown(name)}") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device: expected cpu, cuda or cuda:N, found {shown(name)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device: {name!r} was asked for, but torch finds no usable CUDA device; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"device: {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def _shared_batch(batch: int, asked: int | None, images: int, ranks: Ranks) -> int:
    """The images of a step that all ranks share out evenly, at least two for each.

    Raises:
        DataError: there are too few images.
        OptionError: the number that was asked for cannot be shared out.
    """
    size = ranks.world_size
    if size == 1:
        return batch
    if images < 2 * size:
        raise DataError(f"expected at least two images for each of the {size} ranks, found {images}; use fewer ranks")
    if asked == batch and (batch % size or batch < 2 * size):
        near = max(2, round(batch / size)) * size
        raise OptionError(
            f"batch_size: expected a multiple of the {size} ranks, two images each at least, found {batch}; it is of "
            f"all ranks together: {near}, for instance"
        )
    return max(batch - batch % size, 2 * size)


def _choose_precision(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bfloat16", "the device has it"
        return "float16", "the device has no bfloat16"
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and cpu_multiplies_bfloat16():
        return "bfloat16", "the processor multiplies bfloat16 directly: 1.5 to 3 times as fast as float32"
    return "float32", "the processor has no bfloat16 arithmetic"


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products (AVX-512 BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def _count_classes(source: Source) -> int:
    """Number of true classes, 0 where none are known: the number alone is used, never the labels."""
    labels = source.labels
    return int(np.unique(labels[labels >= 0]).size) if labels is not None and has_labels(source) else 0


def _choose_heads(
    values: dict[str, Any], reasons: dict[str, str], small: bool, images: int, classes: int
) -> tuple[list[int], int]:
    clusters, heads = values["clusters"], values["heads"]
    if isinstance(clusters, (list, tuple)) and heads != AUTO and heads > len(clusters) and heads % len(clusters) == 0:
        clusters = [k for k in clusters for _ in range(heads // len(clusters))]
    if isinstance(clusters, (list, tuple)):
        if heads not in (AUTO, len(clusters)):
            raise OptionError(f"heads: expected {len(clusters)}, one per entry of clusters, found {heads}")
        return [int(k) for k in clusters], len(clusters)
    if clusters != AUTO:
        if heads == AUTO:
            heads, reasons["heads"] = 10, "the paper's"
        return [int(clusters)] * int(heads), int(heads)
    if small:
        few = classes if 2 <= classes <= images else min(10, images)
        why = "as many as there are classes" if few == classes else "no number of classes is known"
        many = max(2, min(128, images // 8))
        if heads == AUTO:
            reasons["clusters"] = f"4 heads of {many}, and 8 of {few}: {why}"
            reasons["heads"] = "the fast recipe"
            return [many] * 4 + [few] * 8, 12
        reasons["clusters"] = why
        return [few] * int(heads), int(heads)
    k = int(np.clip(images // 25, 2, 1000))
    reasons["clusters"] = f"25 images per cluster, at most 1000: {images} images"
    if heads == AUTO:
        heads, reasons["heads"] = 10, "the paper's"
    return [k] * int(heads), int(heads)


def _choose_augment(
    values: dict[str, Any], reasons: dict[str, str], small: bool, channels: int, digits: bool
) -> tuple[Augment, Augment]:
    size = int(values["image_size"])
    plain = Augment.none(size) if small else Augment.eval(size)
    asked = values["augment"]
    if isinstance(asked, Augment):
        return asked, dataclasses.replace(plain, size=asked.size, mean=asked.mean, std=asked.std)
    if asked == AUTO and small:
        scale = 0.3 if digits else 0.4 if channels == 1 else 0.2
        values["augment"] = "small"
        reasons["augment"] = (
            f"the fast recipe: resized crop of {scale} to 1"
            + ("" if digits else ", mirrored half of the time")
            + ", colour jitter .4 .4 .4 .1 for 80%, grey for 20%"
        )
        augment = dataclasses.replace(
            Augment.cifar(size),
            scale=(scale, 1.0),
            flip_probability=0.0 if digits else 0.5,
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.1,
            jitter_probability=0.8,
            gray_probability=0.2,
            mean=plain.mean,
            std=plain.std,
        )
        return augment, plain
    if asked == AUTO:
        v2 = values["method"] == "sela-v2"
        values["augment"], reasons["augment"] = ("swav", "SeLa-v2's") if v2 else ("sela", "the paper's")
    augment = named_augment(values["augment"], size)
    return augment, dataclasses.replace(plain, mean=augment.mean, std=augment.std)


def named_augment(name: Any, size: int, option: str = "augment") -> Augment:
    """Look an augmentation preset up.

    Args:
        name: of the preset; an `Augment` is returned as it is.
        size: pixels.
        option: which option asks, for the error.

    Raises:
        OptionError: unknown name.
    """
    known = ("none", "flip", "resized_crop", "sela", "cifar", "aug_plus", "aug_plus_more", "swav", "eval")
    if isinstance(name, Augment):
        return name
    if name not in known:
        hint = nearest(name, known)
        raise OptionError(
            f"{option}: expected one of {', '.join(known)} or a sela_ext.Augment, found {shown(name)}{hint}"
        )
    if name == "swav":
        return Augment.multi_crop((size,), (1,), scales=((0.14, 1.0),))[0]
    preset: Augment = getattr(Augment, name)(size)
    return preset
