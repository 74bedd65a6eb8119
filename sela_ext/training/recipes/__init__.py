"""Training methods: one file for each, all driven by the loop in `sela_ext.training.loop`."""

from __future__ import annotations

from sela_ext.training.recipes.base import Recipe, StepOutput
from sela_ext.training.recipes.sela import SelaRecipe

# What the option `method` names.
RECIPES: dict[str, type[Recipe]] = {"sela": SelaRecipe}

__all__ = ["RECIPES", "Recipe", "SelaRecipe", "StepOutput"]
