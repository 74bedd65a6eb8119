"""Values of options from their texts, on the command line and in files."""

from __future__ import annotations

import dataclasses
from typing import Any

# Options that take several kinds of values, numbers or lists of them among these.
_NUMBERS = ("marginals", "size_bounds")
_NUMBER = ("holdout", "devices", "relax")


def read_option(spec: dataclasses.Field[Any], text: str, *, alone: bool = True) -> Any:
    """A value from its text; what it cannot read stays text, for the option's own check.

    Args:
        spec: the option.
        text: as on the command line.
        alone: commas separate numbers; False = the text is an element of a list.

    Example:
        >>> from sela_ext.training import Options
        >>> options = {spec.name: spec for spec in dataclasses.fields(Options)}
        >>> read_option(options["epochs"], "5"), read_option(options["lr"], "1e-3")
        (5, 0.001)
        >>> read_option(options["clusters"], "10,128"), read_option(options["model"], "resnet18")
        ([10, 128], 'resnet18')
    """
    kind = spec.metadata["kind"]
    if kind in ("int", "float") or spec.name in _NUMBER:
        return _number(text)
    if kind in ("ints", "floats") or spec.name in _NUMBERS:
        parts = [_number(part) for part in text.split(",")] if alone else [_number(text)]
        return parts if len(parts) > 1 else parts[0]
    return text


def _number(text: str) -> Any:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text
