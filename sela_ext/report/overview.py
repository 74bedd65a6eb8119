"""report.npz: what the report shows of a run and the other files of the folder do not hold.

A map of some images in two dimensions, the clusters that lie nearest to each other, and the true labels where they are
known. Training makes it while it still has the features; coordinates instead of features keep it small.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sela_ext.data.npz import read_arrays
from sela_ext.errors import DataError

FILE = "report.npz"
# Images on the map: t-SNE of more takes longer than the rest of a report, and dots that overlap show nothing.
MAP_IMAGES = 800
# Nearest clusters that are kept of each.
NEIGHBOURS = 6
# More clusters than this have no neighbours: all pairs are compared.
_MOST_COMPARED = 1 << 14
MOST_MAPPED = 1 << 14
_NAMES = ("index", "tsne", "pca", "head", "neighbours", "truth", "classes")
_PCA_SIDE = 50
_PERPLEXITY = 30.0
_ITERATIONS = 500


@dataclass(frozen=True)
class Overview:
    """What report.npz holds.

    Attributes:
        index: images on the map, int64 [S], ascending.
        tsne, pca: their places, float32 [S, 2], each axis in [0, 1]; of shape [0, 2] where there is no map.
        head: whose clusters have neighbours.
        neighbours: nearest clusters by their mean features, int32 [K, up to 6], -1 = none; [0, 0] where not known.
        truth: true label of every image, int32 [N], -1 = unknown; None without.
        classes: names of the classes, str [C]; None without.
    """

    index: npt.NDArray[np.int64]
    tsne: npt.NDArray[np.float32]
    pca: npt.NDArray[np.float32]
    head: int = 0
    neighbours: npt.NDArray[np.int32] | None = None
    truth: npt.NDArray[np.int32] | None = None
    classes: npt.NDArray[np.str_] | None = None

    def to_bytes(self) -> bytes:
        """The file."""
        arrays: dict[str, Any] = {"index": self.index, "tsne": self.tsne, "pca": self.pca, "head": np.int64(self.head)}
        for name in ("neighbours", "truth", "classes"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()


def map_rows(count: int, most: int = MAP_IMAGES) -> npt.NDArray[np.int64]:
    """Choose the images of the map: at even distances, all of them where they are few.

    Args:
        count: images, N.
        most: images on the map.

    Example:
        >>> map_rows(10, 4).tolist()
        [0, 3, 6, 9]
    """
    if count <= most:
        return np.arange(count)
    return np.round(np.linspace(0, count - 1, most)).astype(np.int64)


def lay_out(features: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Places in two dimensions by t-SNE and by principal components; the same features give the same places.

    t-SNE works on the 50 leading components, starts from the first two, and has one thread: sums of several threads
    would differ in their last bits, and the map with them.

    Args:
        features: [S, D], finite.

    Returns:
        Two arrays float32 [S, 2], each axis in [0, 1]; where there are fewer than five images both are the components.

    Source: van der Maaten and Hinton 2008; scikit-learn's Barnes-Hut implementation.
    """
    components = _components(np.asarray(features, dtype=np.float64))
    plane = np.zeros((len(components), 2))
    plane[:, : min(2, components.shape[1])] = components[:, :2]
    pca = _to_unit(plane)
    if len(components) < 5 or not components.any():
        return pca, pca
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    scale = max(float(plane[:, 0].std()), 1e-12)
    with threadpool_limits(limits=1):
        placed = TSNE(
            perplexity=min(_PERPLEXITY, (len(components) - 1) / 3),
            init=(plane / scale * 1e-4).astype(np.float32),
            learning_rate="auto",
            max_iter=_ITERATIONS,
            random_state=0,
            n_jobs=1,
        ).fit_transform(components.astype(np.float32))
    return _to_unit(np.nan_to_num(np.asarray(placed, dtype=np.float64))), pca


