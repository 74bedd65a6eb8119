"""The folder that a run writes: options, log, metrics, checkpoints, labels, network, report."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import io
import json
import math
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sela_ext.data.csv_file import csv_writer
from sela_ext.data.memory import free_memory
from sela_ext.data.safe_files import read_json
from sela_ext.errors import CheckpointError, OptionError, ResourceError, one_line, shown
from sela_ext.report.metrics import read_metrics
from sela_ext.report.overview import Overview
from sela_ext.training import faults
from sela_ext.training.checkpoint import write_atomically, writing
from sela_ext.training.run_lock import NAMES as LOCKS

# Everything that a run writes: what overwrite may delete.
_FILES = (
    "options.json",
    "train.log",
    "metrics.jsonl",
    "metrics.csv",
    "labels.csv",
    "labels.npz",
    "network.pt",
    "bad_images.csv",
    "report.npz",
    "report.html",
)
_FOLDERS = ("checkpoints", "tensorboard", "index", "wandb")
# What a kill in the middle of writing may leave.
_PARTIAL = (".writable", *(f"{name}.partial" for name in _FILES))
_PARTIAL_REPORTS = ".report-*.tmp"  # of earlier versions
_DELETED = "checkpoints.partial"  # on their way out


class RunFolder:
    """Paths and writers of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.index = path / "index"
        self._metrics: io.TextIOWrapper | None = None
        self._log: io.TextIOWrapper | None = None

    @staticmethod
    def check(out: str | os.PathLike[str], *, resume: bool, overwrite: bool, data: Any) -> RunFolder:
        """Check that a run may write here; nothing is made or deleted yet.

        Raises:
            OptionError: it is a file, holds the data, or holds something while neither resume nor overwrite is set.
        """
        if isinstance(out, (str, os.PathLike)) and not os.fspath(out):  # a variable of the shell that is not set
            raise OptionError('out: expected a folder, found an empty path; give "." for this folder')
        try:
            path = Path(out).expanduser()
            if "\0" in str(path):
                raise ValueError("a name cannot hold a null byte")
            found = sorted(entry.name for entry in path.iterdir() if entry.name not in LOCKS) if path.is_dir() else []
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.stat()
            is_file = path.exists() and not path.is_dir()
        except (OSError, ValueError, TypeError, RuntimeError) as error:  # too long, a NUL in it, no path, ~nobody
            reason = error.strerror if isinstance(error, OSError) else error
            raise OptionError(f"out: expected a folder, found {shown(out)}: {reason}; name another") from error
        builtin = isinstance(data, str) and data == "digits"  # whatever else is called so
        if isinstance(data, (str, os.PathLike)) and not builtin and os.path.exists(data):
            folder, source = path.resolve(), Path(data).resolve()
            if folder == source or folder in source.parents:
                raise OptionError(
                    f"out: expected a folder of its own, found {path}, which holds the data; name another"
                )
        if is_file:
            raise OptionError(f"out: expected a folder, found the file {path}; name another")
        if path.is_dir() and resume:
            _refuse_links(path)
        if found and not resume:
            if not overwrite:
                raise OptionError(
                    f"out: expected an empty or absent folder, found {path} with {len(found)} entries; "
                    "set resume to continue the run in it, overwrite to replace it, or name another"
                )
            ours = {*_FILES, *_PARTIAL, *_FOLDERS, _DELETED}
            foreign = [name for name in found if name not in ours and not fnmatch.fnmatch(name, _PARTIAL_REPORTS)]
            if foreign:
                raise OptionError(
                    f"overwrite: expected nothing but a run in {path}, found {', '.join(foreign[:3])}; "
                    "nothing was deleted; name another folder"
                )
        return RunFolder(path)

    def create(self) -> None:
        """Make the folder.

        Raises:
            ResourceError: it cannot be written.
        """
        with self._in_words():
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass

    def clear(self, *, overwrite: bool) -> None:
        """Remove what a kill left half written; with overwrite, the run that the folder holds. The lock stays.

        Raises:
            ResourceError: it cannot be written.
        """
        with self._in_words():
            for stale in (*(self.path / name for name in _PARTIAL), *self.path.glob(_PARTIAL_REPORTS)):
                stale.unlink(missing_ok=True)
            _delete_folder(self.path / _DELETED)
            if overwrite:
                # Checkpoints first, and all at once: a kill must leave nothing that a resume would go on with.
                if self.checkpoints.is_dir() and not self.checkpoints.is_symlink():
                    os.rename(self.checkpoints, self.path / _DELETED)
                for name in (_DELETED, *_FOLDERS):
                    _delete_folder(self.path / name)
                    faults.at("overwriting")
                for name in _FILES:
                    (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(f"out: cannot write in {self.path}: {error.strerror}; name another folder") from error

    def write_options(self, content: Mapping[str, Any]) -> None:
        """Write options.json."""
        text = json.dumps(describe_value(content), indent=2)
        write_atomically(self.path / "options.json", text.encode())

    def read_options(self) -> dict[str, Any] | None:
        """Read options.json; None where it is absent.

        Raises:
            CheckpointError: it is not what a run writes.
        """
        try:
            content = read_json(self.path / "options.json")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / 'options.json'}: expected the options of a run: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.path / 'options.json'}: expected the options of a run, found another value")
        return content

    def open_logs(self, metrics_length: int = 0) -> None:
        """Open the logs, metrics.jsonl cut back to where the checkpoint left it.

        Args:
            metrics_length: bytes of metrics.jsonl that stay.
        """
        path, log = self.path / "metrics.jsonl", self.path / "train.log"
        with writing(path):
            path.touch()
            with open(path, "rb") as file:
                kept = file.read(metrics_length)
            faults.at("before log is cut")
            os.truncate(path, kept.rfind(b"\n") + 1)  # a line that lost its end would swallow the next one
            faults.at("after log is cut")
            self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        with writing(log):
            # Names of files need not be UTF-8.
            self._log = open(log, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            if self._log.tell() and not log.read_bytes().endswith(b"\n"):
                self._log.write("\n")
                self._log.flush()

    def metrics_length(self) -> int:
        """Bytes of metrics.jsonl so far; they are on the disk, as the checkpoint that counts on them will be."""
        assert self._metrics is not None
        with writing(self.path / "metrics.jsonl"):
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        return (self.path / "metrics.jsonl").stat().st_size

    def log(self, line: str) -> None:
        """Append a line to train.log."""
        if self._log is not None:
            with writing(self.path / "train.log"):
                self._log.write(time.strftime("%Y-%m-%d %H:%M:%S ") + one_line(line) + "\n")
                self._log.flush()

    def record(self, event: Mapping[str, Any]) -> None:
        """Append an object to metrics.jsonl. Values that are not finite become null."""
        assert self._metrics is not None
        with writing(self.path / "metrics.jsonl"):
            self._metrics.write(json.dumps(finite(event), allow_nan=False) + "\n")
            self._metrics.flush()

    def recorded(self) -> list[dict[str, Any]]:
        """The events in metrics.jsonl; a line that something else damaged is passed over, and train.log says so."""
        found = read_metrics(self.path / "metrics.jsonl")
        if found.unreadable:
            self.log(f"metrics.jsonl: lines that cannot be read: {found.unreadable}; the run goes on without them")
        return [dict(event) for event in found.events]

    def write_labels(self, labels: NDArray[np.int32], confidence: NDArray[np.float32], names: Sequence[str]) -> None:
        """Write labels.npz and labels.csv.

        Args:
            labels: [heads, N]; -1 = skipped image.
            confidence: [heads, N], in [0, 1].
            names: of the N images.
        """
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"labels": labels, "confidence": confidence}
        needed, free = 4 * len(names) * max(map(len, names), default=0), free_memory()
        if needed <= free // 4:  # every name takes as much as the longest
            arrays["names"] = np.asarray(names, dtype=np.str_)
        else:
            self.log(f"labels.npz has no names, which would take {needed:,} bytes of {free:,}: see labels.csv")
        np.savez_compressed(buffer, **arrays)
        write_atomically(self.path / "labels.npz", buffer.getbuffer())
        text = io.StringIO(newline="")
        writer = csv_writer(text)
        heads = range(len(labels))
        writer.writerow(["index", "name", *(f"label_{h}" for h in heads), *(f"confidence_{h}" for h in heads)])
        shown = np.char.mod("%.4f", confidence)
        for i, name in enumerate(names):
            writer.writerow([i, name, *labels[:, i].tolist(), *shown[:, i].tolist()])
        write_atomically(self.path / "labels.csv", text.getvalue().encode("utf-8", "backslashreplace"))

    def write_bad_images(self, bad: Sequence[tuple[int, str, str]]) -> None:
        """Write bad_images.csv (index, name, reason), where there are any."""
        if not bad:
            return
        text = io.StringIO(newline="")
        writer = csv_writer(text)
        writer.writerow(["index", "name", "reason"])
        writer.writerows(sorted(set(bad)))
        write_atomically(self.path / "bad_images.csv", text.getvalue().encode("utf-8", "backslashreplace"))

    def write_overview(self, overview: Overview | None) -> None:
        """Write report.npz, what the report shows beside labels and log; nothing where there is none."""
        if overview is not None:
            write_atomically(self.path / "report.npz", overview.to_bytes())

    def close(self) -> None:
        """Close the logs."""
        for file in (self._metrics, self._log):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        self._metrics = self._log = None


