"""Which images one process takes in an epoch, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sela_ext import kernels
from sela_ext.data.source import Int64Array
from sela_ext.errors import OptionError


@dataclass(frozen=True)
class Share:
    """The images of one process among several: positions rank, rank + world_size, ... of an epoch's order.

    Every image comes once over all ranks; the first count % world_size of them have one image more than the others.

    Attributes:
        count: Images, N.
        rank: This process, 0..world_size-1.
        world_size: Processes, at most N.
        batch_size: Images per batch.
        drop_last: Leave a smaller last batch out.

    Raises:
        OptionError: No batch for this rank.

    Example:
        >>> share = Share(10, rank=1, world_size=3, batch_size=2)
        >>> len(share), share.batches
        (3, 2)
        >>> share.order(seed=0, epoch=0, shuffle=False).tolist()
        [1, 4, 7]
    """

    count: int
    rank: int = 0
    world_size: int = 1
    batch_size: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        sizes = f"{self.count} images, batch_size {self.batch_size}, {self.world_size} ranks"
        if self.world_size > self.count:
            raise OptionError(f"world_size: expected at least one image for every rank, found {sizes}")
        if self.drop_last and len(self) < self.batch_size:
            raise OptionError(f"drop_last: expected at least one full batch for rank {self.rank}, found {sizes}")

    def __len__(self) -> int:
        """Images of this rank."""
        return (self.count - self.rank + self.world_size - 1) // self.world_size

    @property
    def batches(self) -> int:
        """Batches of an epoch from its start."""
        return len(self) // self.batch_size if self.drop_last else -(-len(self) // self.batch_size)

    def order(self, *, seed: int, epoch: int, shuffle: bool) -> Int64Array:
        """Numbers of this rank's images, int64 [len(self)]: a pure function of the arguments."""
        whole = kernels.permutation(self.count, seed=seed, epoch=epoch) if shuffle else np.arange(self.count)
        mine: Int64Array = np.ascontiguousarray(whole[self.rank :: self.world_size], dtype=np.int64)
        return mine

    def pieces(self, order: Int64Array, start: int) -> Iterator[Int64Array]:
        """The batches of `order` from position `start` on, int64 [B] each."""
        stop = len(order) - self.batch_size + 1 if self.drop_last else len(order)
        for begin in range(start, stop, self.batch_size):
            yield order[begin : begin + self.batch_size]
