"""Linear probes by SGD: on cached features, and on a frozen network's stages with augmented images."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sela_ext.data import Augment, Loader, Source
from sela_ext.errors import DataError, NumericsError, OptionError
from sela_ext.evaluation.crops import CROPS, ten_crops
from sela_ext.evaluation.inputs import feature_tensor, judged_rows, label_array, labelled_rows
from sela_ext.evaluation.linear import topk_accuracy
from sela_ext.evaluation.schedule import ProbeSchedule, named_schedule
from sela_ext.evaluation.stages import Stages, probe_side

Report = Callable[[float, str], None]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Viewing:
    """How probes look at images, and where the network computes.

    Attributes:
        train: augmentation of the training images.
        test: view of the test images.
        device: of the network and the probes.
        dtype: float32, or the autocast type of the frozen network.
        threads: of the loader; 0 = all.
        on_bad_image: "raise" or "skip".
        reading: further options of `Loader` that say how files become pixels; ten crops do without.
    """

    train: Augment
    test: Augment
    device: torch.device = _CPU
    dtype: torch.dtype = torch.float32
    threads: int = 0
    on_bad_image: Literal["raise", "skip"] = "raise"
    reading: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def standard(cls, size: int, **fields: Any) -> Viewing:
        """The paper's: random resized crop and flip for training, the central crop for testing."""
        return cls(Augment.resized_crop(size), Augment.eval(size), **fields)

    def autocast(self) -> torch.autocast:
        """The context of the frozen network's forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)


class Probe(nn.Module):
    """A linear classifier of one stage: adaptive max-pool, batch norm without scale and shift, linear.

    Args:
        shape: of the stage's activations without the batch: (C, H, W), pooled to at most 9,600 values; or (D,), taken
            as they are.
        classes: number of classes.
        normalize: batch norm (per channel) in front of the linear layer.

    Attributes:
        values: what the linear layer sees.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, *, normalize: bool = True) -> None:
        super().__init__()
        self.pool: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.values = int(shape[0])
        if len(shape) == 3:
            side = probe_side(*shape)
            self.pool, self.values = nn.AdaptiveMaxPool2d(side), shape[0] * side * side
        if normalize:
            self.norm = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0], affine=False)
        self.linear = nn.Linear(self.values, classes)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, activations: Tensor) -> Tensor:
        """Map activations [B, ...] to logits [B, classes]."""
        logits: Tensor = self.linear(self.norm(self.pool(activations.float())).flatten(1))
        return logits


class Pooled(nn.Module):
    """A frozen network as a single stage, "pooled": its feature vector.

    Args:
        network: maps images to features [B, D]; it is copied.
    """

    names = ("pooled",)

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Pooled:
        """Stay in eval mode: the network is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [B, C, H, W] to their features."""
        return {"pooled": self.network(images)}


