import dataclasses

import pytest

from sela_ext.errors import OptionError
from sela_ext.finetuning.options import FinetuneOptions, learning_rate, make_options, settle


def settled(task="classification", **options):
    return settle(make_options({"device": "cpu", **options}), task)


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_every_auto_of_a_task_is_replaced(task):
    left = {name for name, value in dataclasses.asdict(settled(task)).items() if value == "auto"}
    assert left == {"batch_norm", "train_split", "test_split"}  # these follow from backbone and data


def test_what_is_given_is_kept():
    options = settled(iterations=7, lr=0.5, layers="all")
    assert (options.iterations, options.lr, options.layers, options.batch_size) == (7, 0.5, "all", 16)


def rates(*steps, **options):
    found = settled(**options)
    return [learning_rate(found, step) / found.lr for step in steps]


def test_learning_rates_by_hand():
    assert rates(0, 9, 10, 25, iterations=30, lr_schedule="halve", lr_every=10) == [1, 1, 0.5, 0.25]
    step = rates(0, 8, 9, 10, 11, iterations=12, lr_schedule="step")
    assert step == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert rates(0, 50, iterations=100, lr_schedule="poly") == pytest.approx([1, 0.5**0.9])
    assert rates(0, 99, iterations=100, lr_schedule="constant") == [1, 1]
    assert rates(0, 1, 2, 3, iterations=9, lr_schedule="constant", warmup=3) == pytest.approx([0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iteration": 3}, "did you mean 'iterations'"),
        ({"iterations": 0}, "iterations: expected a whole number >= 1"),
        ({"lr": -1.0}, "lr: expected a number > 0"),
        ({"layers": "fc6"}, "did you mean 'fc6-8'"),
        ({"crop_low": 0.6}, "crop_low: expected at most crop_high, 0.5, found 0.6"),
        ({"classes": 256}, "classes: expected"),
        ({"device": "tpu!"}, "device: expected cpu, cuda"),
        ({"device": "meta"}, "device: expected cpu, cuda"),
        ({"device": "cpu", "precision": "float16"}, "precision: expected float32 or bfloat16 on the CPU"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        settle(make_options(options), "classification")


def test_unknown_tasks_are_refused_with_the_nearest():
    with pytest.raises(OptionError, match="did you mean detection"):
        settle(FinetuneOptions(), "detect")
