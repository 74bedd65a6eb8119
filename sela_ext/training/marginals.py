"""How large the clusters of a label pass are to be: which options go together, and what the solver is told."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sela_ext.assign import FeatureLogits
from sela_ext.assign.marginals import cluster_shares
from sela_ext.errors import OptionError, shown
from sela_ext.training.ranks import Ranks

# Of estimated shares this part is dealt out evenly: a cluster that the network forgets keeps a tenth of an equal share.
_EVEN = 0.1
# Rows whose probabilities are computed at once: 60 MB of float32 at 1,000 clusters.
_ROWS = 16_384

# Options of the balanced assignment, and their defaults: methods that cluster have no use for others.
_OF_ASSIGNMENT = {"marginals": None, "relax": None, "size_bounds": None, "balance": "argmax"}


def check_labelling(values: Mapping[str, Any]) -> None:
    """Check that the options of labels fit the method.

    Args:
        values: all options.

    Raises:
        OptionError: options that the method has no use for.
    """
    method = values["method"]
    if method in ("kmeans", "deepcluster"):
        for name, default in _OF_ASSIGNMENT.items():
            if values[name] != default:
                raise OptionError(f"{name}: expected none with method {method}, which balances nothing; leave it out")
    if method == "deepcluster" and values["label_source"] != "eval":
        raise OptionError(
            f"label_source: expected eval with method deepcluster, found {values['label_source']}; or use method kmeans"
        )
    if method == "deepcluster" and values["ema"]:
        raise OptionError(f"ema: expected 0 with method deepcluster, whose heads begin anew, found {values['ema']}")


def check_marginals(values: Mapping[str, Any]) -> None:
    """Check the options of cluster sizes: each by itself, and together.

    Args:
        values: all options, with one entry of `clusters` per head.

    Raises:
        OptionError: values out of range, or options that exclude each other.
    """
    marginals, relax, bounds = values["marginals"], values["relax"], values["size_bounds"]
    if isinstance(marginals, str):
        if marginals != "estimated":
            raise OptionError(f"marginals: expected estimated, or a list of shares, found {shown(marginals)}")
    elif marginals is not None:
        if not isinstance(marginals, (list, tuple)):
            raise OptionError(f"marginals: expected estimated, or a list of shares, found {shown(marginals)}")
        wrong = {k for k in values["clusters"] if k != len(marginals)}
        if wrong:
            raise OptionError(f"marginals: expected one share per cluster ({min(wrong)}), found {len(marginals)}")
        cluster_shares(marginals, len(marginals))
    if relax is not None and (isinstance(relax, bool) or not _is_number(relax) or not relax > 0):
        raise OptionError(f"relax: expected a number > 0, found {shown(relax)}")
    if bounds is not None:
        pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2 and all(_is_number(one) for one in bounds)
        if not pair or not 0 <= bounds[0] <= 1 <= bounds[1]:
            raise OptionError(
                "size_bounds: expected two multiples of an equal share, 0 <= low <= 1 <= high, such as [0.5, 2], "
                f"found {shown(bounds)}"
            )
    if relax is not None and bounds is not None:
        raise OptionError("relax and size_bounds: expected at most one of them, found both")
    for name, value in (("relax", relax), ("size_bounds", bounds)):
        if value is not None and values["balance"] == "exact":
            raise OptionError(f'{name}: expected balance "argmax" with it, found "exact", which meets the sizes')


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def size_options(
    marginals: Any,
    relax: Any,
    size_bounds: Any,
    logits: Tensor | FeatureLogits,
    ranks: Ranks | None = None,
    unseen: int = 0,
) -> dict[str, Any]:
    """Arguments of `sela_ext.assign` for the cluster sizes of one head.

    Args:
        marginals: shares [K], None or "estimated".
        relax: as `assign` takes it.
        size_bounds: lowest and highest size, as multiples of an equal share; or None.
        logits: of the head, [N, K], before they are multiplied by lambda.
        ranks: who holds other rows of them; None: nobody.
        unseen: rows of all ranks that are no images: they are there, and weigh nothing.

    Returns:
        marginals, relax and size_bounds; bounds in images.
    """
    rows, clusters = logits.shape
    ranks = ranks or Ranks()
    if isinstance(marginals, str):
        marginals = estimated_shares(logits, ranks).numpy()
    if size_bounds is not None:
        rows = int(ranks.totals([rows])[0]) - unseen
        low, high = (float(one) * rows / clusters for one in size_bounds)
        size_bounds = low, high
    return {"marginals": marginals, "relax": relax, "size_bounds": size_bounds}


@torch.no_grad()
def estimated_shares(logits: Tensor | FeatureLogits, ranks: Ranks | None = None) -> Tensor:
    """Shares of the clusters as the network sees them: its mean probabilities, with a tenth of an equal share added.

    b = .9 mean_i softmax(logits_i) + .1 / K. The smoothing keeps clusters alive: without it one that becomes smaller
    is predicted less often, gets fewer images, and so on. Rows that are not finite are left out.

    Args:
        logits: [N, K].
        ranks: who holds other rows of them; None: nobody.

    Returns:
        float64 [K] on the CPU, of sum 1.

    Source: SeLa paper, section 3.2: the uniform marginal may be replaced by any other.
    """
    rows, clusters = logits.shape
    total, seen = torch.zeros(clusters, dtype=torch.float64), 0
    for start in range(0, rows, _ROWS):
        part = F.softmax(logits[start : min(start + _ROWS, rows)].double(), 1)
        part = part[torch.isfinite(part).all(1)]
        total += part.sum(0).cpu()
        seen += len(part)
    if ranks is not None and ranks.several:
        *sums, count = ranks.totals([*total.tolist(), seen])
        total, seen = torch.tensor(sums, dtype=torch.float64), int(count)
    predicted = total / seen if seen else torch.full_like(total, 1 / clusters)
    return (1 - _EVEN) * predicted + _EVEN / clusters
