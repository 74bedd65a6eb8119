"""Numbers that are none, and numbers that say nothing, in whole runs: the cases D18 to D21 of the fault list.

What the solver alone makes of them is in python_tests/assign/test_assign.py.
"""

import csv
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import sela_ext
from sela_ext.errors import DataError, NumericsError
from sela_ext.training.checkpoint import load_checkpoint

TINY = {
    "epochs": 2, "batch_size": 20, "clusters": [4, 3], "projection": 0, "half_resolution": 0.0, "label_passes": 2,
    "label_source": "eval", "precision": "float32", "threads": 1, "progress": False,
}  # fmt: skip
# White images, of which some networks below make nothing that is a number.
WHITE = [3, 17, 40]


def images(count=80, white=WHITE):
    pictures = np.random.default_rng(0).integers(0, 200, (count, 8, 8, 3), dtype=np.uint8)
    pictures[white] = 255
    return pictures


def events(out, kind=None):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if kind in (None, row["event"])]


class Blind(nn.Module):
    """Eight features; `value` for white images, where it is not being trained."""

    def __init__(self, value):
        super().__init__()
        self.convolution, self.value = nn.Conv2d(3, 8, 3), value

    def forward(self, pictures):
        features = self.convolution(pictures).relu().mean((2, 3))
        if self.training:
            return features
        white = pictures.flatten(1).mean(1) > 1.5
        return torch.where(white[:, None], torch.full_like(features, self.value), features)


def blind_to_white(value=float("nan")):
    return lambda: Blind(value)


# ---- D18: rows that hold NaN or infinity, in the label pass.


# D18
@pytest.mark.parametrize(("value", "precision"), [(float("nan"), "float32"), (float("inf"), "bfloat16")])
def test_d18_images_without_a_number_are_masked_and_reported_and_the_others_labelled(
    tmp_path, capsys, value, precision
):
    options = {**TINY, "precision": precision, "balance": "exact", "progress": True}
    result = sela_ext.train(images(), out=tmp_path / "run", model=blind_to_white(value), **options)
    assert (result.labels[:, WHITE] == -1).all()
    assert (result.confidence[:, WHITE] == 0).all()
    rest = np.delete(result.labels, WHITE, axis=1)
    assert sorted(np.bincount(rest[0]).tolist()) == [19, 19, 19, 20]  # of 77 images
    assert sorted(np.bincount(rest[1]).tolist()) == [25, 26, 26]
    assert [event["masked"] for event in events(result.out, "label_pass")] == [3, 3]
    assert all(np.isfinite(event["loss"]) for event in events(result.out, "step"))
    # Told on the screen, in the log and at the end; and nothing else is.
    warnings = events(result.out, "end")[0]["warnings"]
    assert [text.split(":")[0] for text in warnings] == ["masked rows"]
    assert "3 images had NaN or infinite logits" in warnings[0]
    assert capsys.readouterr().out.count(warnings[0]) == 2
    assert "3 rows masked" in (result.out / "train.log").read_text()


# D18
def test_d18_images_that_become_no_number_in_the_last_labels_alone_are_reported_too(tmp_path):
    # The bank holds what the network said in training; in the evaluation at the end it says NaN.
    result = sela_ext.train(images(), out=tmp_path / "run", model=blind_to_white(), **{**TINY, "label_source": "bank"})
    assert [event["masked"] for event in events(result.out, "label_pass")] == [0, 0]
    assert (result.labels[:, WHITE] == -1).all()
    (end,) = events(result.out, "end")
    assert end["masked"] == 3
    assert [text.split(":")[0] for text in end["warnings"]] == ["masked rows"]


