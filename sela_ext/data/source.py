"""What every source of images offers: count, names, labels where known, and pixels one by one or as one array."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sela_ext.data.safe_files import read_image_file
from sela_ext.errors import DataError
from sela_ext.kernels import JoinedPaths

if TYPE_CHECKING:
    from sela_ext.data.vectors import VectorSource

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


def hash_names(names: Iterable[str]) -> str:
    """SHA-256 (hex) of the names in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Located:
    """Where the encoded bytes of one image are: exactly one of `path` and `data` is set.

    Attributes:
        path: A file that holds this image and nothing else.
        data: The bytes themselves, usually a slice of a memory map.
        index: The image's JPEG checkpoint index, as `sela_ext.kernels.jpeg_index` builds it; None if it is not known.
    """

    path: str | None = None
    data: memoryview | bytes | None = None
    index: memoryview | bytes | None = None


@dataclass(frozen=True, slots=True)
class LocatedImages:
    """Where the encoded bytes of several images are, as `sela_ext.kernels.Reader` takes them.

    Attributes:
        items: Path or bytes of each image, or the paths of all.
        indexes: Checkpoint index of each image, None where not known; None if none is.
    """

    items: list[str | bytes | memoryview] | JoinedPaths
    indexes: list[bytes | memoryview | None] | None = None


