"""The backbone that is fine-tuned: where it comes from, and its feature maps stage by stage."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sela_ext.compat import load_released
from sela_ext.data.safe_files import read_json
from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels.augment import IMAGENET_MEAN, IMAGENET_STD
from sela_ext.models import VGG16, AlexNet, PreActResNet, SmallConvNet, SmallResNet, build_backbone


@dataclass(frozen=True)
class Trunk:
    """A backbone, and how images are presented to it.

    Attributes:
        module: maps images to features [B, feature_dim].
        name: of the network.
        feature_dim: length of the feature vector.
        trained: whether its weights were learnt.
        mean: subtracted from channels in [0, 1].
        std: the divisor after that.
    """

    module: nn.Module
    name: str
    feature_dim: int
    trained: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_trunk(backbone: str | os.PathLike[str] | nn.Module, *, pretrained: bool, size: int) -> Trunk:
    """Load the backbone to fine-tune.

    Args:
        backbone: a run folder, a checkpoint that `load_released` takes, the name of a network (untrained unless
            `pretrained`), or an `nn.Module` that maps images to [B, D].
        pretrained: torchvision names: with torchvision's weights.
        size: pixels of the images, for the trial run of a network by name.

    Raises:
        OptionError: neither a file nor a known name, or a network that does not take colour images.
        CheckpointError: see `load_released`.
        ResourceError: torchvision's weights cannot be had.
    """
    if isinstance(backbone, nn.Module):
        built = build_backbone(backbone, channels=3, image_size=(size, size))
        return Trunk(built.module, built.name, built.feature_dim, True, _three(IMAGENET_MEAN), _three(IMAGENET_STD))
    path = Path(backbone).expanduser()
    if path.exists() or (os.sep in str(backbone) and not str(backbone).startswith("timm/")):
        network, _ = load_released(path)
        if network.channels_in != 3:
            raise OptionError(
                f"backbone: expected a network for colour images, found one of {network.channels_in} channel; "
                "train one on images in RGB, as those of PASCAL VOC are"
            )
        mean, std = _normalisation(path)
        return Trunk(network.backbone, network.name, network.feature_dim, True, mean, std)
    name = str(backbone)
    try:
        built = build_backbone(name, channels=3, image_size=(size, size))
    except OptionError as error:
        raise OptionError(f"backbone: expected a run folder, a checkpoint, or a network by name: {error}") from error
    if pretrained:
        _fetch_weights(name, built.module)
    return Trunk(built.module, name, built.feature_dim, pretrained, _three(IMAGENET_MEAN), _three(IMAGENET_STD))


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _normalisation(path: Path) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation that a run trained with; ImageNet's for all other files."""
    folder = path if path.is_dir() else path.parent
    try:
        augment = read_json(folder / "options.json")["resolved"]["augment"]
        return _three(augment["mean"]), _three(augment["std"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return _three(IMAGENET_MEAN), _three(IMAGENET_STD)


def _fetch_weights(name: str, module: nn.Module) -> None:
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models) or name in ("alexnet",):
        raise OptionError(f"pretrained: expected a network of torchvision, found {name!r}, for which there are none")
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    except (OSError, RuntimeError) as error:
        raise ResourceError(f"pretrained: torchvision's weights of {name} cannot be had: {error}") from error
    own = module.state_dict()
    module.load_state_dict({key: value for key, value in weights.items() if key in own})


class Stages(nn.Module):
    """The feature maps of a backbone, from fine to coarse.

    Args:
        stages: one after the other.
        strides: pixels of the image per pixel of each map.
        head: what follows the last map in the backbone up to the feature vector, where that is fully connected.
        pool: side of the map that `head` takes.

    Attributes:
        widths: channels of each map.
    """

    def __init__(
        self, stages: list[nn.Module], strides: list[int], head: nn.Module | None = None, pool: int = 7
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.strides = strides
        self.pool = pool
        self.head = head
        self.widths = self._widths()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images [B, 3, H, W] to one map [B, width, H / stride, W / stride] per stage."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps

    def _widths(self) -> list[int]:
        training = self.training
        self.eval()
        with torch.no_grad():
            parameter = next(self.parameters())
            maps = self(torch.zeros(1, 3, 128, 128, device=parameter.device))
        self.train(training)
        return [int(one.shape[1]) for one in maps]


def stages_of(trunk: Trunk) -> Stages:
    """The feature maps of a backbone.

    Raises:
        OptionError: a network whose maps are not known.
    """
    net = trunk.module
    if isinstance(net, (AlexNet, VGG16)):
        front = [] if net.sobel is None else [net.sobel]
        body = nn.Sequential(*front, *list(net.features)[:-1])  # without the last pooling: stride 16
        return Stages([body], [16], net.classifier, 6 if isinstance(net, AlexNet) else 7)
    if isinstance(net, PreActResNet):
        parts = list(net.features)
        return Stages([nn.Sequential(*parts[:3]), *parts[3:-1]], [4, 8, 16, 32])
    if isinstance(net, SmallResNet):
        blocks = list(net.blocks)
        return Stages([nn.Sequential(net.stem, blocks[0]), *blocks[1:]], [2 << i for i in range(len(blocks))])
    if isinstance(net, SmallConvNet):
        groups = list(net.groups)
        return Stages([nn.Sequential(net.stem, groups[0]), *groups[1:]], [2 << i for i in range(len(groups))])
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    if all(hasattr(net, name) for name in names):
        parts = [getattr(net, name) for name in names]
        return Stages([nn.Sequential(*parts[:5]), *parts[5:]], [4, 8, 16, 32])
    features = getattr(net, "features", None)
    if isinstance(features, nn.Sequential):  # VGG, MobileNet, EfficientNet, ConvNeXt, ... of torchvision
        layers = list(features)
        if isinstance(layers[-1], nn.MaxPool2d):
            layers = layers[:-1]
        body = nn.Sequential(*layers)
        with torch.no_grad():
            training = body.training
            found = body.eval()(torch.zeros(1, 3, 128, 128))
            body.train(training)
        if found.ndim == 4 and found.shape[2] == found.shape[3]:  # not channels last, as Swin has it
            return Stages([body], [max(1, round(128 / found.shape[2]))])
    raise OptionError(
        f"backbone: {trunk.name} has no feature maps that are known here; take a ResNet, AlexNet, VGG, or a network "
        "with `features`, or the task classification"
    )


def dilate(stage: nn.Module, before: int) -> int:
    """Take the stride out of a residual stage, and spread its 3x3 convolutions instead.

    Its weights stay as they are and see the same part of the image, at twice the resolution.

    Args:
        stage: changed in place.
        before: dilation of the stage in front of it.

    Returns:
        Dilation of this stage.

    Source: Yu and Koltun, "Multi-scale context aggregation by dilated convolutions", ICLR 2016.
    """
    after = before
    for layer in stage.modules():
        if isinstance(layer, nn.Conv2d):
            strided = layer.stride[0] > 1
            if strided:
                layer.stride = (1, 1)
            if layer.kernel_size == (3, 3):
                # The strided convolution itself still sees the map of the stage in front.
                spread = before if strided else after
                layer.dilation, layer.padding = (spread, spread), (spread, spread)
            if strided:
                after = 2 * before
    return after


def freeze_batch_norm(module: nn.Module) -> None:
    """Keep batch norm as it is: statistics and scales are not learnt."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.requires_grad_(False)


def batch_norm_in_eval(module: nn.Module) -> None:
    """Let batch norm use its own statistics, in a module that is otherwise in train mode."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
