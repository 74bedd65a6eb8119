"""The command line: `sela`, with a command for each public function."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sela_ext.errors import OptionError, SelaError


class _Parser(argparse.ArgumentParser):
    """Errors are one line, name the nearest option, and exit with status 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            wrong = message.split(":", 1)[1].split()[0]
            known = [string for action in self._actions for string in action.option_strings]
            near = difflib.get_close_matches(wrong.split("=")[0], known, n=1)
            message = f"unknown option {wrong}" + (f"; did you mean {near[0]}?" if near else "")
        raise OptionError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status.

    Exit status: 0 done, 1 a certificate that does not hold, 2 options, 3 data, 4 checkpoint, 5 numerics,
    6 distributed, 7 resources, 130 / 143 signals.
    """
    try:
        status = run(sys.argv[1:] if arguments is None else list(arguments))
    except SelaError as error:
        _complain(str(error))
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # Whoever read our output is gone: nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (MemoryError, RuntimeError, OSError) as error:
        memory = isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error)
        if memory:
            _complain("out of memory; use a smaller batch_size, fewer clusters or fewer heads")
        elif isinstance(error, OSError):
            _complain(f"{error}; check that the path exists and can be written, and that the disk has room")
        else:
            raise
        status = 7
    raise SystemExit(status)


def run(arguments: list[str]) -> int:
    """Run one command.

    Raises:
        SelaError: what went wrong, in one line.
    """
    parser = _build_parser(arguments)
    given, rest = parser.parse_known_args(arguments)
    if rest:
        given.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    status: int = given.run(given)
    return status


def _complain(message: str) -> None:
    # Names of files may hold anything, also what terminals take for commands.
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    print(f"sela: error: {line}", file=sys.stderr)


def _build_parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sela",
        description="Self-labelling: from unlabelled images to labels and a trained network.",
        epilog="example: sela train --data digits --out runs/digits",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser(
        "train",
        help="train a network on unlabelled images and label them",
        description="Train a network on unlabelled images, and label them. Options left out are chosen from data and "
        "device; options.json in the run folder says which value was taken and why.",
        epilog="examples: sela train --data digits --out runs/digits | "
        "sela train --data my/photos --out runs/photos --clusters 20 --epochs 50 | "
        "sela train --data my/photos --out runs/photos --resume",
    )
    train.add_argument(
        "--data",
        required=True,
        help='"digits", a folder of images, IDX files, or a .npy of uint8 images',
    )
    train.add_argument("--out", required=True, help="run folder; empty or absent unless --resume or --overwrite")
    if arguments[:1] == ["train"]:  # the options live beside torch, which takes a second to import
        from sela_ext.training.options import Options

        _add_options(train, Options)
    train.set_defaults(run=_train, parser=train)

    assign = commands.add_parser(
        "assign",
        help="balanced labels from a file of logits",
        description="Solve the label assignment of SeLa for logits [N, K] in a .npy file, or for features [N, D] in "
        "one and a head's weights. Files are mapped, not read into memory: they may be larger than it. The line on "
        "stdout sums the solve up; exit status 0 also where it did not converge, which that line says.",
        epilog="examples: sela assign logits.npy --out labels.npy | "
        "sela assign features.npy --weight weight.npy --bias bias.npy --out labels.npz | "
        "sela assign logits.npy --out labels.csv --storage fixed16 --progress",
    )
    assign.add_argument("logits", help=".npy file, float [N, K]; with --weight: features, float [N, D]")
    assign.add_argument(
        "--out",
        required=True,
        help="file for the labels: .npz (labels, potential, sizes, error and more), .csv (index, label), or else a "
        ".npy of labels, int32 [N]",
    )
    assign.add_argument("--weight", help=".npy file, float [K, D]: logits = features @ weight.T + bias, never stored")
    assign.add_argument("--bias", help=".npy file, float [K]")
    assign.add_argument("--lam", type=float, default=25.0, help="lambda: sharpness (default 25)")
    assign.add_argument("--tol", type=float, default=1e-4, help="L1 tolerance of the cluster sizes (default 1e-4)")
    assign.add_argument("--method", default="auto", help="auto, newton, anderson or sinkhorn")
    assign.add_argument("--storage", default="auto", help="auto, float32 (as they are), float16, bfloat16 or fixed16")
    assign.add_argument("--stop", default="l1", help="l1 or official")
    assign.add_argument("--balance", default="argmax", help="argmax, or exact: equal cluster sizes (default argmax)")
    assign.add_argument("--marginals", help=".npy file, float [K], wanted sizes or shares (default: equal)")
    assign.add_argument("--relax", type=float, help="rho: strength of the pull towards the wanted sizes")
    assign.add_argument("--size-bounds", type=_bounds, metavar="LOW,HIGH", help="smallest and largest size in images")
    assign.add_argument("--row-weights", help=".npy file, float [N]; 0 takes an image out of the balance")
    assign.add_argument("--start", help=".npy file, float [K]: potential to start from")
    assign.add_argument("--potential", help=".npy file for the potential, float64 [K]")
    assign.add_argument("--max-passes", type=int, help="most reads of the logits (default 1000; official: 10000)")
    assign.add_argument("--threads", type=int, default=0, help="CPU threads (default 0: all)")
    assign.add_argument("--progress", action="store_true", help="a line per read on stderr")
    assign.set_defaults(run=_assign, parser=assign)

    verify = commands.add_parser(
        "verify",
        help="judge labels and a potential by the logits alone",
        description="Independent certificate in float64: true L1 error, objective, duality gap, margins, balance. "
        "Exit status: 0 when it holds, 1 when it does not.",
        epilog="example: sela verify logits.npy --labels labels.npy --potential potential.npy --json",
    )
    verify.add_argument("logits", help=".npy file, float [N, K]")
    verify.add_argument("--labels", help=".npy file, int [N] or [heads, N]; labels.npz; or a run folder")
    verify.add_argument("--head", type=int, default=0, help="which labels of several heads (default 0)")
    verify.add_argument("--potential", help=".npy file, float [K], nats")
    verify.add_argument("--prices", help=".npy file, float [K], nats, for the label gap (default: the potential)")
    verify.add_argument("--marginals", help=".npy file, float [K], wanted sizes or shares (default: equal)")
    verify.add_argument("--lam", type=float, default=25.0, help="lambda: sharpness (default 25)")
    verify.add_argument("--tol", type=float, default=1e-4, help="largest L1 error that holds (default 1e-4)")
    verify.add_argument("--balance", default="argmax", help="what labels must be: argmax of the plan, or exact sizes")
    verify.add_argument("--json", action="store_true", help="one JSON object on stdout")
    verify.set_defaults(run=_verify, parser=verify)

    _add_inference_commands(commands)
    _add_pack(commands)
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
    if arguments[:1] == ["finetune"]:
        from sela_ext.finetuning.options import FinetuneOptions

        _add_options(finetune, FinetuneOptions)
    finetune.set_defaults(run=_finetune, parser=finetune)

    report = commands.add_parser("report", help="write the report of a run again")
    report.add_argument("run_folder", help="run folder")
    report.set_defaults(run=_report, parser=report)

    doctor = commands.add_parser(
        "doctor",
        help="check images before training on them",
        description="Look at every image: bad files, duplicates, leakage between train and test, odd sizes, classes; "
        "measure how fast they load; say what training would choose and what memory it takes. Exit status: 0 if there "
        "are usable images, 3 if none can be read.",
        epilog="examples: sela doctor my/photos | sela doctor my/photos --out check.html --json check.json | "
        "sela doctor my/photos --quick",
    )
    doctor.add_argument("data", help='"digits", a folder of images, or any other file or folder that train takes')
    doctor.add_argument("--json", metavar="FILE", help="write the result as JSON, its keys as in docs/doctor.md")
    doctor.add_argument("--out", metavar="PAGE.html", help="write a page with charts and thumbnails")
    doctor.add_argument("--labels", help=".npy file of true labels, int [N], -1 = unknown")
    doctor.add_argument("--eval-data", help="held-out images to compare with (default: those beside the data)")
    doctor.add_argument("--threads", type=int, default=0, help="threads (default 0: all processors)")
    doctor.add_argument("--sample", type=int, metavar="N", help="look at N images only")
    doctor.add_argument("--quick", action="store_true", help="look at 2,000 images only")
    doctor.set_defaults(run=_doctor, parser=doctor)

    info = commands.add_parser("info", help="versions, instruction set, devices and their self-check")
    info.set_defaults(run=_info, parser=info)
    return parser


def _add_pack(commands: Any) -> None:
    pack = commands.add_parser(
        "pack",
        help="pack images into a few large files, with what makes reading them fast",
        description="Pack images into shards: the bytes of the files unchanged, and for JPEG files an index with which "
        "only the part of an image that is needed is decoded; or pixels, of small images. An interrupted packing goes "
        "on where it stopped. The pack's folder is then data like any other.",
        epilog="examples: sela pack my/photos --out packs/photos | "
        "sela pack my/photos --out packs/small --max-side 512 | sela pack --verify packs/photos",
    )
    pack.add_argument("data", nargs="?", help='"digits", a folder of images, IDX files, a .npy of uint8 images, ...')
    pack.add_argument("--out", help="folder of the pack; empty, absent or an unfinished pack unless --overwrite")
    pack.add_argument("--verify", metavar="PACK", help="read a whole pack and compare it with its checksums")
    pack.add_argument(
        "--labels", metavar="FILE", help="true labels to keep with the images: .npy file, int [N], or .csv"
    )
    pack.add_argument("--classes", metavar="FILE", help="text file with the name of a class per line: their numbers")
    pack.add_argument(
        "--raw",
        choices=("auto", "yes", "no"),
        default="auto",
        help="store pixels instead of files (default auto: for arrays and for small images of one size)",
    )
    pack.add_argument("--max-side", type=int, help="reduce images with a longer side than this (default: unchanged)")
    pack.add_argument(
        "--quality", type=int, default=90, help="of the JPEG files of reduced images, 1..100 (default 90)"
    )
    pack.add_argument(
        "--shard-bytes",
        type=_byte_count,
        metavar="BYTES",
        help="size at which a new shard begins, as 1000000, 500M or 2G (default 1G; no limit where all are raw)",
    )
    pack.add_argument(
        "--on-bad-image",
        choices=("raise", "skip"),
        default="raise",
        help="skip: the image keeps its number, has no bytes, and is listed in bad_images.csv (default raise)",
    )
    pack.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="share of images that may be skipped, 0..1 (default 0.01)"
    )
    pack.add_argument("--threads", type=int, help="threads (default: all processors); the bytes do not depend on it")
    pack.add_argument("--overwrite", action="store_true", help="delete a pack in the folder first")
    pack.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on where an interrupted packing stopped (the default)",
    )
    pack.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="a bar on a terminal (the default)"
    )
    pack.set_defaults(run=_pack, parser=pack)


def _add_options(parser: argparse.ArgumentParser, options: Any) -> None:
    """Add every field of a dataclass of options, dashes for underscores."""
    for spec in dataclasses.fields(options):
        meta = spec.metadata
        flag = "--" + spec.name.replace("_", "-")
        default = "" if spec.default is None else f" (default {spec.default})"
        text = (meta["help"] + default).replace("%", "%%")
        if meta["kind"] == "bool":
            parser.add_argument(
                flag, dest=spec.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        shown = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else meta["kind"].upper()
        parser.add_argument(
            flag, dest=spec.name, default=argparse.SUPPRESS, metavar=shown, help=text, type=_reader(spec)
        )


def _reader(spec: dataclasses.Field[Any]) -> Any:
    """How the text of an option becomes a value; what it cannot read stays text, for the option's own check."""
    kind = spec.metadata["kind"]

    def number(text: str) -> Any:
        for read in (int, float):
            try:
                return read(text)
            except ValueError:
                continue
        return text

    def numbers(text: str) -> Any:
        parts = [number(part) for part in text.split(",")]
        return parts if len(parts) > 1 else parts[0]

    if kind in ("int", "float"):
        return number
    if kind == "ints" or spec.name == "marginals":
        return numbers
    if spec.name in ("holdout", "devices"):
        return number
    return str


