import itertools
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sela_ext
from sela_ext.errors import CheckpointError, DataError, NumericsError, OptionError, ResourceError
from sela_ext.kernels import RefusedDeviceWarning
from sela_ext.training.run import first_use
from sela_ext.training.run_folder import RunFolder

# Small enough for seconds, large enough for several steps per epoch.
TINY = {"epochs": 2, "batch_size": 64, "clusters": 4, "heads": 2, "projection": 16, "threads": 1, "progress": False}


def blobs(count=192, size=16, channels=3, classes=4, seed=0):
    """Images that are easy to tell apart: a bright quadrant, by class, in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 80, (count, size, size, channels), dtype=np.uint8)
    half = size // 2
    for i, label in enumerate(labels):
        y, x = divmod(int(label), 2)
        images[i, y * half : (y + 1) * half, x * half : (x + 1) * half] += 150
    return images, labels


def events(out, kind):
    return [e for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


def deterministic(out):
    """metrics.jsonl without what depends on the clock."""

    def clean(value):
        if isinstance(value, dict):
            clock = ("seconds", "per_second", "wait")
            return {k: clean(v) for k, v in value.items() if not any(word in k for word in clock)}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return [clean(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_everything_that_the_interface_names(tmp_path):
    images, labels = blobs()
    result = sela_ext.train(images, out=tmp_path / "run", labels=labels, holdout=32, **TINY)
    assert result.out == tmp_path / "run"
    assert result.labels.shape == (2, 192)
    assert result.labels.dtype == np.int32
    assert set(np.unique(result.labels)) <= set(range(4))
    for name in ("options.json", "train.log", "metrics.jsonl", "labels.csv", "labels.npz", "network.pt", "report.html"):
        assert (result.out / name).stat().st_size > 0
    assert list((result.out / "checkpoints").glob("*.ckpt"))
    assert list((result.out / "tensorboard").iterdir())
    assert {"nmi", "ami", "ari", "accuracy", "purity", "knn", "linear"} <= set(result.metrics)
    with np.load(result.out / "labels.npz") as saved:
        assert np.array_equal(saved["labels"], result.labels)
        assert saved["confidence"].dtype == np.float32
        assert saved["confidence"].min() >= 0
        assert saved["confidence"].max() <= 1
        assert len(saved["names"]) == 192
    lines = (result.out / "labels.csv").read_text().splitlines()
    assert lines[0] == "index,name,label_0,label_1,confidence_0,confidence_1"
    assert len(lines) == 193
    options = json.loads((result.out / "options.json").read_text())
    assert options["options"]["clusters"] == [4, 4]
    assert options["reasons"]["model"]
    # The solver chooses its method at every pass; nothing else is left open.
    assert [name for name, value in options["options"].items() if value == "auto"] == ["label_method"]
    end = events(result.out, "end")[0]
    assert end["nmi"] == pytest.approx(result.metrics["nmi"])
    assert end["head"] == result.head


def test_the_head_is_chosen_by_cross_entropy(tmp_path):
    images, labels = blobs()
    result = sela_ext.train(images, out=tmp_path / "run", labels=labels, **TINY)
    heads = events(result.out, "end")[0]["heads"]
    assert result.head == min(heads, key=lambda head: head["cross_entropy"])["head"]


def test_easy_clusters_are_found_and_true_labels_do_not_matter(tmp_path):
    images, labels = blobs(192)
    options = {
        **TINY,
        "epochs": 12,
        "heads": 4,
        "batch_size": 32,
        "half_resolution": 0.0,
        "augment": sela_ext.Augment.none(16),
    }
    with_labels = sela_ext.train(images, out=tmp_path / "a", labels=labels, **options)
    assert with_labels.metrics["nmi"] > 0.9
    without = sela_ext.train(images, out=tmp_path / "b", **options)
    assert np.array_equal(with_labels.labels, without.labels)
    assert "nmi" not in without.metrics
    assert without.metrics["ln_k"] == pytest.approx(np.log(4))


# D22
def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    images, _ = blobs()
    runs = [sela_ext.train(images, out=tmp_path / str(i), seed=seed, **TINY) for i, seed in enumerate((3, 3, 4))]
    states = [run.network.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert deterministic(runs[0].out) == deterministic(runs[1].out)


@pytest.mark.parametrize("source", ["bank", "eval", "official"])
@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
def test_every_label_source_and_spacing_makes_its_passes(tmp_path, source, spacing):
    images, _ = blobs()
    sela_ext.train(images, out=tmp_path / "run", label_source=source, label_spacing=spacing, label_passes=3, **TINY)
    passes = events(tmp_path / "run", "label_pass")
    # Quadratic: times 0, 1/4 and 1 of 3.01 epochs; the last lies beyond the second epoch.
    assert [p["step"] for p in passes] == ([0, 2, 4] if spacing == "linear" else [0, 3])
    for record in passes:
        assert [head["head"] for head in record["heads"]] == [0, 1]
        assert all(head["converged"] for head in record["heads"])
        assert all(np.isfinite(head["cross_entropy"]) for head in record["heads"])


@pytest.mark.parametrize(("init", "first"), [("random", [0]), ("predictions", [0, 1]), ("kmeans", [0, 1])])
def test_heads_take_turns_after_first_labels_of_all_that_init_asks_for(tmp_path, init, first):
    images, _ = blobs()
    options = {**TINY, "label_heads": "turn", "label_passes": 4, "label_spacing": "linear", "init": init}
    sela_ext.train(images, out=tmp_path / "run", **options)
    turns = [[head["head"] for head in p["heads"]] for p in events(tmp_path / "run", "label_pass")]
    assert turns == [first, [1], [0], [1]]


def test_a_batch_of_one_that_is_passed_over_is_not_logged(tmp_path):
    images, _ = blobs(count=33)
    options = {**TINY, "epochs": 1, "batch_size": 2, "log_every": 1}
    sela_ext.train(images, out=tmp_path / "run", half_resolution=0.0, **options)
    steps = events(tmp_path / "run", "step")
    assert [step["step"] for step in steps] == list(range(1, 17))
    assert all(step["loss"] > 0 for step in steps)


def test_label_passes_can_be_left_out(tmp_path):
    images, _ = blobs()
    sela_ext.train(images, out=tmp_path / "a", label_passes=0, init="random", **TINY)
    assert events(tmp_path / "a", "label_pass") == []
    sela_ext.train(images, out=tmp_path / "b", label_passes=0, init="kmeans", **TINY)
    assert [p["step"] for p in events(tmp_path / "b", "label_pass")] == [0]


@pytest.mark.parametrize(
    "options", [{}, {"label_passes": 4, "label_spacing": "linear"}, {"label_spacing": "quadratic"}]
)
def test_label_passes_under_a_budget(tmp_path, monkeypatch, options):
    """By a clock that goes on a twentieth of a second whenever the loop looks at it."""
    ticks = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: next(ticks) / 20)
    monkeypatch.setattr("sela_ext.training.loop.time", clock)
    images, _ = blobs()
    sela_ext.train(images, out=tmp_path / "run", budget="2s", **{**TINY, "epochs": "auto", **options})
    steps = [p["step"] for p in events(tmp_path / "run", "label_pass")]
    last = events(tmp_path / "run", "end")[0]["step"]
    assert steps[0] == 0
    if not options:  # at the start of every epoch of three steps
        assert steps == list(range(0, last, 3))
    else:
        assert 2 <= len(steps) <= options.get("label_passes", 50)


def test_a_folder_sorted_by_class_is_labelled_as_well_as_a_mixed_one(tmp_path):
    images, labels = blobs(240, classes=4)
    order = np.argsort(labels, kind="stable")
    scores = []
    for name, rows in (("mixed", np.arange(240)), ("sorted", order)):
        options = {**TINY, "epochs": 1, "heads": 4}
        sela_ext.train(images[rows], out=tmp_path / name, labels=labels[rows], **options)
        first = events(tmp_path / name, "label_pass")[0]["heads"]
        scores.append(np.mean([head["nmi"] for head in first]))
    assert scores[1] > scores[0] - 0.2


def test_held_out_images_are_labelled_beside_other_evaluation_data(tmp_path):
    images, labels = blobs(200)
    others, other_labels = blobs(30, seed=9)

    class Others(torch.utils.data.Dataset):
        targets = other_labels.tolist()

        def __len__(self):
            return len(others)

        def __getitem__(self, i):
            return others[i], self.targets[i]

    result = sela_ext.train(
        images, out=tmp_path / "run", labels=labels, holdout=0.2, eval_data=Others(), **{**TINY, "epochs": 8}
    )
    assert (result.labels >= 0).all()
    assert "knn" in result.metrics
    alone = sela_ext.train(images, out=tmp_path / "b", labels=labels, holdout=0.2, **{**TINY, "epochs": 8})
    assert np.array_equal(result.labels, alone.labels)
    with pytest.raises(OptionError, match="eval_data: expected labelled images"):
        sela_ext.train(images, out=tmp_path / "c", labels=labels, eval_data=others, **TINY)
    with pytest.raises(DataError, match="expected images of 3 channels"):
        sela_ext.train(images, out=tmp_path / "c", labels=labels, eval_data="digits", **TINY)


def test_networks_of_one_size_are_trained_without_half_resolution(tmp_path):
    images, _ = blobs()

    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))

    result = sela_ext.train(images, out=tmp_path / "run", model=build, **TINY)
    options = json.loads((result.out / "options.json").read_text())
    assert options["resolved"]["half_resolution"] == 0
    assert "does not take 16 x 16" in options["reasons"]["half_resolution"]
    with pytest.raises(OptionError, match="half_resolution: expected a network that takes 16 x 16 too"):
        sela_ext.train(images, out=tmp_path / "b", model=build, half_resolution=0.5, **TINY)


def test_numbers_of_numpy_are_numbers(tmp_path):
    images, labels = blobs()
    options = {**TINY, "lr": np.float64(0.1), "seed": np.int64(3), "clusters": np.array([4, 4]), "labels": list(labels)}
    first = sela_ext.train(images, out=tmp_path / "run", marginals=np.full(4, 0.25), **options)
    again = sela_ext.train(images, out=tmp_path / "run", marginals=np.full(4, 0.25), resume=True, **options)
    assert np.array_equal(first.labels, again.labels)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_kind": "linear", "projection": 0, "loss": "sum", "lr_schedule": "step"},
        {"clusters": [3, 5], "heads": 2, "weight_decay": 0.0, "nesterov": False},
        {"precision": "bfloat16", "half_resolution": 1.0},
        {"model": "resnet18", "image_size": 32, "precision": "float32"},
        {"budget": "1s", "epochs": "auto"},
        {"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8)), "half_resolution": 0.0},
    ],
)
def test_options_are_honoured_from_end_to_end(tmp_path, changes):
    images, _ = blobs()
    result = sela_ext.train(images, out=tmp_path / "run", **{**TINY, **changes})
    clusters = changes.get("clusters", [4, 4])
    assert [int(row.max()) < k for row, k in zip(result.labels, clusters, strict=True)] == [True, True]
    assert np.isfinite(result.metrics["cross_entropy"])


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    images, _ = blobs()
    result = sela_ext.train(images, out=tmp_path_factory.mktemp("plain") / "run", **TINY)
    return result.network.state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "sum"},
        {"lr": 0.01},
        {"lr_schedule": "step"},
        {"warmup": 0.5},
        {"momentum": 0.5},
        {"nesterov": False},
        {"weight_decay": 0.1},
        {"decay_vectors": True},
        {"half_resolution": 1.0},
        {"temperature": 0.5},
        {"init": "predictions"},
        {"label_source": "eval"},
        {"label_source": "official"},
        {"label_passes": 6},
        {"label_heads": "turn"},
        {"marginals": [0.7, 0.1, 0.1, 0.1]},
        {"augment": "flip"},
        {"batch_size": 48},
    ],
    ids=str,
)
def test_every_option_of_the_recipe_changes_what_is_learnt(tmp_path, plain_run, change):
    images, _ = blobs()
    other = sela_ext.train(images, out=tmp_path / "run", **{**TINY, **change}).network.state_dict()
    assert any(not torch.equal(plain_run[name], other[name]) for name in plain_run)


def test_grey_images_and_the_built_in_digits(tmp_path):
    result = sela_ext.train("digits", out=tmp_path / "run", epochs=1, threads=1, progress=False)
    assert result.labels.shape == (12, 1797)
    assert (result.labels >= 0).all()
    options = json.loads((result.out / "options.json").read_text())
    assert options["resolved"]["held_out_images"] == 360
    assert options["resolved"]["channels"] == 1


# D1 D6
def test_an_unreadable_image_is_skipped_listed_and_not_labelled(tmp_path):
    """In training and among the held-out images; the schedule does not slip."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    images, _ = blobs(40, 24)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:60])
    options = {**TINY, "batch_size": 16, "clusters": 2, "epochs": 1}
    with pytest.raises(DataError, match=r"07\.png"):
        sela_ext.train(folder, out=tmp_path / "a", **options)
    options.update(on_bad_image="skip", max_bad_fraction=0.1, epochs=3, label_passes=3, label_spacing="linear")
    result = sela_ext.train(folder, out=tmp_path / "b", **options)
    assert (result.labels[:, 7] == -1).all()
    assert (np.delete(result.labels, 7, axis=1) >= 0).all()
    listed = (result.out / "bad_images.csv").read_text().splitlines()
    assert len(listed) == 2
    assert listed[1].startswith("7,07.png,")
    passes = events(result.out, "label_pass")
    assert [p["epoch"] for p in passes] == [0, 1, 2]

    seed = next(s for s in range(100) if 7 in _held_rows(40, 5, s))
    held = sela_ext.train(folder, out=tmp_path / "c", holdout=5, seed=seed, **options)
    assert (held.labels[:, 7] == -1).all()
    assert "7,07.png," in (held.out / "bad_images.csv").read_text()