def _delete_folder(path: Path) -> None:
    """Delete a folder that may not be there; of a link to a folder elsewhere the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _refuse_links(folder: Path) -> None:
    """Refuse to continue a run whose files are links, or pipes: it would write to, or wait for, something else.

    Raises:
        OptionError: names the first.
    """
    for names, expected, what in ((_FILES, stat.S_ISREG, "file"), (_FOLDERS, stat.S_ISDIR, "folder")):
        for name in names:
            try:
                mode = os.lstat(folder / name).st_mode
            except FileNotFoundError:
                continue
            if not expected(mode):
                found = "a link" if stat.S_ISLNK(mode) else "something else"
                raise OptionError(
                    f"resume: expected {name} in {folder} to be a {what}, found {found}; put the {what} itself there "
                    "(out may be a link to a folder elsewhere)"
                )


# Lists and arrays longer than this are described by length and checksum.
_LONG = 1000


def describe_value(value: Any) -> Any:
    """Make an option's value JSON: numbers and short lists as they are, data by length and checksum, code by name."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, np.generic):
        return describe_value(value.item())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray):
        if value.ndim == 1 and value.size <= _LONG and value.dtype.kind in "biuf":
            return describe_value(value.tolist())
        checksum = zlib.crc32(np.ascontiguousarray(value[:_LONG]).tobytes()) if value.dtype.kind in "biuf" else 0
        return f"array {value.dtype} {list(value.shape)}, checksum of its first rows {checksum:08x}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {spec.name: describe_value(getattr(value, spec.name)) for spec in dataclasses.fields(value)}
        return {type(value).__name__: parts}
    if isinstance(value, Mapping):
        return {str(key): describe_value(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) <= _LONG:
            return [describe_value(one) for one in value]
        checksum = zlib.crc32("\0".join(map(str, value)).encode("utf-8", "surrogatepass"))
        return f"{type(value).__name__} of {len(value)}, checksum {checksum:08x}"
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def finite(value: Any) -> Any:
    """Values as JSON has them: numbers of numpy as plain ones, those that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
