"""Networks by name, and what is asked of a network that the user brings."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sela_ext.errors import CheckpointError, OptionError, lacks_memory, shown
from sela_ext.models.alexnet import AlexNet
from sela_ext.models.preact import PreActResNet
from sela_ext.models.small import SmallConvNet, SmallResNet, SmallViT
from sela_ext.models.vgg import VGG16

# Name -> builder from image channels to the module and the channels that it takes.
_OWN: dict[str, Callable[[int], tuple[nn.Module, int]]] = {
    "small-resnet": lambda channels: (SmallResNet(channels), channels),
    "small-convnet": lambda channels: (SmallConvNet(channels), channels),
    "small-vit": lambda channels: (SmallViT(channels), channels),
    "alexnet": lambda channels: (AlexNet(channels, "big"), channels),
    "alexnet-small": lambda channels: (AlexNet(channels, "small"), channels),
    "alexnet-sobel": lambda channels: (AlexNet(layout="big", sobel=True), 3),
    "vgg16-bn": lambda channels: (VGG16(channels), channels),
    "vgg16-bn-sobel": lambda channels: (VGG16(sobel=True), 3),
    "resnet50-preact": lambda channels: (PreActResNet(channels), channels),
}
# The names that the SeLa authors' files give to networks that are here under another name.
_ALIASES = {"resnetv2": "resnet50-preact", "resnetv1": "resnet50"}
# Networks that are built for 224 pixels, where their pooling in front of the first linear layer changes nothing.
BUILT_FOR_224 = ("alexnet", "vgg16-bn")


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
        model: one of this package's names ("small-resnet", "small-convnet", "small-vit", "alexnet",
            "alexnet-small", "alexnet-sobel", "vgg16-bn", "vgg16-bn-sobel", "resnet50-preact", also called
            "resnetv2"), any classification network of torchvision by name (its last linear layer is removed,
            everything else keeps its name; "alexnet" is the paper's), "timm/NAME" for one of timm where that is
            installed, "NAME:FILE" (not of timm) to start from the weights in a file, an `nn.Module` that maps images to
            [B, D], to maps [B, D, H, W] or to tokens [B, L, D], which are averaged (used as it is, and trained in
            place), or a callable without arguments that returns one.
        channels: image channels, 1 or 3.
        image_size: (height, width) of the images it will see, for the trial run.

    Raises:
        OptionError: unknown name, or not a module that maps images to one of these shapes.
        CheckpointError: a file that is no state dict, or not of this network.
    """
    if isinstance(model, str):
        name, colon, file = (model, "", "") if model.startswith("timm/") else model.partition(":")
        module, channels_in = _by_name(name, channels, image_size)
        if colon:
            load_weights(module, file, name)
    else:
        module = from_user(model)
        name, channels_in = type(module).__name__, channels
        if channels == 1 and _first_channels(module) == 3:
            channels_in = 3  # grey images are repeated
    shape = _feature_shape(module, name, channels_in, image_size)
    if len(shape) in (3, 4) and shape[0] == 2:
        module, shape = Averaged(module), (2, shape[1] if len(shape) == 4 else shape[2])
    if len(shape) != 2 or shape[0] != 2:
        raise OptionError(
            f"model: expected features of shape [B, D], [B, D, H, W] or [B, L, D], found {shape or 'no tensor'} for "
            f"B = 2 from {name}"
        )
    return Backbone(module, name, shape[1], channels_in)


class Averaged(nn.Module):
    """A network that gives maps or tokens, followed by their mean.

    Args:
        network: maps images to [B, D, H, W] or [B, L, D].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, C, H, W] to features [B, D]."""
        found: torch.Tensor = self.network(images)
        return found.mean((2, 3)) if found.ndim == 4 else found.mean(1)


def torchvision_name(name: str) -> str | None:
    """What torchvision calls a network that is built by this name; None for networks that are not torchvision's.

    Example:
        >>> torchvision_name("resnet18"), torchvision_name("resnetv1"), torchvision_name("alexnet")
        ('resnet18', 'resnet50', None)
    """
    import torchvision.models

    name = _ALIASES.get(name, name)
    known = name not in _OWN and name in torchvision.models.list_models(module=torchvision.models)
    return name if known else None


