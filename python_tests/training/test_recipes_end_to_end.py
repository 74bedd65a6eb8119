"""Every recipe is one command, and ends with its metrics: here on the digits, at a small size."""

import json
import shlex

import pytest

from sela_ext.cli import main
from sela_ext.training.recipes import RECIPES as METHODS

# The photographs' recipes on 32 pixels, with a network and heads that fit.
SMALL = "--model small-resnet --image-size 32 --clusters 10 --heads 2 --batch-size 128"

# What a method needs besides its name, at this size.
BY_METHOD = {"sela": "", "kmeans": "", "deepcluster": "--clusters 32", "sela-v2": ""}

RECIPES = {
    "the preset of the digits": "--preset digits",
    "the paper's AlexNet": f"--preset paper-alexnet-10x3k {SMALL} --label-passes 2",
    "the paper's ResNet-50": f"--preset paper-resnet50-10x3k {SMALL} --label-passes 2",
    "the CIFAR script": f"--preset cifar10 {SMALL} --label-passes 2",
    "labels by passes of their own": f"{SMALL} --label-source eval --label-augment none",
    "one linear head": "--clusters 10 --heads 1 --head-kind linear --init predictions",
    "labels dealt at random, and kept": f"{SMALL} --init random --label-passes 0",
    "exactly equal sizes, sum of the losses": f"{SMALL} --balance exact --loss sum",
    **{f"the method {method}": f"--method {method} {BY_METHOD[method]}" for method in METHODS},
}


def trained(words, out):
    with pytest.raises(SystemExit) as left:
        main(["train", "--data", "digits", "--out", str(out), *words])
    assert left.value.code == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_one_command_and_ends_with_its_metrics(recipe, tmp_path, capsys):
    words = ["--epochs", "1", "--threads", "1", *shlex.split(RECIPES[recipe])]
    events = trained(words, tmp_path / "run")
    end = events[-1]
    assert end["event"] == "end"
    assert end["epoch"] == 1
    assert {"nmi", "ami", "ari", "accuracy", "purity", "knn", "linear"} <= set(end)
    # A beginning, but far from chance (.1), which any network that sees the images at all must be.
    assert end["knn"] > 0.6
    assert end["linear"] > 0.6
    assert 0 <= end["head"] < len(end["heads"])
    steps = [event for event in events if event["event"] == "step"]
    assert all(0 < step["loss"] < 100 for step in steps)
    assert "done: 1.0 epochs" in capsys.readouterr().out


@pytest.mark.parametrize("more", ["", "--rotnet"])
def test_labels_of_a_run_train_another_network_by_one_command(more, tmp_path):
    short = ["--epochs", "1", "--threads", "1"]
    trained([*short, *shlex.split(SMALL)], tmp_path / "teacher")
    words = ["--fixed-labels", str(tmp_path / "teacher"), "--model", "small-resnet", *shlex.split(more)]
    end = trained([*short, *words], tmp_path / "run")[-1]
    assert end["event"] == "end"
    assert end["knn"] > 0.6
    assert end["linear"] > 0.6
    assert [head["clusters"] for head in end["heads"]] == [10, 10]


@pytest.mark.parametrize("level", ["light", "heavy"])
def test_the_imbalance_study_is_one_command(level, tmp_path):
    words = ["--epochs", "1", "--threads", "1", *shlex.split(SMALL), "--imbalance", level]
    end = trained(words, tmp_path / "run")[-1]
    assert {"nmi", "accuracy", "knn", "linear"} <= set(end)
    assert end["knn"] > 0.5
