"""`SelfLabelling`: SeLa on feature vectors as a scikit-learn estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch.nn import functional as F

from sela_ext.embeddings.training import (
    Fitted,
    Recipe,
    best_head,
    train_heads,
)
from sela_ext.evaluation import stability
from sela_ext.training.machine import torch_settings
from sela_ext.training.vector_options import automatic_batch, automatic_epochs


class SelfLabelling(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Balanced clustering of feature vectors by self-labelling.

    Several heads learn to predict, from noisy views of the rows, labels that an optimal-transport assignment gives them
    under the condition that all clusters have the same size (or sizes as `marginals` says). Where KMeans minimises
    distances and lets sizes fall as they may, this looks for evenly used clusters that a classifier can tell apart. It
    is meant for features of a trained network (DINOv2, CLIP, ...); scale columns of different units before.

    Args:
        n_clusters: number of clusters K >= 1; or several, to be compared: then `n_heads` heads are trained for each,
            and the K whose heads agree best is chosen (see `stability_`).
        n_heads: heads per K, each from another start, >= 1.
        hidden_dim: width of a hidden layer (linear, batch norm, ReLU) that the heads share; 0 = none.
        head_kind: "cosine" (rows and prototypes of length one) or "linear".
        temperature: of cosine heads, > 0.
        epochs: passes over the rows; "auto" = 4 .. 60, fewer for more rows.
        batch_size: rows per step; "auto" = 64 .. 4096, more for more rows.
        learning_rate: at 256 rows per step, > 0; grows with the root of the batch.
        noise: deviation of the Gaussian noise of a view, in units of the rows' root mean square, >= 0.
        feature_dropout: share of the features left out of a view, 0 <= share < 1.
        lam: sharpness lambda of the assignment, > 0.
        tol: L1 tolerance of the cluster sizes, >= 0.
        marginals: shares of the clusters, [K], for a single K; None = equal.
        balance: "argmax", or "exact": sizes of the training labels differ by at most one.
        random_state: int, RandomState or None; an int gives the same bits at the same number of threads.
        n_threads: threads of torch and of the solver; None = as torch is set.
        device: where heads are trained: "cpu", "cuda", ...
        verbose: 1 shows a progress bar.

    Attributes:
        labels_: labels of the chosen head, int32 [N].
        head_labels_: of all heads, int32 [T, N].
        head_clusters_: K of every head, [T].
        head_: the chosen head: of the chosen K the one of lowest cross-entropy.
        n_clusters_: the chosen K.
        cross_entropy_: of every head against its own labels, nats, [T]; ln K is chance.
        stability_: {K: mean adjusted mutual information between pairs of its heads}; 1 = all heads agree, 0 = they
            share no more than chance. Empty with one head per K.
        cluster_sizes_: rows per cluster, int64 [K].
        loss_curve_: mean loss of every epoch.
        n_iter_: epochs made.
        n_features_in_: columns D.
        feature_names_in_: names of the columns, where X had some.

    Raises:
        ValueError: a parameter of wrong type or out of range, more clusters than rows, or rows that are not finite.

    Example:
        >>> from sklearn.datasets import make_blobs
        >>> X, _ = make_blobs(300, centers=3, random_state=0, cluster_std=0.5)
        >>> model = SelfLabelling(3, n_heads=2, epochs=5, random_state=0).fit(X)
        >>> sorted(model.cluster_sizes_.tolist())
        [100, 100, 100]

    Source: Asano et al., "Self-labelling via simultaneous clustering and representation learning", ICLR 2020,
    section 3; the features take the place of the network.
    """

    labels_: NDArray[np.int32]

    def __init__(
        self,
        n_clusters: int | Sequence[int] = 8,
        *,
        n_heads: int = 4,
        hidden_dim: int = 0,
        head_kind: Literal["cosine", "linear"] = "cosine",
        temperature: float = 0.1,
        epochs: int | Literal["auto"] = "auto",
        batch_size: int | Literal["auto"] = "auto",
        learning_rate: float = 0.1,
        noise: float = 0.3,
        feature_dropout: float = 0.2,
        lam: float = 25.0,
        tol: float = 1e-3,
        marginals: Any = None,
        balance: Literal["argmax", "exact"] = "argmax",
        random_state: Any = None,
        n_threads: int | None = None,
        device: str = "cpu",
        verbose: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_heads = n_heads
        self.hidden_dim = hidden_dim
        self.head_kind = head_kind
        self.temperature = temperature
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.noise = noise
        self.feature_dropout = feature_dropout
        self.lam = lam
        self.tol = tol
        self.marginals = marginals
        self.balance = balance
        self.random_state = random_state
        self.n_threads = n_threads
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> SelfLabelling:
        """Cluster the rows.

        Args:
            X: [N, D], real and finite.
            y: ignored.

        Returns:
            The estimator.
        """
        rows = validate_data(self, X, dtype=[np.float32, np.float64], ensure_min_samples=1)
        kinds, recipe = self._recipe(len(rows))
        threads = torch.get_num_threads() if self.n_threads is None else self.n_threads
        with torch_settings(threads), Progress(disable=not self.verbose, transient=True) as progress:
            task = progress.add_task("training heads", total=recipe.epochs)
            fitted = train_heads(
                rows,
                recipe,
                torch.device(self.device),
                on_epoch=lambda done, loss: progress.update(
                    task, completed=done, description=f"training heads, loss {loss:.3f}"
                ),
            )
        self._fitted = fitted
        self.head_labels_ = fitted.labelled.labels
        self.head_clusters_ = list(recipe.clusters)
        self.cross_entropy_ = np.array([record["cross_entropy"] for record in fitted.labelled.heads])
        self.stability_ = stability(self.head_labels_, self.head_clusters_)
        self.n_clusters_ = kinds[0] if len(kinds) == 1 else self._most_stable(kinds)
        self.head_ = best_head(fitted, self._heads_of(self.n_clusters_))
        self.labels_ = self.head_labels_[self.head_]
        self.cluster_sizes_ = np.bincount(self.labels_, minlength=self.n_clusters_)
        self.loss_curve_ = fitted.history
        self.n_iter_ = recipe.epochs
        return self

    def predict(self, X: Any) -> NDArray[np.int32]:
        """Labels of rows, new ones or those of the fit.

        Args:
            X: [M, D].

        Returns:
            int32 [M]: by the chosen head and the sizes that its clusters had in training. For the training rows these
            are `labels_`, but for those that `balance="exact"` has moved.
        """
        logits = self._logits(X)
        scores = logits.double() * self.lam + torch.from_numpy(self._potential()).to(logits.device)
        labels: NDArray[np.int32] = scores.argmax(1).to(torch.int32).cpu().numpy()
        return labels

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """The chosen head's probabilities of the clusters for rows [M, D]: float32 [M, K]."""
        found: NDArray[np.float32] = torch.softmax(self._logits(X), 1).cpu().numpy()
        return found

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-probability, in nats, that the chosen head gives to the labels it predicts for rows [M, D].

        Higher is better, 0 the most; -ln K is what a head that knows nothing gets.
        """
        logits = self._logits(X)
        labels = torch.from_numpy(self.predict(X)).to(logits.device, torch.int64)
        return -float(F.cross_entropy(logits.double(), labels))

    def __sklearn_is_fitted__(self) -> bool:
        """Whether `fit` has been called."""
        return hasattr(self, "_fitted")

    def _logits(self, X: Any) -> torch.Tensor:
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        fitted: Fitted = self._fitted
        return fitted.logits(rows, self.head_)

    def _potential(self) -> NDArray[np.float64]:
        return self._fitted.labelled.potentials[self.head_]

    def _heads_of(self, clusters: int) -> list[int]:
        return [head for head, k in enumerate(self.head_clusters_) if k == clusters]

    def _most_stable(self, kinds: Sequence[int]) -> int:
        """The K whose heads agree best; with one head each, the one of lowest cross-entropy in parts of ln K."""
        if self.stability_:
            return max(kinds, key=lambda k: (self.stability_[k], -k))
        return min(kinds, key=lambda k: (self.cross_entropy_[self._heads_of(k)[0]] / np.log(max(k, 2)), k))

    def _recipe(self, rows: int) -> tuple[list[int], Recipe]:
        """The different K, and the parameters checked."""
        several = isinstance(self.n_clusters, (list, tuple, np.ndarray, range))
        kinds = [_integer("n_clusters", k, 1) for k in (self.n_clusters if several else [self.n_clusters])]  # type: ignore[union-attr]
        if not kinds or len(set(kinds)) != len(kinds):
            raise ValueError(f"n_clusters: expected one number or several different ones, found {self.n_clusters!r}")
        if max(kinds) > rows:
            raise ValueError(f"n_samples={rows} should be >= n_clusters={max(kinds)}.")
        heads = _integer("n_heads", self.n_heads, 1)
        for name, allowed in (("head_kind", ("cosine", "linear")), ("balance", ("argmax", "exact"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        if self.marginals is not None and len(kinds) > 1:
            raise ValueError("marginals: expected None with several n_clusters")
        if self.n_threads is not None:
            _integer("n_threads", self.n_threads, 1)
        return kinds, Recipe(
            clusters=[k for k in kinds for _ in range(heads)],
            hidden=_integer("hidden_dim", self.hidden_dim, 0),
            kind=self.head_kind,
            temperature=_real("temperature", self.temperature, above=0),
            epochs=automatic_epochs(rows) if self.epochs == "auto" else _integer("epochs", self.epochs, 0),
            batch_size=automatic_batch(rows)
            if self.batch_size == "auto"
            else _integer("batch_size", self.batch_size, 1),
            learning_rate=_real("learning_rate", self.learning_rate, above=0),
            noise=_real("noise", self.noise, low=0),
            dropout=_real("feature_dropout", self.feature_dropout, low=0, below=1),
            lam=_real("lam", self.lam, above=0),
            tol=_real("tol", self.tol, low=0),
            marginals=self.marginals,
            balance=self.balance,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            threads=self.n_threads or 0,
        )


def _integer(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, found {value!r}")
    return int(value)


def _real(name: str, value: Any, *, low: float = -np.inf, above: float = -np.inf, below: float = np.inf) -> float:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    fits = number and math.isfinite(value)
    if not fits or value < low or value <= above or value >= below:
        bounds = (
            [f"> {above:g}"] * (above > -np.inf)
            + [f">= {low:g}"] * (low > -np.inf)
            + [f"< {below:g}"] * (below < np.inf)
        )
        raise ValueError(f"{name}: expected a finite number {' and '.join(bounds)}, found {value!r}")
    return float(value)
