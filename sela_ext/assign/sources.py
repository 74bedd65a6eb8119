"""Where logits come from: one pass, one search or some rows of an array, of a mapped file, or of logits never stored.

A pass over a large map, or over logits that are computed, goes through it in parts; their integer sums give the bits
of one pass over everything.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.features import FeatureLogits
from sela_ext.assign.mapped import MappedRows
from sela_ext.assign.plan import available_memory
from sela_ext.kernels.bounds import ChunkBounds, bounds_nbytes, chunk_bounds
from sela_ext.kernels.device import cuda_place, is_tensor, usable
from sela_ext.kernels.logits import StoredLogits
from sela_ext.kernels.rounding import Candidates, check_search, column_margins, find_candidates
from sela_ext.kernels.sinkhorn import (
    ROWS_TOGETHER,
    SAMPLE_ROWS,
    CpuPass,
    DevicePass,
    check_largest,
    check_logits,
    check_threads,
    device_pass,
    sinkhorn_pass,
)
from sela_ext.kernels.sinkhorn import backend_of as backend_of_array
from sela_ext.kernels.sinkhorn import on_cuda as array_on_cuda
from sela_ext.kernels.sinkhorn_sums import SinkhornSums, add_sums, from_exact, like
from sela_ext.kernels.tiled_pass import TiledPass

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    import torch

ENTRIES_AT_ONCE = 1 << 18  # of rows in float64: 2 MiB
DEVICE_ENTRIES_AT_ONCE = 1 << 23  # the same on a CUDA device: 64 MiB


def on_cuda(logits: Any) -> bool:
    """Whether passes over these logits run on a CUDA device."""
    return logits.on_cuda if isinstance(logits, FeatureLogits) else array_on_cuda(logits)


def backend_of(logits: Any) -> str:
    """Who does the passes, see `Assignment.backend`."""
    return backend_of_array(logits.weight if isinstance(logits, FeatureLogits) else logits)


def model_of(logits: Any) -> Any:
    """The array whose kind and device results take."""
    if isinstance(logits, FeatureLogits):
        return logits.weight if logits.on_cuda else logits.features
    return logits.values if isinstance(logits, StoredLogits) else logits


def in_numpy(logits: Any) -> Any:
    """A tensor on the CPU as an array on the same memory, which is quicker to handle; anything else as it is."""
    if not is_tensor(logits) or logits.device.type != "cpu" or on_cuda(logits) or check_logits(logits) == "bfloat16":
        return logits
    return logits.detach().numpy()


def logits_pass(
    logits: Any,
    potential: Any,
    *,
    scale: float = 1.0,
    row_weights: Any = None,
    reference: Any = None,
    want_labels: bool = False,
    threads: int = 0,
    every: int = 1,
    keep: float | None = None,
    keep_at_most: int = 2**62,
    first_row: int = 0,
    rows_in_all: int | None = None,
    largest_weight: float | None = None,
    bounds: ChunkBounds | None = None,
) -> SinkhornSums:
    """`sinkhorn_pass` over anything that `assign` takes, with its arguments; bounds as `bounds_of` makes them.

    Raises:
        DataError: a mapped file became too short.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "want_labels": want_labels,
        "every": every,
        "keep": keep,
        "rows_in_all": first_row + int(logits.shape[0]) if rows_in_all is None else rows_in_all,
    }
    computed = logits if isinstance(logits, FeatureLogits) else None
    mapped = None if computed is not None else _mapped(logits)
    if computed is None and mapped is None:
        return sinkhorn_pass(
            logits,
            potential,
            row_weights=row_weights,
            reference=reference,
            threads=threads,
            keep_at_most=keep_at_most,
            first_row=first_row,
            largest_weight=largest_weight,
            bounds=bounds,
            **options,
        )
    options["largest_weight"] = check_largest(largest_weight, row_weights)
    rows, cols = (int(n) for n in logits.shape)
    joined = _Joined(rows, logits, reference, every, want_labels, keep_at_most)

    def part_of(first: int, block: Any, threads: int) -> SinkhornSums:
        part = slice(first, first + len(block))
        sums = sinkhorn_pass(
            block,
            potential,
            row_weights=None if row_weights is None else row_weights[part],
            reference=None if reference is None else reference[part],
            threads=threads,
            keep_at_most=0 if joined.overflow else keep_at_most,
            first_row=first_row + first,
            **options,
        )
        joined.count(sums)
        return sums

    if computed is None:
        for first, block in array_parts(logits):
            joined.add(first, len(block), part_of(first, block, threads))
    elif computed.on_cuda and rows:
        common = {"row_weights": row_weights, "reference": reference, "first_row": first_row}
        return _pass_on_device(computed, part_of, potential, **common, **options)
    else:
        found = computed.tiles(
            lambda first, block: (first, len(block), part_of(first, block, 1)),
            threads=threads,
            every=every,
            first_row=first_row,
        )
        for first, count, sums in found:
            joined.add(first, count, sums)
    if joined.exact is None:  # no row to read
        nothing = slice(0, 0)
        joined.add(0, 0, part_of(0, np.empty((0, cols), np.float32) if computed is not None else logits[nothing], 1))
    return joined.result(options["rows_in_all"], options["largest_weight"])


