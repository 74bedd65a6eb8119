"""Labels, features and images as a parquet file, with what the Hugging Face library wants to know of its columns."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sela_ext.data import Source
from sela_ext.data.messages import first_line
from sela_ext.errors import DataError
from sela_ext.export.destination import Exported, new_file
from sela_ext.export.labels import Labels
from sela_ext.export.optional import optional_package
from sela_ext.export.request import Request

# Rows that are written at once: the library reads whole groups, and images need memory.
_ROWS, _IMAGE_ROWS = 65_536, 256


def write_parquet(path: Path, request: Request, *, overwrite: bool) -> Exported:
    """Write a row per image.

    Columns: index, name; label and confidence, with a number behind them if there are several heads; embedding, a list
    of D numbers, and image, the encoded file, on request.

    Raises:
        OptionError: pyarrow is not installed, or a file that is there.
        DataError: embeddings of another shape, or images that are not there.
    """
    arrow = optional_package("pyarrow", "parquet", 'format "parquet"')
    parquet = optional_package("pyarrow.parquet", "parquet", 'format "parquet"')
    labels = request.labels("all")
    count = len(labels.names)
    features = _embeddings(request, count)
    source = request.source if request.images else None
    fields: list[tuple[str, Any, dict[str, Any]]] = [
        ("index", arrow.int64(), {"dtype": "int64", "_type": "Value"}),
        ("name", arrow.string(), {"dtype": "string", "_type": "Value"}),
    ]
    columns: list[Any] = [np.arange(count), labels.names]
    for name, values in labels.columns():
        kind = "float32" if values.dtype.kind == "f" else "int32"
        fields.append((name, getattr(arrow, kind)(), {"dtype": kind, "_type": "Value"}))
        columns.append(values)
    if features is not None:
        width = features.shape[1]
        listed = {"feature": {"dtype": "float32", "_type": "Value"}, "length": width, "_type": "Sequence"}
        fields.append(("embedding", arrow.list_(arrow.float32(), width), listed))
    if source is not None:
        encoded = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        fields.append(("image", encoded, {"_type": "Image"}))
    told = {
        "huggingface": json.dumps({"info": {"features": {name: shown for name, _, shown in fields}}}),
        "sela": json.dumps(
            {
                "heads": labels.heads,
                "clusters": labels.clusters,
                "sizes": [labels.sizes(row).tolist() for row in range(len(labels.heads))],
            }
        ),
    }
    schema = arrow.schema([(name, kind) for name, kind, _ in fields]).with_metadata(told)
    step = _ROWS if source is None else _IMAGE_ROWS
    with new_file(path, overwrite=overwrite) as partial, parquet.ParquetWriter(str(partial), schema) as writer:
        for start in range(0, count, step):
            stop = min(count, start + step)
            parts = [column[start:stop] for column in columns]
            arrays = [arrow.array(part, kind) for part, (_, kind, _) in zip(parts, fields, strict=False)]
            if features is not None:
                flat = arrow.array(np.ascontiguousarray(features[start:stop], np.float32).ravel())
                arrays.append(arrow.FixedSizeListArray.from_arrays(flat, features.shape[1]))
            if source is not None:
                rows = [_image(source, labels, row, request.on_bad_image) for row in range(start, stop)]
                arrays.append(arrow.array(rows, fields[-1][1]))
            writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))
    names = [name for name, _, _ in fields]
    facts = {"heads": labels.heads, "clusters": labels.clusters, "rows": count, "columns": names}
    return Exported(path, "parquet", [*labels.told(), f"columns: {', '.join(names)}"], facts)


def _embeddings(request: Request, count: int) -> NDArray[Any] | None:
    """Features to write, [N, D]: the network's, or those that are given."""
    given = request.embeddings
    if given is None or given is False:
        return None
    if given is True:
        return request.features
    if isinstance(given, (str, Path)):
        try:
            given = np.load(given, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy's reader of headers raises many types on damaged files
            raise DataError(f"embeddings: {given}: expected a readable .npy file: {first_line(error)}") from error
    if isinstance(given, torch.Tensor):
        given = given.detach().float().cpu().numpy()
    array: NDArray[Any] = np.asanyarray(given)
    if array.ndim != 2 or array.dtype.kind != "f" or len(array) != count or not array.shape[1]:
        raise DataError(
            f"embeddings: expected floats [{count}, D], a row per image, found {array.dtype} {list(array.shape)}"
        )
    return array


def _image(source: Source, labels: Labels, row: int, on_bad_image: str) -> dict[str, Any]:
    """The encoded file of an image, or of its pixels as PNG; nothing for one that cannot be read and may be skipped."""
    path = source.name(row)
    skipped = len(labels.heads) > 0 and bool((labels.labels[:, row] < 0).all())
    try:
        if source.encoded:
            return {"bytes": source.encoded_bytes(row), "path": path}
        from PIL import Image

        pixels = source.read(row)
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": f"{path}.png"}
    except DataError:
        if skipped or on_bad_image == "skip":
            return {"bytes": None, "path": path}
        raise
