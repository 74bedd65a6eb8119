"""A look at the clusters: a few of them, with the thumbnails of their most confident images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

ReadImage = Callable[[int], npt.NDArray[np.uint8]]

# Longest side of an embedded thumbnail, in pixels, and of the images that are kept exactly as they are.
THUMBNAIL = 96
_EXACT = 48


@dataclass(frozen=True)
class Thumbnail:
    """An image of a cluster.

    Attributes:
        index: the image's position in the data.
        name: its name, not escaped.
        confidence: in [0, 1], NaN if unknown.
        source: a data URI, "" where the image cannot be shown.
        pixelated: a tiny image, to be enlarged without smoothing.
    """

    index: int
    name: str
    confidence: float
    source: str
    pixelated: bool


@dataclass(frozen=True)
class Cluster:
    """A cluster on the sheet: its number, its size, the mean confidence of all its images, and some of them."""

    number: int
    size: int
    confidence: float
    images: list[Thumbnail]


@dataclass(frozen=True)
class ContactSheet:
    """The clusters shown, and what is not.

    Attributes:
        clusters: by mean confidence, highest first.
        all_clusters: (number, size, mean confidence) of every cluster, empty ones included, in the same order.
        left_out: clusters with images that are not shown.
        empty: clusters without images.
        unreadable: images that should be shown and could not be read.
    """

    clusters: list[Cluster]
    all_clusters: list[tuple[int, int, float]]
    left_out: int
    empty: int
    unreadable: int


def contact_sheet(
    labels: npt.NDArray[np.int32],
    confidence: npt.NDArray[np.float32],
    clusters: int,
    name: Callable[[int], str],
    read_image: ReadImage | None,
    *,
    most_clusters: int = 40,
    most_images: int = 12,
) -> ContactSheet:
    """Choose clusters and images and make the thumbnails.

    Clusters are ordered by the mean confidence of their images. Where there are too many, ranks at even distances
    are taken, so that the sheet shows clear clusters and muddled ones as they occur. Within a cluster the most
    confident images come first; ties go by index.

    Args:
        labels: [N] cluster of each image, -1 = skipped.
        confidence: [N] in [0, 1]; NaN counts as lowest.
        clusters: number of clusters K.
        name: index -> the image's name.
        read_image: index -> uint8 [H, W, C] or [H, W]; None: no images are shown. What it raises is counted.
        most_clusters: clusters on the sheet.
        most_images: images per cluster.
    """
    kept = np.flatnonzero(labels >= 0)
    trust = np.nan_to_num(confidence.astype(np.float64), nan=-1.0)
    order = kept[np.lexsort((kept, -trust[kept], labels[kept]))]
    sizes = np.bincount(labels[kept], minlength=clusters)
    starts = np.cumsum(sizes) - sizes
    means = np.full(clusters, np.nan)
    used = np.flatnonzero(sizes)
    means[used] = np.bincount(labels[kept], weights=confidence[kept], minlength=clusters)[used] / sizes[used]
    ranked = used[np.lexsort((used, -np.nan_to_num(means[used], nan=-1.0)))]
    if ranked.size > most_clusters:
        shown = ranked[np.round(np.linspace(0, ranked.size - 1, most_clusters)).astype(np.int64)]
    else:
        shown = ranked
    result = []
    unreadable = 0
    for number in shown:
        images = []
        for index in order[starts[number] : starts[number] + min(int(sizes[number]), most_images)]:
            source, pixelated = "", False
            if read_image is not None:
                try:
                    source, pixelated = data_uri(read_image(int(index)))
                except Exception:  # one bad image, whatever its reader raises, must not cost the report
                    unreadable += 1
            images.append(Thumbnail(int(index), name(int(index)), float(confidence[index]), source, pixelated))
        result.append(Cluster(int(number), int(sizes[number]), float(means[number]), images))
    every = [(int(k), int(sizes[k]), float(means[k])) for k in (*ranked, *np.flatnonzero(sizes == 0))]
    return ContactSheet(result, every, int(ranked.size - len(result)), int(clusters - used.size), unreadable)


def data_uri(image: npt.NDArray[Any]) -> tuple[str, bool]:
    """Encode an image for embedding: PNG as it is up to 48 pixels, else a JPEG of at most 96 pixels.

    Args:
        image: uint8 [H, W], [H, W, 1] or [H, W, 3].

    Returns:
        The data URI, and whether the image is tiny (to be enlarged without smoothing).

    Raises:
        ValueError: the array is no such image.
    """
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"expected uint8 [H, W, 1 or 3], found {array.dtype} {list(array.shape)}")
    picture = Image.fromarray(np.ascontiguousarray(array))
    exact = max(picture.size) <= _EXACT
    stream = io.BytesIO()
    if exact:
        picture.save(stream, format="PNG", optimize=True)
    else:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, reducing_gap=2.0)
        picture.save(stream, format="JPEG", quality=80)
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}", exact