def _pass_on_device(
    computed: FeatureLogits,
    part_of: Any,
    potential: Any,
    *,
    every: int,
    keep: float | None,
    **options: Any,
) -> SinkhornSums:
    """A pass over tiles that are computed on a CUDA device: one launch each, and one look at what all of them gave.

    A part of the rows, candidates, and devices whose kernels are not used: tile by tile.
    """
    place = cuda_place(computed.weight)
    card = None if place is None else usable(place)
    if card is None or every > 1 or keep is not None:
        # All tiles, also those in which nothing is read: their rows have a log-sum-exp and labels, too.
        return add_sums(list(computed.tiles(lambda first, block: part_of(first, block, 1))))
    tiled = TiledPass(card, *computed.shape, potential, **options)
    for _ in computed.tiles(tiled.take):
        pass
    return tiled.result()


def whole_pass(
    logits: Any,
    *,
    row_weights: Any = None,
    threads: int = 0,
    first_row: int = 0,
    rows_in_all: int | None = None,
    largest_weight: float | None = None,
) -> CpuPass | DevicePass | None:
    """`logits_pass` over an array in memory, for many calls; None for a map, or what is no array of numpy or of CUDA.

    Whether the file of a map is still long enough is looked at before every pass.

    Raises:
        OptionError: an argument of a wrong shape or value.
        DataError: a mapped file is too short.
    """
    if not isinstance(logits, FeatureLogits) and on_cuda(logits):
        return device_pass(
            logits,
            row_weights=row_weights,
            first_row=first_row,
            rows_in_all=rows_in_all,
            largest_weight=largest_weight,
        )
    if isinstance(logits, np.ndarray):
        if MappedRows.find(logits, "logits") is not None:
            return None
    elif not isinstance(logits, StoredLogits):
        return None
    check_threads(threads)
    return CpuPass(
        logits,
        row_weights=row_weights,
        threads=threads,
        first_row=first_row,
        rows_in_all=rows_in_all,
        largest_weight=largest_weight,
    )


class _Joined:
    """Sums of the parts of a matrix on the host, added as they come, in the order of the rows."""

    def __init__(
        self, rows: int, logits: Any, reference: Any, every: int, want_labels: bool, keep_at_most: int
    ) -> None:
        double = str(logits.dtype).endswith("float64")
        self.lse = np.empty(rows, np.float64 if double else np.float32)
        if every > 1:
            self.lse[:] = np.nan if reference is None else np.asarray(reference)
        self.labels = np.full(rows, -1, np.int32) if want_labels else None
        self.exact: npt.NDArray[np.int64] | None = None
        self.candidates: Any = None
        self.limit = keep_at_most
        self.kept = 0
        self.entries = self.live = 0
        self.lock = threading.Lock()
        self.model = model_of(logits)

    @property
    def overflow(self) -> bool:
        """Whether there are too many candidates already: then those of other parts need not be kept."""
        return self.kept > self.limit

    def count(self, sums: SinkhornSums) -> None:
        """Count the candidates of a part; parts that are under way in several threads do so."""
        if sums.candidates is not None:
            with self.lock:
                self.kept += self.limit + 1 if sums.candidates.overflow else sums.candidates.entries

    def add(self, first: int, count: int, sums: SinkhornSums) -> None:
        """Add a part that begins at a row."""
        part = slice(first, first + count)
        self.lse[part] = np.asarray(sums.lse)
        if self.labels is not None:
            self.labels[part] = np.asarray(sums.labels)
        self.exact = sums.exact if self.exact is None else self.exact + sums.exact
        self.entries += sums.entries
        self.live += sums.live
        if self.candidates is None:
            self.candidates = sums.candidates
        else:
            self.candidates.append(sums.candidates)

    def result(self, rows_in_all: int, largest_weight: float) -> SinkhornSums:
        """All of it."""
        assert self.exact is not None
        columns, objective, weight, masked = from_exact(self.exact, rows_in_all, largest_weight)
        return SinkhornSums(
            like(self.model, columns),
            objective,
            weight,
            like(self.model, self.lse),
            None if self.labels is None else like(self.model, self.labels),
            masked,
            self.candidates,
            self.exact,
            rows_in_all,
            largest_weight,
            self.entries,
            self.live,
        )