def sgd_scores(
    train_features: Any,
    train_labels: Any,
    test_features: Any,
    test_labels: Any,
    *,
    schedule: str | ProbeSchedule = "resnet",
    epochs: int | None = None,
    normalize: bool = False,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, float]:
    """Train a linear classifier on cached features by SGD, and return its top-1 and top-5 accuracy.

    The paper's probe of pooled features, without augmentation: features are computed once. The order of the images
    follows from seed and epoch alone.

    Args:
        train_features: [N, D] numbers, numpy or torch; the work is done on its device.
        train_labels: [N] integers; images with -1 are left out.
        test_features: [M, D].
        test_labels: [M] integers.
        schedule: see `named_schedule`.
        epochs: stretch the schedule to so many.
        normalize: batch norm without scale and shift in front; the paper has none here.
        seed: of the first weights and the order.
        progress: told the share done and a text.

    Returns:
        top1 and top5, in [0, 1].

    Raises:
        OptionError: unknown schedule.
        DataError: shapes do not fit together, or no labelled image.
        NumericsError: a feature or the loss is NaN or infinite.

    Example:
        >>> features = [[0.0], [0.1], [1.0], [1.1]] * 8
        >>> found = sgd_scores(features, [0, 0, 1, 1] * 8, [[0.2], [0.9]], [0, 1], epochs=60, normalize=True)
        >>> found["top1"]
        1.0

    Source: Asano et al. 2020, section 4.3 and appendix.
    """
    chosen = named_schedule(schedule, epochs)
    train, classes = labelled_rows(
        feature_tensor(train_features, "train_features"), label_array(train_labels, "train_labels"), "train_features"
    )
    test, expected = judged_rows(test_features, test_labels, train)
    class_numbers, target = np.unique(classes, return_inverse=True)
    goal = torch.from_numpy(target.ravel()).to(train.device)
    with _fresh_weights(seed):
        probe = Probe((int(train.shape[1]),), class_numbers.size, normalize=normalize).to(train.device)
    optimizer = _optimizer(probe.parameters(), chosen)
    count = int(train.shape[0])
    for epoch in range(chosen.epochs):
        _set_rate(optimizer, chosen.rate(epoch))
        order = torch.from_numpy(_order(count, seed, epoch)).to(train.device)
        for start in range(0, count, chosen.batch_size):
            rows = order[start : start + chosen.batch_size]
            if normalize and len(rows) < 2:
                continue  # batch norm cannot normalise a batch of one
            loss = F.cross_entropy(probe(train[rows]), goal[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        _check(loss, chosen, "probe")
        if progress is not None:
            progress((epoch + 1) / chosen.epochs, f"probe, epoch {epoch + 1} of {chosen.epochs}")
    probe.eval()
    with torch.no_grad():
        scores = torch.cat([probe(test[start : start + 4096]) for start in range(0, len(test), 4096)])
    return topk_accuracy(scores, class_numbers, expected)


def stage_scores(
    stages: Stages | Pooled,
    train: Source,
    test: Source,
    viewing: Viewing,
    *,
    schedule: str | ProbeSchedule = "alexnet",
    epochs: int | None = None,
    normalize: bool = True,
    crops: int = 1,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, dict[str, float]]:
    """Train a linear probe on every stage of a frozen network, all together, on augmented images.

    The losses of the probes are added up; since they share nothing that is trained, each learns as it would alone.

    Args:
        stages: `Stages` of a network, or `Pooled` for its feature vector; not changed.
        train: labelled images; those with label -1 are left out.
        test: likewise.
        viewing: augmentation, device, precision.
        schedule: see `named_schedule`.
        epochs: stretch the schedule to so many.
        normalize: batch norm without scale and shift in front of the linear layers.
        crops: 1: the test view; 10: four corners and centre, and mirrored, with logits averaged.
        seed: of first weights, order and augmentation.
        progress: told the share done and a text.

    Returns:
        For each stage: top1, top5, and values, what its linear layer sees.

    Raises:
        OptionError: unknown schedule, or crops other than 1 and 10.
        DataError: no labelled image, or one that cannot be read.
        NumericsError: the loss is not finite.

    Source: Asano et al. 2020, section 4.3 (linear probes), after Zhang et al. 2017.
    """
    chosen = named_schedule(schedule, epochs)
    if crops not in (1, CROPS):
        raise OptionError(f"crops: expected 1 or {CROPS}, found {crops}")
    train, class_numbers, goal = _labelled(train, "training")
    test, _, _ = _labelled(test, "test")
    stages = stages.to(viewing.device)
    with _fresh_weights(seed):
        probes = nn.ModuleDict(
            {
                name: Probe(shape, class_numbers.size, normalize=normalize)
                for name, shape in stage_shapes(stages, viewing.train.size, train.channels, viewing.device).items()
            }
        ).to(viewing.device)
    optimizer = _optimizer(probes.parameters(), chosen)
    loader = Loader(
        train,
        batch_size=min(chosen.batch_size, len(train)),
        augment=viewing.train,
        seed=seed,
        shuffle=True,
        dtype=viewing.dtype,
        channels_last=True,
        threads=viewing.threads or "auto",
        device=viewing.device,
        on_bad_image=viewing.on_bad_image,
        **viewing.reading,
    )
    probes.train()
    for epoch in range(chosen.epochs):
        _set_rate(optimizer, chosen.rate(epoch))
        with contextlib.closing(loader.epoch(epoch)) as batches:
            for batch in batches:
                if len(batch.index) < 2:
                    continue  # batch norm cannot normalise a batch of one
                with viewing.autocast():
                    maps = stages(repeated(batch.images, stages))
                target = goal[batch.index].to(viewing.device)
                loss = sum_losses(probes, maps, target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                _check(loss.detach(), chosen, "probes")
                if progress is not None:
                    done = (epoch + batch.position / len(train)) / chosen.epochs
                    progress(done, f"probes, epoch {epoch + 1} of {chosen.epochs}, loss {float(loss.detach()):.3f}")
    return _judge(stages, probes, test, class_numbers, viewing, crops)


def fine_tune_scores(
    network: nn.Module,
    train: Source,
    test: Source,
    viewing: Viewing,
    *,
    schedule: ProbeSchedule | None = None,
    trunk_factor: float = 0.1,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, float]:
    """Train a copy of the whole network with a new linear head on labelled images: top-1 and top-5 accuracy.

    For learning from few labels. Everything is trained, batch norm included, by SGD on random resized crops and flips.

    Args:
        network: maps images to features [B, D]; not changed.
        train: labelled images.
        test: likewise.
        viewing: augmentation, device, precision.
        schedule: of the head; default 30 epochs at lr .1, /10 at 18 and 24, batch 64.
        trunk_factor: learning rate of the network as a share of the head's.
        seed: of first weights, order and augmentation.
        progress: told the share done and a text.

    Returns:
        top1 and top5, in [0, 1].

    Raises:
        DataError: no labelled image, or one that cannot be read.
        NumericsError: the loss is not finite.

    Source: the fine-tuning protocol for 1% and 10% of the labels (Chen et al. 2020, SimCLR, appendix B.5); the paper
    publishes no schedule of its own.
    """
    chosen = schedule or ProbeSchedule(30, 64, 0.1, 0.1, (18, 24), 0.9, 0.0)
    train, class_numbers, goal = _labelled(train, "training")
    test, _, _ = _labelled(test, "test")
    network = copy.deepcopy(network).to(viewing.device)
    network.requires_grad_(True)
    shape = stage_shapes(Pooled(network), viewing.train.size, train.channels, viewing.device)["pooled"]
    with _fresh_weights(seed):
        head = Probe(shape, class_numbers.size, normalize=False).to(viewing.device)
    optimizer = _optimizer(head.parameters(), chosen)
    optimizer.add_param_group({"params": list(network.parameters())})
    loader = Loader(
        train,
        batch_size=min(chosen.batch_size, len(train)),
        augment=viewing.train,
        seed=seed,
        dtype=viewing.dtype,
        channels_last=True,
        threads=viewing.threads or "auto",
        device=viewing.device,
        on_bad_image=viewing.on_bad_image,
        **viewing.reading,
    )
    # Dropout draws from torch's generator: its state outside stays as it was.
    with _fresh_weights(seed + 1):
        for epoch in range(chosen.epochs):
            _set_rate(optimizer, chosen.rate(epoch))
            optimizer.param_groups[1]["lr"] *= trunk_factor
            network.train()
            with contextlib.closing(loader.epoch(epoch)) as batches:
                for batch in batches:
                    if len(batch.index) < 2:
                        continue  # batch norm cannot normalise a batch of one
                    with viewing.autocast():
                        features = network(repeated(batch.images, network))
                    loss = F.cross_entropy(head(features), goal[batch.index].to(viewing.device))
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    _check(loss.detach(), chosen, "fine-tuning")
            if progress is not None:
                progress((epoch + 1) / chosen.epochs, f"fine-tuning, epoch {epoch + 1} of {chosen.epochs}")
    found = _judge(Pooled(network), nn.ModuleDict({"pooled": head}), test, class_numbers, viewing, 1)["pooled"]
    return {name: found[name] for name in ("top1", "top5")}


def stage_shapes(stages: Stages | Pooled, size: int, channels: int, device: torch.device) -> dict[str, tuple[int, ...]]:
    """Shape of every stage's activations, without the batch, for images of size x size pixels."""
    try:
        found = stages(repeated(torch.zeros(2, channels, size, size, device=device), stages))
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise OptionError(
            f"probes: the network does not take images of {channels} x {size} x {size}: {first}"
        ) from error
    return {name: tuple(int(n) for n in activations.shape[1:]) for name, activations in found.items()}


def repeated(images: Tensor, network: nn.Module) -> Tensor:
    """One-channel images as three equal channels, where the network's first convolution takes three."""
    if images.shape[1] != 1:
        return images
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return images.expand(-1, 3, -1, -1) if first is not None and first.in_channels == 3 else images


def sum_losses(probes: nn.ModuleDict, maps: Mapping[str, Tensor], target: Tensor) -> Tensor:
    """The sum of the probes' mean cross-entropies: a scalar."""
    return torch.stack([F.cross_entropy(probe(maps[name]), target) for name, probe in probes.items()]).sum()


def _judge(
    stages: Stages | Pooled,
    probes: nn.ModuleDict,
    test: Source,
    class_numbers: npt.NDArray[np.int64],
    viewing: Viewing,
    crops: int,
) -> dict[str, dict[str, float]]:
    """Accuracy of every probe; each score is put at the place of its image, in whatever order images come."""
    probes.eval()
    scores = {name: torch.zeros(len(test), class_numbers.size) for name in probes}
    seen = torch.zeros(len(test), dtype=torch.bool)
    with torch.no_grad(), contextlib.closing(_test_views(test, viewing, crops)) as views:
        for images, index in views:
            with viewing.autocast():
                maps = stages(repeated(images, stages))
            for name, probe in probes.items():
                logits = probe(maps[name])
                if crops > 1:
                    logits = logits.view(len(index), crops, -1).mean(dim=1)
                scores[name][index] = logits.cpu()
            seen[index] = True
    if not bool(seen.any()):
        raise DataError(f"none of the {len(test)} test images can be read")
    labels = test.labels
    assert labels is not None
    expected = labels[seen.numpy()]
    return {
        name: {
            **topk_accuracy(scores[name][seen], class_numbers, expected),
            "values": getattr(probe, "values"),  # noqa: B009 - Probe's own; ModuleDict says Module
        }
        for name, probe in probes.items()
    }


def _test_views(test: Source, viewing: Viewing, crops: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Images and their numbers; with several crops an image's follow one another."""
    if crops > 1:
        yield from ten_crops(
            test,
            viewing.test,
            dtype=viewing.dtype,
            device=viewing.device,
            threads=viewing.threads or 1,
            skip_bad=viewing.on_bad_image == "skip",
        )
        return
    loader = Loader(
        test,
        batch_size=min(128, len(test)),
        augment=viewing.test,
        shuffle=False,
        dtype=viewing.dtype,
        channels_last=True,
        threads=viewing.threads or "auto",
        device=viewing.device,
        on_bad_image=viewing.on_bad_image,
        max_bad_fraction=1.0,
        **viewing.reading,
    )
    with contextlib.closing(loader.epoch(0)) as batches:
        for batch in batches:
            yield batch.images, batch.index


def _labelled(source: Source, which: str) -> tuple[Source, npt.NDArray[np.int64], Tensor]:
    """The labelled images, their classes in ascending order, and the number of each image's class: int64 [N]."""
    labels = source.labels
    if labels is None or not (labels >= 0).any():
        raise DataError(f"probes: expected {which} images with labels, found none in {source.describe()}")
    rows = np.flatnonzero(labels >= 0)
    if len(rows) < len(source):
        source = source.subset(rows)
    class_numbers, target = np.unique(labels[rows], return_inverse=True)
    return source, class_numbers, torch.from_numpy(target.ravel())


def _optimizer(parameters: Any, schedule: ProbeSchedule) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, 2**34 + epoch], np.uint64)))
    return generator.permutation(count).astype(np.int64)


def _check(loss: Tensor, schedule: ProbeSchedule, what: str) -> None:
    if not bool(torch.isfinite(loss)):
        raise NumericsError(
            f"{what}: the loss is {float(loss.detach())}; expected a finite one; lower lr (now {schedule.lr:g})"
        )


@contextlib.contextmanager
def _fresh_weights(seed: int) -> Generator[None, None, None]:
    """Draw first weights by a seed of their own; torch's generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        yield
