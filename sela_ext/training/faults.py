"""Places where a test may have a run die, stop or fail: nothing happens unless the environment asks for it.

`SELA_FAULT=place:count:what[:rank]` does `what` the count-th time that a process comes to `place`; `place/name` where
it comes there with the file of this name. This is for tests of what a crash leaves behind; it is no option of a run.
"""

from __future__ import annotations

import functools
import os
import signal

# Every place that `at` is called with. Those of writing are passed for each file that is written whole.
PLACES = (
    "overwriting",
    "before log is cut",
    "after log is cut",
    "before write",
    "after write",
    "before fsync",
    "after fsync",
    "before rename",
    "after rename",
    "label pass begins",
    "inside label pass",
    "label pass ends",
    "before step",
    "after step",
    "after last epoch",
    "inside evaluation",
    "before labels",
    "before report",
)
_ACTIONS = ("kill", "stop", "raise", "full disk")
_seen: dict[str, int] = {}


@functools.cache
def _asked() -> tuple[str, int, str, str] | None:
    text = os.environ.get("SELA_FAULT")
    if not text:
        return None
    place, count, what, rank = (*text.split(":"), "")[:4]
    if place.partition("/")[0] not in PLACES or what not in _ACTIONS:
        raise ValueError(f"SELA_FAULT: expected one of {PLACES} and one of {_ACTIONS}, found {text!r}")
    return place, int(count), what, rank


def at(place: str, name: str = "") -> None:
    """Come to a place, perhaps with the file that is being written; see the module."""
    asked = _asked()
    if asked is None or asked[0] not in (place, f"{place}/{name}") or asked[3] not in ("", os.environ.get("RANK", "0")):
        return
    _seen[place] = _seen.get(place, 0) + 1
    if _seen[place] != asked[1]:
        return
    if asked[2] == "raise":
        raise RuntimeError(f"a fault planted {place}")
    if asked[2] == "full disk":
        raise OSError(28, "No space left on device")
    os.kill(os.getpid(), signal.SIGKILL if asked[2] == "kill" else signal.SIGSTOP)
