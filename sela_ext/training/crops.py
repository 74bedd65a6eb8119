"""Multi-crop: several views of every image, of one or more sizes, and the loss over all of them.

Note [Multi-crop]
    Small crops cost little and ask for much: the network shall tell from a part of the image which label the whole has.
    Views of one size go through the network together, so that a step makes one pass per size. Labels come from the
    views of the first group alone, the large ones.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sela_ext.data import Augment
from sela_ext.errors import OptionError, shown
from sela_ext.models import Backbone, Heads, Network, build_backbone

# SwAV's small crops cover .05 to .14 of the image where its large ones cover .14 to 1: they end where those begin.
_SMALL_SHARE = 0.05 / 0.14
_GROUP = re.compile(r"\s*(\d+)\s*x\s*(\d+)\s*(?::\s*(\d*\.?\d+)\s*-\s*(\d*\.?\d+)\s*)?")
_EXPECTED = (
    'crops: expected COUNTxSIZE, several joined by "+", the largest first, such as "2x160+4x96" or '
    '"2x160:0.08-1+4x96:0.05-0.14" (share of the image that a crop covers)'
)
# What the loader can tell apart.
_MOST_VIEWS = 256
_SMALLEST, _LARGEST = 4, 4096


@dataclass(frozen=True)
class CropGroup:
    """Views of one kind.

    Attributes:
        count: how many of every image.
        size: pixels of a side.
        scale: share of the image's area that a view covers, (low, high); None: chosen, see `crop_views`.
    """

    count: int
    size: int
    scale: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.count}x{self.size}" + ("" if self.scale is None else f":{self.scale[0]:g}-{self.scale[1]:g}")


def parse_crops(crops: Any) -> list[CropGroup]:
    """Read the option `crops`.

    Args:
        crops: a text, see the example; or a list with a text or a pair (count, size) per group.

    Raises:
        OptionError: nothing of these, counts or sizes out of range, or a group larger than the first.

    Example:
        >>> parse_crops("2x160+4x96")
        [CropGroup(count=2, size=160, scale=None), CropGroup(count=4, size=96, scale=None)]
        >>> parse_crops("2x160:0.08-1 + 4x96:.05-.14")[1].scale
        (0.05, 0.14)
        >>> "+".join(map(str, parse_crops([(2, 32), (4, 16)])))
        '2x32+4x16'
    """
    parts = crops.split("+") if isinstance(crops, str) else crops
    if not isinstance(parts, (list, tuple)) or not parts:
        raise OptionError(f"{_EXPECTED}; found {shown(crops)}")
    groups = []
    for part in parts:
        if isinstance(part, str) and (match := _GROUP.fullmatch(part)):
            scale = None if match[3] is None else (float(match[3]), float(match[4]))
            groups.append(CropGroup(int(match[1]), int(match[2]), scale))
        elif isinstance(part, (list, tuple)) and len(part) == 2 and all(type(number) is int for number in part):
            groups.append(CropGroup(*part))
        else:
            raise OptionError(f"{_EXPECTED}; found {shown(crops)}")
    for group in groups:
        if group.count < 1 or not _SMALLEST <= group.size <= _LARGEST:
            raise OptionError(
                f"crops: expected counts of at least 1 and sizes from {_SMALLEST} to {_LARGEST}, found {group}"
            )
        if group.scale is not None and not 0 < group.scale[0] <= group.scale[1] <= 1:
            raise OptionError(f"crops: expected shares LOW-HIGH with 0 < LOW <= HIGH <= 1, found {group}")
        if group.size > groups[0].size:
            raise OptionError(
                f"crops: expected the largest first, whose embeddings give the labels; found {shown(crops)}"
            )
    if sum(group.count for group in groups) > _MOST_VIEWS:
        raise OptionError(f"crops: expected at most {_MOST_VIEWS} views of an image, found {shown(crops)}")
    return groups


def crop_views(augment: Augment, groups: Sequence[CropGroup]) -> list[Augment]:
    """Say how every view looks.

    Args:
        augment: the augmentation of the run, with random crops; its size does not matter.
        groups: what `parse_crops` returned. Where one names no share of the image, crops of the first group's size
            cover what `augment` says, and smaller ones end where those begin: .14 to 1 and .05 to .14, as in SwAV.

    Returns:
        One augmentation per view, in the order of the groups.

    Raises:
        OptionError: `augment` does not crop at random.

    Example:
        >>> views = crop_views(Augment.sela(64, scale=(0.28, 1.0)), parse_crops("1x32+2x16"))
        >>> [(view.size, view.scale) for view in views]
        [(32, (0.28, 1.0)), (16, (0.1, 0.28)), (16, (0.1, 0.28))]
    """
    if augment.crop != "random":
        raise OptionError(
            f"crops: expected an augmentation with random crops, found crop={augment.crop!r}; choose another augment"
        )
    low = augment.scale[0]
    views = []
    for group in groups:
        scale = group.scale
        if scale is None:
            scale = augment.scale if group.size == groups[0].size else (round(low * _SMALL_SHARE, 6), low)
        views += [dataclasses.replace(augment, size=group.size, scale=scale)] * group.count
    return views


def default_crops(size: int) -> list[CropGroup]:
    """Two views of `size` pixels and four of half of it, to whole multiples of 8 (at least 8).

    Example:
        >>> "+".join(map(str, default_crops(32)))
        '2x32+4x16'
    """
    return [CropGroup(2, size), CropGroup(4, min(size, max(8, 8 * round(size / 16))))]


def takes_sizes(model: Any, channels: int, sizes: Sequence[int]) -> str:
    """Why a network cannot be used at all of these sizes; empty if it can.

    Args:
        model: name or module.
        channels: of the images.
        sizes: the first is the one that it was built for.
    """
    backbone = _draft(model, channels, sizes[0])
    device = next((value.device for value in backbone.module.state_dict().values()), torch.device("cpu"))
    for size in sizes[1:]:
        try:
            with device:
                found = build_backbone(backbone.module, channels=backbone.channels_in, image_size=(size, size))
        except OptionError as error:
            return str(error)
        if found.feature_dim != backbone.feature_dim:
            return f"{found.feature_dim} features at {size} x {size} instead of {backbone.feature_dim}"
    return ""


def _draft(model: Any, channels: int, size: int) -> Backbone:
    """A network by name without its weights, which costs neither time nor memory; where that fails, as it is."""
    if isinstance(model, str):
        try:
            with torch.device("meta"):
                return build_backbone(model, channels=channels, image_size=(size, size))
        except (RuntimeError, OptionError):  # some look at numbers while they are built
            pass
    return build_backbone(model, channels=channels, image_size=(size, size))


def embed_views(network: Network, views: Sequence[Tensor]) -> list[Tensor]:
    """Embed every view, with one pass of the network per size.

    Args:
        network: in train mode its batch norm sees all views of a size together.
        views: V tensors [B, C, S_v, S_v].

    Returns:
        V tensors [B, E].
    """
    places: dict[int, list[int]] = {}
    for place, view in enumerate(views):
        places.setdefault(view.shape[-1], []).append(place)
    found: dict[int, Tensor] = {}
    for together in places.values():
        pictures = [views[place] for place in together]
        embeddings = network(torch.cat(pictures) if len(pictures) > 1 else pictures[0])
        found.update(zip(together, embeddings.chunk(len(together)), strict=True))
    return [found[place] for place in range(len(views))]


def crop_losses(heads: Heads, embeddings: Sequence[Tensor], target: Tensor) -> Tensor:
    """Cross-entropy of the predictions of every view with the labels of its image, mean over views and images.

    Args:
        heads: T heads.
        embeddings: of V views, each [B, E].
        target: labels, int64 [T, B]; -1 = none, which weighs nothing.

    Returns:
        float32 [T]; 0 where no image has a label.

    Source: Caron et al., SwAV (NeurIPS 2020): DeepCluster-v2 and SeLa-v2.
    """
    logits = heads.split(heads(torch.cat(list(embeddings))))
    losses = []
    for part, goal in zip(logits, target, strict=True):
        total = F.cross_entropy(part, goal.repeat(len(embeddings)), ignore_index=-1, reduction="sum")
        losses.append(total / (len(embeddings) * (goal >= 0).sum()).clamp(min=1))
    return torch.stack(losses)
