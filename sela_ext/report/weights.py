"""What the report takes from network.pt: pictures of the first layer's filters, and the prototypes of a head."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sela_ext.errors import SelaError

# Filters that are shown, and the pixels of the picture's longer side.
MOST_FILTERS = 256
_LARGEST_SIDE = 64
_MOST_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class Filters:
    """First-layer filters as one picture.

    Attributes:
        source: a data URI; filters in rows, one pixel per weight and one between filters.
        count, shown: filters that there are, and in the picture.
        height, width: of a filter, in pixels of its input.
        channels: of its input.
        across: filters per row.
        picture_width, picture_height: of the picture, in its own pixels.
    """

    source: str
    count: int
    shown: int
    height: int
    width: int
    channels: int
    across: int
    picture_width: int
    picture_height: int


@dataclass(frozen=True)
class Weights:
    """What was found in the file: filters and prototypes [K, D] of the asked head, each None where there are none."""

    filters: Filters | None = None
    prototypes: npt.NDArray[np.float32] | None = None


def read_weights(path: Path, head: int) -> Weights:
    """Read what the report shows of a network; a file that is not there, or not as training writes it, shows nothing.

    Args:
        path: network.pt; read as tensors and plain values, nothing in it is executed.
        head: whose prototypes.
    """
    if not path.is_file():
        return Weights()
    from sela_ext.compat.archive import read_archive

    try:
        content = read_archive(path)
        first = _first_layer(content.get("backbone"))
        filters = None if first is None else draw_filters(first)
        return Weights(filters, _prototypes(content, head))
    except (SelaError, AttributeError, TypeError, ValueError, KeyError, IndexError, RuntimeError, OSError):
        return Weights()


def draw_filters(weights: npt.NDArray[np.float32]) -> Filters | None:
    """Draw filters: colour where the input has three channels, else grey, channels beside each other.

    Each filter has its own scale: its weight of largest size becomes white or black, zero a middle grey.

    Args:
        weights: [filters, channels, height, width].
    """
    count, channels, height, width = weights.shape
    if not (count and 1 <= channels <= 4 and 1 < height <= _LARGEST_SIDE and 1 < width <= _LARGEST_SIDE):
        return None
    shown = weights[:MOST_FILTERS]
    size = np.abs(np.where(np.isfinite(shown), shown, 0)).max(axis=(1, 2, 3), keepdims=True)
    unit = np.nan_to_num(shown / np.maximum(size, 1e-30), nan=0.0, posinf=1.0, neginf=-1.0)
    pixels = np.clip(np.round(127.5 + 127.5 * unit), 0, 255).astype(np.uint8)
    if channels == 3:
        tiles = pixels.transpose(0, 2, 3, 1)
    else:
        grey = pixels.transpose(0, 2, 1, 3).reshape(len(shown), height, channels * width)
        tiles = np.repeat(grey[..., None], 3, axis=3)
    across = max(1, min(len(shown), round((len(shown) * 2) ** 0.5)))
    down = -(-len(shown) // across)
    sheet = np.zeros((down * (height + 1) - 1, across * (tiles.shape[2] + 1) - 1, 4), np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // across * (height + 1), i % across * (tiles.shape[2] + 1)
        sheet[y : y + height, x : x + tiles.shape[2], :3] = tile
        sheet[y : y + height, x : x + tiles.shape[2], 3] = 255
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, format="PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
    return Filters(source, count, len(shown), height, width, channels, across, sheet.shape[1], sheet.shape[0])


def _first_layer(backbone: Any) -> npt.NDArray[np.float32] | None:
    """The weights of the first convolution that learns."""
    for name, value in backbone.items() if isinstance(backbone, dict) else ():
        if str(name).endswith("weight") and getattr(value, "ndim", 0) == 4 and _is_learned(value):
            found: npt.NDArray[np.float32] = value.float().numpy()
            return found
    return None


def _is_learned(weight: Any) -> bool:
    """Whether these may be filters to look at: several, of some extent. Those that find edges for AlexNet are fixed."""
    return bool(weight.shape[0] >= 8 and min(weight.shape[2:]) > 1 and weight.numel() <= _MOST_WEIGHTS)


def _prototypes(content: Any, head: int) -> npt.NDArray[np.float32] | None:
    """Rows of the heads' weights that belong to one of them."""
    clusters, weight = content.get("clusters"), (content.get("heads") or {}).get("weight")
    if not isinstance(clusters, list) or weight is None or weight.ndim != 2 or not 0 <= head < len(clusters):
        return None
    if len(weight) != sum(int(k) for k in clusters):
        return None
    start = sum(int(k) for k in clusters[:head])
    found: npt.NDArray[np.float32] = weight[start : start + int(clusters[head])].float().numpy()
    return found
