"""Images that a run could not read, out of bad_images.csv."""

from __future__ import annotations

import csv
import io
import itertools
from dataclasses import dataclass, field
from pathlib import Path

from sela_ext.data.safe_files import read_bounded

# Bytes of the file that are looked at, and rows that are listed.
_MOST_BYTES = 1 << 26
_MOST_LISTED = 200


@dataclass(frozen=True)
class BadImages:
    """How many there are, and (index, name, reason) of the first of them."""

    count: int = 0
    listed: list[tuple[str, str, str]] = field(default_factory=list)
    problem: str = ""


def read_bad_images(path: Path) -> BadImages:
    """Read the list; without the file no image was bad, and a file that cannot be read is said to be one.

    Args:
        path: bad_images.csv.
    """
    try:
        text = read_bounded(path, _MOST_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return BadImages()
    except (OSError, ValueError) as error:
        return BadImages(problem=f"{path.name} cannot be read: {error}")
    try:
        rows = csv.reader(io.StringIO(text, newline=""))
        next(rows, None)
        whole = (row for row in rows if len(row) >= 3)
        listed = [(row[0], row[1], row[2]) for row in itertools.islice(whole, _MOST_LISTED)]
        return BadImages(len(listed) + sum(1 for _ in whole), listed)
    except csv.Error as error:
        return BadImages(problem=f"{path.name} cannot be read: {error}")
