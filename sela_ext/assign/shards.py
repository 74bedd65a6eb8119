"""Rows that are spread over the ranks of a torch.distributed group, and what the ranks tell each other in a solve.

Note [Ranks in step]
Every rank does the same K-dimensional arithmetic on the same numbers, so all of them take the same decisions; only
passes, labels and row weights are its own. What is exchanged adds up exactly (integers), or is put together in the
order of the rows, so that the bits are those of one process that holds all rows.
  Ranks speak in meetings. Each begins with one all-reduce of K + 14 int64: the integers of `SinkhornSums.exact` (or
whatever is to be summed), the number of candidates, how many ranks failed, and a mark of what the rank is about, with
its square. A rank that raises goes to the meeting that the others come to next, whichever that is, and says so there;
then everybody raises instead of waiting for ever. Marks are equal on all ranks exactly if mean and mean square say so,
which every rank sees alike: ranks whose arithmetic has drifted apart are found at once, not by a hang. What follows a
meeting (candidates of all ranks, say) only begins when all are fine, and room for it was made.
"""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.assign.sources import backend_of
from sela_ext.errors import DataError, DistributedError, OptionError
from sela_ext.kernels.candidates import candidate_arrays, join_candidates, like_candidates, too_many_candidates
from sela_ext.kernels.device import first_line
from sela_ext.kernels.sinkhorn import ROWS_TOGETHER, check_logits
from sela_ext.kernels.sinkhorn_sums import SinkhornSums, from_exact

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    import numpy.typing as npt

    Longs = npt.NDArray[np.int64]
    Vector = npt.NDArray[np.float64]

EXTRA = 9  # integers of SinkhornSums.exact beyond the columns
TAIL = 5  # entries, overflows, failures, mark, mark squared
MARK_BITS = 24  # squares of marks add up to less than 2^63 over 32,768 ranks
NAMED = 5  # ranks that a message names


