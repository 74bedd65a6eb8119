"""The label step of a run: embeddings of all images in, balanced labels of every head out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sela_ext.assign import assign
from sela_ext.evaluation import cluster_metrics, label_change, label_statistics
from sela_ext.models import Heads

# Rows whose logits are computed at once: 60 MB of float32 at 1,000 clusters.
_CHUNK = 16_384


@dataclass(frozen=True)
class LabelPass:
    """What a label pass gave.

    Attributes:
        labels: int32 [heads, N]; -1 = no label (image not seen, or its logits hold NaN or infinity).
        confidence: the network's probability of the label, float32 [heads, N]; 0 where there is none.
        potentials: log beta of every solved head, float64 [K]; with logits they label new images.
        heads: a record per solved head, for metrics.jsonl.
        masked: rows without a label, the largest number over heads.
        seconds: time taken.
    """

    labels: NDArray[np.int32]
    confidence: NDArray[np.float32]
    potentials: dict[int, NDArray[np.float64]]
    heads: list[dict[str, Any]] = field(default_factory=list)
    masked: int = 0
    seconds: float = 0.0


def random_labels(images: int, clusters: Iterable[int], seed: int) -> NDArray[np.int32]:
    """Deal the labels out evenly and at random, for every head on its own: i mod K, permuted.

    Returns:
        int32 [heads, images].

    Source: SeLa paper, section 3; the authors' code.
    """
    deals = []
    for head, k in enumerate(clusters):
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, head], np.uint64)))
        deals.append(generator.permutation(images).astype(np.int64) % k)
    return np.stack(deals).astype(np.int32)


@torch.no_grad()
def label_pass(
    heads: Heads,
    embeddings: Tensor,
    valid: Tensor,
    previous: NDArray[np.int32],
    *,
    which: Iterable[int] | None = None,
    lam: float,
    tol: float,
    method: str = "auto",
    max_passes: int = 1000,
    marginals: Any = None,
    threads: int = 0,
    truth: NDArray[np.int64] | None = None,
) -> LabelPass:
    """Solve the label assignment of every head, from the embeddings of all images.

    Args:
        heads: the heads; their present weights turn embeddings into logits.
        embeddings: [N, D], any float dtype.
        valid: bool [N]; images without an embedding get label -1 and weigh nothing.
        previous: labels before this pass, int32 [heads, N]; heads that are not solved keep them.
        which: heads to solve; None = all.
        lam: sharpness lambda.
        tol: L1 tolerance of the cluster sizes.
        method: see `sela_ext.assign`.
        max_passes: see `sela_ext.assign`.
        marginals: shares of the clusters; None = equal.
        threads: of the solver.
        truth: true labels int64 [N], only for the records.

    Source: SeLa paper, section 3.1.
    """
    begin = time.perf_counter()
    rows = valid.nonzero()[:, 0]
    everything = len(rows) == len(valid)
    labels, confidence = previous.copy(), np.zeros(previous.shape, np.float32)
    potentials: dict[int, NDArray[np.float64]] = {}
    records: list[dict[str, Any]] = []
    masked = 0
    for head in range(len(heads.clusters)) if which is None else which:
        k = heads.clusters[head]
        logits = torch.cat(
            [
                heads.logits_of(head, embeddings[start : start + _CHUNK] if everything else embeddings[chunk])
                for start, chunk in zip(range(0, len(rows), _CHUNK), torch.split(rows, _CHUNK), strict=True)
            ]
        )
        solved = assign(
            logits, lam=lam, tol=tol, method=method, max_passes=max_passes, marginals=marginals, threads=threads
        )
        found = torch.as_tensor(solved.labels).to(logits.device, torch.int64)
        log_p = F.log_softmax(logits, 1).gather(1, found.clamp(min=0)[:, None])[:, 0]
        labelled = found >= 0
        cross_entropy = float(-log_p[labelled].double().mean())
        new = np.full(len(valid), -1, np.int32)
        new[rows.cpu().numpy()] = found.to(torch.int32).cpu().numpy()
        sure = torch.where(labelled, log_p.exp(), torch.zeros_like(log_p))
        confidence[head, rows.cpu().numpy()] = sure.cpu().numpy()
        masked = max(masked, int((~labelled).sum()))
        statistics = label_statistics(new, k)
        record: dict[str, Any] = {
            "head": head,
            "clusters": k,
            "method": solved.method,
            "error": float(solved.error),
            "converged": bool(solved.converged),
            "passes": float(solved.passes),
            "changed": label_change(previous[head], new),
            "cross_entropy": cross_entropy,
            "ln_k": math.log(k),
            "used": int(statistics["used"]),
            "size_min": int(statistics["size_min"]),
            "size_max": int(statistics["size_max"]),
            "nmi_previous": cluster_metrics(previous[head], new)["nmi"],
        }
        if truth is not None:
            record["nmi"] = cluster_metrics(truth, new)["nmi"]
        records.append(record)
        labels[head] = new
        potentials[head] = np.asarray(solved.potential, np.float64)
    return LabelPass(labels, confidence, potentials, records, masked, time.perf_counter() - begin)


def choose_head(records: Iterable[dict[str, Any]]) -> int:
    """The head whose labels its network predicts best: lowest cross-entropy. True labels play no part."""
    return int(min(records, key=lambda record: (record["cross_entropy"], record["head"]))["head"])
