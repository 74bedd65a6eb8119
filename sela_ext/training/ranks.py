"""The processes of a run: who they are, how they meet, and what they tell each other.

One process per device, started by torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT), or by `sela_ext.training.launch` for `devices=n`. A run of one process goes through the same code, and
exchanges nothing.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sela_ext import errors
from sela_ext.errors import DistributedError, OptionError, SelaError
from sela_ext.training.heartbeat import Heartbeat, connect, open_store

Found = TypeVar("Found")

# Bytes that go from rank to rank at once, where all of one rank's are wanted by others.
_PIECE = 1 << 28
# Seconds between looks at whether the first rank is done with what it does alone.
_LOOK = 0.05
# What torchrun sets, and this package reads.
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The ranks of a run, as one of them sees it.

    Attributes:
        rank: this process, 0 .. world_size - 1.
        world_size: number of processes.
        local_rank: this process among those of its machine.
        local_world_size: number of these.
        group: the group of all ranks; None with one process.
        device: where what the group carries must lie.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        group: Any = None,
        device: torch.device | None = None,
        local_world_size: int = 1,
    ) -> None:
        self.local_world_size = local_world_size
        self.device = device or torch.device("cpu")
        self.rank, self.world_size, self.local_rank, self.group = rank, world_size, local_rank, group
        self._heartbeat: Heartbeat | None = None
        self._control: Any = None  # of gloo whatever the devices are: for small things that the processor asks for
        self._store: Any = None
        self._alone = 0  # how many things the first rank has done alone
        self._agreed_to_leave = False

    @classmethod
    def join(cls, device: torch.device, *, timeout: float, silence: float) -> Ranks:
        """Meet the other ranks that the environment speaks of; alone without any.

        Args:
            device: of this rank; NCCL carries the messages between CUDA devices, gloo all others.
            timeout: seconds after which a collective that a rank does not come to is an error.
            silence: seconds after which a rank that is not heard of counts as gone.

        Raises:
            DistributedError: the environment is incomplete, or not all ranks came in time.
        """
        world_size = world_size_of_environment()
        if world_size == 1:
            return cls()
        missing = [name for name in _NEEDED if not os.environ.get(name)]
        if missing:
            raise DistributedError(
                f"WORLD_SIZE is {world_size}, but {', '.join(missing)} not set; start the ranks with torchrun "
                "--nproc-per-node N -m sela_ext train ..."
            )
        rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "nccl":
            device = torch.device("cuda", device_number(local, torch.cuda.device_count()))
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                backend,
                store=open_store(address, port, rank, world_size, timeout),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
                device_id=device if backend == "nccl" else None,
            )
            ranks = cls(rank, world_size, local, dist.group.WORLD, device if backend == "nccl" else None, here)
            ranks._heartbeat = Heartbeat(connect(address, port, silence), rank, world_size, silence=silence)
            ranks._store = connect(address, port)
            ranks._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            dist.barrier(group=ranks._control)
            ranks._heartbeat.meet()
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"rank {rank} of {world_size} on {socket.gethostname()}: not all ranks met at {address}:{port} within "
                f"{timeout:g} s ({str(error).splitlines()[0]}); check that every rank started and sees that address"
            ) from error
        return ranks

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the group; an error is told to the others, and theirs to us.

        Raises:
            DistributedError: a collective failed because of another rank, which is named.
        """
        if self._heartbeat is None:
            return
        together = self._agreed_to_leave or (isinstance(error, SelaError) and error.of_all_ranks)
        failed = error is not None and not together
        instead = self._heartbeat.verdict(error) if error is not None and failed else None
        self._heartbeat.close(failed=failed)
        if not failed:
            # Threads of gloo that the end of Python finds at work abort it. They end with the groups, and those with
            # whatever refers to them: first what others hold, since only the groups' own end lets the threads finish.
            gc.collect()
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
            self.group = self._control = self._store = None
        elif instead is not None:
            raise instead from error

    @property
    def first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others to speak to; none in a dry run of several."""
        return self.group is not None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self._control)

    def leave_together(self) -> None:
        """All ranks end now, as a signal wants: that is nobody's failure."""
        self.barrier()
        self._agreed_to_leave = True

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all ranks of each number; the same bits on every rank."""
        if self.group is None:
            return list(numbers)
        told = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(told, group=self._control)
        found: list[float] = told.tolist()
        return found

    def least(self, number: float) -> float:
        """The smallest of all ranks' numbers."""
        if self.group is None:
            return number
        told = torch.tensor([number], dtype=torch.float64)
        dist.all_reduce(told, op=dist.ReduceOp.MIN, group=self._control)
        return float(told[0])

    def broadcast(self, value: Found) -> Found:
        """What rank 0 holds: any object that pickles."""
        if self.group is None:
            return value
        box = [value if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self._control)
        found: Any = box[0]
        return found  # type: ignore[no-any-return]

    def broadcast_bytes(self, data: bytes | None) -> bytes | None:
        """Bytes that rank 0 holds, of any number, or None."""
        if self.group is None:
            return data
        size = self.broadcast(None if data is None else len(data))
        if size is None:
            return None
        whole = torch.empty(size, dtype=torch.uint8)
        if self.first and data is not None and size:
            whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for start in range(0, size, _PIECE):
            dist.broadcast(whole[start : start + _PIECE], src=0, group=self._control)
        return whole.numpy().tobytes()

    @torch.no_grad()
    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank what rank 0 holds in these tensors, in place."""
        if self.group is None:
            return
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, src=0)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)

    def gather(self, value: Found) -> list[Found]:
        """What every rank holds, by rank: any object that pickles; small ones."""
        if self.group is None:
            return [value]
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, value, group=self._control)
        return parts

    def together(self, work: Callable[[], Found]) -> Found:
        """Do something on every rank that may fail: where it fails on one, all raise that error.

        Args:
            work: exchanges nothing with other ranks.

        Raises:
            SelaError: of the first rank that has one, of the same kind on all.
        """
        if self.group is None:
            return work()
        problem: SelaError | None = None
        try:
            found = work()
        except SelaError as error:
            problem = error
        told = self.gather(None if problem is None else (type(problem).__name__, str(problem)))
        failed = [rank for rank, words in enumerate(told) if words is not None]
        if not failed:
            return found
        name, message = told[failed[0]]  # type: ignore[misc]
        alike = len(set(told)) == 1 or failed == [0]
        kind: type[SelaError] = getattr(errors, name)
        raised = kind(message if alike else f"rank {failed[0]} of {self.world_size}: {message}")
        raised.of_all_ranks = True
        raise raised from problem

    def lead(self, work: Callable[[], Found]) -> Found:
        """Have rank 0 do something alone, and give every rank what came of it: any object that pickles.

        The others wait as long as it takes: no collective is under way whose time could run out.
        """
        if self.group is None:
            return work()
        self._alone += 1
        key = f"alone/{self._alone}"
        found: Any = None
        if self.first:
            found = work()
            self._store.set(key, "done")
        while not self._store.check([key]):
            time.sleep(_LOOK)
        found = self.broadcast(found)
        return found  # type: ignore[no-any-return]

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """The rows [n_r, ...] of every rank, by rank; numbers of rows may differ.

        Every rank must hold the same type and the same shape of a row.
        """
        if self.group is None:
            return [rows]
        counts = self.gather(len(rows))
        most = max(counts)
        padded = torch.zeros((most, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather([_bytes_of(part) for part in parts], _bytes_of(padded))
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def rows_to_first(self, rows: Tensor) -> Iterator[Tensor]:
        """The rows [n_r, ...] of every rank, on rank 0 and one rank after the other; nothing on the other ranks.

        Rank 0 holds those of one rank at a time besides its own. All ranks must go through to the end.
        """
        if self.group is None:
            yield rows
            return
        counts = self.gather(len(rows))
        step = max(1, _PIECE // max(1, _row_bytes(rows)))  # the same on all ranks, those without rows too
        if not self.first:
            for start in range(0, len(rows), step):
                dist.send(_bytes_of(rows[start : start + step].contiguous()), 0)
            return
        yield rows
        for rank in range(1, self.world_size):
            theirs = torch.empty((counts[rank], *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
            for start in range(0, counts[rank], step):
                dist.recv(_bytes_of(theirs[start : start + step]), rank)
            yield theirs

    def deal(self, rows: Tensor, target: Tensor) -> Tensor:
        """Send rows to the ranks that they are for.

        Args:
            rows: [n, ...]; the same type and shape of a row on every rank.
            target: int64 [n], the rank of each.

        Returns:
            The rows that are for this rank, [m, ...]: rank 0's first, each rank's in its order.
        """
        if self.group is None:
            return rows
        order = torch.argsort(target, stable=True)
        counts = torch.bincount(target, minlength=self.world_size).cpu()
        table = torch.stack(self.gather(counts))  # [from, to]
        width = _row_bytes(rows)
        incoming = table[:, self.rank].tolist()
        found = torch.empty((sum(incoming), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        dist.all_to_all_single(
            _bytes_of(found),
            _bytes_of(rows[order].contiguous()),
            [count * width for count in incoming],
            [count * width for count in counts.tolist()],
        )
        return found

    def must_agree(self, what: str, value: dict[str, Any]) -> None:
        """Check that all ranks hold the same.

        Raises:
            DistributedError: on every rank; says which ranks differ from rank 0, and in what.
        """
        parts = self.gather(value)
        problems = []
        for rank, part in enumerate(parts):
            names = [name for name in sorted({*part, *parts[0]}) if part.get(name) != parts[0].get(name)]
            if names:
                shown = "; ".join(f"{name}: {part.get(name)!r}, on rank 0 {parts[0].get(name)!r}" for name in names[:5])
                problems.append(f"rank {rank} has {shown}")
        if problems:
            error = DistributedError(
                f"expected the same {what} on all {self.world_size} ranks, found others: {' | '.join(problems[:3])}; "
                "start every rank with the same command, and have them see the same files"
            )
            error.of_all_ranks = True
            raise error


def device_number(local_rank: int, devices: int) -> int:
    """The CUDA device of a rank, by its number among those of its machine; the only one where each sees its own.

    Raises:
        OptionError: there are fewer devices than ranks.

    Example:
        >>> device_number(2, 4), device_number(2, 1)
        (2, 0)
    """
    if devices > 1 and local_rank >= devices:
        raise OptionError(
            f"devices: expected a CUDA device for every rank of this machine, found {devices} and rank {local_rank} of "
            "it; start fewer ranks, or use device cpu"
        )
    return local_rank if devices > 1 else 0


def world_size_of_environment() -> int:
    """Number of ranks that this process was started as one of.

    Raises:
        DistributedError: WORLD_SIZE is no number.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise DistributedError(f"WORLD_SIZE: expected a number of ranks >= 1, found {text!r}; start with torchrun")
    return int(text)


def _row_bytes(rows: Tensor) -> int:
    """Bytes of one row of [n, ...], n >= 0."""
    return math.prod(rows.shape[1:]) * rows.element_size()


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, uint8 [bytes]: what every backend carries."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
