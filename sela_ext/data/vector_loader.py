"""`VectorLoader`: shuffled batches of noisy views of feature vectors, with the loader's manners.

As there nothing is drawn from a state: the order is keyed by (seed, epoch), a view by (seed, epoch, row, view). Batches
do not depend on threads, and an epoch can begin at any position. A thread makes batches ahead of the consumer.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

import numpy as np
import torch

from sela_ext.data.bad_images import BadImages
from sela_ext.data.loader import BATCHES_AHEAD, Batch, Known
from sela_ext.data.order import Share, occurrence_keys
from sela_ext.data.prefetch import prefetch
from sela_ext.data.source import Int64Array, Source
from sela_ext.data.upload import Upload, Uploader
from sela_ext.errors import DataError
from sela_ext.kernels import VectorView, vector_rows


class VectorLoader:
    """Batches of feature vectors.

    Args:
        source: Vectors.
        batch_size: Rows per batch, B >= 1.
        view: How rows are seen; None: as they are.
        views: Views of every row.
        seed: With epoch and row it determines order and noise.
        shuffle: A new order for every epoch, or 0..N-1.
        rank: This process among `world_size`; see `Loader`.
        world_size: Number of processes.
        whole_batches: Deal out batches instead of rows; see `Loader`.
        drop_last: Leave a smaller last batch out.
        threads: Of the gathering; the bits do not depend on it.
        device: Where batches are delivered.
        on_bad_image: What becomes of rows that hold NaN or infinity: "raise", or "skip".
        max_bad_fraction: Share of them that "skip" accepts.

    Attributes:
        source: The vectors.
        max_bad_fraction: As given.
        bad_images: (index, name, reason) of each row that is skipped.
        seconds: Total time that epochs took.
        wait_seconds: Part of it that the consumer waited for batches.

    Raises:
        DataError: The source holds no vectors, or rows that are not finite.

    Example:
        >>> import numpy as np
        >>> from sela_ext.data.vectors import VectorSource
        >>> loader = VectorLoader(VectorSource(np.zeros((5, 3), np.float16)), batch_size=2, threads=1)
        >>> [tuple(batch.images.shape) for batch in loader.epoch(0)]
        [(2, 3), (2, 3), (1, 3)]
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int = 256,
        view: VectorView | None = None,
        views: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        whole_batches: bool = False,
        drop_last: bool = False,
        threads: int = 0,
        device: torch.device | str = "cpu",
        on_bad_image: str = "raise",
        max_bad_fraction: float = 0.01,
    ) -> None:
        vectors = source.vectors
        if vectors is None:
            raise DataError(f"data: expected feature vectors [N, D], found {source.describe()}")
        self.source = source
        self._vectors = vectors
        self._view = view
        self._views = views
        self._seed = seed
        self._shuffle = shuffle
        self._threads = threads
        self._device = torch.device(device)
        self._share = Share(len(source), rank, world_size, batch_size, drop_last, whole_batches)
        self.max_bad_fraction = max_bad_fraction
        self._bad = BadImages(source, skip=on_bad_image == "skip", max_fraction=max_bad_fraction, remedy="the row")
        for row in vectors.statistics(threads).bad:
            self._bad.add(int(row), DataError(f"{vectors.name(int(row))}: holds NaN or infinity"))
        self.bad_images: list[tuple[int, str, str]] = self._bad.listed
        self.seconds: float = 0.0
        self.wait_seconds: float = 0.0

    def __len__(self) -> int:
        """Batches of an epoch from its start."""
        return self._share.batches

    @property
    def wait_share(self) -> float:
        """Share of the time spent in epochs that the consumer waited for batches, 0..1."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    def epoch(self, epoch: int, start: int = 0, *, order: Int64Array | None = None) -> Generator[Batch, None, None]:
        """Iterate over one epoch.

        Args:
            epoch: Number of the epoch, >= 0; with the seed it determines order and noise.
            start: Position to resume from: `position` of the last batch that was used.
            order: Rows of the epoch, int64, with repeats where wanted, each time with other noise; None: every row
                once.

        Returns:
            An iterator of batches: `images` are views float32 [B, D].
        """
        share, keys = self._share, order
        if keys is None:
            keys = share.order(seed=self._seed, epoch=epoch, shuffle=self._shuffle)
        else:
            share, keys = share.given(occurrence_keys(keys, len(self.source)))
        return self._deliver(epoch, share.pieces(keys, start), start)

    def close(self) -> None:
        """Nothing is kept between epochs."""

    def _waited(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _deliver(self, epoch: int, pieces: Iterator[Int64Array], start: int) -> Generator[Batch, None, None]:
        """What the consumer's thread does: wait for batches, and for their copies on a device."""
        uploader = None if self._device.type == "cpu" else Uploader(self._device)
        made = self._batches(epoch, pieces, start, uploader)
        batches = prefetch(made, depth=BATCHES_AHEAD, on_wait=self._waited)
        last = time.perf_counter()
        try:
            for batch, upload in batches:
                if uploader is not None and upload is not None:
                    uploader.receive(upload)
                last, before = time.perf_counter(), last
                self.seconds += last - before
                yield batch
                del batch, upload
        finally:
            self.seconds += time.perf_counter() - last
            batches.close()
            if uploader is not None:
                uploader.close()

    def _batches(
        self, epoch: int, pieces: Iterator[Int64Array], start: int, uploader: Uploader | None
    ) -> Generator[tuple[Batch, Upload | None], None, None]:
        """What the background thread does: make batches, and send them to the device."""
        position = start
        for piece in pieces:
            position += len(piece)
            keys = self._bad.without_known(piece)
            if not len(keys):
                continue
            index = torch.from_numpy(keys % len(self.source))
            labels = self.source.labels_of(index.numpy())
            tensors = [self._seen(index.numpy(), keys, epoch, view) for view in range(self._views)] + [index]
            upload = None
            if uploader is not None:
                pinned = self._device.type == "cuda"
                upload = uploader.send([tensor.pin_memory() if pinned else tensor for tensor in tensors])
                tensors = upload.tensors
            *seen, placed = tensors
            yield (
                Batch(
                    images=seen[0],
                    index=index,
                    labels=None if labels is None else torch.from_numpy(labels.copy()),
                    position=position,
                    views=tuple(seen),
                    placed=placed,
                    drawn=Known((), None),
                ),
                upload,
            )

    def _seen(self, index: Int64Array, keys: Int64Array, epoch: int, view: int) -> torch.Tensor:
        rows, _ = vector_rows(
            self._vectors.stored,
            self._vectors.numbers(index),
            self._view,
            seed=self._seed,
            epoch=epoch,
            number=np.ascontiguousarray(keys),
            view_number=view,
            threads=self._threads,
        )
        return torch.from_numpy(rows)
