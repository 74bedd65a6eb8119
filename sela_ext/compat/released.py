"""`load_released`: from a checkpoint file to a network with its heads, and the labels it was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sela_ext.compat.archive import read_archive
from sela_ext.compat.layouts import Layout, Parts, copy_into, detect, differences, plain_name, take_apart
from sela_ext.data.safe_files import read_json
from sela_ext.errors import CheckpointError
from sela_ext.models import Network, build_backbone, projection_widths

# Where training scripts put the state dict and the labels.
_STATE_KEYS = ("state_dict", "net", "model")
_LABEL_KEYS = ("L", "labels")
# Temperature of the prototypes of DeepCluster-v2, SeLa-v2 and SwAV.
_TEMPERATURE = 0.1
_LARGEST_LABEL = 2**31


def load_released(path: str | os.PathLike[str]) -> tuple[Network, Tensor | None]:
    """Load weights that the authors of SeLa or DeepCluster released, or a network under torchvision's names.

    The network is told by the names and shapes in the file: AlexNet with batch norm (big or small, with or without the
    Sobel filter), ResNet-50 with pre-activation, ResNets under torchvision's names or the authors' older ones, VGG16
    with batch norm, and the `network.pt` of a run of this package. docs/checkpoints.md lists every layout.

    Args:
        path: a file written by `torch.save`, or a run folder with its `network.pt`.

    Returns:
        The network on the CPU in eval mode, float32, with all heads that the file holds (`network.heads.clusters` is
        empty where it holds none), and the labels int64 [heads, N], or None where the file holds none. The file of a
        network that is trained on with rotations has its layer for them in `network.rotation`.

    Raises:
        CheckpointError: the file is missing, damaged, carries code, claims more than it holds, or fits no known
            network; says which keys do not fit.

    Example:
        >>> import sela_ext, tempfile, os, torch, torchvision
        >>> path = os.path.join(tempfile.mkdtemp(), "resnet18.pth")
        >>> torch.save({"state_dict": torchvision.models.resnet18(num_classes=7).state_dict()}, path)
        >>> network, labels = sela_ext.load_released(path)
        >>> network.name, network.heads.clusters, labels
        ('resnet18', [7], None)

    Source: github.com/yukimasano/self-label and github.com/facebookresearch/deepcluster, which describe the files.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        if not (file / "network.pt").exists():
            raise CheckpointError(f"{file}: expected a checkpoint or a finished run, found a folder without network.pt")
        file = file / "network.pt"
    content = read_archive(file)
    if isinstance(content, dict) and {"backbone", "heads", "clusters"} <= content.keys():
        return _load_run(file, content), None
    state = _state_dict(file, content)
    parts = take_apart(state)
    layout = detect(parts.backbone)
    if layout is None:
        some = ", ".join(repr(key[:60]) for key in list(state)[:3])
        raise CheckpointError(
            f"{file}: expected the weights of AlexNet, VGG16 or a ResNet as SeLa, DeepCluster or torchvision name "
            f"them, found {len(state)} tensors named {some}, ...; see docs/checkpoints.md"
        )
    network = _assemble(file, layout, parts)
    return network, _labels(file, content, network.heads.clusters)


