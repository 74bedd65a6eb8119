import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import sela_ext
from sela_ext import kernels
from sela_ext.cli.training import add_train
from sela_ext.data import Augment
from sela_ext.data.source import Source
from sela_ext.errors import OptionError
from sela_ext.training import run as run_module
from sela_ext.training.fixed_labels import FixedLabels
from sela_ext.training.labelling import random_labels
from sela_ext.training.options import AUTO, Options, make_options, with_preset
from sela_ext.training.presets import ABLATIONS, PRESETS
from sela_ext.training.resolve import resolve
from sela_ext.training.schedule import learning_rate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
TINY = {"epochs": 1, "batch_size": 32, "model": "small-resnet", "projection": 0, "threads": 1, "progress": False}


class Photographs(Source):
    """As many images as ImageNet has, of which nothing but number and size is ever asked."""

    kind = "photographs"

    def __init__(self, count=1_281_167, size=(500, 375)):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    @property
    def names(self):
        raise AssertionError("names are not needed")

    def read(self, index):
        raise AssertionError("pixels are not needed")

    @property
    def image_size(self):
        return self.size


def resolved(options, source=None):
    source = source or Photographs()
    fixed = None
    if options.get("fixed_labels") is not None:
        fixed = FixedLabels(np.arange(20, dtype=np.int32).reshape(2, 10) % 5, [3000, 3000], "labels")
    given = {name for name, value in with_preset(options).items() if value != AUTO}
    return resolve(make_options({"device": "cpu", **options}), given, source, fixed=fixed)


def from_command(arguments):
    """Options of a line that begins with --, as `sela train` reads them."""
    parser = argparse.ArgumentParser()
    add_train(parser.add_subparsers(), "train")
    read = vars(parser.parse_args(["train", "--data", "imagenet", "--out", "runs/x", *shlex.split(arguments)]))
    return {name: value for name, value in read.items() if name not in ("data", "out", "config", "run", "parser")}


# --- The presets against method.md

PAPER = {
    "epochs": 400,
    "batch_size": 256,
    "lr": 0.05,
    "lr_schedule": "step",
    "lr_milestones": [0.375, 0.75, 0.875],
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-5,
    "decay_vectors": True,
    "label_passes": 100,
    "label_spacing": "quadratic",
    "label_source": "official",
    "label_heads": "all",
    "init": "random",
    "lam": 25.0,
    "loss": "mean",
    "head_kind": "linear",
    "projection": 0,
    "warmup": 0.0,
    "half_resolution": 0.0,
    "image_size": 224,
    "augment": "sela",
    "method": "sela",
    "rotnet": False,
}
CIFAR = {
    **PAPER,
    "model": "alexnet",
    "clusters": [128] * 10,
    "batch_size": 128,
    "lr": 0.03,
    "weight_decay": 5e-4,
    "label_passes": 400,
    "label_spacing": "linear",
    "label_heads": "turn",
    "lam": 10.0,
    "label_tol": 1e-2,
    "augment": "cifar",
}
RETRAINED = {
    **PAPER,
    "model": "alexnet",
    "epochs": 90,
    "lr_milestones": [1 / 3, 2 / 3],
    "label_passes": 0,
    "clusters": [3000, 3000],
}
for word in ("label_spacing", "label_source"):
    del RETRAINED[word]
