"""What a run leaves for its report beside labels and log: made while it still has the features."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sela_ext.data import Source
from sela_ext.report.overview import Overview, lay_out, map_rows, nearest_clusters
from sela_ext.training.embedding import Embedded
from sela_ext.training.split import Images

# Rows of features that are added up at once: 130 MB at 2,048 numbers.
_ROWS = 16_384


def make_overview(
    images: Images, labels: NDArray[np.int32], clusters: int, head: int, seen: Embedded, held: Embedded | None
) -> Overview:
    """Place some images on a map, and find the clusters that are alike.

    Args:
        images: of the run.
        labels: of the training images by the shown head, [N], -1 = skipped.
        clusters: of that head.
        head: its number.
        seen: training images, with features.
        held: held-out images, with features; None without any.
    """
    index = map_rows(len(images.everything))
    rows, found = [], []
    for part, places in ((seen, images.kept), (held, images.held_rows)):
        if part is None or part.features is None:
            continue
        here = np.searchsorted(places, index)
        there = np.flatnonzero((here < len(places)) & (places[np.minimum(here, len(places) - 1)] == index))
        if there.size:
            usable = part.valid.cpu().numpy()[here[there]]
            chosen = torch.from_numpy(here[there]).to(part.features.device)
            features = part.features[chosen].float().cpu().numpy()
            usable &= np.isfinite(features).all(1)
            rows.append(index[there[usable]])
            found.append(features[usable])
    index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    order = np.argsort(index)
    index = index[order]
    empty = np.zeros((0, 2), np.float32)
    tsne, pca = lay_out(np.concatenate(found)[order]) if len(index) else (empty, empty)
    truth, classes = truth_of(images.everything)
    return Overview(
        index=index,
        tsne=tsne,
        pca=pca,
        head=head,
        neighbours=_neighbours(seen, labels, clusters),
        truth=truth,
        classes=classes,
    )


def truth_of(source: Source) -> tuple[NDArray[np.int32] | None, NDArray[np.str_] | None]:
    """True labels and names of classes, as far as they are known."""
    labels = source.labels
    if labels is None or not (labels >= 0).any():
        return None, None
    names = source.class_names
    return labels.astype(np.int32), None if names is None else np.array([str(name) for name in names], dtype=np.str_)


def _neighbours(seen: Embedded, labels: NDArray[np.int32], clusters: int) -> NDArray[np.int32] | None:
    """Clusters alike in their mean features."""
    if seen.features is None:
        return None
    sums: torch.Tensor | None = None
    counts = torch.zeros(clusters, dtype=torch.float64)
    for start in range(0, len(labels), _ROWS):
        features = seen.features[start : start + _ROWS].double().cpu()
        own = torch.from_numpy(labels[start : start + _ROWS]).long()
        kept = (own >= 0) & torch.isfinite(features).all(1)
        if sums is None:
            sums = torch.zeros((clusters, features.shape[1]), dtype=torch.float64)
        sums.index_add_(0, own[kept], features[kept])
        counts += torch.bincount(own[kept], minlength=clusters)
    if sums is None:
        return None
    means = (sums / counts.clamp(min=1)[:, None]).numpy()
    return nearest_clusters(means, (counts > 0).numpy())
