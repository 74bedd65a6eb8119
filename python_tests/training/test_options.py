import math

import pytest

from sela_ext.errors import OptionError
from sela_ext.training.options import Options, make_options, parse_budget
from sela_ext.training.presets import PRESETS


# D8
def test_unknown_options_name_the_nearest():
    with pytest.raises(OptionError, match="unknown option 'epoch'; did you mean 'epochs'"):
        make_options({"epoch": 3})


# D8 D9
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 0, ">= 1"),
        ("epochs", 1.5, "whole number"),
        ("epochs", "many", "whole number"),
        ("epochs", True, "whole number"),
        ("lr", 0, "> 0"),
        ("lr", math.nan, "> 0"),
        ("lr", 1e9, "<= 1000"),
        ("batch_size", -1, ">= 2"),
        ("clusters", 1, ">= 2"),
        ("clusters", [10, 0], ">= 2"),
        ("clusters", [], "a number or a list"),
        ("lam", -25.0, "> 0"),
        ("lam", math.inf, "> 0"),
        ("seed", -1, ">= 0"),
        ("resume", "yes", "True or False"),
        ("label_spacing", "quadratc", "did you mean 'quadratic'"),
        ("device", 3, "a string"),
    ],
)
def test_values_outside_the_range_are_refused_with_the_range(name, value, expected):
    with pytest.raises(OptionError, match=expected) as caught:
        make_options({name: value})
    assert name in str(caught.value)


def test_the_preset_yields_to_what_is_given():
    options = make_options({"preset": "paper-alexnet-10x3k", "clusters": 500})
    assert (options.clusters, options.heads, options.epochs) == (500, 10, 400)
    with pytest.raises(OptionError, match="did you mean 'cifar10'"):
        make_options({"preset": "cifar-10"})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_made_of_valid_options(name):
    assert make_options({"preset": name}).preset == name


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(OptionError, match="at most one"):
        Options(resume=True, overwrite=True)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10min", 600), ("2h", 7200), ("1.5 m", 90), (30, 30), ("45", 45)]
)
def test_budgets_are_read_in_the_usual_units(text, seconds):
    assert parse_budget(text) == seconds


# D9
@pytest.mark.parametrize("text", ["soon", "-3min", "0s", "10 parsecs", "nan"])
def test_budgets_that_are_no_duration_are_refused(text):
    with pytest.raises(OptionError, match="budget"):
        parse_budget(text)
