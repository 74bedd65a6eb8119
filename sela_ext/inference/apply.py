"""Labels and features of new images from a trained network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sela_ext.data import Source, open_source
from sela_ext.errors import CheckpointError, OptionError
from sela_ext.inference.passes import Machine, choose_machine, look, settle
from sela_ext.inference.subject import Prepared, Subject, open_subject
from sela_ext.training.embedding import Embedded
from sela_ext.training.evaluate import label_new
from sela_ext.training.machine import torch_settings


def predict(
    run: Any,
    data: Any,
    *,
    head: int | str | None = None,
    model: Any = None,
    image_size: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
    threads: Any = "auto",
    on_bad_image: str = "raise",
) -> Any:
    """Label new images by a run's network and potentials: the cluster with the largest lambda * logit + log beta.

    The potentials carry the balance of the training images over; new images need not be balanced. A checkpoint of an
    unfinished run or released weights hold none: then the label is what the network itself finds most likely.

    Args:
        run: a run folder, a result of `sela_ext.train`, a checkpoint of one, or released weights.
        data: images, as for `sela_ext.train`.
        head: a head's number, or "best" for the one that was chosen without labels; None: all of them.
        model: the network of a run that was given one of the user's own.
        image_size: pixels; default: as in training.
        batch_size: images per forward pass; the labels do not depend on it.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto" (the run's), "float32", "bfloat16" or "float16".
        threads: processor threads; "auto" = all.
        on_bad_image: "raise" or "skip".

    Returns:
        int32 [heads, N], or [N] for one head; -1 = skipped image. A torch tensor where data is one, else numpy.

    Raises:
        OptionError: an option out of range, or a head that there is not.
        CheckpointError: no run, a damaged one, or one without heads.
        DataError: images missing, unreadable, or of channels that the network does not take.

    Example:
        >>> import sela_ext, tempfile, os, numpy as np
        >>> out = os.path.join(tempfile.mkdtemp(), "run")
        >>> images = np.random.default_rng(0).integers(0, 256, size=(70, 16, 16), dtype=np.uint8)
        >>> result = sela_ext.train(images[:60], out=out, clusters=[4, 3], epochs=1, progress=False)
        >>> sela_ext.predict(out, images).shape, sela_ext.predict(out, images, head="best").shape
        ((2, 70), (70,))

    Source: Asano et al. 2020, section 3.1: beta alone turns logits into labels.
    """
    subject = open_subject(run, model=model, image_size=image_size)
    machine = choose_machine(
        subject, device=device, precision=precision, threads=threads, batch_size=batch_size, on_bad_image=on_bad_image
    )
    source = open_source(data)
    prepared = subject.prepare(source)
    count = len(prepared.network.heads.clusters)
    if count == 0:
        raise CheckpointError(f"{subject.name}: expected a network with cluster heads, found none; use embed")
    if head == "best":
        if subject.head is None:
            raise OptionError(f"head: {subject.name} does not say which is best; expected a number in 0 .. {count - 1}")
        head = subject.head
    if head is not None and (isinstance(head, (bool, str)) or not 0 <= head < count):
        raise OptionError(f"head: expected best or a number in 0 .. {count - 1}, found {head!r}")
    with torch_settings(machine.threads, machine.arithmetic.device):
        labels, _ = label_images(subject, prepared, look(prepared, source, machine))
    return _like(labels if head is None else labels[int(head)], data)


def embed(
    run: Any,
    data: Any,
    *,
    model: Any = None,
    image_size: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "auto",
    threads: Any = "auto",
    on_bad_image: str = "raise",
    seed: int = 0,
    download: bool = False,
) -> Any:
    """Features of images: what the network's backbone gives in eval mode, without augmentation.

    Args:
        run: anything that `sela_ext.evaluate` takes: a run folder, a checkpoint, released weights, a network by name.
        data: images, as for `sela_ext.train`.
        model: the network of a run that was given one of the user's own.
        image_size: pixels; default: as in training.
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto" (the run's), "float32", "bfloat16" or "float16".
        threads: processor threads; "auto" = all.
        on_bad_image: "raise" or "skip": its row is NaN.
        seed: of a random network.
        download: fetch torchvision's weights if they are not there.

    Returns:
        float32 [N, D]; a torch tensor where data is one, else numpy.

    Raises:
        OptionError: an option out of range.
        CheckpointError: no run, or a damaged one.
        DataError: images missing, unreadable, or of channels that the network does not take.

    Example:
        >>> import sela_ext
        >>> sela_ext.embed("random:small-resnet", "digits").shape
        (1797, 128)
    """
    subject = open_subject(run, model=model, image_size=image_size, seed=seed, download=download)
    machine = choose_machine(
        subject, device=device, precision=precision, threads=threads, batch_size=batch_size, on_bad_image=on_bad_image
    )
    source = open_source(data)
    with torch_settings(machine.threads, machine.arithmetic.device):
        features = features_of(settle(subject.prepare(source), source, machine), source, machine)
    return _like(features, data)


def features_of(prepared: Prepared, source: Source, machine: Machine) -> Any:
    """Features float32 [N, D], numpy; NaN for images that could not be read."""
    seen = look(prepared, source, machine)
    assert seen.features is not None
    features = seen.features.cpu().numpy()
    features[~seen.valid.cpu().numpy()] = np.nan
    return features


def label_images(subject: Subject, prepared: Prepared, seen: Embedded) -> tuple[Any, Any]:
    """Labels int32 [heads, N] and probabilities float32 [heads, N] by the network and the stored potentials."""
    potentials = None if subject.potentials is None else dict(enumerate(subject.potentials))
    return label_new(prepared.network, seen, potentials, subject.lam)


def _like(values: Any, data: Any) -> Any:
    return torch.from_numpy(values) if isinstance(data, torch.Tensor) else values
