"""Hugging Face data sets: `datasets.Dataset` objects, their folders on disk, and parquet or Arrow files of that layout.

Nothing of that library is imported: a Dataset is known by what it offers, and its images are taken as the encoded bytes
that its Arrow table holds, which is a memory map where the data set lies on disk. Files need pyarrow, the extra
`sela_ext[huggingface]`.

Note [Columns of a data set]
    Images are the column of type Image (in a file without such a type: the one struct of `bytes` and `path`, or column
    `image` or `img` of bytes). Of several, the one named `image` or `img`; otherwise it is an error. Labels are the
    column of type ClassLabel, with its names; or else the integers in `label`, `labels`, `fine_label` or `cls`. Of
    several ClassLabel columns, the first of these names.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sela_ext.data.decode import decode_file, decode_image
from sela_ext.data.folder import EVAL_FOLDERS, find_files
from sela_ext.data.memory import free_memory
from sela_ext.data.messages import first_line
from sela_ext.data.source import Int64Array, Located, Source, UInt8Array
from sela_ext.errors import DataError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
FINGERPRINT_IMAGES = 10_000
PARQUET_MAGIC = b"PAR1"
# Older versions ran code that a file of extension types brought along (CVE-2023-47248).
OLDEST_PYARROW = (14, 0, 1)


class ArrowSource(Source):
    """Encoded images in an Arrow column: bytes in place, or paths of files."""

    kind = "huggingface"
    channels = 3

    def __init__(
        self,
        column: Any,
        *,
        rows: Int64Array | None = None,
        labels: Int64Array | None = None,
        class_names: list[str] | None = None,
        where: str = "data",
    ) -> None:
        self.class_names = class_names
        self._where = where
        self._chunks = [_Chunk(chunk) for chunk in column.chunks if len(chunk)]
        self._starts = [0, *itertools.accumulate(len(chunk) for chunk in self._chunks)]
        self._rows = rows
        self._labels = labels

    def __len__(self) -> int:
        return self._starts[-1] if self._rows is None else len(self._rows)

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        return [self.name(i) for i in range(len(self))]

    def name(self, index: int) -> str:
        """See `Source.name`: the row's number, and the file's name where the table holds one."""
        chunk, row, number = self._place(index)
        path = chunk.path(row)
        return f"{number:06d}" if not path else f"{number:06d}/{os.path.basename(path)}"

    @property
    def labels(self) -> Int64Array | None:
        """See `Source.labels`."""
        return self._labels

    @property
    def encoded(self) -> bool:
        """See `Source.encoded`."""
        return True

    def locate(self, index: int) -> Located:
        """See `Source.locate`."""
        chunk, row, number = self._place(index)
        data = chunk.bytes(row)
        if data is not None:
            return Located(data=data)
        path = chunk.path(row)
        if path:
            return Located(path=path)
        raise DataError(f"{self._where}: row {number}: expected the bytes of an image or a path, found neither")

    def read(self, index: int) -> UInt8Array:
        """See `Source.read`."""
        found = self.locate(index)
        if found.data is not None:
            return decode_image(bytes(found.data), f"{self._where}: row {self._place(index)[2]}")
        assert found.path is not None
        return decode_file(found.path, found.path)

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        digest = hashlib.sha256()
        for row in np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_IMAGES).astype(np.int64)):
            chunk, at, _ = self._place(int(row))
            data = chunk.bytes(at)
            digest.update(f"{-1 if data is None else len(data)},".encode())
        return {**super().fingerprint(), "file_sizes": digest.hexdigest()}

    def _place(self, index: int) -> tuple[_Chunk, int, int]:
        row = index if self._rows is None else int(self._rows[index])
        part = bisect_right(self._starts, row) - 1
        return self._chunks[part], row - self._starts[part], row


class _Chunk:
    """One piece of an image column: views of its buffers, without Python objects per row."""

    def __init__(self, chunk: Any) -> None:
        self._length = len(chunk)
        self._valid = None if chunk.null_count == 0 else chunk.is_valid().to_numpy(zero_copy_only=False)
        self._bytes = self._paths = None
        kinds = (
            {} if not _is_struct(chunk.type) else {chunk.type.field(i).name: i for i in range(chunk.type.num_fields)}
        )
        if kinds:
            # field() keeps the offset of a slice in mind, and leaves the validity of the struct itself out.
            if "bytes" in kinds:
                self._bytes = _Strings(chunk.field(kinds["bytes"]))
            if "path" in kinds:
                self._paths = _Strings(chunk.field(kinds["path"]))
        elif "binary" in str(chunk.type):
            self._bytes = _Strings(chunk)
        else:
            self._paths = _Strings(chunk)

    def __len__(self) -> int:
        return self._length

    def bytes(self, row: int) -> memoryview | None:
        """The encoded image, or None."""
        if self._bytes is None or (self._valid is not None and not self._valid[row]):
            return None
        return self._bytes[row]

    def path(self, row: int) -> str | None:
        """The path of its file, or None."""
        if self._paths is None or (self._valid is not None and not self._valid[row]):
            return None
        found = self._paths[row]
        return None if found is None else bytes(found).decode("utf-8", "surrogateescape")


class _Strings:
    """An Arrow array of strings of bytes or text as one view and where each begins."""

    def __init__(self, values: Any) -> None:
        kind = str(values.type)
        if kind not in ("binary", "string", "large_binary", "large_string"):
            values = values.cast("large_binary" if "binary" in kind else "large_string")
            kind = str(values.type)
        self._valid = None if values.null_count == 0 else values.is_valid().to_numpy(zero_copy_only=False)
        _, offsets, data = values.buffers()
        width = np.dtype(np.int64 if kind.startswith("large") else np.int32)
        begin = values.offset * width.itemsize
        self._starts = np.frombuffer(offsets, width, len(values) + 1, begin).data
        self._data = memoryview(b"") if data is None else memoryview(data).toreadonly()

    def __getitem__(self, row: int) -> memoryview | None:
        if self._valid is not None and not self._valid[row]:
            return None
        return self._data[self._starts[row] : self._starts[row + 1]]


def is_hf_dataset(data: Any) -> bool:
    """Whether an object is a `datasets.Dataset`, or a dict of them."""
    if isinstance(data, dict):
        return bool(data) and all(is_hf_dataset(value) for value in data.values())
    return all(hasattr(data, name) for name in ("features", "column_names", "cast_column", "data", "num_rows"))


def open_hf_dataset(data: Any, split: str = "train") -> ArrowSource | None:
    """Open a `datasets.Dataset`, or one of a `DatasetDict`.

    Args:
        data: The object; of a dict, "train" or its only one.
        split: "train"; or "test": "test" or "validation" of a dict.

    Returns:
        The images, encoded; None if there is no such split.

    Raises:
        DataError: No image column or no rows; see Note [Columns of a data set].
    """
    if isinstance(data, dict):
        words = EVAL_FOLDERS if split == "test" else ("train",)
        found = next((data[word] for word in words if word in data), None)
        if found is None and split == "train" and len(data) == 1:
            found = next(iter(data.values()))
        if found is None:
            if split == "test":
                return None
            raise DataError(f'data: expected a split "train", found {", ".join(map(str, data))}; choose one of them')
        data = found
    elif split == "test":
        return None
    kinds = {name: (type(feature).__name__, feature) for name, feature in data.features.items()}
    images = _one_of([name for name, (kind, _) in kinds.items() if kind == "Image"], IMAGE_COLUMNS, "image", kinds)
    classes = [name for name, (kind, _) in kinds.items() if kind == "ClassLabel"]
    label = _label_column(classes, list(kinds))
    names = list(kinds[label][1].names) if label in classes else None
    indices = getattr(data, "_indices", None)  # rows that were selected or shuffled
    rows = None if indices is None else indices.column(0).to_numpy().astype(np.int64)
    return _arrow_source(data.data, images, label, names, rows, "data")


def is_parquet(head: bytes) -> bool:
    """Whether a file begins like a parquet file."""
    return head.startswith(PARQUET_MAGIC)


def find_hf_folder(folder: Path, split: str = "train") -> list[Path] | None:
    """Files of a data set in a folder, or None.

    Either what `save_to_disk` writes: `state.json` and .arrow files, or a folder of these per split. Or .parquet files,
    see `find_files` of `sela_ext.data.folder`.
    """
    for place in (folder, folder / split, *(folder / word for word in EVAL_FOLDERS if split == "test")):
        if (place / "state.json").is_file() and (place / "dataset_info.json").is_file():
            return _saved_files(place) if place != folder or split == "train" else None
    return find_files(folder, ".parquet", split)


def open_hf_files(paths: Sequence[Path]) -> ArrowSource:
    """Open parquet files, or Arrow files as `save_to_disk` writes them (which are memory-mapped).

    Raises:
        DataError: pyarrow is missing or too old, a file that cannot be read, no image column, no rows, or parquet that
            takes more than half of the free memory.
    """
    arrow = _pyarrow(paths[0])
    try:
        table = arrow.concat_tables([_table(arrow, path, paths) for path in paths])
        table.validate()  # that lengths fit the buffers: an Arrow file is not checked when it is mapped
        return _from_table(table, str(paths[0]))
    except DataError:
        raise
    except Exception as error:  # damaged files: Arrow's own errors, and what follows from wrong lengths and names
        raise DataError(f"{paths[0]}: cannot be read: {first_line(error)}; download it again") from error


def _from_table(table: Any, where: str) -> ArrowSource:
    features = _features(table)
    kinds = {name: feature.get("_type", "") for name, feature in features.items()}
    typed = [name for name in table.column_names if kinds.get(name) == "Image"]
    if not typed:
        typed = [field.name for field in table.schema if _holds_images(field)]
    images = _one_of(typed, IMAGE_COLUMNS, "image", table.column_names)
    classes = [name for name in table.column_names if kinds.get(name) == "ClassLabel"]
    label = _label_column(classes, table.column_names)
    names = features[label].get("names") if label is not None and label in classes else None
    listed = list(map(str, names)) if isinstance(names, list) else None
    return _arrow_source(table, images, label, listed, None, where)


def _arrow_source(
    table: Any, images: str, label: str | None, names: list[str] | None, rows: Int64Array | None, where: str
) -> ArrowSource:
    if table.num_rows == 0 or (rows is not None and not len(rows)):
        raise DataError(f"{where}: expected at least one image, found an empty data set")
    labels = None if label is None else _labels(table.column(label), label, names, where)
    if labels is not None and rows is not None:
        labels = labels[rows]
    return ArrowSource(
        table.column(images), rows=rows, labels=labels, class_names=None if labels is None else names, where=where
    )


def _labels(column: Any, name: str, names: list[str] | None, where: str) -> Int64Array | None:
    if "int" not in str(column.type):
        return None
    values = column.fill_null(-1).to_numpy().astype(np.int64)
    most = len(names) if names is not None else 1 << 31
    if values.min() < -1 or values.max() >= most:
        raise DataError(
            f"{where}: expected labels in 0..{most - 1}, or -1 for unknown, in {name}, found {values.min()}.."
            f"{values.max()}"
        )
    found: Int64Array = values
    return found


def _one_of(found: Sequence[str], wanted: Sequence[str], what: str, columns: Any) -> str:
    if len(found) == 1:
        return found[0]
    named = [name for name in wanted if name in found]
    if named:
        return named[0]
    shown = ", ".join(map(str, columns))
    if found:
        raise DataError(
            f"data: expected one {what} column, found {', '.join(found)}; take the others out with select_columns"
        )
    raise DataError(f"data: expected a column of type Image, found the columns {shown}")


def _label_column(classes: Sequence[str], columns: Sequence[str]) -> str | None:
    named = [name for name in LABEL_COLUMNS if name in (classes or columns)]
    if named:
        return named[0]
    return classes[0] if len(classes) == 1 else None


def _features(table: Any) -> dict[str, dict[str, Any]]:
    """What the library wrote about the columns: {name: {"_type": ...}}."""
    try:
        found = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def _holds_images(field: Any) -> bool:
    if _is_struct(field.type):
        names = [field.type.field(i).name for i in range(field.type.num_fields)]
        return sorted(names) == ["bytes", "path"]
    return field.name in IMAGE_COLUMNS and str(field.type) in ("binary", "large_binary")


def _is_struct(kind: Any) -> bool:
    return str(kind).startswith("struct<")


def _table(arrow: Any, path: Path, paths: Sequence[Path]) -> Any:
    if path.suffix == ".arrow":
        source = arrow.memory_map(str(path))
        return arrow.ipc.open_stream(source).read_all()
    parquet = importlib.import_module("pyarrow.parquet")
    file = parquet.ParquetFile(path)
    size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
    free = free_memory()
    if size * len(paths) > free // 2:
        raise DataError(
            f"{path}: {len(paths)} parquet files of {size / 2**30:.1f} GiB are more than half of the free memory, "
            f"{free / 2**30:.1f} GiB; give datasets.load_dataset(...) instead, which lies in a memory map, or pack it"
        )
    return file.read()


def _saved_files(folder: Path) -> list[Path]:
    path = folder / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(path.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: expected the state of a saved data set: {error}") from error
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or not (folder / name).is_file():
            raise DataError(f"{path}: expected files of this folder, found {name!r}")
    if not names:
        raise DataError(f"{path}: expected at least one file, found none")
    if (json.loads(path.read_text(encoding="utf-8")).get("_indices_data_files")) is not None:
        raise DataError(f"{path}: expected rows in order, found indices; save it after flatten_indices()")
    return [folder / name for name in names]


def _pyarrow(path: Path) -> Any:
    try:
        arrow = importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError(
            f"{path}: expected pyarrow for files of this kind, found none; pip install 'sela_ext[huggingface]'"
        ) from error
    version = tuple(int(number) for number in re.findall(r"\d+", arrow.__version__)[:3])
    if version < OLDEST_PYARROW:
        raise DataError(
            f"{path}: expected pyarrow >= 14.0.1, which is safe on foreign files, found {arrow.__version__}"
        )
    return arrow