class Source(ABC):
    """N images in a fixed order, numbered 0..N-1.

    Attributes:
        kind: What the images come from, for messages: "digits", "array", "idx", "folder", "paths", "dataset".
        channels: 1 (grey) or 3 (RGB), the same for all images.
        class_names: Name of class c at position c, or None.
        parallel_reads: Whether `read` may be called from several threads at once.
    """

    kind: str = "source"
    channels: int = 3
    class_names: list[str] | None = None
    parallel_reads: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, N."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """One name per image, in order; relative paths where the images are files."""

    def name(self, index: int) -> str:
        """Name of one image; cheap where `names` would first have to be made for all."""
        return self.names[index]

    def iter_names(self) -> Iterator[str]:
        """The names in order, one at a time."""
        return iter(self.names)

    @abstractmethod
    def read(self, index: int) -> UInt8Array:
        """Pixels of one image.

        Args:
            index: 0..N-1.

        Returns:
            uint8 [H, W, C], C = `channels`.

        Raises:
            DataError: The image cannot be decoded; the message names it and the reason.
        """

    @property
    def vectors(self) -> VectorSource | None:
        """The source itself where it holds feature vectors instead of images; else None."""
        return None

    @property
    def encoded(self) -> bool:
        """Whether every image is an encoded file, or bytes like those of one, that `locate` finds."""
        return False

    def locate(self, index: int) -> Located:
        """Where the encoded bytes of one image are; nothing is read. Only where `encoded` is true.

        Args:
            index: 0..N-1.

        Raises:
            DataError: The source holds no encoded images.
        """
        raise DataError(f"{self.kind}: expected encoded images, found pixels of image {index}; use read() instead")

    def encoded_bytes(self, index: int) -> bytes:
        """The encoded bytes of one image, all that is known of them checked. Only where `encoded` is true.

        Args:
            index: 0..N-1.

        Raises:
            DataError: They cannot be read, or are not what they were.
        """
        place = self.locate(index)
        if place.path is not None:
            return read_image_file(place.path, self.name(index))
        assert place.data is not None  # one of both is set
        return bytes(place.data)

    def locate_all(self, index: Int64Array) -> LocatedImages:
        """`locate` for the images of a batch; a source may have a faster way than one by one.

        Args:
            index: int64 [B], in 0..N-1.
        """
        located = [self.locate(number) for number in index.tolist()]
        return LocatedImages(
            [image.path or b"" if image.data is None else image.data for image in located],
            [image.index for image in located] if any(image.index is not None for image in located) else None,
        )

    @property
    def labels(self) -> Int64Array | None:
        """True labels, int64 [N], -1 where unknown; None if there are none. Used for metrics only."""
        return None

    def labels_of(self, indices: Int64Array) -> Int64Array | None:
        """True labels of a few images that have just been read, int64 [B], or None."""
        labels = self.labels
        return None if labels is None else labels[indices]

    @property
    def array(self) -> UInt8Array | None:
        """All images as uint8 [N, H, W, C], where they lie in memory (or a memory map) with one size; else None."""
        return None

    @property
    def array_rows(self) -> tuple[UInt8Array, Int64Array | None] | None:
        """An array uint8 [M, H, W, C] that holds all images, with the row of each, int64 [N]; else None.

        None instead of rows: `array`, whose rows are the images in order.
        """
        array = self.array
        return None if array is None else (array, None)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) if all images have this size; None if sizes differ or are not known before decoding."""
        array = self.array
        return None if array is None else (int(array.shape[1]), int(array.shape[2]))

    def fingerprint(self) -> dict[str, Any]:
        """What identifies these images, cheap for a million of them: JSON-able, equal for equal data.

        Modification times are left out: a copied folder is the same data.
        """
        size = self.image_size
        return {
            "kind": self.kind,
            "count": len(self),
            "channels": self.channels,
            "image_size": None if size is None else list(size),
            "names": hash_names(self.iter_names()),
            "first_names": [self.name(i) for i in range(min(3, len(self)))],
        }

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Source:
        """The images at `indices`, in that order, as a source of their own.

        Args:
            indices: Integers [M] in 0..N-1, M >= 1; an index may occur more than once.

        Raises:
            DataError: No index, or one out of range.
        """
        return SubsetSource(self, self._checked(indices))

    def _checked(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Int64Array:
        rows = np.asarray(indices)
        if rows.ndim != 1 or rows.size == 0 or not np.issubdtype(rows.dtype, np.integer):
            raise DataError(
                f"subset: expected a non-empty list of integers, found {rows.dtype} of shape {list(rows.shape)}"
            )
        if rows.min() < 0 or rows.max() >= len(self):
            raise DataError(
                f"subset: expected indices in 0..{len(self) - 1}, found {int(rows.min())}..{int(rows.max())}"
            )
        return rows.astype(np.int64)

    def describe(self) -> str:
        """One line for people: kind, count, size, channels, classes."""
        if self.vectors is not None:
            return self.vectors.describe()
        size = self.image_size
        pixels = "sizes vary or are not known before decoding" if size is None else f"{size[0]} x {size[1]}"
        colour = "grey" if self.channels == 1 else "RGB"
        classes = "" if self.class_names is None else f", {len(self.class_names)} classes (for metrics only)"
        return f"{self.kind}: {len(self)} images, {pixels}, {colour}{classes}"


class LabelledSource(Source):
    """Another source with true labels given by the user."""

    def __init__(self, parent: Source, labels: Int64Array, class_names: list[str] | None = None) -> None:
        self.kind = parent.kind
        self.channels = parent.channels
        self.class_names = class_names
        self.parallel_reads = parent.parallel_reads
        self._parent = parent
        self._labels = labels

    def __len__(self) -> int:
        return len(self._parent)

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        return self._parent.names

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return self._parent.name(index)

    def iter_names(self) -> Iterator[str]:
        """See `Source.iter_names`."""
        return self._parent.iter_names()

    @property
    def labels(self) -> Int64Array:
        """See `Source.labels`."""
        return self._labels

    @property
    def array(self) -> UInt8Array | None:
        """See `Source.array`."""
        return self._parent.array

    @property
    def array_rows(self) -> tuple[UInt8Array, Int64Array | None] | None:
        """See `Source.array_rows`."""
        return self._parent.array_rows

    @property
    def image_size(self) -> tuple[int, int] | None:
        """See `Source.image_size`."""
        return self._parent.image_size

    def read(self, index: int) -> UInt8Array:
        """See `Source.read`."""
        return self._parent.read(index)

    @property
    def vectors(self) -> VectorSource | None:
        """See `Source.vectors`."""
        return self._parent.vectors

    @property
    def encoded(self) -> bool:
        """See `Source.encoded`."""
        return self._parent.encoded

    def locate(self, index: int) -> Located:
        """See `Source.locate`."""
        return self._parent.locate(index)

    def encoded_bytes(self, index: int) -> bytes:
        """See `Source.encoded_bytes`."""
        return self._parent.encoded_bytes(index)

    def locate_all(self, index: Int64Array) -> LocatedImages:
        """See `Source.locate_all`."""
        return self._parent.locate_all(index)

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        return self._parent.fingerprint()

    def subset(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Source:
        """See `Source.subset`."""
        rows = self._checked(indices)
        return LabelledSource(self._parent.subset(rows), self._labels[rows], self.class_names)


class SubsetSource(Source):
    """Some images of another source; pixels are read through it."""

    def __init__(self, parent: Source, indices: Int64Array) -> None:
        self.kind = parent.kind
        self.channels = parent.channels
        self.class_names = parent.class_names
        self.parallel_reads = parent.parallel_reads
        self._parent = parent
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        names = self._parent.names
        return [names[i] for i in self._indices]

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return self._parent.name(int(self._indices[index]))

    def iter_names(self) -> Iterator[str]:
        """See `Source.iter_names`."""
        return (self._parent.name(int(i)) for i in self._indices)

    @property
    def labels(self) -> Int64Array | None:
        """See `Source.labels`."""
        return self._parent.labels_of(self._indices)

    def labels_of(self, indices: Int64Array) -> Int64Array | None:
        """See `Source.labels_of`."""
        return self._parent.labels_of(self._indices[indices])

    @property
    def array_rows(self) -> tuple[UInt8Array, Int64Array | None] | None:
        """See `Source.array_rows`; the pixels stay where they are."""
        found = self._parent.array_rows
        if found is None:
            return None
        array, rows = found
        return array, self._indices if rows is None else rows[self._indices]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """See `Source.image_size`."""
        return self._parent.image_size

    def read(self, index: int) -> UInt8Array:
        """See `Source.read`."""
        return self._parent.read(int(self._indices[index]))

    @property
    def encoded(self) -> bool:
        """See `Source.encoded`."""
        return self._parent.encoded

    def locate(self, index: int) -> Located:
        """See `Source.locate`."""
        return self._parent.locate(int(self._indices[index]))

    def encoded_bytes(self, index: int) -> bytes:
        """See `Source.encoded_bytes`."""
        return self._parent.encoded_bytes(int(self._indices[index]))

    def locate_all(self, index: Int64Array) -> LocatedImages:
        """See `Source.locate_all`."""
        return self._parent.locate_all(self._indices[index])