def _held_rows(count, number, seed):
    from sela_ext.training.options import Options
    from sela_ext.training.split import choose_images

    images = np.zeros((count, 8, 8, 3), np.uint8)
    return choose_images(images, Options(holdout=number, seed=seed)).held_rows


# D7 D8 D9
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clusters": 300}, OptionError, "at most the number of images, 192, found 300"),
        ({"balance": "even"}, OptionError, "balance"),
        ({"devices": 0}, OptionError, "devices: expected auto or a number"),
        ({"device": "tpu"}, OptionError, "device: expected cpu, cuda"),
        ({"precision": "float16", "device": "cpu"}, OptionError, "float32 or bfloat16 on the CPU"),
        ({"budget": "1min", "epochs": 3}, OptionError, "budget and epochs"),
        ({"clusters": [3, 4], "heads": 3}, OptionError, "heads: expected 2"),
        ({"marginals": [0.5, 0.5]}, OptionError, "marginals: expected one share per cluster"),
        ({"holdout": 1.5}, OptionError, "holdout"),
        ({"augment": "blur"}, OptionError, "augment: expected one of none"),
        ({"label_augment": "blur"}, OptionError, "label_augment: expected one of none"),
        ({"augment": sela_ext.Augment.deepcluster(16)}, OptionError, "augment: expected sobel=False"),
        ({"label_augment": sela_ext.Augment.deepcluster(16)}, OptionError, "label_augment: expected sobel=False"),
        ({"marginals": [-1.0, 1, 1, 1]}, OptionError, "marginals: expected numbers > 0"),
        ({"marginals": 0.5}, OptionError, "marginals: expected estimated, or a list"),
        ({"augment": sela_ext.Augment.none(16), "image_size": 32}, OptionError, "image_size: expected 16"),
        ({"init": "kmeans", "head_kind": "linear"}, OptionError, "init: expected random or predictions"),
        ({"labels": [0, 1]}, DataError, "labels"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, error, message):
    images, _ = blobs()
    with pytest.raises(error, match=message):
        sela_ext.train(images, out=tmp_path / "run", **{**TINY, **options})
    assert not (tmp_path / "run").exists()


