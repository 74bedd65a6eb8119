"""What differs between training methods."""

# ruff: noqa: B027 - hooks that most methods have no use for
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sela_ext.data import Augment
from sela_ext.data.loader import Batch
from sela_ext.training.embedding import Embedded
from sela_ext.training.evaluate import Evaluation, evaluate_network
from sela_ext.training.labelling import LabelPass, random_labels
from sela_ext.training.run import Run, StepOutput

__all__ = ["Recipe", "StepOutput"]


class Recipe(ABC):
    """A training method: what a step sees, what its loss is, and where labels come from.

    The loop makes one for a run, and calls its methods in the order in which they stand here. Whatever a method keeps
    between calls that is not in the network, the optimiser or the labels belongs into `state`.

    Args:
        run: what all parts of the run share.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def views(self) -> list[Augment]:
        """Augmentations of a training step, one per view of an image; asked for once, before the loader is made."""
        return [self.run.plan.augment]

    def first_labels(self) -> NDArray[np.int32]:
        """Labels before any label pass, int32 [heads, N]."""
        return random_labels(len(self.run.source), self.run.options.clusters, self.run.options.seed)

    def begin(self) -> None:
        """Get ready for the first step of a run that is not continued."""

    @abstractmethod
    def relabel(self, which: list[int] | None) -> LabelPass:
        """Make a label pass.

        Args:
            which: heads to be labelled; None = all.
        """

    def order(self, epoch: int) -> NDArray[np.int64] | None:
        """Numbers of the images of an epoch, with repeats where wanted; None: every image once, shuffled."""
        return None

    @abstractmethod
    def step(self, batch: Batch) -> StepOutput:
        """Forward pass and loss of a batch of at least two images."""

    def after_step(self, batch: Batch, output: StepOutput) -> None:
        """Keep what later label passes need."""

    def evaluate(self) -> Evaluation:
        """Label all images as they are, and measure labels and features."""
        return self.evaluate_with(None)

    def evaluate_with(self, label: Callable[[Embedded], LabelPass] | None) -> Evaluation:
        """The evaluation, with labels of a function's making; None: balanced ones."""
        run = self.run
        run.share_statistics(run.evaluated)
        return evaluate_network(
            run.evaluated,
            run.images,
            run.plan.plain,
            run.arithmetic,
            previous=run.labels,
            options=run.options,
            indexes=run.indexes,
            residents=run.residents,
            stage=run.stage,
            label=label,
            ranks=run.ranks,
            alone=run.on_first,
            overview=run.at_end,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: tensors, numbers, strings, lists and dicts of them, on the CPU."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
