"""What is evaluated or put to use: a run, a checkpoint, released weights, a network by name, or bare pixels."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sela_ext.compat import load_released
from sela_ext.compat.archive import read_archive
from sela_ext.compat.layouts import copy_into, differences
from sela_ext.data import Augment, Source
from sela_ext.data.memory import free_memory
from sela_ext.data.messages import first_line
from sela_ext.data.npz import read_arrays
from sela_ext.data.safe_files import read_json
from sela_ext.errors import CheckpointError, DataError, OptionError, ResourceError, SelaError
from sela_ext.models import Network, build_backbone, build_vector_backbone
from sela_ext.report.metrics import read_metrics
from sela_ext.training.checkpoint import load_checkpoint, read_checkpoint
from sela_ext.training.resolve import SMALL_IMAGES, probe_image_size

PIXELS, RANDOM = "pixels", "random"
# The side at which networks for photographs are evaluated, where nothing else is known.
_SIDE = 224
# What the options of a run may claim: the side of its images, and bytes per pixel of a network's widest layers.
_MOST_SIDE = 4096
_TRIAL_BYTES = 1024
# What a run may say of its image files.
_READING = ("exact", "exif")
_EXPECTED = (
    "expected a run folder, a checkpoint, released weights, NAME:WEIGHTS (torchvision's names, or a file of weights), "
    "random:NAME, or pixels"
)


@dataclass(frozen=True)
class Prepared:
    """A network ready for images of one kind.

    Attributes:
        network: in eval mode; `heads.clusters` is empty where it has no cluster heads.
        plain: how images are looked at.
        probe: how probes' training images are augmented.
        untrained: whether batch norm has no statistics yet; see `sela_ext.inference.passes.settle`.
        reading: options of the run that say how its image files become pixels, for `Loader`.
    """

    network: Network
    plain: Augment
    probe: Augment
    untrained: bool = False
    reading: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        name: as it was asked for.
        kind: "run", "released", "torchvision", "random", "module" or "pixels".
        model: name of the network.
        prepare: makes it ready for images.
        options: of the run, as options.json has them; empty otherwise.
        labels: labels stored with it, int32 [heads, N]; None without.
        label_names: names of the images they belong to; None where not known.
        kept_only: whether they are those of the training images alone.
        potentials: log beta of every head, float64 [K]; None where not known.
        lam: lambda of the potentials.
        head: the head of lowest cross-entropy, where that was settled in training.
        precision: of the run; "float32" otherwise.
        history: for each head, the NMI between successive label passes.
    """

    name: str
    kind: str
    model: str
    prepare: Callable[[Source], Prepared]
    options: dict[str, Any] = field(default_factory=dict)
    labels: NDArray[np.int32] | None = None
    label_names: list[str] | None = None
    kept_only: bool = False
    potentials: list[NDArray[np.float64]] | None = None
    lam: float = 25.0
    head: int | None = None
    precision: str = "float32"
    history: list[list[float]] = field(default_factory=list)


def open_subject(
    run: Any,
    *,
    model: Any = None,
    image_size: int | None = None,
    seed: int = 0,
    download: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Subject:
    """Find out what is meant, and load it; files are read as tensors and plain values, nothing in them is executed.

    Args:
        run: a run folder; a result of `sela_ext.train`; one of its checkpoints; a file of released weights;
            "resnet18:IMAGENET1K_V1" (torchvision's weights, found in torch's cache folder); "resnet18:file.pth" (a
            state dict under torchvision's names); "random:resnet18" (a network as it is built); "pixels"; or an
            `nn.Module` that maps images to features.
        model: the network of a run that was given one of the user's own.
        image_size: pixels, where it shall not be the run's or the usual one.
        seed: of a random network.
        download: fetch torchvision's weights if they are not there.
        say: told what takes a while.

    Raises:
        CheckpointError: nothing of these, damaged, or weights that do not fit.
        OptionError: unknown network or weights.
        ResourceError: weights that would have to be fetched.
    """
    if image_size is not None and image_size < 4:
        raise OptionError(f"image_size: expected at least 4 pixels, found {image_size}")
    if isinstance(run, nn.Module):
        return _of_module(run, image_size)
    run = getattr(run, "out", run)
    if not isinstance(run, (str, os.PathLike)):
        raise OptionError(f"run: {_EXPECTED}; found {type(run).__name__}")
    text, path = os.fspath(run), Path(run).expanduser()
    if path.is_dir() and (path / "options.json").exists():
        return _of_run(path, None, model, image_size)
    if path.is_file() and path.suffix == ".ckpt":
        return _of_run(path.parent.parent, path, model, image_size)
    if path.is_file() and path.name == "network.pt" and (path.parent / "options.json").exists():
        return _of_run(path.parent, None, model, image_size)
    if path.exists():
        return _of_released(path, image_size)
    if text == PIXELS:
        return _of_pixels(image_size)
    name, colon, weights = text.partition(":")
    if not colon:
        raise CheckpointError(f"{text}: {_EXPECTED}; found no such file or folder")
    if name == RANDOM:
        return _of_random(text, weights, image_size, seed)
    return _of_torchvision(text, name, weights, image_size, download, say)


def plain_view(size: int, small: bool, **fields: Any) -> Augment:
    """How images are looked at: small ones whole, others by their central window."""
    return Augment.none(size, **fields) if small else Augment.eval(size, **fields)


def _of_run(folder: Path, checkpoint: Path | None, model: Any, image_size: int | None) -> Subject:
    """A run folder, finished or not, or one of its checkpoints; what its files say need not be true."""
    try:
        return _read_run(folder, checkpoint, model, image_size)
    except SelaError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{folder}: expected the files of a run, found values that no run writes: {first_line(error)}"
        ) from error


