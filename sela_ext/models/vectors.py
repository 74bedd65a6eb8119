"""Networks for feature vectors: standardisation alone, or with hidden layers behind it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from sela_ext.errors import OptionError, lacks_memory
from sela_ext.models.registry import Backbone, from_user

_MLP = re.compile(r"mlp((?:-\d+)*)")
# Of "mlp" without numbers.
_WIDTH = 256
_NAMES = "identity (heads alone), mlp, or mlp-512 or mlp-512-256 with the widths of the hidden layers"


class Standardize(nn.Module):
    """Centre and scale feature vectors; what is needed for that is stored with the network, and not trained.

    Args:
        mean: [D].
        scale: [D], what centred numbers are multiplied with.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("scale", scale.float().clone())

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows [B, D] to rows of about zero mean and unit size, float32."""
        return (rows.float() - self.mean) * self.scale


def build_vector_backbone(model: Any, mean: Tensor, scale: Tensor) -> Backbone:
    """Build a network that takes vectors.

    Args:
        model: "identity": rows are centred and scaled; "mlp", "mlp-512", "mlp-512-256", ...: the same, then hidden
            layers of these widths (linear, batch norm, ReLU); or a module that maps [B, D] to [B, F], or a callable
            without arguments that returns one: it gets the rows as they are.
        mean: of the training rows, [D].
        scale: what centred rows are multiplied with, [D].

    Raises:
        OptionError: unknown name, or not a module that maps [B, D] to [B, F].
    """
    if not isinstance(model, str):
        module = from_user(model)
        return Backbone(module, type(module).__name__, _feature_dim(module, len(mean)), 1)
    standardize = Standardize(mean, scale)
    if model == "identity":
        return Backbone(standardize, model, len(mean), 1)
    match = _MLP.fullmatch(model)
    widths = [int(width) for width in match[1].split("-") if width] if match else []
    if match is None or 0 in widths:
        raise OptionError(f"model: expected for vectors {_NAMES}, or a module that takes [B, D], found {model!r}")
    layers: list[nn.Module] = [standardize]
    before = len(mean)
    for width in widths or [_WIDTH]:
        layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        before = width
    return Backbone(nn.Sequential(*layers), model, before, 1)


def _feature_dim(module: nn.Module, width: int) -> int:
    """F, by a trial run in eval mode, which changes nothing."""
    name, training = type(module).__name__, module.training
    parameter = next(module.parameters(), None)
    module.eval()
    try:
        with torch.no_grad():
            output = module(torch.zeros(2, width, device=None if parameter is None else parameter.device))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if lacks_memory(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OptionError(f"model: {name} does not take vectors of {width} numbers: {first}") from error
    finally:
        module.train(training)
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise OptionError(f"model: expected features of shape [B, F], found {found} for B = 2 from {name}")
    return int(output.shape[1])
