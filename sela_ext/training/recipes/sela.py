"""SeLa: balanced labels by optimal transport, cross-entropy on every head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sela_ext.data import Augment
from sela_ext.data.loader import Batch
from sela_ext.errors import OptionError
from sela_ext.training.bank import Bank
from sela_ext.training.cluster_pass import usable_rows
from sela_ext.training.crops import crop_losses, crop_views, embed_views, parse_crops
from sela_ext.training.embedding import Embedded
from sela_ext.training.evaluate import Evaluation
from sela_ext.training.labelling import LabelPass, label_pass
from sela_ext.training.prototypes import BALANCED_ROUNDS, place_prototypes
from sela_ext.training.recipes.base import Recipe, StepOutput
from sela_ext.training.recipes.rotations import four_rotations, rotation_accuracy, tell_rotations
from sela_ext.training.resolve import Plan, named_augment
from sela_ext.training.run import Run
from sela_ext.training.sampling import even_order


class SelaRecipe(Recipe):
    """Labels of every head by Sinkhorn's algorithm, from one of three sources; cross-entropy, mean or sum over heads.

    Source: Asano, Rupprecht, Vedaldi, "Self-labelling via simultaneous clustering and representation learning",
    ICLR 2020, section 3; the label source "bank" is SeLa-v2's.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        others = (p for name, p in run.network.named_parameters() if not name.startswith("heads."))
        if run.options.freeze_prototypes and not any(parameter.requires_grad for parameter in others):
            raise OptionError(
                "freeze_prototypes: expected 0 with a network whose prototypes are all there is to train, found "
                f"{run.options.freeze_prototypes:g}; leave it out, or take a model with layers, such as mlp"
            )
        banked = run.options.label_source == "bank"
        self.bank = Bank(len(run.source), run.arithmetic.device, run.ranks) if banked else None
        # Where the solver of the next label pass begins: the potential of the last one, by head.
        self.potentials: dict[int, NDArray[np.float64]] = {}
        self.drawn: tuple[int, NDArray[np.int32]] | None = None  # epoch, and the labels that its order was drawn by

    def views(self) -> list[Augment]:
        """The crops of a training step; one view where none are asked for."""
        crops = self.run.options.crops
        return super().views() if crops is None else crop_views(self.run.plan.augment, parse_crops(crops))

    def begin(self) -> None:
        """Place the prototypes, and fill the bank: both by one look at all images.

        The untrained batch norm has no statistics of its own: it takes those of the batches.
        """
        run, opt = self.run, self.run.options
        if opt.init != "kmeans" and self.bank is None:
            return
        first = run.embed(run.plan.plain, train_mode=True)
        if opt.init == "kmeans":
            self.place(
                first,
                rounds=BALANCED_ROUNDS if run.plan.vectors is not None else 0,
                lam=opt.lam,
                marginals=None if isinstance(opt.marginals, str) else opt.marginals,
            )
        if self.bank is not None:
            self.bank.fill(first.embeddings, first.valid)

    def place(self, first: Embedded, **rounds: Any) -> None:
        """Place the prototypes, by rank 0 alone, for all: see `place_prototypes`."""
        run, opt = self.run, self.run.options
        whole, heads = run.whole(first), run.network.heads

        def place() -> None:
            valid, _ = usable_rows(whole.embeddings, whole.valid)
            place_prototypes(heads, whole.embeddings, valid, opt.seed, opt.threads, run.stage, **rounds)

        run.on_first(place)
        run.ranks.broadcast_tensors(list(heads.parameters()))

    def relabel(self, which: list[int] | None) -> LabelPass:
        """Embeddings of all images by the label source, then balanced labels."""
        embeddings, valid, waited = self.collect()
        return dataclasses.replace(self.solve(embeddings, valid, which), wait_seconds=waited)

    def solve(self, embeddings: Tensor, valid: Tensor, which: list[int] | None) -> LabelPass:
        """Balanced labels from embeddings [N, E] and whether they are valid, bool [N]."""
        run, opt = self.run, self.run.options
        result = label_pass(
            run.network.heads,
            embeddings,
            valid,
            run.labels,
            which=which,
            lam=opt.lam,
            tol=opt.label_tol,
            method=opt.label_method,
            max_passes=opt.label_max_passes,
            marginals=opt.marginals,
            relax=opt.relax,
            size_bounds=opt.size_bounds,
            balance=opt.balance,
            threads=opt.threads,
            truth=run.truth,
            start=self.potentials,
            stage=run.stage,
            ranks=run.ranks,
        )
        self.potentials.update(result.potentials)
        return result

    def collect(self) -> tuple[Tensor, Tensor, float]:
        """Embeddings [N, E] by the label source, which of them are valid, bool [N], and seconds waited for images.

        Of the rows that this rank owns.
        """
        run = self.run
        if self.bank is not None:
            self.bank.settle()
            return self.bank.embeddings, self.bank.valid, 0.0
        # Looking at all images takes a while: a signal ends the run at once, and resume repeats the pass.
        with run.interrupt.at_once():
            if run.options.label_source == "eval":
                seen = run.embed(label_view(run.plan))
            else:  # its own draws: the epoch counter of the passes lies beyond that of the training
                seen = run.embed(run.plan.augment, train_mode=True, epoch=2**31 + run.state["passes_made"])
        return seen.embeddings, seen.valid, seen.wait_seconds

    def order(self, epoch: int) -> NDArray[np.int64] | None:
        """All images; or with the sampler of clusters, the clusters of one head evenly, another head every epoch."""
        run, opt = self.run, self.run.options
        if self.bank is not None:
            self.bank.settle()  # of each image one embedding waits for it at most
        if opt.sampler != "clusters":
            return None
        if self.drawn is None or self.drawn[0] != epoch:
            self.drawn = epoch, run.labels[epoch % opt.heads].copy()
        order = even_order(self.drawn[1], batch_size=opt.batch_size, seed=opt.seed, epoch=epoch)
        return order if len(order) else None

    def step(self, batch: Batch) -> StepOutput:
        """Cross-entropy of every head against its labels; images without a label count nothing."""
        run, opt = self.run, self.run.options
        run.update.frozen = list(run.network.heads.parameters()) if run.epochs_done < opt.freeze_prototypes else []
        if opt.crops is not None:
            return self.step_of_crops(batch)
        pictures = half_resolution(run, batch.images)
        target, rotation = run.targets(batch), run.network.rotation
        with run.arithmetic.autocast():
            everything = run.network(pictures if rotation is None else four_rotations(pictures))
        embedding = everything[: len(pictures)]
        logits = run.network.heads.split(run.network.heads(embedding))
        losses = torch.stack([self.head_loss(part, goal) for part, goal in zip(logits, target, strict=True)])
        loss = losses.sum() if opt.loss == "sum" else losses.mean()
        if rotation is None:
            return StepOutput(loss, embedding)
        rotation_loss, parts = tell_rotations(rotation, everything)
        return StepOutput(loss + rotation_loss, embedding, parts)

    def head_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of one head: logits [B, K], labels int64 [B]; 0 where no image has a label."""
        total = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
        return total / (target >= 0).sum().clamp(min=1)

    def after_step(self, batch: Batch, output: StepOutput) -> None:
        """Write the bank."""
        if self.bank is not None:
            first = output.embedding[: len(batch.index)]  # of several crops the first
            self.bank.write(batch.placed, first)

    def evaluate_with(self, label: Callable[[Embedded], LabelPass] | None) -> Evaluation:
        """The evaluation, and how well rotations are told apart, where they are learnt."""
        result = super().evaluate_with(label)
        if self.run.network.rotation is not None:
            result.metrics["rotation_accuracy"] = self.run.on_first(lambda: rotation_accuracy(self.run))
        return result

    def state(self) -> dict[str, Any]:
        """Potentials, bank, and what the order of the epoch was drawn by: labels may have changed since."""
        state: dict[str, Any] = {
            "potentials": {head: torch.from_numpy(potential) for head, potential in self.potentials.items()},
            "bank": None if self.bank is None else self.bank.state(),
        }
        if self.drawn is not None:
            state["drawn"] = {"epoch": self.drawn[0], "labels": torch.from_numpy(self.drawn[1])}
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.potentials = {head: potential.numpy() for head, potential in state["potentials"].items()}
        if self.bank is not None:
            self.bank.load(state["bank"])
        if "drawn" in state:
            self.drawn = state["drawn"]["epoch"], state["drawn"]["labels"].numpy()

    def step_of_crops(self, batch: Batch) -> StepOutput:
        """The same with several crops of every image, each of which learns the image's label; see Note [Multi-crop]."""
        run = self.run
        target = run.targets(batch)
        with run.arithmetic.autocast():
            embeddings = embed_views(run.network, batch.views)
        losses = crop_losses(run.network.heads, embeddings, target)
        return StepOutput(losses.sum() if run.options.loss == "sum" else losses.mean(), torch.cat(embeddings))


def half_resolution(run: Run, pictures: Tensor) -> Tensor:
    """The images [B, C, S, S] of a step, or for some of the steps these at half the size."""
    share = run.half_resolution
    if share and draw(run.options.seed, run.state["step"]) < share:
        return F.avg_pool2d(pictures, 2)
    return pictures


def draw(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on seed and step alone."""
    return float(np.random.Generator(np.random.Philox(key=np.array([seed, 2**33 + step], np.uint64))).random())


def label_view(plan: Plan) -> Augment:
    """How the eval label pass looks at images, with the normalisation of the training."""
    view = plan.options.label_augment
    if view == "none":
        return plan.plain
    named = named_augment(view, plan.augment.size)
    return dataclasses.replace(named, mean=plan.augment.mean, std=plan.augment.std)
