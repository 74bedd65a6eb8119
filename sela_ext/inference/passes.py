"""Passes of a prepared network over images, on the device and in the precision of choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from sela_ext.data import Source
from sela_ext.errors import OptionError
from sela_ext.inference.subject import Prepared, Subject
from sela_ext.processors import available_processors
from sela_ext.training.embedding import Arithmetic, Embedded
from sela_ext.training.embedding import embed as embed_images
from sela_ext.training.options import AUTO
from sela_ext.training.resolve import cpu_multiplies_bfloat16

# Images that batch-norm statistics of an untrained network are taken from.
_SETTLING_IMAGES = 4096
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Where and how networks compute.

    Attributes:
        arithmetic: device and precision.
        threads: of torch and the loader.
        batch_size: images per forward pass.
        on_bad_image: "raise" or "skip".
    """

    arithmetic: Arithmetic
    threads: int
    batch_size: int
    on_bad_image: Literal["raise", "skip"]


def choose_machine(
    subject: Subject, *, device: str, precision: str, threads: Any, batch_size: int, on_bad_image: str
) -> Machine:
    """Check the options, and replace "auto".

    Raises:
        OptionError: a value that there is not.
    """
    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device: expected cpu, cuda or cuda:N, found {device!r}") from error
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.type not in ("cpu", "cuda") or (place.type == "cuda" and (place.index or 0) >= there):
        raise OptionError(f"device: expected cpu or one of {there} CUDA devices, found {device!r}")
    if precision == AUTO:
        # As the run was trained, so that figures are its own; on a processor without the instructions that is slow.
        precision = subject.precision
        if place.type == "cpu" and (precision == "float16" or not cpu_multiplies_bfloat16()):
            precision = "float32"
    if precision not in _DTYPES or (precision == "float16" and place.type == "cpu"):
        raise OptionError(f"precision: expected {', '.join(_DTYPES)} (float16 on CUDA alone), found {precision!r}")
    if on_bad_image not in ("raise", "skip"):
        raise OptionError(f'on_bad_image: expected "raise" or "skip", found {on_bad_image!r}')
    processors = available_processors()
    count = processors if threads in (AUTO, 0) else threads
    for name, value in (("threads", count), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}: expected a whole number of at least 1, found {value!r}")
    return Machine(
        Arithmetic(place, _DTYPES[precision]), count, batch_size, "skip" if on_bad_image == "skip" else "raise"
    )


def settle(prepared: Prepared, source: Source, machine: Machine) -> Prepared:
    """Give the batch norm of an untrained network the statistics of the images, as the first pass of a training does.

    Without them every layer behind the first sees activations far from zero mean, and all features point the same way.
    Up to 4,096 images are looked at, in batches; labels play no part.

    Returns:
        The same network, changed; no longer untrained.
    """
    norms = [module for module in prepared.network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not prepared.untrained or not norms:
        return replace(prepared, untrained=False)
    rows = np.unique(np.linspace(0, len(source) - 1, min(len(source), _SETTLING_IMAGES)).astype(np.int64))
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    dropouts = [module for module in prepared.network.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    shares = [dropout.p for dropout in dropouts]
    for dropout in dropouts:
        dropout.p = 0.0
    embed_images(
        prepared.network.to(machine.arithmetic.device),
        source.subset(rows),
        prepared.plain,
        machine.arithmetic,
        batch_size=machine.batch_size,
        train_mode=True,
        threads=machine.threads,
        on_bad_image=machine.on_bad_image,
        max_bad_fraction=1.0,
    )
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    for dropout, share in zip(dropouts, shares, strict=True):
        dropout.p = share
    return replace(prepared, untrained=False)


def look(prepared: Prepared, source: Source, machine: Machine, *, max_bad_fraction: float = 1.0) -> Embedded:
    """Features and embeddings of all images, as the network sees them without augmentation.

    Where nothing lies between features and heads they are the same numbers, and are kept once.
    """
    network = prepared.network.to(machine.arithmetic.device)
    same = isinstance(network.projection, nn.Identity)
    found = embed_images(
        network,
        source,
        prepared.plain,
        machine.arithmetic,
        batch_size=machine.batch_size,
        keep_features=not same,
        threads=machine.threads,
        on_bad_image=machine.on_bad_image,
        max_bad_fraction=max_bad_fraction,
        **prepared.reading,
    )
    if not same:
        return found
    return Embedded(found.embeddings.float(), found.embeddings, found.valid, found.bad)
