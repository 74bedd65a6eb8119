"""Which images one process takes in an epoch, and in which order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sela_ext import kernels
from sela_ext.data.source import Int64Array
from sela_ext.errors import OptionError


@dataclass(frozen=True)
class Share:
    """The images of one process among several: positions rank, rank + world_size, ... of an epoch's order.

    Every image comes once over all ranks; the first count % world_size of them have one image more than the others.
    Or whole batches: batches rank, rank + world_size, ... of those that one process alone would have; a rank may then
    have none.

    Attributes:
        count: Images, N.
        rank: This process, 0..world_size-1.
        world_size: Processes, at most N.
        batch_size: Images per batch.
        drop_last: Leave a smaller last batch out.
        whole_batches: Deal out batches instead of images.

    Raises:
        OptionError: No batch for this rank.

    Example:
        >>> share = Share(10, rank=1, world_size=3, batch_size=2)
        >>> len(share), share.batches
        (3, 2)
        >>> share.order(seed=0, epoch=0, shuffle=False).tolist()
        [1, 4, 7]
        >>> share = Share(10, rank=1, world_size=3, batch_size=2, whole_batches=True)
        >>> share.order(seed=0, epoch=0, shuffle=False).tolist()
        [2, 3, 8, 9]
    """

    count: int
    rank: int = 0
    world_size: int = 1
    batch_size: int = 1
    drop_last: bool = False
    whole_batches: bool = False

    def __post_init__(self) -> None:
        if self.whole_batches:
            return
        sizes = f"{self.count} images, batch_size {self.batch_size}, {self.world_size} ranks"
        if self.world_size > self.count:
            raise OptionError(f"world_size: expected at least one image for every rank, found {sizes}")
        if self.drop_last and len(self) < self.batch_size:
            raise OptionError(f"drop_last: expected at least one full batch for rank {self.rank}, found {sizes}")

    def __len__(self) -> int:
        """Images of this rank."""
        if self.whole_batches:
            batches = -(-self.count // self.batch_size)
            mine = len(range(self.rank, batches, self.world_size))
            short = batches * self.batch_size - self.count  # what the last batch lacks
            return mine * self.batch_size - (short if mine and (batches - 1) % self.world_size == self.rank else 0)
        return (self.count - self.rank + self.world_size - 1) // self.world_size

    @property
    def batches(self) -> int:
        """Batches of an epoch from its start."""
        return len(self) // self.batch_size if self.drop_last else -(-len(self) // self.batch_size)

    def order(self, *, seed: int, epoch: int, shuffle: bool) -> Int64Array:
        """Numbers of this rank's images, int64 [len(self)]: a pure function of the arguments."""
        whole = kernels.permutation(self.count, seed=seed, epoch=epoch) if shuffle else np.arange(self.count)
        return self._own(whole)

    def given(self, keys: Int64Array) -> tuple[Share, Int64Array]:
        """This rank's share of an order of somebody else's making: of `occurrence_keys`, int64 [L], of all ranks.

        Raises:
            OptionError: No batch for this rank.
        """
        share = dataclasses.replace(self, count=len(keys))
        return share, share._own(keys)

    def _own(self, whole: npt.NDArray[Any]) -> Int64Array:
        """What of the order of all ranks, [L], is this rank's."""
        mine = whole[self.rank :: self.world_size]
        if self.whole_batches:
            mine = whole[np.arange(len(whole)) // self.batch_size % self.world_size == self.rank]
        return np.ascontiguousarray(mine, dtype=np.int64)

    def pieces(self, order: Int64Array, start: int) -> Iterator[Int64Array]:
        """The batches of `order` from position `start` on, int64 [B] each."""
        stop = len(order) - self.batch_size + 1 if self.drop_last else len(order)
        for begin in range(start, stop, self.batch_size):
            yield order[begin : begin + self.batch_size]


# What the augmentation may be keyed by: see `sela_ext.kernels.sample_parameters`.
_KEYS = 1 << 40


def occurrence_keys(order: Any, count: int) -> Int64Array:
    """Number the images of an order such that an image that comes again has another number: image + N * times before.

    The augmentation is keyed by these: the first time an image is drawn as in any other epoch, and every further time
    anew. Over all ranks, since the keys are those of the whole order. key % N is the image.

    Args:
        order: Numbers of images, [L], in 0..N-1, with repeats.
        count: Images, N.

    Returns:
        int64 [L].

    Raises:
        OptionError: Other numbers, none at all, or an image so often that the keys run out (N * times above 2^40).

    Example:
        >>> occurrence_keys([2, 0, 2, 2], 3).tolist()
        [2, 0, 5, 8]
    """
    images = np.asarray(order)
    if images.ndim != 1 or images.dtype.kind not in "iu" or not images.size:
        raise OptionError(f"order: expected image numbers [L], L >= 1, found {images.dtype} {list(images.shape)}")
    if images.min() < 0 or images.max() >= count:
        raise OptionError(f"order: expected image numbers in 0..{count - 1}, found {images.min()} to {images.max()}")
    images = images.astype(np.int64)
    sorting = np.argsort(images, kind="stable")
    ascending = images[sorting]
    place = np.arange(len(images), dtype=np.int64)
    begins = np.concatenate([[True], ascending[1:] != ascending[:-1]])
    first = np.maximum.accumulate(np.where(begins, place, 0))
    times = np.empty_like(images)
    times[sorting] = place - first
    keys: Int64Array = images + count * times
    if keys.max() >= _KEYS:
        often = int(times.max()) + 1
        raise OptionError(f"order: expected an image at most {_KEYS // count:,} times, found {often:,}")
    return keys
