"""Heads trained on feature vectors: label passes and epochs of noisy views in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sela_ext.errors import NumericsError
from sela_ext.models import Heads
from sela_ext.training.labelling import LabelPass, choose_head, label_pass
from sela_ext.training.prototypes import place_prototypes
from sela_ext.training.schedule import learning_rate

# Epochs and batch where they are left to the data: small sets take many epochs of few steps, large ones few of many.
_ROWS_SEEN = 200_000
_FEWEST_EPOCHS, _MOST_EPOCHS = 4, 60
_STEPS_PER_EPOCH = 256
_SMALLEST_BATCH, _LARGEST_BATCH = 64, 4096
# Learning rates are meant for this batch, and grow with the root of the batch actually used.
_REFERENCE_BATCH = 256
_WEIGHT_DECAY = 1e-4
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
    """Trained heads and what they say of the training rows.

    Attributes:
        mean: of the training rows, float32 [D].
        scale: what centred rows are multiplied with: one number, so that their root mean square is 1.
        trunk: what lies between rows and heads.
        heads: the heads.
        labelled: the last label pass: labels int32 [T, N], potentials, a record per head.
        history: mean loss of every epoch.
    """

    mean: Tensor
    scale: float
    trunk: nn.Module
    heads: Heads
    labelled: LabelPass
    history: list[float]

    @torch.no_grad()
    def logits(self, rows: NDArray[np.floating], head: int) -> Tensor:
        """Logits of one head for rows [M, D], float32 [M, K_head], on the heads' device."""
        parts = [
            self.heads.logits_of(head, self.trunk(self.prepared(rows[start : start + _CHUNK])))
            for start in range(0, len(rows), _CHUNK)
        ]
        return torch.cat(parts)

    def prepared(self, rows: NDArray[np.floating]) -> Tensor:
        """Rows centred and scaled as in training, float32."""
        tensor = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).to(self.mean.device)
        return (tensor - self.mean) * self.scale


def automatic_epochs(rows: int) -> int:
    """Epochs for N rows: what makes 200,000 rows seen, within 4 .. 60."""
    return min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, math.ceil(_ROWS_SEEN / rows)))


def automatic_batch(rows: int) -> int:
    """Rows per step for N rows: the power of two that makes about 256 steps per epoch, within 64 .. 4096."""
    wanted = max(_SMALLEST_BATCH, min(_LARGEST_BATCH, rows // _STEPS_PER_EPOCH))
    return 1 << (wanted.bit_length() - 1)


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
        rows: float [N, D], finite.
        recipe: everything else.
        device: where the work is done; rows must fit there in float32.
        on_epoch: called with the number of epochs done and the mean loss.

    Raises:
        NumericsError: the loss is not finite: a learning rate far too large.

    Source: Asano et al. 2020, section 3, with the backbone left out.
    """
    place = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).to(device)
    mean = place.mean(0)
    points = place - mean
    spread = float(points.square().mean().sqrt())
    scale = 1.0 / spread if spread > 0 and math.isfinite(1.0 / spread) else 1.0
    points *= scale
    count, width = points.shape

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        trunk: nn.Module = nn.Identity()
        if recipe.hidden:
            trunk = nn.Sequential(nn.Linear(width, recipe.hidden), nn.BatchNorm1d(recipe.hidden), nn.ReLU(inplace=True))
        heads = Heads(recipe.hidden or width, recipe.clusters, recipe.kind, recipe.temperature)
    trunk.to(device)
    heads.to(device)
    draw = torch.Generator(device).manual_seed(recipe.seed)
    valid = torch.ones(count, dtype=torch.bool, device=device)
    labels = np.full((len(recipe.clusters), count), -1, np.int32)

    @torch.no_grad()
    def embedded() -> Tensor:
        if not recipe.hidden:
            return points
        trunk.eval()
        parts = [trunk(points[start : start + _CHUNK]) for start in range(0, count, _CHUNK)]
        trunk.train()
        return torch.cat(parts)

    def relabelled() -> LabelPass:
        return label_pass(
            heads,
            embedded(),
            valid,
            labels,
            lam=recipe.lam,
            tol=recipe.tol,
            marginals=recipe.marginals,
            balance=recipe.balance,
            threads=recipe.threads,
        )

    if recipe.kind == "cosine":
        with torch.no_grad():
            place_prototypes(heads, embedded(), valid, recipe.seed)
    optimizer = torch.optim.SGD(
        [*trunk.parameters(), *heads.parameters()],
        lr=recipe.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=_WEIGHT_DECAY,
    )
    batch = min(recipe.batch_size, count)
    base = recipe.learning_rate * math.sqrt(batch / _REFERENCE_BATCH)
    steps = math.ceil(count / batch)
    history: list[float] = []
    for epoch in range(recipe.epochs):
        labels = relabelled().labels
        targets = torch.from_numpy(labels).to(device, torch.int64)
        total = torch.zeros((), device=device)
        order = torch.randperm(count, generator=draw, device=device)
        for step, index in enumerate(torch.split(order, batch)):
            if recipe.hidden and len(index) < 2:
                continue  # batch norm cannot normalise one row
            done = (epoch * steps + step) / (recipe.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(base, done, "cosine", 0.0)
            view = noisy(points[index], recipe.noise, recipe.dropout, draw)
            logits = heads.split(heads(trunk(view)))
            losses = [F.cross_entropy(z, targets[head, index]) for head, z in enumerate(logits)]
            loss = torch.stack(losses).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach() * len(index)
        mean_loss = float(total) / count
        if not math.isfinite(mean_loss):
            raise NumericsError(
                f"the loss is {mean_loss} after epoch {epoch + 1}; expected a finite one: use a smaller learning_rate"
            )
        history.append(mean_loss)
        if on_epoch is not None:
            on_epoch(epoch + 1, mean_loss)
    labelled = relabelled()
    return Fitted(mean, scale, trunk.eval(), heads, labelled, history)


def noisy(rows: Tensor, noise: float, dropout: float, draw: torch.Generator) -> Tensor:
    """A view of rows [B, D]: features left out with probability `dropout`, the rest scaled up; Gaussian noise added."""
    if dropout:
        kept = torch.rand(rows.shape, generator=draw, device=rows.device) >= dropout
        rows = rows * kept / (1.0 - dropout)
    if noise:
        rows = rows + noise * torch.randn(rows.shape, generator=draw, device=rows.device)
    return rows


def best_head(fitted: Fitted, heads: Sequence[int]) -> int:
    """Of these heads the one of lowest cross-entropy against its own labels."""
    return choose_head([fitted.labelled.heads[head] for head in heads])
