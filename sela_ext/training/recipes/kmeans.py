"""K-means in SeLa's loop: everything is SeLa's but the label pass."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from sela_ext.training.cluster_pass import cluster_pass, points_of
from sela_ext.training.evaluate import Evaluation
from sela_ext.training.labelling import LabelPass
from sela_ext.training.recipes.sela import SelaRecipe


class KmeansRecipe(SelaRecipe):
    """Labels of every head by k-means on the embeddings of all images, with a start and a K of its own.

    Where the embeddings come from is SeLa's: the bank, or a pass over all images. They are made one long, and whitened
    before where `pca` says so. A label pass starts k-means anew; its clusters are then numbered such that as many
    images as possible keep their labels, so that the heads stay and go on learning.

    Source: SeLa paper, section 4.2, which puts k-means in place of Sinkhorn's algorithm in the same loop.
    """

    def relabel(self, which: list[int] | None) -> LabelPass:
        """Embeddings of all images by the label source, then k-means."""
        embeddings, valid, waited = self.collect()
        return dataclasses.replace(self._cluster(embeddings, valid, which), wait_seconds=waited)

    def evaluate(self) -> Evaluation:
        """As usual, but for labels by k-means."""
        return self.evaluate_with(lambda seen: self._cluster(seen.embeddings, seen.valid, None))

    def _cluster(self, embeddings: Tensor, valid: Tensor, which: list[int] | None) -> LabelPass:
        run, opt = self.run, self.run.options
        return cluster_pass(
            run.network.heads,
            points_of(embeddings[valid], opt.pca, opt.threads),
            embeddings,
            valid,
            run.labels,
            which=which,
            iterations=opt.kmeans_iterations,
            seed=opt.seed,
            stream=run.state["passes_made"],
            threads=opt.threads,
            truth=run.truth,
        )
