"""`sela export`: a run's network, labels and features for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sela_ext.errors import OptionError

_FORMATS = ("torchvision", "safetensors", "onnx", "csv", "parquet", "npy", "folders")


def add_export(commands: Any) -> None:
    """Add `export`."""
    export = commands.add_parser(
        "export",
        help="write a run's network, labels or features for other programs",
        description="Formats: torchvision (.pth, a state dict), safetensors, onnx (compared with torch), csv (labels, "
        "and cluster sizes beside them), parquet (labels, on request features and images; for the Hugging Face "
        "library), npy (features), folders (a folder per cluster with links to the image files).",
        epilog="examples: sela export runs/photos --out resnet18.pth | sela export runs/photos --out net.onnx --head "
        "all | sela export runs/photos --out labels.csv | sela export runs/photos --format folders --out sorted",
    )
    export.add_argument("run_folder", metavar="run", help="a run folder, or one of its checkpoints")
    export.add_argument("--out", required=True, help="file to write, in a folder that exists; for folders a new folder")
    export.add_argument("--format", choices=_FORMATS, help="default: by the suffix of --out")
    export.add_argument(
        "--head",
        help="a number, best, all or none (default: all in tables and safetensors, best in folders, else none); of "
        "torchvision: put it in as the last layer",
    )
    export.add_argument("--data", help="images that are not the run's own, or the run's at another place")
    export.add_argument(
        "--embeddings",
        nargs="?",
        const=True,
        metavar="FILE",
        help="parquet: features too, by the network, or from a .npy file",
    )
    export.add_argument("--images", action="store_true", help="parquet: the images too")
    export.add_argument(
        "--link", choices=("symbolic", "hard", "copy"), default="symbolic", help="folders: how (default symbolic)"
    )
    export.add_argument("--opset", type=int, default=18, help="of ONNX, 18 .. 23 (default 18)")
    export.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    export.add_argument("--image-size", type=int, help="pixels (default: as in training)")
    export.add_argument("--batch-size", type=int, default=256, help="images per forward pass (default 256)")
    export.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    export.add_argument("--precision", default="auto", help="of features: auto (the run's), float32, bfloat16, float16")
    export.add_argument("--threads", type=int, default=0, help="processor threads (default 0: all)")
    export.add_argument("--on-bad-image", default="raise", help="raise, or skip")
    export.set_defaults(run=_export, parser=export)


def _export(given: argparse.Namespace) -> int:
    from sela_ext.export import export
    from sela_ext.export.formats import format_of

    chosen = given.format or format_of(Path(given.out))
    if chosen is None:
        raise OptionError(
            f"--format: expected {', '.join(_FORMATS)}, or a suffix of --out that tells, found {given.out}; name one"
        )
    names = ("head", "data", "embeddings", "images", "link", "opset", "overwrite")
    machine = ("image_size", "batch_size", "device", "precision", "threads", "on_bad_image")
    written = export(given.run_folder, given.out, chosen, **{name: getattr(given, name) for name in (*names, *machine)})
    for line in written.lines:
        print(line)
    print(f"{written.format}  {written.path}")
    return 0
