"""A 16-bit copy of the logits to solve on; what ends a solve is always measured on the logits themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.features import FeatureLogits
from sela_ext.assign.mapped import MappedRows
from sela_ext.assign.plan import STORED, available_memory, check_memory, memory_plan
from sela_ext.assign.sources import array_parts, on_cuda
from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels.logits import StoredLogits, empty_stored, store_logits
from sela_ext.kernels.sinkhorn import check_logits

if TYPE_CHECKING:
    from sela_ext.assign.plan import MemoryPlan

STORAGES = ("auto", "float32", *STORED)
# "auto" takes a copy only for tolerances from here on: its rounding alone leaves an L1 of about 3e-5.
COARSE = 1e-4
# The copy is solved to this part of tol, and no further than to what its rounding leaves.
SHARE, FLOOR = 0.5, {"fixed16": 2e-5, "float16": 2e-5, "bfloat16": 2e-4}


def source_of(logits: Any) -> str:
    """Where logits are, as `memory_plan` names it.

    Raises:
        DataError: a mapped file is too short.
    """
    if isinstance(logits, FeatureLogits):
        logits.mapped()
        return "features"
    if not on_cuda(logits) and MappedRows.find(logits, "logits") is not None:
        return "file"
    return "memory"


def choose_storage(
    logits: Any, storage: str, *, tol: float, stop: str, max_passes: int, plan: dict[str, Any]
) -> tuple[str, str, float]:
    """Which 16-bit copy to solve on.

    "auto" takes one where reading the logits is slow: in a mapped file that the page cache cannot hold, when there is
    memory for a copy. In memory a copy does not pay: making it and the last pass over the logits cost more reads than
    the few passes of a solve save.

    Args:
        logits: anything that `assign` takes.
        storage: as in `assign`.
        tol: tolerance of the solve.
        stop: as in `assign`.
        max_passes: as in `assign`.
        plan: arguments of `memory_plan` beside rows, cols and storage.

    Returns:
        "fixed16", "float16", "bfloat16", or "" for the logits as they are; the reason, "" where there is nothing to
        say; candidates per row that there is memory for.

    Raises:
        OptionError: a copy where there can be none.
        ResourceError: the solve does not fit into memory.
    """
    rows, cols = (int(n) for n in logits.shape)
    if storage in STORED and stop == "official":
        raise OptionError(f'storage: expected "auto" or "float32" with stop="official", found "{storage}"')

    def fits(kind: str) -> float:
        if on_cuda(logits):  # what does not fit there is torch's error
            return np.inf
        wanted: MemoryPlan = memory_plan(max(rows, 1), cols, storage=kind or "float32", **plan)
        return check_memory(wanted)

    if storage == check_logits(logits):
        storage = "float32"
    if storage in STORED and max_passes == 1:
        return "", "read as it is: max_passes=1 leaves no pass for a copy", fits("")
    if storage in STORED:
        return storage, f'storage="{storage}" was asked for', fits(storage)
    if storage == "float32" or plan["source"] != "file" or stop == "official":
        return "", "", fits("")
    size = rows * cols * logits.dtype.itemsize
    free = available_memory()
    if free is None or size <= free:
        return "", "the file fits into the page cache, read as it is", fits("")
    if tol < COARSE:
        return "", f"a file larger than memory, read as it is: tol is below {COARSE:g}", fits("")
    try:
        return "fixed16", "a file larger than memory, solved on a 16-bit copy", fits("fixed16")
    except ResourceError:
        return "", "a file larger than memory, which a 16-bit copy would not fit into either", fits("")


def stored_copy(logits: Any, kind: str, lam: float, threads: int) -> StoredLogits:
    """The logits in 16 bits, relative to their row maxima: one read, in parts where they are no array in memory."""
    rows, cols = (int(n) for n in logits.shape)
    out = empty_stored(rows, cols, kind, lam=lam, place=logits.device if on_cuda(logits) else None)
    saturated = 0
    if isinstance(logits, FeatureLogits):
        counts = logits.tiles(
            lambda first, block: store_logits(block, kind, lam=lam, threads=1, out=out, first_row=first).saturated,
            threads=threads,
        )
        saturated = sum(counts)
    else:
        for first, block in array_parts(logits):
            part = store_logits(block, kind, lam=lam, threads=threads, out=out, first_row=first)
            saturated += part.saturated
    return StoredLogits(out.values, kind, out.maxima, saturated, out.lam)


def copy_tolerance(tol: float, kind: str) -> float:
    """To what error the copy is solved; 0 stays 0."""
    return max(SHARE * tol, FLOOR[kind]) if tol > 0 else 0.0
