"""The formats by name, and which one a file's name tells."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sela_ext.errors import OptionError
from sela_ext.export.destination import Exported, check_file, check_folder, write_bytes
from sela_ext.export.folders import write_folders
from sela_ext.export.labels import sizes_path, write_csv
from sela_ext.export.onnx_graph import write_onnx
from sela_ext.export.parquet import write_parquet
from sela_ext.export.request import Request
from sela_ext.export.state_dict import write_torchvision
from sela_ext.export.tensors import write_safetensors

FOLDERS = "folders"
# Suffixes of the files of each format; a file without any of them may hold any.
SUFFIXES = {
    "torchvision": (".pth", ".pt"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
    "csv": (".csv",),
    "parquet": (".parquet",),
    "npy": (".npy",),
    FOLDERS: (),
}


# Options that only some formats look at; elsewhere they would be ignored without a word.
_ONLY_FOR = {
    "embeddings": ("parquet",),
    "images": ("parquet",),
    "link": (FOLDERS,),
    "opset": ("onnx",),
    "head": ("torchvision", "safetensors", "onnx", "csv", "parquet", FOLDERS),
    "data": ("csv", "parquet", "npy", FOLDERS),
}


def format_of(path: Path) -> str | None:
    """The format that a file's suffix tells.

    Example:
        >>> format_of(Path("runs/x.onnx")), format_of(Path("runs/x"))
        ('onnx', None)
    """
    suffix = path.suffix.lower()
    return next((name for name, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def write(request: Request, out: str | os.PathLike[str], format: str, *, overwrite: bool = False) -> Exported:
    """Check where the export goes, then write it.

    Raises:
        OptionError: see `sela_ext.export`, as of the other errors.
    """
    path = Path(out).expanduser()
    if format not in SUFFIXES:
        raise OptionError(f"format: expected {', '.join(SUFFIXES)}, found {format!r}")
    _check_options(request, format)
    if format == FOLDERS:
        check_folder(path)
        return write_folders(path, request)
    told = format_of(path)
    if told is not None and told != format:
        raise OptionError(
            f"out: expected a file of format {format} ({', '.join(SUFFIXES[format])}), found {path.name}; say "
            f"format {told}, or name another file"
        )
    for file in (path, sizes_path(path)) if format == "csv" else (path,):
        check_file(file, overwrite=overwrite)
    return _WRITERS[format](path, request, overwrite=overwrite)


def _check_options(request: Request, format: str) -> None:
    """Refuse options that the format makes no use of.

    Raises:
        OptionError: there is one.
    """
    for spec in dataclasses.fields(request):
        formats = _ONLY_FOR.get(spec.name, (format,))
        value = getattr(request, spec.name)
        unset = value is None or value is False or (isinstance(value, (str, int)) and value == spec.default)
        if format not in formats and not unset:
            raise OptionError(
                f"{spec.name}: expected format {' or '.join(formats)} with it, found {format}; leave {spec.name} out, "
                "or write the other format too"
            )


def _csv(path: Path, request: Request, *, overwrite: bool) -> Exported:
    labels = request.labels("all")
    if not labels.heads:
        raise OptionError("head: expected a head whose labels are written, found none")
    return write_csv(path, labels, overwrite=overwrite)


def _npy(path: Path, request: Request, *, overwrite: bool) -> Exported:
    features = request.features
    buffer = io.BytesIO()
    np.save(buffer, features)
    write_bytes(path, buffer.getvalue(), overwrite=overwrite)
    count, width = features.shape
    lines = [f"{count:,} rows of {width:,} numbers, float32, in the order of {request.source.describe()}"]
    missing = int(np.isnan(features).any(1).sum())
    if missing:
        lines.append(f"{missing:,} rows are NaN: images that cannot be read")
    return Exported(path, "npy", lines, {"rows": count, "feature_dim": width})


_WRITERS: dict[str, Callable[..., Exported]] = {
    "torchvision": write_torchvision,
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "csv": _csv,
    "parquet": write_parquet,
    "npy": _npy,
}
