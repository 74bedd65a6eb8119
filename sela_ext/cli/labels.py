"""`sela assign` and `sela verify`: labels from files of logits."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sela_ext.cli.parser import check_can_write, result_file, result_table
from sela_ext.errors import OptionError


def add_commands(commands: Any) -> None:
    """Add `assign` and `verify`."""
    _add_assign(commands)
    _add_verify(commands)


def _add_assign(commands: Any) -> None:
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


def _add_verify(commands: Any) -> None:
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

    check_can_write(given.out, "--out")
    if given.potential:
        check_can_write(given.potential, "--potential")

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
        with result_file(given.potential) as file:
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
    if path.endswith(".csv"):
        with result_table(path) as table:
            table.write("index,label\n")
            table.writelines(f"{index},{label}\n" for index, label in enumerate(labels.tolist()))
        return
    with result_file(path) as file:  # the name as given, with or without .npy
        if path.endswith(".npz"):
            names = ("error", "objective", "converged", "passes", "lam", "method")
            found = {name: getattr(result, name) for name in names}
            potential, sizes = np.asarray(result.potential), np.asarray(result.sizes)
            np.savez(file, labels=labels, potential=potential, sizes=sizes, **found)
        else:
            np.save(file, labels)


def _read_array(path: str, what: str) -> Any:
    from sela_ext.data.npy import map_npy

    return map_npy(path, f"a .npy file of {what}")


def _read_labels(path: str, head: int) -> Any:
    """Labels [N] from a .npy file, or one head's from labels.npz or a run folder."""
    from pathlib import Path

    from sela_ext.data.npz import read_arrays

    file = Path(path) / "labels.npz" if Path(path).is_dir() else Path(path)
    if file.suffix != ".npz":
        labels = _read_array(path, "labels [N] or [heads, N]")
    else:
        labels = read_arrays(file, ["labels"], "labels [heads, N]", needed="labels")["labels"]
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
