"""Distributions of sizes and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sela_ext.doctor.table import Table

_BINS = 24
# Width by height, up to five to one; what lies beyond goes into the last bins.
_RATIOS = (1.1, 1.25, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0)
_ASPECT_EDGES = np.array([*(1 / ratio for ratio in reversed(_RATIOS)), *_RATIOS])

# The shorter side of an image that is extremely small: below so many pixels, or this part of the median.
TINY_PIXELS, TINY_PART = 8, 1 / 8
# The longer side over the shorter one of an extreme shape.
EXTREME_ASPECT = 5.0


def size_facts(table: Table, rows: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Sizes of the images in `rows` (all good, at least one), for the JSON."""
    height, width = table.height[rows].astype(np.int64), table.width[rows].astype(np.int64)
    shorter = np.minimum(height, width)
    aspect = width / height
    return {
        "same": bool((height == height[0]).all() and (width == width[0]).all()),
        "height": _summary(height),
        "width": _summary(width),
        "shorter_side": {**_summary(shorter), "histogram": _histogram(shorter)},
        "aspect": {
            **_summary(np.round(aspect, 4)),
            "histogram": {
                "edges": [round(float(edge), 4) for edge in _ASPECT_EDGES],
                "counts": np.histogram(np.clip(aspect, _ASPECT_EDGES[0], _ASPECT_EDGES[-1]), _ASPECT_EDGES)[0].tolist(),
            },
        },
        "megapixels_mean": round(float((height * width).mean()) / 1e6, 6),
    }


def tiny_rows(table: Table) -> npt.NDArray[np.int64]:
    """Images that are extremely small."""
    shorter = np.minimum(table.height, table.width)
    good = np.flatnonzero(table.good)
    if not len(good):
        return good
    limit = max(TINY_PIXELS, float(np.median(shorter[good])) * TINY_PART)
    return good[shorter[good] < limit]


def extreme_rows(table: Table) -> npt.NDArray[np.int64]:
    """Images of an extreme shape."""
    good = np.flatnonzero(table.good)
    height, width = table.height[good].astype(np.float64), table.width[good].astype(np.float64)
    return good[np.maximum(height, width) >= EXTREME_ASPECT * np.minimum(height, width)]


def _summary(values: npt.NDArray[Any]) -> dict[str, Any]:
    return {"min": values.min().item(), "median": float(np.median(values)), "max": values.max().item()}


def _histogram(values: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Counts in bins of equal width, or equal ratio where values spread widely; whole edges, each bin half open."""
    low, high = int(values.min()), int(values.max()) + 1
    bins = min(_BINS, high - low)
    ends = np.geomspace(low, high, bins + 1) if high > 4 * low else np.linspace(low, high, bins + 1)
    edges = np.unique(np.round(ends).astype(np.int64))
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}