# D10
def test_the_run_folder_is_checked_before_anything_is_deleted(tmp_path):
    images, _ = blobs()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="expected a folder, found the file"):
        sela_ext.train(images, out=tmp_path / "file", **TINY)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="expected an empty or absent folder"):
        sela_ext.train(images, out=full, **TINY)
    with pytest.raises(OptionError, match=r"nothing but a run in .* found mine\.txt; nothing was deleted"):
        sela_ext.train(images, out=full, overwrite=True, **TINY)
    assert (full / "mine.txt").read_text() == "mine"
    with pytest.raises(OptionError, match="which holds the data"):
        RunFolder.check(tmp_path, resume=False, overwrite=True, data=full)


def test_what_is_called_digits_is_not_the_data_when_the_built_in_ones_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert RunFolder.check("digits", resume=False, overwrite=False, data="digits").path == Path("digits")
    assert RunFolder.check("digits/run", resume=False, overwrite=False, data="digits").path == Path("digits/run")
    with pytest.raises(OptionError, match="which holds the data"):
        RunFolder.check("digits", resume=False, overwrite=False, data="./digits")


def test_overwrite_replaces_a_run(tmp_path):
    images, _ = blobs()
    first = sela_ext.train(images, out=tmp_path / "run", seed=1, **TINY)
    before = (first.out / "labels.csv").read_text()
    sela_ext.train(images, out=tmp_path / "run", seed=2, overwrite=True, **TINY)
    assert (first.out / "labels.csv").read_text() != before
    assert len(events(first.out, "end")) == 1


