"""Networks by name, and what is asked of a network that the user brings."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sela_ext.errors import OptionError
from sela_ext.models.alexnet import AlexNet
from sela_ext.models.small import SmallConvNet, SmallResNet

_OWN: dict[str, Callable[[int], nn.Module]] = {
    "small-resnet": lambda channels: SmallResNet(channels),
    "small-convnet": lambda channels: SmallConvNet(channels),
    "alexnet": lambda channels: AlexNet(channels, "big"),
    "alexnet-small": lambda channels: AlexNet(channels, "small"),
}


@dataclass(frozen=True)
class Backbone:
    """A network that maps images to feature vectors.

    Attributes:
        module: the network, its classifier removed.
        name: how it was asked for.
        feature_dim: length of its feature vector.
        channels_in: image channels it takes.
    """

    module: nn.Module
    name: str
    feature_dim: int
    channels_in: int


def build_backbone(
    model: str | nn.Module | Callable[[], nn.Module], *, channels: int, image_size: tuple[int, int]
) -> Backbone:
    """Build a backbone, and find the length of its feature vector by running it once.

    Args:
        model: one of this package's names ("small-resnet", "small-convnet", "alexnet", "alexnet-small"), any
            classification network of torchvision by name (its last linear layer is removed, everything else keeps
            its name; "alexnet" is the paper's), an `nn.Module` that maps images to [B, D] (used as it is, and
            trained in place), or a callable without arguments that returns one.
        channels: image channels, 1 or 3.
        image_size: (height, width) of the images it will see, for the trial run.

    Raises:
        OptionError: unknown name, or not a module that maps images to [B, D].
    """
    if isinstance(model, str):
        name, module, channels_in = model, *_by_name(model, channels)
    else:
        module = model if isinstance(model, nn.Module) else model()
        if not isinstance(module, nn.Module):
            raise OptionError(f"model: expected a callable that returns an nn.Module, found {type(module).__name__}")
        name, channels_in = type(module).__name__, channels
        if channels == 1 and _first_channels(module) == 3:
            channels_in = 3  # grey images are repeated
    return Backbone(module, name, _feature_dim(module, name, channels_in, image_size), channels_in)


def _by_name(name: str, channels: int) -> tuple[nn.Module, int]:
    if name in _OWN:
        return _OWN[name](channels), channels
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, [*_OWN, *known], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(f"model: expected {', '.join(_OWN)} or a torchvision name, found {name!r}{hint}")
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    module: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    if hasattr(module, "aux_logits"):
        setattr(module, "aux_logits", False)  # noqa: B010 - a plain attribute of two torchvision networks
        for auxiliary in ("aux1", "aux2", "AuxLogits"):
            if hasattr(module, auxiliary):
                setattr(module, auxiliary, None)
    _remove_classifier(module)
    return module, 3


def _remove_classifier(module: nn.Module) -> None:
    """Replace the last linear layer by the identity, so that all other names stay."""
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    if not linear:  # squeezenet: the classifier is a convolution and a pooling; its features are pooled already
        classifier = getattr(module, "classifier", None)
        if classifier is None:
            raise OptionError(f"model: {type(module).__name__} has no linear layer to remove; pass an nn.Module")
        module.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return
    parent, _, child = linear[-1].rpartition(".")
    setattr(module.get_submodule(parent), child, nn.Identity())


def _first_channels(module: nn.Module) -> int:
    """Channels that the first convolution takes; 0 where there is none."""
    return next((int(child.in_channels) for child in module.modules() if isinstance(child, nn.Conv2d)), 0)


def _feature_dim(module: nn.Module, name: str, channels: int, image_size: tuple[int, int]) -> int:
    # In eval mode, so that the trial run changes no batch-norm statistics and draws no random numbers.
    training = module.training
    parameter = next(module.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    module.eval()
    try:
        with torch.no_grad():
            output = module(torch.zeros(2, channels, *image_size, device=device))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OptionError(
            f"model: {name} does not take images of {channels} x {image_size[0]} x {image_size[1]}: {first}"
        ) from error
    finally:
        module.train(training)
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or output.shape[0] != 2:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise OptionError(f"model: expected features of shape [B, D], found {found} for B = 2 from {name}")
    return int(output.shape[1])
