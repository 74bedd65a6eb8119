"""What pictures that look alike have in common: hashes of a picture and of its crops, and a thumbnail to compare.

Note [Hashes of crops]
    A picture is brought to 64 x 64 grey values. Its hash is the signs of its 64 lowest frequencies (a DCT of 8 x 8
    coefficients against their median): they hardly change when a picture is scaled, compressed again or made lighter,
    but they do when a margin is cut off. So each picture also has the hashes of 18 crops of itself, 95% and 90% of
    each side in nine positions. Of two pictures, one of which was cut out of the other, the hash of the smaller is near
    one of the larger one's. Cropping, averaging and the DCT are linear and act on rows and columns separately: all
    19 hashes come from one pair of matrix products.

Note [Comparison]
    Hashes only propose. Two pictures are near duplicates if the differences between neighbouring values of their
    16 x 16 thumbnails correlate, in the best of some alignments around the crop that the hashes proposed: differences,
    because any two landscapes have a bright upper half, but not the same edges.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from sela_ext.data.source import UInt8Array

GRID = 64
THUMB = 16
_DCT = 32
_FREQUENCIES = 8
CROP_SCALES = (0.95, 0.9)

UInt64Array = npt.NDArray[np.uint64]
FloatArray = npt.NDArray[np.float32]


def grid_of(pixels: UInt8Array) -> UInt8Array:
    """Grey values of a picture on 64 x 64 cells, each the mean over its part of the picture.

    Args:
        pixels: uint8 [H, W, 1 or 3].

    Returns:
        uint8 [64, 64].
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    return np.asarray(picture.convert("L").resize((GRID, GRID), Image.Resampling.BOX, reducing_gap=2.0))


def hashes_of(grids: UInt8Array) -> UInt64Array:
    """Hashes of pictures and of their crops: Note [Hashes of crops].

    Args:
        grids: uint8 [B, 64, 64].

    Returns:
        uint64 [B, 19]: of the whole picture, then of its crops in the order of `CROPS`.
    """
    spectra = _OPERATOR @ grids.astype(np.float32) @ _OPERATOR.T
    parts = len(_SPANS)
    blocks = spectra.reshape(len(grids), parts, _FREQUENCIES, parts, _FREQUENCIES)
    chosen = blocks[:, [row for row, _ in CROPS], :, [column for _, column in CROPS], :]  # [crops, B, 8, 8]
    values = chosen.transpose(1, 0, 2, 3).reshape(len(grids), len(CROPS), _FREQUENCIES * _FREQUENCIES)
    above = values > np.median(values[..., 1:], axis=2, keepdims=True)
    above[..., 0] = False  # the mean says how bright a picture is, not what is on it
    return np.packbits(above, axis=2).view(">u8")[..., 0].astype(np.uint64)


def thumbs_of(grids: UInt8Array) -> UInt8Array:
    """Thumbnails for `similarity`: uint8 [B, 16, 16] of grids [B, 64, 64]."""
    step = GRID // THUMB
    cells = grids.reshape(len(grids), THUMB, step, THUMB, step).astype(np.float32)
    thumbs: UInt8Array = np.round(cells.mean(axis=(2, 4))).astype(np.uint8)
    return thumbs


def rough_similarity(first: UInt8Array, second: UInt8Array, crop: int) -> FloatArray:
    """Similarity of many pairs, for which the hashes propose the same crop, in the middle alignment alone.

    Args:
        first: uint8 [P, 16, 16], the larger ones.
        second: uint8 [P, 16, 16].
        crop: Which crop of the first the second looks like, 0 .. 18; 0 = none.

    Returns:
        float32 [P] in -1 .. 1, at most what `similarity` finds but for rounding.
    """
    rows, columns = (_interpolation(THUMB, *_SPANS[span]) for span in CROPS[crop])
    edges, wanted = _edges(rows @ first.astype(np.float32) @ columns.T), _edges(second.astype(np.float32))
    lengths = np.linalg.norm(edges, axis=1) * np.linalg.norm(wanted, axis=1)
    products: FloatArray = np.einsum("pe,pe->p", edges, wanted) / np.maximum(lengths, 1e-6)
    return products


