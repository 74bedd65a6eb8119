"""Passes of a network over all images, in order and without gradients."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sela_ext.assign import shard_rows
from sela_ext.data import Augment, Loader, Source, VectorLoader
from sela_ext.data.bad_images import check_share
from sela_ext.data.residency import ResidentImages
from sela_ext.errors import DataError
from sela_ext.kernels import IndexStore
from sela_ext.models import Network
from sela_ext.training.compilation import uncompiled
from sela_ext.training.ranks import Ranks
from sela_ext.training.vector_embeddings import on_demand, rows_of, rows_of_all


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
        rows: numbers of the images that these are, int64 [n] in place of N; None: all, in order.
    """

    features: Tensor | None
    embeddings: Tensor
    valid: Tensor
    bad: list[tuple[int, str, str]]
    wait_seconds: float = 0.0
    rows: Tensor | None = None


def open_index(source: Source, where: str | os.PathLike[str], run: Path, name: str, rank: int = 0) -> IndexStore | None:
    """Where all loaders of `source` keep the entry points of its JPEG files.

    Args:
        source: the images.
        where: "run" = below `run`; "off" = nowhere; or a folder that runs share, each set of images in one of its own.
        run: the run's own folder for this.
        name: of the images: train, held, judged.
        rank: of this process; each writes a file of its own, and reads all.

    Returns:
        None where there is nothing to keep.
    """
    if where == "off" or not source.encoded:
        return None
    if where == "run":
        return IndexStore(run / name, rank=rank)
    known = json.dumps(source.fingerprint(), sort_keys=True).encode()
    return IndexStore(Path(where).expanduser() / f"{name}-{hashlib.sha256(known).hexdigest()[:16]}", rank=rank)


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
    resident: ResidentImages | None = None,
    advance: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
) -> Embedded:
    """Run the network over all images; with several ranks each over batches of its own.

    The batches are those that one process would have: embeddings have the same bits for any number of ranks.

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
        resident: the images on the device, where they are kept there; for one pass they are not sent.
        advance: called with the number of images done, after each batch.
        ranks: who shares the work; None: nobody.
    """
    ranks = ranks or Ranks()
    if source.vectors is not None:
        return embed_vectors(
            network,
            VectorLoader(
                source,
                batch_size=min(batch_size, len(source)),
                seed=seed,
                shuffle=train_mode,
                rank=ranks.rank,
                world_size=ranks.world_size,
                whole_batches=True,
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
            ranks=ranks,
        )
    loader = Loader(
        source,
        batch_size=min(batch_size, len(source)),
        augment=augment,
        seed=seed,
        shuffle=train_mode,
        dtype=arithmetic.dtype,
        channels_last=True,
        rank=ranks.rank,
        world_size=ranks.world_size,
        whole_batches=True,
        threads=threads or "auto",
        device=arithmetic.device,
        on_bad_image=on_bad_image,
        max_bad_fraction=max_bad_fraction,
        exact=exact,
        exif=exif,
        index=index,
        resident=False if resident is None else resident,
    )
    return _embed_batches(
        network,
        loader,
        arithmetic,
        epoch=epoch,
        train_mode=train_mode,
        keep_features=keep_features,
        advance=advance,
        ranks=ranks,
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
    ranks: Ranks | None = None,
) -> Embedded:
    """Run the network over all vectors of a loader; see `embed`.

    What only needs to be standardised is left where it lies, and read when it is asked for.
    """
    ranks = ranks or Ranks()
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
            ranks=ranks,
        )
        if features is None or not keep_features:
            return seen
        return replace(seen, features=features if seen.rows is None else rows_of(features, seen.rows))
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
    ranks: Ranks,
) -> Embedded:
    """Run the network over all batches of a loader, which is closed."""
    looks = _looks(network, loader, arithmetic, epoch, train_mode, advance, ranks.world_size)
    if ranks.several:
        return _own_rows(looks, loader, arithmetic.device, keep_features, ranks)
    count = len(loader.source)
    features = embeddings = None
    valid = torch.zeros(count, dtype=torch.bool, device=arithmetic.device)
    with contextlib.closing(looks):
        for rows, feature, embedding in looks:
            if embeddings is None:
                if keep_features:
                    features = torch.zeros(count, feature.shape[1], device=arithmetic.device)
                embeddings = torch.zeros(count, embedding.shape[1], dtype=embedding.dtype, device=arithmetic.device)
            if features is not None:
                features[rows] = feature.float()
            embeddings[rows] = embedding
            valid[rows] = True
    if embeddings is None:
        raise DataError(f"none of the {count} images can be used; expected at least 2 that can be read")
    return Embedded(features, embeddings, valid, list(loader.bad_images), loader.wait_seconds)


