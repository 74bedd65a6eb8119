"""A running average of a network: steadier than the network of the last step, and usually better."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class WeightAverage(Generic[Module]):
    """Exponential moving average of the parameters and of the batch norms' statistics.

    After update t = 0, 1, ... : average += (1 - d) (network - average), d = min(decay, 1 - 1 / (t + 1)): at the start
    it is the plain mean of all networks so far, so that the untrained one is forgotten. Whole numbers, such as counts
    of batches, are copied.

    Args:
        network: what is averaged; the average begins as a copy of it.
        decay: in (0, 1); networks of the last 1 / (1 - decay) updates count.

    Attributes:
        network: the average, in eval mode, without gradients.
        decay: as given.
        updates: t, so far.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> average = WeightAverage(network, 0.9)
        >>> for value in (1.0, 3.0):
        ...     _ = nn.init.constant_(network.weight, value)
        ...     average.update(network)
        >>> average.network.weight.item()
        2.0

    Source: Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    def __init__(self, network: Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, network: Module) -> None:
        """Take the network as it is now into the average."""
        share = 1.0 - min(self.decay, 1.0 - 1.0 / (self.updates + 1))
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for average, value in zip(_tensors(self.network), _tensors(network), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, share)
        self.updates += 1

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.network.load_state_dict(state["network"])
        self.updates = int(state["updates"])


def _tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers that a state dict holds, in its order."""
    return list(network.state_dict(keep_vars=True).values())
