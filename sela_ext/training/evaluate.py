"""What a run says about itself: final labels by a pass in eval mode, and metrics where true labels exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from sela_ext.data import Augment, Source
from sela_ext.evaluation import cluster_metrics, linear_probe, weighted_knn
from sela_ext.models import Network
from sela_ext.training.embedding import Arithmetic, Embedded, embed
from sela_ext.training.labelling import choose_head, label_pass
from sela_ext.training.options import Options

# The final labels are solved at least this tightly, whatever the passes of the training used.
_FINAL_TOL = 1e-3


@dataclass(frozen=True)
class Evaluation:
    """The state of a network in numbers.

    Attributes:
        labels: of the training images, int32 [heads, N].
        confidence: the network's probability of each, float32 [heads, N].
        potentials: log beta of every head, float64 [K].
        heads: a record per head: cross_entropy, sizes, solver status, and metrics where true labels exist.
        head: the head of lowest cross-entropy.
        metrics: of that head, and of the features: knn, linear.
        eval_labels: labels of the evaluation images, int32 [heads, M], by network and potentials; None without them.
        eval_confidence: float32 [heads, M].
        bad: (index, name, reason) of training images that could not be read.
    """

    labels: NDArray[np.int32]
    confidence: NDArray[np.float32]
    potentials: dict[int, NDArray[np.float64]]
    heads: list[dict[str, Any]]
    head: int
    metrics: dict[str, float]
    eval_labels: NDArray[np.int32] | None
    eval_confidence: NDArray[np.float32] | None
    bad: list[tuple[int, str, str]]


def evaluate_network(
    network: Network,
    source: Source,
    eval_source: Source | None,
    plain: Augment,
    arithmetic: Arithmetic,
    *,
    previous: NDArray[np.int32],
    options: Options,
) -> Evaluation:
    """Label all images in eval mode without augmentation, and measure labels and features.

    kNN and linear probe use the features of the backbone: training images vote, evaluation images are judged; without
    evaluation images kNN leaves each image out in turn and there is no linear probe.

    Args:
        network: the network.
        source: the training images, N of them.
        eval_source: labelled images that were not trained on, or None.
        plain: how images are looked at.
        arithmetic: device and precision.
        previous: labels so far, int32 [heads, N].
        options: of the run.

    Source: protocols of the SeLa paper, section 4 and appendix.
    """

    def look(images: Source) -> Embedded:
        return embed(
            network,
            images,
            plain,
            arithmetic,
            threads=options.threads,
            on_bad_image=options.on_bad_image,
            max_bad_fraction=options.max_bad_fraction,
        )

    seen = look(source)
    result = label_pass(
        network.heads,
        seen.embeddings,
        seen.valid,
        previous,
        lam=options.lam,
        tol=min(options.label_tol, _FINAL_TOL),
        method=options.label_method,
        max_passes=options.label_max_passes,
        marginals=options.marginals,
        threads=options.threads,
    )
    truth = source.labels
    if truth is not None:
        for record in result.heads:
            record.update(cluster_metrics(truth, result.labels[record["head"]], record["clusters"]))
    head = choose_head(result.heads)
    metrics = {
        name: float(value)
        for name, value in result.heads[head].items()
        if isinstance(value, (int, float)) and name not in ("head", "changed", "nmi_previous", "converged")
    }
    other = None if eval_source is None else look(eval_source)
    if truth is not None:
        known = torch.from_numpy(truth >= 0) & seen.valid.cpu()
        features, classes = seen.features.cpu()[known], truth[known.numpy()]
        if other is not None and eval_source is not None and eval_source.labels is not None:
            judged = torch.from_numpy(eval_source.labels >= 0) & other.valid.cpu()
            test, test_classes = other.features.cpu()[judged], eval_source.labels[judged.numpy()]
            metrics["knn"] = weighted_knn(features, classes, test, test_classes)
            metrics["linear"] = linear_probe(features, classes, test, test_classes, seed=options.seed)
        elif len(classes) > 1:
            metrics["knn"] = weighted_knn(features, classes, None, None)
    eval_labels = eval_confidence = None
    if other is not None:
        eval_labels, eval_confidence = _label_new(network, other, result.potentials, options.lam)
    return Evaluation(
        result.labels,
        result.confidence,
        result.potentials,
        result.heads,
        head,
        metrics,
        eval_labels,
        eval_confidence,
        seen.bad,
    )


@torch.no_grad()
def _label_new(
    network: Network, seen: Embedded, potentials: dict[int, NDArray[np.float64]], lam: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Label images that were not in the solve: argmax_k (lambda L_k + log beta_k)."""
    labels, confidence = [], []
    for head in range(len(network.heads.clusters)):
        logits = network.heads.logits_of(head, seen.embeddings)
        potential = torch.from_numpy(potentials[head]).to(logits.device)
        label = (lam * logits.double() + potential).argmax(1)
        sure = F.softmax(logits, 1).gather(1, label[:, None])[:, 0]
        labels.append(torch.where(seen.valid, label, -1).to(torch.int32).cpu().numpy())
        confidence.append(torch.where(seen.valid, sure, 0.0).cpu().numpy())
    return np.stack(labels), np.stack(confidence).astype(np.float32)
