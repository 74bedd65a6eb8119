"""Images that lie in memory: uint8 arrays, tensors and memory-mapped .npy files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sela_ext.data.labels import read_labels
from sela_ext.data.npy import map_npy
from sela_ext.data.source import Int64Array, Source, UInt8Array
from sela_ext.data.vectors import VectorSource, is_vectors, open_vectors
from sela_ext.errors import DataError

# Images whose pixels enter the fingerprint of an array, which has no file names to tell one data set from another.
FINGERPRINT_IMAGES = 64


class ArraySource(Source):
    """uint8 images of one size, [N, H, W, C] in memory or in a memory map (never copied)."""

    def __init__(
        self,
        array: UInt8Array,
        *,
        kind: str = "array",
        labels: Int64Array | None = None,
        class_names: list[str] | None = None,
        names: list[str] | None = None,
    ) -> None:
        self.kind = kind
        self.channels = int(array.shape[3])
        self.class_names = class_names
        self._array = array
        self._labels = labels
        self._names = names

    def __len__(self) -> int:
        return int(self._array.shape[0])

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        if self._names is None:
            width = max(5, len(str(len(self) - 1)))
            self._names = [f"{self.kind}/{i:0{width}d}" for i in range(len(self))]
        return self._names

    @property
    def labels(self) -> Int64Array | None:
        """See `Source.labels`."""
        return self._labels

    @property
    def array(self) -> UInt8Array:
        """See `Source.array`."""
        return self._array

    def read(self, index: int) -> UInt8Array:
        """See `Source.read`."""
        return np.ascontiguousarray(self._array[index])

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        rows = np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_IMAGES).astype(np.int64))
        digest = hashlib.sha256()
        for row in rows:
            digest.update(self.read(int(row)).tobytes())
        return {**super().fingerprint(), "pixels": digest.hexdigest()}

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Source:
        """As `Source.subset`; the images are copied, but out of a memory map they are read one by one instead."""
        if is_memory_map(self._array):
            return super().subset(indices)
        rows = self._checked(indices)
        names = self.names
        return ArraySource(
            self._array[rows],
            kind=self.kind,
            labels=None if self._labels is None else self._labels[rows],
            class_names=self.class_names,
            names=[names[i] for i in rows],
        )


def is_memory_map(array: npt.NDArray[Any]) -> bool:
    """Whether the array, or the array that it is a view of, is a memory map."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


def open_array(data: Any, *, labels: Any = None, where: str = "data") -> ArraySource | VectorSource:
    """Check an array of images, or of feature vectors.

    Args:
        data: uint8, numpy or torch, [N, H, W] or [N, H, W, C] with C = 1 or 3; or floats [N, D], which are vectors.
        labels: See `read_labels`.
        where: What to call the array in messages.

    Raises:
        DataError: Another type or shape; the message says what is expected.
    """
    shape = list(data.shape)
    if is_vectors(data):
        return open_vectors(data, labels=None if labels is None else read_labels(labels, len(data)), where=where)
    if data.ndim == 2:
        raise DataError(
            f"{where}: expected images, uint8 [N, H, W] or [N, H, W, C], or feature vectors, floats [N, D], found "
            f"{data.dtype} {shape}; vectors of whole numbers need .astype('float32')"
        )
    if data.ndim == 1 and data.dtype not in (np.uint8, torch.uint8):
        raise DataError(
            f"{where}: expected images, uint8 [N, H, W] or [N, H, W, C], or feature vectors, floats [N, D], found "
            f"{data.dtype} {shape}; a single vector needs [None], numbers one by one need [:, None]"
        )
    if data.dtype not in (np.uint8, torch.uint8):
        raise DataError(
            f"{where}: expected uint8 pixels 0..255, found {data.dtype} {shape}; convert with "
            "(x * 255).round().astype('uint8') if the values lie in 0..1"
        )
    if data.ndim not in (3, 4):
        raise DataError(f"{where}: expected uint8 [N, H, W] or [N, H, W, C], found {data.ndim} axes, {shape}")
    array: UInt8Array = data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else data
    if array.ndim == 3:
        array = array[..., np.newaxis]
    if array.shape[3] == 4:
        raise DataError(
            f"{where}: expected 1 or 3 channels, found 4, {shape}; drop the alpha channel or composite it first: "
            "array[..., :3]"
        )
    if array.shape[3] not in (1, 3):
        hint = "; channels come last: use array.transpose(0, 2, 3, 1)" if array.shape[1] in (1, 3) else ""
        raise DataError(f"{where}: expected 1 or 3 channels in the last axis, found {shape}{hint}")
    if 0 in array.shape:
        raise DataError(f"{where}: expected at least one image of at least one pixel, found shape {shape}")
    checked = None if labels is None else read_labels(labels, len(array))
    return ArraySource(array, labels=checked)


def open_npy(path: Path, *, labels: Any = None) -> ArraySource | VectorSource:
    """Open a .npy file of images or vectors as a memory map; see `open_array`."""
    return open_array(
        map_npy(path, "a readable .npy file of uint8 images or of vectors"), labels=labels, where=str(path)
    )
