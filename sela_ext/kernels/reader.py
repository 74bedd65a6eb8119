"""JPEG files to augmented batches, in threads of the compiled core.

Note [What a reader reads]
    Baseline JPEG files (see `sela_ext.kernels.jpeg`), from paths or from bytes in memory. For everything else, and for
    every file in which the core meets an anomaly, a status says so; such an image is its caller's to decode and to
    augment, with the same parameters, which follow from seed, epoch, number and view alone.

    What becomes of an image depends on its bytes and on what is drawn for it, on nothing else: the same bits for any
    number of threads, with or without an index, in the first epoch or later. So entropy-coded data are read to their
    end once, when the image has no index yet; a file that is damaged anywhere is never taken, whichever part is shown.

    Files are opened without waiting, one per thread at a time, and only regular files are read. They are expected not
    to change while a reader has them; a file that did is noticed, unless it holds one of the small images below.

Note [What is decoded exactly]
    * Images of at most 104 x 104 pixels: decoded whole to RGB, and kept decoded as far as `cache_bytes` goes.
    * Images that are turned or mirrored because of `exif`: a box of RGB, which is turned.
    * Files with other samplings than those of `Planes`: a box of RGB.
    * With `exact`, all.
    All others are taken as planes (`augment_planes`). Where a view's box is so large that at 1/2, 1/4 or 1/8 of the
    resolution it still has twice the output's size in both directions, it is decoded at that resolution (`reduce`):
    0.4 to 0.7 of 255 from the full one in the mean over photographs, up to 16 at single pixels.

Note [Places in an arena]
    `Reader.submit_planes` leaves resampling to somebody else, a CUDA device: it decodes the samples that views need
    into memory of the caller's. Places are given in the order of the images, by what the headers say: each is placed if
    what it needs still fits behind those placed before it, and one that turns out to be damaged keeps its place. So
    which images are there, and where, follows from the files and from what is drawn, not from threads or from what is
    known of the files.

    Planes are as the file has them, or from a reduced transform where `Reader` takes one; small images are whole, and
    these, turned ones and unusual samplings are planes of R, G and B. Views of one resolution share one box around
    them, unless that has more pixels than their boxes together.
"""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from sela_ext import _core
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels.augment import (
    EFFECTS,
    PARAMETERS,
    Augment,
    augment_options,
    check_key,
    check_output,
    effect_options,
    output_shape,
)
from sela_ext.kernels.augment_device import PLANAR
from sela_ext.kernels.index_store import IndexStore
from sela_ext.kernels.jpeg import MAX_PIXELS

if TYPE_CHECKING:
    import torch

READ_OK = 0
"""Augmented."""
READ_OTHER = 1
"""Not for the compiled decoder: another format, another kind of JPEG, or a fault."""
READ_UNREADABLE = 2
"""Cannot be opened or read: see `ReadBatch.error`."""
READ_NOT_REGULAR = 3
"""A folder, pipe, socket or device."""
READ_TOO_LARGE = 4
"""The header claims more than `max_pixels`, or the file has more than a GiB."""
READ_NO_MEMORY = 5
"""Memory did not suffice."""
READ_CANCELLED = 6
"""The reader was closed first."""
READ_NO_ROOM = 7
"""What the image needs does not fit into the arena any more."""

CACHE_BYTES = 1 << 28
"""Room for decoded small images."""

# How often a waiting thread looks for signals.
WAIT_MILLISECONDS = 100

_open: weakref.WeakSet[Reader] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class JoinedPaths:
    """The paths of a batch as one string of bytes: small images take less time than a path of their own handed over.

    Attributes:
        text: Every path as the operating system takes it, followed by a null byte.
    """

    text: bytes

    def __len__(self) -> int:
        """Number of paths."""
        return self.text.count(b"\0")


@dataclass(frozen=True)
class ReadBatch:
    """What became of the B images of a batch.

    Attributes:
        status: uint8 [B]; for images that are not `READ_OK` the rows of all outputs, and of `params` and `effects`, are
            undefined.
        error: int32 [B]; errno of `READ_UNREADABLE`, else 0.
        height: int32 [B], pixels of the image as it was augmented (turned, with `exif`); 0 where not known. An image
            that is `READ_OTHER` and has no size here is so whatever is drawn; one that has may be taken next time.
        width: int32 [B], likewise.
        params: one array [B] of PARAMETERS per view, as `sample_parameters` draws them.
        effects: one array [B] of EFFECTS per view, as `sample_effects` draws them; None for views that draw none.
    """

    status: npt.NDArray[np.uint8]
    error: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    width: npt.NDArray[np.int32]
    params: list[npt.NDArray[np.void]]
    effects: list[npt.NDArray[np.void] | None]


