"""Heads trained on feature vectors: label passes and epochs of noisy views in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sela_ext.data import VectorLoader, VectorSource
from sela_ext.errors import NumericsError
from sela_ext.models import Heads, Network, build_vector_backbone
from sela_ext.training.embedding import Arithmetic, embed_vectors
from sela_ext.training.labelling import LabelPass, choose_head, label_pass
from sela_ext.training.prototypes import BALANCED_ROUNDS, place_prototypes
from sela_ext.training.schedule import learning_rate
from sela_ext.training.vector_options import WEIGHT_DECAY, scale_of, scaled_rate, view_of

_CHUNK = 16_384


@dataclass(frozen=True)
class Recipe:
    """How heads are trained; see `SelfLabelling` for the meaning of each."""

    clusters: Sequence[int]
    hidden: int
    kind: str
    temperature: float
    epochs: int
    batch_size: int
    learning_rate: float
    noise: float
    dropout: float
    lam: float
    tol: float
    marginals: Tensor | NDArray[np.float64] | None
    balance: str
    seed: int
    threads: int


@dataclass
class Fitted:
    """A trained network of heads and what it says of the training rows.

    Attributes:
        network: standardisation, the hidden layer if there is one, and heads.
        labelled: the last label pass: labels int32 [T, N], potentials, a record per head.
        history: mean loss of every epoch.
    """

    network: Network
    labelled: LabelPass
    history: list[float]

    @property
    def heads(self) -> Heads:
        """The heads."""
        return self.network.heads

    @torch.no_grad()
    def logits(self, rows: NDArray[np.floating], head: int) -> Tensor:
        """Logits of one head for rows [M, D], float32 [M, K_head], on the heads' device."""
        source, device = VectorSource(rows), self.heads.weight.device
        parts = []
        for start in range(0, len(source), _CHUNK):
            taken = source.take(np.arange(start, min(start + _CHUNK, len(source))))
            parts.append(self.heads.logits_of(head, self.network(torch.from_numpy(taken).to(device))))
        return torch.cat(parts)


def train_heads(
    rows: NDArray[np.floating],
    recipe: Recipe,
    device: torch.device,
    *,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Cluster rows by training heads to predict labels that a balanced assignment keeps giving them.

    Rows are centred and scaled by one number. Before every epoch each head's labels are solved from the clean rows;
    then the heads (and the hidden layer, if there is one) learn to predict them from noisy views. The first
    prototypes of cosine heads are centroids of k-means.

    Args:
        rows: float [N, D], finite in float32; they are not copied.
        recipe: everything else.
        device: where the network is.
        on_epoch: called with the number of epochs done and the mean loss.

    Raises:
        DataError: a row is not finite in float32.
        NumericsError: the loss is not finite: a learning rate far too large.

    Source: Asano et al. 2020, section 3, with the backbone left out.
    """
    source = VectorSource(rows)
    count = len(source)
    known = source.statistics(recipe.threads)
    scale = scale_of(source, "one", recipe.threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = f"mlp-{recipe.hidden}" if recipe.hidden else "identity"
        backbone = build_vector_backbone(model, torch.from_numpy(known.mean), torch.from_numpy(scale))
        network = Network(
            backbone.module,
            backbone.feature_dim,
            recipe.clusters,
            head_kind=recipe.kind,
            temperature=recipe.temperature,
            channels_in=1,
        ).to(device)
    arithmetic = Arithmetic(device, torch.float32)
    labels = np.full((len(recipe.clusters), count), -1, np.int32)

    def plain(batch_size: int = _CHUNK) -> VectorLoader:
        return VectorLoader(source, batch_size=batch_size, shuffle=False, threads=recipe.threads, device=device)

    def relabelled() -> LabelPass:
        seen = embed_vectors(network, plain(), arithmetic)
        return label_pass(
            network.heads,
            seen.embeddings,
            seen.valid,
            labels,
            lam=recipe.lam,
            tol=recipe.tol,
            marginals=recipe.marginals,
            balance=recipe.balance,
            threads=recipe.threads,
        )

    batch_size = min(recipe.batch_size, count)
    loader = VectorLoader(
        source,
        batch_size=batch_size,
        view=view_of(source, "one", recipe.noise, recipe.dropout, recipe.threads),
        seed=recipe.seed,
        threads=recipe.threads,
        device=device,
    )
    if recipe.kind == "cosine":
        seen = embed_vectors(network, plain(), arithmetic)
        place_prototypes(
            network.heads,
            seen.embeddings,
            seen.valid,
            recipe.seed,
            rounds=BALANCED_ROUNDS,
            lam=recipe.lam,
            marginals=recipe.marginals,
            threads=recipe.threads,
        )
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    base = scaled_rate(recipe.learning_rate, batch_size)
    history: list[float] = []
    for epoch in range(recipe.epochs):
        labels = relabelled().labels
        targets = torch.from_numpy(labels).to(device, torch.int64)
        total = torch.zeros((), device=device)
        network.train()
        for batch in loader.epoch(epoch):
            if recipe.hidden and len(batch.index) < 2:
                continue  # batch norm cannot normalise one row
            done = (epoch + (batch.position - len(batch.index)) / count) / recipe.epochs
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(base, done, "cosine", 0.0)
            logits = network.heads.split(network.heads(network(batch.images)))
            losses = [F.cross_entropy(z, targets[head, batch.placed]) for head, z in enumerate(logits)]
            loss = torch.stack(losses).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach() * len(batch.index)
        mean_loss = float(total) / count
        if not math.isfinite(mean_loss):
            raise NumericsError(
                f"the loss is {mean_loss} after epoch {epoch + 1}; expected a finite one: use a smaller learning_rate"
            )
        history.append(mean_loss)
        if on_epoch is not None:
            on_epoch(epoch + 1, mean_loss)
    labelled = relabelled()
    return Fitted(network.eval(), labelled, history)


def best_head(fitted: Fitted, heads: Sequence[int]) -> int:
    """Of these heads the one of lowest cross-entropy against its own labels."""
    return choose_head([fitted.labelled.heads[head] for head in heads])
