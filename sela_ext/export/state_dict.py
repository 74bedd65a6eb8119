"""A backbone as a plain state dict, under torchvision's names where torchvision has the network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sela_ext.errors import OptionError
from sela_ext.export.destination import Exported, write_bytes
from sela_ext.export.network import Plain, load_plain
from sela_ext.export.request import Request
from sela_ext.models.registry import torchvision_name


def write_torchvision(path: Path, request: Request, *, overwrite: bool) -> Exported:
    """Write the backbone, and as its last linear layer a head if one is asked for.

    Raises:
        OptionError: a head that no linear layer behind the backbone can be, or a file that is there.
    """
    plain = load_plain(request, "none")
    state, name = plain.backbone_state(), torchvision_name(plain.model)
    lines, facts, settings = plain.told(), plain.facts(), _settings(name or "", plain.shape)
    if plain.heads:
        layer = None if name is None else last_linear(_built(name, settings))
        weight, bias, unit = _as_linear(plain, layer)
        settings["num_classes"] = len(weight)
        state |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
        lines.append(f"{layer}: head {plain.heads[0]}, {len(weight)} clusters")
        if unit:
            lines.append(
                f"{layer}: of a cosine head; the likeliest cluster is its own, probabilities need features of length 1"
            )
        facts["unit_features"] = unit
    if name is None:
        lines.insert(0, f"{plain.model}: {len(state)} tensors under the network's own names; torchvision has none such")
        by_name = request.model is None and plain.mean and not plain.model.startswith("timm/")
        start = f"; a training starts from it with model={f'{plain.model}:{path.name}'!r}" if by_name else ""
        lines.append(f"torch.load({path.name!r}){start}")
    else:
        missing = _missing(name, state, settings)
        facts |= {"missing": missing, "torchvision": name}
        given = "".join(f", {key}={value}" for key, value in settings.items())
        lines.insert(0, f"{name}: {len(state)} tensors under torchvision's names")
        lines.append(
            f"torchvision.models.get_model({name!r}{given}).load_state_dict(torch.load({path.name!r}), strict=False)"
        )
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        lines.append(f"not in the file, stay as they are built: {shown or 'none'}")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue(), overwrite=overwrite)
    return Exported(path, "torchvision", lines, facts | {"tensors": len(state)})


def last_linear(module: nn.Module) -> str | None:
    """Name of a network's last linear layer, which a head can be; None without one.

    Example:
        >>> last_linear(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4)))
        '2'
    """
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return linear[-1] if linear else None


def _as_linear(plain: Plain, layer: str | None) -> tuple[Tensor, Tensor, bool]:
    """Weight and bias of the head that is asked for, and whether it is for features of length one."""
    if layer is None:
        raise OptionError(
            f"head: expected a torchvision network that ends in a linear layer, found {plain.model}; leave head out, "
            "or export to safetensors or onnx, which keep heads"
        )
    if len(plain.heads) > 1:
        raise OptionError("head: expected one head for the last layer, found several; name best or a number")
    if not isinstance(plain.network.projection, nn.Identity):
        raise OptionError(
            "head: expected heads on the backbone's features, found a projection between them; leave head out, or "
            "export to safetensors or onnx, which keep both"
        )
    weight, bias, unit = plain.network.heads.as_linear(plain.heads[0])
    return weight.cpu().clone(), torch.zeros(len(weight)) if bias is None else bias.cpu().clone(), unit


def _settings(name: str, shape: tuple[int, ...]) -> dict[str, int]:
    """What torchvision must be told to build this network: vision transformers are of one image size."""
    side = shape[-1]
    return {"image_size": side} if name.startswith("vit_") and side != 224 else {}


def _built(name: str, settings: dict[str, int]) -> nn.Module:
    """Build torchvision's network, without memory for its weights."""
    import torchvision.models

    quick: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        module: nn.Module = torchvision.models.get_model(name, weights=None, **quick, **settings)
    return module


def _missing(name: str, state: dict[str, Tensor], settings: dict[str, int]) -> list[str]:
    """Names of torchvision's network that a state dict lacks."""
    wanted = _built(name, settings).state_dict()
    unknown = [key for key, tensor in state.items() if key not in wanted or wanted[key].shape != tensor.shape]
    if unknown:  # as with a module of the user's that has the name of one of torchvision's
        raise OptionError(f"run: expected the tensors of torchvision's {name}, found others, such as {unknown[0]}")
    return [key for key in wanted if key not in state]
