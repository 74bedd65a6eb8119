"""The options of `finetune`: names, defaults and ranges, and what "auto" becomes for each task."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from sela_ext.errors import OptionError
from sela_ext.processors import available_processors
from sela_ext.training.options import AUTO, check, option, plain_value
from sela_ext.training.resolve import check_device

TASKS = ("classification", "detection", "segmentation")
# What the literature does, task by task; docs/finetune.md says who.
_USUAL: dict[str, dict[str, Any]] = {
    "classification": {
        "iterations": 80_000,
        "batch_size": 16,
        "lr": 0.003,
        "weight_decay": 1e-6,
        "lr_schedule": "halve",
        "warmup": 0,
        "image_size": 224,
        "layers": "fc6-8",
    },
    "detection": {
        "iterations": 24_000,
        "batch_size": 16,
        "lr": 0.02,
        "weight_decay": 1e-4,
        "lr_schedule": "step",
        "warmup": 100,
        "image_size": 600,
        "layers": "all",
    },
    "segmentation": {
        "iterations": 20_000,
        "batch_size": 8,
        "lr": 0.01,
        "weight_decay": 1e-4,
        "lr_schedule": "poly",
        "warmup": 0,
        "image_size": 480,
        "layers": "all",
    },
}


@dataclass(frozen=True)
class FinetuneOptions:
    """Everything that can be chosen about a fine-tuning run. The defaults are those of `sela_ext.finetune`."""

    layers: str = option(
        AUTO,
        "fc6-8 = the backbone's convolutions stay as they are; all = everything is trained",
        kind="str",
        choices=("fc6-8", "all"),
    )
    batch_norm: str = option(
        AUTO,
        "frozen = the backbone's batch norm as it was learnt; train = it goes on learning, or with fc6-8 keeps its "
        "statistics up to date (auto: frozen where the backbone is trained)",
        kind="str",
        choices=("frozen", "train"),
    )
    pretrained: bool = option(
        False, "torchvision names: torchvision's own weights, which it downloads; else untrained", kind="bool"
    )
    train_split: str = option(AUTO, "image set to train on, e.g. trainval", kind="str")
    test_split: str = option(AUTO, "image set to judge on, e.g. test", kind="str")
    iterations: int = option(AUTO, "optimiser steps", kind="int", low=1, high=100_000_000)
    batch_size: int = option(AUTO, "images per step", kind="int", low=1, high=100_000)
    lr: float = option(AUTO, "learning rate", kind="float", above=0, high=1000)
    lr_schedule: str = option(
        AUTO,
        "halve = by half every lr_every steps; step = x0.1 after 3/4 and 11/12; poly = (1 - t)^0.9; or constant",
        kind="str",
        choices=("halve", "step", "poly", "constant"),
    )
    lr_every: int = option(5000, "steps between halvings", kind="int", low=1, high=100_000_000)
    warmup: int = option(AUTO, "steps with a growing learning rate", kind="int", low=0, high=100_000_000)
    momentum: float = option(0.9, "momentum of SGD", kind="float", low=0, high=0.9999)
    weight_decay: float = option(AUTO, "weight decay", kind="float", low=0, high=10)
    image_size: int = option(
        AUTO,
        "pixels: of the crop, or (detection) of the shorter side of the whole image",
        kind="int",
        low=16,
        high=4096,
    )
    crop_low: float = option(
        0.1, "classification: smallest share of the image that a random crop covers", kind="float", above=0, high=1
    )
    crop_high: float = option(
        0.5, "classification: largest share of the image that a random crop covers", kind="float", above=0, high=1
    )
    test_crops: str = option(
        "random",
        "classification: scores summed over 10 random crops, or over centre and corners with their mirror images, or "
        "the centre alone",
        kind="str",
        choices=("random", "ten", "centre"),
    )
    proposals: int = option(
        1000,
        "detection: regions of an image that are judged (training: twice as many to draw from)",
        kind="int",
        low=1,
        high=100_000,
    )
    regions: int = option(512, "detection: regions of an image that a step trains on", kind="int", low=1, high=100_000)
    classes: int = option(21, "segmentation: classes in the masks, background among them", kind="int", low=2, high=255)
    device: str = option(AUTO, "cpu, cuda or cuda:N", kind="str")
    precision: str = option(AUTO, "arithmetic of the network", kind="str", choices=("float32", "bfloat16", "float16"))
    threads: int = option(AUTO, "processor threads", kind="int", low=1, high=4096)
    seed: int = option(0, "seed of everything random", kind="int", low=0, high=2**63 - 1)
    checkpoint_seconds: float = option(300.0, "seconds between checkpoints", kind="float", low=0, high=1e9)
    log_every: int = option(25, "steps between log entries", kind="int", low=1, high=1_000_000_000)
    overwrite: bool = option(False, "replace the run in the folder", kind="bool")
    progress: bool = option(True, "progress bar", kind="bool")

    def __post_init__(self) -> None:
        for spec in fields(self):
            check(spec, getattr(self, spec.name))
        if self.crop_low > self.crop_high:
            raise OptionError(f"crop_low: expected at most crop_high, {self.crop_high:g}, found {self.crop_low:g}")


def make_options(given: Mapping[str, Any]) -> FinetuneOptions:
    """Build options from a mapping.

    Raises:
        OptionError: unknown option (names the nearest one), wrong type or range.
    """
    known = [spec.name for spec in fields(FinetuneOptions)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"unknown option {name!r}{hint}")
    return FinetuneOptions(**{name: plain_value(value) for name, value in given.items()})


def settle(options: FinetuneOptions, task: str) -> FinetuneOptions:
    """Replace every "auto" but those that depend on backbone and data.

    Raises:
        OptionError: unknown task, or a device that is not there.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise OptionError(f"task: expected one of {', '.join(TASKS)}, found {task!r}{hint}")
    values = {name: value for name, value in _USUAL[task].items() if getattr(options, name) == AUTO}
    if options.device == AUTO:
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    device = check_device(values.get("device", options.device))
    if options.threads == AUTO:
        values["threads"] = available_processors()
    if options.precision == AUTO:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        values["precision"] = "bfloat16" if fast else "float16" if device.type == "cuda" else "float32"
    elif options.precision == "float16" and device.type == "cpu":
        raise OptionError("precision: expected float32 or bfloat16 on the CPU, found float16")
    return replace(options, **values)


def learning_rate(options: FinetuneOptions, step: int) -> float:
    """The learning rate of a step.

    Args:
        options: settled.
        step: 0 .. iterations - 1.

    Example:
        >>> usual = settle(FinetuneOptions(device="cpu"), "classification")
        >>> [learning_rate(usual, step) for step in (0, 4999, 5000, 10_000)]
        [0.003, 0.003, 0.0015, 0.00075]
    """
    share = step / options.iterations
    factor = 1.0
    if options.lr_schedule == "halve":
        factor = 0.5 ** (step // options.lr_every)
    elif options.lr_schedule == "step":
        factor = 0.1 ** ((share >= 3 / 4) + (share >= 11 / 12))
    elif options.lr_schedule == "poly":
        factor = (1 - share) ** 0.9
    if step < options.warmup:
        factor *= (step + 1) / (options.warmup + 1)
    return float(options.lr * factor)
