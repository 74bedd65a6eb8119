"""Presets: the options of a published recipe, each with what it costs and what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Options of a recipe.

    Attributes:
        options: option name to value; everything can be overridden.
        source: where the recipe comes from, the hardware it was run on and the score to expect.
    """

    options: Mapping[str, Any]
    source: str


# The recipe of the paper (section 4): what "auto" takes for larger images, where data and device do not decide.
PAPER: dict[str, Any] = {
    "clusters": 3000,
    "heads": 10,
    "epochs": 400,
    "batch_size": 256,
    "lr": 0.05,
    "lr_schedule": "step",
    "warmup": 0.0,
    "nesterov": False,
    "weight_decay": 1e-5,
    "decay_vectors": True,
    "half_resolution": 0.0,
    "head_kind": "linear",
    "projection": 0,
    "label_passes": 100,
    "label_spacing": "quadratic",
    "label_source": "official",
    "lam": 25.0,
    "augment": "sela",
    "image_size": 224,
}

# The recipe for images below 64 pixels; "auto" takes it there.
FAST: dict[str, Any] = {
    "lr": 0.2,
    "lr_schedule": "cosine",
    "warmup": 0.03,
    "nesterov": True,
    "weight_decay": 1e-4,
    "decay_vectors": False,
    "half_resolution": 0.5,
    "head_kind": "cosine",
    "init": "kmeans",
    "label_spacing": "linear",
    "label_source": "bank",
    "label_tol": 1e-2,
    "lam": 25.0,
}

# SeLa-v2, wherever it is used.
_SELA_V2: dict[str, Any] = {
    "head_kind": "cosine",
    "temperature": 0.1,
    "half_resolution": 0.0,
    "label_source": "bank",
    "label_spacing": "linear",
    "lr_schedule": "cosine",
    "lam": 25.0,
}

# SeLa-v2 on ImageNet: what the SwAV authors' scripts of DeepCluster-v2 say, whose loop SeLa-v2 shares; they published
# none of SeLa-v2. Frozen prototypes are SwAV's; lambda and the solver are this package's. The rate grows from 0 (theirs
# from .3) and falls to 0 (theirs to .0048).
_SELA_V2_IMAGENET: dict[str, Any] = {
    **_SELA_V2,
    "method": "sela-v2",
    "model": "resnet50",
    "projection": [2048, 128],
    "clusters": 3000,
    "heads": 3,
    "epochs": 400,
    "batch_size": 4096,
    "optimizer": "lars",
    "lr": 4.8,
    "momentum": 0.9,
    "nesterov": False,
    "warmup": 10 / 400,
    "weight_decay": 1e-6,
    "decay_vectors": True,
    "augment": "swav",
    "freeze_prototypes": 1.0,
}

# What a method needs, or what is usual with it, where nothing else was asked for.
METHODS: dict[str, dict[str, Any]] = {
    "sela-v2": _SELA_V2,
}

PRESETS: dict[str, Preset] = {
    "fast": Preset(
        FAST,
        "The recipe that `auto` takes below 64 pixels: small network, cosine heads, labels from the last epoch's "
        "embeddings. Minutes on two processor cores.",
    ),
    "digits": Preset(
        {**FAST, "model": "small-resnet", "epochs": 160},
        "The built-in digits, under a minute on two processor cores: NMI about .84, kNN on held-out images about .99.",
    ),
    "paper-alexnet-10x3k": Preset(
        {**PAPER, "model": "alexnet"},
        "SeLa paper (Asano et al., ICLR 2020), AlexNet, 10 heads x 3000 clusters on ImageNet: days on several GPUs. "
        "Labels of this run train another AlexNet to 46.5 (linear probe).",
    ),
    "paper-resnet50-10x3k": Preset(
        {**PAPER, "model": "resnet50-preact"},
        "SeLa paper, ResNet-50 with pre-activation, 10 heads x 3000 clusters on ImageNet: days on several GPUs; NMI "
        "54.2, linear probe 61.5.",
    ),
    "cifar10": Preset(
        {
            **PAPER,
            "model": "alexnet",
            "clusters": 128,
            "epochs": 400,
            "batch_size": 128,
            "lr": 0.03,
            "weight_decay": 5e-4,
            "label_passes": 400,
            "label_spacing": "linear",
            "label_heads": "turn",
            "lam": 10.0,
            "label_tol": 1e-2,
            "augment": "cifar",
        },
        "The CIFAR script of the SeLa authors: AlexNet at 224 pixels, 10 heads x 128 clusters, one head per label "
        "pass; about a day on one GPU. Linear 83.4, weighted kNN 77.6.",
    ),
    "sela-v2-resnet50": Preset(
        {**_SELA_V2_IMAGENET, "crops": "2x160:0.08-1+4x96:0.05-0.14"},
        "SeLa-v2 of the SwAV authors (Caron et al., NeurIPS 2020), ResNet-50 with 2 crops of 160 pixels and 4 of 96, "
        "400 epochs of ImageNet: linear probe 71.8. Their jobs of this kind had 64 GPUs for at most 25 hours.",
    ),
    "sela-v2-resnet50-2x224": Preset(
        {**_SELA_V2_IMAGENET, "crops": "2x224:0.08-1"},
        "The same with 2 crops of 224 pixels: linear probe 67.2.",
    ),
    "sela-v2-small": Preset(
        {**FAST, **_SELA_V2, "method": "sela-v2", "batch_size": 96, "lr": 0.075},
        "SeLa-v2 with the networks of `fast`, for images below 64 pixels: 2 crops of the whole size and 4 of half of "
        "it, three times the work of one view, in smaller steps. Digits, 60 epochs, one seed: kNN .99, NMI .77, about "
        "two minutes of one processor core.",
    ),
}
