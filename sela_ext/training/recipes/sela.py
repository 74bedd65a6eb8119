"""SeLa: balanced labels by optimal transport, cross-entropy on every head."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sela_ext.data import Augment
from sela_ext.data.loader import Batch
from sela_ext.training.bank import Bank
from sela_ext.training.labelling import LabelPass, label_pass
from sela_ext.training.prototypes import BALANCED_ROUNDS, place_prototypes
from sela_ext.training.recipes.base import Recipe, StepOutput
from sela_ext.training.resolve import Plan, named_augment
from sela_ext.training.run import Run


class SelaRecipe(Recipe):
    """Labels of every head by Sinkhorn's algorithm, from one of three sources; cross-entropy, mean or sum over heads.

    Source: Asano, Rupprecht, Vedaldi, "Self-labelling via simultaneous clustering and representation learning",
    ICLR 2020, section 3; the label source "bank" is SeLa-v2's.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.bank = Bank(len(run.source), run.arithmetic.device) if run.options.label_source == "bank" else None

    def begin(self) -> None:
        """Place the prototypes, and fill the bank: both by one look at all images.

        The untrained batch norm has no statistics of its own: it takes those of the batches.
        """
        run, opt = self.run, self.run.options
        if opt.init != "kmeans" and self.bank is None:
            return
        first = run.embed(run.plan.plain, train_mode=True)
        if opt.init == "kmeans":
            place_prototypes(
                run.network.heads,
                first.embeddings,
                first.valid,
                opt.seed,
                rounds=BALANCED_ROUNDS if run.plan.vectors is not None else 0,
                lam=opt.lam,
                marginals=opt.marginals,
                threads=opt.threads,
            )
        if self.bank is not None:
            self.bank.fill(first.embeddings, first.valid)

    def relabel(self, which: list[int] | None) -> LabelPass:
        """Embeddings of all images by the label source, then balanced labels."""
        embeddings, valid, waited = self.collect()
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
            balance=opt.balance,
            threads=opt.threads,
            truth=run.truth,
        )
        return dataclasses.replace(result, wait_seconds=waited)

    def collect(self) -> tuple[Tensor, Tensor, float]:
        """Embeddings [N, E] by the label source, which of them are valid, bool [N], and seconds waited for images."""
        run = self.run
        if self.bank is not None:
            return self.bank.embeddings, self.bank.valid, 0.0
        # Looking at all images takes a while: a signal ends the run at once, and resume repeats the pass.
        with run.interrupt.at_once():
            if run.options.label_source == "eval":
                seen = run.embed(_label_view(run.plan))
            else:  # its own draws: the epoch counter of the passes lies beyond that of the training
                seen = run.embed(run.plan.augment, train_mode=True, epoch=2**31 + run.state["passes_made"])
        return seen.embeddings, seen.valid, seen.wait_seconds

    def step(self, batch: Batch) -> StepOutput:
        """Cross-entropy of every head against its labels; images without a label count nothing."""
        run, opt = self.run, self.run.options
        pictures = half_resolution(run, batch.images)
        target = torch.from_numpy(run.labels[:, batch.index.numpy()]).to(run.arithmetic.device, torch.int64)
        with run.arithmetic.autocast():
            embedding = run.network(pictures)
        logits = run.network.heads.split(run.network.heads(embedding))
        losses = torch.stack(
            [F.cross_entropy(part, goal, ignore_index=-1) for part, goal in zip(logits, target, strict=True)]
        )
        return StepOutput(losses.sum() if opt.loss == "sum" else losses.mean(), embedding)

    def after_step(self, batch: Batch, output: StepOutput) -> None:
        """Write the bank."""
        if self.bank is not None:
            self.bank.write(batch.index, output.embedding)

    def state(self) -> dict[str, Any]:
        """The bank."""
        return {} if self.bank is None else {"bank": self.bank.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        if self.bank is not None:
            self.bank.load(state["bank"])


def half_resolution(run: Run, pictures: Tensor) -> Tensor:
    """The images [B, C, S, S] of a step, or for some of the steps these at half the size."""
    share = run.half_resolution
    if share and draw(run.options.seed, run.state["step"]) < share:
        return F.avg_pool2d(pictures, 2)
    return pictures


def draw(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on seed and step alone."""
    return float(np.random.Generator(np.random.Philox(key=np.array([seed, 2**33 + step], np.uint64))).random())


def _label_view(plan: Plan) -> Augment:
    """How the eval label pass looks at images, with the normalisation of the training."""
    view = plan.options.label_augment
    if view == "none":
        return plan.plain
    named = named_augment(view, plan.augment.size)
    return dataclasses.replace(named, mean=plan.augment.mean, std=plan.augment.std)