# D18
@pytest.mark.parametrize(
    "more",
    [
        {"method": "kmeans", "label_source": "eval"},
        {"method": "deepcluster", "label_source": "eval", "head_kind": "linear"},
        {"method": "sela-v2", "label_source": "bank"},
        {"marginals": "estimated"},
        {"size_bounds": [0.5, 2.0]},
        {"relax": 0.5},
        {"init": "kmeans", "evaluate_every": 1},
        {"rotnet": True},
        {"label_heads": "turn", "init": "predictions"},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_d18_every_method_leaves_them_out(tmp_path, more):
    result = sela_ext.train(images(), out=tmp_path / "run", model=blind_to_white(), **{**TINY, **more})
    assert (result.labels[:, WHITE] == -1).all()
    assert (np.delete(result.labels, WHITE, axis=1) >= 0).all()
    assert np.isfinite(result.confidence).all()
    assert all(np.isfinite(event["loss"]) for event in events(result.out, "step"))


# D18
def test_d18_metrics_and_held_out_images_do_without_them(tmp_path):
    truth = np.arange(80) % 4
    result = sela_ext.train(
        images(white=range(0, 80, 4)), out=tmp_path / "run", model=blind_to_white(), labels=truth, holdout=30, **TINY
    )
    assert (result.labels[:, ::4] == -1).all()
    assert (result.labels[:, truth != 0] >= 0).all()
    assert np.isfinite(result.confidence).all()
    assert {"nmi", "knn", "linear"} <= set(result.metrics)
    assert all(np.isfinite(value) for value in result.metrics.values())


# D18
def test_d18_new_images_without_a_number_get_no_label(tmp_path):
    sela_ext.train(images(white=[]), out=tmp_path / "run", model=blind_to_white(), **TINY)
    labels = sela_ext.predict(tmp_path / "run", images(), model=blind_to_white(), threads=1)
    assert (labels[:, WHITE] == -1).all()
    assert (np.delete(labels, WHITE, axis=1) >= 0).all()


# D18
def test_d18_a_batch_without_any_label_teaches_nothing_and_is_no_error(tmp_path):
    # Half of the images are masked, in batches of two: many batches have no label at all.
    result = sela_ext.train(
        images(white=range(0, 80, 2)), out=tmp_path / "run", model=blind_to_white(), **{**TINY, "batch_size": 2}
    )
    assert all(np.isfinite(event["loss"]) for event in events(result.out, "step"))
    assert (result.labels[:, 1::2] >= 0).all()


# D18
def test_d18_a_network_that_gives_no_number_at_all_ends_the_run_with_status_5(tmp_path):
    with pytest.raises(NumericsError, match=r"80 of 80 rows hold NaN.*no output that is a number: lower lr") as caught:
        sela_ext.train(images(white=range(80)), out=tmp_path / "run", model=blind_to_white(), **TINY)
    assert caught.value.exit_code == 5


# D18
def test_d18_rows_of_a_file_of_logits_are_masked_and_single_impossible_labels_are_legal(tmp_path, sela):
    logits = np.random.default_rng(0).standard_normal((1001, 7)).astype(np.float32)
    clean = sela_ext.assign(logits, tol=1e-6)
    logits[3, 4], logits[100], logits[1000, 6] = np.nan, -np.inf, np.inf
    logits[200:300, 2] = -np.inf
    np.save(tmp_path / "logits.npy", logits)
    status, said, err = sela("assign", tmp_path / "logits.npy", "--out", tmp_path / "labels.npy", "--tol", 1e-6)
    assert (status, err) == (0, "")
    assert "3 rows without a label" in said
    labels = np.load(tmp_path / "labels.npy")
    assert np.flatnonzero(labels < 0).tolist() == [3, 100, 1000]
    assert not (labels[200:300] == 2).any()
    assert (labels[400:1000] == clean.labels[400:1000]).mean() > 0.9
    # Nothing but such rows: one line, and no file.
    np.save(tmp_path / "none.npy", np.full((5, 3), np.nan, np.float32))
    status, _, err = sela("assign", tmp_path / "none.npy", "--out", tmp_path / "none-labels.npy")
    assert (status, err.count("\n")) == (3, 1)
    assert "5 of 5 rows hold NaN" in err
    assert not (tmp_path / "none-labels.npy").exists()


# ---- D19: images that cannot be told apart.


# D19
@pytest.mark.parametrize(
    ("level", "more"),
    [
        (0, {"label_source": "bank", "precision": "bfloat16", "model": "small-convnet"}),
        (0, {"label_source": "eval", "init": "predictions"}),
        (77, {"label_source": "bank"}),
        (255, {"label_source": "eval", "balance": "exact"}),
    ],
    ids=lambda more: "-".join(map(str, more.values())) if isinstance(more, dict) else str(more),
)
def test_d19_images_that_are_all_the_same_are_dealt_out_evenly_or_the_run_warns(tmp_path, level, more):
    same = np.full((83, 8, 8, 3), level, np.uint8)
    options = {**TINY, "image_size": 16, "model": "small-resnet", **more}
    result = sela_ext.train(same, out=tmp_path / "run", **options)
    said = [text.split(":")[0] for text in events(result.out, "end")[0]["warnings"]]
    for row, k in zip(result.labels, TINY["clusters"], strict=True):
        sizes = np.bincount(row, minlength=k)
        assert sizes.max() - sizes.min() <= 1 or "collapsed" in said
    # In each pass too: uneven sizes are never without a word.
    for event in events(result.out, "label_pass"):
        for head in event["heads"]:
            one_cluster = head["size_max"] > 0.9 * len(same)
            assert head["size_max"] - head["size_min"] <= 1 or not one_cluster or "collapsed" in said


# D19
@pytest.mark.parametrize("method", ["kmeans", "deepcluster"])
def test_d19_methods_that_cluster_say_that_there_is_nothing_to_tell_apart(tmp_path, method):
    same = np.full((40, 8, 8, 3), 90, np.uint8)
    with pytest.raises(DataError, match="found the same features in all rows"):
        sela_ext.train(same, out=tmp_path / "run", image_size=16, model="small-resnet", **{**TINY, "method": method})


# D19
def test_d19_a_cluster_that_the_network_never_chooses_gets_its_share(tmp_path):
    class Biased(nn.Module):
        """Features of length one, and one dimension that all images have in common."""

        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 8, 3)

        def forward(self, pictures):
            features = self.convolution(pictures).mean((2, 3))
            return torch.cat([features, 100 * torch.ones_like(features[:, :1])], 1)

    result = sela_ext.train(images(white=[]), out=tmp_path / "run", model=Biased, head_kind="linear", **TINY)
    for event in events(result.out, "label_pass"):
        assert all(head["used"] == head["clusters"] for head in event["heads"])
    assert all(len(np.unique(row)) == k for row, k in zip(result.labels, TINY["clusters"], strict=True))


# ---- D20: no convergence.


# D20
def test_d20_not_converged_stands_in_log_metrics_result_and_report(tmp_path, capsys):
    options = {**TINY, "label_max_passes": 1, "label_tol": 1e-9, "progress": True, "model": "small-convnet"}
    result = sela_ext.train(images(white=[]), out=tmp_path / "run", **options)
    for event in events(result.out, "label_pass"):
        assert [head["converged"] for head in event["heads"]] == [False, False]
        assert all(head["error"] > 1e-9 and head["passes"] <= 2 for head in event["heads"])
    (end,) = events(result.out, "end")
    assert [head["converged"] for head in end["heads"]] == [False, False]
    assert result.metrics["error"] > 1e-9
    with open(result.out / "metrics.csv", newline="") as file:
        assert [row["converged"] for row in csv.DictReader(file) if row["event"] == "label_pass"] == ["0", "0"]
    assert "not converged: heads [0, 1]" in (result.out / "train.log").read_text()
    warning = next(text for text in end["warnings"] if text.startswith("solver not converged"))
    assert "raise label_max_passes or label_tol" in warning
    assert capsys.readouterr().out.count(warning) == 2
    assert "Solver not converged" in result.report.read_text()


# D20
def test_d20_the_program_assign_says_that_it_did_not_converge(tmp_path, sela):
    np.save(tmp_path / "logits.npy", 5 * np.random.default_rng(0).standard_normal((500, 9)))
    flags = ["--tol", 1e-12, "--max-passes", 3]
    status, said, _ = sela("assign", tmp_path / "logits.npy", "--out", tmp_path / "out.npz", *flags)
    assert status == 0
    assert "NOT converged" in said
    with np.load(tmp_path / "out.npz") as saved:
        assert not saved["converged"]
        assert 1e-12 < saved["error"] < 2
        assert 3 <= saved["passes"] < 4


# ---- D21: a loss that is no number.


class Fragile(nn.Module):
    """Eight features. At the training step `Fragile.at` the loss, or the gradient alone, is no number."""

    at, loss_too, done = None, True, 0

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)

    def forward(self, pictures):
        features = self.convolution(pictures).mean((2, 3))
        if self.training and torch.is_grad_enabled() and Fragile.done + 1 == Fragile.at:
            return features * float("nan") if Fragile.loss_too else features + (features * 0).abs().sqrt()
        return features


