"""Runs to be killed, stopped and starved, and how they are compared; fork_server.py is how they are started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sela_ext.training.checkpoint import read_checkpoint

CLOCK = ("seconds", "per_second", "wait")
# What a kill may leave half-written: logs, which a resume cuts back, and temporaries, which the next start removes.
LOGS = ("metrics.jsonl", "metrics.csv", "train.log", ".lock")
# Whatever a machine is busy with, a run of this size is over by then.
GENEROUS = 120


@dataclass
class Started:
    """A process of the program.

    `kill` it, `wait` for its exit status, which is `known` then, read what it `printed`.
    """

    server: "Server"
    pid: int
    output: Path
    known: int | None = None

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)  # not reaped before `wait`, so the number is still its own

    def wait(self, seconds=GENEROUS):
        """Exit status, negative for a signal; None if it has not ended after `seconds`."""
        if self.known is None:
            self.known = self.server.ask({"do": "wait", "pid": self.pid, "seconds": seconds})["status"]
        return self.known

    def printed(self):
        return self.output.read_text(errors="replace")


class Server:
    """Starts the program in processes that need not import anything."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        single["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a thread of pyarrow's, which pandas brings along
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **single},
        )
        assert "ready" in json.loads(self.process.stdout.readline())

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *arguments,
        fault=None,
        environment=None,
        memory=None,
        file_size=None,
        reader="here",
        folder=None,
        same_signal=None,
        quick=True,
    ):
        """Start `sela arguments`.

        `fault`: for SELA_FAULT; `memory`: bytes of address space beyond what it has; `file_size`: of any file that it
        writes; `reader`: "here", or "gone" or "closed" for standard output; `same_signal`: seconds in which a signal
        that comes again is the same one; `quick`: without the end of the interpreter, which takes as long as a small
        run.
        """
        self.count += 1
        request = {
            "do": "start",
            "arguments": [str(word) for word in arguments],
            "printed": str(self.folder / f"{self.count}.txt"),
            "environment": {**({"SELA_FAULT": fault} if fault else {}), **(environment or {})},
            "memory": memory,
            "file_size": file_size,
            "reader": reader,
            "folder": None if folder is None else str(folder),
            "same_signal": same_signal,
            "quick": quick,
        }
        return Started(self, self.ask(request)["pid"], Path(request["printed"]))

    def run(self, *arguments, **how):
        """Start it and wait: exit status, and what it printed."""
        started = self.start(*arguments, **how)
        status = started.wait()
        if status is None:
            started.kill()
            started.wait()
        return status, started.printed()

    def start_ranks(self, ranks, *arguments, fault=None, apart=None, **how):
        """Start processes that meet as torchrun's do; `apart`: rank -> further arguments of it alone."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        places = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(
                *arguments,
                *(apart or {}).get(r, []),
                fault=fault,
                environment={name: str(value) for name, value in {**places, "RANK": r, "LOCAL_RANK": r}.items()},
                **how,
            )
            for r in range(ranks)
        ]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def clean(value):
    """A log entry without what depends on the clock."""
    if isinstance(value, dict):
        return {key: clean(one) for key, one in value.items() if not any(word in key for word in CLOCK)}
    return [clean(one) for one in value] if isinstance(value, list) else value


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def log_of(out):
    return [clean(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(one, other):
    """Labels, weights and the fields of the log that have no clock in them, bit for bit."""
    with np.load(one / "labels.npz") as a, np.load(other / "labels.npz") as b:
        assert sorted(a) == sorted(b)
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert (one / "labels.csv").read_bytes() == (other / "labels.csv").read_bytes()
    weights, others = (torch.load(out / "network.pt", weights_only=True) for out in (one, other))
    assert equal(weights, others)
    assert log_of(one) == log_of(other)
    with open(one / "metrics.csv") as a, open(other / "metrics.csv") as b:
        assert sum(1 for _ in a) == sum(1 for _ in b)


def assert_whole(out):
    """Nothing that bears its final name is half-written."""
    for path in out.rglob("*") if out.is_dir() else ():
        if path.is_dir() or path.name in LOGS or "tensorboard" in path.parts or path.suffix in (".partial", ".tmp"):
            continue
        if path.suffix == ".ckpt":
            assert read_checkpoint(path)
        elif path.name == "report.npz":
            with np.load(path) as saved:
                assert saved["tsne"].shape == saved["pca"].shape == (len(saved["index"]), 2)
        elif path.suffix == ".npz":
            with np.load(path) as saved:
                assert saved["labels"].shape == saved["confidence"].shape
        elif path.suffix == ".pt":
            assert torch.load(path, weights_only=True)["model"]
        elif path.suffix == ".json":
            assert json.loads(path.read_text())["options"]
        elif path.suffix == ".csv":
            assert path.read_bytes().endswith(b"\n")
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.name != ".writable":
            assert path.suffix == ".bin", f"{path} is no file of a run"


def assert_tidy(out):
    """No temporaries are left."""
    left = [path.name for path in out.rglob("*") if path.suffix in (".partial", ".tmp") or path.name == ".writable"]
    assert left == []


def wait_for(condition, seconds=GENEROUS):
    """Wait until something is so; says whether it came to be."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