def _train(given: argparse.Namespace) -> int:
    from sela_ext.training import train

    options = {k: v for k, v in vars(given).items() if k not in ("command", "run", "parser", "data", "out")}
    train(given.data, out=given.out, **options)
    return 0


def _byte_count(text: str) -> int:
    """A number of bytes, in units of 1024: "500M"."""
    unit = text[-1:].upper()
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(unit, 1)
    try:
        return int(float(text[: -1 if scale > 1 else None]) * scale)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a number of bytes such as 1000000, 500M or 2G, found {text}"
        ) from error


def _finetune(given: argparse.Namespace) -> int:
    from sela_ext.finetuning import finetune

    own = ("command", "run", "parser", "backbone", "voc", "task", "out")
    options = {name: value for name, value in vars(given).items() if name not in own}
    finetune(given.backbone, voc=given.voc, task=given.task, out=given.out, **options)
    return 0


def _bounds(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected two numbers LOW,HIGH, found {text}") from error
    return low, high


def _assign(given: argparse.Namespace) -> int:
    import numpy as np

    from sela_ext.assign import FeatureLogits, assign

    def optional(path: str | None, what: str) -> Any:
        return None if path is None else np.asarray(_read_array(path, what))

    if given.bias is not None and given.weight is None:
        raise OptionError("--bias: expected --weight with it, found none")
    if given.weight is None:
        logits = _read_array(given.logits, "logits [N, K]")
    else:
        features = _read_array(given.logits, "features [N, D]")
        logits = FeatureLogits(features, optional(given.weight, "weights [K, D]"), optional(given.bias, "a bias [K]"))

    def show(entry: dict[str, float]) -> None:
        where = f" at lambda {entry['lam']:.3g} on {entry['rows']:,} rows" if "lam" in entry else ""
        read, error, seconds = entry["passes"], entry["error"], entry["seconds"]
        print(f"{read:8.2f} reads, error {error:.2e}{where}, {seconds:.2f} s", file=sys.stderr, flush=True)

    result = assign(
        logits,
        lam=given.lam,
        tol=given.tol,
        method=given.method,
        storage=given.storage,
        stop=given.stop,
        max_passes=given.max_passes,
        marginals=optional(given.marginals, "marginals [K]"),
        relax=given.relax,
        size_bounds=given.size_bounds,
        row_weights=optional(given.row_weights, "row weights [N]"),
        start=optional(given.start, "a potential [K]"),
        balance=given.balance,
        threads=given.threads,
        progress=show if given.progress else None,
    )
    _write_labels(given.out, result)
    if given.potential:
        with open(given.potential, "wb") as file:
            np.save(file, np.asarray(result.potential))
    state = "converged" if result.converged else "NOT converged"
    print(
        f"{logits.shape[0]:,} x {logits.shape[1]:,}: {state}, error {result.error:.2e} after {result.passes:.4g} "
        f"passes ({result.method}), {result.seconds:.2f} s; sizes {int(min(result.sizes))} to {int(max(result.sizes))}"
        + (f"; {result.masked:,} rows without a label" if result.masked else "")
        + f"; labels in {given.out}"
    )
    return 0


def _write_labels(path: str, result: Any) -> None:
    """Labels as a .npz with all of the result, as a .csv, or as a .npy whatever its name."""
    import numpy as np

    labels = np.asarray(result.labels)
    if path.endswith(".npz"):
        np.savez(
            path,
            labels=labels,
            potential=np.asarray(result.potential),
            sizes=np.asarray(result.sizes),
            **{name: getattr(result, name) for name in ("error", "objective", "converged", "passes", "lam", "method")},
        )
    elif path.endswith(".csv"):
        with open(path, "w", newline="") as table:
            table.write("index,label\n")
            table.writelines(f"{index},{label}\n" for index, label in enumerate(labels.tolist()))
    else:
        with open(path, "wb") as file:  # the name as given, with or without .npy
            np.save(file, labels)


def _read_array(path: str, what: str) -> Any:
    import numpy as np

    from sela_ext.errors import DataError

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: expected a .npy file of {what}: {error}") from error


def _read_labels(path: str, head: int) -> Any:
    """Labels [N] from a .npy file, or one head's from labels.npz or a run folder."""
    from pathlib import Path

    import numpy as np

    from sela_ext.errors import DataError

    file = Path(path) / "labels.npz" if Path(path).is_dir() else Path(path)
    if file.suffix != ".npz":
        labels = _read_array(path, "labels [N] or [heads, N]")
    else:
        try:
            with np.load(file, allow_pickle=False) as saved:
                labels = saved["labels"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"{file}: expected labels [heads, N]: {error}") from error
    if labels.ndim == 2:
        if not 0 <= head < len(labels):
            raise OptionError(f"--head: expected a number in 0 .. {len(labels) - 1}, found {head}")
        labels = labels[head]
    return labels


def _verify(given: argparse.Namespace) -> int:
    import numpy as np

    from sela_ext.assign import verify

    if given.balance not in ("argmax", "exact"):
        raise OptionError(f"--balance: expected argmax or exact, found {given.balance}")
    certificate = verify(
        _read_array(given.logits, "logits [N, K]"),
        labels=None if given.labels is None else _read_labels(given.labels, given.head),
        potential=None if given.potential is None else np.asarray(_read_array(given.potential, "a potential [K]")),
        prices=None if given.prices is None else np.asarray(_read_array(given.prices, "prices [K]")),
        marginals=None if given.marginals is None else np.asarray(_read_array(given.marginals, "marginals [K]")),
        lam=given.lam,
    )
    faults = certificate.faults(given.tol, balance=given.balance)
    found = certificate.as_dict()
    if given.json:
        print(json.dumps({**found, "faults": faults}))
    else:
        for name, value in found.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key}: {number:.4g}" for key, number in value.items())
            if value is not None:
                print(f"{name:18} {value:.10g}" if isinstance(value, float) else f"{name:18} {value}")
        print("\n".join(f"fault: {fault}" for fault in faults) or "the certificate holds")
    return 1 if faults else 0


