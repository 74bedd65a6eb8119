"""`Loader`: shuffled, augmented batches from any source, reproducible and resumable.

Nothing is drawn from a state: the order is keyed by (seed, epoch), the augmentation of an image by (seed, epoch, image,
view). So batches do not depend on threads or ranks, and an epoch can begin at any position.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from sela_ext import kernels
from sela_ext.data.opening import open_source
from sela_ext.data.prefetch import prefetch
from sela_ext.data.source import Int64Array, Source, UInt8Array
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels import Augment

# Batches ready or in the making while the consumer works on one.
BATCHES_AHEAD = 3
# Files read by one task of the decoding threads.
IMAGES_PER_TASK = 8
# Output side for images whose sizes differ, when no augmentation is given.
DEFAULT_SIZE = 224
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


@dataclass(frozen=True)
class Batch:
    """B images of one epoch, in its order.

    Attributes:
        images: [B, C, S, S] of the loader's dtype, on its device; C = 2 where the augmentation takes gradients.
        index: Numbers of the images in the source, int64 [B], on the CPU.
        labels: True labels, int64 [B], -1 where unknown, on the CPU; None if the source has none.
        params: What was drawn for each image: structured array [B], see `sela_ext.kernels.sample_parameters`.
        position: Images of this rank's order that are done with this batch: `epoch(e, start=position)` goes on here.
        effects: What was drawn besides, see `sela_ext.kernels.sample_effects`; None if the augmentation draws none.
    """

    images: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor | None
    params: npt.NDArray[Any]
    position: int
    effects: npt.NDArray[Any] | None = None


class Loader:
    """Batches of augmented images.

    Args:
        data: Anything that `open_source` takes.
        batch_size: Images per batch and rank, B >= 1. The last batch of an epoch is smaller where N is not a multiple.
        augment: Default: `Augment.none` at the longer side of images of one known size, `Augment.eval(224)` otherwise.
        seed: 0..2**64 - 1; with the epoch and the image it determines the order and all that is drawn.
        shuffle: A new order for every epoch, or 0..N-1.
        dtype: torch.float32, bfloat16 or float16; or uint8, which is not normalised.
        channels_last: Memory format of the images.
        threads: Threads for decoding and for augmentation; "auto" = processors that this process may use. The bits do
            not depend on it.
        rank: This process among `world_size`. Rank r takes positions r, r + world_size, ... of the epoch's order: every
            image comes once over all ranks, and the first N % world_size ranks have one image more than the others.
        world_size: Number of processes, at most N.
        drop_last: Leave a smaller last batch out.
        device: "cpu", or "cuda" ("cuda:1", ...): batches are copied through pinned memory without waiting.
        on_bad_image: "raise", or "skip": leave the image out of its batch and list it in `bad_images`. A batch of which
            nothing is left is not yielded.
        max_bad_fraction: Share of this rank's images that may be skipped, 0..1, before it is an error after all.
        labels: True labels, see `open_source`.
        view: Number of the view, 0..255: another draw of the augmentation for the same image and epoch.

    Attributes:
        source: The images.
        augment: What is applied.
        bad_images: (index, name, reason) of each image that was skipped, once.
        wait_seconds: Total time that the consumer waited for batches.

    Raises:
        OptionError: An option of wrong type or out of range, or no batch for this rank.
        DataError: See `open_source`; while iterating, an image that cannot be read, or too many of them.
        ResourceError: `device` names a GPU that is not there.

    Example:
        >>> loader = Loader("digits", batch_size=512, threads=1)
        >>> [tuple(batch.images.shape) for batch in loader.epoch(0)]
        [(512, 1, 32, 32), (512, 1, 32, 32), (512, 1, 32, 32), (261, 1, 32, 32)]
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int = 256,
        augment: Augment | None = None,
        seed: int = 0,
        shuffle: bool = True,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        threads: int | Literal["auto"] = "auto",
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
        on_bad_image: Literal["raise", "skip"] = "raise",
        max_bad_fraction: float = 0.01,
        labels: Any = None,
        view: int = 0,
    ) -> None:
        self._batch_size = _integer("batch_size", batch_size, 1)
        self._seed = _integer("seed", seed, 0, 2**64 - 1)
        self._view = _integer("view", view, 0, 255)
        self._world_size = _integer("world_size", world_size, 1)
        self._rank = _integer("rank", rank, 0, self._world_size - 1)
        self._threads = _processors() if threads == "auto" else _integer("threads", threads, 1)
        if dtype not in DTYPES:
            raise OptionError(f"dtype: expected torch.float32, bfloat16, float16 or uint8, found {dtype}")
        if augment is not None and not isinstance(augment, Augment):
            raise OptionError(f"augment: expected a sela_ext.Augment, found {type(augment).__name__}")
        if on_bad_image not in ("raise", "skip"):
            raise OptionError(f'on_bad_image: expected "raise" or "skip", found {on_bad_image!r}')
        if not 0 <= max_bad_fraction <= 1:
            raise OptionError(f"max_bad_fraction: expected 0..1, found {max_bad_fraction}")
        if augment is not None and augment.sobel and dtype == torch.uint8:
            raise OptionError("dtype: expected a floating-point type with sobel, found torch.uint8")
        self._dtype = dtype
        self._channels_last = bool(channels_last)
        self._shuffle = bool(shuffle)
        self._drop_last = bool(drop_last)
        self._device = _device(device)
        self._skip = on_bad_image == "skip"
        self._max_bad_fraction = float(max_bad_fraction)

        self.source: Source = open_source(data, labels=labels)
        self.augment: Augment = _default_augment(self.source) if augment is None else augment
        self.bad_images: list[tuple[int, str, str]] = []
        self.wait_seconds: float = 0.0
        self._bad: set[int] = set()
        self._lock = threading.Lock()

        count = len(self.source)
        sizes = f"{count} images, batch_size {self._batch_size}, {self._world_size} ranks"
        if self._world_size > count:
            raise OptionError(f"world_size: expected at least one image for every rank, found {sizes}")
        if self._drop_last and self._share() < self._batch_size:
            raise OptionError(f"drop_last: expected at least one full batch for rank {self._rank}, found {sizes}")

    def __len__(self) -> int:
        """Batches of this rank in an epoch from its start."""
        share = self._share()
        return share // self._batch_size if self._drop_last else -(-share // self._batch_size)

    def epoch(self, epoch: int, start: int = 0, *, shuffle: bool | None = None) -> Generator[Batch, None, None]:
        """Iterate over one epoch; background threads run only while this iterator is in use.

        Args:
            epoch: Number of the epoch, >= 0; with the seed it determines order and augmentation.
            start: Position to resume from: `position` of the last batch that was used, bit for bit the same batches
                follow.
            shuffle: Overrides the loader's.

        Returns:
            An iterator of batches. Leaving the loop early, or closing the iterator, ends its threads.
        """
        number = _integer("epoch", epoch, 0, 2**32 - 1)
        begin = _integer("start", start, 0, self._share())
        order = self._order(number, self._shuffle if shuffle is None else bool(shuffle))
        return self._deliver(prefetch(self._batches(number, order, begin), depth=BATCHES_AHEAD, on_wait=self._waited))

    def _deliver(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        try:
            for batch in batches:
                if self._device.type == "cpu":
                    yield batch
                else:
                    images = batch.images.to(self._device, non_blocking=True)
                    yield dataclasses.replace(batch, images=images)
        finally:
            batches.close()

    def _waited(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _share(self) -> int:
        """Images of this rank."""
        return (len(self.source) - self._rank + self._world_size - 1) // self._world_size

    def _order(self, epoch: int, shuffle: bool) -> Int64Array:
        count = len(self.source)
        whole = kernels.permutation(count, seed=self._seed, epoch=epoch) if shuffle else np.arange(count)
        order: Int64Array = np.ascontiguousarray(whole[self._rank :: self._world_size], dtype=np.int64)
        return order

    def _batches(self, epoch: int, order: Int64Array, start: int) -> Generator[Batch, None, None]:
        stop = len(order) - self._batch_size + 1 if self._drop_last else len(order)
        pieces = (order[begin : begin + self._batch_size] for begin in range(start, stop, self._batch_size))
        array = self.source.array
        position = start
        if array is not None:
            for rows in pieces:
                position += len(rows)
                yield self._augmented(array, rows, epoch, position)
            return
        for rows, images in self._read(pieces):
            position += len(rows)
            kept = self._without_bad(rows, images)
            if len(kept):
                good = [image for image in images if not isinstance(image, DataError)]
                yield self._augmented(good, kept, epoch, position)

    def _augmented(self, images: UInt8Array | list[UInt8Array], index: Int64Array, epoch: int, position: int) -> Batch:
        rows: Int64Array | None
        if isinstance(images, np.ndarray):
            rows = index
            heights = np.full(len(index), images.shape[1], dtype=np.int32)
            widths = np.full(len(index), images.shape[2], dtype=np.int32)
        else:
            rows = None
            heights = np.array([image.shape[0] for image in images], dtype=np.int32)
            widths = np.array([image.shape[1] for image in images], dtype=np.int32)
        params = kernels.sample_parameters(
            self.augment, heights, widths, index, seed=self._seed, epoch=epoch, view=self._view
        )
        effects = None
        if self.augment.draws_effects:
            effects = kernels.sample_effects(self.augment, index, seed=self._seed, epoch=epoch, view=self._view)
        size = self.augment.size
        out = torch.empty(
            (len(index), self.augment.output_channels(self.source.channels), size, size),
            dtype=self._dtype,
            memory_format=torch.channels_last if self._channels_last else torch.contiguous_format,
            pin_memory=self._device.type == "cuda",
        )
        kernels.augment(
            images,
            params,
            self.augment,
            effects=effects,
            rows=rows,
            out=out,
            dtype=self._dtype,
            channels_last=self._channels_last,
            threads=self._threads,
        )
        labels = self.source.labels_of(index)
        return Batch(
            images=out,
            index=torch.from_numpy(index.copy()),
            labels=None if labels is None else torch.from_numpy(labels.copy()),
            params=params,
            position=position,
            effects=effects,
        )

    def _read(
        self, pieces: Iterator[Int64Array]
    ) -> Generator[tuple[Int64Array, list[UInt8Array | DataError]], None, None]:
        """Read the images of each batch; while one is augmented, the threads read the next."""
        if self._threads == 1 or not self.source.parallel_reads:
            for rows in pieces:
                yield rows, self._read_some(rows)
            return
        pending: deque[tuple[Int64Array, list[Future[list[UInt8Array | DataError]]]]] = deque()

        def images_of(futures: list[Future[list[UInt8Array | DataError]]]) -> list[UInt8Array | DataError]:
            return [image for future in futures for image in future.result()]

        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="sela-decode")
        try:
            for rows in pieces:
                parts = (rows[i : i + IMAGES_PER_TASK] for i in range(0, len(rows), IMAGES_PER_TASK))
                pending.append((rows, [pool.submit(self._read_some, part) for part in parts]))
                if len(pending) > 1:
                    done, futures = pending.popleft()
                    yield done, images_of(futures)
            for done, futures in pending:
                yield done, images_of(futures)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read_some(self, rows: Int64Array) -> list[UInt8Array | DataError]:
        return [self._read_one(int(row)) for row in rows]

    def _read_one(self, index: int) -> UInt8Array | DataError:
        if index in self._bad:
            return DataError(f"image {index} was skipped before")
        try:
            return self.source.read(index)
        except DataError as error:
            return error

    def _without_bad(self, rows: Int64Array, images: list[UInt8Array | DataError]) -> Int64Array:
        """The rows that were read; the others are recorded, or raised, as `on_bad_image` says."""
        good = np.ones(len(rows), dtype=bool)
        for i, image in enumerate(images):
            if not isinstance(image, DataError):
                continue
            if not self._skip:
                raise DataError(f'{image}; remove the file, or use on_bad_image="skip"') from image
            good[i] = False
            index = int(rows[i])
            with self._lock:
                if index in self._bad:
                    continue
                self._bad.add(index)
                self.bad_images.append((index, self.source.names[index], str(image)))
                if len(self._bad) > self._max_bad_fraction * self._share():
                    first = "; ".join(reason for _, _, reason in self.bad_images[:3])
                    raise DataError(
                        f"{len(self._bad)} of {self._share()} images cannot be read, more than "
                        f"max_bad_fraction={self._max_bad_fraction:g}: {first}"
                    )
        return rows[good]


def _default_augment(source: Source) -> Augment:
    size = source.image_size
    return Augment.eval(DEFAULT_SIZE) if size is None else Augment.none(max(size))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    allowed = f">= {low}" if high is None else f"{low}..{high}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise OptionError(f"{name}: expected an integer {allowed}, found {value!r}")
    if value < low or (high is not None and value > high):
        raise OptionError(f"{name}: expected {allowed}, found {value}")
    return int(value)


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f'device: expected "cpu" or "cuda", found {device!r}') from error
    if found.type not in ("cpu", "cuda"):
        raise OptionError(f'device: expected "cpu" or "cuda", found {device!r}')
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f'device: "{device}" is not there, {torch.cuda.device_count()} GPUs are; use device="cpu"')
    return found