def _read_run(folder: Path, checkpoint: Path | None, model: Any, image_size: int | None) -> Subject:
    try:
        info = read_json(folder / "options.json")
        options, resolved = info["options"], info["resolved"]
        width = int(resolved.get("vector_size", 0))
        channels = int(resolved.get("channels", 1)) if width else int(resolved["channels"])
        small = not width and max(int(side) for side in resolved["image_size"]) < SMALL_IMAGES
        trained = Augment.none(_SIDE) if width else Augment(**resolved["augment"])
        clusters = [int(k) for k in options["clusters"]]
        name = str(resolved["network"])
        # As much as the trial run of a network on two images may take.
        if not 1 <= trained.size <= _MOST_SIDE or _TRIAL_BYTES * trained.size**2 > free_memory() // 2:
            raise ValueError(f"images of {trained.size} pixels")
        if channels not in (1, 3) or not all(k >= 1 for k in clusters):
            raise ValueError(f"images of {channels} channels, clusters {clusters}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{folder}: expected the options.json of a run, found none that can be read") from error
    found: dict[str, Any] = {}
    state: dict[str, Any] = {}
    if checkpoint is None and (folder / "network.pt").exists():
        found = _read_tensors(folder / "network.pt")
        state = {
            f"{part}.{key}": value
            for part in ("backbone", "projection", "heads", "rotation")
            for key, value in dict(found.get(part) or {}).items()
        }
    else:
        saved = (
            load_checkpoint(folder / "checkpoints", tidy=False) if checkpoint is None else read_checkpoint(checkpoint)
        )
        if saved is None:
            raise CheckpointError(f"{folder}: expected network.pt or a checkpoint, found neither; finish the run first")
        state = saved.get("network", {})
        found = {"labels": saved.get("state", {}).get("labels")}
    size = int(trained.size)
    network = _run_network(folder, name, model, channels, size, clusters, options, state, width)
    size = image_size or size
    plain = plain_view(size, small, mean=trained.mean, std=trained.std)
    # Probes see what the training saw of crops and flips, without the colours' jitter.
    probe = Augment.resized_crop(
        size,
        scale=trained.scale if small else (0.08, 1.0),
        flip_probability=trained.flip_probability,
        mean=trained.mean,
        std=trained.std,
    )

    reading = {name: options[name] for name in _READING if name in options}

    def prepare(source: Source) -> Prepared:
        if width:
            _check_width(source, width)
        else:
            _check_channels(source, channels, network)
        return Prepared(network, plain, probe, reading={} if width else reading)

    labels, names, kept_only = _stored_labels(folder, found)
    potentials = found.get("potentials")
    return Subject(
        name=str(checkpoint or folder),
        kind="run",
        model=name,
        prepare=prepare,
        options=options,
        labels=labels,
        label_names=names,
        kept_only=kept_only,
        potentials=None if potentials is None else [one.double().numpy() for one in potentials],
        lam=float(found.get("lam", options.get("lam", 25.0))),
        head=None if "head" not in found else int(found["head"]),
        precision=str(options.get("precision", "float32")),
        history=_history(folder, len(clusters)),
    )


