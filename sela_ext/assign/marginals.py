"""The share of the images that each cluster is to receive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.errors import OptionError
from sela_ext.kernels.sinkhorn import check_vector

if TYPE_CHECKING:
    import numpy.typing as npt


def cluster_shares(marginals: Any | None, clusters: int) -> npt.NDArray[np.float64]:
    """Column marginals b [K], positive, sum 1.

    Args:
        marginals: [K] positive numbers of any sum (sizes or shares), or None for equal shares.
        clusters: K.

    Raises:
        OptionError: wrong shape, or a number that is not finite and positive.
    """
    if marginals is None:
        return np.full(clusters, 1.0 / clusters)
    shares = check_vector("marginals", marginals, clusters)
    if not float(shares.min()) > 0:
        bad = int(np.argmin(shares))
        raise OptionError(
            f"marginals: expected numbers > 0, found {shares[bad]} at {bad}; leave out columns that may get no image"
        )
    normalised: npt.NDArray[np.float64] = shares / shares.max()
    normalised = normalised / normalised.sum()
    if not float(normalised.min()) > 1e-15:
        raise OptionError(
            f"marginals: expected shares within a factor of 1e15 of each other, found {shares.min()} and {shares.max()}"
        )
    return normalised
