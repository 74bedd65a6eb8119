"""The share of the images that each cluster is to receive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.errors import OptionError
from sela_ext.kernels.sinkhorn import check_vector

if TYPE_CHECKING:
    import numpy.typing as npt


# Potential of a cluster of share 0: no logit makes up for it, and float32 still holds it after any change of lambda.
EMPTY = -1e37


def cluster_shares(marginals: Any | None, clusters: int, *, empty: bool = False) -> npt.NDArray[np.float64]:
    """Column marginals b [K], positive, sum 1.

    Args:
        marginals: [K] positive numbers of any sum (sizes or shares), or None for equal shares.
        clusters: K.
        empty: shares of 0 are allowed, too.

    Raises:
        OptionError: wrong shape, or a number that is not finite and positive.
    """
    if marginals is None:
        return np.full(clusters, 1.0 / clusters)
    shares = check_vector("marginals", marginals, clusters)
    positive = shares > 0
    if not (positive.all() or (empty and positive.any() and float(shares.min()) == 0)):
        bad = int(np.argmin(shares))
        wanted = "numbers >= 0, one of them above" if empty else "numbers > 0"
        raise OptionError(
            f"marginals: expected {wanted}, found {shares[bad]} at {bad}; leave out columns that may get no image"
        )
    normalised: npt.NDArray[np.float64] = shares / shares.max()
    normalised = normalised / normalised.sum()
    if not float(normalised[positive].min()) > 1e-15:
        raise OptionError(
            f"marginals: expected shares within a factor of 1e15 of each other, found {shares.min()} and {shares.max()}"
        )
    return normalised