def _run_network(
    folder: Path,
    name: str,
    model: Any,
    channels: int,
    size: int,
    clusters: list[int],
    options: dict[str, Any],
    state: dict[str, Any],
    width: int = 0,
) -> Network:
    """The network of a run, for images of `size` pixels, or for vectors of `width` numbers."""
    try:
        asked = name if model is None else model
        if width:
            backbone = build_vector_backbone(asked, torch.zeros(width), torch.ones(width))
        else:
            backbone = build_backbone(asked, channels=channels, image_size=(size, size))
    except OptionError as error:
        if model is not None:
            raise
        raise CheckpointError(
            f"{folder}: expected a network known by name, found {name!r}; pass the module that was trained as model"
        ) from error
    with torch.device("meta"):  # the options may claim any number of clusters; the weights are what is there
        network = Network(
            backbone.module,
            backbone.feature_dim,
            clusters,
            projection=options["projection"],
            head_kind=options["head_kind"],
            temperature=float(options["temperature"]),
            channels_in=backbone.channels_in,
            rotation=any(key.startswith("rotation.") for key in state),
        )
    try:
        problems = differences(network.state_dict(), state)
        if problems:
            raise CheckpointError(f"{folder}: the weights do not fit {name}: {'; '.join(problems)}")
        for part in ("projection", "heads", "rotation"):
            made = getattr(network, part)
            if made is not None:
                head = f"{part}."
                copy_into(made, {key.removeprefix(head): one for key, one in state.items() if key.startswith(head)})
        network.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: the weights do not fit {name}: {first}") from error
    return network.eval()


def _stored_labels(folder: Path, found: dict[str, Any]) -> tuple[NDArray[np.int32] | None, list[str] | None, bool]:
    """Labels, names of their images, and whether they are those of the training images alone."""
    if isinstance(found.get("labels"), torch.Tensor):
        return found["labels"].to(torch.int32).numpy(), None, True
    path = folder / "labels.npz"
    if not path.exists():
        return None, None, False
    try:
        saved = read_arrays(path, ["labels", "names"], "labels [heads, N] and names")
        names = [str(name) for name in saved["names"]] if "names" in saved else None
        return saved["labels"].astype(np.int32), names, False
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected labels [heads, N] and names: {error}") from error


def _history(folder: Path, heads: int) -> list[list[float]]:
    """NMI between successive label sets, of every head, as far as metrics.jsonl has them."""
    found: list[list[float]] = [[] for _ in range(heads)]
    try:
        events = read_metrics(folder / "metrics.jsonl").of("label_pass")
    except DataError:
        return []
    for event in events:
        for record in event.get("heads", ()):
            if record.get("nmi_previous") is not None and record["head"] < heads:
                found[record["head"]].append(float(record["nmi_previous"]))
    return found if any(found) else []


def _of_released(path: Path, image_size: int | None) -> Subject:
    """Weights that `sela_ext.load_released` reads."""
    network, labels = load_released(path)
    size = image_size or _SIDE
    name = network.name or type(network.backbone).__name__
    view, probe = Augment.eval(size), Augment.resized_crop(size)

    def prepare(source: Source) -> Prepared:
        _check_channels(source, network.channels_in, network)
        return Prepared(network, view, probe)

    stored = None if labels is None else np.atleast_2d(torch.as_tensor(labels).numpy()).astype(np.int32)
    return Subject(name=str(path), kind="released", model=name, prepare=prepare, labels=stored)


def _of_torchvision(
    text: str, name: str, weights: str, image_size: int | None, download: bool, say: Callable[[str], None]
) -> Subject:
    """Weights under torchvision's names: one of its own sets, or a file."""
    import torchvision.models

    backbone = build_backbone(name, channels=3, image_size=(image_size or _SIDE, image_size or _SIDE))
    view = Augment.eval(image_size or _SIDE)
    file = Path(weights).expanduser()
    if file.is_file():
        state = _read_tensors(file)
        state = state.get("state_dict", state)
    else:
        try:
            chosen = torchvision.models.get_model_weights(name)[weights]
        except (KeyError, ValueError) as error:
            raise OptionError(
                f"{text}: expected a file of weights or one of torchvision's sets for {name}, found neither under "
                f"{weights!r}"
            ) from error
        file = Path(torch.hub.get_dir()) / "checkpoints" / chosen.url.rsplit("/", 1)[-1]
        if not file.is_file():
            if not download:
                raise ResourceError(
                    f"{text}: expected the weights in {file}, found none; put {chosen.url} there, or allow the "
                    "download (--download, or download=True)"
                )
            say(f"fetching {chosen.url}")
            _fetch(text, chosen.url, file)
        state = _read_tensors(file)
        shown = chosen.transforms()
        size = image_size or int(shown.crop_size[0])
        view = Augment.eval(
            size,
            resize=max(size, round(int(shown.resize_size[0]) * size / int(shown.crop_size[0]))),
            mean=tuple(shown.mean),
            std=tuple(shown.std),
        )
    _load_torchvision(text, backbone.module, state)
    network = Network(backbone.module, backbone.feature_dim, [], channels_in=3).eval()
    probe = Augment.resized_crop(view.size, mean=view.mean, std=view.std)
    return Subject(name=text, kind="torchvision", model=name, prepare=lambda source: Prepared(network, view, probe))