EXPECTED = {
    **{f"paper-alexnet-{k}k": {**PAPER, "model": "alexnet", "clusters": [1000 * k]} for k in (1, 3, 5, 10)},
    "paper-alexnet-10x3k": {**PAPER, "model": "alexnet", "clusters": [3000] * 10},
    "paper-resnet50-10x3k": {**PAPER, "model": "resnet50-preact", "clusters": [3000] * 10},
    "aug-plus-resnet18-1k": {**PAPER, "model": "resnet18", "clusters": [1000], "augment": "aug_plus"},
    "aug-plus-resnet50-1k": {**PAPER, "model": "resnet50", "clusters": [1000], "augment": "aug_plus"},
    "aug-plus-resnet50-10x3k": {**PAPER, "model": "resnet50", "clusters": [3000] * 10, "augment": "aug_plus"},
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "svhn": CIFAR,
    "transfer-alexnet": RETRAINED,
    "rotnet-alexnet": {**RETRAINED, "rotnet": True},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_the_published_recipe(name):
    options = {"preset": name, **({"fixed_labels": "runs/x"} if name in ("transfer-alexnet", "rotnet-alexnet") else {})}
    source = Photographs(50_000, (32, 32)) if name in ("cifar10", "cifar100", "svhn") else Photographs()
    plan = resolved(options, source)
    assert {word: getattr(plan.options, word) for word in EXPECTED[name]} == EXPECTED[name]
    assert plan.options.heads == len(plan.options.clusters)
    assert not plan.pass_each_epoch


def another(name, value):
    """A value that an option takes, other than this one."""
    spec = {field.name: field for field in dataclasses.fields(Options)}[name]
    meta = spec.metadata
    if meta["kind"] == "bool":
        return not value
    if meta["choices"]:
        return next(choice for choice in meta["choices"] if choice != value)
    if meta["kind"] in ("int", "float", "ints", "floats"):
        number = value[0] if isinstance(value, list) else value
        return number + 3 if meta["kind"].startswith("int") else number / 2 or 0.5
    return {"model": "vgg16-bn", "augment": "flip", "label_augment": "flip", "crops": "2x96+4x32"}[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_option_of_a_preset_can_be_overridden(name):
    fixed = {"fixed_labels": "runs/x"} if PRESETS[name].needs else {}
    for word, value in PRESETS[name].options.items():
        other = another(word, value)
        assert getattr(make_options({"preset": name, **fixed, word: other}), word) == other != value


def test_every_preset_says_its_source_what_it_costs_and_what_to_expect():
    for name, preset in PRESETS.items():
        assert re.search(r"paper|SeLa authors|built-in|auto|`fast`|SwAV|DeepCluster", preset.source), name
        assert re.search(r"GPU|cores?\b|costs?\b|as many images", preset.source), name
        assert re.search(r"\d\d\.\d|\.\d\d|No figure is published|two processor cores", preset.source), name


@pytest.mark.parametrize("name", ["transfer-alexnet", "rotnet-alexnet"])
def test_retraining_needs_labels(name, tmp_path):
    with pytest.raises(OptionError, match=f"fixed_labels: expected labels of another run with preset {name}"):
        sela_ext.train("digits", out=tmp_path / "run", preset=name)
    more = resolved({"preset": name, "fixed_labels": "runs/x", "augment": "aug_plus_more"})
    assert more.augment == Augment.aug_plus_more(224)


def test_the_cifar_recipe_draws_what_the_script_draws():
    augment = resolved({"preset": "cifar10"}, Photographs(50_000, (32, 32))).augment
    assert (augment.size, augment.crop, augment.scale) == (224, "random", (0.2, 1.0))
    assert (augment.gray_probability, augment.gray_first, augment.flip_probability) == (0.2, False, 0.5)
    assert augment.jitter_probability == 1.0
    assert all(augment.factor_range(name) == (0.6, 1.4) for name in ("brightness", "contrast", "saturation"))
    assert augment.factor_range("hue") == (-0.4, 0.4)
    assert augment.mean == (0.4914, 0.4822, 0.4465)


def test_one_resampling_from_32_pixels_is_close_to_the_two_of_the_script():
    from torchvision.transforms.v2 import functional as T

    rng = np.random.default_rng(0)
    rough = torch.from_numpy(rng.integers(0, 256, (8, 3, 9, 9), dtype=np.uint8))
    images = T.resize(rough, [32, 32], antialias=True)  # as smooth as photographs
    augment = Augment.cifar(224)
    box = {"top": 5, "left": 3, "height": 20, "width": 24}
    params = kernels.sample_parameters(Augment.none(224), 32, 32, range(8), seed=0, epoch=0)
    for word, value in box.items():
        params[word] = value
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    once = kernels.augment(pixels, params, augment)
    twice = T.resize(images, [256, 256], antialias=True)[..., 40:200, 24:216]
    twice = T.resize(twice, [224, 224], antialias=True).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (augment.mean, augment.std))
    apart = (once.float() * std + mean - twice).abs() * 255
    assert apart.mean() < 2.0
    assert apart[..., 16:-16, 16:-16].mean() < 0.6


def test_the_learning_rate_of_the_hybrid_falls_every_30_of_90_epochs():
    plan = resolved({"preset": "rotnet-alexnet", "fixed_labels": "runs/x"}).options
    rates = [learning_rate(plan.lr, e / 90, plan.lr_schedule, plan.warmup, plan.lr_milestones) for e in range(90)]
    assert rates == pytest.approx([0.05] * 30 + [0.005] * 30 + [0.0005] * 30)


def test_milestones_are_ascending_shares():
    assert resolved({"preset": "cifar10", "lr_milestones": 0.5}).options.lr_milestones == [0.5]
    for wrong in ([0.5, 0.25], [0.5, 0.5]):
        with pytest.raises(OptionError, match="lr_milestones: expected ascending shares"):
            resolved({"preset": "cifar10", "lr_milestones": wrong})
    for wrong in ([30, 60], [0.0], []):
        with pytest.raises(OptionError, match="lr_milestones: expected a number"):
            resolved({"preset": "cifar10", "lr_milestones": wrong})


# --- The studies

STUDIES = {
    "--preset paper-alexnet-1k --epochs 160 --label-passes 0": {"epochs": 160, "label_passes": 0, "clusters": [1000]},
    "--preset paper-alexnet-1k --epochs 160 --label-passes 40": {"epochs": 160, "label_passes": 40, "clusters": [1000]},
    "--preset paper-alexnet-1k --epochs 160 --label-passes 80": {"epochs": 160, "label_passes": 80, "clusters": [1000]},
    "--preset paper-alexnet-1k --epochs 160 --label-passes 160": {"epochs": 160, "label_passes": 160},
    "--preset paper-alexnet-1k": {"clusters": [1000], "model": "alexnet"},
    "--preset paper-alexnet-3k": {"clusters": [3000], "model": "alexnet"},
    "--preset paper-alexnet-5k": {"clusters": [5000], "model": "alexnet"},
    "--preset paper-alexnet-10k": {"clusters": [10_000], "model": "alexnet"},
    "--preset paper-alexnet-10x3k": {"clusters": [3000] * 10, "model": "alexnet"},
    "--preset paper-alexnet-3k --model alexnet-small": {"clusters": [3000], "model": "alexnet-small"},
    "--preset paper-alexnet-3k --model resnet50-preact": {"clusters": [3000], "model": "resnet50-preact"},
    "--preset paper-resnet50-10x3k": {"clusters": [3000] * 10, "model": "resnet50-preact"},
}


def test_the_studies_are_those_of_the_paper():
    assert {ablation.arguments for ablation in ABLATIONS} == set(STUDIES)


@pytest.mark.parametrize("arguments", STUDIES)
def test_a_command_of_a_study_is_what_the_study_says(arguments):
    plan = resolved(from_command(arguments))
    expected = {**PAPER, **STUDIES[arguments]}
    assert {word: getattr(plan.options, word) for word in expected} == expected


# --- The page and the listing


def test_the_page_tells_what_the_presets_say():
    text = PAGE.read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9][a-z0-9-]*)` \| (.+?) \|$", text, re.MULTILINE))
    assert rows == {name: preset.source for name, preset in PRESETS.items()}


def test_every_command_of_the_page_is_one():
    commands = re.findall(r"sela train (--.+?)[`\n]", PAGE.read_text())
    assert {ablation.arguments for ablation in ABLATIONS} <= {
        re.sub(r"--data \S+ --out \S+ ?", "", command).strip() for command in commands
    }
    for command in commands:
        if "NAME" in command:
            continue
        read = from_command(re.sub(r"--(data|out) \S+ ?", "", command))
        make_options(read)


