"""Any map-style torch Dataset as a source: the slow path, one item at a time."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

from sela_ext.data.decode import to_rgb
from sela_ext.data.labels import read_labels
from sela_ext.data.safe_files import out_of_resources
from sela_ext.data.source import Int64Array, Source, UInt8Array
from sela_ext.errors import DataError, ResourceError

# Items whose pixels enter the fingerprint; a Dataset has no file names.
FINGERPRINT_ITEMS = 8
# Items that are tried for the first one that can be read.
FIRST_ITEMS = 8
_UNREAD = -2


class DatasetSource(Source):
    """A map-style torch Dataset whose items are an image, or a tuple (image, label, ...).

    An image is a PIL image; a uint8 array [H, W] or [H, W, C]; or a tensor [H, W] or [C, H, W], uint8, or floating
    with values 0..1. The first item that can be read decides between grey and RGB: grey items among RGB ones are
    repeated over the channels. Items are read one at a time, since a Dataset need not be safe to call from several
    threads; transforms that draw random numbers make a run that cannot be reproduced.

    Labels come from the attribute `targets` or `labels` if the Dataset (or the one under a Subset) has one of integers,
    else from the items as they are read; asking for all of them reads every item that was not read yet. The label of an
    item that cannot be read is unknown (-1): what becomes of it is the business of whoever wants its pixels.
    """

    kind = "dataset"
    parallel_reads = False

    def __init__(self, dataset: Dataset[Any], *, labels: Any = None) -> None:
        if isinstance(dataset, IterableDataset):
            raise DataError(
                "data: expected a map-style Dataset (with __len__ and __getitem__), found an IterableDataset"
            )
        try:
            self._count = len(dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError) as error:
            raise DataError("data: expected a Dataset with __len__, found one without") from error
        if self._count == 0:
            raise DataError("data: expected at least one image, found an empty Dataset")
        self._dataset = dataset
        self._lock = threading.Lock()
        self._names: list[str] | None = None
        self._labels: Int64Array | None = None
        self._item_labels: Int64Array | None = None
        self.channels = 3
        number, first, self.channels = self._first()
        if labels is not None:
            self._labels = read_labels(labels, self._count)
        else:
            self._labels = _attribute_labels(dataset, self._count)
            label = _label_of(first)
            if self._labels is None and label is not None:
                self._item_labels = np.full(self._count, _UNREAD, dtype=np.int64)
                self._item_labels[number] = label
        classes = getattr(dataset, "classes", None)
        if self._labels is not None and isinstance(classes, (list, tuple)):
            self.class_names = [str(name) for name in classes]

    def __len__(self) -> int:
        return self._count

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        if self._names is None:
            width = max(5, len(str(self._count - 1)))
            self._names = [f"dataset/{i:0{width}d}" for i in range(self._count)]
        return self._names

    @property
    def labels(self) -> Int64Array | None:
        """See `Source.labels`."""
        if self._item_labels is not None:
            for index in np.flatnonzero(self._item_labels == _UNREAD):
                try:
                    self._item(int(index))
                except DataError as error:
                    if out_of_resources(error):
                        raise
                    self._item_labels[index] = -1
            self._labels, self._item_labels = self._item_labels, None
        return self._labels

    def labels_of(self, indices: Int64Array) -> Int64Array | None:
        """See `Source.labels_of`."""
        known = self._item_labels
        if known is not None and not (known[indices] == _UNREAD).any():
            return known[indices]
        labels = self.labels
        return None if labels is None else labels[indices]

    def read(self, index: int) -> UInt8Array:
        """See `Source.read`."""
        where = f"dataset item {index}"
        pixels = _pixels(_image_of(self._item(index)), where)
        if pixels.shape[2] == self.channels:
            return pixels
        if self.channels == 3:
            return np.repeat(pixels, 3, axis=2)
        raise DataError(f"{where}: expected a grey image like item 0, found RGB; convert all items to RGB")

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        digest = hashlib.sha256()
        for row in np.unique(np.linspace(0, self._count - 1, FINGERPRINT_ITEMS).astype(np.int64)):
            try:
                digest.update(self.read(int(row)).tobytes())
            except DataError:
                digest.update(b"cannot be read")
        return {**super().fingerprint(), "pixels": digest.hexdigest()}

    def _first(self) -> tuple[int, Any, int]:
        """Number, item and channels of the first item that can be read, of a few."""
        reason: DataError | None = None
        for number in range(min(self._count, FIRST_ITEMS)):
            try:
                item = self._item(number)
                return number, item, int(_pixels(_image_of(item), f"dataset item {number}").shape[2])
            except DataError as error:
                reason = reason or error
        assert reason is not None
        raise reason

    def _item(self, index: int) -> Any:
        with self._lock:
            try:
                item = self._dataset[index]
            except (MemoryError, ResourceError):
                raise
            except Exception as error:
                reason = " ".join(str(error).split())  # one line
                raise DataError(f"dataset item {index}: {type(error).__name__}: {reason}") from error
            known = self._item_labels
            if known is not None:
                label = _label_of(item)
                known[index] = -1 if label is None else label
            return item


def _image_of(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) and item else item


def _label_of(item: Any) -> int | None:
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        return None
    label = item[1]
    if isinstance(label, (torch.Tensor, np.ndarray)) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        return None
    return max(int(label), -1)


def _pixels(image: Any, where: str) -> UInt8Array:
    """One image as uint8 [H, W, 1 or 3]."""
    if isinstance(image, Image.Image):
        try:
            grey = image.mode in ("1", "L") and "transparency" not in image.info
            pixels = np.array(image.convert("L") if grey else to_rgb(image), dtype=np.uint8)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except Exception as error:
            raise DataError(f"{where}: cannot be decoded: {error}") from error
    elif isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        if tensor.ndim == 3:
            tensor = tensor.permute(1, 2, 0)
        if tensor.is_floating_point():
            low, high = (float(tensor.min()), float(tensor.max())) if tensor.numel() else (0.0, 0.0)
            if not (low >= 0.0 and high <= 1.0):
                raise DataError(
                    f"{where}: expected floating-point pixels in 0..1, found {low:.3g}..{high:.3g}; take the "
                    "normalisation out of the Dataset's transform"
                )
            tensor = (tensor.double() * 255).round().to(torch.uint8)
        pixels = tensor.numpy()
    elif isinstance(image, np.ndarray):
        pixels = image
    else:
        raise DataError(
            f"{where}: expected an image (PIL, uint8 array [H, W, C] or tensor [C, H, W]), found {type(image).__name__}"
        )
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise DataError(
            f"{where}: expected uint8 with 1 or 3 channels (last in arrays, first in tensors), found {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    return np.ascontiguousarray(pixels)


def _attribute_labels(dataset: Any, count: int) -> Int64Array | None:
    if isinstance(dataset, Subset):
        under = _attribute_labels(dataset.dataset, len(dataset.dataset))  # type: ignore[arg-type]
        return None if under is None else under[np.asarray(dataset.indices, dtype=np.int64)]
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if values is None:
            continue
        try:
            return read_labels(values, count)
        except (DataError, TypeError):
            continue  # another meaning of the attribute: captions, boxes, ...
    return None