@dataclass(frozen=True)
class ReadPlanes(ReadBatch):
    """What became of the B images of a batch whose samples went to an arena, with V views of each.

    Attributes:
        images: [V, B] records of PLANAR with addresses in the arena; undefined for images that are not `READ_OK`.
        offset: int64 [B], where the samples of each image begin in the arena, bytes; -1: it has no place there.
        wanted: int64 [B], bytes that it needs; 0 where that is not known.
    """

    images: npt.NDArray[np.void]
    offset: npt.NDArray[np.int64]
    wanted: npt.NDArray[np.int64]

    @property
    def used(self) -> int:
        """Bytes of the arena up to the end of the last place."""
        return int(np.where(self.offset < 0, 0, self.offset + self.wanted).max(initial=0))


_ResultT_co = TypeVar("_ResultT_co", bound=ReadBatch, covariant=True)


class Ticket(Generic[_ResultT_co]):
    """A batch on its way; `Reader.submit` makes it. Keeps items and outputs alive. Dropped, it cancels the batch."""

    def __init__(self, core: _core.ReadTicket, batch: _ResultT_co, store: IndexStore | None, out: list[Any]) -> None:
        self._core = core
        self._batch = batch
        self._store = store
        self._out = out

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._core.wait(0)

    def wait(self) -> _ResultT_co:
        """Wait until all images are done, without the GIL.

        Returns:
            What became of them; no image is an error here.

        Raises:
            ResourceError: Memory did not suffice, the reader was closed, or this is another process than the reader's.
        """
        try:
            while not self._core.wait(WAIT_MILLISECONDS):
                pass  # signals are handled here
        except RuntimeError as error:
            raise ResourceError(f"Reader: {error}") from error
        batch = self._batch
        if (batch.status == READ_NO_MEMORY).any():
            raise ResourceError(
                "Reader: memory did not suffice to decode an image; use fewer threads, or a smaller max_pixels"
            )
        if (batch.status == READ_CANCELLED).any():
            raise ResourceError("Reader: closed before this batch was done")
        if self._store is not None:
            self._store.warn_once()
        return batch


