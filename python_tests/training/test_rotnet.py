import json

import numpy as np
import pytest
import torch
from torch import nn

import sela_ext
from sela_ext.errors import OptionError
from sela_ext.models import Heads
from sela_ext.training.plan import _TRIALS
from sela_ext.training.recipes.rotations import four_rotations, tell_rotations
from sela_ext.training.recipes.sela import SelaRecipe

TINY = {
    "epochs": 2,
    "batch_size": 32,
    "clusters": [4, 3],
    "projection": 0,
    "model": "small-resnet",
    "threads": 1,
    "progress": False,
    "log_every": 1,
    "holdout": 20,
}


class Flat(nn.Module):
    """A network in which images do not meet: no batch norm, no dropout."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3 * 32 * 32, 8)

    def forward(self, images):
        return torch.relu(self.inner(images.flatten(1)))


def lit_from_above(count=116, height=32, width=32, channels=3, seed=0):
    """Noise that gets brighter upwards, so that anyone can tell which side is up."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 40, (count, height, width, channels))
    return (noise + np.linspace(200, 0, height).reshape(1, -1, 1, 1)).astype(np.uint8)


def events(out, kind):
    return [e for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


@pytest.mark.parametrize(("batch", "channels", "side"), [(1, 1, 1), (3, 1, 31), (2, 3, 33)])
def test_the_four_rotations_are_quarter_turns_of_all_images_one_after_the_other(batch, channels, side):
    images = torch.rand(batch, channels, side, side)
    turned = four_rotations(images)
    assert turned.shape == (4 * batch, channels, side, side)
    for turns, part in enumerate(turned.split(batch)):
        assert torch.equal(part, torch.rot90(images, turns, (2, 3)))
    assert torch.equal(four_rotations(turned)[7 * batch : 8 * batch], torch.rot90(turned[3 * batch :], 1, (2, 3)))
    assert turned.is_contiguous(memory_format=torch.channels_last)


def test_images_that_are_not_square_have_no_four_rotations():
    with pytest.raises(ValueError, match=r"square images, found \(4, 5\)"):
        four_rotations(torch.zeros(2, 3, 4, 5))


def test_the_loss_of_the_rotations_is_the_mean_over_all_four_of_every_image():
    embeddings = torch.randn(12, 5, requires_grad=True)
    layer = nn.Linear(5, 4)
    loss, parts = tell_rotations(layer, embeddings)
    log_p = torch.log_softmax(layer(embeddings), 1)
    expected = -sum(log_p[turn * 3 + i, turn] for turn in range(4) for i in range(3)) / 12
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    right = [int(log_p[row].argmax()) == row // 3 for row in range(12)]
    assert parts["rotation_accuracy"].item() == pytest.approx(np.mean(right))
    assert not parts["rotation_loss"].requires_grad
    perfect = torch.eye(4).repeat_interleave(3, 0)
    assert tell_rotations(nn.Identity(), perfect)[1]["rotation_accuracy"] == 1


def test_label_heads_see_the_images_as_they_are_and_the_losses_add_up(tmp_path, monkeypatch):
    seen = []
    forward = Heads.forward
    monkeypatch.setattr(Heads, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    options = {**TINY, "model": Flat, "half_resolution": 0.0, "precision": "float32", "epochs": 1, "init": "random"}
    for name, rotnet in (("plain", False), ("turned", True)):
        torch.manual_seed(0)
        sela_ext.train(
            lit_from_above(), out=tmp_path / name, rotnet=rotnet, label_passes=0, label_source="eval", **options
        )
    plain, turned = events(tmp_path / "plain", "step"), events(tmp_path / "turned", "step")
    assert set(seen) - set(_TRIALS) == {32}  # _TRIALS: of the memory plan
    assert turned[0]["loss"] - turned[0]["rotation_loss"] == pytest.approx(plain[0]["loss"], abs=1e-5)
    assert turned[-1]["loss"] - turned[-1]["rotation_loss"] != pytest.approx(plain[-1]["loss"], abs=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_rotations_are_learnt_beside_labels_that_change_and_labels_that_do_not(tmp_path, fixed):
    images = lit_from_above()
    given = {"fixed_labels": np.arange(len(images)) % 3} if fixed else {"clusters": [4, 3]}
    options = {name: value for name, value in TINY.items() if name != "clusters"}
    result = sela_ext.train(
        images, out=tmp_path / "run", rotnet=True, augment="flip", **{**options, **given, "epochs": 12, "lr": 0.02}
    )
    assert result.metrics["rotation_accuracy"] > 0.95
    steps = events(tmp_path / "run", "step")
    assert all(0 <= step["rotation_accuracy"] <= 1 for step in steps)
    assert steps[-1]["rotation_accuracy"] > steps[0]["rotation_accuracy"]
    assert events(tmp_path / "run", "end")[0]["rotation_accuracy"] == result.metrics["rotation_accuracy"]
    assert bool(events(tmp_path / "run", "label_pass")) is not fixed
    if fixed:
        held = result.labels[0] != np.arange(len(images)) % 3
        assert held.sum() <= 20


def test_without_rotnet_nothing_is_turned(tmp_path):
    result = sela_ext.train(lit_from_above(), out=tmp_path / "run", **{**TINY, "epochs": 1})
    assert result.network.rotation is None
    assert "rotation_accuracy" not in result.metrics
    assert "rotation_loss" not in events(tmp_path / "run", "step")[0]


@pytest.mark.parametrize(("height", "width", "channels"), [(24, 16, 3), (16, 31, 1)])
def test_oblong_and_grey_images_do(tmp_path, height, width, channels):
    images = lit_from_above(height=height, width=width, channels=channels)
    result = sela_ext.train(images, out=tmp_path / "run", rotnet=True, **{**TINY, "epochs": 1})
    assert 0 <= result.metrics["rotation_accuracy"] <= 1


@pytest.mark.parametrize("fixed", [False, True])
def test_a_broken_run_resumes_to_the_same_bits(tmp_path, monkeypatch, fixed):
    images = lit_from_above()
    options = {**TINY, "rotnet": True, "checkpoint_seconds": 0.0, "log_every": 2}
    if fixed:
        options.update(fixed_labels=np.stack([np.arange(len(images)) % 3] * 2), clusters="auto")
    whole = sela_ext.train(images, out=tmp_path / "whole", **options)

    class StoppedError(Exception):
        pass

    after_step = SelaRecipe.after_step

    def stop(self, batch, output):
        after_step(self, batch, output)
        if self.run.state["step"] == 4:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(SelaRecipe, "after_step", stop)
        with pytest.raises(StoppedError):
            sela_ext.train(images, out=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "labels.npz").exists()
    resumed = sela_ext.train(images, out=tmp_path / "run", resume=True, **options)
    assert np.array_equal(whole.labels, resumed.labels)
    assert np.array_equal(whole.confidence, resumed.confidence)
    state, other = whole.network.state_dict(), resumed.network.state_dict()
    assert {"rotation.weight", "rotation.bias"} <= set(state)
    assert all(torch.equal(state[name], other[name]) for name in state)
    clock = ("seconds", "per_second", "wait")
    for one, two in zip(events(tmp_path / "whole", "step"), events(tmp_path / "run", "step"), strict=True):
        assert {k: v for k, v in one.items() if not any(word in k for word in clock)} == {
            k: v for k, v in two.items() if not any(word in k for word in clock)
        }


def test_the_layer_is_kept_with_the_network(tmp_path):
    out = tmp_path / "run"
    result = sela_ext.train(lit_from_above(), out=out, rotnet=True, **{**TINY, "epochs": 1})
    network, _ = sela_ext.load_released(out)
    assert torch.equal(network.rotation.weight, result.network.rotation.weight)
    assert torch.equal(network.rotation.bias, result.network.rotation.bias)
    checkpoint = max((out / "checkpoints").glob("*.ckpt"))
    images = lit_from_above(seed=1)
    assert np.array_equal(sela_ext.embed(out, images), sela_ext.embed(checkpoint, images))


def test_what_cannot_be_turned_is_refused(tmp_path):
    for options in ({"method": "deepcluster"}, {"method": "sela-v2"}):
        with pytest.raises(OptionError, match=r"rotnet: expected method sela or kmeans|method: .* not available"):
            sela_ext.train("digits", out=tmp_path / "run", rotnet=True, **options)
    with pytest.raises(OptionError, match=r"rotnet: expected one view|crops: .* not available"):
        sela_ext.train("digits", out=tmp_path / "run", rotnet=True, crops="2x32")
    assert not (tmp_path / "run").exists()
