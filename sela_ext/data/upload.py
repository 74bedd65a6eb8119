"""Copies of batches to a GPU, on a stream of their own, while the processor and the GPU work on others.

Note [Order of a copy]
    The copy's own stream runs it; an event behind it is what the consumer's stream waits for, on the device, before it
    reads the batch. The device's memory was taken on the copy's stream, so it is marked as used by the consumer's too:
    it is handed out again only when both have passed. The host's memory is held here until the event has happened;
    then it goes back to the ring that it came from.

Note [Who waits for whom]
    Nobody waits in a step, as long as the device keeps up. A copy is not begun while `COPIES` others are under way: the
    pinned memory stays bounded where the bus is the slowest. A batch is not handed over while the device has yet to
    begin what followed on the one `BATCHES_BEHIND` before: a consumer that only queues work, as a pass without a loss
    to look at, would otherwise have all batches of an epoch on the device at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Copies under way at once.
COPIES = 3
# Batches that the consumer may be ahead of the device: one that is worked on, and two that wait for it.
BATCHES_BEHIND = 3


@dataclass(frozen=True)
class Upload:
    """A copy under way.

    Attributes:
        tensors: On the device; not to be used before `Uploader.receive`.
        done: Happens when they are complete.
    """

    tensors: list[Tensor]
    done: torch.cuda.Event


class Uploader:
    """Copies tensors from pinned memory to one device. One thread sends, another may receive.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._held: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self._followed: deque[torch.cuda.Event] = deque()

    def send(self, tensors: list[Tensor], addressed: Callable[[list[Tensor]], None] | None = None) -> Upload:
        """Begin a copy; `tensors` are held until it is done.

        Args:
            tensors: In pinned memory.
            addressed: Is given the tensors on the device before anything is copied to them, so that what is sent can
                say where it will lie.
        """
        self._let_go()
        while len(self._held) >= COPIES:
            self._held[0][0].synchronize()
            self._held.popleft()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            copies = [torch.empty_like(tensor, device=self._device) for tensor in tensors]
            if addressed is not None:
                addressed(copies)
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            done.record(self._stream)
        self._held.append((done, tensors))
        return Upload(copies, done)

    def receive(self, upload: Upload) -> list[Tensor]:
        """The tensors of a copy, for use on the current stream, which waits for it on the device."""
        stream = torch.cuda.current_stream(self._device)
        followed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        followed.record(stream)  # behind all that was done with the batches before
        self._followed.append(followed)
        while len(self._followed) > BATCHES_BEHIND:
            self._followed.popleft().synchronize()
        stream.wait_event(upload.done)
        for tensor in upload.tensors:
            tensor.record_stream(stream)
        return upload.tensors

    def close(self) -> None:
        """Wait for the copies that were begun, so that their memory may be used again."""
        while self._held:
            self._held[0][0].synchronize()
            self._held.popleft()

    def _let_go(self) -> None:
        while self._held and self._held[0][0].query():  # type: ignore[no-untyped-call]
            self._held.popleft()
