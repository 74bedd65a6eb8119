"""Which network a state dict belongs to, told by its keys and shapes, and the names its tensors have here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sela_ext.models import VGG16, AlexNet, PreActResNet

_MODULE = re.compile(r"(?:^|(?<=\.))module\.")
_HEAD = re.compile(r"top_layer(\d*)\.(?:0\.)?(weight|bias)")
# Where DeepCluster-v2, SeLa-v2 and SwAV keep their prototypes and the layers in front of them.
_PROTOTYPES = re.compile(r"prototypes(?:\.prototypes(\d+))?\.(weight)")
_PROJECTION = re.compile(r"projection_head\.(.+)")
_V1 = {"features.0": "conv1", "features.1": "bn1", **{f"features.{i + 3}": f"layer{i}" for i in range(1, 5)}}
# More and wider than any ResNet that was released: a network of more is not built to find out that it does not fit.
_MOST_BLOCKS, _WIDEST = 48, 1024


@dataclass(frozen=True)
class Layout:
    """A network that a state dict fits.

    Attributes:
        name: of the network, as `train(model=...)` knows it where it does.
        build: makes the backbone; its classifier is removed.
        rename: key of the state dict to the backbone's.
    """

    name: str
    build: Callable[[], nn.Module]
    rename: Callable[[str], str] = str


@dataclass
class Parts:
    """A state dict taken apart, under plain names.

    Attributes:
        backbone: name to tensor, heads left out.
        heads: (number, "weight" or "bias") to tensor; a head without a number is number 0.
        projection: layers between backbone and heads.
    """

    backbone: dict[str, Tensor]
    heads: dict[tuple[int, str], Tensor]
    projection: dict[str, Tensor]


def plain_name(key: str) -> str:
    """Remove what `nn.DataParallel` puts into names, wherever it stands.

    Example:
        >>> plain_name("module.features.module.0.weight")
        'features.0.weight'
    """
    return _MODULE.sub("", key)


def take_apart(state: Mapping[str, Tensor]) -> Parts:
    """Separate backbone, heads and projection of a state dict with plain names."""
    parts = Parts({}, {}, {})
    # The last linear layer of torchvision's ResNets and of its VGG16 with batch norm is head 0.
    last = "fc." if "layer1.0.conv1.weight" in state else "classifier.6." if "features.41.weight" in state else None
    for key, tensor in state.items():
        head = _HEAD.fullmatch(key) or _PROTOTYPES.fullmatch(key)
        layer = _PROJECTION.fullmatch(key)
        if head is not None:
            parts.heads[int(head[1] or 0), head[2]] = tensor
        elif last is not None and key in (f"{last}weight", f"{last}bias"):
            parts.heads[0, key.removeprefix(last)] = tensor
        elif layer is not None:
            parts.projection[layer[1]] = tensor
        else:
            parts.backbone[key] = tensor
    return parts


def detect(state: Mapping[str, Tensor]) -> Layout | None:
    """Find the network whose backbone this state dict holds; None where it is none of those known.

    Args:
        state: backbone tensors under plain names.
    """
    shape = {key: tuple(tensor.shape) for key, tensor in state.items()}
    first = shape.get("features.0.weight", ())
    if "conv1.weight" in shape and "layer1.0.conv1.weight" in shape:
        return _torchvision_resnet(shape, str)
    if "features.2.0.conv1.weight" in shape and "features.4.0.bn1.weight" in shape and len(first) == 4:
        return _preactivation(shape, first)
    if "features.4.0.conv1.weight" in shape and "features.1.weight" in shape:
        renamed = {_v1_to_torchvision(key): value for key, value in shape.items()}
        return _torchvision_resnet(renamed, _v1_to_torchvision)
    if len(first) == 4 and first[2:] == (11, 11) and "features.1.weight" in shape:
        small, sobel, channels = first[0] == 64, "sobel.0.weight" in shape, first[1]
        name = "alexnet" + ("-small" if small else "") + ("-sobel" if sobel else "")
        return Layout(name, lambda: AlexNet(channels, "small" if small else "big", sobel))
    if len(first) == 4 and first[0] == 64 and first[2:] == (3, 3) and "features.41.weight" in shape:
        sobel, channels = "sobel.0.weight" in shape, first[1]
        return Layout("vgg16-bn" + ("-sobel" if sobel else ""), lambda: VGG16(channels, sobel))
    return None


def _v1_to_torchvision(key: str) -> str:
    prefix = ".".join(key.split(".")[:2])
    return _V1.get(prefix, prefix) + key[len(prefix) :]


def _blocks(shape: Mapping[str, tuple[int, ...]], stage: str) -> int:
    """Number of residual blocks of a stage: one more than the largest number in its names."""
    numbers = [key.split(".") for key in shape if key.startswith(f"{stage}.")]
    at = stage.count(".") + 1
    return 1 + max((int(parts[at]) for parts in numbers if parts[at].isdecimal() and len(parts[at]) < 3), default=-1)


def _preactivation(shape: Mapping[str, tuple[int, ...]], first: tuple[int, ...]) -> Layout | None:
    blocks = tuple(_blocks(shape, f"features.{i}") for i in range(2, 6))
    channels, width = first[1], first[0]
    if 0 in blocks or max(blocks) > _MOST_BLOCKS or not 0 < width <= _WIDEST:
        return None
    name = "resnet50-preact" if (blocks, width) == ((3, 4, 6, 3), 64) else "resnet-preact"
    return Layout(name, lambda: PreActResNet(channels, blocks, width))


_KNOWN: dict[tuple[bool, tuple[int, ...], int, int], str] = {
    (False, (2, 2, 2, 2), 1, 64): "resnet18",
    (False, (3, 4, 6, 3), 1, 64): "resnet34",
    (True, (3, 4, 6, 3), 1, 64): "resnet50",
    (True, (3, 4, 23, 3), 1, 64): "resnet101",
    (True, (3, 8, 36, 3), 1, 64): "resnet152",
    (True, (3, 4, 6, 3), 1, 128): "wide_resnet50_2",
    (True, (3, 4, 23, 3), 1, 128): "wide_resnet101_2",
    (True, (3, 4, 6, 3), 32, 4): "resnext50_32x4d",
    (True, (3, 4, 23, 3), 32, 8): "resnext101_32x8d",
    (True, (3, 4, 23, 3), 64, 4): "resnext101_64x4d",
}


def _torchvision_resnet(shape: Mapping[str, tuple[int, ...]], rename: Callable[[str], str]) -> Layout | None:
    bottleneck = "layer1.0.conv3.weight" in shape
    blocks = tuple(_blocks(shape, f"layer{i}") for i in range(1, 5))
    inner = shape.get("layer1.0.conv2.weight", ())
    if len(inner) != 4 or 0 in inner or 0 in blocks or inner[0] % inner[1]:
        return None
    groups = inner[0] // inner[1]
    base = inner[0] // groups if bottleneck else 64
    name = _KNOWN.get((bottleneck, blocks, groups, base))
    if name is None:
        return None

    def build() -> nn.Module:
        import torchvision

        module: nn.Module = torchvision.models.get_model(name, weights=None)
        module.fc = nn.Identity()
        return module

    return Layout(name, build, rename)


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What is missing, unexpected or of another shape, in words; empty where all fits.

    Batch norm's count of batches may be missing: PyTorch before 0.4.1 had none.
    """

    def some(keys: list[str]) -> str:
        shown = ", ".join(repr(key[:80]) for key in keys[:3])
        return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown

    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in expected]
    wrong = [
        f"{key[:80]} {tuple(found[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {some(unexpected)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        problems.append(f"{len(wrong)} of another shape: {', '.join(wrong[:3])}{more}")
    return problems


def copy_into(module: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give a module on the meta device its tensors: float32 copies; counts of batches that are missing become 0."""
    filled = {}
    for key, tensor in module.state_dict().items():
        if key in found:
            filled[key] = found[key].detach().to(tensor.dtype, copy=True).contiguous()
        else:
            filled[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    frozen = {key for key, parameter in module.named_parameters() if not parameter.requires_grad}
    module.load_state_dict(filled, assign=True)
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(key not in frozen)