def fragile(at=None, *, loss_too=True):
    """Options of a run whose step `at` gives no number."""
    Fragile.at, Fragile.loss_too, Fragile.done = at, loss_too, 0

    def count(event, info):
        Fragile.done = info.step

    return {"model": Fragile, "callbacks": count}


LONG = {**TINY, "epochs": 3, "checkpoint_seconds": 0.0, "log_every": 1}


# D21
@pytest.mark.parametrize("loss_too", [True, False], ids=["loss", "gradient-alone"])
@pytest.mark.parametrize("at", [1, 7])
def test_d21_a_run_stops_within_a_step_and_its_last_checkpoint_continues_to_the_same_bits(tmp_path, at, loss_too):
    pictures, out = images(white=[]), tmp_path / "run"
    whole = sela_ext.train(pictures, out=tmp_path / "whole", **fragile(), **LONG)
    with pytest.raises(NumericsError) as caught:
        sela_ext.train(pictures, out=out, **fragile(at, loss_too=loss_too), **LONG)
    message = str(caught.value)
    assert "lower lr" in message
    assert str(out / "checkpoints") in message
    step = int(re.search(r"step (\d+)", message)[1])
    assert step == at
    assert not (out / "labels.csv").exists()
    assert not loss_too or re.search(r"in a batch with \S+, \S+, \S+, \.\.\.", message)
    # What was saved last is from before: it loads, holds numbers, and the run goes on from it as if nothing had been.
    saved = load_checkpoint(out / "checkpoints", tidy=False)
    if at == 1:
        assert saved is None
    else:
        assert saved["state"]["step"] == at - 1
        assert all(torch.isfinite(value).all() for value in saved["network"].values() if value.is_floating_point())
    again = sela_ext.train(pictures, out=out, **fragile(), resume=True, **LONG)
    np.testing.assert_array_equal(again.labels, whole.labels)
    np.testing.assert_array_equal(again.confidence, whole.confidence)
    weights, others = whole.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


# D21
def test_d21_the_program_ends_with_status_5_and_names_the_files(tmp_path, sela):
    flags = [
        *("--lr", "1000", "--head-kind", "linear", "--momentum", "0.99", "--weight-decay", "10", "--warmup", "0"),
        *("--epochs", "6", "--clusters", "10", "--projection", "0", "--precision", "float32", "--threads", "1"),
        *("--checkpoint-seconds", "0", "--batch-size", "64", "--no-progress", "--label-passes", "0"),
    ]
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (256, 16, 16), dtype=np.uint8))
    out = tmp_path / "run"
    status, said, err = sela("train", "--data", tmp_path / "images.npy", "--out", out, *flags)
    assert (status, said, err.count("\n")) == (5, "", 1)
    assert re.match(r"sela: error: (loss is (nan|-?inf) at step \d+, in a batch with \S+|weights are no numbers)", err)
    assert "lower lr (now 1000)" in err
    saved = load_checkpoint(out / "checkpoints", tidy=False)
    assert saved is not None
    assert not any(torch.isnan(value).any() for value in saved["network"].values() if value.is_floating_point())
