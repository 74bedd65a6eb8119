"""Which images are trained on, which are held out, and which judge the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sela_ext.data import Source, digits_split, find_eval_source, open_source
from sela_ext.data.imbalance import imbalanced_rows
from sela_ext.errors import DataError, OptionError, shown
from sela_ext.training.fixed_labels import FixedLabels, read_fixed_labels
from sela_ext.training.options import AUTO, Options


@dataclass(frozen=True)
class Images:
    """The images of a run.

    Attributes:
        everything: all that the user gave, in order; N of them are labelled at the end.
        train: those trained on.
        kept: their indices in `everything`, ascending.
        held: the held-out ones, or None; never trained on, labelled by the trained network. Images that fixed labels
            leave out are among them; images that the imbalance study leaves out are nowhere but in `everything`.
        held_rows: their indices in `everything`, ascending.
        judged: labelled images that kNN and linear probe are measured on; None without any.
        reason: where `judged` comes from.
        fixed: labels of everything, where they are given.
    """

    everything: Source
    train: Source
    kept: NDArray[np.int64]
    held: Source | None
    held_rows: NDArray[np.int64]
    judged: Source | None
    reason: str
    fixed: FixedLabels | None = None


def choose_images(data: Any, options: Options) -> Images:
    """Open the data, and divide it.

    Raises:
        DataError: nothing readable, evaluation images of other channels, or fixed labels that do not fit.
        OptionError: `holdout` out of range, or `eval_data` or `imbalance` without labels.
    """
    everything = open_source(data, labels=options.labels, classes=options.classes)
    is_digits = isinstance(data, str) and data == "digits"
    kept, held_rows, reason = _hold_out(everything, options.holdout, is_digits, options.seed)
    apart = len(held_rows) > 0
    fixed = None
    if options.fixed_labels is not None:
        fixed = read_fixed_labels(options.fixed_labels, everything, clusters=options.clusters, heads=options.heads)
        kept, held_rows = _labelled_alone(fixed, kept, held_rows)
    if options.imbalance != "none":
        kept = kept[_imbalanced(everything, kept, options)]
    train = everything if len(kept) == len(everything) else everything.subset(kept)
    held = everything.subset(held_rows) if len(held_rows) else None
    judged = held if apart else None
    if options.eval_data is not None:
        judged, reason = _open_asked(options), "as asked"
        if not has_labels(judged):
            raise OptionError(f"eval_data: expected labelled images, found none with a label in {judged.describe()}")
    elif judged is None:
        judged = find_eval_source(data, classes=options.classes)
        if judged is not None:
            reason = f"{judged.describe()} lies beside the training images"
        elif held is not None:
            judged, reason = held, "the images without a fixed label"
    if judged is not None and not has_labels(judged):
        judged, reason = None, f"{reason}; without labels"
    if judged is not None and _width(judged) != _width(everything):
        raise DataError(
            f"eval_data: expected the kind of the training data, {everything.describe()}; found {judged.describe()}"
        )
    if judged is not None and judged.channels != everything.channels:
        raise DataError(
            f"eval_data: expected images of {everything.channels} channels as in the training data, found "
            f"{judged.channels}; name other images, or convert them"
        )
    return Images(everything, train, kept, held, held_rows, judged, reason, fixed)


def _open_asked(options: Options) -> Source:
    """Open `eval_data`; what is wrong with it is told as its fault, and not the training data's."""
    try:
        return open_source(options.eval_data, classes=options.classes)
    except DataError as error:
        raise DataError(f"eval_data: {str(error).removeprefix('data: ')}") from error


def has_labels(source: Source) -> bool:
    """Whether any true label is known."""
    labels = source.labels
    return labels is not None and bool((labels >= 0).any())


def _labelled_alone(
    fixed: FixedLabels, kept: NDArray[np.int64], held_rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training images without any label join the held-out ones."""
    trained = fixed.trained[kept]
    if not trained.any():
        raise DataError(f"{fixed.where}: expected a label for some of the {len(kept)} training images, found none")
    return kept[trained], np.sort(np.concatenate([held_rows, kept[~trained]]))


def _imbalanced(everything: Source, kept: NDArray[np.int64], options: Options) -> NDArray[np.int64]:
    """Which of the training images stay."""
    labels = everything.labels
    if labels is None or not has_labels(everything):
        raise OptionError(
            f"imbalance: expected labelled images, found none with a label in {everything.describe()}; say labels"
        )
    names = everything.class_names
    classes = max(0 if names is None else len(names), int(labels.max()) + 1)
    return imbalanced_rows(labels[kept], options.imbalance, classes=classes, seed=options.seed)


def _width(source: Source) -> int:
    """Numbers of a feature vector; 0 for images."""
    return 0 if source.vectors is None else source.vectors.width


def _hold_out(
    source: Source, holdout: Any, digits: bool, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Images trained on, images held out, and why."""
    count = len(source)
    if isinstance(holdout, str) and holdout == AUTO:
        if digits:
            return *digits_split(), "360 of the digits are held out, as is usual"
        return np.arange(count), np.arange(0), "nothing is held out"
    fits = isinstance(holdout, (int, float)) and not isinstance(holdout, bool) and 0 <= holdout < count
    if not fits or (holdout > 1 and holdout != int(holdout)):
        raise OptionError(
            f"holdout: expected a share below 1 or a number of images below {count}, found {shown(holdout)}"
        )
    number = round(holdout * count) if isinstance(holdout, float) and holdout < 1 else int(holdout)
    order = np.random.Generator(np.random.Philox(key=np.array([seed, 2**32], np.uint64))).permutation(count)
    return np.sort(order[number:]), np.sort(order[:number]), f"{number} images are held out"
