"""Optimisers, averages, accumulation and compilation in whole runs."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import sela_ext
from sela_ext.models import Network
from sela_ext.training.averaging import WeightAverage
from sela_ext.training.compilation import NotCompiledWarning, compile_backbone, uncompiled
from sela_ext.training.embedding import Arithmetic
from sela_ext.training.run import Run
from sela_ext.training.update import Update

TINY = {
    "batch_size": 16,
    "clusters": 4,
    "heads": 2,
    "projection": 8,
    "threads": 1,
    "progress": False,
    "half_resolution": 0.0,
    "model": lambda: Plain(),
    "image_size": 16,
    "precision": "float32",
}


class Plain(nn.Module):
    """A network without batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 5, stride=3)
        self.line = nn.Linear(6 * 16, 12)

    def forward(self, images):
        return self.line(torch.tanh(self.conv(images)).flatten(1))


def pictures(count=70):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16), dtype=np.uint8)


def kept(result):
    return torch.load(result.out / "network.pt", weights_only=True)


class StopError(Exception):
    """Ends a run in the middle."""


def stopped_and_resumed(folder, after, monkeypatch, **options):
    """A run that ends after so many batches, and is continued from the checkpoint of the batch before."""
    take, taken = Update.take, []

    def counted(self, loss):
        if len(taken) == after:
            raise StopError
        taken.append(0)
        take(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Update, "take", counted)
        with pytest.raises(StopError):
            sela_ext.train(pictures(), out=folder, checkpoint_seconds=0.0, **options)
    return sela_ext.train(pictures(), out=folder, checkpoint_seconds=0.0, resume=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "lr": 0.01, "accumulate": 3, "ema": 0.9, "lr_schedule": "linear"},
        {"optimizer": "lars", "lr_schedule": "onecycle", "ema": 0.8},
    ],
)
def test_a_run_resumes_to_the_same_bits_with_every_optimiser(tmp_path, monkeypatch, options):
    options = {**TINY, **options, "epochs": 2}
    whole = sela_ext.train(pictures(), out=tmp_path / "whole", **options)
    broken = stopped_and_resumed(tmp_path / "broken", 5, monkeypatch, **options)
    one, two = kept(whole), kept(broken)
    for part in ("backbone", "projection", "heads"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    assert np.array_equal(whole.labels, broken.labels)


def test_accumulated_batches_train_like_larger_ones(tmp_path):
    options = {**TINY, "epochs": 2, "lr": 0.05, "projection": 0, "head_kind": "linear", "init": "random"}
    split = sela_ext.train(pictures(64), out=tmp_path / "split", **{**options, "batch_size": 8}, accumulate=2)
    whole = sela_ext.train(pictures(64), out=tmp_path / "whole", **{**options, "batch_size": 16})
    single = sela_ext.train(pictures(64), out=tmp_path / "single", **{**options, "batch_size": 8})
    one, two, three = (kept(run)["backbone"] for run in (split, whole, single))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(value, three[name], atol=1e-4) for name, value in one.items())


def test_the_average_is_evaluated_and_kept(tmp_path, monkeypatch):
    averages = []
    update = WeightAverage.update
    monkeypatch.setattr(
        WeightAverage, "update", lambda self, network: (averages.append((self, network)), update(self, network))[1]
    )
    result = sela_ext.train(pictures(), out=tmp_path / "run", ema=0.9, epochs=2, **TINY)
    average, trained = averages[-1]
    assert len(averages) == average.updates == 8  # five batches of an epoch, of which the last is too short
    assert result.network is average.network
    weight = kept(result)["backbone"]["conv.weight"]
    assert torch.equal(weight, average.network.backbone.conv.weight)
    assert not torch.equal(weight, trained.backbone.conv.weight)
    logits = average.network.heads.logits_of(0, torch.zeros(1, 8))
    assert logits.shape == (1, 4)


def network_of(backbone, dimension):
    return Network(backbone, dimension, [3], channels_in=1)


def test_without_a_compiler_the_network_runs_as_it_is(monkeypatch):
    def no_compiler(self, *args, **options):
        def fail(*inputs):
            raise RuntimeError("no C++ compiler\nand more")

        self._compiled_call_impl = fail

    monkeypatch.setattr(nn.Module, "compile", no_compiler)
    network = network_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()), 2 * 36)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    arithmetic = Arithmetic(torch.device("cpu"), torch.float32)
    with pytest.warns(
        NotCompiledWarning, match="RuntimeError: no C\\+\\+ compiler; the network runs uncompiled"
    ) as seen:
        reason = compile_backbone(network, [torch.zeros(4, 1, 8, 8)], arithmetic)
    assert len(seen) == 1
    assert reason == "RuntimeError: no C++ compiler"
    assert network(torch.zeros(4, 1, 8, 8)).shape == (4, 72)
    network.zero_grad()
    assert before.keys() == network.state_dict().keys()


@pytest.mark.slow
def test_a_compiled_network_computes_the_same_under_plain_names():
    torch.manual_seed(0)
    network = network_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()), 2 * 36)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(4, 1, 8, 8)
    state = torch.get_rng_state()
    arithmetic = Arithmetic(torch.device("cpu"), torch.float32)
    assert compile_backbone(network, [images], arithmetic) == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    compiled = network(images)
    with uncompiled(network):
        plain = network(images)
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
    average = WeightAverage(network, 0.9)
    assert average.network.backbone._compiled_call_impl is None


def test_labels_of_a_batch_follow_every_label_pass(tmp_path, monkeypatch):
    found = []
    targets = Run.targets

    def compared(self, batch):
        result = targets(self, batch)
        found.append(torch.equal(result, torch.from_numpy(self.labels[:, batch.index.numpy()]).long()))
        return result

    monkeypatch.setattr(Run, "targets", compared)
    sela_ext.train(pictures(), out=tmp_path / "run", epochs=2, label_passes=4, label_spacing="linear", **TINY)
    assert len(found) == 8
    assert all(found)


def test_a_run_that_cannot_compile_goes_on_and_says_why(tmp_path, monkeypatch):
    def no_compiler(self, *args, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(nn.Module, "compile", no_compiler)
    plain = sela_ext.train(pictures(), out=tmp_path / "plain", epochs=1, **TINY)
    with pytest.warns(NotCompiledWarning, match="the network runs uncompiled"):
        result = sela_ext.train(pictures(), out=tmp_path / "run", epochs=1, compile=True, **TINY)
    reasons = json.loads((result.out / "options.json").read_text())["reasons"]
    assert reasons["compile"] == "not used: RuntimeError: no C++ compiler"
    one, two = kept(plain)["backbone"], kept(result)["backbone"]
    assert all(torch.equal(value, two[name]) for name, value in one.items())
