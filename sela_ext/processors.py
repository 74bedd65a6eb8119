"""How many processors there are to work with."""

from __future__ import annotations

import os


def available_processors() -> int:
    """Processors that this process may use, at least 1: its affinity mask, where the system has such a thing.

    Example:
        >>> available_processors() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
