"""What a run on feature vectors does where the user left it open, and how rows are seen in it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from sela_ext.data import VectorSource
from sela_ext.errors import OptionError
from sela_ext.kernels import VectorView
from sela_ext.training.options import AUTO

# Epochs and batch where they are left to the data: small sets take many epochs of few steps, large ones few of many.
_ROWS_SEEN = 200_000
_FEWEST_EPOCHS, _MOST_EPOCHS = 4, 60
_STEPS_PER_EPOCH = 256
_SMALLEST_BATCH, _LARGEST_BATCH = 64, 4096
# Learning rates are meant for this batch, and grow with the root of the batch actually used.
_REFERENCE_BATCH = 256
_LEARNING_RATE = 0.1
WEIGHT_DECAY = 1e-4
_HEADS = 4
_CLUSTERS = 10

# What `train` takes for vectors; `SelfLabelling` has the same defaults.
VECTORS: dict[str, Any] = {
    "model": "identity",
    "precision": "float32",
    "head_kind": "cosine",
    "temperature": 0.1,
    "init": "kmeans",
    "projection": 0,
    "lr_schedule": "cosine",
    "warmup": 0.0,
    "nesterov": True,
    "weight_decay": WEIGHT_DECAY,
    "decay_vectors": True,
    "half_resolution": 0.0,
    "label_source": "eval",
    "label_spacing": "linear",
    "label_tol": 1e-3,
}
_REASONS = {
    "precision": "heads compute in it",
    "epochs": "{rows} vectors",
    "lr": "0.1 at 256 vectors per step, times the root of the batch's share of that",
    "label_source": "the vectors lie there: labels are solved from them",
    "label_passes": "one at the start of every epoch",
}
# What only images have; the values are those that mean nothing was asked.
OF_IMAGES: dict[str, tuple[Any, ...]] = {
    "augment": (AUTO, "none"),
    "image_size": (AUTO,),
    "half_resolution": (AUTO, 0, 0.0),
    "label_augment": ("none",),
    "exact": (False,),
    "exif": (False,),
    "index": ("run", "off"),
    "rotnet": (False,),
    "crops": (None,),
}


def automatic_epochs(rows: int) -> int:
    """Epochs for N rows: what makes 200,000 rows seen, within 4 .. 60."""
    return min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, math.ceil(_ROWS_SEEN / rows)))


def automatic_batch(rows: int) -> int:
    """Rows per step for N rows: the power of two that makes about 256 steps per epoch, within 64 .. 4096."""
    wanted = max(_SMALLEST_BATCH, min(_LARGEST_BATCH, rows // _STEPS_PER_EPOCH))
    return 1 << (wanted.bit_length() - 1)


def scaled_rate(rate: float, batch: int) -> float:
    """Learning rate at this batch, where `rate` is meant for 256 rows."""
    return rate * math.sqrt(batch / _REFERENCE_BATCH)


def settle_vectors(
    values: dict[str, Any], reasons: dict[str, str], given: Collection[str], source: VectorSource, classes: int
) -> None:
    """Fill in what a run on vectors does by itself; what was given stays.

    Args:
        values: of the options; changed in place.
        reasons: why values became what they are; changed in place.
        given: names that the user or the preset set.
        source: the training rows.
        classes: number of true classes, 0 where none are known.

    Raises:
        OptionError: an option that only images have.
    """
    for name, neutral in OF_IMAGES.items():
        if values[name] not in neutral:
            raise OptionError(f"{name}: expected none with feature vectors, found {values[name]!r}; it is for images")
    if values["method"] == "sela-v2":
        raise OptionError(
            "method: expected sela, kmeans or deepcluster with feature vectors, found sela-v2; it is for images"
        )
    if values["label_source"] == "official":
        raise OptionError("label_source: expected eval or bank with feature vectors, found official")
    rows = len(source)
    wanted = dict(VECTORS)
    if values["label_source"] == "bank" and values["model"] in (AUTO, "identity"):
        raise OptionError("label_source: expected eval with the model identity, whose rows never change, found bank")
    if "batch_size" not in given:
        values["batch_size"] = min(automatic_batch(rows), max(16, rows // 4), rows)
        reasons["batch_size"] = f"{rows} vectors"
    wanted["lr"] = scaled_rate(_LEARNING_RATE, min(values["batch_size"], rows))
    if values["budget"] is None:
        wanted["epochs"] = automatic_epochs(rows)
        wanted["label_passes"] = max(2, wanted["epochs"] if values["epochs"] == AUTO else values["epochs"])
    if values["clusters"] == AUTO:
        few = classes if 2 <= classes <= rows else min(_CLUSTERS, rows)
        values["clusters"] = few
        reasons["clusters"] = (
            "as many as there are classes" if few == classes else "no number of classes is known; try several"
        )
    if values["heads"] == AUTO and not isinstance(values["clusters"], list):
        wanted["heads"] = _HEADS
    for name, value in wanted.items():
        if name not in given and values[name] != value:
            values[name] = value
            reasons[name] = _REASONS.get(name, "the recipe for feature vectors").format(rows=rows)
    for name, value in (("augment", "none"), ("image_size", 224)):
        values[name], reasons[name] = value, "not used: the data are vectors"


def view_of(source: VectorSource, kind: str, noise: float, dropout: float, threads: int) -> VectorView:
    """How rows are seen in training: noise and left-out features, in units of what the rows are like.

    Args:
        source: the training rows.
        kind: "one" scale for all columns, or that of each of the "columns".
        noise: deviation of the noise, in these units.
        dropout: share of the features left out.
        threads: of the look at the rows.

    Raises:
        DataError: no row is finite.
        OptionError: more features than a view can have.
    """
    known = source.statistics(threads)
    size = known.deviation if kind == "columns" else np.full(source.width, known.spread, np.float32)
    return VectorView(known.mean, (np.float32(noise) * size).astype(np.float32), float(dropout))


def scale_of(source: VectorSource, kind: str, threads: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What centred rows are multiplied with, float32 [D]: one number, or one per column (1 where flat)."""
    known = source.statistics(threads)
    if kind == "one":
        return np.full(source.width, 1.0 / known.spread, np.float32)
    flat = known.deviation <= 1e-6 * known.spread
    return np.where(flat, np.float32(1), 1 / np.where(flat, np.float32(1), known.deviation)).astype(np.float32)
