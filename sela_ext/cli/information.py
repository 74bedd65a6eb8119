"""`sela info`: versions, instruction set, devices, what else is installed, what can be read and trained."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

from sela_ext.errors import SelaError

# Optional packages by the extra that brings them, and what they are for.
_EXTRAS = {
    "huggingface": ("datasets", "data sets of the Hugging Face hub"),
    "parquet": ("pyarrow", "export to Parquet"),
    "safetensors": ("safetensors", "export to safetensors"),
    "onnx": ("onnx", "export to ONNX"),
    "timm": ("timm", "networks timm/NAME"),
    "faiss": ("faiss-cpu", "nearest neighbours among very many features"),
    "wandb": ("wandb", "curves on Weights & Biases"),
}
_DATA = (
    "digits (built in)",
    "folders of images (JPEG, PNG, WebP, BMP, TIFF, GIF), with class folders or not",
    "tables and lists of paths (.csv, .tsv, .txt)",
    ".npy and .npz, uint8 images or float vectors",
    "IDX (MNIST, Fashion-MNIST), CIFAR-10 and -100, STL-10, SVHN as downloaded",
    "tar archives and WebDataset shards",
    "Hugging Face data sets and .parquet (extra huggingface)",
    "packs of sela pack",
    "in Python: arrays, tensors, lists of paths, torch Datasets",
)
_SETTINGS = ("SELA_CPU_ISA", "SELA_SELF_CHECK", "SELA_CACHE_DIR")


def add_command(commands: Any) -> None:
    """Add `info`."""
    info = commands.add_parser(
        "info",
        help="versions, instruction set, devices and their self-check; extras, data formats, presets",
        description="What this installation is and can do: versions, instruction set, devices and whether their "
        "kernels passed the check against the CPU, extras that are there, data that can be read, networks and presets.",
        epilog="examples: sela info | sela info --presets | sela info --json",
    )
    info.add_argument("--presets", action="store_true", help="list the presets of train instead: source, cost, score")
    info.add_argument("--json", action="store_true", help="one JSON object on stdout")
    info.set_defaults(run=_info, parser=info)


def _info(given: argparse.Namespace) -> int:
    if given.presets:
        return _presets(given.json)
    found = _found()
    if given.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        if name == "extras":
            for extra, version in value.items():
                what = _EXTRAS[extra][1]
                told = f"{version}: {what}" if version else f"absent: {what}; pip install 'sela_ext[{extra}]'"
                print(f"{'extra':13} {extra} {told}")
            continue
        several = isinstance(value, list) and name in ("data", "device")
        for one in value if several else [value]:
            print(f"{name:13} {' '.join(one) if isinstance(one, list) else one}")
    return 0


def _found() -> dict[str, Any]:
    """Everything by name, in the order of the lines; lists where a name has several values."""
    import numpy as np
    import torch

    from sela_ext import build_info
    from sela_ext.models.registry import own_names
    from sela_ext.processors import available_processors
    from sela_ext.training.presets import PRESETS

    return {
        **build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "numpy": np.__version__,
        "system": platform.platform(terse=True),
        "processors": available_processors(),
        "threads": torch.get_num_threads(),
        **{name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "extras": {extra: _version(package) for extra, (package, _) in _EXTRAS.items()},
        "data": list(_DATA),
        "models": [*own_names(), "torchvision's", "timm/NAME"],
        "presets": list(PRESETS),
        "device": _devices(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """A line per CUDA device with its verdict, or why there is none."""
    import torch

    from sela_ext.kernels import device_verdict

    lines = []
    for i in range(torch.cuda.device_count()):
        try:
            lines.append(str(device_verdict(i)))
        except SelaError as error:
            lines.append(f"cuda:{i}: not checked: {error}")
    why = "" if torch.version.cuda else ": this torch is built without CUDA"
    return lines or [f"no CUDA device{why}"]


def _presets(as_json: bool) -> int:
    from sela_ext.training.presets import PRESETS

    if as_json:
        print(json.dumps({name: {"source": one.source, "options": dict(one.options)} for name, one in PRESETS.items()}))
        return 0
    for name, preset in PRESETS.items():
        needs = "".join(f" Needs --{option.replace('_', '-')}." for option in preset.needs)
        print(f"{name}\n    {preset.source}{needs}")
    return 0
