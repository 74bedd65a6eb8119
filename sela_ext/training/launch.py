"""`devices=n`: a run of several processes on this machine, started from one."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

from sela_ext import errors
from sela_ext.errors import DistributedError, SelaError

# Seconds that ranks get to end by themselves once one of them failed, and after a signal asked them to.
_PATIENCE = 8.0
_SIGNAL_PATIENCE = 9.0


def launch(work: Callable[..., Any], arguments: tuple[Any, ...], ranks: int) -> Any:
    """Call `work(*arguments)` in `ranks` new processes that can meet by `Ranks.join`.

    Args:
        work: a function of a module; what it returns on rank 0 is sent back.
        arguments: of every call; they must pickle.
        ranks: number of processes; rank r sees RANK = LOCAL_RANK = r.

    Returns:
        What rank 0 returned.

    Raises:
        DistributedError: a rank was killed, or failed in a way that is no error of this package; names the rank.
        SelaError: the first error of a rank, of its own kind.
        KeyboardInterrupt, SystemExit: a signal ended the ranks.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=60), wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    environment = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is ours: rank 0 must not open another
    }
    processes: list[BaseProcess] = []
    pipes: list[multiprocessing.connection.Connection] = []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(
                target=_rank_main, args=(work, arguments, own, theirs), name=f"sela rank {rank}", daemon=False
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _supervise(processes, pipes)
    finally:
        _end(processes, 0.0)
        del store


def _supervise(processes: list[BaseProcess], pipes: list[multiprocessing.connection.Connection]) -> Any:
    """Wait for all ranks; the first that fails is whom the error names."""
    told: dict[int, Mapping[str, Any]] = {}
    try:
        running = dict(enumerate(processes))
        while running:
            open_pipes = {id(pipes[rank]): rank for rank in range(len(pipes)) if rank not in told}
            handles: list[Any] = [pipes[rank] for rank in open_pipes.values()]
            ready = multiprocessing.connection.wait([*handles, *(one.sentinel for one in running.values())], timeout=1)
            for handle in ready:
                rank = open_pipes.get(id(handle))
                if rank is not None:
                    try:
                        told[rank] = pickle.loads(pipes[rank].recv_bytes())
                    except (EOFError, OSError):
                        told[rank] = {}
            for rank in [rank for rank, process in running.items() if process.exitcode is not None]:
                process = running.pop(rank)
                if rank not in told:
                    told[rank] = pickle.loads(pipes[rank].recv_bytes()) if pipes[rank].poll() else {}
                if process.exitcode != 0:
                    deadline = time.monotonic() + _PATIENCE
                    _end(list(running.values()), deadline - time.monotonic())
                    for other in running:
                        if other not in told and pipes[other].poll():
                            try:
                                told[other] = pickle.loads(pipes[other].recv_bytes())
                            except (EOFError, OSError):
                                told[other] = {}
                    raise _error(rank, process.exitcode, told, len(processes))
    except (KeyboardInterrupt, SystemExit):
        # The terminal sent the signal to the ranks as well; one that only this process got is passed on.
        for process in processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGTERM)
        _end(processes, _SIGNAL_PATIENCE)
        raise
    return told[0].get("result")


def _error(
    rank: int, status: int | None, told: Mapping[int, Mapping[str, Any]], ranks: int
) -> SelaError | KeyboardInterrupt | SystemExit:
    """The error of the whole run: the first cause, which a rank that ended because of another does not have."""
    by_cause = sorted(told.items(), key=lambda item: (item[1].get("error") in (None, "DistributedError"), item[0]))
    for who, words in by_cause:
        name = words.get("error")
        if name is not None and isinstance(getattr(errors, name, None), type):
            message = str(words["message"])
            if words.get("of_all_ranks"):
                found: SelaError = getattr(errors, name)(message)
                return found
            if name == "DistributedError":
                return DistributedError(message)
            return DistributedError(message if message.startswith("rank ") else f"rank {who} of {ranks}: {message}")
        if name is not None and status not in (130, 143):
            trace = str(words.get("trace", ""))
            return DistributedError(f"rank {who} of {ranks} failed: {words['message']}\n{trace}".strip())
    if status in (130, -signal.SIGINT):
        return KeyboardInterrupt()
    if status in (143, -signal.SIGTERM):
        return SystemExit(143)
    how = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
    return DistributedError(f"rank {rank} of {ranks} {how}; continue from the last checkpoint with resume")


def _end(processes: list[BaseProcess], patience: float) -> None:
    """Wait for processes to end, then kill what is left."""
    end = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join(5)


def _rank_main(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    pipe: multiprocessing.connection.Connection,
) -> None:
    os.environ.update(environment)
    status = 0
    try:
        pipe.send_bytes(pickle.dumps({"result": work(*arguments)}))  # torch's own way would need us to live on
    except SelaError as error:
        _tell(pipe, {"error": type(error).__name__, "message": str(error), "of_all_ranks": error.of_all_ranks})
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        words = {"error": "unforeseen", "message": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        _tell(pipe, words)
        status = DistributedError.exit_code
    raise SystemExit(status)


def _tell(pipe: multiprocessing.connection.Connection, words: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # whoever started us is gone
        pipe.send_bytes(pickle.dumps(words))
