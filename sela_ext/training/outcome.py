"""What a run gives back and leaves behind: the result, its network file, its closing lines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sela_ext.data import Source
from sela_ext.models import Network
from sela_ext.training.checkpoint import write_atomically
from sela_ext.training.evaluate import Evaluation
from sela_ext.training.options import Options
from sela_ext.training.resolve import Plan
from sela_ext.training.run_folder import RunFolder
from sela_ext.training.split import Images


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        labels: int32 [heads, N]; -1 = skipped image. N counts held-out images too.
        confidence: the network's probability of each label, float32 [heads, N].
        metrics: of the head chosen without true labels: nmi, ami, ari, accuracy, purity, knn, linear where true labels
            exist; stability (see `sela_ext.evaluation.stability`) where other heads have as many clusters;
            cross_entropy, ln_k, used, size_min, size_max, images_per_second, seconds always.
        stability: for every number of clusters that several heads have, how far these agree: mean adjusted mutual
            information, 1 = the same clusters.
        head: the head chosen: lowest cross-entropy.
        out: the run folder.
        report: the page.
        network: the trained network, in eval mode.
    """

    labels: NDArray[np.int32]
    confidence: NDArray[np.float32]
    metrics: dict[str, float]
    head: int
    out: Path
    report: Path
    network: Network
    stability: dict[int, float] = field(default_factory=dict)


def spread_labels(result: Evaluation, images: Images) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Labels and confidence of trained and held-out images, [heads, N] in the order of the data."""
    shape = len(result.labels), len(images.everything)
    labels, confidence = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    labels[:, images.kept], confidence[:, images.kept] = result.labels, result.confidence
    if result.held_labels is not None and result.held_confidence is not None:
        labels[:, images.held_rows], confidence[:, images.held_rows] = result.held_labels, result.held_confidence
    return labels, confidence


def bad_images(
    in_training: list[tuple[int, str, str]], result: Evaluation, images: Images
) -> list[tuple[int, str, str]]:
    """(index, name, reason) of every image that could not be read, once, in the order of the data."""
    found = {int(images.kept[index]): (name, reason) for index, name, reason in [*in_training, *result.bad]}
    found.update({int(images.held_rows[index]): (name, reason) for index, name, reason in result.held_bad})
    return [(index, *found[index]) for index in sorted(found)]


def save_network(folder: RunFolder, network: Network, opt: Options, result: Evaluation, name: str) -> None:
    """Write network.pt: plain tensors, the backbone under its own names."""
    buffer = io.BytesIO()
    torch.save(
        {
            "model": name,
            "backbone": {key: value.cpu() for key, value in network.backbone.state_dict().items()},
            "projection": {key: value.cpu() for key, value in network.projection.state_dict().items()},
            "heads": {key: value.cpu() for key, value in network.heads.state_dict().items()},
            "rotation": None
            if network.rotation is None
            else {key: value.cpu() for key, value in network.rotation.state_dict().items()},
            "clusters": list(opt.clusters),
            "head_kind": opt.head_kind,
            "temperature": opt.temperature,
            "lam": opt.lam,
            "potentials": [torch.from_numpy(result.potentials[h]) for h in range(len(opt.clusters))],
            "head": result.head,
        },
        buffer,
    )
    write_atomically(folder.path / "network.pt", buffer.getbuffer())


def noun_of(source: Source) -> str:
    """What the data are called: images, or vectors."""
    return "images" if source.vectors is None else "vectors"


def opening_line(plan: Plan, images: Images, network: str) -> str:
    """Say what is about to run: images, network, device, heads, length."""
    opt, held = plan.options, len(images.held_rows)
    held_out = f", {held:,} held out" if held else ""
    noun = noun_of(images.everything)
    length = f"{opt.epochs} epoch{'s' * (opt.epochs > 1)}" if plan.budget_seconds is None else f"{opt.budget}"
    heads = ", ".join(f"{opt.clusters.count(k)} x {k}" for k in dict.fromkeys(opt.clusters))
    return (
        f"{len(images.train):,} {noun}{held_out} ({images.everything.describe()}); {network} on {opt.device} in "
        f"{opt.precision}; heads x clusters: {heads}; {length} of {opt.batch_size} {noun} per step"
    )


def closing_lines(
    result: Evaluation,
    out: Path,
    report: Path,
    state: dict[str, Any],
    per_epoch: int,
    bad: int,
    watched: Sequence[str] = (),
    noun: str = "images",
) -> str:
    """Say what came out: sizes, metrics, what was noticed, and where labels and report are."""
    m = result.metrics
    shown = [
        f"{name} {m[name]:.3f}" for name in ("nmi", "ami", "ari", "accuracy", "purity", "knn", "linear") if name in m
    ]
    lines = [
        f"done: {state['seen'] / per_epoch:.1f} epochs, {state['seconds']:.0f} s, {state['passes_made']} label passes",
        f"head {result.head} (lowest cross-entropy, {m['cross_entropy']:.3f} of ln K {m['ln_k']:.3f}): "
        f"{m['used']:.0f} clusters of {m['size_min']:.0f} to {m['size_max']:.0f} {noun}",
    ]
    if result.stability:
        agree = ", ".join(f"{value:.3f} of K = {k:,}" for k, value in result.stability.items())
        lines.append(f"agreement among heads (adjusted mutual information): {agree}")
    if shown:
        lines.append("against the true labels: " + ", ".join(shown))
    if "agreement" in m:
        lines.append(f"fixed labels that the network predicts: {m['agreement']:.3f}")
    if "rotation_accuracy" in m:
        lines.append(f"rotations told apart: {m['rotation_accuracy']:.3f}")
    lines += watched
    if bad:
        lines.append(f"{bad} {noun} could not be read: see {out / 'bad_images.csv'}")
    lines.append(f"labels  {out / 'labels.csv'}")
    lines.append(f"report  {report}")
    return "\n".join(lines)