def similarity(first: UInt8Array, second: UInt8Array, crop: int) -> float:
    """How alike two pictures are, once aligned: Note [Comparison].

    Args:
        first: uint8 [16, 16], the larger of the two.
        second: uint8 [16, 16].
        crop: Which crop of the first the second looks like, 0 .. 18; 0 = none.

    Returns:
        In -1 .. 1; 1 = the same but for brightness and contrast; 0 for a picture without edges.
    """
    rows, columns = (_ALIGNMENTS[span] for span in CROPS[crop])
    aligned = (rows @ first.astype(np.float32))[:, np.newaxis] @ columns.transpose(0, 2, 1)
    edges, wanted = _edges(aligned.reshape(-1, THUMB, THUMB)), _edges(second.astype(np.float32)[np.newaxis])[0]
    lengths = np.linalg.norm(edges, axis=1) * np.linalg.norm(wanted)
    return float(np.max(edges @ wanted / np.maximum(lengths, 1e-6)))


def usual_similarity(thumbs: UInt8Array, most: int = 512) -> float:
    """How alike unrelated pictures of a set are: the 99th percentile over pairs of up to `most` of them, evenly spread.

    About 0.2 for photographs, 0.75 for pictures of clothes on a white ground.

    Args:
        thumbs: uint8 [N, 16, 16], N >= 2.
        most: Pictures looked at.
    """
    rows = np.unique(np.linspace(0, len(thumbs) - 1, min(most, len(thumbs))).astype(np.int64))
    edges = _edges(thumbs[rows].astype(np.float32))
    edges /= np.maximum(np.linalg.norm(edges, axis=1, keepdims=True), 1e-6)
    return float(np.quantile((edges @ edges.T)[np.triu_indices(len(rows), 1)], 0.99))


def _edges(thumbs: FloatArray) -> FloatArray:
    """Differences to the right and downwards, each kind without its mean: float32 [A, 480] of [A, 16, 16]."""
    right = (thumbs[:, :, 1:] - thumbs[:, :, :-1]).reshape(len(thumbs), -1)
    down = (thumbs[:, 1:] - thumbs[:, :-1]).reshape(len(thumbs), -1)
    return np.concatenate([part - part.mean(axis=1, keepdims=True) for part in (right, down)], axis=1)


def _averages(cells: int, low: float, high: float, into: int) -> FloatArray:
    """Matrix [into, cells]: means over equal parts of the span low .. high of the cells."""
    edges = np.linspace(low * cells, high * cells, into + 1)
    start, stop = edges[:-1, np.newaxis], edges[1:, np.newaxis]
    cell = np.arange(cells)
    shared = np.clip(np.minimum(stop, cell + 1) - np.maximum(start, cell), 0, None)
    matrix: FloatArray = (shared / shared.sum(axis=1, keepdims=True)).astype(np.float32)
    return matrix


def _interpolation(cells: int, low: float, high: float) -> FloatArray:
    """Matrix [cells, cells]: linear interpolation of the span low .. high at as many places."""
    at = np.clip((low + (high - low) * (np.arange(cells) + 0.5) / cells) * cells - 0.5, 0, cells - 1)
    weights = np.maximum(0, 1 - np.abs(at[:, np.newaxis] - np.arange(cells)))
    matrix: FloatArray = weights.astype(np.float32)
    return matrix


def _cosines() -> FloatArray:
    """Matrix [8, 32]: the lowest frequencies of the DCT-II, orthonormal."""
    frequency, place = np.arange(_FREQUENCIES)[:, np.newaxis], np.arange(_DCT)
    matrix = np.cos(np.pi * frequency * (2 * place + 1) / (2 * _DCT)) * np.sqrt(2 / _DCT)
    matrix[0] /= np.sqrt(2)
    cosines: FloatArray = matrix.astype(np.float32)
    return cosines


def _spans(scales: tuple[float, ...]) -> list[tuple[float, float]]:
    """The whole side, and for each scale its beginning, its middle and its end."""
    return [(0.0, 1.0), *((low, low + s) for s in scales for low in (0.0, (1 - s) / 2, 1 - s))]


_SPANS = _spans(CROP_SCALES)
_OPERATOR = np.concatenate([_cosines() @ _averages(GRID, low, high, _DCT) for low, high in _SPANS])
# (span of the rows, span of the columns): the whole picture, then nine positions of each scale.
CROPS: list[tuple[int, int]] = [
    (0, 0),
    *((1 + 3 * s + y, 1 + 3 * s + x) for s in range(len(CROP_SCALES)) for y in range(3) for x in range(3)),
]

# Around each span, spans whose ends are up to so far away, in steps of a fortieth of the side.
_STEP, _AROUND = 1 / 40, (-1, 0, 1)


def _nearby(span: tuple[float, float]) -> FloatArray:
    ends = {(max(0.0, span[0] + low * _STEP), min(1.0, span[1] + high * _STEP)) for low in _AROUND for high in _AROUND}
    return np.stack([_interpolation(THUMB, low, high) for low, high in sorted(ends)])


_ALIGNMENTS = [_nearby(span) for span in _SPANS]