def _state_dict(file: Path, content: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint under plain names."""
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), dict)), content)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{file}: expected a state dict, found {type(state).__name__}")
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file}: expected names with tensors, found {str(key)[:60]!r} with {type(value).__name__}"
            )
        name = plain_name(key)
        if name in plain:
            raise CheckpointError(f"{file}: expected every tensor once, found {name[:80]!r} under two names")
        plain[name] = value
    return plain


def _assemble(file: Path, layout: Layout, parts: Parts) -> Network:
    """A network with the tensors of a checkpoint, which must fit one by one."""
    with torch.device("meta"):
        backbone = layout.build()
    found = {layout.rename(key): tensor for key, tensor in parts.backbone.items()}
    problems = differences(backbone.state_dict(), found)
    if problems:
        raise CheckpointError(f"{file}: the weights do not fit {layout.name}: {'; '.join(problems)}")
    _check_finite(file, {**found, **{f"head {n}.{part}": tensor for (n, part), tensor in parts.heads.items()}})
    copy_into(backbone, found)
    backbone.eval()
    channels = _channels_in(backbone)
    feature_dim = _feature_dim(backbone)
    projection, embedding_dim = _projection(file, parts.projection, feature_dim)
    rotation = _take_rotation(parts, embedding_dim)
    clusters = _check_heads(file, parts, embedding_dim)
    cosine = bool(clusters) and (0, "bias") not in parts.heads
    with torch.device("meta"):
        network = Network(
            backbone,
            feature_dim,
            clusters,
            head_kind="cosine" if cosine else "linear",
            temperature=_TEMPERATURE,
            channels_in=channels,
            name=layout.name,
        )
    network.projection, network.embedding_dim = projection, embedding_dim
    network.heads.weight = nn.Parameter(_stack(parts, "weight", (0, embedding_dim)))
    if not cosine:
        network.heads.bias = nn.Parameter(_stack(parts, "bias", (0,)))
    network.rotation = rotation
    return network.eval()


def _channels_in(backbone: nn.Module) -> int:
    return next(int(child.in_channels) for child in backbone.modules() if isinstance(child, nn.Conv2d))


def _feature_dim(backbone: nn.Module) -> int:
    known = getattr(backbone, "feature_dim", None)
    if isinstance(known, int):
        return known
    last = [child for child in backbone.modules() if isinstance(child, nn.BatchNorm2d)][-1]
    return int(last.num_features)  # of a torchvision ResNet: what the last block gives


def _check_heads(file: Path, parts: Parts, embedding_dim: int) -> list[int]:
    """Number of clusters of every head."""
    heads = parts.heads
    count = 1 + max((number for number, _ in heads), default=-1)
    biased = any(part == "bias" for _, part in heads)
    wanted = [(number, part) for number in range(count) for part in (("weight", "bias") if biased else ("weight",))]
    missing = [f"{part} of head {number}" for number, part in wanted if (number, part) not in heads]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{file}: the heads are incomplete: {len(missing)} missing: {', '.join(missing[:3])}{more}"
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in heads.values())
    if size > file.stat().st_size:
        raise CheckpointError(f"{file}: expected every head's own weights, found {size:,} bytes in a smaller file")
    clusters = [int(heads[number, "weight"].shape[0]) for number in range(count)]
    for number, k in enumerate(clusters):
        for part, shape in (("weight", (k, embedding_dim)), ("bias", (k,))):
            if (number, part) in heads and tuple(heads[number, part].shape) != shape:
                raise CheckpointError(
                    f"{file}: expected the {part} of head {number} to be {shape}, found "
                    f"{tuple(heads[number, part].shape)}"
                )
    return clusters


def _take_rotation(parts: Parts, embedding_dim: int) -> nn.Module | None:
    """The layer that tells four rotations apart: the last of several heads, where it alone has four outputs."""
    last = max((number for number, _ in parts.heads), default=0)
    sizes = {n: tuple(tensor.shape) for (n, part), tensor in parts.heads.items() if part == "weight"}
    alone = all(shape[:1] != (4,) for n, shape in sizes.items() if n != last)
    if not last or sizes.get(last) != (4, embedding_dim) or (last, "bias") not in parts.heads or not alone:
        return None
    with torch.device("meta"):
        rotation = nn.Linear(embedding_dim, 4)
    copy_into(rotation, {part: parts.heads.pop((last, part)) for part in ("weight", "bias")})
    return rotation


def _projection(file: Path, found: dict[str, Tensor], feature_dim: int) -> tuple[nn.Module, int]:
    """SwAV's layers in front of the prototypes, and the length of what they give.

    One linear layer, or linear, batch norm, ReLU, linear; nothing where there is none.
    """
    if not found:
        return nn.Identity(), feature_dim
    widths = [int(found[key].shape[0]) for key in ("0.weight", "3.weight") if key in found and found[key].ndim == 2]
    if not widths:
        raise CheckpointError(f"{file}: expected a projection of one or two linear layers, found {sorted(found)[:3]}")
    with torch.device("meta"):
        layers: list[nn.Module] = [nn.Linear(feature_dim, widths[0])]
        if len(widths) == 2:
            layers += [nn.BatchNorm1d(widths[0]), nn.ReLU(inplace=True), nn.Linear(widths[0], widths[1])]
        projection = nn.Sequential(*layers)
    problems = differences(projection.state_dict(), found)
    if problems:
        raise CheckpointError(f"{file}: the projection in front of the prototypes does not fit: {'; '.join(problems)}")
    copy_into(projection, found)
    return projection, widths[-1]


def _stack(parts: Parts, part: str, empty: tuple[int, ...]) -> Tensor:
    """One part of all heads, one below the other, in float32; every tensor is let go once it is copied."""
    count = 1 + max((number for number, _ in parts.heads), default=-1)
    rows = [parts.heads[number, part].shape[0] for number in range(count)]
    stacked = torch.empty(sum(rows), *empty[1:])
    for number, piece in enumerate(torch.split(stacked, rows) if rows else ()):
        piece.copy_(parts.heads.pop((number, part)))
    return stacked


def _check_finite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_complex() or tensor.is_quantized:
            raise CheckpointError(f"{file}: expected real numbers, found {tensor.dtype} in {name[:80]!r}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{file}: expected finite weights, found NaN or infinity in {name[:80]!r}")


def _labels(file: Path, content: Any, clusters: list[int]) -> Tensor | None:
    """Labels int64 [heads, N] of a checkpoint that carries some."""
    given = next((content[key] for key in _LABEL_KEYS if content.get(key) is not None), None)
    if given is None:
        return None
    if isinstance(given, (list, tuple)):
        given = _from_list(file, given)
    whole = isinstance(given, Tensor) and not given.is_floating_point() and not given.is_complex()
    if not whole or given.dtype is torch.bool or given.ndim not in (1, 2):
        found = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise CheckpointError(f"{file}: expected whole-numbered labels [N] or [heads, N], found {found}")
    labels = given.reshape(1, -1) if given.ndim == 1 else given
    labels = labels.to(torch.int64, copy=True)
    for head, row in enumerate(labels):
        largest = clusters[head] if head < len(clusters) else _LARGEST_LABEL
        if len(row) and (int(row.min()) < -1 or int(row.max()) >= largest):
            raise CheckpointError(
                f"{file}: expected labels of head {head} in -1 .. {largest - 1}, found {int(row.min())} .. "
                f"{int(row.max())}"
            )
    return labels


def _from_list(file: Path, given: Sequence[Any]) -> Tensor:
    """Labels [N] or [heads, N] of a list of numbers, or of such lists."""
    rows = given if given and isinstance(given[0], (list, tuple)) else [given]
    plain = all(isinstance(row, (list, tuple)) and len(row) == len(rows[0]) for row in rows)
    # One list may stand in many places: what it would become is counted before it is made.
    if not plain or len(rows) * len(rows[0]) > file.stat().st_size or not all(type(k) is int for k in chain(*rows)):
        raise CheckpointError(f"{file}: expected labels [heads, N], found a list that is no array of whole numbers")
    try:
        return torch.tensor(rows if rows is given else given, dtype=torch.int64)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise CheckpointError(f"{file}: expected labels below 2^63, found larger ones") from error


def _run_size(file: Path) -> int:
    """Pixels that a run trained with, which some networks are built for; 224 where its options are not there."""
    try:
        size = read_json(file.parent / "options.json")["resolved"]["augment"]["size"]
        return int(size) if 4 <= int(size) <= 4096 else 224
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 224


def _load_run(file: Path, content: dict[str, Any]) -> Network:
    """The network of a run of this package, from its network.pt."""
    try:
        name, clusters = str(content["model"]), [int(k) for k in content["clusters"]]
        projection, heads = dict(content["projection"]), dict(content["heads"])
        found = {str(key): value for key, value in content["backbone"].items()}
        rotation = dict(content.get("rotation") or {})
        kind, temperature = str(content["head_kind"]), float(content["temperature"])
        parts = (found, projection, heads, rotation)
        if not all(isinstance(value, Tensor) for part in parts for value in part.values()):
            raise ValueError("expected tensors")
        first = next(tensor for tensor in found.values() if tensor.ndim == 4)
        widths = projection_widths(projection)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise CheckpointError(f"{file}: expected the network.pt of a finished run, found other content") from error
    try:
        with torch.device("meta"):
            size = _run_size(file)
            built = build_backbone(name, channels=1 if first.shape[1] == 1 else 3, image_size=(size, size))
            network = Network(
                built.module,
                built.feature_dim,
                clusters,
                projection=widths,
                head_kind=kind,
                temperature=temperature,
                channels_in=built.channels_in,
                name=name,
                rotation=bool(rotation),
            )
    except ValueError as error:  # OptionError: a module of the user's own
        raise CheckpointError(
            f"{file}: expected a network known by name, found {name!r}; build it yourself and load its weights from "
            "the file's 'backbone'"
        ) from error
    pairs = [(network.backbone, found), (network.projection, projection), (network.heads, heads)]
    if network.rotation is not None:
        pairs.append((network.rotation, rotation))
    for part, tensors in pairs:
        problems = differences(part.state_dict(), tensors)
        if problems:
            raise CheckpointError(f"{file}: the weights do not fit {name}: {'; '.join(problems)}")
        copy_into(part, tensors)
    return network.eval()
