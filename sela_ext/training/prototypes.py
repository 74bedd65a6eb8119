"""Where the prototypes of cosine heads begin: at the centroids of the untrained network's embeddings."""

from __future__ import annotations

import warnings

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from sela_ext.errors import OptionError
from sela_ext.models import Heads

# Rows per cluster that k-means looks at, and its iterations: a beginning, not a solution.
_ROWS_PER_CLUSTER = 256
_ITERATIONS = 10
# More rows than this are not looked at as long as every cluster has a few: choosing where k-means starts takes a time
# that grows with clusters times rows, half a minute for 1,000 clusters and 50,000 rows.
_MOST_ROWS, _FEWEST_ROWS = 32_768, 16


@torch.no_grad()
def place_prototypes(heads: Heads, embeddings: Tensor, valid: Tensor, seed: int) -> None:
    """Turn every prototype to a centroid of k-means over the embeddings; its length stays.

    A random network already maps like images to like embeddings, but random prototypes cut across that: the first
    labels are then close to arbitrary, and a small set is memorised before they get better. Every head has k-means
    start elsewhere, so that heads differ.

    Args:
        heads: cosine heads; changed in place.
        embeddings: [N, D].
        valid: bool [N]; the others are left out.
        seed: with the head's number it determines which rows are used and where k-means starts.

    Raises:
        OptionError: more clusters than images.
    """
    readable = valid.nonzero()[:, 0].cpu()
    if max(heads.clusters) > len(readable):
        found = max(heads.clusters)
        raise OptionError(f"clusters: expected at most {len(readable)}, the readable images, found {found}")
    directions = []
    for head, k in enumerate(heads.clusters):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + head) % 2**63)
        rows = readable[torch.randperm(len(readable), generator=generator)[: _rows_for(k)]]
        points = F.normalize(embeddings[rows.to(embeddings.device)].float(), dim=1).cpu()
        means = KMeans(k, n_init=1, max_iter=_ITERATIONS, random_state=(seed * 1009 + head) % 2**32)
        # One thread: scikit-learn adds the threads' sums in the order in which they end.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: some coincide
            means.fit(points.numpy())
        directions.append(F.normalize(torch.from_numpy(means.cluster_centers_).float(), dim=1))
    lengths = heads.weight.norm(dim=1, keepdim=True)
    heads.weight.copy_(torch.cat(directions).to(lengths.device) * lengths)


def _rows_for(clusters: int) -> int:
    """Rows that k-means looks at for so many clusters."""
    return min(_ROWS_PER_CLUSTER * clusters, max(_MOST_ROWS, _FEWEST_ROWS * clusters))
