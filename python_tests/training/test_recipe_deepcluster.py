import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sela_ext
from sela_ext.errors import OptionError
from sela_ext.models import AlexNet, SmallResNet
from sela_ext.training import cluster_pass
from sela_ext.training.options import make_options
from sela_ext.training.recipes.deepcluster import DeepClusterRecipe, _before_last_relu
from sela_ext.training.recipes.sela import SelaRecipe

spec = importlib.util.spec_from_file_location("small_runs", Path(__file__).with_name("small_runs.py"))
small_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small_runs)
events, quadrants, StopError = small_runs.events, small_runs.quadrants, small_runs.StopError

TINY = {
    "method": "deepcluster",
    "epochs": 3,
    "batch_size": 32,
    "clusters": 6,
    "threads": 1,
    "progress": False,
    "checkpoint_seconds": 0,
}


class Classifier(nn.Module):
    """A network that ends as AlexNet does: a ReLU behind its last linear layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 24), nn.ReLU(inplace=True))

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))


def blobs():
    """130 images; the first classes are larger."""
    labels = np.repeat(np.arange(4), [70, 30, 20, 10])
    return quadrants(labels), labels


@pytest.fixture
def watched(monkeypatch):
    """What every step of the runs to come saw: epoch, images, labels; and the heads after every label pass."""
    seen = {"steps": [], "heads": [], "momentum": []}
    step, relabel = SelaRecipe.step, DeepClusterRecipe.relabel

    def watch_step(self, batch):
        seen["steps"].append((self.run.state["epoch"], batch.index.numpy(), self.run.labels[0].copy()))
        return step(self, batch)

    def watch_relabel(self, which):
        result = relabel(self, which)
        heads = self.run.network.heads
        seen["heads"].append(heads.weight.detach().clone())
        seen["momentum"].append([parameter in self.run.update.optimizer.state for parameter in heads.parameters()])
        return result

    monkeypatch.setattr(SelaRecipe, "step", watch_step)
    monkeypatch.setattr(DeepClusterRecipe, "relabel", watch_relabel)
    return seen


def test_a_run_makes_a_pass_a_head_and_an_even_epoch_each_time(tmp_path, watched):
    images, truth = blobs()
    result = sela_ext.train(images, out=tmp_path / "run", labels=truth, holdout=20, **TINY)
    assert result.labels.shape == (1, 130)
    assert {"nmi", "ari", "accuracy", "knn", "linear", "cross_entropy"} <= set(result.metrics)
    passes = events(result.out, "label_pass")
    assert [event["epoch"] for event in passes] == [0, 1, 2]
    assert all(event["heads"][0]["used"] == 6 for event in passes)
    # A new head for every pass: N(0, .01), and nothing that the optimiser knew of the old one.
    assert all(0.008 < float(weight.std()) < 0.012 for weight in watched["heads"])
    assert not torch.equal(watched["heads"][0], watched["heads"][1])
    assert watched["momentum"] == [[False, False]] * 3
    # Every cluster comes equally often in an epoch, and labels change between epochs alone.
    for epoch in range(3):
        steps = [(index, labels) for number, index, labels in watched["steps"] if number == epoch]
        labels = steps[0][1]
        assert all(np.array_equal(labels, other) for _, other in steps)
        drawn = np.bincount(labels[np.concatenate([index for index, _ in steps])], minlength=6)
        assert set(drawn) == {16}  # 18 would leave a last batch of 12
        assert np.ptp(np.bincount(labels)) > 2  # though their sizes differ


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, step):
    images, truth = blobs()
    options = {**TINY, "labels": truth, "model": Classifier, "evaluate_every": 1}
    whole = sela_ext.train(images, out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        small_runs.stop_at(SelaRecipe, step, patch)
        with pytest.raises(StopError):
            sela_ext.train(images, out=tmp_path / "stopped", **options)
    small_runs.assert_same_run(sela_ext.train(images, out=tmp_path / "stopped", resume=True, **options), whole)


@pytest.mark.parametrize("projection", [0, 12])
def test_features_are_taken_before_the_last_relu_and_heads_see_them_behind_it(tmp_path, monkeypatch, projection):
    images, _ = blobs()
    seen = []
    usual = cluster_pass.Whitening.fit

    def watch(features, *args, **options):
        seen.append(features.clone())
        return usual(features, *args, **options)

    monkeypatch.setattr(cluster_pass.Whitening, "fit", staticmethod(watch))
    options = {**TINY, "model": Classifier, "projection": projection, "epochs": 1, "precision": "float32"}
    result = sela_ext.train(images, out=tmp_path / "run", **options)
    assert all(features.shape == (130, 24) and (features < 0).any() for features in seen)
    network = result.network
    plain = torch.cat([b.images for b in sela_ext.Loader(images, shuffle=False, threads=1).epoch(0)])
    assert plain.shape[-1] == 16
    size = json.loads((result.out / "options.json").read_text())["options"]["image_size"]
    loader = sela_ext.Loader(images, shuffle=False, augment=sela_ext.Augment.none(size), threads=1)
    with torch.no_grad():
        pictures = torch.cat([batch.images for batch in loader.epoch(0)])
        behind = network.features(pictures)
        torch.testing.assert_close(seen[-1].relu(), behind, rtol=1e-4, atol=1e-5)
        log_p = network.heads.logits_of(0, network.projection(behind)).log_softmax(1)
    chosen = torch.from_numpy(result.labels[0]).long()[:, None]
    assert result.metrics["cross_entropy"] == pytest.approx(float(-log_p.gather(1, chosen).mean()), rel=1e-3)
    np.testing.assert_allclose(result.confidence[0], log_p.gather(1, chosen)[:, 0].exp().numpy(), rtol=1e-2)


def test_the_last_relu_comes_back_and_networks_without_one_stay():
    network = AlexNet()
    last = network.classifier[-1]
    with _before_last_relu(network) as found:
        assert found
        assert isinstance(network.classifier[-1], nn.Identity)
    assert network.classifier[-1] is last
    with pytest.raises(StopError), _before_last_relu(network):
        raise StopError
    assert network.classifier[-1] is last
    with _before_last_relu(SmallResNet()) as found:
        assert not found


def test_several_heads_have_clusterings_of_their_own_and_take_turns_in_the_sampler(tmp_path, watched):
    images, _ = blobs()
    result = sela_ext.train(images, out=tmp_path / "run", **{**TINY, "clusters": [5, 9], "label_heads": "turn"})
    passes = events(result.out, "label_pass")
    assert [[head["head"] for head in event["heads"]] for event in passes] == [[0], [1], [0]]
    # A pass of one head leaves the other, and what the optimiser knows of it.
    first, second = watched["heads"][:2]
    assert not torch.equal(first[:5], second[:5])
    assert abs(float(second[5:].std()) - 0.01) < 0.003
    assert watched["momentum"] == [[False, False], [True, True], [True, True]]


def test_new_images_are_labelled_and_the_run_is_evaluated(tmp_path):
    images, truth = blobs()
    result = sela_ext.train(images, out=tmp_path / "run", labels=truth, **TINY)
    assert sela_ext.predict(result.out, images[:31]).shape == (1, 31)
    np.savez(tmp_path / "labelled.npz", images=images, labels=truth)
    scores = sela_ext.evaluate(result.out, data=tmp_path / "labelled.npz", what=("clusters",))
    assert "nmi" in json.dumps(scores, default=str)


@pytest.mark.parametrize("source", ["bank", "official"])
def test_other_label_sources_are_refused(tmp_path, source):
    with pytest.raises(OptionError, match=f"label_source: expected eval with method deepcluster, found {source}"):
        sela_ext.train(blobs()[0], out=tmp_path / "run", label_source=source, **TINY)


@pytest.mark.parametrize(
    ("preset", "model"), [("deepcluster-alexnet", "alexnet-sobel"), ("deepcluster-vgg16", "vgg16-bn-sobel")]
)
def test_the_presets_are_the_papers_recipe(preset, model):
    options = make_options({"preset": preset})
    assert (options.method, options.model, options.clusters, options.heads) == ("deepcluster", model, 10_000, 1)
    assert (options.lr, options.lr_schedule, options.momentum, options.weight_decay) == (0.05, "constant", 0.9, 1e-5)
    assert (options.pca, options.kmeans_iterations, options.batch_size) == (256, 20, 256)
    assert (options.sampler, options.head_kind, options.label_source) == ("clusters", "linear", "eval")


def test_a_preset_of_another_method_gives_way_to_what_the_method_needs():
    options = make_options({"preset": "digits", "method": "deepcluster", "heads": 2})
    assert (options.label_source, options.head_kind, options.heads) == ("eval", "linear", 2)
    assert options.lr == make_options({"preset": "digits"}).lr
    kept = make_options({"preset": "deepcluster-alexnet", "head_kind": "cosine"})
    assert (kept.head_kind, kept.sampler) == ("cosine", "clusters")


def test_few_dimensions_are_not_all_whitened(tmp_path):
    images, _ = blobs()
    options = {**TINY, "epochs": 1, "model": "small-resnet"}
    chosen = sela_ext.train(images, out=tmp_path / "chosen", **options)
    assert json.loads((chosen.out / "options.json").read_text())["reasons"]["pca"].startswith("32 of 256: a quarter")
    asked = [sela_ext.train(images, out=tmp_path / str(pca), pca=pca, **options) for pca in (32, 64)]
    np.testing.assert_array_equal(asked[0].labels, chosen.labels)
    assert not np.array_equal(asked[1].labels, chosen.labels)
