"""The label step of methods that cluster: features of all images in, k-means labels of every head out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sela_ext.errors import DataError, NumericsError
from sela_ext.models import Heads
from sela_ext.training import faults
from sela_ext.training.clustering import Clustering, Whitening, kmeans, match_clusters, unit_rows
from sela_ext.training.labelling import LabelPass, head_record
from sela_ext.training.run import Run
from sela_ext.training.vector_embeddings import is_on_demand

# K-means has settled when an iteration lowers the mean squared distance by less than this part.
_SETTLED = 1e-2
# Of features with few dimensions only one in so many is whitened. DeepCluster keeps 256 of 4,096. On digits, whose
# network has 128, 32 gave an NMI of .83 after 30 epochs, all 128 .52, and none, unwhitened, .59.
_LEFT_OUT = 4
# Rows whose logits are computed at once: 160 MB of float32 at 10,000 clusters.
_ROWS = 4096


def whitened_dimensions(run: Run, width: int) -> int:
    """Dimensions that features are whitened to: `pca`; where nobody asked for it, at most a quarter of all.

    Args:
        run: the run; the reason is noted in its plan.
        width: dimensions of the features.
    """
    asked = run.options.pca
    if "pca" in run.plan.given or asked * _LEFT_OUT <= width or not asked:
        return asked
    few = max(1, width // _LEFT_OUT)
    run.plan.reasons["pca"] = (
        f"{few} of {asked}: a quarter of the {width} dimensions; the last ones are noise, which whitening would amplify"
    )
    return few


@torch.no_grad()
def usable_rows(features: Tensor, valid: Tensor) -> tuple[Tensor, int]:
    """Which rows of features [N, D] can be clustered, bool [N]: those of `valid` that are finite; and how many cannot.

    Raises:
        NumericsError: none is finite.
    """
    if is_on_demand(features):  # vectors as they were given, which were looked at when they were opened
        return valid, 0
    finite = [torch.isfinite(features[start : start + _ROWS]).all(1) for start in range(0, len(features), _ROWS)]
    found = valid & torch.cat(finite) if finite else valid
    masked = int(valid.sum()) - int(found.sum())
    if masked and not bool(found.any()):
        raise NumericsError(
            f"label pass: all {masked:,} rows of features hold NaN or infinity; lower lr, or use precision float32"
        )
    return found, masked


@torch.no_grad()
def points_of(features: Tensor, valid: Tensor, pca: int, threads: int) -> Tensor:
    """What k-means sees of features [N, D]: whitened to `pca` dimensions (0: as they are), then of length one.

    Returns:
        float32 [M, P], of the M features that are valid, bool [N]. P <= pca: fewer where there are fewer dimensions,
        or the rank is lower.
    """
    if not bool(valid.all()):  # thousands of dimensions of a million images: no copy without need
        features = features[valid]
    points = Whitening.fit(features, pca, threads=threads)(features, threads=threads) if pca else features.float()
    return unit_rows(points.clone() if points is features else points)


@torch.no_grad()
def cluster_pass(
    heads: Heads,
    points: Tensor,
    embeddings: Tensor,
    valid: Tensor,
    previous: NDArray[np.int32],
    *,
    which: Iterable[int] | None = None,
    iterations: int,
    seed: int,
    stream: int,
    threads: int,
    truth: NDArray[np.int64] | None = None,
    masked: int = 0,
) -> LabelPass:
    """Label the images of every head by k-means of its own: its own K, and its own random start.

    Clusters get the numbers under which as many images as possible keep their label, see `match_clusters`.

    Args:
        heads: the heads; they tell how probable the network finds the labels.
        points: what is clustered, float32 [M, P], of the M valid images; see `points_of`.
        embeddings: what the heads see, [N, E].
        valid: bool [N]; the other images get label -1.
        previous: labels before this pass, int32 [heads, N]; heads that are not labelled keep them.
        which: heads to label; None = all.
        iterations: of k-means.
        seed: of the run.
        stream: number of the pass; with head and seed it determines where k-means starts.
        threads: of the processor.
        truth: true labels int64 [N], only for the records.
        masked: images that are not valid since their features are not finite; for the record, see `usable_rows`.

    Returns:
        Labels; the potentials are 0, so that new images get the label that the network finds most likely.

    Raises:
        DataError: features that are not finite.

    Source: SeLa paper, section 4 (k-means in place of Sinkhorn); DeepCluster, section 3.3.
    """
    begin = time.perf_counter()
    rows = valid.nonzero()[:, 0]
    places = rows.cpu().numpy()
    labels, confidence = previous.copy(), np.zeros(previous.shape, np.float32)
    records: list[dict[str, Any]] = []
    potentials: dict[int, NDArray[np.float64]] = {}
    complaints: list[str] = []
    for head in range(len(heads.clusters)) if which is None else which:
        k = heads.clusters[head]
        faults.at("inside label pass")
        try:
            found = kmeans(
                points, k, iterations=iterations, seed=seed, stream=stream * 1009 + head, threads=max(1, threads)
            )
        except DataError as error:
            raise DataError(f"{error}; the network's features have become infinite: lower lr") from error
        new = np.full(len(valid), -1, np.int32)
        new[places] = match_clusters(previous[head, places], found.labels, k)
        log_p = _log_probability(heads, head, embeddings, rows, torch.from_numpy(new[places]))
        confidence[head, places] = log_p.exp().cpu().numpy()
        cross_entropy = float(-log_p.double().mean())
        records.append(head_record(head, k, _solver(found), previous[head], new, cross_entropy, truth))
        if records[-1]["used"] < k:
            complaints.append(
                f"head {head}: {k - records[-1]['used']} of {k} clusters are empty: there are no more distinct features"
            )
        labels[head] = new
        potentials[head] = np.zeros(k)
    return LabelPass(labels, confidence, potentials, records, masked, time.perf_counter() - begin, complaints)


def label_by_clusters(
    run: Run, heads: Heads, points: Tensor, embeddings: Tensor, valid: Tensor, which: list[int] | None, masked: int
) -> LabelPass:
    """The label pass of a run: `cluster_pass` with the run's labels, options and random numbers.

    Args:
        run: the run.
        heads: of its network, or of the average of it.
        points: what is clustered, float32 [M, P]; see `points_of`.
        embeddings: what the heads see, [N, E].
        valid: bool [N].
        which: heads to label; None = all.
        masked: images that are not valid because their features are not finite.
    """
    options = run.options
    return cluster_pass(
        heads,
        points,
        embeddings,
        valid,
        run.labels,
        which=which,
        iterations=options.kmeans_iterations,
        seed=options.seed,
        stream=run.state["passes_made"],
        threads=options.threads,
        truth=run.truth,
        masked=masked,
    )


def _solver(found: Clustering) -> dict[str, Any]:
    """How k-means went, in the words of `head_record`."""
    return {
        "method": "kmeans",
        "backend": found.backend,
        "error": found.gain,
        "converged": found.gain <= _SETTLED,
        "passes": float(len(found.objective)),
        "repaired": found.repaired,
    }


def _log_probability(heads: Heads, head: int, embeddings: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Log of what a head gives each label, float32 [M]; of the embeddings in these rows, int64 [M]."""
    target = labels.to(embeddings.device, torch.int64)[:, None]
    parts = [
        F.log_softmax(heads.logits_of(head, embeddings[rows[start : start + _ROWS]]), 1).gather(
            1, target[start : start + _ROWS]
        )[:, 0]
        for start in range(0, len(rows), _ROWS)
    ]
    return torch.cat(parts)
