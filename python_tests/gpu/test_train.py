"""`sela train` on a device, end to end."""

import json
import math

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext.cli import main
from sela_ext.models import Heads
from sela_ext.training.labelling import label_pass, random_labels

# Torch says once per process that this mode is young: no error where warnings are errors.
SYNC_DEBUG = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")


def events(out, kind):
    return [e for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


@pytest.fixture
def data(card):
    """(data, options): digits by their recipe on a card; on a processor a few small images and a small network."""
    if not card.played:
        return "digits", {"epochs": 3}
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 4
    images = rng.integers(0, 80, (160, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        y, x = divmod(int(label), 2)
        image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] += 150
    small = {
        "model": "small-resnet",
        "epochs": 3,
        "batch_size": 32,
        "clusters": 4,
        "heads": 2,
        "projection": 16,
        "holdout": 32,
    }
    return images, {**small, "labels": labels}


def assert_whole(out, result=None, count=1797):
    """The run folder holds labels for every image, finite numbers, and passes made by the CUDA kernels."""
    with np.load(out / "labels.npz") as saved:
        labels = saved["labels"]
        assert np.isfinite(saved["confidence"]).all()
    assert labels.shape[1] == count
    assert labels.min() >= 0
    passes = events(out, "label_pass")
    assert passes
    for event in passes:
        assert {head["backend"] for head in event["heads"]} == {"cuda"}
    (end,) = events(out, "end")
    for name in ("nmi", "ami", "ari", "accuracy", "knn"):
        assert math.isfinite(end[name])
    assert end["nmi"] > 0.2
    assert all(math.isfinite(event["loss"]) for event in events(out, "step"))
    assert (out / "report.html").stat().st_size > 1000
    assert "not used" not in (out / "train.log").read_text()
    if result is not None:
        assert np.array_equal(result.labels, labels)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_network_is_trained_and_images_are_labelled(card, data, tmp_path, precision):
    if card.played and precision != "float32":
        pytest.skip("slow on a processor, and not what is tested there")
    if not card.played and precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        pytest.skip("the card has no bfloat16")
    source, options = data
    options = {
        **options,
        "device": str(card.place),
        "precision": precision,
        "progress": False,
        "threads": 1 if card.played else 2,
    }
    result = sela_ext.train(source, out=tmp_path / "run", **options)
    assert next(result.network.parameters()).device == card.place
    assert_whole(tmp_path / "run", result, 1797 if isinstance(source, str) else len(source))


def test_a_run_that_was_stopped_goes_on_where_it_was(card, data, tmp_path, monkeypatch):
    source, options = data
    options = {
        **options,
        "device": str(card.place),
        "precision": "float32",
        "progress": False,
        "threads": 1 if card.played else 2,
    }
    whole = sela_ext.train(source, out=tmp_path / "whole", **options)

    # The same run, killed by a signal after some steps.
    class Stopped(BaseException):
        pass

    from sela_ext.training import loop

    real, calls = loop.learning_rate, []

    def stop(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 9:
            raise Stopped
        return real(*arguments, **keywords)

    monkeypatch.setattr(loop, "learning_rate", stop)
    with pytest.raises(Stopped):
        sela_ext.train(source, out=tmp_path / "stopped", checkpoint_seconds=0.001, **options)
    monkeypatch.setattr(loop, "learning_rate", real)
    resumed = sela_ext.train(source, out=tmp_path / "stopped", resume=True, **options)
    assert_whole(tmp_path / "stopped", resumed, resumed.labels.shape[1])
    steps = [event["step"] for event in events(tmp_path / "stopped", "step")]
    assert steps == [event["step"] for event in events(tmp_path / "whole", "step")]
    # A convolution on a card may not repeat its bits: most labels agree then, not all.
    agreement = (resumed.labels == whole.labels).mean()
    assert agreement == 1.0 if card.played else agreement > 0.2


@pytest.mark.gpu
def test_the_command_line_takes_the_card_by_itself(cuda, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        main(["train", "--data", "digits", "--out", str(out), "--epochs", "2", "--no-progress"])
    assert caught.value.code == 0, capsys.readouterr().err
    options = json.loads((out / "options.json").read_text())
    assert options["options"]["device"].startswith("cuda")
    assert_whole(out)


def test_a_label_pass_gives_the_labels_of_the_cpu(card):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3001, 24, generator=generator)
    valid = torch.ones(3001, dtype=torch.bool)
    valid[[5, 77]] = False
    torch.manual_seed(0)
    heads = Heads(24, [10, 130], "cosine")
    previous = random_labels(3001, [10, 130], seed=0)
    options = {"lam": 25.0, "tol": 1e-4, "threads": 2}
    found = label_pass(heads.to(card.place), embeddings.to(card.place), valid.to(card.place), previous, **options)
    assert [record["backend"] for record in found.heads] == ["cuda", "cuda"]
    expected = label_pass(heads.cpu(), embeddings, valid, previous, **options)
    assert (found.labels == expected.labels).mean() > 0.99
    assert (found.labels[:, [5, 77]] == -1).all()
    np.testing.assert_allclose(found.confidence.mean(), expected.confidence.mean(), rtol=0.01)
    for head in (0, 1):
        assert np.isfinite(found.potentials[head]).all()
        assert found.heads[head]["error"] < 2e-4


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@SYNC_DEBUG
def test_a_step_waits_for_nothing(cuda, tmp_path, monkeypatch, resident, precision, optimizer):
    from sela_ext.training import loop

    real, steps = loop.turns, []

    def watched(*arguments, **keywords):
        """From the second step of an epoch to its end, whatever waits for the device is an error."""
        try:
            for number, turn in enumerate(real(*arguments, **keywords)):
                steps.append(turn.images)
                torch.cuda.set_sync_debug_mode("error" if number else "default")
                yield turn
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "turns", watched)
    options = {"epochs": 2, "label_passes": 1, "resident": resident, "precision": precision, "optimizer": optimizer}
    sela_ext.train("digits", out=tmp_path / "run", checkpoint_seconds=1e9, progress=False, threads=2, **options)
    assert len(steps) >= 8


@pytest.mark.gpu
@SYNC_DEBUG
def test_a_look_at_all_images_waits_for_nothing(cuda):
    from sela_ext.data import Augment, open_source
    from sela_ext.data.residency import ResidentImages
    from sela_ext.models import Network, build_backbone
    from sela_ext.training import embedding

    source = open_source("digits")
    backbone = build_backbone("small-resnet", channels=1, image_size=(32, 32))
    network = Network(backbone.module, backbone.feature_dim, [10], channels_in=backbone.channels_in).to(cuda.place)
    arithmetic = embedding.Arithmetic(cuda.place, torch.float32)
    kept = ResidentImages(source, cuda.place)
    kept.images()
    embedding.embed(network, source, Augment.none(32), arithmetic, batch_size=64, threads=2)  # warm
    real = embedding._looks

    def watched(*arguments):
        for number, look in enumerate(real(*arguments)):
            torch.cuda.set_sync_debug_mode("error" if number else "default")
            yield look
        torch.cuda.set_sync_debug_mode("default")

    found = []
    try:
        for resident in (kept, None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(embedding, "_looks", watched)
                options = {"batch_size": 64, "threads": 2, "resident": resident}
                found.append(embedding.embed(network, source, Augment.none(32), arithmetic, **options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found[0].embeddings, found[1].embeddings, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_another_device_than_the_first_is_used_alone(cuda, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(0)
    current = torch.cuda.current_device()
    result = sela_ext.train("digits", out=tmp_path / "run", device="cuda:1", epochs=1, progress=False, threads=2)
    assert next(result.network.parameters()).device == torch.device("cuda", 1)
    assert torch.cuda.memory_reserved(0) == before
    assert torch.cuda.current_device() == current
