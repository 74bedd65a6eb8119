"""Started by test_ranks.py: some ranks that meet, work, and do what the second argument says."""

import os
import signal
import sys
import time

import torch

from sela_ext import errors
from sela_ext.training.launch import launch
from sela_ext.training.ranks import Ranks


def work(what, victim, when, timeout, silence):
    with Ranks.join(torch.device("cpu"), timeout=timeout, silence=silence) as ranks:
        print(f"rank {ranks.rank} is process {os.getpid()}", flush=True)
        rows = ranks.gather_rows(torch.full((ranks.rank + 1, 2), float(ranks.rank)))
        total = ranks.totals([1.0])[0]
        ranks.must_agree("options", {"lr": 0.1, "seed": 1 if what == "differ" and ranks.rank == victim else 0})
        for step in range(40 if what != "nothing" else 3):
            if step == when and ranks.rank == victim:
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
                elif what == "busy":  # gone while the others compute, far from any collective
                    os.kill(os.getpid(), signal.SIGKILL)
            if what == "busy" and step == when:
                time.sleep(1000)
            ranks.barrier()
            time.sleep(0.05)
        return [len(part) for part in rows], total, ranks.broadcast({"from": ranks.rank})


if __name__ == "__main__":
    ranks, what, victim, when, timeout, silence = sys.argv[1:]
    arguments = (what, int(victim), int(when), float(timeout), float(silence))
    try:
        if os.environ.get("WORLD_SIZE"):
            print("result", work(*arguments), flush=True)
        else:
            print("result", launch(work, arguments, int(ranks)), flush=True)
    except errors.SelaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