def _components(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Leading principal components [S, up to 50], each with a sign that does not depend on the solver."""
    centred = features - features.mean(0)
    size = float(np.abs(centred).max()) if centred.size else 0.0
    if size > 0:
        centred = centred / size  # squares of the largest floats are no floats
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(1)])
    kept: npt.NDArray[np.float64] = (left * values * np.where(signs == 0, 1, signs))[:, :_PCA_SIDE]
    return kept


def _to_unit(places: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Move and scale both axes alike, so that the longer one fills [0, 1] and the other lies in its middle."""
    low, high = places.min(0), places.max(0)
    side = max(float((high - low).max()), 1e-12)
    unit: npt.NDArray[np.float32] = np.clip((places - (low + high) / 2) / side + 0.5, 0.0, 1.0).astype(np.float32)
    return unit


def nearest_clusters(
    means: npt.NDArray[np.floating[Any]], used: npt.NDArray[np.bool_], most: int = NEIGHBOURS
) -> npt.NDArray[np.int32]:
    """Find the clusters of the most similar means or prototypes: largest cosine, once the common mean is taken off.

    Args:
        means: [K, D]; rows of clusters that are not used are not looked at.
        used: [K].
        most: how many to find.

    Returns:
        int32 [K, most], nearest first, -1 where there are no more; [0, 0] where there are too many clusters to compare.
    """
    clusters = len(means)
    rows = np.flatnonzero(used & np.isfinite(means).all(1))
    if clusters > _MOST_COMPARED:
        return np.zeros((0, 0), np.int32)
    found = np.full((clusters, most), -1, np.int32)
    if len(rows) < 2:
        return found
    centred = means[rows].astype(np.float32)
    centred -= centred.mean(0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    count = min(most, len(rows) - 1)
    for start in range(0, len(rows), 1024):
        block = slice(start, min(start + 1024, len(rows)))
        likeness = np.round(centred[block] @ centred.T, 5)  # ties go by number, not by the last bit
        likeness[np.arange(block.stop - start), np.arange(start, block.stop)] = -np.inf
        order = np.argsort(-likeness, axis=1, kind="stable")[:, :count]
        found[rows[block], :count] = rows[order]
    return found


def read_overview(path: Path, images: int) -> Overview | None:
    """Read report.npz of a run folder; None where there is none.

    Args:
        path: the file.
        images: number of images, N.

    Raises:
        DataError: the file is there, and damaged or of another run.
    """
    if not path.exists():
        return None
    arrays = read_arrays(path, list(_NAMES), "the map and true labels of a run")
    remedy = "; delete it to have a report without a map, or make another by `sela report --map`"
    if "index" not in arrays or "tsne" not in arrays or "pca" not in arrays:
        raise DataError(f"{path}: expected arrays index, tsne and pca, found {sorted(arrays)}{remedy}")
    index, tsne, pca = arrays["index"], arrays["tsne"], arrays["pca"]
    fits = index.ndim == 1 and index.dtype.kind in "iu" and index.size <= MOST_MAPPED
    if not fits or (index.size and (int(index.min()) < 0 or int(index.max()) >= images)):
        raise DataError(f"{path}: expected numbers of at most {MOST_MAPPED} of {images} images{remedy}")
    for places in (tsne, pca):
        if places.shape != (index.size, 2) or places.dtype.kind != "f" or not _in_unit(places):
            raise DataError(f"{path}: expected places in [0, 1], [{index.size}, 2], found {list(places.shape)}{remedy}")
    neighbours = arrays.get("neighbours")
    if neighbours is not None and (
        neighbours.ndim != 2 or neighbours.dtype.kind not in "iu" or neighbours.shape[1] > 64
    ):
        raise DataError(f"{path}: expected neighbours [K, few], found {list(neighbours.shape)}{remedy}")
    truth, classes = arrays.get("truth"), arrays.get("classes")
    if truth is not None and (truth.shape != (images,) or truth.dtype.kind not in "iu" or int(truth.min()) < -1):
        raise DataError(f"{path}: expected {images} true labels, found {truth.dtype} {list(truth.shape)}{remedy}")
    if classes is not None and (classes.ndim != 1 or classes.dtype.kind != "U"):
        raise DataError(f"{path}: expected names of classes as text, found {classes.dtype}{remedy}")
    head = arrays.get("head", np.int64(0))
    return Overview(
        index=index.astype(np.int64),
        tsne=tsne.astype(np.float32),
        pca=pca.astype(np.float32),
        head=int(head) if head.shape == () and head.dtype.kind in "iu" else -1,
        neighbours=None if neighbours is None else neighbours.astype(np.int32),
        truth=None if truth is None else truth.astype(np.int32),
        classes=classes,
    )


def _in_unit(places: npt.NDArray[Any]) -> bool:
    return bool(((places >= 0) & (places <= 1)).all())
