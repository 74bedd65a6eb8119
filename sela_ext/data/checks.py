"""Checks of the loader's options: each error says what was expected and found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels import Augment
from sela_ext.processors import available_processors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
MAX_VIEWS = 256


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer within [low, high].

    Raises:
        OptionError: another type, or out of range.
    """
    allowed = f">= {low}" if high is None else f"{low}..{high}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise OptionError(f"{name}: expected an integer {allowed}, found {value!r}")
    if value < low or (high is not None and value > high):
        raise OptionError(f"{name}: expected {allowed}, found {value}")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """True or False, as such or as numpy's.

    Raises:
        OptionError: another type.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise OptionError(f"{name}: expected True or False, found {value!r}")
    return bool(value)


def check_threads(value: Any) -> int:
    """A number of threads; "auto" = processors that this process may use.

    Raises:
        OptionError: another type, or below 1.
    """
    if isinstance(value, str) and value == "auto":
        return available_processors()
    return check_integer("threads", value, 1)


def check_views(augment: Any, first_view: int, dtype: torch.dtype) -> tuple[Augment, ...]:
    """One `Augment`, or several, as a tuple.

    Raises:
        OptionError: something else, none, views beyond the last number that there is, or gradients as bytes.
    """
    views = tuple(augment) if isinstance(augment, Sequence) and not isinstance(augment, str) else (augment,)
    for view in views:
        if not isinstance(view, Augment):
            raise OptionError(f"augment: expected a sela_ext.Augment, found {type(view).__name__}")
    if not 1 <= len(views) <= MAX_VIEWS - first_view:
        room = MAX_VIEWS - first_view
        raise OptionError(f"augment: expected 1 to {room} views from number {first_view} on, found {len(views)}")
    if dtype == torch.uint8 and any(view.sobel for view in views):
        raise OptionError("dtype: expected a floating-point type with sobel, found torch.uint8")
    return views


def check_device(device: str | torch.device) -> torch.device:
    """The CPU or a CUDA device that is there.

    Raises:
        OptionError: another kind of device.
        ResourceError: a GPU that is not there.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f'device: expected "cpu" or "cuda", found {device!r}') from error
    if found.type not in ("cpu", "cuda"):
        raise OptionError(f'device: expected "cpu" or "cuda", found {device!r}')
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f'device: "{device}" is not there, {torch.cuda.device_count()} GPUs are; use device="cpu"')
    return found
