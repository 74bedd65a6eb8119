"""A network as safetensors: the backbone under plain names, heads and potentials beside it, the rest as text."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sela_ext.export.destination import Exported, write_bytes
from sela_ext.export.network import load_plain
from sela_ext.export.optional import optional_package
from sela_ext.export.request import Request

# In front of the names of what is not the backbone's.
PREFIX = "sela."


def write_safetensors(path: Path, request: Request, *, overwrite: bool) -> Exported:
    """Write backbone and heads.

    Raises:
        OptionError: the package safetensors is not installed, or a file that is there.
    """
    package = optional_package("safetensors.torch", "safetensors", 'format "safetensors"')
    plain = load_plain(request, "all")
    state = plain.backbone_state()
    if plain.heads:
        state |= {
            f"{PREFIX}projection.{key}": value.detach().cpu().contiguous()
            for key, value in plain.network.projection.state_dict().items()
        }
    for head in plain.heads:
        start = sum(plain.network.heads.clusters[:head])
        rows = slice(start, start + plain.network.heads.clusters[head])
        parts: dict[str, Tensor | None] = {
            "weight": plain.network.heads.weight[rows],
            "bias": None if plain.network.heads.bias is None else plain.network.heads.bias[rows],
            "potential": None if plain.potentials is None else plain.potentials[head],
        }
        state |= {
            f"{PREFIX}heads.{head}.{key}": value.detach().clone() for key, value in parts.items() if value is not None
        }
    # Tensors that share memory, as tied weights do, are refused by the format.
    data = package.save({key: value.clone() for key, value in state.items()}, metadata=plain.strings())
    write_bytes(path, data, overwrite=overwrite)
    lines = [f"{plain.model}: {len(state)} tensors, {len(plain.heads)} heads", *plain.told()]
    return Exported(path, "safetensors", lines, plain.facts() | {"tensors": len(state)})
