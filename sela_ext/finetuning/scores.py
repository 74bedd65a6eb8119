"""The scores of PASCAL VOC: average precision, of images and of boxes, and the mean intersection over union."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
# IoU thresholds of COCO's mean AP.
COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).round(2).tolist())


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image.

    Attributes:
        boxes: float [M, 4]: left, top, right, bottom.
        labels: int [M]: class of each.
        scores: float [M], for detections; None for the truth.
        difficult: bool [M], for the truth; None for detections.
    """

    boxes: Floats
    labels: NDArray[np.integer[Any]]
    scores: Floats | None = None
    difficult: NDArray[np.bool_] | None = None


def area_precision(recall: Floats, precision: Floats) -> float:
    """Area under the precision-recall curve, precision made to fall: VOC since 2010.

    Args:
        recall: [M], growing.
        precision: [M].

    Example:
        >>> area_precision(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3]))
        0.8333333333333333
    """
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[0.0], precision, [0.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * precision[1:]))


def eleven_point_precision(recall: Floats, precision: Floats) -> float:
    """Mean over recalls 0, .1, ..., 1 of the best precision at that recall or more: VOC 2007.

    Example:
        >>> round(eleven_point_precision(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3])), 4)
        0.8485
    """
    # A recall that is 0.3 in exact arithmetic counts for 0.3.
    best = [np.max(precision, where=recall >= level - 1e-9, initial=0.0) for level in np.linspace(0, 1, 11)]
    return float(np.mean(best))


def image_precision(scores: Floats, truth: NDArray[np.integer[Any]]) -> tuple[float, float]:
    """Average precision of one class over images: by area and by eleven points.

    Args:
        scores: [N], larger = more certain; images with equal scores are ranked with the wrong ones first.
        truth: [N]: 1 = there, -1 = not there, 0 = hard to tell: left out.

    Returns:
        Both in [0, 1]; NaN where no image has the class.

    Example:
        >>> image_precision(np.array([0.9, 0.8, 0.1]), np.array([1, -1, 1]))
        (0.8333333333333333, 0.8484848484848484)
    """
    counted = truth != 0
    scores, there = np.asarray(scores, np.float64)[counted], truth[counted] > 0
    if not there.any():
        return float("nan"), float("nan")
    order = np.lexsort((there, -scores))
    return _both(there[order], int(there.sum()))


def _both(hit: NDArray[np.bool_], positives: int) -> tuple[float, float]:
    hits = np.cumsum(hit)
    recall, precision = hits / positives, hits / np.arange(1, len(hit) + 1)
    return area_precision(recall, precision), eleven_point_precision(recall, precision)


def overlaps(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Intersection over union of every box of `a` [M, 4] with every box of `b` [L, 4]: float64 [M, L]."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    common = np.prod(np.maximum(sides, 0.0), axis=2)
    area_a, area_b = np.prod(a[:, 2:] - a[:, :2], axis=1), np.prod(b[:, 2:] - b[:, :2], axis=1)
    union = area_a[:, None] + area_b[None] - common
    iou: NDArray[np.float64] = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return iou


def box_precision(
    found: Sequence[Boxes], truth: Sequence[Boxes], label: int, threshold: float = 0.5
) -> tuple[float, float]:
    """Average precision of one class over detections: by area and by eleven points.

    Detections are taken from the surest on. One is right when the true box that it overlaps most, among those of its
    class in its image, is overlapped by at least `threshold` and not yet found; a difficult one counts neither way.

    Args:
        found: detections, image by image.
        truth: true boxes, of the same images.
        label: the class.
        threshold: least intersection over union.

    Returns:
        Both in [0, 1]; NaN where no image has the class.

    Source: the VOC development kit's rules (Everingham et al., IJCV 2010, section 4.2).
    """
    positives = 0
    images, scores, best, where = [], [], [], []
    for i, (some, real) in enumerate(zip(found, truth, strict=True)):
        assert some.scores is not None
        assert real.difficult is not None
        mine, own = some.labels == label, np.flatnonzero(real.labels == label)
        positives += int((~real.difficult[own]).sum())
        iou = overlaps(some.boxes[mine], real.boxes[own])
        images.append(np.full(int(mine.sum()), i))
        scores.append(np.asarray(some.scores, np.float64)[mine])
        best.append(iou.max(1, initial=0.0))
        where.append(own[iou.argmax(1)] if own.size else np.full(int(mine.sum()), -1))
    if positives == 0:
        return float("nan"), float("nan")
    image, score, overlap, box = (np.concatenate(part) for part in (images, scores, best, where))
    taken: set[tuple[int, int]] = set()
    hits = []
    for at in np.argsort(-score, kind="stable"):
        i, target = int(image[at]), int(box[at])
        if overlap[at] < threshold or target < 0:
            hits.append(False)
            continue
        difficult = truth[i].difficult
        if difficult is not None and difficult[target]:
            continue
        hits.append((i, target) not in taken)
        taken.add((i, target))
    return _both(np.array(hits, np.bool_), positives)


def detection_scores(found: Sequence[Boxes], truth: Sequence[Boxes], classes: Sequence[str]) -> dict[str, Any]:
    """Scores of a detector: means over the classes that the true boxes hold.

    Returns:
        ap50: area under the curve at IoU .5 (VOC since 2010); ap50_11point: VOC 2007; ap75; ap: mean over IoU .5 to
        .95 in steps of .05, by area as well, where COCO's tool takes 101 points of the curve; per_class: ap50 by class
        name. All in [0, 1]; NaN where there is no class to judge.
    """
    tables = [[box_precision(found, truth, label, level) for level in COCO_THRESHOLDS] for label in range(len(classes))]
    table = np.array(tables, np.float64).reshape(len(classes), len(COCO_THRESHOLDS), 2)
    return {
        "ap50": mean_known(table[:, 0, 0]),
        "ap50_11point": mean_known(table[:, 0, 1]),
        "ap75": mean_known(table[:, COCO_THRESHOLDS.index(0.75), 0]),
        "ap": mean_known(table[:, :, 0].mean(1)),
        "per_class": {name: float(value) for name, value in zip(classes, table[:, 0, 0], strict=True)},
    }


def mean_known(values: Floats) -> float:
    """Mean of the values that are not NaN; NaN where there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def confusion(found: NDArray[np.integer[Any]], truth: NDArray[np.integer[Any]], classes: int) -> NDArray[np.int64]:
    """Pixels by true and by found class, int64 [classes, classes]; pixels whose true class is 255 are left out."""
    decided = truth != 255
    pairs = truth[decided].astype(np.int64) * classes + found[decided].astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def segmentation_scores(table: NDArray[np.int64]) -> dict[str, Any]:
    """Scores of a segmentation, from pixels by true and by found class.

    Returns:
        miou: mean intersection over union of the classes that occur, in truth or in what was found; pixel_accuracy;
        per_class: intersection over union by class number. All in [0, 1]; NaN where there is nothing to judge.

    Example:
        >>> segmentation_scores(np.array([[3, 1], [0, 4]]))["pixel_accuracy"]
        0.875
    """
    right = np.diagonal(table).astype(np.float64)
    union = table.sum(0) + table.sum(1) - np.diagonal(table)
    iou = np.divide(right, union, out=np.full(len(table), np.nan), where=union > 0)
    total = int(table.sum())
    return {
        "miou": mean_known(iou),
        "pixel_accuracy": float(right.sum() / total) if total else float("nan"),
        "per_class": {str(i): float(value) for i, value in enumerate(iou)},
    }
