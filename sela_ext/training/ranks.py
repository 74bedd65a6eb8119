"""The processes of a run: who they are, how they meet, and what they tell each other.

One process per device, started by torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT), or by `sela_ext.training.launch` for `devices=n`. A run of one process goes through the same code, and
exchanges nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sela_ext.errors import DistributedError
from sela_ext.training.heartbeat import Heartbeat, connect, open_store

# What torchrun sets, and this package reads.
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The ranks of a run, as one of them sees it.

    Attributes:
        rank: this process, 0 .. world_size - 1.
        world_size: number of processes.
        local_rank: this process among those of its machine.
        group: the group of all ranks; None with one process.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, group: Any = None) -> None:
        self.rank, self.world_size, self.local_rank, self.group = rank, world_size, local_rank, group
        self._heartbeat: Heartbeat | None = None

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
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend,
                store=open_store(address, port, rank, world_size, timeout),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
                device_id=device if backend == "nccl" else None,
            )
            ranks = cls(rank, world_size, local, dist.group.WORLD)
            ranks._heartbeat = Heartbeat(connect(address, port, silence), rank, world_size, silence=silence)
            dist.barrier()
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
        instead = self._heartbeat.verdict(error) if error is not None else None
        self._heartbeat.close(failed=error is not None)
        if error is None:
            dist.destroy_process_group()
        elif instead is not None:
            raise instead from error

    @property
    def first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """What rank 0 holds: any object that pickles."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What every rank holds, by rank: any object that pickles; small ones."""
        if self.group is None:
            return [value]
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, value)
        return parts

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """The rows [n_r, ...] of every rank, by rank; numbers of rows may differ.

        Every rank must hold the same type and the same shape of a row.
        """
        if self.group is None:
            return [rows]
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)], dtype=torch.int64, device=rows.device))
        most = int(max(count.item() for count in counts))
        padded = torch.zeros((most, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return [part[: int(count.item())] for part, count in zip(parts, counts, strict=True)]

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
            raise DistributedError(
                f"expected the same {what} on all {self.world_size} ranks, found others: {' | '.join(problems[:3])}; "
                "start every rank with the same command, and have them see the same files"
            )


def world_size_of_environment() -> int:
    """Number of ranks that this process was started as one of.

    Raises:
        DistributedError: WORLD_SIZE is no number.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise DistributedError(f"WORLD_SIZE: expected a number of ranks >= 1, found {text!r}; start with torchrun")
    return int(text)


def put_together(parts: Sequence[Tensor], rows: Sequence[Tensor], like: np.ndarray[Any, Any]) -> None:
    """Write what ranks hold of some rows, [n_r] each with its numbers [n_r], into the last axis of an array."""
    for part, where in zip(parts, rows, strict=True):
        like[..., where.cpu().numpy()] = part.cpu().numpy().astype(like.dtype)
