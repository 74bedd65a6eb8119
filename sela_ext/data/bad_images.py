"""What becomes of images that cannot be read: an error, or a list and a limit."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sela_ext.data.source import Int64Array, Source
from sela_ext.errors import DataError


class BadImages:
    """The images of a source that could not be read.

    Args:
        source: The images.
        skip: Leave them out and list them; else the first one is an error.
        max_fraction: Share of the images that may be left out, 0..1. Over several epochs any of several processes may
            meet any image, so each has the limit of all.
        remedy: What to remove, for the message.

    Attributes:
        listed: (index, name, reason) of each, once, in the order in which they were met.
    """

    def __init__(self, source: Source, *, skip: bool, max_fraction: float, remedy: str = "the file") -> None:
        self.listed: list[tuple[int, str, str]] = []
        self._source = source
        self._skip = skip
        self._max_fraction = max_fraction
        self._remedy = remedy
        self._known: set[int] = set()
        self._lock = threading.Lock()

    def without_known(self, keys: Int64Array) -> Int64Array:
        """The `keys`, int64 [B], of images that are not known to be bad: those are not tried again."""
        return keys[~self.known(keys)]

    def known(self, keys: Int64Array) -> npt.NDArray[np.bool_]:
        """Which of the `keys`, int64 [B], are those of images that are known to be bad."""
        if not self._known:
            return np.zeros(len(keys), dtype=np.bool_)
        return np.isin(keys % len(self._source), list(self._known))

    def add(self, index: int, error: DataError) -> None:
        """Note that image `index` cannot be read.

        Raises:
            DataError: Bad images are not to be skipped, or there are too many of them.
        """
        if not self._skip:
            raise DataError(f'{error}; remove {self._remedy}, or use on_bad_image="skip"') from error
        with self._lock:
            if index in self._known:
                return
            self._known.add(index)
            self.listed.append((index, self._source.name(index), str(error)))
            check_share(self.listed, len(self._source), self._max_fraction)


def check_share(listed: Sequence[tuple[int, str, str]], count: int, max_fraction: float) -> None:
    """See that not too many of `count` images are bad.

    Args:
        listed: (index, name, reason) of each, once.
        count: Images, N.
        max_fraction: Share of them that may be, 0..1.

    Raises:
        DataError: There are more.
    """
    if len(listed) > max_fraction * count:
        first = "; ".join(reason for _, _, reason in listed[:3])
        raise DataError(
            f"{len(listed)} of {count} images cannot be read, more than max_bad_fraction={max_fraction:g}: {first}; "
            "remove or repair them, or allow more"
        )
