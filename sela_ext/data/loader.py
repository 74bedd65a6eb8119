"""`Loader`: shuffled, augmented batches from any source, reproducible and resumable.

Nothing is drawn from a state: the order is keyed by (seed, epoch), the augmentation of an image by (seed, epoch, image,
view). So batches do not depend on threads or ranks, and an epoch can begin at any position.

Note [From image to batch]
    A thread (`prefetch`) goes through the epoch's order. For each batch it takes memory from the ring and begins to
    fill it: arrays as Note [Small batches of arrays] says; encoded images by the compiled reader, which opens, decodes
    and augments in threads of its own; what the reader does not take, and sources of another kind, by the fallback.
    While the last images of one batch are read the next has begun, and finished batches wait for the consumer.
    Everything happens in this process: no worker processes, no shared memory. Images that a CUDA device keeps are
    augmented there instead, see Note [Kept on the device] in `sela_ext.data.residency`; of JPEG files it makes the
    views from samples that the reader has decoded, see Note [What is sent] in `sela_ext.data.planes_upload`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from sela_ext import kernels
from sela_ext.data.bad_images import BadImages
from sela_ext.data.checks import (
    DTYPES,
    check_device,
    check_flag,
    check_integer,
    check_threads,
    check_views,
)
from sela_ext.data.fallback import Drawing, Fallback, Rows
from sela_ext.data.opening import open_source
from sela_ext.data.order import Share, occurrence_keys
from sela_ext.data.picking import Picking
from sela_ext.data.planes_upload import (
    PlaneBatch,
    PlaneReading,
    PlaneRows,
    Sending,
    Wish,
    plan_sending,
    records_bytes,
)
from sela_ext.data.prefetch import prefetch
from sela_ext.data.reading import EncodedReading, Reading, open_store
from sela_ext.data.residency import Orders, Residency, ResidentImages, plan_residency
from sela_ext.data.ring import TensorRing
from sela_ext.data.source import Int64Array, Source
from sela_ext.data.upload import Upload, Uploader
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels import Augment, IndexStore
from sela_ext.kernels.device import usable
from sela_ext.kernels.resident import augment_kept, resident_refusal

# Batches that are ready or in the making while the consumer works on one.
BATCHES_AHEAD = 3
# Output side for images whose sizes differ, when no augmentation is given.
DEFAULT_SIZE = 224

Records = npt.NDArray[Any]
Drawn = tuple["Records | tuple[Records, ...]", "Records | tuple[Records | None, ...] | None"]


@dataclass(frozen=True)
class Batch:
    """B images of one epoch, in its order.

    The tensors' memory is used again for a later batch when nobody holds them, nor views of them, any more.

    Attributes:
        images: [B, C, S, S] of the loader's dtype, on its device; C = 2 where the augmentation takes gradients. The
            first of `views`.
        index: Numbers of the images in the source, int64 [B], on the CPU.
        labels: True labels, int64 [B], -1 where unknown, on the CPU; None if the source has none.
        position: Images of this rank's order that are done with this batch: `epoch(e, start=position)` goes on here.
        views: Every view of the images, one tensor [B, C, S_v, S_v] each.
        placed: `index` on the device of the images.
        drawn: Gives `params` and `effects`.
    """

    images: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor | None
    position: int
    views: tuple[torch.Tensor, ...]
    placed: torch.Tensor
    drawn: Callable[[], Drawn] = field(repr=False)

    @cached_property
    def _records(self) -> Drawn:
        return self.drawn()

    @property
    def params(self) -> Records | tuple[Records, ...]:
        """What was drawn for each image: structured array [B], see `sela_ext.kernels.sample_parameters`.

        A tuple of them, one per view, where `augment` is a sequence. Of images that are kept on a device they are drawn
        again when they are asked for, on the CPU: the same bits.
        """
        return self._records[0]

    @property
    def effects(self) -> Records | tuple[Records | None, ...] | None:
        """What was drawn besides, see `sela_ext.kernels.sample_effects`; None if the augmentation draws none.

        A tuple likewise.
        """
        return self._records[1]


@dataclass(frozen=True)
class Known:
    """What was drawn for a batch, at hand."""

    params: Records | tuple[Records, ...]
    effects: Records | tuple[Records | None, ...] | None

    def __call__(self) -> Drawn:
        """Parameters and effects."""
        return self.params, self.effects


@dataclass(frozen=True)
class DrawnAgain:
    """What a device has drawn for a batch: drawn again on the CPU."""

    views: tuple[Augment, ...]
    single: bool
    sides: tuple[int, int]
    keys: Int64Array
    seed: int
    epoch: int
    first_view: int

    def __call__(self) -> Drawn:
        """Parameters and effects."""
        params, effects = [], []
        for number, view in enumerate(self.views, self.first_view):
            key = {"seed": self.seed, "epoch": self.epoch, "view": number}
            params.append(kernels.sample_parameters(view, *self.sides, self.keys, **key))
            effects.append(kernels.sample_effects(view, self.keys, **key) if view.draws_effects else None)
        return (params[0], effects[0]) if self.single else (tuple(params), tuple(effects))


@dataclass(frozen=True)
class _Made:
    """A batch but for its tensors on the device.

    Attributes:
        tensors: What it is made of: its index first.
        upload: The copy of them to a device, if that is under way.
        views: Makes the views of the others.
        parts: All other parts.
    """

    tensors: list[torch.Tensor]
    upload: Upload | None
    views: Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]]
    parts: dict[str, Any]

    def batch(self, uploader: Uploader | None) -> Batch:
        """The batch, for the current stream."""
        there = self.tensors
        if uploader is not None and self.upload is not None:
            there = uploader.receive(self.upload)
        views = self.views(there[1:])
        return Batch(images=views[0], views=views, placed=there[0], **self.parts)


@dataclass(frozen=True)
class _Begun:
    """A batch that is being filled."""

    rows: Rows
    finish: Callable[[], dict[int, DataError]]
    position: int


class Loader:
    """Batches of augmented images.

    Args:
        data: Anything that `open_source` takes.
        batch_size: Images per batch and rank, B >= 1. The last batch of an epoch is smaller where N is not a multiple.
        augment: Default: `Augment.none` at the longer side of images of one known size, `Augment.eval(224)` otherwise.
            A sequence of them gives several views of every image, as `Augment.multi_crop` does: each image is read
            once.
        seed: 0..2**64 - 1; with the epoch and the image it determines the order and all that is drawn.
        shuffle: A new order for every epoch, or 0..N-1.
        dtype: torch.float32, bfloat16 or float16; or uint8, which is not normalised.
        channels_last: Memory format of the images.
        threads: Threads for decoding and for augmentation; "auto" = processors that this process may use. The bits do
            not depend on it.
        rank: This process among `world_size`. Rank r takes positions r, r + world_size, ... of the epoch's order: every
            image comes once over all ranks, and the first N % world_size ranks have one image more than the others.
        world_size: Number of processes, at most N.
        whole_batches: Deal out the batches that one process alone would have, rank, rank + world_size, ..., instead of
            images: every batch is then the same for any number of ranks. A rank may have none.
        drop_last: Leave a smaller last batch out.
        device: "cpu", or "cuda" ("cuda:1", ...): batches are copied from pinned memory while others are made, unless
            the images are kept there.
        resident: Whether the images are kept on the device and augmented there: "auto", where that can be done and they
            take at most half of the free memory; True, or else it is an error; False; or a
            `sela_ext.data.residency.ResidentImages` that loaders of the same source share.
        send: What of images in files goes to a CUDA device: "planes", the decoded samples of JPEG files, of which the
            device makes the views (within 0.01 of 255 of the processor's); "views", finished; "auto", planes where the
            device can do that and they are not much more than the views.
        on_bad_image: "raise", or "skip": leave the image out of its batch and list it in `bad_images`. A batch of which
            nothing is left is not yielded.
        max_bad_fraction: Share of the images that may be skipped, 0..1, before it is an error after all.
        labels: True labels, see `open_source`.
        view: Number of the (first) view, 0..255: another draw of the augmentation for the same image and epoch.
        exact: Resample JPEG images as RGB pixels, as torchvision does, instead of as the planes that they are stored
            in, which is faster and differs by 0.3 of 255 in the mean. Images of other formats, and small ones, always
            are.
        exif: Turn image files as their EXIF orientation says; else their pixels are used as stored.
        index: Where to keep the entry points of JPEG files that the first epoch finds, which let later ones decode only
            what they need: a folder; "auto", a temporary file; or a `sela_ext.kernels.IndexStore` that loaders of the
            same source share; or None: nowhere, each epoch reads the files to their end. The bits do not depend on it.
        prefetch: Batches made ahead of the consumer, >= 1.

    Attributes:
        source: The images.
        augment: What is applied.
        views: The same as a tuple, one per view.
        max_bad_fraction: As given.
        bad_images: (index, name, reason) of each image that was skipped, once.
        residency: Whether the images are kept on the device, and why.
        sending: What goes to the device in batches, and why.
        seconds: Total time that epochs took, from the first batch that was asked for to the end.
        wait_seconds: Part of it that the consumer waited for batches.

    Raises:
        OptionError: An option of wrong type or out of range, no batch for this rank, or images that cannot be kept on
            the device and are to be.
        DataError: See `open_source`; while iterating, an image that cannot be read, or too many of them.
        ResourceError: `device` names a GPU that is not there, or has no room for images that are to be kept there;
            while iterating, too many open files.

    Example:
        >>> loader = Loader("digits", batch_size=512, threads=1)
        >>> [tuple(batch.images.shape) for batch in loader.epoch(0)]
        [(512, 1, 32, 32), (512, 1, 32, 32), (512, 1, 32, 32), (261, 1, 32, 32)]
        >>> crops = Loader("digits", augment=Augment.multi_crop((24, 16), (2, 1)), threads=1)
        >>> [tuple(view.shape) for view in next(crops.epoch(0)).views]
        [(256, 1, 24, 24), (256, 1, 24, 24), (256, 1, 16, 16)]
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int = 256,
        augment: Augment | Sequence[Augment] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        threads: int | Literal["auto"] = "auto",
        rank: int = 0,
        world_size: int = 1,
        whole_batches: bool = False,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
        resident: bool | Literal["auto"] | ResidentImages = "auto",
        send: Wish = "auto",
        on_bad_image: Literal["raise", "skip"] = "raise",
        max_bad_fraction: float = 0.01,
        labels: Any = None,
        view: int = 0,
        exact: bool = False,
        exif: bool = False,
        index: str | os.PathLike[str] | IndexStore | None = "auto",
        prefetch: int = BATCHES_AHEAD,
    ) -> None:
        size = check_integer("batch_size", batch_size, 1)
        self._seed = check_integer("seed", seed, 0, 2**64 - 1)
        first_view = check_integer("view", view, 0, 255)
        ranks = check_integer("world_size", world_size, 1)
        number = check_integer("rank", rank, 0, ranks - 1)
        self._threads = check_threads(threads)
        self._ahead = check_integer("prefetch", prefetch, 1)
        if dtype not in DTYPES:
            raise OptionError(f"dtype: expected torch.float32, bfloat16, float16 or uint8, found {dtype}")
        if augment is not None:
            check_views(augment, first_view, dtype)
        if on_bad_image not in ("raise", "skip"):
            raise OptionError(f'on_bad_image: expected "raise" or "skip", found {on_bad_image!r}')
        if not isinstance(max_bad_fraction, (int, float)) or not 0 <= max_bad_fraction <= 1:
            raise OptionError(f"max_bad_fraction: expected a number 0..1, found {max_bad_fraction!r}")
        if not isinstance(index, (str, os.PathLike, IndexStore, type(None))):
            raise OptionError(f'index: expected "auto", a folder, an IndexStore or None, found {type(index).__name__}')
        if not isinstance(resident, (bool, ResidentImages)) and resident != "auto":
            raise OptionError(f'resident: expected "auto", True, False or ResidentImages, found {resident!r}')
        if send not in ("auto", "planes", "views"):
            raise OptionError(f'send: expected "auto", "planes" or "views", found {send!r}')
        self._send: Wish = send
        self._shuffle = check_flag("shuffle", shuffle)
        last, channels_last = check_flag("drop_last", drop_last), check_flag("channels_last", channels_last)
        self._exact = check_flag("exact", exact)
        self._exif = check_flag("exif", exif)
        self._device = check_device(device)
        self._index = index
        self._store: IndexStore | None = index if isinstance(index, IndexStore) else None
        self._reader: tuple[int, kernels.Reader] | None = None  # with the process that it belongs to
        self._reader_lock = threading.Lock()
        self._others: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)

        self.source: Source = open_source(data, labels=labels)
        if self.source.vectors is not None:
            raise DataError(
                f"data: expected images, found {self.source.describe()}; train, predict and embed take them"
            )
        self.augment: Augment | Sequence[Augment] = _default_augment(self.source) if augment is None else augment
        self.views: tuple[Augment, ...] = check_views(self.augment, first_view, dtype)
        self._share = Share(len(self.source), number, ranks, size, last, check_flag("whole_batches", whole_batches))
        self.max_bad_fraction = float(max_bad_fraction)
        self._bad = BadImages(
            self.source,
            skip=on_bad_image == "skip",
            max_fraction=self.max_bad_fraction,
        )
        self.bad_images: list[tuple[int, str, str]] = self._bad.listed
        self.seconds: float = 0.0
        self.wait_seconds: float = 0.0
        self._drawing = Drawing(self.views, self._seed, first_view, dtype, channels_last)
        self._kept: ResidentImages | None = None
        self._keeps_for_itself = not isinstance(resident, ResidentImages)
        if isinstance(resident, ResidentImages):
            if not resident.fits(self.source):
                raise OptionError(f"resident: expected images {list(resident.shape)}, found {self.source.describe()}")
            problem = next((no for view in self.views if (no := resident_refusal(resident.shape, view, dtype))), None)
            if problem is None:
                self.residency = Residency(True, "kept on the device, for several loaders", resident.nbytes)
                self._kept = resident
            else:
                self.residency = Residency(False, f"not kept: images that CUDA kernels do not augment: {problem}")
        else:
            self.residency = plan_residency(self.source, self.views, dtype, self._device, wish=resident)
            if self.residency.kept:
                self._kept = ResidentImages(self.source, self._device)
        self._rows = max(1, min(size, len(self._share)))
        self._ring = self._make_ring()

    def __len__(self) -> int:
        """Batches of this rank in an epoch from its start."""
        return self._share.batches

    def epoch(
        self, epoch: int, start: int = 0, *, shuffle: bool | None = None, order: npt.ArrayLike | None = None
    ) -> Generator[Batch, None, None]:
        """Iterate over one epoch; its threads run only while this iterator is in use.

        Args:
            epoch: Number of the epoch, >= 0; with the seed it determines order and augmentation.
            start: Position to resume from: `position` of the last batch that was used, bit for bit the same batches
                follow.
            shuffle: Overrides the loader's.
            order: Numbers of the images that this epoch has, [L], in their order and of all ranks together: some may
                be left out, others come several times, each time with another augmentation. None: all, once.

        Returns:
            An iterator of batches. Leaving the loop early, or closing the iterator, ends its threads.

        Raises:
            OptionError: An argument out of range; `shuffle` and `order` together.

        Example:
            >>> loader = Loader("digits", batch_size=2, threads=1)
            >>> [batch.index.tolist() for batch in loader.epoch(0, order=[7, 3, 7])]
            [[7, 3], [7]]
        """
        number = check_integer("epoch", epoch, 0, 2**32 - 1)
        if order is None:
            share = self._share
            shuffled = self._shuffle if shuffle is None else check_flag("shuffle", shuffle)
            keys = share.order(seed=self._seed, epoch=number, shuffle=shuffled)
        elif shuffle is not None:
            raise OptionError("shuffle and order: expected at most one of them, found both")
        else:
            share, keys = self._share.given(occurrence_keys(order, len(self.source)))
            largest = min(share.batch_size, len(share))
            if largest > self._rows:
                self._rows = largest
                self._ring = self._make_ring()
                self.__dict__.pop("_arenas", None)
        begin = check_integer("start", start, 0, len(share))
        if not len(share):
            return _no_batches()
        kept = self._kept
        if kept is not None:
            return self._deliver_kept(kept, number, share, keys, begin)
        return self._deliver(number, share, keys, begin)

    @cached_property
    def sending(self) -> Sending:
        """What goes to the device in batches, and why; some files are looked at to find out.

        Raises:
            OptionError: `send` is "planes", and the device cannot make views of them.
        """
        if self._kept is not None:
            return Sending(False, "nothing: the images are kept on the device")
        return plan_sending(
            self.source,
            self.views,
            self._drawing.dtype,
            self._device,
            wish=self._send,
            measure=self._measure,
        )

    def _measure(self, index: Int64Array) -> Int64Array:
        """Bytes of the samples that some images need in epoch 0."""
        located = self.source.locate_all(index)
        first = self._drawing.first_view
        read = self._open_reader().submit_planes(
            located.items,
            index,
            np.zeros(0, np.uint8),
            seed=self._seed,
            epoch=0,
            views=range(first, first + len(self.views)),
            indexes=located.indexes,
        )
        return read.wait().wanted

    @cached_property
    def _arenas(self) -> TensorRing:
        """Memory for the samples of batches, and for records of them."""
        return TensorRing([(1, 1, self.arena_nbytes)], rows=1, dtype=torch.uint8, pinned=self._pinned)

    @property
    def arena_nbytes(self) -> int:
        """Bytes that are sent of a batch, at most, beside views: samples and records; 0 where none are."""
        if not self.sending.planes:
            return 0
        return self.sending.room(self._rows) + records_bytes(self._rows, len(self.views))

    def close(self) -> None:
        """End the compiled reader's threads, and let go of memory, on the device too; a later epoch starts anew."""
        if self._kept is not None and self._keeps_for_itself:
            self._kept.close()
        with self._reader_lock:
            if self._reader is not None and self._reader[0] == os.getpid():
                self._reader[1].close()
                self._reader = None
            if not isinstance(self._index, IndexStore):
                self._store = None

    def _deliver(self, epoch: int, share: Share, keys: Int64Array, start: int) -> Generator[Batch, None, None]:
        """What the consumer's thread does: wait for batches, and for their copies on a device."""
        sends_planes = self.sending.planes
        uploader = None if self._device.type == "cpu" else Uploader(self._device)
        lying = self.source.array_rows
        picking = None
        # Of the batches ahead one is begun, as far as that goes on by itself; the others are finished.
        begun = min(1, self._ahead - 1)
        if lying is not None:
            picking = Picking(
                *lying,
                self._drawing,
                batch_size=min(share.batch_size, len(share)),
                batches=share.batches,
                threads=self._threads,
                ahead=self._ahead,
            )
            begun = picking.begun
        batches_made = self._batches(epoch, share.pieces(keys, start), start, begun, picking, uploader)
        batches = prefetch(batches_made, depth=self._ahead - begun, on_wait=self._waited)
        last = time.perf_counter()
        try:
            for made in batches:
                batch = made.batch(uploader)
                del made
                last, before = time.perf_counter(), last
                self.seconds += last - before
                yield batch
                del batch  # or their memory could not be used again before the next batch is there
        finally:
            self.seconds += time.perf_counter() - last
            batches.close()
            if uploader is not None:
                uploader.close()
            self._ring.trim()
            if sends_planes:
                self._arenas.trim()

    def _deliver_kept(
        self, kept: ResidentImages, epoch: int, share: Share, keys: Int64Array, start: int
    ) -> Generator[Batch, None, None]:
        """Batches of images on the device, each made when it is asked for, on the stream that is current then."""
        last = time.perf_counter()
        images = kept.images()
        card = usable(images.device)
        assert card is not None
        orders = Orders(keys[start:] % len(self.source), keys[start:], images.device)
        sent = card.mark()
        position = start
        try:
            for piece in share.pieces(keys, start):
                placed, drawn_by = orders.piece(position - start, position - start + len(piece))
                card.follow(sent)  # whichever stream is current now
                card.hold(images, *orders.tensors)
                views = tuple(
                    augment_kept(
                        images,
                        placed,
                        drawn_by,
                        view,
                        seed=self._seed,
                        epoch=epoch,
                        view=number,
                        dtype=self._drawing.dtype,
                        channels_last=self._drawing.channels_last,
                    )
                    for number, view in enumerate(self.views, self._drawing.first_view)
                )
                position += len(piece)
                batch = self._kept_batch(views, placed, piece, epoch, position, kept.shape[1:3])
                last, before = time.perf_counter(), last
                self.seconds += last - before
                self.wait_seconds += last - before
                yield batch
                del batch, views
                self.seconds += time.perf_counter() - last
                last = time.perf_counter()
        finally:
            self.seconds += time.perf_counter() - last

    def _kept_batch(
        self,
        views: tuple[torch.Tensor, ...],
        placed: torch.Tensor,
        keys: Int64Array,
        epoch: int,
        position: int,
        sides: tuple[int, int],
    ) -> Batch:
        index = keys % len(self.source)
        labels = self.source.labels_of(index)
        single = isinstance(self.augment, Augment)
        return Batch(
            images=views[0],
            index=torch.from_numpy(index),
            labels=None if labels is None else torch.from_numpy(labels.copy()),
            position=position,
            views=views,
            placed=placed,
            drawn=DrawnAgain(self.views, single, sides, keys, self._seed, epoch, self._drawing.first_view),
        )

    @property
    def wait_share(self) -> float:
        """Share of the time spent in epochs that the consumer waited for batches, 0..1."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    def _waited(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _batches(
        self,
        epoch: int,
        pieces: Iterator[Int64Array],
        start: int,
        ahead: int,
        picking: Picking | None,
        uploader: Uploader | None,
    ) -> Generator[_Made, None, None]:
        """What the background thread does: begin batches, finish them in order, send them to the device."""
        fallback = Fallback(self.source, self._drawing, threads=self._threads, upright=self._exif)
        reading = self._open_reading(fallback) if picking is None and self.source.encoded else None
        begun: deque[_Begun] = deque()
        position = start
        try:
            for piece in pieces:
                position += len(piece)
                keys = self._bad.without_known(piece)
                if len(keys):
                    if reading is not None and reading.with_bad:
                        keys = piece
                    begun.append(self._begin(keys, epoch, position, picking or reading, fallback))
                if len(begun) > ahead:
                    yield from self._finish(begun.popleft(), uploader)
            while begun:
                yield from self._finish(begun.popleft(), uploader)
        finally:
            if picking is not None:
                picking.close()
            if reading is not None:
                reading.close()
            fallback.close()

    def _begin(
        self,
        keys: Int64Array,
        epoch: int,
        position: int,
        ready: Picking | EncodedReading | None,
        fallback: Fallback,
    ) -> _Begun:
        index = keys % len(self.source)
        if isinstance(ready, EncodedReading):
            rows = ready.empty(index, keys, epoch)
        else:
            rows = Rows.empty(index, keys, epoch, self._ring.lend(len(keys)), self.views)
        if ready is None:
            finish = fallback.start(rows, np.arange(len(keys), dtype=np.int64))
        else:
            finish = ready.start(rows)
        return _Begun(rows, finish, position)

    def _finish(self, begun: _Begun, uploader: Uploader | None) -> Generator[_Made, None, None]:
        """The batch, unless all of its images are bad."""
        bad = begun.finish()
        rows = begun.rows
        good = ~self._bad.known(rows.keys)
        if bad or not good.all():
            for place in sorted(bad):
                good[place] = False
                self._bad.add(int(rows.index[place]), bad[place])
            if not good.any():
                return
            rows = rows.keep(good)
        index = torch.from_numpy(rows.index.copy())
        tensors = [index.pin_memory() if self._pinned else index]
        upload: Upload | None = None
        views: Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]] = tuple
        if isinstance(rows, PlaneRows):
            planes = PlaneBatch(rows, self._drawing, self._device, exact=self._exact)
            tensors += planes.tensors
            views = planes.views
            if uploader is not None:
                upload = uploader.send(tensors, lambda there: planes.addressed(there[1:]))
            else:
                planes.addressed(tensors[1:])
        else:
            tensors += rows.images
            if uploader is not None:
                upload = uploader.send(tensors)
        labels = self.source.labels_of(rows.index)
        single = isinstance(self.augment, Augment)
        yield _Made(
            tensors if upload is None else [],
            upload,
            views,
            {
                "index": index,
                "labels": None if labels is None else torch.from_numpy(labels.copy()),
                "position": begun.position,
                "drawn": Known(
                    rows.params[0] if single else tuple(rows.params),
                    rows.effects[0] if single else tuple(rows.effects),
                ),
            },
        )

    @property
    def _pinned(self) -> bool:
        """Whether batches are made in memory that a GPU can copy from while the processor goes on."""
        return self._device.type == "cuda"

    def _make_ring(self) -> TensorRing:
        """Memory for batches of views."""
        channels = self.source.channels
        return TensorRing(
            [(view.output_channels(channels), view.size, view.size) for view in self.views],
            rows=self._rows,
            dtype=self._drawing.dtype,
            channels_last=self._drawing.channels_last,
            pinned=self._pinned,
        )

    def _open_reading(self, fallback: Fallback) -> EncodedReading:
        """How batches of encoded images are read in an epoch."""
        reader = self._open_reader()  # others are reset with it
        given = self.source, self._drawing, reader, fallback, self._others
        if self.sending.planes:
            return PlaneReading(*given, ring=self._ring, arenas=self._arenas, sending=self.sending)
        return Reading(*given, ring=self._ring)

    def _open_reader(self) -> kernels.Reader:
        """The compiled reader of this process: after a fork, the threads of the parent's are not there."""
        with self._reader_lock:
            if self._reader is not None and self._reader[0] == os.getpid():
                if self._store is not None:
                    self._store.refresh()  # what other ranks found in the last epoch
                return self._reader[1]
            if self._reader is not None:
                _readers_of_parents.append(self._reader)
            if isinstance(self._index, (str, os.PathLike)):
                self._store = open_store(None if self._index == "auto" else self._index, self._share.rank)
            reader = kernels.Reader(
                self.views,
                threads=self._threads,
                channels=self.source.channels,
                exact=self._exact,
                exif=self._exif,
                dtype=self._drawing.dtype,
                channels_last=self._drawing.channels_last,
                index=self._store,
            )
            self._reader = os.getpid(), reader
            self._others = np.zeros(len(self.source), dtype=np.bool_)
            return reader


# Readers from before a fork: closing them would wait for threads that only the parent has.
_readers_of_parents: list[Any] = []


def _no_batches() -> Generator[Batch, None, None]:
    """The epoch of a rank that has no batch."""
    yield from ()


def _default_augment(source: Source) -> Augment:
    size = source.image_size
    return Augment.eval(DEFAULT_SIZE) if size is None else Augment.none(max(size))
