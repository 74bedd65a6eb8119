"""Where the events of a run go beside metrics.jsonl: a table, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import math
import re
import secrets
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sela_ext.errors import OptionError, one_line
from sela_ext.training.checkpoint import write_atomically, writing

Event = Mapping[str, Any]

# Columns of metrics.csv in front of those per head; values that an event lacks are left empty. As in metrics.jsonl,
# what depends on the clock has "seconds", "per_second" or "wait" in its name.
COLUMNS = (
    "event", "step", "epoch", "pass", "loss", "ln_k", "lr", "changed", "cross_entropy", "error", "converged", "masked",
    "spread", "head", "nmi", "ami", "ari", "accuracy", "purity", "knn", "linear", "used", "size_min", "size_max",
    "images_per_second", "run_images_per_second", "data_wait_share", "run_data_wait_share", "interval_seconds",
    "solve_seconds", "wait_seconds", "elapsed_seconds",
)  # fmt: skip
# What Markdown would not show as it is: images and links, say.
_MARKDOWN = re.compile(r"[\\`*_\[\]!|~]")
# What has a column for every head: changed_0, changed_1, ...
PER_HEAD = ("changed", "cross_entropy", "nmi")


class Output(Protocol):
    """Something that takes every event of a run."""

    def record(self, event: Event) -> None:
        """Take an event; its numbers are finite or None."""

    def close(self, status: int) -> None:
        """Finish; status 0 = the run came to its end."""


class CsvTable:
    """metrics.csv: a row per event, the same columns in every row.

    Args:
        path: the file.
        heads: number of heads.

    A value without a column, such as one that only a certain method records, gets one behind the others; the table is
    then written anew.
    """

    def __init__(self, path: Path, heads: int) -> None:
        self._path = path
        self._columns = [*COLUMNS, *(f"{name}_{head}" for name in PER_HEAD for head in range(heads))]
        self._file: io.TextIOWrapper | None = None

    def open(self, events: Iterable[Event]) -> None:
        """Begin with the events that a resumed run keeps."""
        rows = [flat(event) for event in events]
        for row in rows:
            self._widen(row)
        self._rewrite(rows)

    def record(self, event: Event) -> None:
        """Append a row."""
        row = flat(event)
        if self._widen(row):
            self.close()
            with open(self._path, encoding="utf-8", newline="") as file:
                self._rewrite([*csv.DictReader(file), row])
            return
        assert self._file is not None
        with writing(self._path):
            self._file.write(self._text([row]))
            self._file.flush()

    def close(self, status: int = 0) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _widen(self, row: Mapping[str, Any]) -> bool:
        new = [name for name in row if name not in self._columns]
        self._columns += new
        return bool(new)

    def _text(self, rows: Sequence[Mapping[str, Any]], *, header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.close()
        write_atomically(self._path, self._text(rows, header=True).encode())
        self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - open for the whole run


def flat(event: Event) -> dict[str, Any]:
    """An event as a row: its plain values, and what PER_HEAD names of its heads.

    A label pass has no values of its own about labels; it gets those of its heads: the mean of what changed, the lowest
    cross-entropy with its ln K, the largest error of the solver, and whether all heads converged.

    Example:
        >>> heads = [{"head": 0, "changed": 0.5, "cross_entropy": 2.0, "ln_k": 2.3, "error": 1e-3, "converged": True}]
        >>> flat({"event": "label_pass", "heads": heads})["changed_0"]
        0.5
    """
    row = {name: value for name, value in event.items() if isinstance(value, (bool, int, float, str))}
    heads = [head for head in event.get("heads", ()) if isinstance(head, Mapping)]
    if event.get("event") == "label_pass" and heads:
        changed = [head["changed"] for head in heads if head.get("changed") is not None]
        known = [head for head in heads if head.get("cross_entropy") is not None]
        errors = [head["error"] for head in heads if head.get("error") is not None]
        if changed:
            row["changed"] = math.fsum(changed) / len(changed)
        if known:
            best = min(known, key=lambda head: float(head["cross_entropy"]))
            row.update({name: best[name] for name in ("cross_entropy", "ln_k", "nmi") if best.get(name) is not None})
        if errors:
            row["error"] = max(errors)
        row["converged"] = all(head.get("converged", True) for head in heads)
    for head in heads:
        for name in PER_HEAD:
            if head.get(name) is not None:
                row[f"{name}_{head['head']}"] = head[name]
    return {name: int(value) if isinstance(value, bool) else value for name, value in row.items()}


class TensorBoard:
    """Curves of every number and of every head, and the options as text.

    Args:
        folder: for the event files.
        purge_step: what earlier sessions wrote from this step on is not shown.
        texts: title -> text in Markdown, at step 0.

    Its library takes no path that is not UTF-8: then there are no curves, and a warning says so.
    """

    def __init__(self, folder: Path, purge_step: int | None, texts: Mapping[str, str]) -> None:
        self._writer: Any = None
        self._folder: Path | None = None
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            warnings.warn(
                f"no curves for TensorBoard, which takes no path but UTF-8: {one_line(str(folder))}", stacklevel=2
            )
            return
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        # Events are written by a thread: what fails there is told to whoever calls next, and need not be printed too.
        self._hook = threading.excepthook
        threading.excepthook = self._pass_over
        try:
            with writing(folder):
                self._writer = SummaryWriter(str(folder), purge_step=purge_step)
                for title, text in texts.items():
                    self._writer.add_text(title, text.encode("utf-8", "backslashreplace").decode())
        except BaseException:
            self.close(status=1)
            raise

    def record(self, event: Event) -> None:
        """Add the numbers of an event."""
        if self._writer is None or self._folder is None:
            return
        step = int(event["step"])
        with writing(self._folder):
            for name, value in _curves(event).items():
                self._writer.add_scalar(name, value, step)

    def close(self, status: int = 0) -> None:
        """Write what is left; of a run that failed already, as far as possible."""
        if self._folder is None:
            return
        try:
            with contextlib.suppress(OSError) if status else writing(self._folder):
                if self._writer is not None:
                    self._writer.close()
        finally:
            if threading.excepthook == self._pass_over:
                threading.excepthook = self._hook

    def _pass_over(self, failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and "tensorboard" in type(failed.thread).__module__):
            self._hook(failed)


class WeightsAndBiases:
    """The same curves in a project of Weights & Biases, or in its files where it works offline (WANDB_MODE=offline).

    Args:
        project: its name.
        folder: the run folder; the run has its name, and its files lie in `wandb/` there.
        options: of the run.
        resumed: go on with the run that this folder knows.

    Raises:
        OptionError: the package is not installed, or the service does not take the run.
    """

    def __init__(self, project: str, folder: Path, options: Mapping[str, Any], *, resumed: bool) -> None:
        self._wandb = import_wandb()
        where = folder / "wandb"
        where.mkdir(exist_ok=True)
        name = where / "run_id"
        if not (resumed and name.is_file()):
            write_atomically(name, secrets.token_hex(8).encode())
        try:
            self._run: Any = self._wandb.init(
                project=project,
                name=folder.name,
                dir=str(folder),
                config=dict(options),
                id=name.read_text(),
                resume="allow",
            )
        except Exception as error:  # of the service: nobody logged in, no network, a project of somebody else
            told = " ".join(str(error).split()) or type(error).__name__
            raise OptionError(
                f"wandb: expected that a run can begin in the project {project}, found: {told}; run `wandb login`, set "
                "WANDB_MODE=offline, or leave the option out"
            ) from error
        # Resumed runs go back to their checkpoint, which the service's own counter of steps cannot.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def record(self, event: Event) -> None:
        """Log the numbers of an event."""
        self._run.log({**_curves(event), "step": int(event["step"])})
        if event.get("event") == "end":
            self._run.summary.update(
                {name: value for name, value in event.items() if isinstance(value, (int, float)) and name != "step"}
            )

    def close(self, status: int = 0) -> None:
        """Finish the run."""
        self._run.finish(exit_code=status)


def import_wandb() -> Any:
    """The package of Weights & Biases.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise OptionError(
            "wandb: expected the package wandb, which is not installed; pip install 'sela_ext[wandb]', or leave the "
            "option out"
        ) from error
    return wandb


def markdown_table(values: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Options as a table that TensorBoard shows: name, value, and why."""

    def cell(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return _MARKDOWN.sub(r"\\\g<0>", html.escape(" ".join(text[:300].split()), quote=False))

    lines = ["| option | value | why |", "|---|---|---|"]
    return "\n".join(lines + [f"| {n} | {cell(v)} | {cell(reasons.get(n, ''))} |" for n, v in values.items()])


def _curves(event: Event) -> dict[str, float]:
    kind = event["event"]
    found = {
        f"{kind}/{name}": value
        for name, value in event.items()
        if isinstance(value, (int, float)) and name not in ("step", "event")
    }
    for head in event.get("heads", ()):
        for name in ("cross_entropy", "changed", "error", "nmi"):
            if head.get(name) is not None:
                found[f"{kind}/head{head['head']}/{name}"] = head[name]
    return found
