"""Memory of batches, used again as soon as nobody holds a tensor in it any more.

A batch of 256 x 3 x 224 x 224 floats is 154 MB: fresh memory for each costs a page fault for every 4 kB, about as much
time as augmenting the images, and pinned memory costs far more.

Note [Lent memory]
    A piece of memory is an array of bytes that the ring owns. What is lent is a view of it: another array object, which
    torch.from_numpy makes the owner of the tensors' storage. It dies with the last tensor that shares the storage,
    views and what autograd keeps included, and its weak reference then puts the piece back. A consumer who keeps every
    batch gets fresh memory for every batch; the ring never waits, and never hands out memory that is in use.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from sela_ext.data.source import UInt8Array

# Pieces that are kept for the next batches; more come together only when a consumer kept many batches and let go.
KEPT = 8
# What may be kept from one epoch to the next: label passes and evaluations want the memory meanwhile.
KEPT_BYTES = 1 << 26
# Every tensor begins at a multiple of this many bytes: a cache line, and the widest vector.
_ALIGNMENT = 64


class TensorRing:
    """Lends tensors [B, C, H, W], several of different sizes together.

    Args:
        shapes: (C, H, W) of each tensor of a batch.
        rows: B of the largest batch.
        dtype: Of the tensors.
        channels_last: Their memory order.
        pinned: Page-locked memory, which a GPU can copy from while the processor goes on.

    Example:
        >>> ring = TensorRing([(3, 8, 8)], rows=4, dtype=torch.float32)
        >>> (images,) = ring.lend(4)
        >>> place = images.data_ptr()
        >>> del images
        >>> ring.lend(2)[0].data_ptr() == place
        True
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        *,
        rows: int,
        dtype: torch.dtype,
        channels_last: bool = False,
        pinned: bool = False,
    ) -> None:
        self._shapes = [tuple(shape) for shape in shapes]
        self._dtype = dtype
        self._channels_last = channels_last
        self._pinned = pinned
        sizes = [rows * math.prod(shape) * dtype.itemsize for shape in self._shapes]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        self._begins = [sum(padded[:i]) for i in range(len(padded))]
        self._nbytes = sum(padded)
        self._free: deque[UInt8Array] = deque()

    @property
    def free(self) -> int:
        """Pieces of memory that wait for a batch."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of one piece of memory."""
        return self._nbytes

    def lend(self, rows: int) -> list[torch.Tensor]:
        """Tensors for a batch of `rows` images, one per shape, with undefined content; see Note [Lent memory]."""
        try:
            memory = self._free.pop()  # the one that came back last is the likeliest to be in the caches
        except IndexError:
            memory = self._allocate()
        lent = memory.view()
        weakref.finalize(lent, _give_back, self._free, memory).atexit = False
        whole = torch.from_numpy(lent)
        del lent  # from here on the storage alone owns it
        return [
            self._tensor(whole, begin, shape, rows) for begin, shape in zip(self._begins, self._shapes, strict=True)
        ]

    def trim(self) -> None:
        """Let go of memory that waits for a batch, but for `KEPT_BYTES`."""
        while len(self._free) * self._nbytes > KEPT_BYTES:
            try:
                self._free.pop()
            except IndexError:  # another epoch took it meanwhile
                return

    def _tensor(self, whole: torch.Tensor, begin: int, shape: tuple[int, ...], rows: int) -> torch.Tensor:
        channels, height, width = shape
        size = rows * channels * height * width * self._dtype.itemsize
        flat = whole[begin : begin + size].view(self._dtype)
        if self._channels_last:
            return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(rows, channels, height, width)

    def _allocate(self) -> UInt8Array:
        if self._pinned:
            return torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        memory = np.empty(self._nbytes + _ALIGNMENT, dtype=np.uint8)
        skip = -memory.ctypes.data % _ALIGNMENT
        return memory[skip : skip + self._nbytes]


def _give_back(free: deque[UInt8Array], memory: UInt8Array) -> None:
    # Called from whichever thread drops the last reference, possibly inside a garbage collection: no locks here.
    if len(free) < KEPT:
        free.append(memory)
