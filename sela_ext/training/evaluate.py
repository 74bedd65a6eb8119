"""What a run says about itself: final labels by a pass in eval mode, and metrics where true labels exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sela_ext.data import Augment, Source
from sela_ext.data.residency import ResidentImages
from sela_ext.evaluation import cluster_metrics, linear_probe, stability, weighted_knn
from sela_ext.kernels import IndexStore
from sela_ext.models import Network
from sela_ext.report.overview import Overview
from sela_ext.training import faults
from sela_ext.training.embedding import Arithmetic, Embedded, embed, to_first
from sela_ext.training.labelling import LabelPass, choose_head, label_pass
from sela_ext.training.options import Options
from sela_ext.training.overview import make_overview
from sela_ext.training.progress import Stage, no_stage
from sela_ext.training.ranks import Ranks
from sela_ext.training.split import Images, has_labels

# Images labelled at once: 260 MB of scores at 1,000 clusters.
_LABEL_ROWS = 16_384
# Neighbours that vote in a run's own kNN figure.
_NEIGHBOURS = 20
# Vectors that vote and teach in a run's own figures: there may be millions, and each would be compared with each.
_PROBED_VECTORS = 50_000
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
        held_labels: labels of the held-out images, int32 [heads, M], by network and potentials; None without them.
        held_confidence: float32 [heads, M].
        bad: (index, name, reason) of training images that could not be read.
        held_bad: the same of held-out images.
        stability: for every number of clusters that several heads have, how far these agree: see
            `sela_ext.evaluation.stability`.
        masked: images that were read and have no label, since the network's output for them is no number; the largest
            number over heads.
        overview: what the report shows beside labels and log; None where it was not asked for.
    """

    labels: NDArray[np.int32]
    confidence: NDArray[np.float32]
    potentials: dict[int, NDArray[np.float64]]
    heads: list[dict[str, Any]]
    head: int
    metrics: dict[str, float]
    held_labels: NDArray[np.int32] | None
    held_confidence: NDArray[np.float32] | None
    bad: list[tuple[int, str, str]]
    held_bad: list[tuple[int, str, str]]
    stability: dict[int, float] = field(default_factory=dict)
    masked: int = 0
    overview: Overview | None = None


def evaluate_network(
    network: Network,
    images: Images,
    plain: Augment,
    arithmetic: Arithmetic,
    *,
    previous: NDArray[np.int32],
    options: Options,
    indexes: Mapping[str, IndexStore | None] | None = None,
    residents: Mapping[str, ResidentImages] | None = None,
    stage: Stage = no_stage,
    label: Callable[[Embedded], LabelPass] | None = None,
    ranks: Ranks | None = None,
    alone: Callable[[Callable[[], Evaluation]], Evaluation] | None = None,
    overview: bool = False,
) -> Evaluation:
    """Label all images in eval mode without augmentation, and measure labels and features.

    kNN and linear probe use the features of the backbone: training images vote, `images.judged` are judged; without
    those kNN leaves each training image out in turn, and there is no linear probe.

    Args:
        network: the network.
        images: training images, N of them, held-out ones and judged ones.
        plain: how images are looked at.
        arithmetic: device and precision.
        previous: labels so far, int32 [heads, N].
        options: of the run.
        indexes: of the loaders of "train", "held" and "judged" images: see `sela_ext.training.embedding.open_index`.
        residents: images on the device, by the same names.
        stage: shows what is going on.
        label: makes the labels of the training images from the pass over them; None: balanced ones.
        ranks: share the passes over images; rank 0 does the rest, with the features of all images. None: one process.
        alone: has rank 0 do something, and tells all what came of it; see `sela_ext.training.run.Run.on_first`.
        overview: make what the report shows too: a map of some images, clusters that are alike.

    Source: protocols of the SeLa paper, section 4 and appendix.
    """
    ranks = ranks or Ranks()

    def look(part: str, source: Source, max_bad_fraction: float) -> Embedded:
        named = {"train": "training", "held": "held-out", "judged": "evaluation"}.get(part, part)
        with stage(f"evaluating {named} images", len(source)) as advance:
            seen = embed(
                network,
                source,
                plain,
                arithmetic,
                keep_features=True,
                batch_size=max(64, min(512, options.batch_size)),
                threads=options.threads,
                on_bad_image=options.on_bad_image,
                max_bad_fraction=max_bad_fraction,
                exact=options.exact,
                exif=options.exif,
                index=(indexes or {}).get(part),
                resident=(residents or {}).get(part),
                advance=advance,
                ranks=ranks,
            )
            faults.at("inside evaluation")
            return to_first(seen, len(source), ranks)

    truth = images.train.labels if has_labels(images.train) else None
    seen = look("train", images.train, options.max_bad_fraction)
    # A few bad images among the held-out ones are no reason to lose the run; they are listed like the others.
    held = None if images.held is None else look("held", images.held, 1.0)
    judged = held if images.judged is images.held else None
    if truth is not None and images.judged is not None and judged is None:
        judged = look("judged", images.judged, 1.0)

    def judge() -> Evaluation:
        result = _balanced(network, seen, previous, options, stage) if label is None else label(seen)
        return _judge(network, images, result, seen, held, judged, truth, options, stage, overview)

    return judge() if alone is None else alone(judge)


