"""What tests of whole runs share: images that are easy to tell apart, events of a run, and runs that end on the way."""

import json

import numpy as np
import torch


def quadrants(labels, size=16):
    """Images [N, S, S, 3] with a bright quadrant, by class 0 .. 3, in noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 80, (len(labels), size, size, 3), dtype=np.uint8)
    half = size // 2
    for i, label in enumerate(labels):
        y, x = divmod(int(label), 2)
        images[i, y * half : (y + 1) * half, x * half : (x + 1) * half] += 150
    return images


def events(out, kind=None):
    """What metrics.jsonl of a run says, of one kind or of all."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event for event in found if kind in (None, event["event"])]


def without_clock(value):
    """The same without whatever a clock says."""
    if isinstance(value, dict):
        clock = ("seconds", "per_second", "wait")
        return {k: without_clock(v) for k, v in value.items() if not any(word in k for word in clock)}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


class StopError(Exception):
    """The end of a run that is to be continued."""


def stop_at(recipe, step, monkeypatch):
    """Have runs of a recipe end after so many steps."""
    usual = recipe.step

    def limited(self, batch):
        if self.run.state["step"] == step:
            raise StopError
        return usual(self, batch)

    monkeypatch.setattr(recipe, "step", limited)


def assert_same_run(one, other):
    """Two results have the same labels, network and events, bit by bit."""
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.confidence, other.confidence)
    ours, theirs = one.network.state_dict(), other.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert without_clock(events(one.out)) == without_clock(events(other.out))
