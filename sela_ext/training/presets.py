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
        source: where the recipe comes from, what it costs, and the score to expect of it.
        needs: options that it does not say and that must be said.
    """

    options: Mapping[str, Any]
    source: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ablation:
    """One row of a study of the paper, as a command.

    Attributes:
        study: what is varied.
        row: its value in this row.
        arguments: of `sela train`, beside --data and --out.
    """

    study: str
    row: str
    arguments: str


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
    # K-means of a bank would tell augmentations apart: nothing in it asks for what a head has learnt to see.
    "kmeans": {"label_source": "eval"},
    "deepcluster": {
        "heads": 1,
        "head_kind": "linear",
        "projection": 0,
        "init": "random",
        "label_source": "eval",
        "label_spacing": "linear",
        "sampler": "clusters",
        "lr_schedule": "constant",  # every head is new: one that begins at a small learning rate learns nothing
    },
}

# DeepCluster (Caron et al., ECCV 2018), as its authors' code has it; epochs are that code's default.
DEEPCLUSTER: dict[str, Any] = {
    **METHODS["deepcluster"],
    "method": "deepcluster",
    "clusters": 10_000,
    "pca": 256,
    "kmeans_iterations": 20,
    "epochs": 200,
    "batch_size": 256,
    "lr": 0.05,
    "lr_schedule": "constant",
    "warmup": 0.0,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-5,
    "decay_vectors": True,
    "half_resolution": 0.0,
    "augment": "resized_crop",
    "image_size": 224,
}

# What the CIFAR scripts of the SeLa authors say beside the paper's recipe.
CIFAR: dict[str, Any] = {
    **PAPER,
    "model": "alexnet",
    "clusters": 128,
    "batch_size": 128,
    "lr": 0.03,
    "weight_decay": 5e-4,
    "label_passes": 400,
    "label_spacing": "linear",
    "label_heads": "turn",
    "lam": 10.0,
    "label_tol": 1e-2,
    "augment": "cifar",
}

# Training from scratch on labels that stay: no label passes, the learning rate divided by ten every 30 of 90 epochs.
RETRAINED: dict[str, Any] = {
    **{
        name: PAPER[name]
        for name in (
            "batch_size",
            "lr",
            "lr_schedule",
            "warmup",
            "nesterov",
            "weight_decay",
            "decay_vectors",
            "half_resolution",
            "head_kind",
            "projection",
            "augment",
            "image_size",
        )
    },
    "model": "alexnet",
    "epochs": 90,
    "lr_milestones": [1 / 3, 2 / 3],
}

_PAPER = "SeLa paper (Asano et al., ICLR 2020), ImageNet"
_DAYS = "Days on several GPUs."
_PLUS = "Aug++ models of the SeLa authors (MoCo v2's augmentation), ImageNet"
_PLUS_REST = "What they do not publish of the settings is the paper's recipe."
_NO_FIGURE = "No figure is published."


def _alexnet(clusters: int, expected: str) -> Preset:
    return Preset(
        {**PAPER, "model": "alexnet", "clusters": clusters, "heads": 1},
        f"{_PAPER}: AlexNet, 1 head x {clusters} clusters. {_DAYS} {expected}",
    )


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
    "paper-alexnet-1k": _alexnet(1000, "NMI 50.5, adjusted NMI 12.2, ARI 2.7, linear probe 42.1."),
    "paper-alexnet-3k": _alexnet(3000, _NO_FIGURE),
    "paper-alexnet-5k": _alexnet(5000, _NO_FIGURE),
    "paper-alexnet-10k": _alexnet(10_000, "NMI 66.4, adjusted NMI 4.7, ARI 4.7, linear probe 43.8."),
    "paper-alexnet-10x3k": Preset(
        {**PAPER, "model": "alexnet"},
        f"{_PAPER}: AlexNet, 10 heads x 3000 clusters. {_DAYS} Labels of this run train another AlexNet to a linear "
        "probe of 46.5.",
    ),
    "paper-resnet50-10x3k": Preset(
        {**PAPER, "model": "resnet50-preact"},
        f"{_PAPER}: ResNet-50 with pre-activation, 10 heads x 3000 clusters. {_DAYS} NMI 54.2, adjusted NMI 34.4, ARI "
        "7.2, linear probe 61.5.",
    ),
    "aug-plus-resnet18-1k": Preset(
        {**PAPER, "model": "resnet18", "clusters": 1000, "heads": 1, "augment": "aug_plus"},
        f"{_PLUS}: ResNet-18, 1 head x 1000 clusters. {_DAYS} {_PLUS_REST} Label accuracy 26.9, NMI 62.7, adjusted NMI "
        "36.4, ARI 12.5, linear probe 53.3.",
    ),
    "aug-plus-resnet50-1k": Preset(
        {**PAPER, "model": "resnet50", "clusters": 1000, "heads": 1, "augment": "aug_plus"},
        f"{_PLUS}: ResNet-50, 1 head x 1000 clusters. {_DAYS} {_PLUS_REST} Label accuracy 30.5, NMI 65.7, adjusted NMI "
        "42.0, ARI 16.2, linear probe 63.5.",
    ),
    "aug-plus-resnet50-10x3k": Preset(
        {**PAPER, "model": "resnet50", "augment": "aug_plus"},
        f"{_PLUS}: ResNet-50, 10 heads x 3000 clusters. {_DAYS} {_PLUS_REST} Label accuracy 38.1, NMI 75.7, adjusted "
        "NMI 52.8, ARI 27.6, linear probe 68.8.",
    ),
    "cifar10": Preset(
        CIFAR,
        "The CIFAR-10 script of the SeLa authors: AlexNet at 224 pixels, 10 heads x 128 clusters, one head per label "
        "pass. About a day on one GPU. Linear probe 83.4, weighted kNN 77.6 (k 10, sigma .1); a user's run of the "
        "script: kNN 75.5.",
    ),
    "cifar100": Preset(
        CIFAR,
        "The CIFAR-10 script of the SeLa authors on CIFAR-100, with the same settings. About a day on one GPU. "
        + _NO_FIGURE,
    ),
    "svhn": Preset(
        CIFAR,
        "The CIFAR-10 script of the SeLa authors on SVHN, with the same settings and half as many images again. "
        "Linear probe 94.5.",
    ),
    "transfer-alexnet": Preset(
        RETRAINED,
        "SeLa paper, label transfer on ImageNet: AlexNet from scratch on the labels of another run, 90 epochs without "
        "label passes: less than a quarter of what that run costs. Linear probe 48.4 on the labels of ResNet-50 10 x "
        "3000, 46.5 on AlexNet's own. The learning rate's steps are not published: those of the RotNet hybrid.",
        needs=("fixed_labels",),
    ),
    "rotnet-alexnet": Preset(
        {**RETRAINED, "rotnet": True},
        "SeLa paper, RotNet hybrid on ImageNet: AlexNet from scratch on the labels of another run and on telling four "
        "rotations apart, 90 epochs, learning rate .05, divided by ten every 30. Each image is seen four times in a "
        "step: four times the cost of transfer-alexnet. " + _NO_FIGURE,
        needs=("fixed_labels",),
    ),
    "sela-v2-resnet50": Preset(
        {**_SELA_V2_IMAGENET, "crops": "2x160:0.08-1+4x96:0.05-0.14"},
        "SeLa-v2 of the SwAV authors (Caron et al., NeurIPS 2020), ResNet-50 with 2 crops of 160 pixels and 4 of 96, "
        "400 epochs of ImageNet: linear probe 71.8. Their jobs of this kind had 64 GPUs for at most 25 hours.",
    ),
    "sela-v2-resnet50-2x224": Preset(
        {**_SELA_V2_IMAGENET, "crops": "2x224:0.08-1"},
        "SeLa-v2 of the SwAV authors as in `sela-v2-resnet50`, on as many GPUs, with 2 crops of 224 pixels: linear "
        "probe 67.2.",
    ),
    "sela-v2-small": Preset(
        {**FAST, **_SELA_V2, "method": "sela-v2", "batch_size": 96, "lr": 0.075},
        "SeLa-v2 of the SwAV authors with the networks of `fast`, for images below 64 pixels: 2 crops of the whole "
        "size and 4 of half of it, three times the cost of one view, in smaller steps. Digits, 60 epochs, "
        "one seed: kNN .99, NMI .77, about two minutes of one processor core.",
    ),
    "deepcluster-alexnet": Preset(
        {**DEEPCLUSTER, "model": "alexnet-sobel"},
        "DeepCluster (Caron et al., ECCV 2018), AlexNet behind a Sobel filter, 10,000 clusters on ImageNet. Days on "
        "one GPU. " + _NO_FIGURE,
    ),
    "deepcluster-vgg16": Preset(
        {**DEEPCLUSTER, "model": "vgg16-bn-sobel"},
        "DeepCluster, VGG16 with batch norm behind a Sobel filter, 10,000 clusters on ImageNet. Weeks on one "
        "GPU. " + _NO_FIGURE,
    ),
    "kmeans-alexnet-10x3k": Preset(
        {**PAPER, "method": "kmeans", "model": "alexnet"},
        "SeLa's loop with k-means in place of balanced labels (the paper's comparison), AlexNet, 10 heads x 3000 "
        "clusters on ImageNet. Days on several GPUs. " + _NO_FIGURE,
    ),
    "kmeans-cifar10": Preset(
        {**CIFAR, "method": "kmeans"},
        "The CIFAR script of the SeLa authors with k-means labels. About a day on one GPU. " + _NO_FIGURE,
    ),
}

# The studies of the paper (section 4.2), a command for each row.
ABLATIONS: tuple[Ablation, ...] = (
    *(
        Ablation(
            "label passes", f"{passes} in 160 epochs", f"--preset paper-alexnet-1k --epochs 160 --label-passes {passes}"
        )
        for passes in (0, 40, 80, 160)
    ),
    *(Ablation("clusters", f"{k}000", f"--preset paper-alexnet-{k}k") for k in (1, 3, 5, 10)),
    Ablation("heads", "1", "--preset paper-alexnet-3k"),
    Ablation("heads", "10", "--preset paper-alexnet-10x3k"),
    Ablation("architecture", "AlexNet, small", "--preset paper-alexnet-3k --model alexnet-small"),
    Ablation("architecture", "AlexNet", "--preset paper-alexnet-3k"),
    Ablation("architecture", "ResNet-50", "--preset paper-alexnet-3k --model resnet50-preact"),
    Ablation("architecture, 10 heads", "AlexNet", "--preset paper-alexnet-10x3k"),
    Ablation("architecture, 10 heads", "ResNet-50", "--preset paper-resnet50-10x3k"),
)
