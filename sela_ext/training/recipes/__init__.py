"""Training methods: one file for each, all driven by the loop in `sela_ext.training.loop`."""

from __future__ import annotations

from sela_ext.training.recipes.base import Recipe, StepOutput
from sela_ext.training.recipes.deepcluster import DeepClusterRecipe
from sela_ext.training.recipes.fixed import FixedLabelsRecipe
from sela_ext.training.recipes.kmeans import KmeansRecipe
from sela_ext.training.recipes.sela import SelaRecipe
from sela_ext.training.recipes.sela_v2 import SelaV2Recipe
from sela_ext.training.run import Run

# What the option `method` names.
RECIPES: dict[str, type[Recipe]] = {
    "sela": SelaRecipe,
    "sela-v2": SelaV2Recipe,
    "deepcluster": DeepClusterRecipe,
    "kmeans": KmeansRecipe,
}


def make_recipe(run: Run) -> Recipe:
    """The method of a run; given labels come before any method of making some."""
    return (FixedLabelsRecipe if run.options.fixed_labels is not None else RECIPES[run.options.method])(run)


__all__ = [
    "RECIPES",
    "DeepClusterRecipe",
    "FixedLabelsRecipe",
    "KmeansRecipe",
    "Recipe",
    "SelaRecipe",
    "SelaV2Recipe",
    "StepOutput",
    "make_recipe",
]