# D11 D17
def test_resume_with_other_options_or_data_lists_what_differs(tmp_path):
    images, _ = blobs()
    sela_ext.train(images, out=tmp_path / "run", **TINY)
    with pytest.raises(CheckpointError, match=r"seed: was 0, now 5"):
        sela_ext.train(images, out=tmp_path / "run", resume=True, seed=5, **TINY)
    with pytest.raises(CheckpointError, match=r"augment: was 'small', now .*Augment"):
        sela_ext.train(images, out=tmp_path / "run", resume=True, augment=sela_ext.Augment.none(32), **TINY)
    with pytest.raises(CheckpointError, match=r"count: was 192, now 191"):
        sela_ext.train(images[:-1], out=tmp_path / "run", resume=True, **TINY)


def test_resume_without_a_checkpoint_begins_and_after_the_end_repeats_the_result(tmp_path):
    images, _ = blobs()
    first = sela_ext.train(images, out=tmp_path / "run", resume=True, **TINY)
    again = sela_ext.train(images, out=tmp_path / "run", resume=True, **TINY)
    assert np.array_equal(first.labels, again.labels)
    assert len(events(first.out, "end")) == 1


# D21
def test_a_loss_that_is_not_finite_stops_the_run_and_names_images(tmp_path):
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3 * 32 * 32, 8)
            self.calls = 0

        def forward(self, images):
            self.calls += self.training and torch.is_grad_enabled()  # steps: looks at all images take no gradient
            features = self.inner(images.flatten(1))
            return features * float("nan") if self.calls > 2 else features

    images, _ = blobs()
    with pytest.raises(NumericsError, match=r"loss is nan at step \d+, in a batch with .*lower lr"):
        sela_ext.train(images, out=tmp_path / "run", model=Poisoned(), half_resolution=0.0, **TINY)


