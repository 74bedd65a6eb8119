"""The same seed gives the same bits: the case D22 of the fault list, for whole runs and for any number of threads.

Loaders by themselves are in python_tests/data/test_faults.py, resumed runs in python_tests/training/test_train.py.
"""

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext
from sela_ext import Augment, Loader
from sela_ext.models import Heads
from sela_ext.training.checkpoint import read_checkpoint
from sela_ext.training.labelling import label_pass

OPTIONS = {
    "model": "small-convnet", "image_size": 16, "epochs": 2, "batch_size": 16, "clusters": [4, 6], "projection": 8,
    "evaluate_every": 1, "log_every": 1, "holdout": 8, "seed": 5, "threads": 1, "progress": False,
}  # fmt: skip
FLAGS = [
    *("--model", "small-convnet", "--image-size", "16", "--epochs", "2", "--batch-size", "16", "--clusters", "4,6"),
    *("--projection", "8", "--evaluate-every", "1", "--log-every", "1", "--holdout", "8", "--seed", "5"),
    *("--threads", "1", "--no-progress"),
]
# What depends on the clock has one of these words in its name.
CLOCK = ("seconds", "per_second", "wait", "clock")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 small pictures of three classes, every fourth a PNG."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for i in range(60):
        folder = root / "abc"[i % 3]
        folder.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 80 * (1 + i % 3), (4, 4, 3), dtype=np.uint8))
        picture = coarse.resize((30 + i, 70 - i), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i:02d}.{'png' if i % 4 == 3 else 'jpg'}")
    return root


