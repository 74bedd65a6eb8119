"""The stages of a network that probes are attached to, and batch norm folded into convolutions."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sela_ext.errors import OptionError

# Values that a probe sees, at most: a map of C channels is pooled to the largest square that fits.
PROBE_VALUES = 9600


class Stages(nn.Module):
    """A frozen network as a list of feature maps: calling it maps images [B, C, H, W] to {name: activations}.

    Batch norm behind a convolution of the same `nn.Sequential` is folded into it. What lies behind the last stage is
    not computed. The network given is copied, and the copy stays in eval mode without gradients, whatever mode is asked
    for.

    AlexNets are tapped after each ReLU of a convolution ("conv1" ... "conv5"); VGGs in front of each max-pool
    ("stage1" ...); ResNets after each group of blocks ("layer1" ... "layer4"); this package's small networks after each
    block.

    Args:
        network: maps images to features.

    Attributes:
        names: of the stages, in order.

    Raises:
        OptionError: a network of another build.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.network.eval().requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # what was tapped must not be overwritten by what follows
        tapped = _tapped(self.network)
        fold_batch_norm(self.network)
        self.names = list(tapped)
        self._found: dict[str, Tensor] = {}
        for name, module in tapped.items():
            module.register_forward_hook(self._keeper(name))

    def train(self, mode: bool = True) -> Stages:
        """Stay in eval mode: the network is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [B, C, H, W] to the activations [B, C_stage, H_stage, W_stage] of every stage."""
        self._found = {}
        with contextlib.suppress(_EnoughError):
            self.network(images)
        found, self._found = self._found, {}
        return {name: found[name] for name in self.names}

    def _keeper(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            self._found[name] = output
            if name == self.names[-1]:
                raise _EnoughError

        return keep


class _EnoughError(Exception):
    """The last stage has been reached."""


def probe_side(channels: int, height: int, width: int) -> int:
    """Side of the square that a map is max-pooled to: channels * side^2 stays within 9,600 values, if it can.

    Example:
        >>> [c * probe_side(c, 55, 55) ** 2 for c in (96, 256, 384, 384, 256)]
        [9600, 9216, 9600, 9600, 9216]

    Source: Zhang et al. 2017 (split-brain autoencoders), whose probes the paper takes over.
    """
    return max(1, min(math.isqrt(PROBE_VALUES // channels), height, width))


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution in front of it, in every `nn.Sequential`, in place.

    With running mean m, variance v, scale g and shift b: w' = w g / sqrt(v + eps), c' = (c - m) g / sqrt(v + eps) + b,
    computed in float64. The batch norm becomes an identity, so that names and numbers of layers stay.

    Args:
        network: in eval mode; what it computes stays the same up to rounding.

    Returns:
        The network.
    """
    for sequence in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        names = list(sequence._modules)
        for name, following in itertools.pairwise(names):
            convolution, norm = sequence._modules[name], sequence._modules[following]
            if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if norm.running_mean is None or norm.running_var is None:
                continue  # normalises by the batch: there is nothing constant to fold
            scale = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
            shift = -norm.running_mean.double()
            if convolution.bias is not None:
                shift = shift + convolution.bias.detach().double()
            if norm.affine:
                scale = scale * norm.weight.detach().double()
            shift = shift * scale
            if norm.affine:
                shift = shift + norm.bias.detach().double()
            weight = convolution.weight.detach().double() * scale[:, None, None, None]
            frozen = convolution.weight.requires_grad
            convolution.weight = nn.Parameter(weight.to(convolution.weight.dtype), requires_grad=frozen)
            convolution.bias = nn.Parameter(shift.to(convolution.weight.dtype), requires_grad=frozen)
            sequence._modules[following] = nn.Identity()
    return network


def _tapped(network: nn.Module) -> dict[str, nn.Module]:
    """Name and module of every stage, in order."""
    for part in _parts(network):
        if all(hasattr(part, f"layer{i}") for i in (1, 2, 3, 4)):
            return {f"layer{i}": getattr(part, f"layer{i}") for i in (1, 2, 3, 4)}
        for attribute, name in (("blocks", "block"), ("groups", "group")):
            stages = getattr(part, attribute, None)
            if isinstance(stages, nn.Sequential):
                return {f"{name}{i}": module for i, module in enumerate(stages, 1)}
        features = getattr(part, "features", None)
        if isinstance(features, nn.Sequential):
            found = _tapped_features(list(features))
            if found:
                return found
    raise OptionError(
        f"probes: expected an AlexNet, a VGG, a ResNet or one of this package's small networks, found "
        f"{type(network).__name__}; use the pooled features (what: linear) instead"
    )


def _parts(network: nn.Module) -> Iterator[nn.Module]:
    """The network, and what it wraps."""
    yield network
    yield from (module for module in network.children() if not isinstance(module, (nn.Linear, nn.Conv2d)))


def _tapped_features(layers: list[nn.Module]) -> dict[str, nn.Module]:
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in layers)
    activations = [layer for layer in layers if isinstance(layer, nn.ReLU)]
    if convolutions == len(activations) == 5:
        return {f"conv{i}": layer for i, layer in enumerate(activations, 1)}
    groups = [layer for layer in layers if isinstance(layer, nn.Sequential)]
    if len(groups) == 4:  # ResNets whose layers are one sequence
        return {f"layer{i}": layer for i, layer in enumerate(groups, 1)}
    before = [a for a, b in itertools.pairwise(layers) if isinstance(b, nn.MaxPool2d)]
    if convolutions > 5 and len(before) > 1:
        return {f"stage{i}": layer for i, layer in enumerate(before, 1)}
    return {}