def _fetch(text: str, url: str, file: Path) -> None:
    """Download weights; the name of torchvision's files ends with the first digits of their checksum."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:  # no network, no room; another checksum
        raise ResourceError(f"{text}: {url} could not be fetched: {error}; put the file in {file.parent}") from error


def _load_torchvision(text: str, module: nn.Module, state: dict[str, Any]) -> None:
    """Load a state dict into a network whose classifier was removed."""
    wanted = module.state_dict()
    try:
        tensors = {str(key).removeprefix("module."): value for key, value in state.items()}
        fitting = {key: value for key, value in tensors.items() if key in wanted}
        absent = [key for key in wanted if key not in fitting and not key.endswith("num_batches_tracked")]
        if absent:
            raise CheckpointError(
                f"{text}: the weights do not fit: {len(absent)} tensors are not there, first {absent[0]}"
            )
        module.load_state_dict(fitting, strict=False)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{text}: the weights do not fit: {' '.join(str(error).split())[:200]}") from error


def _of_random(text: str, name: str, image_size: int | None, seed: int) -> Subject:
    """A network with the weights it is built with, for images of any kind."""

    def prepare(source: Source) -> Prepared:
        small, size = _side(source, name, image_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            backbone = build_backbone(name, channels=source.channels, image_size=(size, size))
        network = Network(backbone.module, backbone.feature_dim, [], channels_in=backbone.channels_in).eval()
        return Prepared(network, plain_view(size, small), _probe_view(size, small, source), untrained=True)

    return Subject(name=text, kind="random", model=name, prepare=prepare)


def _of_module(module: nn.Module, image_size: int | None) -> Subject:
    """A module of the user's, as it is, or a `Network` with heads."""

    def prepare(source: Source) -> Prepared:
        small, size = _side(source, "", image_size)
        if isinstance(module, Network):
            network = module
        else:
            backbone = build_backbone(module, channels=source.channels, image_size=(size, size))
            network = Network(backbone.module, backbone.feature_dim, [], channels_in=backbone.channels_in)
        return Prepared(network.eval(), plain_view(size, small), _probe_view(size, small, source))

    name = type(module.backbone if isinstance(module, Network) else module).__name__
    return Subject(name=name, kind="module", model=name, prepare=prepare)


def _of_pixels(image_size: int | None) -> Subject:
    """No network: the values of the pixels."""

    def prepare(source: Source) -> Prepared:
        _, size = _side(source, "", image_size or 32)
        network = Network(nn.Flatten(), source.channels * size * size, [], channels_in=source.channels).eval()
        view = Augment.none(size, mean=(0.5,), std=(0.5,))
        return Prepared(network, view, view)

    return Subject(name=PIXELS, kind=PIXELS, model=PIXELS, prepare=prepare)


def _side(source: Source, name: str, image_size: int | None) -> tuple[bool, int]:
    """Whether images are small, and the side at which they are looked at: what training chooses on a GPU."""
    _check_images(source)
    found = probe_image_size(source)
    small = max(found) < SMALL_IMAGES and not name.startswith("alexnet")
    if image_size is not None:
        return small, image_size
    return small, max(32, -(-max(found) // 8) * 8) if small else _SIDE


def _check_images(source: Source) -> None:
    if source.vectors is not None:
        raise DataError(f"data: expected images, as the network takes, found {source.describe()}")


def _probe_view(size: int, small: bool, source: Source) -> Augment:
    mirrored = 0.0 if source.kind == "digits" else 0.5
    return Augment.resized_crop(size, scale=(0.2, 1.0) if small else (0.08, 1.0), flip_probability=mirrored)


def _check_channels(source: Source, channels: int, network: Network) -> None:
    _check_images(source)
    if source.channels != channels and not (source.channels == 1 and network.channels_in == 3):
        raise DataError(
            f"data: expected images of {channels} channels as the network takes, found {source.channels}; convert them"
        )


def _check_width(source: Source, width: int) -> None:
    if source.vectors is None or source.vectors.width != width:
        raise DataError(f"data: expected vectors of {width} numbers, as in training, found {source.describe()}")


def _read_tensors(path: Path) -> dict[str, Any]:
    """A file of tensors and plain values, none of them larger than the file."""
    content = read_archive(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping of names to tensors, found {type(content).__name__}")
    return content