def bounds_of(logits: Any) -> ChunkBounds | None:
    """Chunk bounds for passes over these logits; None where these make no use of them, or memory is short."""
    if isinstance(logits, FeatureLogits) or on_cuda(logits) or _mapped(logits) is not None:
        return None
    free = available_memory()
    rows, cols = (int(n) for n in logits.shape)
    if free is not None and 2 * bounds_nbytes(rows, cols, check_logits(logits)) > free:
        return None
    return chunk_bounds(logits)


def _mapped(logits: Any) -> MappedRows | None:
    """The map behind an array of more than one part."""
    if isinstance(logits, StoredLogits) or on_cuda(logits):
        return None
    mapped = MappedRows.find(logits, "logits")
    return mapped if mapped is not None and len(logits) > mapped.part_rows else None


def array_parts(logits: Any) -> Iterator[tuple[int, Any]]:
    """An array, or the parts of a mapped one: first row and rows, from the first to the last.

    Each part is asked for while the one before is worked on, and need not stay resident when that is done.
    """
    mapped = _mapped(logits)
    if mapped is None:
        yield 0, logits
        return
    step = mapped.part_rows
    for first in range(0, len(logits), step):
        mapped.ahead(first + step, first + 2 * step)
        yield first, logits[first : first + step]
        mapped.done(first, first + step)