def test_info_lists_the_presets(capsys):
    from sela_ext.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["info", "--presets"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert f"{name}\n    {preset.source}" in printed
    assert printed.count("Needs --fixed-labels.") == 2


# --- Options of the recipes do what they say


def images(count=96, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def events(out, kind):
    return [e for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if e["event"] == kind]


def saved_labels(out):
    from sela_ext.training.checkpoint import load_checkpoint

    return load_checkpoint(out / "checkpoints")["state"]["labels"].numpy()


@pytest.fixture
def looks(monkeypatch):
    """What the network looked at beside the training steps: (augmentation, train_mode) of every pass of the run."""
    seen = []
    embed = run_module.embed

    def note(network, source, augment, arithmetic, **options):
        seen.append((augment, options["train_mode"]))
        return embed(network, source, augment, arithmetic, **options)

    monkeypatch.setattr(run_module, "embed", note)
    return seen


def test_the_bank_costs_one_look_the_other_sources_one_per_label_pass(tmp_path, looks):
    options = {**TINY, "clusters": [3, 4], "epochs": 2, "label_passes": 2, "label_spacing": "linear", "init": "random"}
    runs = {}
    for source in ("bank", "eval", "official"):
        runs[source] = sela_ext.train(images(), out=tmp_path / source, label_source=source, augment="sela", **options)
        runs[source] = (saved_labels(tmp_path / source), list(looks))
        looks.clear()
    plain, sela = Augment.none(32), Augment.sela(32)
    assert runs["bank"][1] == [(plain, True)]
    assert runs["eval"][1] == [(plain, False)] * 2
    assert runs["official"][1] == [(sela, True)] * 2
    assert not np.array_equal(runs["bank"][0], runs["eval"][0])
    assert not np.array_equal(runs["official"][0], runs["eval"][0])


def test_the_label_augmentation_is_that_of_the_eval_pass(tmp_path, looks):
    sela_ext.train(
        images(),
        out=tmp_path / "run",
        label_source="eval",
        label_augment="aug_plus",
        clusters=[3],
        label_passes=1,
        **TINY,
    )
    assert [(view.blur_probability, view.crop, mode) for view, mode in looks if not mode] == [(0.5, "random", False)]


def test_first_labels_are_a_random_deal_or_the_predictions_of_the_untrained_network(tmp_path):
    options = {**TINY, "clusters": [3, 4], "label_passes": 0, "seed": 3}
    deal = random_labels(96, [3, 4], 3)
    sela_ext.train(images(), out=tmp_path / "random", init="random", **options)
    assert events(tmp_path / "random", "label_pass") == []
    assert np.array_equal(saved_labels(tmp_path / "random"), deal)
    sela_ext.train(images(), out=tmp_path / "predictions", init="predictions", **options)
    passes = events(tmp_path / "predictions", "label_pass")
    assert [(one["pass"], one["step"]) for one in passes] == [(1, 0)]
    found = saved_labels(tmp_path / "predictions")
    assert not np.array_equal(found, deal)
    assert [np.bincount(row, minlength=k).min() > 0 for row, k in zip(found, (3, 4), strict=True)] == [True, True]


def test_heads_may_have_different_numbers_of_clusters(tmp_path):
    result = sela_ext.train(images(), out=tmp_path / "run", clusters=[2, 7, 31], **TINY)
    assert [int(row.max()) + 1 for row in result.labels[:2]] == [2, 7]
    assert 8 <= result.labels[2].max() <= 30
    assert len(result.network.heads.weight) == 40


def test_the_sum_of_the_losses_is_the_mean_times_the_heads(tmp_path):
    options = {**TINY, "clusters": [5, 5, 5], "log_every": 1, "label_passes": 0, "init": "random"}
    options |= {"precision": "float32", "label_source": "eval"}
    for loss in ("mean", "sum"):
        sela_ext.train(images(), out=tmp_path / loss, loss=loss, **options)
    mean, total = events(tmp_path / "mean", "step"), events(tmp_path / "sum", "step")
    assert total[0]["loss"] == pytest.approx(3 * mean[0]["loss"], rel=1e-5)
    assert total[-1]["loss"] != pytest.approx(3 * mean[-1]["loss"], rel=1e-5)  # other gradients, other steps


def test_cosine_heads_see_directions_and_linear_ones_lengths_too(tmp_path):
    options = {**TINY, "clusters": [5], "init": "random"}
    networks = {
        kind: sela_ext.train(images(), out=tmp_path / kind, head_kind=kind, **options, **more).network
        for kind, more in (("linear", {}), ("cosine", {"temperature": 0.25}))
    }
    embedding = torch.randn(31, networks["linear"].embedding_dim)
    with torch.no_grad():
        linear, cosine = networks["linear"].heads, networks["cosine"].heads
        assert linear.bias is not None
        assert cosine.bias is None
        assert torch.allclose(cosine(3 * embedding), cosine(embedding), atol=1e-5)
        assert cosine(embedding).abs().max() <= 1 / 0.25
        assert torch.allclose(linear(3 * embedding) - linear.bias, 3 * (linear(embedding) - linear.bias), atol=1e-4)


# --- The imbalance study


def test_the_imbalance_study_leaves_training_images_out_and_no_others(tmp_path):
    labels = np.arange(200) % 10
    test, test_labels = images(40, seed=1), np.arange(40) % 10
    np.savez(tmp_path / "test.npz", images=test, labels=test_labels)
    result = sela_ext.train(
        images(200),
        out=tmp_path / "run",
        labels=labels,
        eval_data=tmp_path / "test.npz",
        imbalance="heavy",
        clusters=[5],
        **TINY,
    )
    counts = np.bincount(labels[result.labels[0] >= 0], minlength=10)
    assert counts.tolist() == [20, 18, 16, 14, 12, 10, 8, 6, 4, 2]
    resolved_facts = json.loads((tmp_path / "run" / "options.json").read_text())["resolved"]
    assert (resolved_facts["images"], resolved_facts["training_images"]) == (200, 110)
    assert {"knn", "linear"} <= set(result.metrics)


def test_held_out_images_stay_in_full(tmp_path):
    result = sela_ext.train("digits", out=tmp_path / "run", imbalance="light", clusters=[10], **TINY)
    from sela_ext.data import digits_split, open_source

    labels = open_source("digits").labels
    train, held = digits_split()
    assert (result.labels[0][held] >= 0).all()
    nines = train[labels[train] == 9]
    assert (result.labels[0][nines] < 0).sum() == len(nines) // 2
    others = train[labels[train] != 9]
    assert (result.labels[0][others] >= 0).all()
    report = sela_ext.evaluate(tmp_path / "run", what=("clusters",))
    assert report["nmi"] == pytest.approx(result.metrics["nmi"])


def test_the_imbalance_study_needs_labels(tmp_path):
    with pytest.raises(OptionError, match="imbalance: expected labelled images, found none"):
        sela_ext.train(images(), out=tmp_path / "run", imbalance="light", **TINY)
