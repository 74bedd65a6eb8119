"""How much memory a file may take when it must be held in memory."""

from __future__ import annotations

import os
from pathlib import Path


def free_memory() -> int:
    """Bytes that processes may still take, caches of the system included; a large number where nobody says."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 1 << 62