def _pack(given: argparse.Namespace) -> int:
    from sela_ext.data import pack, verify_pack

    if given.verify is not None:
        if given.data is not None or given.out is not None:
            raise OptionError("--verify: expected nothing but a pack, found DATA or --out as well")
        report = verify_pack(given.verify, threads="auto" if given.threads is None else given.threads)
        print(f"{report}; all checksums match")
        return 0
    if given.data is None or given.out is None:
        raise OptionError("pack: expected DATA and --out, or --verify PACK; see sela pack --help")
    report = pack(
        given.data,
        given.out,
        labels=given.labels,
        classes=given.classes,
        raw="auto" if given.raw == "auto" else given.raw == "yes",
        max_side=given.max_side,
        quality=given.quality,
        shard_bytes=given.shard_bytes,
        on_bad_image=given.on_bad_image,
        max_bad_fraction=given.max_bad_fraction,
        overwrite=given.overwrite,
        resume=given.resume,
        threads="auto" if given.threads is None else given.threads,
        progress=given.progress,
    )
    print(report)
    return 0


def _report(given: argparse.Namespace) -> int:
    from pathlib import Path

    import numpy as np

    from sela_ext.data import open_source
    from sela_ext.errors import DataError
    from sela_ext.report import write_report

    folder = Path(given.run_folder)
    try:
        data = json.loads((folder / "options.json").read_text())["options"]["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: expected a run folder with options.json, found none that can be read") from error
    read_image = None
    try:
        source = open_source(data)
        with np.load(folder / "labels.npz", allow_pickle=False) as saved:
            same = saved["names"].tolist() == source.names
        if same:
            read_image = source.read
        else:
            print(f"the images cannot be shown: those in {data} are not the ones that were labelled")
    except (SelaError, OSError, ValueError, KeyError) as error:
        print(f"the images cannot be shown: {error}")
    print(write_report(folder, read_image))
    return 0


