"""Look at images before training on them."""

from __future__ import annotations

import os
from typing import Any


def doctor(
    data: Any,
    *,
    labels: Any = None,
    eval_data: Any = None,
    json: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    threads: int = 0,
    sample: int | None = None,
    quick: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Check images: what they are, which are bad, odd or there twice, and what training on them takes.

    Every image is decoded once. Memory: about 0.45 kB per image, and one decoded image per thread.

    Args:
        data: What `sela_ext.train` takes: a folder, a list of paths, an array, a torch Dataset, ...
        labels: True labels, int [N] or a .npy file, -1 = unknown; for class counts and contradictions.
        eval_data: Held-out images to compare with; None: those that lie beside `data`, if any (folders `train` and
            `test`, MNIST's files).
        json: File for the result.
        out: File for a page (.html) with the same, charts, and thumbnails of duplicates.
        threads: Threads; 0 = all processors that this process may use.
        sample: Look at so many images only, at random and always the same ones.
        quick: The same with 2,000.
        progress: Show a bar, or a line now and then where there is no terminal.

    Returns:
        The result, JSON-able; docs/doctor.md describes its keys. `usable` is False where no image can be read;
        `findings` lists what is wrong or remarkable, each with advice.

    Raises:
        DataError: Nothing that could be opened as images.
        OptionError: A number out of range.
        ResourceError: A file cannot be written.

    Example:
        >>> import numpy as np, sela_ext
        >>> images = np.random.default_rng(0).integers(0, 256, (120, 32, 32, 3), dtype=np.uint8)
        >>> images[7] = images[3]
        >>> result = sela_ext.doctor(images, threads=1)
        >>> [finding["text"] for finding in result["findings"]]
        ['1 image repeats another one pixel by pixel, in 1 group']
    """
    from sela_ext.doctor.check import check

    return check(
        data,
        labels=labels,
        eval_data=eval_data,
        json_file=json,
        out=out,
        threads=threads,
        sample=sample,
        quick=quick,
        progress=progress,
    )
