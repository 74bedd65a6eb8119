"""The map of the embedding as a page holds it: places of images, and what to say when one is pointed at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from sela_ext.report.confusion import Truth
from sela_ext.report.overview import Overview
from sela_ext.report.thumbnails import Sheets

# Places are whole numbers 0 .. _GRID: finer than a screen.
GRID = 1000


def map_data(
    overview: Overview | None,
    labels: npt.NDArray[np.int32],
    name: Callable[[int], str],
    sheets: Sheets,
    truth: Truth | None,
) -> dict[str, Any] | None:
    """Points of the map for the page's script; None where there is no map.

    Args:
        overview: places of images.
        labels: cluster of each image, [N], -1 = skipped.
        name: index -> the image's name.
        sheets: thumbnails.
        truth: true labels, where known.

    Returns:
        layouts: name -> [x, y] per point; thumbnails: [sheet, column, row] per point, or null; cluster, truth: numbers
        per point (truth absent where not known); classes: name of every class that occurs; names: of the images.
    """
    if overview is None or overview.index.size < 3:
        return None
    rows = overview.index
    layouts = {
        title: np.round(places * GRID).astype(int).tolist()
        for title, places in (("t-SNE", overview.tsne), ("Principal components", overview.pca))
    }
    if np.array_equal(overview.tsne, overview.pca):
        del layouts["t-SNE"]
    places = [sheets.places.get(int(i)) for i in rows]
    found: dict[str, Any] = {
        "grid": GRID,
        "layouts": layouts,
        "thumbnails": [None if place is None else [place.sheet, place.x, place.y] for place in places],
        "cluster": labels[rows].tolist(),
        "names": [name(int(i)) for i in rows],
    }
    if truth is not None:
        found["truth"] = truth.labels[rows].tolist()
        found["classes"] = {int(c): truth.name(int(c)) for c in np.unique(truth.labels[rows]) if c >= 0}
    return found
