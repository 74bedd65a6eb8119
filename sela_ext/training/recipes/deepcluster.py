"""DeepCluster: every epoch k-means of all features, a new head, and a step through evenly drawn clusters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sela_ext.models import Heads
from sela_ext.training.cluster_pass import cluster_pass, points_of, whitened_dimensions
from sela_ext.training.embedding import Embedded
from sela_ext.training.evaluate import Evaluation
from sela_ext.training.labelling import LabelPass
from sela_ext.training.prototypes import forget
from sela_ext.training.recipes.sela import SelaRecipe, label_view
from sela_ext.training.run import Run

# Features that go through the projection at a time.
_ROWS = 4096


class DeepClusterRecipe(SelaRecipe):
    """Labels by k-means on whitened features of length one, and a new head after every label pass.

    The features are those of the backbone, of images without augmentation, in eval mode and in order; where its
    classifier ends in a ReLU, as AlexNet's and VGG16's do here, before this. A new head is drawn from N(0, .01) (a
    cosine head as it is at the start of a run), and the optimiser forgets what it knew of the old one. Clusters are
    numbered such that images keep their numbers where they can: not for the head, but for metrics and galleries.

    Final labels are k-means of the final features, likewise; the head that stays is that of the last label pass.

    Source: Caron et al., "Deep clustering for unsupervised learning of visual features", ECCV 2018.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.whitened = whitened_dimensions(run, run.backbone.feature_dim)

    def relabel(self, which: list[int] | None) -> LabelPass:
        """Features of all images, k-means, new heads."""
        with self.run.interrupt.at_once():
            result = self._cluster(which)
        self._renew_heads([record["head"] for record in result.heads])
        return result

    def evaluate(self) -> Evaluation:
        """As usual, but for labels by k-means."""
        return self.evaluate_with(lambda seen: self._cluster(None, seen))

    def _cluster(self, which: list[int] | None, seen: Embedded | None = None) -> LabelPass:
        """K-means of the features, of all images as they were `seen` if that will do."""
        run, opt = self.run, self.run.options
        with _before_last_relu(run.network.backbone) as without_relu:
            if seen is None or without_relu or opt.label_augment != "none":
                seen = run.whole(run.embed(label_view(run.plan), keep_features=bool(opt.projection)))
        result = run.on_first(lambda: self._label(which, seen, without_relu))
        return dataclasses.replace(result, wait_seconds=seen.wait_seconds)

    def _label(self, which: list[int] | None, seen: Embedded, without_relu: bool) -> LabelPass:
        """K-means of all images as they were `seen`."""
        run, opt = self.run, self.run.options
        # Without a projection the embeddings are the features.
        features = seen.features if opt.projection and seen.features is not None else seen.embeddings
        points = points_of(features, seen.valid, self.whitened, opt.threads)
        return cluster_pass(
            run.network.heads,
            points,
            self._embeddings(features) if without_relu else seen.embeddings,
            seen.valid,
            run.labels,
            which=which,
            iterations=opt.kmeans_iterations,
            seed=opt.seed,
            stream=run.state["passes_made"],
            threads=opt.threads,
            truth=run.truth,
        )

    @torch.no_grad()
    def _embeddings(self, features: Tensor) -> Tensor:
        """What the heads see of features before the last ReLU, which are overwritten."""
        network = self.run.network
        features = features.relu_()
        if not self.run.options.projection:
            return features
        was_training = network.training
        network.eval()
        try:
            with self.run.arithmetic.autocast():
                starts = range(0, len(features), _ROWS)
                return torch.cat([network.projection(features[at : at + _ROWS]) for at in starts])
        finally:
            network.train(was_training)

    def _renew_heads(self, which: list[int]) -> None:
        """Draw the weights of these heads anew, and have the optimiser forget their history."""
        run, heads = self.run, self.run.network.heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((run.options.seed * 1_000_003 + run.state["passes_made"] + 1) % 2**63)
            fresh = Heads(heads.weight.shape[1], heads.clusters, heads.kind, heads.temperature)
        for name, parameter in heads.named_parameters():
            for head in which:
                start = sum(heads.clusters[:head])
                rows = slice(start, start + heads.clusters[head])
                parameter.data[rows] = fresh.get_parameter(name).data[rows].to(parameter.device)
        forget(run.update.optimizer, heads, which)


@contextlib.contextmanager
def _before_last_relu(backbone: nn.Module) -> Iterator[bool]:
    """Have the backbone give its features before the ReLU that it ends in; whether that is how it ends."""
    classifier = getattr(backbone, "classifier", None)
    last = classifier[-1] if isinstance(classifier, nn.Sequential) and len(classifier) else None
    if classifier is None or not isinstance(last, nn.ReLU):
        yield False
        return
    classifier[-1] = nn.Identity()
    try:
        yield True
    finally:
        classifier[-1] = last