def _looks(
    network: Network,
    loader: Loader | VectorLoader,
    arithmetic: Arithmetic,
    epoch: int,
    train_mode: bool,
    advance: Callable[[int], None] | None,
    world_size: int,
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """Rows int64 [B], features and embeddings [B, ...] of each batch of a loader, which is closed at the end."""
    was_training = network.training
    network.train(train_mode)
    try:
        for batch in loader.epoch(epoch):
            if train_mode and len(batch.index) < 2:
                continue  # batch norm cannot normalise a batch of one
            with arithmetic.autocast(), uncompiled(network), _norms_of_own(network):
                feature = network.features(batch.images)
                embedding = network.projection(feature)
            yield batch.placed, feature, embedding
            if advance is not None:
                advance(min(len(loader.source), batch.position * world_size))
    finally:
        network.train(was_training)
        loader.close()


def _own_rows(
    looks: Generator[tuple[Tensor, Tensor, Tensor], None, None],
    loader: Loader | VectorLoader,
    device: torch.device,
    keep_features: bool,
    ranks: Ranks,
) -> Embedded:
    """What the batches of this rank gave: the rows of these, in their order."""
    count = len(loader.source)
    rows: list[Tensor] = []
    features: list[Tensor] = []
    embeddings: list[Tensor] = []
    with contextlib.closing(looks):
        for places, feature, embedding in looks:
            rows.append(places)
            embeddings.append(embedding)
            if keep_features:
                features.append(feature.float())
    # A rank without a batch learns from the others what a row is like.
    likes = ranks.gather((features[0][:0].cpu() if features else None, embeddings[0][:0].cpu() if embeddings else None))
    kind, like = next(((first, second) for first, second in likes if second is not None), (None, None))
    if like is None:
        raise DataError(f"none of the {count} images can be used; expected at least 2 that can be read")
    own = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=device)
    seen = torch.cat(embeddings) if embeddings else like.to(device)
    kept = torch.cat(features) if features else None if kind is None else kind.to(device)
    bad = list({one[0]: one for part in ranks.gather(list(loader.bad_images)) for one in part}.values())
    ranks.together(lambda: check_share(bad, count, loader.max_bad_fraction))
    return Embedded(kept, seen, torch.ones(len(own), dtype=torch.bool, device=device), bad, loader.wait_seconds, own)


@contextlib.contextmanager
def _norms_of_own(network: nn.Module) -> Iterator[None]:
    """Have batch norms that look at the images of all ranks look at a batch's own: ranks have other numbers of batches.

    They would wait for each other in their forward pass, the last one for ever.
    """
    shared = [module for module in network.modules() if isinstance(module, nn.SyncBatchNorm)]
    for module in shared:
        module.forward = functools.partial(nn.BatchNorm2d.forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in shared:
            del module.forward


def to_owners(seen: Embedded, count: int, ranks: Ranks) -> Embedded:
    """Bring every row to the rank that owns it: consecutive rows each, see `sela_ext.shard_rows`.

    Args:
        seen: what `embed` gave on this rank.
        count: images, N.
        ranks: who owns what.

    Returns:
        The rows that this rank owns, in order. With one process: all, as they were.
    """
    if not ranks.several:
        return seen
    own = shard_rows(count, ranks.world_size, ranks.rank)
    if seen.rows is None:
        here = torch.arange(own.start, own.stop, device=seen.valid.device)
        return replace(
            seen,
            features=None if seen.features is None else rows_of(seen.features, here),
            embeddings=rows_of(seen.embeddings, here),
            valid=seen.valid[here],
        )
    target = owners(seen.rows, count, ranks.world_size)
    places = ranks.deal(seen.rows, target) - own.start
    parts: list[Tensor | None] = []
    for rows in (seen.features, seen.embeddings):
        if rows is None:
            parts.append(None)
            continue
        own_rows = rows_of_all(rows, torch.arange(own.start, own.stop))
        if own_rows is not None:
            parts.append(own_rows)
            continue
        dealt = ranks.deal(rows, target)
        held = torch.zeros((own.stop - own.start, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        held[places] = dealt
        parts.append(held)
    valid = torch.zeros(own.stop - own.start, dtype=torch.bool, device=seen.valid.device)
    valid[places] = True
    assert parts[1] is not None
    return Embedded(parts[0], parts[1], valid, seen.bad, seen.wait_seconds)


def to_first(seen: Embedded, count: int, ranks: Ranks) -> Embedded:
    """Bring every row to rank 0, which then has all N of them in order; the other ranks keep none."""
    if not ranks.several or seen.rows is None:
        return seen
    rows = list(ranks.rows_to_first(seen.rows))
    parts: list[Tensor | None] = []
    for part in (seen.features, seen.embeddings, seen.valid):
        if part is None:
            parts.append(None)
            continue
        size = count if ranks.first else 0
        all_rows = rows_of_all(part, torch.arange(size))
        if all_rows is not None:
            parts.append(all_rows)
            continue
        whole = torch.zeros((size, *part.shape[1:]), dtype=part.dtype, device=part.device)
        for places, theirs in zip(rows, ranks.rows_to_first(part), strict=True):
            whole[places] = theirs
        parts.append(whole)
    assert parts[1] is not None
    assert parts[2] is not None
    return Embedded(parts[0], parts[1], parts[2], seen.bad, seen.wait_seconds)


def owners(rows: Tensor, count: int, world_size: int) -> Tensor:
    """The rank that owns each row, int64 [n], of N rows in shards as `sela_ext.shard_rows` cuts them.

    Example:
        >>> owners(torch.tensor([0, 383, 384, 999]), 1000, 3)
        tensor([0, 0, 1, 2])
    """
    stops = torch.tensor([shard_rows(count, world_size, rank).stop for rank in range(world_size)], device=rows.device)
    return torch.searchsorted(stops, rows, right=True)
