"""`assign_batch`: soft, balanced targets for one batch, a few Sinkhorn iterations at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sela_ext.assign.marginals import cluster_shares
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels.sinkhorn import check_logits


def assign_batch(
    scores: Any, queue: Any = None, iterations: int = 3, *, lam: float = 20.0, marginals: Any = None
) -> Any:
    """Soft targets of a batch by online Sinkhorn, balanced over the batch and a queue of earlier scores.

    In torch, where nothing overflows: ``q = (lam * scores).exp(); for _ in range(iterations): q = q / q.sum(0) * b;
    q = q / q.sum(1, keepdim=True)``. Here in the log domain: any finite scores of any float type give finite targets.
    Runs on the device of the scores and without gradients, also inside a function for `torch.compile(fullgraph=True)`,
    and, without marginals, while a CUDA graph is captured. Several processes: each balances its own batch; sums over
    ranks are not taken.

    Args:
        scores: [B, K] float32, float16, bfloat16 or float64, numpy or torch: cosines with the prototypes, say.
        queue: [Q, K] scores of earlier images under the present prototypes, of the kind of `scores`; they take part in
            the balance and get no targets. None: none.
        iterations: >= 1; each one sets the clusters' shares and then the rows' sums.
        lam: 1 / epsilon, > 0; 20 is the published epsilon of 0.05.
        marginals: [K] positive sizes or shares of the clusters; None: equal.

    Returns:
        [B, K] of the type and kind of `scores`, rows of sum 1. Rows that hold NaN or +inf, or only -inf, take no part
        and get zeros. A cluster at -inf in every row gets nothing.

    Raises:
        DataError: scores or queue of a wrong shape or type.
        OptionError: another argument out of range.
        ResourceError: marginals while a CUDA graph is captured.

    Example:
        >>> import numpy as np, sela_ext
        >>> scores = np.array([[1.0, 0.9], [1.0, 0.2], [0.9, 0.8], [0.5, 0.1]])
        >>> sela_ext.assign_batch(scores, iterations=50).round(2).tolist()
        [[0.03, 0.97], [1.0, 0.0], [0.03, 0.97], [0.93, 0.07]]

    Source: Caron et al., Unsupervised learning of visual features by contrasting cluster assignments (SwAV), 2020,
    section 3.1 and appendix A.
    """
    import torch

    if torch.compiler.is_compiling() and isinstance(scores, torch.Tensor):
        from sela_ext.assign import ops

        return ops.assign_batch(scores, queue, iterations, lam, marginals)
    return batch_targets(scores, queue, iterations, lam, marginals)


def check_batch(scores: Any, queue: Any) -> None:
    """Refuse scores and a queue that are no logits, or do not fit together.

    Raises:
        DataError: a wrong shape, type or kind.
    """
    check_logits(scores)
    cols = scores.shape[1]
    is_torch = hasattr(scores, "detach")
    if queue is not None:
        check_logits(queue)
        if queue.shape[1] != cols or hasattr(queue, "detach") != is_torch:
            kind = "torch tensor" if is_torch else "numpy array"
            raise DataError(f"queue: expected a {kind} [Q, {cols}] as the scores, found shape {tuple(queue.shape)}")


def batch_targets(scores: Any, queue: Any, iterations: Any, lam: Any, marginals: Any) -> Any:
    """`assign_batch` outside of compiled functions.

    Raises:
        DataError: scores or queue of a wrong shape or type.
        OptionError: another argument out of range.
        ResourceError: marginals while a CUDA graph is captured.
    """
    import torch

    check_batch(scores, queue)
    cols = int(scores.shape[1])
    if isinstance(iterations, bool) or not isinstance(iterations, (int, np.integer)) or not 1 <= iterations <= 10**6:
        raise OptionError(f"iterations: expected an integer in 1 .. 1e6, found {iterations!r}")
    number = isinstance(lam, (int, float, np.integer, np.floating)) and not isinstance(lam, bool)
    if not number or not math.isfinite(lam) or not 1e-6 <= lam <= 1e6:
        raise OptionError(f"lam: expected a number in 1e-06 .. 1e+06, found {lam!r}")
    is_torch = hasattr(scores, "detach")
    with torch.no_grad():
        parts = [
            part if is_torch else torch.from_numpy(np.ascontiguousarray(part))
            for part in (scores, queue)
            if part is not None
        ]
        place, working = parts[0].device, torch.float64 if parts[0].dtype == torch.float64 else torch.float32
        x = torch.cat([part.detach().to(place, working) for part in parts])
        if marginals is None:  # nothing is copied from the host, which a captured stream does not allow
            log_shares = torch.full((cols,), -math.log(cols), dtype=working, device=place)
        else:
            if place.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise ResourceError(
                    "marginals: expected None while a CUDA graph is captured, found sizes, which are checked on the "
                    "host; call assign_batch outside of the graph"
                )
            log_shares = torch.from_numpy(np.log(cluster_shares(marginals, cols))).to(x)
        iterate = _sinkhorn_masked if place.type == "cuda" else _sinkhorn
        targets = iterate(x, int(iterations), float(lam), log_shares, len(parts[0])).to(parts[0].dtype)
    return targets if is_torch else targets.numpy()


def _sinkhorn(x: Any, iterations: int, lam: float, log_shares: Any, rows: int) -> Any:
    """Targets of the first `rows` of scores x [N, K], float32 or float64, torch."""
    import torch

    out = torch.zeros_like(x[:rows])
    top = x.amax(1) if len(x) else x[:, 0]
    good = torch.isfinite(top)  # NaN and +inf reach the maximum, and -inf is it when nothing else is there
    if not bool(good.any()):
        return out
    x, top = x[good], top[good]
    # Relative to the row's own maximum, where differences are exact; the maxima are the rows' first potentials.
    t = lam * (x - top[:, None])
    f = lam * (top - top.max())
    g = torch.zeros_like(log_shares)
    for _ in range(iterations):
        column = (t + f[:, None]).logsumexp(0)
        g = torch.where(column > -math.inf, log_shares - column, 0.0)
        f = -(t + g).logsumexp(1)
    out[good[:rows]] = (t + g)[: int(good[:rows].sum())].softmax(1)
    return out


def _sinkhorn_masked(x: Any, iterations: int, lam: float, log_shares: Any, rows: int) -> Any:
    """The same without a look at the data from the host: no device is waited for, and a CUDA graph may hold it."""
    import torch

    if not len(x):
        return torch.zeros_like(x)
    top = x.amax(1)
    good = torch.isfinite(top)
    highest = torch.where(good, top, -math.inf).amax()
    # Rows that take no part have the potential -inf, and entries whose differences are finite.
    top = torch.where(good, top, 0.0)
    t = torch.where(good[:, None], lam * (x - top[:, None]), 0.0)
    f = torch.where(good, lam * (top - highest), -math.inf)
    g = torch.zeros_like(log_shares)
    for _ in range(iterations):
        column = (t + f[:, None]).logsumexp(0)
        g = torch.where(column > -math.inf, log_shares - column, 0.0)
        f = torch.where(good, -(t + g).logsumexp(1), -math.inf)
    return torch.where(good[:rows, None], (t + g)[:rows].softmax(1), 0.0)
