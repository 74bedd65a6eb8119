import numpy as np
import pytest

from sela_ext.data import open_source
from sela_ext.errors import OptionError
from sela_ext.training.fixed_labels import read_fixed_labels
from sela_ext.training.options import make_options, with_preset
from sela_ext.training.resolve import resolve

IMAGES = np.zeros((600, 8, 8), np.uint8)
LABELS = np.arange(600) % 3
LINEAR = {"head_kind": "linear", "init": "random"}


def planned(data=IMAGES, **options):
    """What a run would do."""
    source = open_source(data)
    fixed = read_fixed_labels(LABELS, source) if "fixed_labels" in options else None
    given = {name for name, value in with_preset(options).items() if not (isinstance(value, str) and value == "auto")}
    return resolve(make_options({"device": "cpu", **options}), given, source, fixed=fixed)


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("pca", 4, {}),
        ("kmeans_iterations", 4, {"method": "sela-v2"}),
        ("lam", 4.0, {"method": "kmeans"}),
        ("label_tol", 0.5, {"method": "deepcluster"}),
        ("label_method", "newton", {"method": "kmeans"}),
        ("label_max_passes", 7, {"fixed_labels": LABELS}),
        ("pca", 4, {"fixed_labels": LABELS}),
        ("feature_noise", 0.1, {}),
        ("feature_scale", "columns", {"method": "kmeans"}),
        ("temperature", 0.2, LINEAR),
        ("lr_milestones", [0.5], {"lr_schedule": "cosine"}),
        ("label_augment", "flip", {"label_source": "bank"}),
        ("lam", 4.0, {"preset": "kmeans-cifar10"}),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(name, value, others):
    with pytest.raises(OptionError, match=f"^{name}: expected none with .*; leave it out"):
        planned(**{name: value}, **others)


@pytest.mark.parametrize(
    "options",
    [
        {"pca": 4, "method": "kmeans"},
        {"lam": 4.0},
        {"temperature": 0.2},
        {"lr_milestones": [0.5], "lr_schedule": "step"},
        {"label_augment": "flip", "label_source": "eval"},
        {"pca": 256, "feature_noise": 0.3},  # the defaults
        {"preset": "kmeans-cifar10"},  # says lambda, as the recipe does that it departs from
        {"preset": "sela-v2-small", "head_kind": "cosine"},
    ],
)
def test_options_with_an_effect_defaults_and_a_presets_own_are_not(options):
    planned(**options)


def test_the_noise_of_vectors_is_an_option_of_vectors():
    rows = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    assert planned(rows, feature_noise=0.1, feature_dropout=0.0).vectors is not None


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"optimizer": "adamw"}, 0.001),
        ({"optimizer": "lars"}, 0.3),
        ({"optimizer": "adamw", "preset": "paper-alexnet-1k"}, 0.001),
        ({"optimizer": "adamw", "lr": 0.02}, 0.02),
        ({"optimizer": "sgd"}, 0.2),
        ({"preset": "paper-alexnet-1k"}, 0.05),
        ({"preset": "sela-v2-resnet50", "batch_size": 256}, 4.8),
    ],
)
def test_the_learning_rate_is_one_for_the_optimiser(options, rate):
    images = np.zeros((3000, 8, 8), np.uint8)
    assert planned(images, **options).options.lr == pytest.approx(rate)


def test_nesterov_needs_a_momentum_that_is_there():
    assert planned().options.nesterov
    for options in ({"momentum": 0.0}, {"optimizer": "adamw"}):
        assert not planned(**options).options.nesterov
        with pytest.raises(OptionError, match="nesterov: expected False, since"):
            planned(nesterov=True, **options)
    assert planned(optimizer="lars", momentum=0.0, nesterov=True).options.nesterov


def test_one_cycle_rises_as_long_as_it_says():
    assert planned(lr_schedule="onecycle").options.warmup == 0.0
    assert planned(lr_schedule="onecycle", preset="fast").options.warmup == 0.0
    assert planned(lr_schedule="onecycle", warmup=0.1).options.warmup == 0.1


def test_what_the_fast_preset_says_gives_way_as_what_auto_takes_does():
    images = np.zeros((600, 32, 32), np.uint8)
    for preset in ({}, {"preset": "fast"}):
        options = planned(images, crops="2x32+2x16", **preset).options
        assert (options.crops, options.half_resolution) == ("2x32+2x16", 0.0)
        assert planned(images, head_kind="linear", **preset).options.init == "predictions"
        with pytest.raises(OptionError, match="half_resolution and crops"):
            planned(images, crops="2x32+2x16", half_resolution=0.25, **preset)


def test_a_budget_does_not_make_deepcluster_relabel_at_every_step():
    assert planned(method="deepcluster", budget=60, label_spacing="quadratic").options.label_passes == 50
    assert planned(method="deepcluster", budget=60).pass_each_epoch


@pytest.mark.parametrize("method", ["kmeans", "deepcluster"])
def test_a_preset_with_crops_serves_methods_without(method):
    plan = planned(preset="sela-v2-resnet50", method=method, model="small-resnet", clusters=10)
    assert (plan.options.method, plan.options.crops) == (method, None)
