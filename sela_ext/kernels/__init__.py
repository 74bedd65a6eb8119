"""The compiled kernels behind argument checks, and their pure-torch twins in `sela_ext.kernels.reference`.

The only package that imports `sela_ext._core`.
"""

from __future__ import annotations

from typing import Any

from sela_ext.kernels.anderson import anderson_step
from sela_ext.kernels.augment import (
    EFFECTS,
    PARAMETERS,
    Augment,
    augment,
    augment_views,
    permutation,
    sample_effects,
    sample_parameters,
)
from sela_ext.kernels.augment_device import DeviceImages, upload_images, upload_planes
from sela_ext.kernels.augment_planes import Planes, augment_planes, needed_boxes
from sela_ext.kernels.augment_resident import augment_resident
from sela_ext.kernels.bounds import ChunkBounds, bounds_nbytes, chunk_bounds
from sela_ext.kernels.index_store import IndexStore, IndexStoreWarning
from sela_ext.kernels.jpeg import (
    JpegHeader,
    JpegPlane,
    JpegPlanes,
    decode_crop,
    decode_jpeg,
    decode_planes,
    jpeg_header,
    jpeg_index,
    try_decode_jpeg,
)
from sela_ext.kernels.jpeg_cuda import DevicePlane, DevicePlanes, decode_planes_cuda
from sela_ext.kernels.logits import StoredLogits, empty_stored, store_logits
from sela_ext.kernels.newton import (
    ColumnLaw,
    NewtonSolution,
    NewtonSums,
    newton_product,
    newton_prune,
    newton_rows,
    newton_solve,
    newton_sums,
)
from sela_ext.kernels.reader import (
    READ_CANCELLED,
    READ_NO_MEMORY,
    READ_NO_ROOM,
    READ_NOT_REGULAR,
    READ_OK,
    READ_OTHER,
    READ_TOO_LARGE,
    READ_UNREADABLE,
    JoinedPaths,
    ReadBatch,
    Reader,
    ReadPlanes,
    Ticket,
)
from sela_ext.kernels.rounding import Candidates, Rounding, column_margins, find_candidates, smooth_prices
from sela_ext.kernels.self_check import RefusedDeviceWarning, Verdict, device_verdict
from sela_ext.kernels.sinkhorn import sinkhorn_pass
from sela_ext.kernels.sinkhorn_sums import SinkhornSums, add_sums
from sela_ext.kernels.vectors import VectorView, vector_rows

__all__ = [
    "EFFECTS",
    "PARAMETERS",
    "READ_CANCELLED",
    "READ_NOT_REGULAR",
    "READ_NO_MEMORY",
    "READ_NO_ROOM",
    "READ_OK",
    "READ_OTHER",
    "READ_TOO_LARGE",
    "READ_UNREADABLE",
    "Augment",
    "Candidates",
    "ChunkBounds",
    "ColumnLaw",
    "DeviceImages",
    "DevicePlane",
    "DevicePlanes",
    "IndexStore",
    "IndexStoreWarning",
    "JoinedPaths",
    "JpegHeader",
    "JpegPlane",
    "JpegPlanes",
    "NewtonSolution",
    "NewtonSums",
    "Planes",
    "ReadBatch",
    "ReadPlanes",
    "Reader",
    "RefusedDeviceWarning",
    "Rounding",
    "SinkhornSums",
    "StoredLogits",
    "Ticket",
    "VectorView",
    "Verdict",
    "add_sums",
    "anderson_step",
    "augment",
    "augment_planes",
    "augment_resident",
    "augment_views",
    "bounds_nbytes",
    "chunk_bounds",
    "column_margins",
    "decode_crop",
    "decode_jpeg",
    "decode_planes",
    "decode_planes_cuda",
    "device_verdict",
    "empty_stored",
    "find_candidates",
    "jpeg_header",
    "jpeg_index",
    "needed_boxes",
    "newton_product",
    "newton_prune",
    "newton_rows",
    "newton_solve",
    "newton_sums",
    "permutation",
    "sample_effects",
    "sample_parameters",
    "sinkhorn_pass",
    "smooth_prices",
    "store_logits",
    "try_decode_jpeg",
    "upload_images",
    "upload_planes",
    "vector_rows",
]


def __getattr__(name: str) -> Any:
    if name in ("reference", "ops"):  # loaded at their first use: they import torch
        import importlib

        return importlib.import_module(f"sela_ext.kernels.{name}")
    raise AttributeError(f"module 'sela_ext.kernels' has no attribute {name!r}")
