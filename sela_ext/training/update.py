"""From losses to steps of the optimiser: scaling, accumulation, and the average that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sela_ext.training.averaging import WeightAverage


class Update:
    """Takes the loss of every batch, and steps after each group of them.

    The gradient of a group is the mean of its batches' gradients: that of one batch as large as all of them, where
    batches are equally large and no layer looks at a batch as a whole. Groups go on from one epoch to the next.

    Args:
        network: what is trained.
        optimizer: of the network.
        scaler: of the loss, for float16; a step whose gradients overflow is left out, and the scale halved.
        accumulate: batches of a group.
        average: follows every step; None: there is none.

    Attributes:
        waiting: batches of the group that is not complete, of which the network holds gradients.
        frozen: parameters that steps leave as they are for now.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        accumulate: int = 1,
        average: WeightAverage[Any] | None = None,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.scaler = scaler
        self.accumulate = accumulate
        self.average = average
        self.waiting = 0
        self.frozen: Sequence[nn.Parameter] = ()

    def take(self, loss: Tensor) -> None:
        """Add the gradient of a batch's mean loss, and step when the group is complete."""
        if not self.waiting:
            self.optimizer.zero_grad(set_to_none=True)
        share = loss / self.accumulate if self.accumulate > 1 else loss
        self.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        for parameter in self.frozen:
            parameter.grad = None
        self.waiting += 1
        if self.waiting == self.accumulate:
            self._step()

    def finish(self) -> None:
        """Step with what is left of a group, at the end of a run."""
        if self.waiting:
            self._step()

    def set_rate(self, rate: float) -> None:
        """Set the learning rate, unless a group is under way: it has one rate, that of its first batch."""
        if not self.waiting:
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint: also the gradients of a group that is not complete."""
        held = [p.grad for p in self.network.parameters()] if self.waiting else []
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "waiting": self.waiting,
            "gradients": held,
            "average": None if self.average is None else self.average.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.waiting = int(state["waiting"])
        if self.waiting:
            for parameter, gradient in zip(self.network.parameters(), state["gradients"], strict=True):
                parameter.grad = (
                    None
                    if gradient is None
                    else torch.empty_like(parameter).copy_(gradient)  # in the parameter's layout, on its device
                )
        if self.average is not None:
            self.average.load(state["average"])

    def _step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.waiting = 0
        if self.average is not None:
            self.average.update(self.network)
