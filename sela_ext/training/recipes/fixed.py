"""Label transfer: plain cross-entropy on labels that come from elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sela_ext.evaluation import label_statistics
from sela_ext.models import Heads
from sela_ext.training.embedding import Embedded
from sela_ext.training.evaluate import Evaluation
from sela_ext.training.labelling import LabelPass
from sela_ext.training.recipes.sela import SelaRecipe
from sela_ext.training.run import Run

# Rows whose logits are computed at once.
_CHUNK = 16_384


class FixedLabelsRecipe(SelaRecipe):
    """Every head learns its labels; no label pass changes them.

    Images keep the labels that were given; those without one, held-out ones among them, get the network's.

    Source: SeLa paper, section 4: labels of one network train another from scratch.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert run.images.fixed is not None
        self._labels = run.images.fixed.labels[:, run.images.kept]

    def first_labels(self) -> NDArray[np.int32]:
        """The given ones of the training images, int32 [heads, N]."""
        return self._labels

    def begin(self) -> None:
        """Nothing to be done."""

    def relabel(self, which: list[int] | None) -> LabelPass:
        """Never called: there are no label passes."""
        raise AssertionError("a label pass of fixed labels")

    def head_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of one head over the images with a label in it; 0 where the batch has none."""
        return F.cross_entropy(logits, target, ignore_index=-1, reduction="sum") / (target >= 0).sum().clamp(min=1)

    def evaluate_with(self, label: Callable[[Embedded], LabelPass] | None) -> Evaluation:
        """The evaluation; unless a function makes them, labels are the given ones, and others where none was given."""
        if label is None:
            heads, given = self.run.evaluated.heads, self._labels

            def label(seen: Embedded) -> LabelPass:
                return judge_labels(heads, seen.embeddings, seen.valid, given)

        return super().evaluate_with(label)


@torch.no_grad()
def judge_labels(heads: Heads, embeddings: Tensor, valid: Tensor, given: NDArray[np.int32]) -> LabelPass:
    """How well a network predicts labels that were given, and its own labels where none was.

    Args:
        heads: turn embeddings into logits.
        embeddings: [N, E].
        valid: bool [N]; images that could not be read keep the label that they have, at confidence 0.
        given: int32 [heads, N]; -1 = none.

    Returns:
        Labels; the network's probability of each; potentials of 0, with which the network's own prediction is the
        label of a new image; and a record per head, whose agreement is the share of given labels that it predicts.
    """
    begin = time.perf_counter()
    labels, confidence = given.copy(), np.zeros(given.shape, np.float32)
    readable = valid.cpu().numpy()
    records: list[dict[str, Any]] = []
    for head, k in enumerate(heads.clusters):
        right, cross_entropy = 0, 0.0
        for start in range(0, len(embeddings), _CHUNK):
            rows = slice(start, start + _CHUNK)
            log_p = F.log_softmax(heads.logits_of(head, embeddings[rows]), 1)
            predicted = log_p.argmax(1)
            known = torch.from_numpy(given[head, rows]).to(predicted.device, torch.int64)
            label = torch.where(known >= 0, known, torch.where(valid[rows], predicted, -1))
            sure = log_p.gather(1, label.clamp(min=0)[:, None])[:, 0]
            counted = (known >= 0) & valid[rows]
            right += int((predicted == known)[counted].sum())
            cross_entropy -= float(sure[counted].double().sum())
            labels[head, rows] = label.to(torch.int32).cpu().numpy()
            confidence[head, rows] = torch.where(valid[rows], sure.exp(), 0.0).cpu().numpy()
        counted_rows = max(int(((given[head] >= 0) & readable).sum()), 1)
        statistics = label_statistics(labels[head], k)
        records.append(
            {
                "head": head,
                "clusters": k,
                "cross_entropy": cross_entropy / counted_rows,
                "agreement": right / counted_rows,
                "ln_k": math.log(k),
                "used": int(statistics["used"]),
                "size_min": int(statistics["size_min"]),
                "size_max": int(statistics["size_max"]),
            }
        )
    potentials = {head: np.zeros(k) for head, k in enumerate(heads.clusters)}
    return LabelPass(labels, confidence, potentials, records, 0, time.perf_counter() - begin)