def without_clock(value):
    """A value as it is, but for what depends on the clock."""
    if isinstance(value, dict):
        return {key: without_clock(one) for key, one in value.items() if not any(word in str(key) for word in CLOCK)}
    if isinstance(value, (list, tuple)):
        return [without_clock(one) for one in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.flatten().view(torch.uint8).numpy().tobytes()
    return value


def table(path):
    with open(path, newline="") as file:
        return [without_clock(row) for row in csv.DictReader(file)]


def curves(folder):
    """The numbers of TensorBoard's files: (name, step, value)."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for path in sorted(folder.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for one in event.summary.value:
                if not any(word in one.tag for word in CLOCK):
                    found.append((one.tag, event.step, one.tensor.SerializeToString()))
    return found


# Times of day, and times taken: in words, as shares, in train.log's last line, and in the report's table of passes.
TIME = re.compile(
    r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?|\b[\d.]+ (s|min)\b|\d+(\.\d+)?%|"
    r"'(images_per_second|seconds)': [-+.\de]+|<td>[\d.]+</td></tr>"
)


def contents(out):
    """Everything that a run has written, but for what depends on the clock, by the name of the file."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_dir():
            continue
        name = str(path.relative_to(out))
        if name.startswith("tensorboard/"):
            name, found["tensorboard"] = "tensorboard", curves(out / "tensorboard")
        elif path.suffix == ".ckpt":
            found[name] = without_clock(read_checkpoint(path))
            found[name]["state"].pop("metrics_length")  # of a text with times in it
        elif path.suffix == ".jsonl":
            found[name] = [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
        elif name == "metrics.csv":
            found[name] = table(path)
        elif path.suffix in (".log", ".html"):
            found[name] = TIME.sub("", path.read_text())
        else:
            found[name] = path.read_bytes()
    return found


def by_program(photos, out, hash_seed):
    """The same run by the command line, in a process of its own."""
    subprocess.run(
        [sys.executable, "-P", "-m", "sela_ext", "train", "--data", photos, "--out", out, *FLAGS],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        cwd=out.parent,
        check=True,
        timeout=300,
    )


# D22
def test_d22_the_same_run_twice_in_one_process_and_once_in_another_writes_the_same(photos, tmp_path):
    names = ("first", "second", "third")
    # The name of the folder is in the report: they have the same.
    places = [tmp_path / name / "run" for name in names]
    for out in places[:2]:
        sela_ext.train(photos, out=out, **OPTIONS)
        torch.manual_seed(len(str(out)))  # whatever somebody draws between the two
        torch.rand(77)
        np.random.default_rng().random()
    places[2].parent.mkdir()
    by_program(photos, places[2], hash_seed="2718")
    expected = contents(places[0])
    written = {"labels.csv", "labels.npz", "metrics.csv", "metrics.jsonl", "network.pt", "options.json", "report.html"}
    written.add("report.npz")
    assert written <= set(expected)
    assert len(expected["metrics.jsonl"]) == 9  # two label passes, steps, evaluations
    assert len(expected["tensorboard"]) > 50
    for name, out in zip(names[1:], places[1:], strict=True):
        found = contents(out)
        assert set(found) == set(expected), name
        different = [file for file in expected if found[file] != expected[file]]
        assert different == [], f"{name}: {different}"


# D22
def test_d22_another_seed_is_another_run(photos, tmp_path):
    runs = [sela_ext.train(photos, out=tmp_path / str(seed), **{**OPTIONS, "seed": seed}) for seed in (5, 6)]
    weights, others = (run.network.state_dict() for run in runs)
    assert any(not torch.equal(weights[name], others[name]) for name in weights)
    assert not np.array_equal(runs[0].labels, runs[1].labels)


# D22
@pytest.mark.parametrize("kind", ["folder", "pack", "array"])
@pytest.mark.parametrize("views", [Augment.aug_plus_more(24), [Augment.sela(24), Augment.sela(12)]], ids=["one", "two"])
def test_d22_order_and_pixels_do_not_depend_on_threads(photos, tmp_path, kind, views):
    data = photos
    if kind == "pack":
        sela_ext.pack(photos, tmp_path / "pack", threads=2)
        data = tmp_path / "pack"
    elif kind == "array":
        data = np.random.default_rng(0).integers(0, 256, (31, 20, 20, 3), dtype=np.uint8)

    def seen(threads):
        loader = Loader(data, batch_size=7, augment=views, seed=3, threads=threads)
        return [
            (batch.index.tolist(), [view.numpy().tobytes() for view in (batch.views or [batch.images])])
            for epoch in (0, 5)
            for batch in loader.epoch(epoch)
        ]

    one = seen(1)
    assert one == seen(2) == seen(4)


# D22
@pytest.mark.parametrize("method", ["sinkhorn", "anderson", "newton"])
@pytest.mark.parametrize(
    "more",
    [{}, {"balance": "exact"}, {"marginals": np.linspace(1, 3, 31)}, {"relax": 0.5}, {"storage": "fixed16"}],
    ids=lambda more: next(iter(more), "plain"),
)
def test_d22_the_solver_does_not_depend_on_threads(method, more):
    rng = np.random.default_rng(0)
    logits = (2 * rng.standard_normal((5003, 31))).astype(np.float32)
    logits[7] = np.nan
    found = [sela_ext.assign(logits, method=method, tol=1e-6, threads=threads, **more) for threads in (1, 2, 4)]
    for other in found[1:]:
        assert np.array_equal(found[0].labels, other.labels)
        assert found[0].potential.tobytes() == other.potential.tobytes()
        assert without_clock(found[0].history) == without_clock(other.history)
        assert (found[0].error, found[0].passes, found[0].masked) == (other.error, other.passes, other.masked)


# D22
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_d22_label_passes_do_not_depend_on_threads(kind):
    torch.manual_seed(0)
    heads, embeddings = Heads(16, [10, 33, 10], kind=kind), torch.randn(2503, 16)
    valid = torch.ones(2503, dtype=torch.bool)
    valid[[5, 2000]] = False
    embeddings[77] = float("nan")
    previous = np.zeros((3, 2503), np.int32)
    found = [
        label_pass(heads, embeddings, valid, previous, lam=25.0, tol=1e-4, balance="exact", threads=threads)
        for threads in (1, 2, 4)
    ]
    for other in found[1:]:
        assert np.array_equal(found[0].labels, other.labels)
        assert found[0].confidence.tobytes() == other.confidence.tobytes()
        assert all(found[0].potentials[head].tobytes() == other.potentials[head].tobytes() for head in range(3))
        assert found[0].heads == other.heads