def _judge(
    network: Network,
    images: Images,
    result: LabelPass,
    seen: Embedded,
    held: Embedded | None,
    judged: Embedded | None,
    truth: NDArray[np.int64] | None,
    options: Options,
    stage: Stage,
    overview: bool,
) -> Evaluation:
    """Measure labels and features, of images that were looked at."""
    if truth is not None:
        for record in result.heads:
            record.update(cluster_metrics(truth, result.labels[record["head"]], record["clusters"]))
    head = choose_head(result.heads)
    metrics = {
        name: float(value)
        for name, value in result.heads[head].items()
        if isinstance(value, (int, float)) and name not in ("head", "changed", "nmi_previous", "nmi_other", "converged")
    }
    agree = stability(result.labels, network.heads.clusters)
    if network.heads.clusters[head] in agree:
        metrics["stability"] = agree[network.heads.clusters[head]]
    if truth is not None:
        with stage("nearest neighbours and linear probe", 0) as advance:
            advance(0)
            metrics.update(
                _probe(
                    seen,
                    truth,
                    judged,
                    None if images.judged is None else images.judged.labels,
                    options.seed,
                    most=None if images.train.vectors is None else _PROBED_VECTORS,
                )
            )
    held_labels = held_confidence = None
    masked = result.masked
    if held is not None:
        held_labels, held_confidence = label_new(network, held, result.potentials, options.lam)
        masked += int((held_labels < 0)[:, held.valid.cpu().numpy()].sum(1).max())
    shown = None
    if overview:
        with stage("map of the embedding", 0) as advance:
            advance(0)
            shown = make_overview(images, result.labels[head], network.heads.clusters[head], head, seen, held)
    return Evaluation(
        result.labels,
        result.confidence,
        result.potentials,
        result.heads,
        head,
        metrics,
        held_labels,
        held_confidence,
        seen.bad,
        [] if held is None else held.bad,
        agree,
        masked,
        shown,
    )


def _balanced(
    network: Network, seen: Embedded, previous: NDArray[np.int32], options: Options, stage: Stage
) -> LabelPass:
    """Labels by the assignment of the training, solved more tightly."""
    return label_pass(
        network.heads,
        seen.embeddings,
        seen.valid,
        previous,
        lam=options.lam,
        tol=min(options.label_tol, _FINAL_TOL),
        method=options.label_method,
        max_passes=options.label_max_passes,
        marginals=options.marginals,
        relax=options.relax,
        size_bounds=options.size_bounds,
        balance=options.balance,
        threads=options.threads,
        stage=stage,
    )


def _probe(
    seen: Embedded,
    truth: NDArray[np.int64],
    judged: Embedded | None,
    judged_truth: NDArray[np.int64] | None,
    seed: int,
    *,
    most: int | None,
) -> dict[str, float]:
    """KNN and linear probe on the images whose true label is known, `most` of the training images at most."""
    features, classes = known_features(seen, truth, most)
    if judged is not None and judged_truth is not None:
        test, test_classes = known_features(judged, judged_truth)
        if len(classes) and len(test_classes):
            scores = {"knn": weighted_knn(features, classes, test, test_classes, k=_NEIGHBOURS)}
            if np.unique(classes).size > 1:
                scores["linear"] = linear_probe(features, classes, test, test_classes, seed=seed)
            return scores
    return {"knn": weighted_knn(features, classes, None, None, k=_NEIGHBOURS)} if len(classes) > 1 else {}


def known_features(
    seen: Embedded, truth: NDArray[np.int64], most: int | None = None
) -> tuple[Tensor, NDArray[np.int64]]:
    """Features and labels of the images that were read and have a label; evenly spread ones where they are too many.

    Images of which the network makes no numbers are left out. Features stay on their device, where kNN and the linear
    probe then work.
    """
    assert seen.features is not None
    known = torch.from_numpy(truth >= 0) & seen.valid.cpu()
    if most is not None and int(known.sum()) > most:
        places = known.nonzero()[:, 0]
        known[:] = False
        known[places[torch.linspace(0, len(places) - 1, most).long()]] = True
    features, classes = seen.features[known.to(seen.features.device)], truth[known.numpy()]
    finite = torch.isfinite(features).all(1)
    return (features, classes) if bool(finite.all()) else (features[finite], classes[finite.cpu().numpy()])


@torch.no_grad()
def label_new(
    network: Network, seen: Embedded, potentials: Mapping[int, NDArray[np.float64]] | None, lam: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Label images that were not in the solve: argmax_k (lambda L_k + log beta_k), for every head.

    Args:
        network: its heads turn embeddings into logits L.
        seen: M images.
        potentials: log beta of every head, float64 [K]; None: zeros, that is what the network itself predicts.
        lam: lambda of the potentials.

    Returns:
        Labels int32 [heads, M], -1 where an image could not be read or the network's output is no number, and the
        network's probability of each, float32 [heads, M].
    """
    count = len(seen.embeddings)
    labels = np.full((len(network.heads.clusters), count), -1, np.int32)
    confidence = np.zeros(labels.shape, np.float32)
    for head in range(len(network.heads.clusters)):
        for start in range(0, count, _LABEL_ROWS):
            rows = slice(start, start + _LABEL_ROWS)
            logits = network.heads.logits_of(head, seen.embeddings[rows])
            score = lam * logits.double()
            if potentials is not None:
                score += torch.from_numpy(potentials[head]).to(logits.device)
            label = score.argmax(1)
            sure = F.softmax(logits, 1).gather(1, label[:, None])[:, 0]
            # As the solver sees them: single -inf are impossible labels.
            valid = seen.valid[rows] & (logits < torch.inf).all(1) & (logits > -torch.inf).any(1)
            labels[head, rows] = torch.where(valid, label, -1).to(torch.int32).cpu().numpy()
            confidence[head, rows] = torch.where(valid, sure, 0.0).cpu().numpy()
    return labels, confidence
