"""One rank of the pool that test_group.py starts: reads pickled jobs from stdin, writes pickled answers to stdout."""

import contextlib
import importlib.util
import os
import pickle
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import numpy as np


def outcome(call):
    """What a call returns, or the error and all its words; warnings beside it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = {"result": call()}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    return {**answer, "warnings": [(w.category.__name__, str(w.message), w.filename) for w in caught]}


def planted(problem, fault):
    """Makes a solve go wrong at its so-manieth pass: this process dies, memory is short, or numbers drift."""
    if fault is None:
        return contextlib.nullcontext()
    kind, left = fault["kind"], fault["after"]
    original = problem.Problem.rounded

    def rounded(self, potential):
        nonlocal left
        left -= 1
        potential = original(self, potential)
        if left != 0:
            return potential
        if kind == "exit":
            os._exit(9)
        if kind == "memory":
            raise MemoryError("no room for a pass")
        return potential + 1e-9

    return patch.object(problem.Problem, "rounded", rounded)


@contextlib.contextmanager
def card_of(job):
    """Makes tensors live on a CUDA device that the host plays."""
    if not job.get("card"):
        yield
        return
    from sela_ext.kernels import device, sinkhorn

    path = Path(__file__).parents[1] / "played_card.py"
    spec = importlib.util.spec_from_file_location("played_card", path)
    played = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(played)
    card = played.HostCard(played.HostCore())
    with (
        patch.object(device, "_usable", {card.place: card}),
        patch.object(sinkhorn, "cuda_place", lambda _: card.place),
    ):
        yield


def solve(job, group):
    import torch

    import sela_ext
    from sela_ext.assign import problem, shards

    logits = job["logits"]
    if job.get("torch"):
        logits = torch.from_numpy(logits).to(getattr(torch, job["torch"]))
    if "weight" in job:
        logits = sela_ext.FeatureLogits(logits, job["weight"])
    at_once = job.get("at_once", problem.AT_ONCE)
    backend = {"backend_of": lambda _: job["backend"]} if "backend" in job else {}
    with (
        patch.multiple(shards, **backend) if backend else contextlib.nullcontext(),
        patch.object(problem, "AT_ONCE", at_once),
        planted(problem, job.get("fault")),
        card_of(job),
    ):
        found = sela_ext.assign(logits, group=group, threads=1, **job["options"])
    fields = dict(vars(found))
    for name in ("labels", "potential", "sizes", "prices"):
        fields[name] = None if fields[name] is None else np.asarray(fields[name])
    return fields


def main():
    rank, ranks, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not mix with the answers
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timedelta(60))
    groups = {count: dist.new_group(list(range(count))) for count in range(1, ranks)}
    groups[ranks] = True
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        pickle.dump(outcome(lambda job=job: solve(job, groups[job["ranks"]])), answers)
        answers.flush()


if __name__ == "__main__":
    main()