class Reader:
    """Threads that read, decode and augment batches of JPEG files; see Note [What a reader reads].

    Batches are worked on in the order in which they are submitted, image by image; while the last images of one are
    finished, the next one is begun.

    Args:
        augments: What each view of an image is; one output per view.
        threads: 0 = all processors that this process may use.
        channels: Of the outputs before gradients, 3, or 1: then only grey files are read.
        exact: Augment the pixels that Pillow decodes, instead of planes; see Note [What is decoded exactly].
        exif: Turn and mirror images as their EXIF data say, like ``PIL.ImageOps.exif_transpose``; boxes are drawn in
            the turned image.
        dtype: Of the outputs, torch.float32 (None), bfloat16, float16 or uint8.
        channels_last: Memory format of the outputs.
        max_pixels: Largest height * width that a header may claim.
        index: Checkpoint indexes, looked up and added to by image number; None: images are read to their end every
            time. Several readers may share one, if their numbers mean the same images.
        reduce: Decode at 1/2, 1/4 or 1/8 where the box is large enough.
        cache_bytes: Memory for decoded small images.
        isa: CPU instruction set, "" for the one in use (for tests).

    Raises:
        OptionError: An option of wrong type or out of range.
        ResourceError: No thread can be started.

    Example:
        >>> import io, torch
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (150, 120), (200, 100, 0)).save(file, "JPEG")
        >>> out = torch.empty(1, 3, 32, 32)
        >>> with Reader([Augment.sela(32)], threads=1) as reader:
        ...     batch = reader.submit([file.getvalue()], [0], [out], seed=0, epoch=0, views=[0]).wait()
        >>> int(batch.status[0]) == READ_OK, int(batch.height[0])
        (True, 120)
    """

    def __init__(
        self,
        augments: Sequence[Augment],
        *,
        threads: int = 0,
        channels: int = 3,
        exact: bool = False,
        exif: bool = False,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        max_pixels: int = MAX_PIXELS,
        index: IndexStore | None = None,
        reduce: bool = True,
        cache_bytes: int = CACHE_BYTES,
        isa: str = "",
    ) -> None:
        import torch

        self.augments = tuple(augments)
        if not self.augments or not all(isinstance(augment, Augment) for augment in self.augments):
            raise OptionError(f"augments: expected at least one sela_ext.Augment, found {augments!r}")
        if channels not in (1, 3):
            raise OptionError(f"channels: expected 1 or 3, found {channels!r}")
        if not 0 <= threads <= 4096:
            raise OptionError(f"threads: expected 0 (all processors) to 4096, found {threads!r}")
        for name, value in (("max_pixels", max_pixels), ("cache_bytes", cache_bytes)):
            if not 0 <= value < 1 << 62:
                raise OptionError(f"{name}: expected a number >= 0, found {value!r}")
        self.dtype = torch.float32 if dtype is None else dtype
        self.channels = channels
        self.channels_last = bool(channels_last)
        self._store = index
        for augment in self.augments:  # checks the dtype
            check_output(None, (0, *output_shape(augment, 0, channels, self.dtype)[1:]), self.dtype, channels_last)
        try:
            self._core = _core.Reader(
                options=[augment_options(augment, channels) for augment in self.augments],
                effects=[effect_options(augment) for augment in self.augments],
                threads=threads,
                channels=channels,
                exact=bool(exact),
                exif=bool(exif),
                reduce=bool(reduce),
                dtype=str(self.dtype).removeprefix("torch."),
                channels_last=self.channels_last,
                max_pixels=max_pixels,
                cache_bytes=cache_bytes,
                store=None if index is None else index.core,
                isa=isa,
            )
        except ValueError as error:
            raise OptionError(str(error)) from error
        except RuntimeError as error:
            raise ResourceError(f"Reader: no thread can be started: {error}") from error
        _open.add(self)

    @property
    def threads(self) -> int:
        """Threads that are there."""
        return self._core.threads()

    @property
    def cached_nbytes(self) -> int:
        """Memory of decoded small images, bytes."""
        return self._core.cached_bytes()

    def submit(
        self,
        items: Sequence[str | bytes | memoryview] | JoinedPaths,
        index: npt.ArrayLike,
        out: Sequence[torch.Tensor],
        *,
        seed: int,
        epoch: int,
        views: Sequence[int] = (0,),
        indexes: Sequence[bytes | memoryview | None] | None = None,
        keys: npt.ArrayLike | None = None,
    ) -> Ticket[ReadBatch]:
        """Queue a batch of B images.

        Args:
            items: Path of a file, or its bytes, for each image; or all paths together.
            index: int64 [B], the images' numbers in [0, 2^40): what is kept and looked up goes by them.
            out: Where each view goes: [B, C, S, S] on the CPU, of the reader's dtype and memory format.
            seed: The key, [0, 2^64).
            epoch: [0, 2^32).
            views: Number of each view, [0, 256).
            indexes: Checkpoint index of each image, where known, as `jpeg_index` or `sela_ext.pack` makes them.
            keys: int64 [B] in [0, 2^40): what is drawn goes by them; None: by the images' numbers.

        Returns:
            A ticket; `Ticket.wait` gives the batch.

        Raises:
            DataError: Arguments that do not fit together.
            OptionError: seed, epoch or a view out of range, or an item of another type.
            ResourceError: The reader is closed, or this is another process than the reader's.
        """
        numbers = _numbers(items, index, keys)
        count = len(items)
        self._check_views(len(out), views, "out, views")
        for augment, tensor in zip(self.augments, out, strict=True):
            shape = output_shape(augment, count, self.channels, self.dtype)
            check_output(tensor, shape, self.dtype, self.channels_last)
        result = ReadBatch(**self._outputs(count))
        addresses = [tensor.data_ptr() for tensor in out]
        core = self._submit(items, numbers, addresses, None, result, seed, epoch, views, indexes)
        return Ticket(core, result, self._store, list(out))

    def submit_planes(
        self,
        items: Sequence[str | bytes | memoryview] | JoinedPaths,
        index: npt.ArrayLike,
        arena: npt.NDArray[np.uint8],
        *,
        seed: int,
        epoch: int,
        views: Sequence[int] = (0,),
        indexes: Sequence[bytes | memoryview | None] | None = None,
        keys: npt.ArrayLike | None = None,
    ) -> Ticket[ReadPlanes]:
        """Queue a batch of which only the samples that its views need are decoded; nothing is resampled.

        See Note [Places in an arena].

        Args:
            items: As for `submit`, as all that follow.
            index: The images' numbers.
            arena: Memory for the samples, uint8 [bytes], contiguous; of no bytes to learn how many would be needed.
            seed: The key.
            epoch: Likewise.
            views: Number of each view.
            indexes: Checkpoint index of each image.
            keys: What is drawn goes by them.

        Returns:
            A ticket; `Ticket.wait` gives `ReadPlanes`.

        Raises:
            DataError: Arguments that do not fit together.
            OptionError: As for `submit`; a reader of one channel.
            ResourceError: As for `submit`.

        Example:
            >>> import io
            >>> from PIL import Image
            >>> file = io.BytesIO()
            >>> Image.new("RGB", (150, 120), (200, 100, 0)).save(file, "JPEG")
            >>> with Reader([Augment.none(150)], threads=1) as reader:
            ...     batch = reader.submit_planes([file.getvalue()], [0], np.empty(50_000, np.uint8), seed=0, epoch=0)
            ...     found = batch.wait()
            >>> found.used, found.images[0, 0]["plane"]["width"].tolist()
            (27008, [150, 75, 75])
        """
        numbers = _numbers(items, index, keys)
        count = len(items)
        self._check_views(len(self.augments), views, "views")
        if self.channels != 3:
            raise OptionError(f"channels: expected 3 for planes in an arena, found {self.channels}")
        if arena.dtype != np.uint8 or arena.ndim != 1 or not arena.flags.c_contiguous or not arena.flags.writeable:
            raise DataError(f"arena: expected contiguous memory uint8 [bytes], found {arena.dtype} {list(arena.shape)}")
        result = ReadPlanes(
            **self._outputs(count),
            images=np.zeros((len(self.augments), count), PLANAR),
            offset=np.full(count, -1, np.int64),
            wanted=np.zeros(count, np.int64),
        )
        place = (arena.ctypes.data, arena.nbytes, result.images, result.offset, result.wanted)
        addresses = [0] * len(self.augments)
        core = self._submit(items, numbers, addresses, place, result, seed, epoch, views, indexes)
        return Ticket(core, result, self._store, [arena])

    def _check_views(self, outputs: int, views: Sequence[int], names: str) -> None:
        if not outputs == len(views) == len(self.augments):
            found = f"{outputs} and {len(views)}" if names == "out, views" else str(len(views))
            raise DataError(f"{names}: expected {len(self.augments)}, one per augmentation, found {found}")

    def _outputs(self, count: int) -> dict[str, Any]:
        """What a batch of so many images is written to."""
        return {
            "status": np.zeros(count, np.uint8),
            "error": np.zeros(count, np.int32),
            "height": np.zeros(count, np.int32),
            "width": np.zeros(count, np.int32),
            "params": [np.zeros(count, PARAMETERS) for _ in self.augments],
            "effects": [np.zeros(count, EFFECTS) if augment.draws_effects else None for augment in self.augments],
        }

    def _submit(
        self,
        items: Sequence[str | bytes | memoryview] | JoinedPaths,
        numbers: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None],
        outs: list[int],
        arena: tuple[int, int, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]] | None,
        result: ReadBatch,
        seed: int,
        epoch: int,
        views: Sequence[int],
        indexes: Sequence[bytes | memoryview | None] | None,
    ) -> _core.ReadTicket:
        """Check what both ways have in common, and queue."""
        check_key(seed, epoch)
        for view in views:
            check_key(seed, epoch, view)
        count = len(items)
        batch = items.text if isinstance(items, JoinedPaths) else list(items)
        if indexes is not None and len(indexes) != count:
            raise DataError(f"indexes: expected {count}, one per item, found {len(indexes)}")
        try:
            return self._core.submit(
                items=batch,
                indexes=None if indexes is None else list(indexes),
                index=numbers[0],
                keys=numbers[1],
                outs=outs,
                seed=int(seed),
                epoch=int(epoch),
                views=[int(view) for view in views],
                status=result.status,
                error=result.error,
                height=result.height,
                width=result.width,
                params=result.params,
                effects=result.effects,
                arena=arena,
            )
        except (TypeError, ValueError, BufferError) as error:
            raise OptionError(f"items: expected paths as str, or contiguous bytes: {error}") from error
        except RuntimeError as error:
            raise ResourceError(f"Reader: {error}") from error

    def close(self) -> None:
        """End the threads. Images that are being read are finished; batches that wait are cancelled."""
        self._core.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _numbers(
    items: Sequence[str | bytes | memoryview] | JoinedPaths, index: npt.ArrayLike, keys: npt.ArrayLike | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """`index` and `keys` of as many images as there are items, checked."""
    numbers = np.ascontiguousarray(index, dtype=np.int64)
    count = len(items)
    if numbers.shape != (count,):
        raise DataError(f"index: expected {count} numbers, one per item, found shape {numbers.shape}")
    if count and (numbers.min() < 0 or numbers.max() >= 1 << 40):
        raise DataError(f"index: expected numbers in [0, 2^40), found {numbers.min()} to {numbers.max()}")
    drawn = None if keys is None else np.ascontiguousarray(keys, dtype=np.int64)
    if drawn is not None and drawn.shape != (count,):
        raise DataError(f"keys: expected {count} numbers, one per item, found shape {drawn.shape}")
    if drawn is not None and count and (drawn.min() < 0 or drawn.max() >= 1 << 40):
        raise DataError(f"keys: expected numbers in [0, 2^40), found {drawn.min()} to {drawn.max()}")
    return numbers, drawn


@atexit.register
def _close_all() -> None:
    # Threads must not work on memory of an interpreter that is being taken down.
    for reader in list(_open):
        with contextlib.suppress(Exception):
            reader.close()