DIGITS = {
    "epochs": 4,
    "clusters": [10, 40],
    "threads": 1,
    "checkpoint_seconds": 0.0,
    "evaluate_every": 2,
    "log_every": 1,
}
COMMAND = [
    *("train", "--data", "digits", "--epochs", "4", "--clusters", "10,40", "--threads", "1"),
    *("--checkpoint-seconds", "0", "--evaluate-every", "2", "--log-every", "1"),
]
# The program `sela`, which sends itself a signal when a certain step is recorded, before that step is saved.
SELF_SIGNALLING = """
import os, sys
import sela_ext.training.watch as watch
from sela_ext.cli import main
step, number, *arguments = sys.argv[1:]
def send(event, info):
    if (event["event"], event["step"]) == ("step", int(step)):
        os.kill(os.getpid(), int(number))
watch.callbacks_of = lambda value: [send]
main(arguments)
"""


def run_until(out, step, number, *more):
    """Train by the command line until a signal at a step: status, and what was printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SELF_SIGNALLING, str(step), str(int(number)), *COMMAND, "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout


def network_of(out):
    saved = torch.load(out / "network.pt", weights_only=True)
    return {
        f"{part}.{name}": value for part in ("backbone", "projection", "heads") for name, value in saved[part].items()
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return sela_ext.train("digits", out=tmp_path_factory.mktemp("unbroken") / "run", progress=False, **DIGITS).out


def assert_equal_runs(one, other):
    with np.load(one / "labels.npz") as a, np.load(other / "labels.npz") as b:
        assert np.array_equal(a["labels"], b["labels"])
        assert np.array_equal(a["confidence"], b["confidence"])
    weights, others = network_of(one), network_of(other)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert deterministic(one) == deterministic(other)


@pytest.mark.parametrize(
    ("killed", "signalled", "number", "status"), [(4, 9, signal.SIGTERM, 143), (13, 14, signal.SIGINT, 130)]
)
def test_a_killed_and_a_signalled_run_resume_to_the_same_bits(tmp_path, unbroken, killed, signalled, number, status):
    out = tmp_path / "run"
    found, printed = run_until(out, killed, signal.SIGKILL)
    assert found == -signal.SIGKILL, printed
    assert not (out / "labels.csv").exists()
    # It goes on from the step before, and ends in order at a signal, with a checkpoint of the step it was at.
    found, printed = run_until(out, signalled, number, "--resume")
    assert found == status, printed
    assert f"step {killed - 1}" in printed
    assert f"stopped at step {signalled}, checkpoint written" in printed
    assert "Traceback" not in printed
    sela_ext.train("digits", out=out, resume=True, progress=False, **DIGITS)
    assert_equal_runs(unbroken, out)


def test_a_signal_during_an_evaluation_ends_the_run_at_once(tmp_path, monkeypatch):
    def signalled(*given, **options):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the evaluation went on")

    monkeypatch.setattr("sela_ext.training.recipes.base.evaluate_network", signalled)
    images, _ = blobs()
    with pytest.raises(SystemExit) as ended:
        sela_ext.train(images, out=tmp_path / "run", **TINY)
    assert ended.value.code == 143
    assert list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


# D25
def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    command = f"{sys.executable} -P -m sela_ext {' '.join(COMMAND)} --epochs 1"
    for out, output in (("run", "| head -1"), ("b", ">&-")):
        subprocess.run(["bash", "-c", f"{command} --out {tmp_path / out} {output}"], check=True, capture_output=True)
        assert (tmp_path / out / "report.html").exists()


def test_a_cuda_device_is_checked_before_any_work(as_cuda, host_card, host_core, monkeypatch):
    lines = []
    first_use(torch.device("cpu"), lines.append)
    assert lines == []
    as_cuda(host_card)
    assert host_core.calls == 0

    def spoil(outputs):
        raise RuntimeError("an illegal memory access was encountered")

    host_core.spoil = spoil
    with pytest.warns(RefusedDeviceWarning, match="illegal memory access"):
        first_use(host_card.place, lines.append)
    (line,) = lines
    assert "Played Card" in line
    assert "self-check FAILED" in line

    monkeypatch.setattr("sela_ext.kernels.device._usable", {})
    monkeypatch.setattr("sela_ext.kernels.self_check._verdicts", {})
    monkeypatch.setenv("SELA_SELF_CHECK", "again")
    troubles = iter(["", "an illegal memory access was encountered"])
    monkeypatch.setattr(host_card, "trouble", lambda: next(troubles))
    with pytest.raises(ResourceError, match="cannot be used any more in this process"):
        first_use(host_card.place, lines.append)