def row_blocks(logits: Any, step: int) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
    """Consecutive rows in float64, numpy, so many at a time; those of a mapped file need not stay resident."""
    rows = int(logits.shape[0])
    mapped = None
    if isinstance(logits, FeatureLogits):
        step = -(-step // logits.product_rows) * logits.product_rows
    else:
        mapped = _mapped(logits)
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        yield part, as_double(logits[part])
        if mapped is not None:
            mapped.done(part.start, part.stop)


def device_columns(
    logits: Any, *, columns: Any, every: int = 1, first_row: int = 0
) -> Iterator[tuple[Any, torch.Tensor]]:
    """`rows_of` for logits on a CUDA device: row numbers (a slice, or a tensor there) and the block [n, m], there."""
    import torch

    rows = int(logits.shape[0])
    chosen = torch.from_numpy(np.asarray(columns, np.int64)).to(logits.device)
    step = max(1, DEVICE_ENTRIES_AT_ONCE // max(1, len(columns)))
    if isinstance(logits, FeatureLogits):
        step = -(-step // logits.product_rows) * logits.product_rows
    for first in range(0, rows, step * every):
        last = min(rows, first + step * every)
        where: Any = slice(first, last)
        if every > 1:
            numbers = torch.arange(first, last, device=logits.device)
            where = numbers[(first_row + numbers) // SAMPLE_ROWS % every == 0]
        block = logits[where, columns] if isinstance(logits, FeatureLogits) else logits[where].detach()[:, chosen]
        yield where, block.double()


def device_blocks(logits: Any, step: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Consecutive rows of logits on a CUDA device in float64, there, so many at a time."""
    rows = int(logits.shape[0])
    whole = logits.product_rows if isinstance(logits, FeatureLogits) else step
    for first in range(0, rows, max(step, whole)):
        last = min(rows, first + max(step, whole))
        block = logits[first:last].detach()  # of computed logits whole products
        for at in range(first, last, step):
            part = slice(at, min(last, at + step))
            yield part, block[at - first : part.stop - first].double()


def as_double(block: Any) -> npt.NDArray[np.float64]:
    """A block of numpy or torch in float64, numpy; a copy."""
    found = block.detach().cpu().double().numpy() if hasattr(block, "detach") else np.asarray(block).astype(np.float64)
    return np.asarray(found, np.float64)


def rows_of(
    logits: Any, *, columns: Any, every: int = 1, first_row: int = 0
) -> Iterator[tuple[Any, npt.NDArray[np.float64]]]:
    """Some columns of the logits in float64, numpy, in parts.

    Args:
        logits: anything that `assign` takes.
        columns: int [m].
        every: only every so many groups of rows, as a pass.
        first_row: number of the first row, for `every`.

    Yields:
        Row numbers (a slice, or int64 [n]) and the block [n, m].
    """
    rows = int(logits.shape[0])
    step = ROWS_TOGETHER * max(1, ENTRIES_AT_ONCE // (ROWS_TOGETHER * max(1, len(columns))))
    mapped = None if isinstance(logits, FeatureLogits) else _mapped(logits)
    if mapped is not None:
        step = min(step, mapped.part_rows)
    for first in range(0, rows, step * every):
        last = min(rows, first + step * every)
        where: Any = slice(first, last)
        if every > 1:
            where = np.arange(first, last)
            where = where[(first_row + where) // SAMPLE_ROWS % every == 0]
        if isinstance(logits, FeatureLogits):
            block = logits[where, columns]
        elif isinstance(logits, StoredLogits):
            block = logits.decoded(first, last, columns)
            block = block if every == 1 else block[where - first]
        elif every > 1 and not hasattr(logits, "detach"):
            block = logits[where[:, None], columns]
        else:
            block = logits[where][:, columns]
        yield where, as_double(block)
        if mapped is not None:
            mapped.done(first, last)


def column_losses(
    logits: Any, prices: Any, labels: Any, selected: Any, *, scale: float, threads: int
) -> npt.NDArray[np.float32]:
    """`column_margins` of selected rows of anything that `assign` takes."""
    if isinstance(logits, FeatureLogits):
        return column_margins(logits[selected], prices, labels[selected], scale=scale, threads=threads)
    return column_margins(logits, prices, labels, scale=scale, selected=selected, threads=threads)


def best_columns(
    logits: Any,
    prices: Any,
    labels: Any,
    *,
    selected: Any = None,
    threads: int = 0,
    first_row: int = 0,
    **options: Any,
) -> Candidates:
    """`find_candidates` over anything that `assign` takes, with its arguments; selected rows must ascend."""
    computed = logits if isinstance(logits, FeatureLogits) else None
    if computed is None and _mapped(logits) is None:
        return find_candidates(
            logits, prices, labels, selected=selected, threads=threads, first_row=first_row, **options
        )
    check_search(logits, prices, options.get("label_prices"), labels, 1.0, options.get("count", 16), selected)
    chosen = np.arange(len(logits)) if selected is None else np.asarray(selected, np.int64)

    def places(first: int, last: int) -> tuple[int, int]:
        begin, end = np.searchsorted(chosen, (first, last))
        return int(begin), int(end)

    def search(first: int, block: Any, threads: int) -> Candidates:
        begin, end = places(first, first + len(block))
        own = labels[first : first + len(block)]
        return find_candidates(
            block,
            prices,
            own,
            selected=chosen[begin:end] - first,
            threads=threads,
            first_row=first_row + first,
            **options,
        )

    def wanted(first: int, last: int) -> bool:
        begin, end = places(first, last)
        return end > begin

    if computed is not None:
        each = 0 if computed.on_cuda else 1
        found = list(computed.tiles(lambda first, block: search(first, block, each), threads=threads, wanted=wanted))
    else:
        parts = array_parts(logits)
        found = [search(first, block, threads) for first, block in parts if wanted(first, first + len(block))]
    if not found:
        return search(0, np.empty((0, logits.shape[1]), np.float32) if computed is not None else logits[:0], threads)
    return Candidates(
        *(np.concatenate([getattr(part, name) for part in found]) for name in ("columns", "values", "found", "regret"))
    )