_SUBJECT = (
    "a run folder, one of its checkpoints, a file of released weights, NAME:WEIGHTS (resnet18:IMAGENET1K_V1, or "
    "resnet18:file.pth), random:NAME, or pixels"
)


def _add_inference_commands(commands: Any) -> None:
    """Add `evaluate`, `predict` and `embed`: what a trained network is used for."""
    evaluate = commands.add_parser(
        "evaluate",
        help="judge labels and features against true labels",
        description="Cluster metrics, nearest neighbours, linear probes, probes of every layer and learning from few "
        "labels, on labelled data sets. Published figures stand beside where they exist.",
        epilog="examples: sela evaluate runs/digits | sela evaluate random:small-resnet --data digits | "
        "sela evaluate alexnet.pth --data imagenet --data places --what knn,alexnet --crops 10 --json figures.json",
    )
    evaluate.add_argument("run_folder", metavar="run", help=_SUBJECT)
    evaluate.add_argument(
        "--data",
        action="append",
        help="labelled images, as for train; TRAIN::TEST names both parts; repeat it for several sets "
        "(default: those of the run)",
    )
    evaluate.add_argument(
        "--what",
        default="clusters,knn,linear",
        help="of clusters, knn, linear, layers (or alexnet), few-shot, with commas (default clusters,knn,linear)",
    )
    evaluate.add_argument("--json", metavar="FILE", help="write the whole report here; - is standard output")
    evaluate.add_argument(
        "--k",
        type=_numbers,
        default=None,
        help="neighbours, one or several (default 20,10,50,200; the first is the figure called knn)",
    )
    evaluate.add_argument("--sigma", type=float, default=0.1, help="temperature of the neighbours' votes (default 0.1)")
    evaluate.add_argument("--pca", type=int, help="principal directions that kNN sees (default: the features)")
    evaluate.add_argument("--probe", default="logistic", help="of linear: logistic, sgd or augmented")
    evaluate.add_argument("--schedule", help="of probes by SGD: resnet, resnet-146, alexnet or alexnet-paper")
    evaluate.add_argument("--epochs", type=int, help="stretch the schedule to so many")
    evaluate.add_argument("--crops", type=int, default=1, help="test views of the layers' probes: 1 or 10")
    evaluate.add_argument("--fractions", type=_shares, default=None, help="of the labels, few-shot (default 0.01,0.1)")
    evaluate.add_argument("--fine-tune", action="store_true", help="few-shot: train the whole network too")
    evaluate.add_argument("--seed", type=int, default=0, help="of random networks, probes, subsets (default 0)")
    evaluate.add_argument("--download", action="store_true", help="fetch torchvision's weights if they are not there")
    evaluate.add_argument("--no-progress", action="store_true", help="no bar")
    predict = commands.add_parser(
        "predict",
        help="label new images by a trained network",
        description="Labels by network and potentials, as in training: the balance of the training images is kept.",
        epilog="example: sela predict runs/photos --data new/photos --out labels.csv --head best",
    )
    predict.add_argument("run_folder", metavar="run", help="a run folder, a checkpoint, or released weights")
    predict.add_argument("--data", required=True, help="images, as for train")
    predict.add_argument("--out", required=True, help=".csv (index, name, label_0, ...), .npz (labels, names) or .npy")
    predict.add_argument("--head", help="best, or a number (default: all heads)")
    embed = commands.add_parser(
        "embed",
        help="features of images by a trained network",
        description="What the network's backbone gives in eval mode, without augmentation.",
        epilog="example: sela embed runs/photos --data new/photos --out features.npy",
    )
    embed.add_argument("run_folder", metavar="run", help=_SUBJECT)
    embed.add_argument("--data", required=True, help="images, as for train")
    embed.add_argument("--out", required=True, help=".npy (float32 [N, D]) or .npz (features, names)")
    for parser, action in ((evaluate, _evaluate), (predict, _predict), (embed, _embed)):
        parser.add_argument("--image-size", type=int, help="pixels (default: as in training; 224 for photographs)")
        parser.add_argument("--batch-size", type=int, default=256, help="images per forward pass (default 256)")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument("--precision", default="auto", help="auto (the run's), float32, bfloat16 or float16")
        parser.add_argument("--threads", type=int, default=0, help="processor threads (default 0: all)")
        parser.add_argument("--on-bad-image", default="raise", help="raise, or skip")
        parser.set_defaults(run=action, parser=parser)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas, found {text}") from error


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers with commas, found {text}") from error


