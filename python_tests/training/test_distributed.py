"""Whole runs over ranks: what they share with a run of one process, and how they go on on another number of ranks."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sela_ext
from sela_ext.data import open_source

OPTIONS = {"clusters": "10,10,32", "batch-size": 96, "threads": 1, "epochs": 2, "seed": 3, "log-every": 5}


def sela(*arguments, status=0, **environment):
    """Run `sela train`; what it said."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sela_ext", "train", "--no-progress", *map(str, arguments)],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def flags(**options):
    named = {**OPTIONS, **{name.replace("_", "-"): value for name, value in options.items()}}
    return [word for name, value in named.items() for word in (f"--{name}", value)]


def events(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def timeless(folder):
    """The log without what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    own = ("seconds", "per_second", "wait")
    return [{k: v for k, v in event.items() if not any(word in k for word in own)} for event in lines]


def tensors(folder):
    saved = torch.load(folder / "network.pt", weights_only=True)
    return [value for part in ("backbone", "heads") for value in saved[part].values()]


def same_network(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process on the digits."""
    out = tmp_path_factory.mktemp("alone") / "run"
    sela("--data", "digits", "--out", out, *flags())
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same run by two ranks, without a break."""
    out = tmp_path_factory.mktemp("pair") / "run"
    sela("--data", "digits", "--out", out, *flags(devices=2))
    return out


def test_two_ranks_begin_with_the_labels_of_one_process_and_learn_as_much(alone, pair):
    first = [events(folder, "label_pass")[0] for folder in (alone, pair)]
    for one, other in zip(first[0]["heads"], first[1]["heads"], strict=True):
        assert {k: v for k, v in one.items() if k != "cross_entropy"} == {
            k: v for k, v in other.items() if k != "cross_entropy"
        }
    assert first[0]["spread"] == first[1]["spread"]
    ends = [events(folder, "end")[0] for folder in (alone, pair)]
    assert ends[1]["step"] == ends[0]["step"]
    assert ends[1]["knn"] == pytest.approx(ends[0]["knn"], abs=0.05)
    assert ends[1]["cross_entropy"] == pytest.approx(ends[0]["cross_entropy"], rel=0.2)
    losses = [[event["loss"] for event in events(folder, "step")] for folder in (alone, pair)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    with np.load(pair / "labels.npz") as saved:
        assert saved["labels"].shape == (3, 1797)
        assert (saved["labels"] >= 0).all()


@pytest.mark.parametrize(("ranks", "equal"), [(2, True), (1, False), pytest.param(3, False, marks=pytest.mark.slow)])
def test_a_run_of_two_ranks_goes_on_where_it_was_with_any_number(pair, tmp_path, ranks, equal):
    out = tmp_path / "run"
    told = sela(
        "--data", "digits", "--out", out, *flags(devices=2, checkpoint_seconds=0), status=6,
        SELA_FAULT="after step:20:raise:1",
    )  # fmt: skip
    assert "rank 1" in told
    assert "planted" in told
    sela("--data", "digits", "--out", out, "--resume", *flags(devices=ranks, checkpoint_seconds=0))
    assert events(out, "end")[0]["step"] == events(pair, "end")[0]["step"]
    assert same_network(out, pair) == equal
    if equal:
        assert timeless(out) == timeless(pair)
    else:  # the same images in the same order, by another arithmetic
        assert events(out, "end")[0]["knn"] == pytest.approx(events(pair, "end")[0]["knn"], abs=0.05)


def test_unreadable_images_are_left_out_by_whichever_rank_meets_them(tmp_path):
    folder, source = tmp_path / "images", open_source("digits")
    folder.mkdir()
    for i in range(211):
        Image.fromarray(source.read(i)[:, :, 0]).save(folder / f"{i:03}.png")
    bad = (0, 17, 60, 61, 210)
    for i in bad:
        (folder / f"{i:03}.png").write_bytes(b"no picture")
    out = tmp_path / "run"
    sela(
        "--data", folder, "--out", out, "--on-bad-image", "skip", "--max-bad-fraction", 0.5,
        *flags(devices=2, clusters="5,5", batch_size=16),
    )  # fmt: skip
    with np.load(out / "labels.npz") as saved:
        assert np.flatnonzero((saved["labels"] < 0).all(0)).tolist() == list(bad)
        assert (saved["labels"][:, [i for i in range(211) if i not in bad]] >= 0).all()
    listed = (out / "bad_images.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in listed[1:]] == list(bad)


def test_two_ranks_place_the_clusters_of_vectors_that_are_read_on_demand_as_one_process(tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32))
    given = {"clusters": [5, 4], "epochs": 1, "batch_size": 50, "threads": 1, "progress": False}
    one, two = (
        sela_ext.train(tmp_path / "rows.npy", out=tmp_path / str(ranks), devices=ranks, **given) for ranks in (1, 2)
    )
    assert (one.labels == two.labels).mean() > 0.98


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ({"batch_size": 97}, 2, "batch_size: expected a multiple of the 2 ranks"),
        pytest.param({"clusters": 2000}, 2, "clusters: expected at most", marks=pytest.mark.slow),
        ({"device": "tpu"}, 2, "device: expected cpu, cuda"),
    ],
)
def test_what_all_ranks_refuse_is_said_once_in_its_own_words(tmp_path, more, status, message):
    told = sela("--data", "digits", "--out", tmp_path / "run", *flags(devices=2, **more), status=status)
    assert message in told
    assert told.count("sela: error:") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"method": "kmeans"},
        {"method": "deepcluster"},
        {"method": "sela-v2"},
        {"label_source": "eval", "sampler": "clusters"},
        {"label_source": "official"},
        {"balance": "exact", "accumulate": 2, "ema": 0.9},
        {"marginals": "estimated", "freeze_prototypes": 1},
        {"evaluate_every": 1, "holdout": 100, "optimizer": "lars"},
    ],
    ids=str,
)
def test_every_method_goes_on_after_a_fault_as_if_there_had_been_none(tmp_path, more):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = flags(devices=2, checkpoint_seconds=0, **more)
    sela("--data", "digits", "--out", whole, *options)
    sela("--data", "digits", "--out", broken, *options, status=6, SELA_FAULT="after step:19:kill:1")
    sela("--data", "digits", "--out", broken, "--resume", *options)
    assert same_network(whole, broken)
    assert timeless(whole) == timeless(broken)


@pytest.mark.slow
def test_feature_vectors_are_shared_too(tmp_path):
    generator = np.random.Generator(np.random.Philox(5))
    centres = generator.normal(size=(8, 24)) * 4
    classes = np.arange(1003) % 8
    np.save(tmp_path / "x.npy", (centres[classes] + generator.normal(size=(1003, 24))).astype(np.float32))
    np.save(tmp_path / "y.npy", classes)
    scores = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        sela(
            "--data", tmp_path / "x.npy", "--labels", tmp_path / "y.npy", "--out", out,
            *flags(devices=ranks, clusters=8, heads=2, epochs=5),
        )  # fmt: skip
        scores.append(events(out, "end")[0]["nmi"])
    assert min(scores) > 0.95
