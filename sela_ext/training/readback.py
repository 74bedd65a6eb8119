"""Numbers that come back from the device without anybody waiting for what is queued behind them.

Note [Looking at a loss]
    float(tensor) waits for everything that its stream was given until now, the step that was queued since included: a
    look at the loss of the last step would end this one before the next can be queued, and the device would idle
    meanwhile. So the numbers are sent to pinned memory behind the step that made them, with an event behind that; who
    asks for them later waits for the event alone, which has long happened.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Readback:
    """Scalars on their way to the host.

    Args:
        scalars: tensors of one number, on one device; queued work may not be done with them yet.

    Example:
        >>> Readback([torch.tensor(0.5), torch.tensor(2)]).read()
        [0.5, 2.0]
    """

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        numbers = torch.stack([scalar.detach().double().reshape(()) for scalar in scalars])
        self._numbers = numbers.to("cpu", non_blocking=True)  # to pinned memory, from a device
        self._done: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """The numbers, as soon as they have come."""
        if self._done is not None:
            self._done.synchronize()
        return [float(number) for number in self._numbers.tolist()]
