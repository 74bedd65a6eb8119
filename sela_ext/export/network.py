"""The network of a run, and what another program needs to know to use it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sela_ext.data import Augment, open_source
from sela_ext.errors import DataError, OptionError
from sela_ext.export.labels import choose_heads
from sela_ext.export.request import Request
from sela_ext.kernels.build import build_info
from sela_ext.models import Network

# Of images, where nothing else is known.
_CHANNELS = (3, 1)


@dataclass(frozen=True)
class Plain:
    """A network in eval mode on the CPU, float32, and how its inputs are made.

    Attributes:
        network: the network.
        model: its name.
        heads: numbers of the heads that are asked for.
        potentials: log beta of every head, float64 [K]; None where not known.
        lam: lambda of the potentials.
        best: the head that the run chose, where it has.
        shape: of one input: (C, S, S), or (D,) for vectors.
        mean: of the inputs' normalisation, one number per channel; empty for vectors.
        std: likewise.
        view: how an image becomes S x S pixels, in words.
    """

    network: Network
    model: str
    heads: list[int]
    potentials: list[Tensor] | None
    lam: float
    best: int | None
    shape: tuple[int, ...]
    mean: list[float]
    std: list[float]
    view: str

    def backbone_state(self) -> dict[str, Tensor]:
        """The backbone's tensors under its own names, for networks of torchvision torchvision's."""
        state = {key: value.detach().cpu().contiguous() for key, value in self.network.backbone.state_dict().items()}
        if not state:
            raise OptionError(f"run: expected a network with weights, found {self.model}, which has none")
        return state

    def facts(self) -> dict[str, Any]:
        """What is needed to use the network elsewhere."""
        heads = self.network.heads
        facts: dict[str, Any] = {
            "sela_ext": build_info()["version"],
            "model": self.model,
            "input": ["N", *self.shape],
            "feature_dim": self.network.feature_dim,
            "clusters": list(heads.clusters),
        }
        if heads.clusters:
            facts |= {"head_kind": heads.kind, "lambda": self.lam}
            if heads.kind == "cosine":
                facts["temperature"] = heads.temperature
            if self.best is not None:
                facts["head"] = self.best
        if self.mean:
            facts |= {"mean": self.mean, "std": self.std, "image_size": self.shape[-1], "view": self.view}
        return facts

    def strings(self) -> dict[str, str]:
        """The facts as text: words as they are, all else as JSON."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.facts().items()}

    def told(self, *, graph: bool = False) -> list[str]:
        """How inputs are made, for people; a graph repeats grey images by itself, where that is needed."""
        if not self.mean:
            return [f"input: vectors float32 [N, {self.shape[0]}]"]
        channels, side, _ = self.shape
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        taken = channels if graph else self.network.channels_in
        grey = "" if taken == channels else f", repeated to {taken} channels"
        return [
            f"input: images float32 [N, {channels}, {side}, {side}], {self.view}; values in [0, 1], minus mean "
            f"({mean}), divided by std ({std}){grey}"
        ]


def load_plain(request: Request, default: str) -> Plain:
    """Load the network that is asked for.

    Args:
        request: what is asked for.
        default: what a `head` of None stands for.

    Raises:
        CheckpointError: no run, or a damaged one.
        OptionError: no such head, or a network that is known for no kind of input.
    """
    subject = request.subject
    prepared = channels = None
    for probe in _probes(request):
        try:
            prepared = subject.prepare(open_source(probe))
        except DataError:
            continue
        channels = probe.shape[-1]
        break
    if prepared is None or channels is None:
        raise OptionError(f"run: expected a network for images or vectors, found {subject.name} of another kind")
    network = prepared.network.float().cpu().eval()
    vectors = probe.ndim == 2
    view = prepared.plain
    mean, std = ((), ()) if vectors else view.channel_values(channels)
    return Plain(
        network=network,
        model=subject.model,
        heads=choose_heads(request.head, len(network.heads.clusters), subject.head, default),
        potentials=None if subject.potentials is None else [torch.from_numpy(one) for one in subject.potentials],
        lam=subject.lam,
        best=subject.head,
        shape=(channels,) if vectors else (channels, view.size, view.size),
        mean=[float(value) for value in mean],
        std=[float(value) for value in std],
        view=_in_words(view),
    )


def _probes(request: Request) -> list[np.ndarray[Any, Any]]:
    """Inputs of the kinds that the network may take, the likeliest first."""
    side = request.image_size or 224
    resolved: dict[str, Any] = {}
    # A checkpoint lies in a folder of the run's.
    place = request.folder
    if place is None and request.subject.kind == "run":
        path = Path(request.subject.name)
        place = path if path.is_dir() else path.parent.parent
    if place is not None:
        resolved = json.loads((place / "options.json").read_text(encoding="utf-8"))["resolved"]
    if resolved.get("vector_size"):
        return [np.zeros((2, int(resolved["vector_size"])), np.float32)]
    counts = (int(resolved["channels"]),) if "channels" in resolved else _CHANNELS
    return [np.zeros((2, side, side, count), np.uint8) for count in counts]


def _in_words(view: Augment) -> str:
    if view.crop != "center":
        return f"resized to {view.size} x {view.size} pixels"
    return f"short side resized to {view.resize_side}, central {view.size} x {view.size} pixels"


class Outputs(nn.Module):
    """What the network gives, as a tuple: features, and for each head logits and labels.

    Args:
        plain: the network.
    """

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.network = plain.network
        self.numbers = list(plain.heads)
        self.lam = float(plain.lam)
        self.names = ["features"]
        for head in self.numbers:
            count = plain.network.heads.clusters[head]
            potential = torch.zeros(count).double() if plain.potentials is None else plain.potentials[head]
            self.register_buffer(f"potential_{head}", potential)
            self.names += [f"logits_{head}", f"labels_{head}"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map inputs to features float32 [N, D], and per head to logits float32 [N, K] and labels int64 [N]."""
        features = self.network.features(images)
        found = [features]
        if self.numbers:
            embedding = self.network.projection(features)
            for head in self.numbers:
                logits = self.network.heads.logits_of(head, embedding)
                balanced = self.lam * logits.double() + self.get_buffer(f"potential_{head}")
                found += [logits, balanced.argmax(1)]
        return tuple(found)