def shard_rows(rows: int, ranks: int, rank: int) -> slice:
    """The rows of a matrix that a rank should hold, for `assign(..., group=)`: whole blocks of 128, evenly spread.

    Args:
        rows: N, of the whole matrix.
        ranks: number of ranks.
        rank: 0 .. ranks - 1.

    Returns:
        slice(start, stop). It may be empty when there are fewer blocks than ranks.

    Raises:
        OptionError: a number out of range.

    Example:
        >>> import sela_ext
        >>> [sela_ext.shard_rows(1000, 3, rank) for rank in range(3)]
        [slice(0, 384, None), slice(384, 768, None), slice(768, 1000, None)]
    """
    for name, value, least in (("rows", rows, 0), ("ranks", ranks, 1), ("rank", rank, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise OptionError(f"{name}: expected an integer >= {least}, found {value!r}")
    if rank >= ranks:
        raise OptionError(f"rank: expected a number in 0 .. {ranks - 1}, found {rank}")
    blocks = -(-int(rows) // ROWS_TOGETHER)
    start, stop = (min(int(rows), -(-blocks * int(at) // int(ranks)) * ROWS_TOGETHER) for at in (rank, rank + 1))
    return slice(start, stop)


class Shard:
    """All rows, in this process: what `RankShard` is with one rank, without any exchange.

    Attributes:
        first_row: of the whole matrix, here; a multiple of 128.
        largest_weight: of all rows of the matrix; None: of those here.
        ranks: number of ranks.
        rank: of this process.
    """

    first_row: int = 0
    largest_weight: float | None = None
    ranks: int = 1
    rank: int = 0

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def begin(self, logits: Any, row_weights: Any | None, options: Mapping[str, Any]) -> None:
        """Compare shapes and options over the ranks, and find the place of this rank's rows.

        Raises:
            DataError: no rank has a row.
            OptionError: an option differs between ranks, shards are not aligned, or no row has a weight > 0.
        """
        if int(logits.shape[0]) == 0:
            raise DataError(f"logits: expected at least one row, found shape {tuple(logits.shape)}")
        if row_weights is not None and not float(row_weights.max()) > 0:
            raise OptionError("row_weights: expected at least one number > 0, found only zeros")

    def rows_in_all(self, here: int) -> int:
        """Rows of the whole matrix, of which so many are here."""
        return here

    def own(self, here: int) -> slice:
        """Where the rows here lie in the whole matrix."""
        return slice(self.first_row, self.first_row + here)

    def add(self, sums: SinkhornSums, potential: Vector, about: str) -> SinkhornSums:
        """Sums over all rows, with the candidates of all rows, from those of the rows here; lse and labels stay."""
        return sums

    def total(self, about: str, counts: Longs) -> Longs:
        """Sum over ranks of integers [at most K + 9]."""
        return counts

    def largest(self, about: str, values: Vector) -> Vector:
        """Largest of each number over ranks."""
        return values

    def agreed_storage(self, room: float, kind: int, here: int) -> tuple[float, bool]:
        """What the ranks can do together, from what memory allows each.

        Args:
            room: candidates per row here that there is memory for.
            kind: number of the kind of copy that would be taken.
            here: rows here; every rank keeps the candidates of all rows.

        Returns:
            Candidates per row of the matrix, and whether the kind is the same everywhere.
        """
        room = room * max(here, 1) / max(self.rows_in_all(here), 1)
        found = self.largest("storage", np.array([-room, kind, -kind], np.float64))
        return -float(found[0]), bool(found[1] == -found[2])

    def joined(self, about: str, arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Arrays [n, ...] of all ranks, one behind the other in the order of the rows."""
        return list(arrays)


class RankShard(Shard):
    """The rows of one rank; the ranks hold consecutive parts of the matrix, in their order. See Note [Ranks in step].

    A context manager: an exception inside is brought to the other ranks, and no rank leaves before all are done.

    Args:
        group: a torch.distributed process group, or True or "world" for the default one.
    """

    def __init__(self, group: Any) -> None:
        self._group = _process_group(group)
        import torch.distributed as dist

        self.ranks = dist.get_world_size(self._group)
        self.rank = dist.get_rank(self._group)
        self._width = 0  # of the all-reduce; 0 before the first meeting
        self._rows = 0
        self._over = False  # the ranks have parted: no meeting follows
        self._device: Any = "cpu"
        if dist.get_backend(self._group) == "nccl":
            import torch

            self._device = torch.device("cuda", torch.cuda.current_device())

    def __enter__(self) -> RankShard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._over or (error is not None and not isinstance(error, Exception)):
            return
        if error is None:
            self._meet("end")
            return
        with contextlib.suppress(Exception):  # the error itself is what this rank raises
            failure = f"{type(error).__name__}: {first_line(error)}"
            if self._width == 0:
                self._gather_objects({"failure": failure})
            else:
                self._meet("failed", failure=failure)

    def begin(self, logits: Any, row_weights: Any | None, options: Mapping[str, Any]) -> None:
        """Compare shapes and options over the ranks, and find the place of this rank's rows.

        Raises:
            DataError: no rank has a row.
            DistributedError: another rank failed.
            OptionError: an option differs between ranks, shards are not aligned, or no row has a weight > 0.
        """
        here, clusters = (int(n) for n in logits.shape)
        compared = {
            "clusters": clusters,
            "dtype": check_logits(logits),
            "backend": backend_of(logits),
            "row_weights": "None" if row_weights is None else "given",
            **{name: _in_words(value) for name, value in options.items()},
        }
        if getattr(logits, "device", None) is not None and str(logits.device).startswith("cuda"):
            self._device = logits.device if self._device != "cpu" else self._device
        heaviest = 1.0 if row_weights is None else float(row_weights.max(initial=0.0))
        seen = self._gather_objects({"rows": here, "weight": heaviest, "options": compared})
        self._raise_failures([about.get("failure", "") for about in seen])
        self._width = clusters + EXTRA + TAIL
        rows = [int(about["rows"]) for about in seen]
        fault = _difference([about["options"] for about in seen]) or _misaligned(rows)
        if fault is None and not sum(rows):
            fault = DataError("logits: expected at least one row, found none on any rank")
        self.largest_weight = max(about["weight"] for about in seen)
        if fault is None and not self.largest_weight > 0:
            fault = OptionError("row_weights: expected at least one number > 0, found only zeros on all ranks")
        if fault is not None:
            self._over = True
            raise fault
        self.largest_weight = max(self.largest_weight, 1e-30)
        self._rows = sum(rows)
        self.first_row = sum(rows[: self.rank]) if here else 0

    def rows_in_all(self, here: int) -> int:
        """Rows of the whole matrix."""
        return self._rows

    def add(self, sums: SinkhornSums, potential: Vector, about: str) -> SinkhornSums:
        """Sums over all rows, with the candidates of all rows, from those of the rows here; lse and labels stay."""
        kept = sums.candidates
        about = f"a pass {about} at {zlib.crc32(potential.tobytes()):08x}"
        exact, entries, overflows = self._meet(
            about,
            sums.exact,
            0 if kept is None or kept.overflow else kept.entries,
            kept is not None and kept.overflow,
        )
        columns, objective, weight, masked = from_exact(exact, sums.rows_in_all, sums.largest_weight)
        if kept is not None and (overflows or entries > kept.limit):
            kept = like_candidates(kept, too_many_candidates(kept.cols, kept.level))
        elif kept is not None:
            parts = self._gathered(about, candidate_arrays(kept))
            kept = like_candidates(kept, join_candidates(parts, kept.cols, kept.level, kept.limit))
        return replace(
            sums,
            column_sums=columns,
            objective=objective,
            weight=weight,
            masked=masked,
            candidates=kept,
            exact=exact,
        )

    def total(self, about: str, counts: Longs) -> Longs:
        """Sum over ranks of integers [at most K + 9]."""
        return self._meet(about, counts)[0][: len(counts)]

    def largest(self, about: str, values: Vector) -> Vector:
        """Largest of each number over ranks."""
        import torch
        import torch.distributed as dist

        self._meet(about)
        tensor = torch.from_numpy(values.copy()).to(self._device)
        self._exchange(dist.all_reduce, tensor, op=dist.ReduceOp.MAX)
        found: Vector = tensor.cpu().numpy()
        return found

    def joined(self, about: str, arrays: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Arrays [n, ...] of all ranks, one behind the other in the order of the rows."""
        self._meet(about)
        parts = self._gathered(about, arrays)
        return [np.concatenate([part[k] for part in parts]) for k in range(len(arrays))]

    def _meet(
        self,
        about: str,
        payload: Longs | None = None,
        entries: int = 0,
        overflow: bool = False,
        failure: str = "",
    ) -> tuple[Longs, int, int]:
        """The all-reduce that every meeting begins with: sums of payload, entries, overflows.

        Raises:
            DistributedError: another rank failed, is about something else, or does not answer.
        """
        import torch
        import torch.distributed as dist

        mark = zlib.crc32(about.encode()) >> (32 - MARK_BITS)
        message = np.zeros(self._width, np.int64)
        if payload is not None:
            message[: len(payload)] = payload
        message[-TAIL:] = entries, overflow, bool(failure), mark, mark * mark
        tensor = torch.from_numpy(message).to(self._device)
        self._exchange(dist.all_reduce, tensor)
        total = tensor.cpu().numpy()
        if total[-3]:
            self._raise_failures([str(seen.get("failure", "")) for seen in self._gather_objects({"failure": failure})])
        if total[-2] != self.ranks * mark or total[-1] != self.ranks * mark * mark:
            words = [str(seen["about"]) for seen in self._gather_objects({"about": about})]
            self._over = True
            raise DistributedError(
                f"group: expected ranks in step, found {_by_value(words)}; use the same versions and the same "
                "instruction set (SELA_CPU_ISA) on all ranks"
            )
        return total[:-TAIL], int(total[-5]), int(total[-4])

    def _gathered(self, about: str, arrays: Sequence[npt.NDArray[Any]]) -> list[list[npt.NDArray[Any]]]:
        """Arrays of every rank, in one padded all-gather of bytes; after a meeting that went well."""
        import torch
        import torch.distributed as dist

        # Newer versions of torch have another name for it, and warn of this one.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        arrays = [np.ascontiguousarray(array) for array in arrays]
        lengths = torch.tensor([len(array) for array in arrays], dtype=torch.int64, device=self._device)
        everybody = torch.empty(self.ranks * len(arrays), dtype=torch.int64, device=self._device)
        self._exchange(all_gather, everybody, lengths)
        counts = everybody.cpu().numpy().reshape(self.ranks, len(arrays))
        row_bytes = [int(np.prod(array.shape[1:], dtype=np.int64)) * array.itemsize for array in arrays]
        # Each array begins at a multiple of 8 bytes.
        ends = np.cumsum((counts * np.array(row_bytes, np.int64) + 7) // 8 * 8, axis=1)
        longest = int(ends[:, -1].max())
        mine = np.zeros(longest, np.uint8)
        start = 0
        for array, end in zip(arrays, ends[self.rank], strict=True):
            raw = array.reshape(-1).view(np.uint8)
            mine[start : start + len(raw)] = raw
            start = int(end)
        sent = torch.from_numpy(mine).to(self._device)
        received = torch.empty(self.ranks * longest, dtype=torch.uint8, device=self._device)
        self._meet(f"room for {about}")  # nothing that could fail is left on any rank
        self._exchange(all_gather, received, sent)
        memory = received.cpu().numpy().reshape(self.ranks, longest)
        parts = []
        for rank in range(self.ranks):
            starts = [0, *ends[rank, :-1]]
            part = []
            for array, begin, count, size in zip(arrays, starts, counts[rank], row_bytes, strict=True):
                raw = memory[rank, begin : begin + count * size]
                part.append(raw.view(array.dtype).reshape(count, *array.shape[1:]))
            parts.append(part)
        return parts

    def _gather_objects(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.ranks
        self._exchange(dist.all_gather_object, found, value)
        return found

    def _exchange(self, collective: Any, *tensors: Any, **options: Any) -> None:
        try:
            collective(*tensors, group=self._group, **options)
        except RuntimeError as error:  # a rank that died, a network that failed, or the time limit of the group
            self._over = True
            raise DistributedError(
                f"group: rank {self.rank} of {self.ranks} cannot reach the others, one of them died or hangs; look at "
                f"their messages ({first_line(error).split('. ')[0]})"
            ) from error

    def _raise_failures(self, failures: Sequence[str]) -> None:
        """Raise, on the ranks that did not fail, what others say."""
        failed = [rank for rank, words in enumerate(failures) if words]
        if not failed:
            return
        self._over = True
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise DistributedError(f"group: rank {failed[0]} of {self.ranks} failed{others}: {failures[failed[0]]}")


def _process_group(group: Any) -> Any:
    """A torch.distributed process group that this process belongs to.

    Raises:
        OptionError: something else, or torch.distributed was not started.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise OptionError(
            "group: expected torch.distributed to be started, found that it is not; call "
            "torch.distributed.init_process_group() first (under torchrun)"
        )
    if group is True or group == "world":
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise OptionError(f'group: expected a process group, True or "world", found {group!r}')
    if dist.get_rank(group) < 0:
        raise OptionError("group: expected a group with this process in it, found one without")
    return group


def _in_words(value: Any) -> str:
    """An option as ranks compare it: numbers by a checksum, all else as it is written."""
    value = getattr(value, "potential", value)
    if value is None or isinstance(value, (str, bool, int, float, np.number)):
        return repr(float(value)) if isinstance(value, (float, np.floating)) else repr(value)
    parts = value if isinstance(value, (tuple, list)) else [value]
    raw = b""
    count = 0
    for part in parts:
        numbers = np.asarray(part.detach().cpu().numpy() if hasattr(part, "detach") else part, np.float64)
        raw += numbers.tobytes()
        count += numbers.size
    return f"{count} numbers of checksum {zlib.crc32(raw):08x}"


def _ranks(ranks: Sequence[int]) -> str:
    words = ", ".join(str(rank) for rank in ranks[:NAMED]) + (", ..." if len(ranks) > NAMED else "")
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"


def _by_value(values: Sequence[Any]) -> str:
    """What was found where, in words."""
    found: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(str(value), []).append(rank)
    return ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in list(found.items())[:NAMED])


def _difference(options: Sequence[Mapping[str, Any]]) -> Exception | None:
    for name in options[0]:
        values = [given.get(name) for given in options]
        if any(value != values[0] for value in values):
            remedy = (
                "set SELA_CPU_ISA to the same on all, and use one kind of device" if name == "backend" else "make it so"
            )
            return OptionError(
                f"{name}: expected the same on all ranks of the group, found {_by_value(values)}; {remedy}"
            )
    return None


def _misaligned(rows: Sequence[int]) -> Exception | None:
    ends = np.cumsum(rows)
    bad = [rank for rank, end in enumerate(ends) if end < ends[-1] and end % ROWS_TOGETHER]
    if not bad:
        return None
    held = ", ".join(str(rows[rank]) for rank in bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
    return OptionError(
        f"group: expected all shards but the last to end at a multiple of {ROWS_TOGETHER} rows of the whole matrix, "
        f"found {held} rows on {_ranks(bad)}, which end elsewhere; cut them by sela_ext.shard_rows(rows, ranks, rank)"
    )
