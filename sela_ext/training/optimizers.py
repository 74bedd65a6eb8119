"""Optimisers of a run: SGD, LARS and AdamW, with weight decay on matrices or on everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sela_ext.training.options import Options

# Trust coefficient of LARS, as in its paper: the step of a layer is at most this part of its weights, times lr.
_TRUST = 0.001
_BETA_2 = 0.999  # of AdamW


def build_optimizer(options: Options, network: nn.Module) -> torch.optim.Optimizer:
    """Make the optimiser of a network, in two groups of parameters.

    Matrices (everything of two dimensions or more) are decayed. Vectors - biases, batch norm - are only with
    `decay_vectors`; LARS neither decays nor adapts them.

    Args:
        options: optimizer ("sgd", "lars" or "adamw"), lr, momentum, nesterov, weight_decay, decay_vectors.
        network: parameters that need no gradient are left out.

    Example:
        >>> from sela_ext.training.options import Options
        >>> options = Options(lr=0.1, nesterov=False, weight_decay=0.01, decay_vectors=False, optimizer="lars")
        >>> [group["weight_decay"] for group in build_optimizer(options, nn.Linear(3, 2)).param_groups]
        [0.01, 0.0]
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    decay_all = options.decay_vectors and options.optimizer != "lars"
    matrices = [p for p in trained if p.ndim > 1 or decay_all]
    vectors = [p for p in trained if not (p.ndim > 1 or decay_all)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # One kernel for all tensors; and with a scaled loss it is told of an overflow on the device, and nobody reads that
    # back in every step.
    fused = True if trained and all(p.device.type == "cuda" for p in trained) else None
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=(options.momentum, _BETA_2), fused=fused)
    if options.optimizer == "lars":
        groups[1]["adapt"] = False
        return Lars(groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov)
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov, fused=fused)


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose rate is scaled, for each tensor, by the size of its weights over that of its gradient.

    For a tensor w with gradient g, decay d and momentum buffer v::

        g' = g + d w;  r = trust |w| / (|g| + d |w|)  (1 where |w| or the denominator is 0, or adapt is false)
        v = momentum v + lr r g';  w -= v  (nesterov: w -= momentum v + lr r g')

    The rate is inside the buffer, as in the paper, so that a change of lr acts on new gradients alone. Nothing is read
    back from the device.

    Args:
        params: parameters, or groups of them with their own lr, momentum, weight_decay, nesterov and adapt.
        lr: global learning rate.
        momentum: of the buffer.
        weight_decay: d.
        nesterov: look one step ahead.
        trust: the trust coefficient.
        adapt: scale the rate; groups of biases and norms should not.

    Source: You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017, algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust: float = _TRUST,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust": trust,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` recomputes the loss, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if held:
                self._step_group(group, held, [p.grad for p in held])
        return loss

    def _step_group(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        decay, momentum, rate = group["weight_decay"], group["momentum"], group["lr"]
        directions = list(torch._foreach_add(gradients, weights, alpha=decay))
        if group["adapt"]:
            lengths = torch._foreach_norm(weights)
            slopes = torch._foreach_norm(gradients)
            ratios = []
            for length, slope in zip(lengths, slopes, strict=True):
                whole = slope + decay * length
                usable = (length > 0) & (whole > 0)
                ratios.append(torch.where(usable, group["trust"] * length / whole, torch.ones_like(whole)))
            torch._foreach_mul_(directions, ratios)
        torch._foreach_mul_(directions, rate)
        buffers = []
        for weight in weights:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            buffers.append(state["momentum_buffer"])
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, directions)
        if group["nesterov"]:
            torch._foreach_add_(directions, buffers, alpha=momentum)
            torch._foreach_sub_(weights, directions)
        else:
            torch._foreach_sub_(weights, buffers)
