"""Feature vectors as data: float arrays [N, D] in memory or in a memory-mapped file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sela_ext.data.source import Int64Array, Source, UInt8Array
from sela_ext.errors import DataError
from sela_ext.kernels import vector_rows
from sela_ext.kernels.vectors import TYPES

# Rows whose numbers enter the fingerprint, which has no file names to tell one data set from another.
FINGERPRINT_ROWS = 64
# Rows that are looked at together: 16 MB at 1,024 features.
CHUNK = 4096


@dataclass(frozen=True, eq=False)
class VectorStatistics:
    """What the rows of a source are like, those left out that hold NaN or infinity.

    Attributes:
        mean: of each feature, float32 [D].
        deviation: of each feature, float32 [D].
        spread: root mean square of the centred rows' numbers; 1 where all are equal.
        bad: rows that are not finite in float32, int64, ascending.
    """

    mean: npt.NDArray[np.float32]
    deviation: npt.NDArray[np.float32]
    spread: float
    bad: Int64Array


class VectorSource(Source):
    """N feature vectors of D floats; they stay where they are.

    Args:
        array: [M, D] float16, float32 or float64.
        rows: Which of them, int64 [N]; None: all, in order.
        labels: True labels, int64 [N].
        names: One per row; None: made from the rows' numbers.
        kind: For messages.
    """

    def __init__(
        self,
        array: npt.NDArray[Any],
        *,
        rows: Int64Array | None = None,
        labels: Int64Array | None = None,
        names: list[str] | None = None,
        kind: str = "vectors",
    ) -> None:
        if array.dtype.name not in TYPES or not array.dtype.isnative:
            array = array.astype(np.float32)  # longer floats, or those of another byte order
        self.kind = kind
        self._array = array if array.flags.c_contiguous else np.ascontiguousarray(array)
        self._rows = rows
        self._labels = labels
        self._names = names
        self._statistics: VectorStatistics | None = None

    def __len__(self) -> int:
        return int(self._array.shape[0]) if self._rows is None else len(self._rows)

    @property
    def vectors(self) -> VectorSource:
        """See `Source.vectors`."""
        return self

    @property
    def width(self) -> int:
        """D, numbers per row."""
        return int(self._array.shape[1])

    @property
    def stored(self) -> npt.NDArray[Any]:
        """The array that holds the rows, [M, D]."""
        return self._array

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        if self._names is None:
            self._names = [self.name(index) for index in range(len(self))]
        return self._names

    def name(self, index: int) -> str:
        """See `Source.name`."""
        if self._names is not None:
            return self._names[index]
        width = max(5, len(str(len(self._array) - 1)))
        return f"row/{index if self._rows is None else int(self._rows[index]):0{width}d}"

    @property
    def labels(self) -> Int64Array | None:
        """See `Source.labels`."""
        return self._labels

    def read(self, index: int) -> UInt8Array:
        """Refuse: vectors have no pixels.

        Raises:
            DataError: always.
        """
        raise DataError(f"{self.name(index)}: expected an image, found a vector of {self.width} numbers")

    def numbers(self, index: npt.ArrayLike) -> Int64Array:
        """Rows of `stored` that hold the vectors at `index`, int64 [B]."""
        chosen = np.asarray(index, np.int64)
        return chosen if self._rows is None else self._rows[chosen]

    def take(self, index: npt.ArrayLike, *, threads: int = 0) -> npt.NDArray[np.float32]:
        """The vectors at `index`, int64 [B], as float32 [B, D]."""
        return vector_rows(self._array, self.numbers(index), threads=threads)[0]

    def statistics(self, threads: int = 0) -> VectorStatistics:
        """Mean and deviation of the features, and which rows are bad: one pass over the rows, made once.

        Raises:
            DataError: no row is finite.
        """
        if self._statistics is None:
            self._statistics = self._measured(threads)
        return self._statistics

    def _measured(self, threads: int) -> VectorStatistics:
        """Sums in float64, about the mean of the first rows: far from zero, squares would cancel."""
        total, squares = np.zeros(self.width), np.zeros(self.width)
        about: npt.NDArray[np.float32] | None = None
        bad: list[Int64Array] = []
        count = 0
        for first in range(0, len(self), CHUNK):
            index = np.arange(first, min(first + CHUNK, len(self)))
            values, finite = vector_rows(self._array, self.numbers(index), threads=threads)
            if not finite.all():
                bad.append(index[~finite])
                values = values[finite]
            if not len(values):
                continue
            if about is None:
                about = values.mean(0, dtype=np.float64).astype(np.float32)
            values -= about
            total += values.sum(0, dtype=np.float64)
            squares += np.einsum("ij,ij->j", values, values, dtype=np.float64)
            count += len(values)
        if about is None:
            raise DataError(f"{self.describe()}: expected rows of finite numbers, found NaN or infinity in all of them")
        shift = total / count
        variance = np.maximum(squares / count - shift**2, 0.0)
        spread = float(np.sqrt(variance.mean()))
        usable = np.isfinite(spread) and spread > 1.0 / float(np.finfo(np.float32).max)  # its inverse is finite
        return VectorStatistics(
            (about + shift).astype(np.float32),
            np.sqrt(variance).astype(np.float32),
            spread if usable else 1.0,
            np.concatenate(bad) if bad else np.zeros(0, np.int64),
        )

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`; type, shape and some of the rows tell one array from another."""
        digest = hashlib.sha256()
        for index in np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_ROWS).astype(np.int64)):
            digest.update(self._array[int(self.numbers(index))].tobytes())
        if self._rows is not None:
            digest.update(self._rows.tobytes())
        return {
            "kind": self.kind,
            "count": len(self),
            "width": self.width,
            "type": self._array.dtype.name,
            "rows": digest.hexdigest(),
        }

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Source:
        """See `Source.subset`; nothing is copied."""
        chosen = self._checked(indices)
        return VectorSource(
            self._array,
            rows=self.numbers(chosen),
            labels=None if self._labels is None else self._labels[chosen],
            names=None if self._names is None else [self._names[i] for i in chosen],
            kind=self.kind,
        )

    def describe(self) -> str:
        """See `Source.describe`."""
        return f"{self.kind}: {len(self)} rows of {self.width} numbers, {self._array.dtype.name}"


def is_vectors(data: Any) -> bool:
    """Whether an array (numpy or torch) is a matrix of floats."""
    floating = data.dtype.is_floating_point if isinstance(data, torch.Tensor) else data.dtype.kind == "f"
    return bool(floating) and data.ndim == 2


def open_vectors(
    data: Any, *, labels: Int64Array | None = None, names: list[str] | None = None, where: str = "data"
) -> VectorSource:
    """Check a matrix of feature vectors.

    Args:
        data: float [N, D], numpy (a memory map stays one) or torch.
        labels: True labels, int64 [N].
        names: One per row, or None.
        where: What to call the array in messages.

    Raises:
        DataError: No rows, or no columns.
    """
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu()
        data = (data.float() if data.dtype == torch.bfloat16 else data).numpy()
    if 0 in data.shape:
        raise DataError(f"{where}: expected vectors [N, D] of at least one row and number, found {list(data.shape)}")
    return VectorSource(data, labels=labels, names=names)
