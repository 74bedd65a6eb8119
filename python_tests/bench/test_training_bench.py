"""bench/training.py in parts: the plain loop, agreement before timing, the targets, and the page."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext
from sela_ext.models import Network, build_backbone

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def module(name):
    return pytest.fixture(lambda on_path: importlib.import_module(name), name=name)


performance = module("performance")
training = module("training")
training_plain = module("training_plain")
training_targets = module("training_targets")

SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}


def network_of(kind="cosine", channels=1):
    torch.manual_seed(0)
    backbone = build_backbone("small-resnet", channels=channels, image_size=(16, 16))
    return Network(
        backbone.module, backbone.feature_dim, [3, 5], projection=8, head_kind=kind, channels_in=backbone.channels_in
    )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_plain_loop_has_our_loss_and_steps_to_our_weights(training_plain, kind, channels_last):
    network = network_of(kind)
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 1), dtype=np.uint8)
    labels = torch.stack([torch.arange(12) % 3, torch.arange(12) % 5])
    loop = training_plain.PlainLoop(
        network, images, sela_ext.Augment.cifar(16), labels, 4, SGD, torch.float32, channels_last=channels_last
    )
    pictures, index = next(iter(loop.batches()))
    assert pictures.shape == (4, 1, 16, 16)
    logits = network.heads.split(network.heads(network(pictures)))
    expected = torch.stack(
        [torch.nn.functional.cross_entropy(z, t) for z, t in zip(logits, labels[:, index], strict=True)]
    ).mean()
    expected.backward()
    torch.optim.SGD(network.parameters(), **SGD).step()
    assert loop.step(pictures, index) == pytest.approx(float(expected.detach()), abs=1e-5)
    weight = torch.cat([head.weight for head in loop.network.heads])
    torch.testing.assert_close(weight, network.heads.weight, atol=1e-5, rtol=1e-4)
    assert loop.labels is labels


def test_the_plain_label_pass_is_balanced_and_agrees_with_the_solver(training_plain):
    torch.manual_seed(0)
    logits = torch.randn(501, 7)
    found = training_plain.sinkhorn(torch.log_softmax(logits, 1), 5.0, 1e-4)
    expected = sela_ext.assign(logits, lam=5.0, tol=1e-5)
    assert (found.numpy() == expected.labels.numpy()).mean() > 0.99
    images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 1), dtype=np.uint8)
    network = network_of()
    loop = training_plain.PlainLoop(
        network, images, sela_ext.Augment.cifar(16), torch.zeros(2, 10, dtype=torch.int64), 4, SGD, torch.float32
    )
    seen = loop.collect()
    assert seen.shape == (10, 8)
    assert loop.network.training
    assert loop.solve(seen, 5.0, 1e-2).shape == (2, 10)


def test_files_and_colours_are_read_and_normalised(training_plain, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((40, 50, 3), 255, np.uint8)).save(path)
    augment = sela_ext.Augment.sela(32)
    transform = training_plain.transform_of(augment, train=False, crop=True)
    image, index = training_plain.Pictures([str(path)], transform)[0]
    assert (image.shape, index) == ((3, 32, 32), 0)
    expected = [(1 - m) / s for m, s in zip(augment.mean, augment.std, strict=True)]
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def tiny_run(training, tmp_path):
    bench = training.Bench(tmp_path, True, "quick", 1)
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 1), dtype=np.uint8)
    options = {"clusters": 4, "heads": 2, "batch_size": 16, "projection": 8, "precision": "float32"}
    return bench, images, training.prepared(bench, "run", images, **options)


def test_a_case_is_checked_timed_and_kept_in_rows(training, training_targets, tmp_path, monkeypatch):
    bench, images, prepared = tiny_run(training, tmp_path)
    with prepared as ours:
        plain = training.steps_of(bench, training_targets.SMALL, ours, list(images), batches=2, rounds=1, crop=False)
        monkeypatch.setattr(training, "PLAIN_IMAGES", 40)
        training.shares_of(bench, training_targets.SMALL, ours, plain, batches=2, evaluation=False)
        assert len(plain.seen) == 40
    rates = [row for row in bench.rows if row["question"] == "rate"]
    parts = {(row["part"], row["what"]) for row in rates}
    everybody = (training_targets.OURS, training_targets.PLAIN, training_targets.PLAIN_LAST)
    assert parts == {
        (part, what) for part in (training_targets.WHOLE, training_targets.COMPUTE) for what in everybody
    } | {
        (training_targets.DATA, training_targets.OURS),
        (training_targets.DATA, training_targets.PLAIN),
    }
    assert all(row["images_per_second"] > 0 and row["loss_difference"] <= training.AGREE for row in rates)
    shares = {(row["part"], row["what"]): row for row in bench.rows if row["question"] == "share"}
    assert {
        (training_targets.WAIT, training_targets.OURS),
        (training_targets.LABELS, training_targets.OURS),
        (training_targets.SOLVER, training_targets.OURS),
    } <= set(shares)
    label, solver = (
        shares[training_targets.LABELS, training_targets.OURS],
        shares[training_targets.SOLVER, training_targets.OURS],
    )
    assert 0 <= solver["seconds"] <= label["seconds"]
    assert label["share"] == pytest.approx(label["seconds"] / label["epoch_seconds"])
    assert (
        shares[training_targets.LABELS, training_targets.PLAIN]["seconds"]
        >= shares[training_targets.SOLVER, training_targets.PLAIN]["seconds"]
    )
    json.dumps(bench.rows)


def test_nothing_is_timed_where_the_losses_differ(training, training_targets, tmp_path, monkeypatch):
    bench, images, prepared = tiny_run(training, tmp_path)
    loss = training.PlainLoop.loss
    monkeypatch.setattr(training.PlainLoop, "loss", lambda self, *given: loss(self, *given) + 0.01)
    with prepared as ours, pytest.raises(training.DisagreementError, match="found a difference of 0\\.01"):
        training.steps_of(bench, training_targets.SMALL, ours, list(images), batches=1, rounds=1, crop=False)
    assert bench.rows == []


def made_rows(training_targets, time="2026-01-02T00:00:00+00:00", rate=200.0, mode="full"):
    machine = dict.fromkeys(("cpu", "isa", "compiler", "torch", "torchvision", "python", "sela_ext"), "x")
    machine |= {"cores": 2, "memory_gib": 8.0, "load": 0.1}
    base = {
        "time": time,
        "machine": machine,
        "mode": mode,
        "threads": 1,
        "clock": "processor",
        "case": training_targets.SMALL,
    }
    about = {"network": "small-resnet", "precision": "bfloat16", "batch_size": 256, "image_size": 32}
    rates = [
        {**base, **about, "question": "rate", "part": training_targets.WHOLE, "what": what, "images_per_second": value}
        for what, value in (
            (training_targets.OURS, rate),
            (training_targets.PLAIN, 80.0),
            (training_targets.PLAIN_LAST, 100.0),
        )
    ]
    share = {"images": 20_000, "heads": 12, "epoch_seconds": 10.0, "what": training_targets.OURS, "question": "share"}
    shares = [
        {**base, **share, "part": part, "seconds": 10 * value, "share": value}
        for part, value in (
            (training_targets.WAIT, 0.001),
            (training_targets.LABELS, 0.03),
            (training_targets.SOLVER, 0.025),
        )
    ]
    return rates + shares


def test_the_targets_are_read_off_the_rows(training_targets):
    table = {line[0]: line for line in training_targets.lines(made_rows(training_targets))}
    assert table["a step at 32 px, beside the faster plain loop"][3:5] == ("2x", "gate")
    assert table["label pass from the bank, of an epoch at 32 px"][3:5] == ("3%", "gate")
    assert table["solver, of an epoch at 32 px"][4] == "not met"
    assert table["waiting for images at 224 px"][4] == "not in this run"


def test_the_page_shows_the_latest_full_run(performance, training_targets, tmp_path):
    makers = (*performance.SOLVER, *performance.IMAGES, *performance.TRAINING)
    text = "\n".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in makers)
    assert performance.filled(text, tmp_path).count(performance.NOTHING) == len(makers)
    rows = made_rows(training_targets) + made_rows(training_targets, "2026-01-03T00:00:00+00:00", 321.0)
    rows += made_rows(training_targets, "2026-01-04T00:00:00+00:00", 999.0, "quick")
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filled = performance.filled(text, tmp_path)
    assert "| sela_ext | 321 |" in filled
    assert "999" not in filled
    assert "1 thread(s), by processor time" in filled
    assert "| 32 px: label pass | sela_ext | 0.3 | 3% |" in filled


def test_quick_and_single_parts_are_no_full_runs(training, monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(training, "small", lambda bench: kept.append(bench.mode))
    monkeypatch.setattr(training, "large", lambda bench: kept.append("large"))
    monkeypatch.setattr(training, "report", lambda bench: None)
    monkeypatch.setattr(training.torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(training.common, "record", lambda *given: SimpleNamespace())
    for arguments, expected in (
        (["--quick", "--no-record"], ["quick", "large"]),
        (["--only", "32", "--no-record"], ["only"]),
        ([], ["full", "large"]),
    ):
        kept.clear()
        monkeypatch.setattr("sys.argv", ["training.py", *arguments])
        training.main()
        assert kept == expected