def _network_options(given: argparse.Namespace) -> dict[str, Any]:
    names = ("image_size", "batch_size", "device", "precision", "threads", "on_bad_image")
    return {name: getattr(given, name) for name in names}


def _evaluate(given: argparse.Namespace) -> int:
    from sela_ext.inference import evaluate
    from sela_ext.inference.table import show_report

    several = {} if given.k is None else {"k": given.k}
    if given.fractions is not None:
        several["fractions"] = given.fractions
    to_stdout = given.json == "-"
    report = evaluate(
        given.run_folder,
        given.data,
        given.what,
        sigma=given.sigma,
        pca=given.pca,
        probe=given.probe,
        schedule=given.schedule,
        epochs=given.epochs,
        crops=given.crops,
        fine_tune=given.fine_tune,
        seed=given.seed,
        download=given.download,
        progress=not given.no_progress and not to_stdout,
        **several,
        **_network_options(given),
    )
    if to_stdout:
        print(json.dumps(report))
        return 0
    show_report(report)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
        print(f"all of it in {given.json}")
    return 0


def _predict(given: argparse.Namespace) -> int:
    import numpy as np

    from sela_ext.data import open_source
    from sela_ext.inference import predict

    head = given.head
    if head is not None and head != "best":
        try:
            head = int(head)
        except ValueError as error:
            raise OptionError(f"--head: expected best or a number, found {head}") from error
    source = open_source(given.data)
    labels = np.atleast_2d(predict(given.run_folder, source, head=head, **_network_options(given)))
    if given.out.endswith(".npz"):
        np.savez(given.out, labels=labels, names=np.asarray(source.names, dtype=np.str_))
    elif given.out.endswith(".csv"):
        import csv

        with open(given.out, "w", newline="", encoding="utf-8") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(["index", "name", *(f"label_{number}" for number in range(len(labels)))])
            writer.writerows([i, name, *labels[:, i].tolist()] for i, name in enumerate(source.names))
    else:
        with open(given.out, "wb") as file:
            np.save(file, labels if given.head is None else labels[0])
    skipped = int((labels[0] < 0).sum())
    print(
        f"{labels.shape[1]:,} images, labels of {len(labels)} heads in {given.out}"
        + (f"; {skipped:,} could not be read" if skipped else "")
    )
    return 0