def load_weights(module: nn.Module, file: str, name: str) -> None:
    """Load a state dict into a backbone; what the file holds beside it, such as a last layer, is left.

    Args:
        module: the backbone, changed in place.
        file: what `torch.save` wrote: a state dict under the backbone's names, or a mapping with one as "state_dict".
        name: of the network, for messages.

    Raises:
        CheckpointError: not readable, or tensors that are missing or of another shape.
    """
    from sela_ext.compat.archive import read_archive

    content = read_archive(Path(file).expanduser())
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: expected a mapping of names to tensors, found {type(state).__name__}")
    found = {str(key).removeprefix("module."): value for key, value in state.items()}
    wanted = module.state_dict()
    for key, tensor in wanted.items():
        value = found.get(key)
        if value is None and key.endswith("num_batches_tracked"):
            continue
        if not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
            shown = f"{list(value.shape)}" if isinstance(value, torch.Tensor) else "none"
            raise CheckpointError(
                f"{file}: expected the weights of {name}, with {key} of shape {list(tensor.shape)}, found {shown}; "
                "name the network that they are of"
            )
    module.load_state_dict({key: found[key] for key in wanted if key in found}, strict=False)


def own_names() -> list[str]:
    """Networks of this package, by the names that `model` takes.

    Example:
        >>> "alexnet" in own_names()
        True
    """
    return list(_OWN)


def from_user(model: Any) -> nn.Module:
    """The user's module, or the one that the user's callable returns.

    Raises:
        OptionError: neither.
    """
    if isinstance(model, nn.Module):
        return model
    wanted = "model: expected a name, an nn.Module, or a callable without arguments that returns one"
    if not callable(model):
        raise OptionError(f"{wanted}, found {shown(model)}")
    try:
        inspect.signature(model).bind()
    except TypeError as error:
        name = getattr(model, "__name__", type(model).__name__)
        raise OptionError(f"{wanted}, found {name}: {error}") from error
    except ValueError:
        pass  # no signature to look at
    module = model()
    if not isinstance(module, nn.Module):
        raise OptionError(f"model: expected a callable that returns an nn.Module, found {type(module).__name__}")
    return module


def _by_name(name: str, channels: int, image_size: tuple[int, int]) -> tuple[nn.Module, int]:
    name = _ALIASES.get(name, name)
    if name in _OWN:
        return _OWN[name](channels)
    if name.startswith("timm/"):
        return _from_timm(name.removeprefix("timm/"), channels, image_size), channels
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, [*_OWN, *_ALIASES, *known], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(f"model: expected {', '.join(_OWN)} or a torchvision name, found {name!r}{hint}")
    options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_") and image_size[0] == image_size[1] and image_size[0] % int(name.split("_")[2]) == 0:
        options["image_size"] = image_size[0]  # the position embedding is as long as the image has patches
    module: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    if hasattr(module, "aux_logits"):
        setattr(module, "aux_logits", False)  # noqa: B010 - a plain attribute of two torchvision networks
        for auxiliary in ("aux1", "aux2", "AuxLogits"):
            if hasattr(module, auxiliary):
                setattr(module, auxiliary, None)
    _remove_classifier(module)
    return module, 3


def _from_timm(name: str, channels: int, image_size: tuple[int, int]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise OptionError(
            f"model: timm/{name} needs the package timm, found none; pip install 'sela_ext[timm]'"
        ) from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(f'timm/{one}' for one in near)}?" if near else ""
        raise OptionError(f"model: expected a network that timm has, found {name!r}{hint}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the weights' name, behind the dot, is none that it knows
        raise OptionError(
            f"model: expected a network that timm has, found {name!r}: {error}; leave out what follows the dot"
        ) from error
    # Networks with a position per patch are built for one size, 224 pixels if nobody says otherwise.
    size = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    module: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels, **size)
    return module


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


def _feature_shape(module: nn.Module, name: str, channels: int, image_size: tuple[int, int]) -> tuple[int, ...]:
    """Shape of what two images give; () where that is no tensor."""
    # In eval mode, so that the trial run changes no batch-norm statistics and draws no random numbers.
    training = module.training
    parameter = next(module.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    module.eval()
    try:
        with torch.no_grad():
            output = module(torch.zeros(2, channels, *image_size, device=device))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if lacks_memory(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OptionError(
            f"model: {name} does not take images of {channels} x {image_size[0]} x {image_size[1]}: {first}"
        ) from error
    finally:
        module.train(training)
    return tuple(output.shape) if isinstance(output, torch.Tensor) else ()
