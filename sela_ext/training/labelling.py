"""The label step of a run: embeddings of all images in, balanced labels of every head out."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sela_ext.assign import FeatureLogits, UnbalancedLabelsWarning, assign
from sela_ext.assign.plan import available_memory
from sela_ext.evaluation import label_change, label_statistics, mutual_information
from sela_ext.models import Heads
from sela_ext.training.vector_embeddings import is_on_demand, rows_of

# Rows whose logits are computed at once: 60 MB of float32 at 1,000 clusters.
_CHUNK = 16_384
# Logits that would take more than this part of the free memory are not stored in float32. Solved on a 16-bit copy they
# take half as much, and three products instead of one; where that is too much they are computed each time they are
# read: more time (ten reads, say), and hardly any memory.
_MEMORY_SHARE = 0.5
# The same for embeddings that are not in memory themselves, which are read where they lie for memory's sake.
_MEMORY_SHARE_ON_DEMAND = 0.25


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
        complaints: what the solver warned of, a line each: labels far from balanced.
        wait_seconds: time that the network waited for images, where it looked at them for this pass.
    """

    labels: NDArray[np.int32]
    confidence: NDArray[np.float32]
    potentials: dict[int, NDArray[np.float64]]
    heads: list[dict[str, Any]] = field(default_factory=list)
    masked: int = 0
    seconds: float = 0.0
    complaints: list[str] = field(default_factory=list)
    wait_seconds: float = 0.0

    def describe(self) -> str:
        """The pass in a line, for the log."""
        best = min(self.heads, key=lambda head: head["cross_entropy"])
        loose = [head["head"] for head in self.heads if not head["converged"]]
        return (
            f"changed {np.mean([head['changed'] for head in self.heads]):.3f}, "
            f"cross-entropy {best['cross_entropy']:.3f} of ln K {best['ln_k']:.3f}, "
            f"solver error {max(head['error'] for head in self.heads):.1e}"
            + (f", not converged: heads {loose}" if loose else "")
            + (f", {self.masked} rows masked" if self.masked else "")
        )


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
    balance: str = "argmax",
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
        balance: see `sela_ext.assign`.
        threads: of the solver.
        truth: true labels int64 [N], only for the records.

    Source: SeLa paper, section 3.1.
    """
    begin = time.perf_counter()
    rows = valid.nonzero()[:, 0]
    labels, confidence = previous.copy(), np.zeros(previous.shape, np.float32)
    potentials: dict[int, NDArray[np.float64]] = {}
    records: list[dict[str, Any]] = []
    masked = 0
    complaints: list[str] = []
    for head in range(len(heads.clusters)) if which is None else which:
        k = heads.clusters[head]
        logits, storage = _logits_of(heads, head, embeddings, rows)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UnbalancedLabelsWarning)
            solved = assign(
                logits,
                lam=lam,
                tol=tol,
                method=method,
                max_passes=max_passes,
                marginals=marginals,
                balance=balance,
                threads=threads,
                storage=storage,
            )
        complaints += [f"head {head}: {warning.message}" for warning in caught]
        found = torch.as_tensor(solved.labels).to(embeddings.device, torch.int64)
        log_p = torch.cat(
            [
                F.log_softmax(logits[start : start + _CHUNK], 1).gather(
                    1, found[start : start + _CHUNK].clamp(min=0)[:, None]
                )[:, 0]
                for start in range(0, len(rows), _CHUNK)
            ]
        )
        labelled = found >= 0
        cross_entropy = float(-log_p[labelled].double().mean())
        places = rows.cpu().numpy()
        new = np.full(len(valid), -1, np.int32)
        new[places] = found.to(torch.int32).cpu().numpy()
        confidence[head] = 0.0
        confidence[head, places] = torch.where(labelled, log_p.exp(), torch.zeros_like(log_p)).cpu().numpy()
        masked = max(masked, int((~labelled).sum()))
        statistics = label_statistics(new, k)
        record: dict[str, Any] = {
            "head": head,
            "clusters": k,
            "method": solved.method,
            "backend": solved.backend,
            "error": float(solved.error),
            "converged": bool(solved.converged),
            "passes": float(solved.passes),
            "changed": label_change(previous[head], new),
            "cross_entropy": cross_entropy,
            "ln_k": math.log(k),
            "used": int(statistics["used"]),
            "size_min": int(statistics["size_min"]),
            "size_max": int(statistics["size_max"]),
            "nmi_previous": mutual_information(previous[head], new),
        }
        if truth is not None:
            record["nmi"] = mutual_information(truth, new)
        records.append(record)
        labels[head] = new
        potentials[head] = torch.as_tensor(solved.potential).cpu().numpy().astype(np.float64)
    return LabelPass(labels, confidence, potentials, records, masked, time.perf_counter() - begin, complaints)


def _logits_of(heads: Heads, head: int, embeddings: Tensor, rows: Tensor) -> tuple[Tensor | FeatureLogits, str]:
    """Logits of one head for these rows, and the solver's storage.

    Stored, or where they would take most of the memory, computed when read; then `storage` says on what to solve.
    """
    k = heads.clusters[head]
    everything = len(rows) == len(embeddings)
    free = _free_memory(embeddings.device)
    needed = len(rows) * k * 4
    if needed > free * (_MEMORY_SHARE_ON_DEMAND if is_on_demand(embeddings) else _MEMORY_SHARE):
        weight, bias, normalize = heads.as_linear(head)
        chosen = embeddings if everything else rows_of(embeddings, rows)
        chosen = chosen.float() if chosen.dtype == torch.float64 else chosen
        storage = "fixed16" if needed / 2 <= _MEMORY_SHARE * free and embeddings.device.type == "cpu" else "auto"
        return FeatureLogits(chosen, weight.to(chosen.device), bias, normalize=normalize), storage
    logits = torch.empty(len(rows), k, device=embeddings.device)
    for start in range(0, len(rows), _CHUNK):
        chunk = embeddings[start : start + _CHUNK] if everything else embeddings[rows[start : start + _CHUNK]]
        logits[start : start + _CHUNK] = heads.logits_of(head, chunk)
    return logits, "auto"


def _free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; inf where nobody says."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = available_memory()
    return math.inf if free is None else float(free)


def choose_head(records: Iterable[dict[str, Any]]) -> int:
    """The head whose labels its network predicts best: lowest cross-entropy. True labels play no part."""
    return int(min(records, key=lambda record: (record["cross_entropy"], record["head"]))["head"])
