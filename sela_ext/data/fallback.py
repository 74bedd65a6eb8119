"""The images that the compiled reader does not take: read by their source, then augmented into their rows.

PNG, WebP and other formats, progressive and damaged JPEG files; and whole sources that have no files, such as a torch
Dataset.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sela_ext import kernels
from sela_ext.data.orientation import read_upright
from sela_ext.data.safe_files import out_of_resources
from sela_ext.data.source import Int64Array, Source, UInt8Array
from sela_ext.errors import DataError, ResourceError
from sela_ext.kernels import EFFECTS, PARAMETERS, Augment

# Images that one task of the threads reads, and that one call augments, unless they are large.
IMAGES_PER_TASK = 32
# Decoded pixels that a task holds before they are augmented, bytes: memory stays bounded whatever the images' sizes.
HELD_BYTES = 1 << 23

Records = npt.NDArray[np.void]


@dataclass
class Rows:
    """A batch in the making.

    Attributes:
        index: Numbers of the images, int64 [B].
        keys: What is drawn for them goes by these, int64 [B]: the numbers, but for images that come again.
        epoch: Of the random numbers.
        images: One tensor [B, C, S, S] per view, filled row by row.
        params: What was drawn, one array [B] per view, filled likewise.
        effects: The same of effects; None for views that draw none.
    """

    index: Int64Array
    keys: Int64Array
    epoch: int
    images: list[torch.Tensor]
    params: list[Records]
    effects: list[Records | None]

    @staticmethod
    def empty(
        index: Int64Array, keys: Int64Array, epoch: int, images: list[torch.Tensor], views: tuple[Augment, ...]
    ) -> Rows:
        """Rows to be filled."""
        count = len(index)
        effects = [np.zeros(count, EFFECTS) if view.draws_effects else None for view in views]
        return Rows(index, keys, epoch, images, [np.zeros(count, PARAMETERS) for _ in views], effects)

    def keep(self, good: npt.NDArray[np.bool_]) -> Rows:
        """Only the rows where `good` is true, moved together in place: the tensors are views of the same memory."""
        kept = np.flatnonzero(good)
        return Rows(
            self.index[kept],
            self.keys[kept],
            self.epoch,
            [moved_together(images, kept) for images in self.images],
            [params[kept] for params in self.params],
            [None if effects is None else effects[kept] for effects in self.effects],
        )


def moved_together(images: torch.Tensor, kept: npt.NDArray[np.int64]) -> torch.Tensor:
    """These rows of images [B, ...], in ascending order, moved to its beginning in place: a view of them."""
    for target, row in enumerate(kept.tolist()):
        if target != row:
            images[target] = images[row]
    return images[: len(kept)]


@dataclass(frozen=True)
class Drawing:
    """How images become rows.

    Attributes:
        views: What is done to each image, once per view.
        seed: Of the random numbers.
        first_view: Number of the first view.
        dtype: Of the rows.
        channels_last: Their memory order.
    """

    views: tuple[Augment, ...]
    seed: int
    first_view: int
    dtype: torch.dtype
    channels_last: bool

    def fill(
        self,
        rows: Rows,
        places: Int64Array,
        source: UInt8Array | list[UInt8Array],
        *,
        picked: Int64Array | None = None,
        threads: int = 1,
    ) -> None:
        """Augment images into the rows `places`.

        Args:
            rows: The batch.
            places: int64 [M], ascending, the rows to fill.
            source: M images [H, W, C], or an array [N, H, W, C] of which `picked` are taken.
            picked: int64 [M], or None.
            threads: For the augmentation.
        """
        shapes = [source.shape[1:3]] if isinstance(source, np.ndarray) else [image.shape[:2] for image in source]
        heights, widths = np.array(shapes, dtype=np.int64).T
        drawn, together = rows.keys[places], int(places[-1]) - int(places[0]) + 1 == len(places)
        whole = len(places) == len(rows.index)
        for number, view in enumerate(self.views):
            key = {"seed": self.seed, "epoch": rows.epoch, "view": self.first_view + number}
            params = kernels.sample_parameters(view, heights, widths, drawn, **key)
            effects = kernels.sample_effects(view, drawn, **key) if view.draws_effects else None
            out = kernels.augment(
                source,
                params,
                view,
                effects=effects,
                rows=picked,
                out=rows.images[number][int(places[0]) : int(places[-1]) + 1] if together else None,
                dtype=self.dtype,
                channels_last=self.channels_last,
                threads=threads,
            )
            if not together:
                rows.images[number][torch.from_numpy(places)] = out
            if whole:
                rows.params[number], rows.effects[number] = params, effects
                continue
            rows.params[number][places] = params
            kept = rows.effects[number]
            if kept is not None:
                kept[places] = effects


class Fallback:
    """Reads images through their source, in threads of its own where the source allows it.

    Args:
        source: The images.
        drawing: What becomes of them.
        threads: For reading and augmentation.
        upright: Turn pictures as their EXIF data say.
    """

    def __init__(self, source: Source, drawing: Drawing, *, threads: int, upright: bool) -> None:
        self._source = source
        self._drawing = drawing
        self._threads = threads
        self._upright = upright
        parallel = threads > 1 and source.parallel_reads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sela-decode") if parallel else None

    def start(self, rows: Rows, places: Int64Array) -> Callable[[], dict[int, DataError]]:
        """Begin to read the images at `places` of a batch into its rows.

        Args:
            rows: The batch.
            places: int64 [M], ascending.

        Returns:
            A function that waits for them, and returns the row and the reason of each that cannot be read.
        """
        if not len(places):
            return dict
        pool = self._pool
        if pool is None:
            return lambda: self._fill(rows, places, self._threads)
        size = min(IMAGES_PER_TASK, -(-len(places) // (2 * self._threads)))
        tasks: list[Future[dict[int, DataError]]] = [
            pool.submit(self._fill, rows, places[i : i + size], 1) for i in range(0, len(places), size)
        ]
        return lambda: {row: error for task in tasks for row, error in task.result().items()}

    def close(self) -> None:
        """Give up what was begun, and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self, rows: Rows, places: Int64Array, threads: int) -> dict[int, DataError]:
        bad: dict[int, DataError] = {}
        images: list[UInt8Array] = []
        done: list[int] = []
        held = 0

        def augment() -> None:
            nonlocal held
            if images:
                self._drawing.fill(rows, np.array(done, dtype=np.int64), images, threads=threads)
            images.clear()
            done.clear()
            held = 0

        for place in places.tolist():
            image = self._read(int(rows.index[place]))
            if isinstance(image, DataError):
                bad[place] = image
                continue
            images.append(image)
            done.append(place)
            held += image.nbytes
            if held > HELD_BYTES:
                augment()
        augment()
        return bad

    def _read(self, index: int) -> UInt8Array | DataError:
        try:
            image = read_upright(self._source, index) if self._upright else self._source.read(index)
        except (MemoryError, ResourceError):
            raise
        except DataError as error:
            if out_of_resources(error):
                raise want_of_resources(str(error)) from error
            return error
        except Exception as error:  # a source of somebody else's may raise anything
            reason = " ".join(str(error).split())
            return DataError(f"{self._source.name(index)}: cannot be read: {type(error).__name__}: {reason}")
        channels = self._source.channels
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (channels,):
            found = f"{getattr(image, 'dtype', type(image).__name__)} {list(getattr(image, 'shape', []))}"
            return DataError(f"{self._source.name(index)}: expected pixels uint8 [H, W, {channels}], found {found}")
        return image


def want_of_resources(problem: str) -> ResourceError:
    """The error for files that could not be opened for a reason that is not theirs."""
    return ResourceError(f"{problem}; raise the limit (ulimit -n, or memory), or use fewer threads")
