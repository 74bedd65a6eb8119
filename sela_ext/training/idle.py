"""Options that would do nothing beside the others: refused, so that nobody studies what has no effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from sela_ext.errors import OptionError, shown
from sela_ext.training.options import Options

_OF_CLUSTERING = ("pca", "kmeans_iterations")
_OF_SOLVER = ("lam", "label_tol", "label_method", "label_max_passes")
_OF_VECTORS = ("feature_noise", "feature_dropout", "feature_scale")


def refuse_idle(values: Mapping[str, Any], asked: Collection[str], vectors: bool) -> None:
    """Refuse what the user asked for and nothing would heed.

    Args:
        values: all options, none of them "auto".
        asked: names that the user set; what a preset says besides may be idle, and a default always.
        vectors: whether the data are feature vectors.

    Raises:
        OptionError: an option without effect.
    """
    method, fixed = values["method"], values["fixed_labels"] is not None
    clusters = method in ("kmeans", "deepcluster")
    idle: dict[str, str] = {}
    if fixed:
        idle |= dict.fromkeys((*_OF_CLUSTERING, *_OF_SOLVER), "with fixed_labels, which no label pass changes")
    elif clusters:
        idle |= dict.fromkeys(_OF_SOLVER, f"with method {method}, which balances nothing")
    else:
        idle |= dict.fromkeys(_OF_CLUSTERING, f"with method {method}; they are of methods deepcluster and kmeans")
    if not vectors:
        idle |= dict.fromkeys(_OF_VECTORS, "with images; it is for feature vectors")
    if values["head_kind"] == "linear":
        idle["temperature"] = "with linear heads; it is of head_kind cosine"
    if values["lr_schedule"] != "step":
        idle["lr_milestones"] = f"with lr_schedule {values['lr_schedule']}; they are of lr_schedule step"
    if values["label_source"] != "eval":
        idle["label_augment"] = f"with label_source {values['label_source']}; it is of label_source eval"
    defaults = {spec.name: spec.default for spec in dataclasses.fields(Options)}
    for name, why in idle.items():
        if name in asked and values[name] != defaults[name]:
            raise OptionError(f"{name}: expected none {why}, found {shown(values[name])}; leave it out")
