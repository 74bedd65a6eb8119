import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext.errors import OptionError
from sela_ext.training.recipes.kmeans import KmeansRecipe

spec = importlib.util.spec_from_file_location("small_runs", Path(__file__).with_name("small_runs.py"))
small_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small_runs)
events = small_runs.events

TINY = {
    "method": "kmeans",
    "epochs": 3,
    "batch_size": 32,
    "clusters": [4, 7],
    "projection": 16,
    "threads": 1,
    "progress": False,
    "checkpoint_seconds": 0,
}


def blobs(count=130):
    labels = np.arange(count) % 4
    return small_runs.quadrants(labels), labels


@pytest.mark.parametrize("source", ["bank", "eval", "official"])
def test_a_run_labels_by_kmeans_and_ends_with_its_metrics(tmp_path, source):
    images, truth = blobs()
    result = sela_ext.train(
        images, out=tmp_path / "run", labels=truth, holdout=30, label_source=source, label_passes=3, **TINY
    )
    assert result.labels.shape == (2, 130)
    assert {"nmi", "ari", "accuracy", "knn", "linear", "cross_entropy"} <= set(result.metrics)
    passes = events(result.out, "label_pass")
    assert [event["step"] for event in passes] == [0, 3, 6]
    for event in [*passes, *events(result.out, "end")]:
        for head, k in zip(event["heads"], (4, 7), strict=True):
            assert (head["method"], head["clusters"], head["used"]) == ("kmeans", k, k)
            assert head["ln_k"] == pytest.approx(np.log(k))
            assert head["size_min"] > 0
            assert 1 <= head["passes"] <= 21
    assert result.report.stat().st_size > 0
    best = min(events(result.out, "end")[0]["heads"], key=lambda head: head["cross_entropy"])
    assert result.head == best["head"]


def test_easy_clusters_are_found(tmp_path):
    images, truth = blobs(192)
    options = {**TINY, "epochs": 10, "clusters": [4] * 4, "augment": sela_ext.Augment.none(16), "half_resolution": 0.0}
    result = sela_ext.train(images, out=tmp_path / "run", labels=truth, **options)
    assert max(head["nmi"] for head in events(result.out, "end")[0]["heads"]) > 0.9
    # The clusters keep their numbers from pass to pass, so that the heads can learn them.
    assert np.mean([head["changed"] for head in events(result.out, "label_pass")[-1]["heads"]]) < 0.3
    assert result.metrics["cross_entropy"] < 0.5 * np.log(4)


@pytest.mark.parametrize("step", [2, 6])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, step):
    images, truth = blobs()
    options = {**TINY, "labels": truth, "sampler": "clusters", "label_passes": 5}
    whole = sela_ext.train(images, out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        small_runs.stop_at(KmeansRecipe, step, patch)
        with pytest.raises(small_runs.StopError):
            sela_ext.train(images, out=tmp_path / "stopped", **options)
    small_runs.assert_same_run(sela_ext.train(images, out=tmp_path / "stopped", resume=True, **options), whole)


def test_new_images_get_the_label_that_the_network_finds_most_likely(tmp_path):
    images, _ = blobs()
    result = sela_ext.train(images, out=tmp_path / "run", **TINY)
    labels = sela_ext.predict(result.out, images[:31])
    assert labels.shape == (2, 31)
    saved = torch.load(result.out / "network.pt", weights_only=True)
    assert all((potential == 0).all() for potential in saved["potentials"])


def test_labels_differ_with_iterations_whitening_and_balance(tmp_path):
    images, _ = blobs()
    runs = [{}, {"kmeans_iterations": 1}, {"pca": 6}, {"method": "sela"}]
    found = [
        sela_ext.train(images, out=tmp_path / str(i), **{**TINY, "epochs": 1, **change})
        for i, change in enumerate(runs)
    ]
    labels = [one.labels.tobytes() for one in found]
    assert len(set(labels)) == len(runs)


def test_marginals_are_refused(tmp_path):
    images, _ = blobs()
    with pytest.raises(OptionError, match="marginals: expected none with method kmeans"):
        sela_ext.train(images, out=tmp_path / "run", marginals="estimated", **TINY)


def test_labels_of_the_training_are_of_images_as_they_are(tmp_path):
    """Those of a bank of augmented images tell augmentations apart, and here .1 is what chance gives."""
    options = {"epochs": 4, "method": "kmeans", "clusters": 10, "heads": 1, "threads": 1, "progress": False}
    sela_ext.train("digits", out=tmp_path / "run", **options)
    assert json.loads((tmp_path / "run" / "options.json").read_text())["options"]["label_source"] == "eval"
    found = [record["heads"][0]["nmi"] for record in events(tmp_path / "run", "label_pass")]
    assert len(found) == 2
    assert min(found) > 0.4