def _embed(given: argparse.Namespace) -> int:
    import numpy as np

    from sela_ext.data import open_source
    from sela_ext.inference import embed

    source = open_source(given.data)
    features = embed(given.run_folder, source, **_network_options(given))
    if given.out.endswith(".npz"):
        np.savez(given.out, features=features, names=np.asarray(source.names, dtype=np.str_))
    else:
        with open(given.out, "wb") as file:
            np.save(file, features)
    print(f"{features.shape[0]:,} images, features of {features.shape[1]:,} numbers in {given.out}")
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from sela_ext.doctor import doctor
    from sela_ext.doctor.terminal import show
    from sela_ext.errors import DataError

    result = doctor(
        given.data,
        labels=given.labels,
        eval_data=given.eval_data,
        json=given.json,
        out=given.out,
        threads=given.threads,
        sample=given.sample,
        quick=given.quick,
        progress=True,
    )
    show(result, [file for file in (given.json, given.out) if file])
    if not result["usable"]:
        first = result["bad"]["images"][0]
        raise DataError(f"{given.data}: none of the images can be read: {first['name']}: {first['reason']}")
    return 0


def _info(given: argparse.Namespace) -> int:
    import torch

    from sela_ext import build_info
    from sela_ext.kernels import device_verdict

    for name, value in build_info().items():
        print(f"{name:13} {' '.join(value) if isinstance(value, list) else value}")
    print(f"{'torch':13} {torch.__version__}")
    print(f"{'threads':13} {torch.get_num_threads()}")
    for i in range(torch.cuda.device_count()):
        try:
            verdict = str(device_verdict(i))
        except SelaError as error:
            verdict = f"cuda:{i}: not checked: {error}"
        print(f"{'device':13} {verdict}")
    if torch.cuda.device_count() == 0:
        why = "" if torch.version.cuda else ": this torch is built without CUDA"
        print(f"{'device':13} no CUDA device{why}")
    return 0
