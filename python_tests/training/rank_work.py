"""What the ranks of test_ranks.py do: they meet, work, and fail as they are told."""

import os
import signal
import sys
import time

import numpy as np
import torch

from sela_ext import errors
from sela_ext.training.launch import launch
from sela_ext.training.ranks import Ranks


def say(line):
    """Print a line in one piece, whoever else prints."""
    os.write(1, f"{line}\n".encode())


def fault(what):
    """What befalls the victim."""
    say(f"fault at {time.monotonic()}")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "raise":
        raise ValueError("one and one is three")
    elif what == "data":
        raise errors.DataError("image 7: expected a picture, found a poem")
    elif what == "hang":
        time.sleep(1000)


def work(what, victim, when, timeout, silence):
    """Some steps; `what` happens to rank `victim` at step `when`."""
    if what == "no option":
        raise errors.OptionError("lr: expected a number > 0, found -1")
    with Ranks.join(torch.device("cpu"), timeout=timeout, silence=silence) as ranks:
        say(f"rank {ranks.rank} is process {os.getpid()}")
        rows = ranks.gather_rows(torch.full((ranks.rank + 1, 2), float(ranks.rank)))
        ranks.must_agree("options", {"lr": 0.1, "seed": 1 if what == "differ" and ranks.rank == victim else 0})
        for step in range(when + 1):
            if step == when and what != "nothing":
                if ranks.rank == victim:
                    fault("kill" if what == "busy" else what)
                if what == "busy":  # far from any collective
                    time.sleep(1000)
            ranks.barrier()
        return [len(part) for part in rows], ranks.broadcast({"from": ranks.rank})


def save_at_a_signal(folder):
    """Work until a signal comes, and write a file before the end, as a run writes its checkpoint."""
    with Ranks.join(torch.device("cpu"), timeout=60, silence=60) as ranks:
        try:
            say(f"rank {ranks.rank} is process {os.getpid()}")
            while True:
                time.sleep(0.01)
        except (KeyboardInterrupt, SystemExit):
            time.sleep(0.5)
            with open(f"{folder}/saved by {ranks.rank}", "x"):
                raise


def describe(array, opened, shape):
    """What came of arguments: sums, type, and whether an array can be written to."""
    first = float(array.sum())
    array[0] += 1
    return first, type(opened).__name__, int(opened[3]), shape.area(), int(os.environ["RANK"]), np.asarray(array)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    try:
        if what == "save":
            launch(save_at_a_signal, (rest[0],), 2)
        elif what == "hang":
            launch(work, (what, 1, 5, 60.0, 60.0), 2)
        else:  # started by others; two runs that meet at the same store, one after the other
            say(f"result {work('nothing', 1, 5, 60.0, 60.0)}")
            say(f"result {work(what, int(rest[0]), 5, 60.0, 60.0)}")
    except errors.SelaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
