"""Passes of a network over all images, in order and without gradients."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sela_ext.data import Augment, Loader, Source, VectorLoader
from sela_ext.errors import DataError
from sela_ext.kernels import IndexStore
from sela_ext.models import Network
from sela_ext.training.compilation import uncompiled
from sela_ext.training.vector_embeddings import on_demand


@dataclass(frozen=True)
class Arithmetic:
    """Where and in which precision a network computes.

    Attributes:
        device: of the network.
        dtype: float32, or the autocast type.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def lowered(self) -> bool:
        """Whether autocast is on."""
        return self.dtype is not torch.float32

    def autocast(self) -> torch.autocast:
        """The context in which the network's forward pass runs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.lowered)


@dataclass(frozen=True)
class Embedded:
    """What a pass over all images gave.

    Attributes:
        features: the backbone's, float32 [N, D]; None where they were not asked for.
        embeddings: what the heads see, [N, E], in the type the network computes in.
        valid: bool [N]; False for images that could not be read.
        bad: (index, name, reason) of those.
        wait_seconds: time that the network waited for images.
    """

    features: Tensor | None
    embeddings: Tensor
    valid: Tensor
    bad: list[tuple[int, str, str]]
    wait_seconds: float = 0.0


def open_index(source: Source, where: str | os.PathLike[str], run: Path, name: str) -> IndexStore | None:
    """Where all loaders of `source` keep the entry points of its JPEG files.

    Args:
        source: the images.
        where: "run" = below `run`; "off" = nowhere; or a folder that runs share, each set of images in one of its own.
        run: the run's own folder for this.
        name: of the images: train, held, judged.

    Returns:
        None where there is nothing to keep.
    """
    if where == "off" or not source.encoded:
        return None
    if where == "run":
        return IndexStore(run / name)
    known = json.dumps(source.fingerprint(), sort_keys=True).encode()
    return IndexStore(Path(where).expanduser() / f"{name}-{hashlib.sha256(known).hexdigest()[:16]}")


@torch.no_grad()
def embed(
    network: Network,
    source: Source,
    augment: Augment,
    arithmetic: Arithmetic,
    *,
    batch_size: int = 256,
    train_mode: bool = False,
    keep_features: bool = False,
    seed: int = 0,
    epoch: int = 0,
    threads: int = 0,
    on_bad_image: Literal["raise", "skip"] = "raise",
    max_bad_fraction: float = 0.01,
    exact: bool = False,
    exif: bool = False,
    index: IndexStore | None = None,
    advance: Callable[[int], None] | None = None,
) -> Embedded:
    """Run the network over all images.

    Args:
        network: its mode is restored afterwards.
        source: N images.
        augment: how they are looked at.
        arithmetic: device and precision.
        batch_size: images per forward pass.
        train_mode: dropout on, and batch norm by the batch (it then learns its statistics too); the images then come
            in shuffled order, since folders are sorted by class and a batch of one class has statistics of its own.
        keep_features: return the backbone's features too; a label pass needs the embeddings alone.
        seed: of the augmentation.
        epoch: of the augmentation.
        threads: of the loader; 0 = all.
        on_bad_image: "raise" or "skip".
        max_bad_fraction: most unreadable images that "skip" accepts.
        exact: of the loader.
        exif: of the loader.
        index: of the loader; what `open_index` gave for the same source, where there are more passes to come.
        advance: called with the number of images done, after each batch.
    """
    if source.vectors is not None:
        return embed_vectors(
            network,
            VectorLoader(
                source,
                batch_size=min(batch_size, len(source)),
                seed=seed,
                shuffle=train_mode,
                threads=threads,
                device=arithmetic.device,
                on_bad_image=on_bad_image,
                max_bad_fraction=max_bad_fraction,
            ),
            arithmetic,
            epoch=epoch,
            train_mode=train_mode,
            keep_features=keep_features,
            advance=advance,
        )
    loader = Loader(
        source,
        batch_size=min(batch_size, len(source)),
        augment=augment,
        seed=seed,
        shuffle=train_mode,
        dtype=arithmetic.dtype,
        channels_last=True,
        threads=threads or "auto",
        device=arithmetic.device,
        on_bad_image=on_bad_image,
        max_bad_fraction=max_bad_fraction,
        exact=exact,
        exif=exif,
        index=index,
    )
    return _embed_batches(
        network, loader, arithmetic, epoch=epoch, train_mode=train_mode, keep_features=keep_features, advance=advance
    )


@torch.no_grad()
def embed_vectors(
    network: Network,
    loader: VectorLoader,
    arithmetic: Arithmetic,
    *,
    epoch: int = 0,
    train_mode: bool = False,
    keep_features: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Embedded:
    """Run the network over all vectors of a loader; see `embed`.

    What only needs to be standardised is left where it lies, and read when it is asked for.
    """
    source = loader.source
    features = on_demand(network, source)
    if features is None or not isinstance(network.projection, nn.Identity):
        seen = _embed_batches(
            network,
            loader,
            arithmetic,
            epoch=epoch,
            train_mode=train_mode,
            keep_features=keep_features and features is None,
            advance=advance,
        )
        return seen if features is None or not keep_features else replace(seen, features=features)
    valid = torch.ones(len(source), dtype=torch.bool, device=arithmetic.device)
    valid[[row for row, _, _ in loader.bad_images]] = False
    return Embedded(features if keep_features else None, features, valid, list(loader.bad_images))


def _embed_batches(
    network: Network,
    loader: Loader | VectorLoader,
    arithmetic: Arithmetic,
    *,
    epoch: int,
    train_mode: bool,
    keep_features: bool,
    advance: Callable[[int], None] | None,
) -> Embedded:
    """Run the network over all batches of a loader, which is closed."""
    source = loader.source
    was_training = network.training
    network.train(train_mode)
    features = embeddings = None
    valid = torch.zeros(len(source), dtype=torch.bool, device=arithmetic.device)
    try:
        for batch in loader.epoch(epoch):
            if train_mode and len(batch.index) < 2:
                continue  # batch norm cannot normalise a batch of one
            with arithmetic.autocast(), uncompiled(network):
                feature = network.features(batch.images)
                embedding = network.projection(feature)
            if embeddings is None:
                if keep_features:
                    features = torch.zeros(len(source), feature.shape[1], device=arithmetic.device)
                embeddings = torch.zeros(
                    len(source), embedding.shape[1], dtype=embedding.dtype, device=arithmetic.device
                )
            rows = batch.index.to(arithmetic.device)
            if features is not None:
                features[rows] = feature.float()
            embeddings[rows] = embedding
            valid[rows] = True
            if advance is not None:
                advance(batch.position)
    finally:
        network.train(was_training)
        loader.close()
    if embeddings is None:
        raise DataError(f"none of the {len(source)} images can be used; expected at least 2 that can be read")
    return Embedded(features, embeddings, valid, list(loader.bad_images), loader.wait_seconds)
