"""The command line: `sela train`, `sela assign`, `sela verify`, `sela report`, `sela doctor`, `sela info`."""

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
    print(f"sela: error: {' '.join(message.split())}", file=sys.stderr)


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
        _add_train_options(train)
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


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of `Options`, dashes for underscores."""
    from sela_ext.training.options import Options

    for spec in dataclasses.fields(Options):
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
