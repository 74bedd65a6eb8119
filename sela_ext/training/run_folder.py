"""The folder that a run writes: options, log, metrics, checkpoints, labels, network, report."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sela_ext.errors import OptionError, ResourceError
from sela_ext.report.metrics import read_metrics
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
    "report.html",
)
_FOLDERS = ("checkpoints", "tensorboard", "index", "wandb")
# What a kill in the middle of writing may leave.
_PARTIAL = (".writable", *LOCKS, *(f"{name}.partial" for name in _FILES))
# What is removed when a run begins: not the lock, which this process holds by then.
_LEFT = tuple(name for name in _PARTIAL if name not in LOCKS)


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
        path = Path(out).expanduser()
        if isinstance(data, (str, os.PathLike)) and os.path.exists(data):
            folder, source = path.resolve(), Path(data).resolve()
            if folder == source or folder in source.parents:
                raise OptionError(
                    f"out: expected a folder of its own, found {path}, which holds the data; name another"
                )
        if path.exists() and not path.is_dir():
            raise OptionError(f"out: expected a folder, found the file {path}; name another")
        entries = [entry.name for entry in path.iterdir() if entry.name not in LOCKS] if path.is_dir() else []
        if entries and not resume:
            if not overwrite:
                raise OptionError(
                    f"out: expected an empty or absent folder, found {path} with {len(entries)} entries; "
                    "set resume to continue the run in it, overwrite to replace it, or name another"
                )
            foreign = sorted({*entries} - {*_FILES, *_PARTIAL, *_FOLDERS})
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
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()

    def clear(self, *, overwrite: bool) -> None:
        """Remove what a kill left half written; with overwrite, the run that the folder holds.

        Raises:
            ResourceError: it cannot be written.
        """
        with self._in_words():
            for name in (*_LEFT, *(_FILES if overwrite else ())):
                (self.path / name).unlink(missing_ok=True)
            if overwrite:
                for name in _FOLDERS:
                    shutil.rmtree(self.path / name, ignore_errors=True)

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
        """Read options.json; None where it is absent."""
        try:
            content: dict[str, Any] = json.loads((self.path / "options.json").read_text())
        except FileNotFoundError:
            return None
        return content

    def open_logs(self, metrics_length: int = 0) -> None:
        """Open the logs, metrics.jsonl cut back to where the checkpoint left it.

        Args:
            metrics_length: bytes of metrics.jsonl that stay.
        """
        path = self.path / "metrics.jsonl"
        path.touch()
        kept = path.read_bytes()[:metrics_length]
        os.truncate(path, kept.rfind(b"\n") + 1)  # a line that lost its end would swallow the next one
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        self._log = open(self.path / "train.log", "a", encoding="utf-8")  # noqa: SIM115

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
                self._log.write(time.strftime("%Y-%m-%d %H:%M:%S ") + line + "\n")
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
        np.savez_compressed(buffer, labels=labels, confidence=confidence, names=np.asarray(names, dtype=np.str_))
        write_atomically(self.path / "labels.npz", buffer.getbuffer())
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        heads = range(len(labels))
        writer.writerow(["index", "name", *(f"label_{h}" for h in heads), *(f"confidence_{h}" for h in heads)])
        shown = np.char.mod("%.4f", confidence)
        for i, name in enumerate(names):
            writer.writerow([i, name, *labels[:, i].tolist(), *shown[:, i].tolist()])
        write_atomically(self.path / "labels.csv", text.getvalue().encode())

    def write_bad_images(self, bad: Sequence[tuple[int, str, str]]) -> None:
        """Write bad_images.csv (index, name, reason), where there are any."""
        if not bad:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["index", "name", "reason"])
        writer.writerows(sorted(set(bad)))
        write_atomically(self.path / "bad_images.csv", text.getvalue().encode())

    def close(self) -> None:
        """Close the logs."""
        for file in (self._metrics, self._log):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        self._metrics = self._log = None


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
