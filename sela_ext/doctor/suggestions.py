"""What to train with: the choices that `sela train` would make, and what follows from the findings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from sela_ext.data import Source, digits_split
from sela_ext.errors import SelaError
from sela_ext.training.options import make_options
from sela_ext.training.resolve import Plan, resolve

# From so many files on, one large file per thousand of them is kinder to disks than the files themselves.
PACK_FROM = 10_000
_SHOWN = ("model", "image_size", "augment", "batch_size", "epochs")


@dataclass(frozen=True)
class Suggestion:
    """An option, the value to give it, and why.

    Attributes:
        option: of `sela train`; "pack" for `sela pack`.
        value: JSON-able.
        reason: in words.
    """

    option: str
    value: Any
    reason: str


def training_plan(data: Any, source: Source, good: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Plan | None, str]:
    """What `sela train` would decide for these images with no options given.

    Args:
        data: what the user gave; of "digits" the training part is what counts.
        source: the images.
        good: those that can be read, in case that the few which training looks at cannot.

    Returns:
        The plan, or None and why there is none.
    """
    digits = isinstance(data, str) and data == "digits"
    try:
        return resolve(make_options({}), (), source.subset(digits_split()[0]) if digits else source, digits=digits), ""
    except SelaError as error:
        why = str(error)
    if 2 <= len(good) < len(source):
        try:
            return resolve(make_options({}), (), source.subset(good)), ""
        except SelaError as error:
            why = str(error)
    return None, why


def suggestions(
    plan: Plan | None, why_not: str, *, bad: int, looked_at: int, max_bad_fraction: float, files: int
) -> list[Suggestion]:
    """Options with their reasons.

    Args:
        plan: see `training_plan`.
        why_not: why there is no plan.
        bad: images that cannot be read, of those looked at.
        looked_at: images looked at.
        max_bad_fraction: what training bears by default.
        files: images that are files of their own; 0 where they are in memory, in an archive or packed.
    """
    found = []
    if plan is None:
        found.append(Suggestion("clusters", None, f"training would refuse these images: {why_not}"))
    else:
        options = plan.options
        found.append(
            Suggestion("clusters", options.clusters, plan.reasons.get("clusters", "as many as were asked for"))
        )
        found.append(Suggestion("heads", options.heads, plan.reasons.get("heads", "one per number of clusters")))
        for name in _SHOWN:
            value = getattr(options, name)
            found.append(Suggestion(name, value, plan.reasons.get(name, "the default")))
    found.append(_on_bad_image(bad, looked_at, max_bad_fraction))
    if files >= PACK_FROM:
        found.append(
            Suggestion("pack", True, f"{files:,} files: packed, they are read in large pieces and opened at once")
        )
    elif files:
        found.append(Suggestion("pack", False, f"{files:,} files are few enough to be read as they are"))
    else:
        found.append(Suggestion("pack", False, "the images are not files of their own"))
    return found


def heads_in_words(clusters: list[int]) -> str:
    """How many heads of how many clusters.

    Example:
        >>> heads_in_words([128, 128, 10])
        '2 heads of 128 clusters, 1 head of 10'
    """
    parts = [(count, k) for k, count in Counter(clusters).items()]
    words = [f"{count} {'head' if count == 1 else 'heads'} of {k}" for count, k in parts]
    return ", ".join([f"{words[0]} clusters", *words[1:]])


def _on_bad_image(bad: int, looked_at: int, most: float) -> Suggestion:
    if not bad:
        return Suggestion("on_bad_image", "raise", "no bad image was found: one that turns up later is news")
    if bad <= most * looked_at:
        return Suggestion("on_bad_image", "skip", f"{bad:,} of {looked_at:,} images cannot be read; they get label -1")
    return Suggestion(
        "on_bad_image",
        "raise",
        f"{bad:,} of {looked_at:,} images cannot be read, more than max_bad_fraction={most:g}: remove or mend them, or "
        f"set on_bad_image=skip and max_bad_fraction to at least {np.ceil(1000 * bad / looked_at) / 1000:g}",
    )
