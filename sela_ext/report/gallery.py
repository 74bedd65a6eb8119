"""The gallery: a card per cluster with its numbers, its nearest clusters and its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sela_ext.report.confusion import Confusion, Truth
from sela_ext.report.sample import Sample
from sela_ext.report.thumbnails import Place, Sheets

# Colours that classes and clusters take in turn.
COLOURS = 12
# Clusters without a card that are still listed by number and size.
_MOST_LISTED = 20_000


@dataclass(frozen=True)
class Shown:
    """An image of a card.

    Attributes:
        index: its position in the data.
        name: its name, not escaped.
        confidence: in [0, 1], NaN if unknown.
        place: of its thumbnail; None: its name stands for it.
        edge: colour of its true class; None where that is not known.
        truth: name of its true class, "" where that is not known.
    """

    index: int
    name: str
    confidence: float
    place: Place | None
    edge: int | None
    truth: str


@dataclass(frozen=True)
class Card:
    """A cluster: its numbers, and some of its images.

    Attributes:
        number: of the cluster.
        size: images in it.
        confidence: their mean confidence.
        purity, entropy: of the true classes in it; NaN where these are not known.
        main: its most frequent classes as (name, share, colour).
        nearest: clusters like it, nearest first.
        images: some of its images, the most confident first.
    """

    number: int
    size: int
    confidence: float
    purity: float
    entropy: float
    main: list[tuple[str, float, int]]
    nearest: list[int]
    images: list[Shown]


@dataclass(frozen=True)
class Gallery:
    """All cards, and what has none.

    Attributes:
        cards: by mean confidence, highest first.
        others: (number, size, mean confidence) of clusters without a card, empty ones last; cut where they are many.
        left_out: clusters with images but without a card.
        empty: clusters without images.
        nearest_by: how the nearest clusters were found, "" where they are not known.
        classes: (name, colour) of the classes that have a colour of their own; empty where there are more.
    """

    cards: list[Card]
    others: list[tuple[int, int, float]]
    left_out: int
    empty: int
    nearest_by: str
    classes: list[tuple[str, int]]


def make_gallery(
    sample: Sample,
    sheets: Sheets,
    name: Callable[[int], str],
    confidence: npt.NDArray[np.float32],
    truth: Truth | None,
    table: Confusion | None,
    nearest: npt.NDArray[np.int32] | None,
    nearest_by: str,
) -> Gallery:
    """Put cards together.

    Args:
        sample: clusters and images to show.
        sheets: their thumbnails.
        name: index -> the image's name.
        confidence: of every image, [N].
        truth: true labels, where known.
        table: clusters against classes, where true labels are known.
        nearest: clusters like each, [K, some], -1 = none; None where not known.
        nearest_by: how they were found.
    """
    shown = set(sample.clusters.tolist())
    cards = []
    for k, members in zip(sample.clusters.tolist(), sample.members, strict=True):
        images = []
        for index in members.tolist():
            label = -1 if truth is None else int(truth.labels[index])
            images.append(
                Shown(
                    index=index,
                    name=name(index),
                    confidence=float(confidence[index]),
                    place=sheets.places.get(index),
                    edge=label % COLOURS if label >= 0 else None,
                    truth="" if truth is None else truth.name(label),
                )
            )
        main = [] if table is None or truth is None else table.main[k]
        near = [] if nearest is None or k >= len(nearest) else [int(n) for n in nearest[k] if n in shown and n != k]
        cards.append(
            Card(
                number=k,
                size=int(sample.sizes[k]),
                confidence=float(sample.confidence[k]),
                purity=float("nan") if table is None else float(table.purity[k]),
                entropy=float("nan") if table is None else float(table.entropy[k]),
                main=[("" if truth is None else truth.name(c), share, c % COLOURS) for c, share in main],
                nearest=near,
                images=images,
            )
        )
    hidden = [k for k in np.flatnonzero(sample.sizes).tolist() if k not in shown]
    empty = np.flatnonzero(sample.sizes == 0).tolist()
    others = [(k, int(sample.sizes[k]), float(sample.confidence[k])) for k in [*hidden, *empty][:_MOST_LISTED]]
    few = truth is not None and len(truth.names) <= COLOURS
    return Gallery(
        cards=cards,
        others=others,
        left_out=sample.left_out,
        empty=len(empty),
        nearest_by=nearest_by if any(card.nearest for card in cards) else "",
        classes=[(one, c) for c, one in enumerate(truth.names)] if few and truth is not None else [],
    )
