"""The options of a training run: names, defaults, ranges, help; checking; presets.

`Options` is what the user writes: a field may hold "auto". `sela_ext.training.resolve` turns it into one without any
"auto", and says why each value was chosen.
"""

# ruff: noqa: RUF009 - `option` is dataclasses.field with a fixed set of metadata
from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

import numpy as np

from sela_ext.data import Augment
from sela_ext.errors import OptionError, shown

AUTO: Any = "auto"


def option(
    default: Any,
    text: str,
    *,
    kind: str,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """Declare an option: default, help text, kind of value, and range.

    Args:
        default: the default value; "auto" = chosen from data and device.
        text: one line of help.
        kind: "int", "float", "str", "bool", "ints" (an int or a list of them), "floats" or "any".
        choices: for "str": the values allowed.
        low: smallest value allowed.
        high: largest value allowed.
        above: values must be larger than this.
    """
    metadata = {"help": text, "kind": kind, "choices": choices, "low": low, "high": high, "above": above}
    return field(default=default, metadata=metadata)


# What says how labels are made. Fixed labels need none of it: a preset's are left out, a user's are refused.
OF_LABEL_PASSES = (
    "clusters",
    "heads",
    "label_passes",
    "label_spacing",
    "label_source",
    "label_augment",
    "label_heads",
    "label_tol",
    "init",
    "lam",
    "marginals",
    "relax",
    "size_bounds",
    "balance",
)


@dataclass(frozen=True)
class Options:
    """Everything that can be chosen about a run. The defaults are those of `sela_ext.train`."""

    # What is learnt
    model: Any = option(
        AUTO,
        "network: a name of this package or of torchvision, or an nn.Module; for vectors identity, mlp or mlp-512-256",
        kind="any",
    )
    clusters: Any = option(AUTO, "clusters K: one number, or one per head", kind="ints", low=2, high=2**31 - 1)
    heads: int = option(AUTO, "number of heads", kind="int", low=1, high=1000)
    head_kind: str = option(AUTO, "linear (paper) or cosine heads", kind="str", choices=("linear", "cosine"))
    temperature: float = option(0.07, "temperature of cosine heads", kind="float", above=0, high=100)
    projection: Any = option(
        AUTO,
        "layers in front of the heads: 0 = none; one width = linear, batch norm, ReLU; several = an MLP of such layers "
        "whose last is linear",
        kind="ints",
        low=0,
        high=1_000_000,
    )
    # How long, and with which steps
    epochs: int = option(AUTO, "epochs", kind="int", low=1, high=1_000_000)
    budget: Any = option(None, 'wall-clock budget instead of epochs, e.g. "10min"; not bit-reproducible', kind="any")
    batch_size: int = option(256, "images per step, of all devices together", kind="int", low=2, high=1_000_000)
    lr: float = option(AUTO, "learning rate at this batch size", kind="float", above=0, high=1000)
    lr_schedule: str = option(
        AUTO,
        "step = x0.1 at 150, 300 and 350 of 400 epochs; cosine and linear = to zero; onecycle = up and down; constant",
        kind="str",
        choices=("step", "cosine", "linear", "constant", "onecycle"),
    )
    lr_milestones: Any = option(
        AUTO,
        "shares of the run at which the step schedule divides by ten, e.g. 0.5,0.75",
        kind="floats",
        above=0,
        high=1,
    )
    warmup: float = option(AUTO, "share of the run with a growing learning rate", kind="float", low=0, high=1)
    optimizer: str = option(
        "sgd", "optimiser; lr follows it unless asked for", kind="str", choices=("sgd", "lars", "adamw")
    )
    momentum: float = option(0.9, "momentum of SGD and LARS, first beta of AdamW", kind="float", low=0, high=0.9999)
    nesterov: bool = option(AUTO, "Nesterov momentum", kind="bool")
    weight_decay: float = option(AUTO, "weight decay", kind="float", low=0, high=10)
    decay_vectors: bool = option(AUTO, "decay biases and batch norm too (the paper does)", kind="bool")
    ema: float = option(
        0.0, "decay of the averaged network that is evaluated and kept; 0 = none", kind="float", low=0, high=0.999999
    )
    accumulate: int = option(
        1, "batches whose gradients make one step; lr is not changed by it", kind="int", low=1, high=10_000
    )
    compile: bool = option(False, "compile the network with torch.compile", kind="bool")
    loss: str = option("mean", "mean or sum over heads", kind="str", choices=("mean", "sum"))
    half_resolution: float = option(AUTO, "share of the steps at half resolution", kind="float", low=0, high=1)
    # Labels
    method: str = option("sela", "training method", kind="str", choices=("sela", "sela-v2", "deepcluster", "kmeans"))
    label_passes: int = option(
        AUTO,
        "label passes during training; 0 = train on the first labels throughout",
        kind="int",
        low=0,
        high=1_000_000,
    )
    label_spacing: str = option(
        "quadratic",
        "times of the label passes: dense at the start, or even",
        kind="str",
        choices=("quadratic", "linear"),
    )
    label_source: str = option(
        AUTO,
        "bank = the last epoch's embeddings; eval = a pass in eval mode; official = a pass in train mode, augmented",
        kind="str",
        choices=("bank", "eval", "official"),
    )
    label_augment: Any = option("none", "augmentation of the eval label pass", kind="any")
    label_heads: str = option(
        "all", "heads relabelled by a pass: all, or one in turn", kind="str", choices=("all", "turn")
    )
    init: str = option(
        "random",
        "first labels: a random deal, the untrained network's, or the same with prototypes placed by k-means",
        kind="str",
        choices=("random", "predictions", "kmeans"),
    )
    lam: float = option(25.0, "lambda: sharpness of the label assignment", kind="float", above=0, high=1e6)
    label_tol: float = option(
        1e-4, "tolerance of the label solver (L1 of the cluster sizes)", kind="float", low=0, high=1
    )
    label_method: str = option("auto", "label solver", kind="str", choices=("auto", "newton", "anderson", "sinkhorn"))
    label_max_passes: int = option(1000, "most passes of the label solver", kind="int", low=1, high=10_000_000)
    balance: str = option("argmax", "rounding of the plan to labels", kind="str", choices=("argmax", "exact"))
    marginals: Any = option(
        None,
        "shares of the clusters: None = equal; a list; or estimated = .9 of what the network predicts on average and "
        ".1 of an equal share",
        kind="any",
    )
    relax: Any = option(
        None,
        "let cluster sizes deviate at a cost of lam * relax * KL(sizes, marginals): small = free, large = strict; "
        "None = met. Not with size_bounds or balance exact",
        kind="any",
    )
    size_bounds: Any = option(
        None,
        "smallest and largest size of a cluster, as multiples of an equal share, such as 0.5,2; None = met exactly. "
        "The plan keeps them; labels are its largest entries and may exceed them. Not with relax or balance exact",
        kind="any",
    )
    pca: int = option(
        256,
        "methods deepcluster and kmeans: dimensions that features are whitened to before k-means; 0 = as they are",
        kind="int",
        low=0,
        high=1_000_000,
    )
    kmeans_iterations: int = option(
        20, "methods deepcluster and kmeans: iterations of k-means in a label pass", kind="int", low=1, high=10_000
    )
    sampler: str = option(
        AUTO,
        "what an epoch draws evenly: images, each once; or clusters, each equally often",
        kind="str",
        choices=("images", "clusters"),
    )
    crops: Any = option(
        None, 'several crops of every image: numbers and sizes, largest first, such as "2x160+4x96"', kind="any"
    )
    freeze_prototypes: float = option(
        0.0, "epochs in which the prototypes are not trained", kind="float", low=0, high=1e6
    )
    fixed_labels: Any = option(
        None,
        "labels to train on as they are, without label passes: a run folder (runs/x:3 = its head 3), a file of labels, "
        "a released checkpoint, or an array",
        kind="any",
    )
    rotnet: bool = option(False, "show every image in its four rotations, and have them told apart too", kind="bool")
    # Images
    augment: Any = option(AUTO, "augmentation: preset name or sela_ext.Augment", kind="any")
    image_size: int = option(AUTO, "pixels of the training images", kind="int", low=4, high=4096)
    feature_noise: float = option(
        0.3,
        "vectors as data: deviation of the noise of a view, of the rows' root mean square",
        kind="float",
        low=0,
        high=1000,
    )
    feature_dropout: float = option(
        0.2, "vectors as data: share of the features left out of a view", kind="float", low=0, high=0.99
    )
    feature_scale: str = option(
        "one",
        "vectors as data: one scale for all columns, or each column by its own deviation",
        kind="str",
        choices=("one", "columns"),
    )
    imbalance: str = option(
        "none",
        "leave labelled images out to unbalance the classes: light, or heavy, as in the paper's study",
        kind="str",
        choices=("none", "light", "heavy"),
    )
    on_bad_image: Literal["raise", "skip"] = option("raise", "unreadable images", kind="str", choices=("raise", "skip"))
    exact: bool = option(False, "resample JPEG images as torchvision does; slower, no better", kind="bool")
    exif: bool = option(False, "turn image files as their EXIF orientation says", kind="bool")
    index: Any = option(
        "run",
        "entry points of JPEG files, some 6% of their size: run = in the run folder; off; or a folder that runs share",
        kind="any",
    )
    max_bad_fraction: float = option(0.01, "most unreadable images that skip accepts", kind="float", low=0, high=1)
    # Evaluation: true labels never reach training
    labels: Any = option(None, "true labels, for metrics only: array, .npy or table of names and labels", kind="any")
    classes: Any = option(None, "names of the classes, which fixes their numbers: list or text file", kind="any")
    eval_data: Any = option(None, "labelled images for kNN and linear probes", kind="any")
    holdout: Any = option(
        AUTO, "images kept out of training and used for evaluation: number or share; still labelled", kind="any"
    )
    evaluate_every: int = option(0, "epochs between evaluations; 0 = at the end", kind="int", low=0, high=1_000_000)
    # Machine
    device: str = option(AUTO, "cpu, cuda or cuda:N", kind="str")
    devices: Any = option(
        AUTO,
        "processes that share the run, one per GPU (or on the CPU): auto = what torchrun started, else one",
        kind="any",
    )
    resident: bool = option(
        AUTO,
        "keep images of an array on the GPU, and augment them there; auto = where they fit beside all else",
        kind="bool",
    )
    sync_batch_norm: bool = option(
        False, "batch norm by the images of all devices together, with several GPUs", kind="bool"
    )
    rank_timeout: float = option(
        1800.0,
        "seconds after which a rank that does not come to an exchange with the others is an error",
        kind="float",
        above=0,
        high=1e6,
    )
    rank_silence: float = option(
        60.0, "seconds after which a rank of which nothing is heard counts as lost", kind="float", low=3, high=1e6
    )
    precision: str = option(AUTO, "arithmetic of the network", kind="str", choices=("float32", "bfloat16", "float16"))
    threads: int = option(AUTO, "processor threads", kind="int", low=1, high=4096)
    seed: int = option(0, "seed of everything random", kind="int", low=0, high=2**63 - 1)
    # Run folder
    resume: bool = option(False, "continue the run in this folder, or begin it", kind="bool")
    overwrite: bool = option(False, "replace the run in this folder", kind="bool")
    checkpoint_seconds: float = option(60.0, "seconds between checkpoints", kind="float", low=0, high=1e9)
    log_every: int = option(AUTO, "steps between log entries", kind="int", low=1, high=1_000_000_000)
    progress: bool = option(True, "progress bar", kind="bool")
    callbacks: Any = option(None, "functions called with every event that is recorded", kind="any")
    wandb: Any = option(None, "log to Weights & Biases too: true, or the name of a project", kind="any")
    dry_run: bool = option(False, "show the plan of memory and time, and end", kind="bool")
    preset: Any = option(None, "options of a published recipe", kind="any")

    def __post_init__(self) -> None:
        for spec in fields(self):
            check(spec, getattr(self, spec.name))
        if not isinstance(self.index, (str, os.PathLike)) or not os.fspath(self.index):
            raise OptionError(f'index: expected "run", "off" or a folder, found {shown(self.index)}')
        for name in ("augment", "label_augment"):
            if not isinstance(getattr(self, name), (str, Augment)):
                found = shown(getattr(self, name))
                raise OptionError(f"{name}: expected the name of a preset or a sela_ext.Augment, found {found}")
        if self.resume and self.overwrite:
            raise OptionError(
                "resume and overwrite: expected at most one of them, found both; overwrite deletes the run"
            )


def check(spec: Field[Any], value: Any) -> None:
    """Check the type and range of one option.

    Raises:
        OptionError: says what was expected and found.
    """
    meta, name = spec.metadata, spec.name
    if isinstance(value, str) and value == AUTO and (spec.default == AUTO or spec.default is MISSING):
        return
    kind = meta["kind"]
    if kind == "any":
        return
    if kind == "bool":
        if not isinstance(value, bool):
            raise OptionError(f"{name}: expected True or False, found {shown(value)}")
    elif kind == "str":
        if not isinstance(value, str):
            raise OptionError(f"{name}: expected a string, found {shown(value)}")
        if meta["choices"] and value not in meta["choices"]:
            near = difflib.get_close_matches(value, meta["choices"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"{name}: expected one of {', '.join(meta['choices'])}, found {shown(value)}{hint}")
    elif kind in ("ints", "floats"):
        values = value if isinstance(value, (list, tuple)) else [value]
        if not values:
            raise OptionError(f"{name}: expected a number or a list of numbers, found {shown(value)}")
        for one in values:
            _check_number(name, one, kind.removesuffix("s"), meta)
    else:
        _check_number(name, value, kind, meta)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floating-point ones
        return False


def _check_number(name: str, value: Any, kind: str, meta: Mapping[str, Any]) -> None:
    low, high, above = meta["low"], meta["high"], meta["above"]
    bounds = [f"> {above:g}"] if above is not None else [f">= {low:g}"] if low is not None else []
    bounds += [f"<= {high:g}"] if high is not None else []
    is_number = isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)
    if (
        not is_number
        or not _is_finite(value)
        or (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
    ):
        wanted = "a whole number" if kind == "int" else "a number"
        raise OptionError(f"{name}: expected {' '.join([wanted, ' and '.join(bounds)]).rstrip()}, found {shown(value)}")


def make_options(given: Mapping[str, Any]) -> Options:
    """Build options from a mapping, the preset's values below the given ones.

    Raises:
        OptionError: unknown option (names the nearest one), wrong type or range, unknown preset.
    """
    known = [spec.name for spec in fields(Options)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"unknown option {name!r}{hint}")
    return Options(**with_preset({name: plain_value(value) for name, value in given.items()}))


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """What user and preset set together: the preset's values below the given ones.

    Raises:
        OptionError: unknown preset.
    """
    preset = given.get("preset")
    if preset is None:
        return dict(given)
    from sela_ext.training.presets import METHODS, PRESETS

    if not isinstance(preset, str) or preset not in PRESETS:
        near = difflib.get_close_matches(shown(preset), PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"preset: expected one of {', '.join(PRESETS)}, found {shown(preset)}{hint}")
    recipe = dict(PRESETS[preset].options)
    method = given.get("method", recipe.get("method"))
    if method != recipe.get("method"):
        recipe.update(METHODS.get(str(method), {}))  # what another method needs goes before what the preset says
        if method in ("kmeans", "deepcluster"):
            recipe.pop("crops", None)  # they see one view of an image
    if isinstance(given.get("clusters"), (list, tuple)):
        recipe.pop("heads", None)  # a list says how many heads there are
    if given.get("fixed_labels") is not None:
        recipe = {name: value for name, value in recipe.items() if name not in OF_LABEL_PASSES}
    return {**recipe, **given}


def plain_value(value: Any) -> Any:
    """Turn numpy numbers, short arrays of them and tuples into plain numbers and lists; leave the rest."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iuf":
        return value.tolist()
    if isinstance(value, (list, tuple)) and all(isinstance(one, (int, float, np.generic)) for one in value):
        return [plain_value(one) for one in value]
    return value


# Seconds of the longest budget: thirty years.
_LONGEST = 1e9
_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_budget(budget: Any) -> float | None:
    """Read a wall-clock budget: None, seconds, or a text such as "90s", "10min", "2h".

    Returns:
        Seconds, or None.

    Raises:
        OptionError: not a positive duration.

    Example:
        >>> parse_budget("10min")
        600.0
    """
    if budget is None:
        return None
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        seconds = float(budget) if _is_finite(budget) else math.inf
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", budget.lower()) if isinstance(budget, str) else None
        if match is None or (match[2] or "s") not in _UNITS:
            raise OptionError(f'budget: expected a duration such as "90s", "10min" or "2h", found {shown(budget)}')
        seconds = float(match[1]) * _UNITS[match[2] or "s"]
    if not 0 < seconds <= _LONGEST:
        raise OptionError(f"budget: expected a duration > 0 s and <= {_LONGEST:g} s, found {shown(budget)}")
    return seconds
