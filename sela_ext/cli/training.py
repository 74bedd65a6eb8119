"""`sela train` and `sela finetune`."""

from __future__ import annotations

import argparse
from typing import Any

from sela_ext.cli.parser import add_options
from sela_ext.errors import OptionError


def add_train(commands: Any, chosen: str) -> None:
    """Add `train`, with its options where it is the command that was chosen."""
    train = commands.add_parser(
        "train",
        help="train a network on unlabelled images and label them",
        description="Train a network on unlabelled images, and label them. Options left out are chosen from data and "
        "device; options.json in the run folder says which value was taken and why.",
        epilog="examples: sela train --data digits --out runs/digits | "
        "sela train --data my/photos --out runs/photos --clusters 20 --epochs 50 | "
        "sela train --data my/photos --out runs/photos --clusters 20 --epochs 50 --resume | "
        "sela train --config runs/photos/options.json --out runs/photos --resume | "
        "sela train --data features.npy --out runs/features --clusters 100 --labels y.npy | "
        "sela train --config run.yaml | "
        "sela train --config runs/digits/options.json --out runs/again",
    )
    train.add_argument(
        "--data",
        help='"digits", a folder of images, IDX files, a .npy of uint8 images, or a .npy of feature vectors (floats)',
    )
    train.add_argument("--out", help="run folder; empty or absent unless --resume or --overwrite")
    train.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON file of options, data and out among them (options here go before it, it before a preset); "
        "or options.json of a run, which repeats it",
    )
    if chosen == "train":  # the options live beside torch, which takes a second to import
        from sela_ext.training.options import Options

        add_options(train, Options)
    train.set_defaults(run=_train, parser=train)


def add_finetune(commands: Any, chosen: str) -> None:
    """Add `finetune`, with its options where it is the command that was chosen."""
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a backbone on PASCAL VOC and judge it there",
        description="Fine-tune a backbone on a folder in the layout of PASCAL VOC: multi-label classification, object "
        "detection (Faster R-CNN) or semantic segmentation (FCN). Options left out are those of the literature; "
        "options.json in the folder says which. Scores are written to metrics.json.",
        epilog="examples: sela finetune runs/photos --voc VOCdevkit/VOC2007 --task classification | "
        "sela finetune resnet-10x3k.pth --voc VOCdevkit/VOC2007 --task detection --out runs/detect | "
        "sela finetune resnet50 --pretrained --voc VOCdevkit/VOC2012 --task segmentation --iterations 5000",
    )
    finetune.add_argument("backbone", help="run folder, released checkpoint, or network by name (untrained)")
    finetune.add_argument("--voc", required=True, help="folder with JPEGImages, Annotations and ImageSets")
    finetune.add_argument("--task", required=True, help="classification, detection or segmentation")
    finetune.add_argument("--out", help="folder for the results (default runs/finetune-TASK)")
    if chosen == "finetune":
        from sela_ext.finetuning.options import FinetuneOptions

        add_options(finetune, FinetuneOptions)
    finetune.set_defaults(run=_finetune, parser=finetune)


def _train(given: argparse.Namespace) -> int:
    from sela_ext.training import train
    from sela_ext.training.plan import RunPlan

    options = {k: v for k, v in vars(given).items() if k not in ("command", "run", "parser", "data", "out", "config")}
    missing = [flag for flag, value in (("--data", given.data), ("--out", given.out)) if value is None]
    if missing and given.config is None:
        raise OptionError(
            f"train: expected {' and '.join(missing)}, or a --config that has them; see sela train --help"
        )
    found = train(given.data, out=given.out, config=given.config, **options)
    if isinstance(found, RunPlan) and not options.get("progress", True):
        print(found.table())  # without progress the run says nothing, but here the plan is what was asked for
    return 0


def _finetune(given: argparse.Namespace) -> int:
    from sela_ext.finetuning import finetune

    own = ("command", "run", "parser", "backbone", "voc", "task", "out")
    options = {name: value for name, value in vars(given).items() if name not in own}
    finetune(given.backbone, voc=given.voc, task=given.task, out=given.out, **options)
    return 0
