"""SeLa-v2: SeLa on several crops of every image, with labels from what the last epoch saw of the large ones.

Note [Sharpness of SeLa-v2]
    Systems with cosine scores state the sharpness of Sinkhorn's algorithm as an epsilon: the plan is
    exp(cosine / epsilon), scaled. Here it is exp(lambda * logits), and the logits of cosine heads are
    cosine / temperature; so lambda = temperature / epsilon. SwAV's epsilon of .05 is lambda 2 at temperature .1, and
    lambda 25 there is an epsilon of .004.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sela_ext.data.loader import Batch
from sela_ext.training.bank import Bank
from sela_ext.training.crops import parse_crops
from sela_ext.training.labelling import LabelPass
from sela_ext.training.recipes.base import StepOutput
from sela_ext.training.recipes.sela import SelaRecipe
from sela_ext.training.run import Run

# Embeddings of length one, so that half precision errs by 2^-11 of a component: 656 MB for two crops of 1,281,167
# images of ImageNet in 128 dimensions.
_BANK_DTYPE = torch.float16


class SelaV2Recipe(SelaRecipe):
    """One bank per large crop; heads take the banks in turn, and every crop learns the label of its image.

    Labels come once per epoch from the embeddings that the steps of the last epoch produced, without a forward pass;
    the first ones from one look at all images. Prototypes are learned by SGD like all other weights, after
    `freeze_prototypes` epochs in which they stay.

    Source: Caron et al., SwAV (NeurIPS 2020), where DeepCluster-v2 and SeLa-v2 are described.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        large = parse_crops(run.options.crops)[0].count
        self.bank = None
        self.banks = [Bank(len(run.source), run.arithmetic.device, run.ranks) for _ in range(large)]

    def begin(self) -> None:
        """Fill every bank by one look at all images as they are, and place the prototypes where that was asked for.

        Crops would tell an untrained network more of how an image was cropped than of what it shows.
        """
        run = self.run
        seen = run.embed(run.plan.plain, train_mode=True)
        if run.options.init == "kmeans":
            self.place(seen)
        for bank in self.banks:
            bank.fill(_unit(seen.embeddings), seen.valid.clone())

    def relabel(self, which: list[int] | None) -> LabelPass:
        """Balanced labels: head h from the bank of large crop h mod V."""
        heads = range(self.run.options.heads) if which is None else which
        passes = []
        for number, bank in enumerate(self.banks):
            own = [head for head in heads if head % len(self.banks) == number]
            bank.settle()
            if own:
                passes.append(self.solve(bank.embeddings, bank.valid, own))
        return merge_passes(passes, self.run.labels)

    def order(self, epoch: int) -> NDArray[np.int64] | None:
        """As plain SeLa's."""
        for bank in self.banks:
            bank.settle()
        return super().order(epoch)

    def after_step(self, batch: Batch, output: StepOutput) -> None:
        """Write the banks: embeddings of the crops come in the order of the views, the large ones first."""
        rows = len(batch.index)
        for number, bank in enumerate(self.banks):
            bank.write(batch.placed, _unit(output.embedding[number * rows : (number + 1) * rows]))

    def state(self) -> dict[str, Any]:
        """The banks, and what plain SeLa keeps."""
        return {**super().state(), "banks": [bank.state() for bank in self.banks]}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        super().load(state)
        for bank, saved in zip(self.banks, state["banks"], strict=True):
            bank.load(saved)


def merge_passes(passes: Sequence[LabelPass], previous: NDArray[np.int32]) -> LabelPass:
    """Make one label pass of several that solved different heads.

    Args:
        passes: at least one.
        previous: labels before them, int32 [heads, N]; heads that none solved keep them.
    """
    labels, confidence = previous.copy(), np.zeros(previous.shape, np.float32)
    potentials: dict[int, NDArray[np.float64]] = {}
    for one in passes:
        solved = [record["head"] for record in one.heads]
        labels[solved], confidence[solved] = one.labels[solved], one.confidence[solved]
        potentials.update(one.potentials)
    return LabelPass(
        labels,
        confidence,
        potentials,
        heads=sorted((record for one in passes for record in one.heads), key=lambda record: int(record["head"])),
        masked=max(one.masked for one in passes),
        seconds=sum(one.seconds for one in passes),
        complaints=[line for one in passes for line in one.complaints],
        wait_seconds=sum(one.wait_seconds for one in passes),
        spread=min(one.spread for one in passes),
    )


def _unit(embedding: Tensor) -> Tensor:
    """Embeddings [B, E] scaled to length one, as the bank keeps them."""
    return F.normalize(embedding.detach().float(), dim=1).to(_BANK_DTYPE)
