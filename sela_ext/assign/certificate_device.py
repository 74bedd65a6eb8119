"""The parts of a certificate that read the logits, for logits on a CUDA device: torch in float64, where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sela_ext.assign.certificate import Look
from sela_ext.assign.sources import DEVICE_ENTRIES_AT_ONCE, device_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    from torch import Tensor

    Vector = npt.NDArray[np.float64]

INFINITY = float("inf")


def looks(
    logits: Any, scale: float, scores: Vector, prices: Vector | None, weights: Vector, labels: Any
) -> Iterator[tuple[slice, Look]]:
    """Look at all rows, block by block.

    Args:
        logits: on a CUDA device, or computed there.
        scale: lambda.
        scores: [K], the potential.
        prices: [K] or None.
        weights: [N].
        labels: int64 [N] or None.
    """
    there = _put(logits, scores, prices, weights, labels)
    for part, block in _blocks(logits):
        own = None if there[3] is None else there[3][part]
        yield part, _look(block, scale, there[0], there[1], there[2][part], own)


def mended_costs(logits: Any, scale: float, g: Vector, mass: Vector, keep: Vector, lacking: Vector) -> Iterator[float]:
    """What blocks of rows add to the cost of a mended plan; see `sela_ext.assign.certificate`.

    Args:
        logits: on a CUDA device, or computed there.
        scale: lambda.
        g: [K], the potential.
        mass: [N] of the rows, 0 for masked ones.
        keep: [K], what columns are scaled by.
        lacking: [K], what is dealt out to the columns.
    """
    potential, a, kept, dealt = _put(logits, g, mass, keep, lacking)
    for part, block in _blocks(logits):
        used = a[part] > 0
        block = scale * block[used]
        if not len(block):
            continue
        plan = (block + potential).softmax(1) * kept
        plan += (1.0 - plan.sum(1, keepdim=True)).clamp_(min=0.0) * dealt
        terms = torch.where(plan == 0, 0.0, plan * (plan.log() - block))
        yield float(a[part][used] @ terms.sum(1))


def _put(logits: Any, *arrays: Any) -> list[Any]:
    """Arrays where the logits are; None stays None."""
    return [None if one is None else torch.from_numpy(np.ascontiguousarray(one)).to(logits.device) for one in arrays]


def _blocks(logits: Any) -> Iterator[tuple[slice, Tensor]]:
    return device_blocks(logits, max(1, DEVICE_ENTRIES_AT_ONCE // int(logits.shape[1])))


def _look(
    block: Tensor, scale: float, scores: Tensor, prices: Tensor | None, weights: Tensor, labels: Tensor | None
) -> Look:
    fine = torch.isfinite(block.amax(1))  # NaN and +inf reach the maximum, and -inf is it when nothing else is there
    where = fine.nonzero()[:, 0]
    block, w = block[where], weights[where]
    t = scale * block + scores
    sums: dict[str, Any] = {
        "columns": (w @ t.softmax(1)).cpu().numpy(),
        "lse": float(w @ t.logsumexp(1)),
        "weight": float(w.sum()),
    }
    if labels is None:
        nothing = np.zeros(0)
        places = nothing.astype(np.int64)
        return Look(_host(fine), **sums, places=places, margins=nothing, impossible=0, value=0.0, best=0.0)
    own = labels[where]
    labelled = (own >= 0).nonzero()[:, 0]
    own, block, t = own[labelled, None], block[labelled], t[labelled]
    mine = t.gather(1, own)[:, 0]
    others = t.scatter(1, own, -INFINITY).amax(1) if len(labelled) else mine
    logit, counted = block.gather(1, own)[:, 0], w[labelled] > 0
    best = 0.0
    if prices is not None and bool(counted.any()):
        best = float((scale * block[counted] + prices).amax(1).sum())
    return Look(
        _host(fine),
        **sums,
        places=_host(where[labelled]),
        margins=_host(mine - others),
        impossible=int((logit == -INFINITY).sum()),
        value=float(logit[counted].sum()),
        best=best,
    )


def _host(tensor: Tensor) -> Any:
    return tensor.cpu().numpy()
