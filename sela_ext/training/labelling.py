"""The label step of a run: embeddings of all images in, balanced labels of every head out.

Note [A label pass]
Embeddings are read once for all heads: a tile of rows is made float32 and of length one, and one product gives the
logits of all heads, which go from the cache into the storage that the solver reads. Heads are solved side by side, one
thread each, since problems of few columns gain little from several. The cross-entropy takes one more pass of
the solver's kernel, at lambda 1 and without a potential: its log-sum-exp is what log-softmax subtracts. Tiles are the
same, and each is one thread's work, for any number of threads: labels do not depend on it.
  Over several ranks each computes the logits of the rows that it owns, and the solver adds up over ranks; heads are
then solved one after the other. Labels are told to all, since any rank may be given any image to train on. They have
the same bits as those of one process with the same embeddings, where all are valid: a row that is not is masked here,
and left out there.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sela_ext.assign import Assignment, FeatureLogits
from sela_ext.assign.features import in_order
from sela_ext.assign.plan import available_memory, threads_of
from sela_ext.assign.solve import assign_silently
from sela_ext.errors import DataError, NumericsError
from sela_ext.evaluation import label_change, label_statistics, mutual_information
from sela_ext.kernels import sinkhorn_pass
from sela_ext.kernels.device import free_memory, on_card
from sela_ext.models import Heads
from sela_ext.training import faults
from sela_ext.training.marginals import size_options
from sela_ext.training.progress import Stage, no_stage
from sela_ext.training.ranks import Ranks
from sela_ext.training.vector_embeddings import is_on_demand, rows_of

# Rows whose logits are computed at once: 60 MB of float32 at 1,000 clusters on a device or for log-softmax; a tile of
# a thread is smaller: its rows stay in the cache from one operation to the next.
_CHUNK = 16_384
_TILE = 512
# Bytes of logits of the heads that are solved side by side, unless one head alone takes more.
_TOGETHER = 1 << 30
# Logits that would take more than this part of the free memory are not stored in float32. Solved on a 16-bit copy they
# take half as much, and three products instead of one; where that is too much they are computed each time they are
# read: more time (ten reads, say), and hardly any memory.
_MEMORY_SHARE = 0.5
# The same for embeddings that are not in memory themselves, which are read where they lie for memory's sake.
_MEMORY_SHARE_ON_DEMAND = 0.25
# A problem of so few clusters and such a tolerance is solved by Anderson's method from the last pass's potential: 5 to
# 20 reads of 3 ms (60,000 x 128), where Newton's method takes 85 ms on its candidates. More reads, and it begins anew.
_FEW_CLUSTERS, _LOOSE, _NEARBY_PASSES = 256, 3e-3, 60
# Rows that heads are compared on, and that the spread of the embeddings is told from.
_COMPARED = 20_000


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
        spread: of the embeddings, see `spread_of`.
    """

    labels: NDArray[np.int32]
    confidence: NDArray[np.float32]
    potentials: dict[int, NDArray[np.float64]]
    heads: list[dict[str, Any]] = field(default_factory=list)
    masked: int = 0
    seconds: float = 0.0
    complaints: list[str] = field(default_factory=list)
    wait_seconds: float = 0.0
    spread: float = math.nan

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
    relax: float | None = None,
    size_bounds: Any = None,
    balance: str = "argmax",
    threads: int = 0,
    truth: NDArray[np.int64] | None = None,
    start: Mapping[int, NDArray[np.float64]] | None = None,
    stage: Stage = no_stage,
    ranks: Ranks | None = None,
) -> LabelPass:
    """Solve the label assignment of every head, from the embeddings of all images.

    Args:
        heads: the heads; their present weights turn embeddings into logits.
        embeddings: [N, D], any float dtype; with several ranks the rows that this one owns (`sela_ext.shard_rows`).
        valid: bool [N]; images without an embedding get label -1 and weigh nothing. Likewise.
        previous: labels before this pass, int32 [heads, N]; heads that are not solved keep them.
        which: heads to solve; None = all.
        lam: sharpness lambda.
        tol: L1 tolerance of the cluster sizes.
        method: see `sela_ext.assign`.
        max_passes: see `sela_ext.assign`.
        marginals: shares of the clusters; None = equal; "estimated" = what the network predicts, see
            `sela_ext.training.marginals.estimated_shares`.
        relax: see `sela_ext.assign`.
        size_bounds: lowest and highest size of a cluster, as multiples of an equal share.
        balance: see `sela_ext.assign`.
        threads: of products and solver; 0 = all. Labels do not depend on it.
        truth: true labels int64 [N], only for the records.
        start: potentials of the last pass, float64 [K] by head: few clusters and a loose tolerance are solved from
            there, which takes a third of the time. The labels are others within the tolerance.
        stage: shows which head it is at.
        ranks: who shares the work; None: nobody.

    Raises:
        NumericsError: the network gives no image a finite output.

    Source: SeLa paper, section 3.1.
    """
    begin = time.perf_counter()
    ranks = ranks or Ranks()
    places = valid.nonzero()[:, 0]
    everything = len(places) == len(embeddings)
    spread = _spread_over_ranks(embeddings, valid, ranks)
    unseen = 0
    if ranks.several:  # shards must end at multiples of 128 rows: none is left out
        if not everything and not is_on_demand(embeddings):  # vectors that cannot be used are no numbers as they lie
            embeddings = embeddings.clone()
            embeddings[~valid] = math.nan
        unseen = int(ranks.totals([len(valid) - len(places)])[0])
        places, everything = torch.arange(len(valid), device=valid.device), True
    rows = places.cpu().numpy()
    labels, confidence = previous.copy(), np.zeros(previous.shape, np.float32)
    workers = 1 if on_card(embeddings.device) else threads_of(threads)
    chosen = list(range(len(heads.clusters)) if which is None else which)
    solved: dict[int, _Solved] = {}
    complaints: list[str] = []
    with stage("solving for labels, heads", len(chosen)) as advance:
        for group in _groups(heads, chosen, len(places), embeddings.device, ranks):
            logits = _logits_of(heads, group, embeddings, None if everything else places, workers, ranks)
            stored = all(isinstance(one, Tensor) for one in logits)
            side_by_side = min(workers, len(group)) if stored and not ranks.several else 1

            def solve(
                position: int, group: list[int] = group, logits: list[Any] = logits, alone: bool = side_by_side == 1
            ) -> _Solved:
                head = group[position]
                with _of_a_network():
                    return _solve(
                        logits[position],
                        None if start is None else start.get(head),
                        threads=threads if alone else 1,
                        lam=lam,
                        tol=tol,
                        method=method,
                        max_passes=max_passes,
                        **size_options(marginals, relax, size_bounds, logits[position], ranks, unseen),
                        balance=balance,
                        storage=_storage_of(logits[position], ranks),
                        group=ranks.group,
                    )

            faults.at("inside label pass")
            for head, result in zip(group, _at_once(solve, len(group), side_by_side), strict=True):
                solved[head] = result
                advance(len(solved))
            complaints += [f"head {head}: {line}" for head in group for line in solved[head].warnings]
            del logits, solve
    records: list[dict[str, Any]] = []
    masked = 0
    for head in chosen:
        result, k = solved[head], heads.clusters[head]
        labelled = result.labels >= 0
        own = np.full(len(valid), -1, np.int32)
        own[rows] = result.labels
        sure = np.zeros(len(valid), np.float32)
        sure[rows] = np.where(labelled, np.exp(result.log_p), 0.0)
        new, probable = own, sure
        told = [float(labelled.sum()), float(result.log_p[labelled].sum(dtype=np.float64))]
        if ranks.several:
            new = np.concatenate([part.numpy() for part in _gathered(torch.from_numpy(own), ranks)])
            probable = np.concatenate([part.numpy() for part in _gathered(torch.from_numpy(sure), ranks)])
            told = ranks.totals(told)
        confidence[head] = probable
        masked = max(masked, len(new) - unseen - int((new >= 0).sum()) if ranks.several else int((~labelled).sum()))
        solver = {
            "method": result.method,
            "backend": result.backend,
            "error": result.error,
            "converged": result.converged,
            "passes": result.passes,
        }
        cross_entropy = -told[1] / told[0] if told[0] else math.nan
        record = head_record(head, k, solver, previous[head], new, cross_entropy, truth)
        # The head before this one that has as many clusters: heads that say the same are no use beside one another.
        other = next((i for i in reversed(range(head)) if heads.clusters[i] == k and i in chosen), None)
        if other is not None:
            some = slice(None, None, max(1, len(new) // _COMPARED))
            record["nmi_other"] = mutual_information(labels[other][some], new[some])
        records.append(record)
        labels[head] = new
    potentials = {head: solved[head].potential for head in chosen}
    return LabelPass(
        labels,
        confidence,
        potentials,
        records,
        masked,
        time.perf_counter() - begin,
        complaints,
        spread=spread,
    )


@contextlib.contextmanager
def _of_a_network() -> Iterator[None]:
    """What the solver finds wrong inside with logits is the fault of the network that gave them, not of the data.

    Raises:
        NumericsError: no row of logits is finite.
    """
    try:
        yield
    except DataError as error:
        raise NumericsError(
            f"label pass: {error}; the network has no output that is a number: lower lr, or use precision float32"
        ) from error


def head_record(
    head: int,
    clusters: int,
    solver: dict[str, Any],
    previous: NDArray[np.int32],
    labels: NDArray[np.int32],
    cross_entropy: float,
    truth: NDArray[np.int64] | None,
) -> dict[str, Any]:
    """What metrics.jsonl says about a head after a label pass.

    Args:
        head: its number.
        clusters: K.
        solver: method, backend, error, converged and passes: what made the labels, and how well.
        previous: labels before, int32 [N].
        labels: labels now, int32 [N].
        cross_entropy: mean over images of -log of what the network gives the label.
        truth: true labels int64 [N], or None.
    """
    statistics = label_statistics(labels, clusters)
    record: dict[str, Any] = {
        "head": head,
        "clusters": clusters,
        **solver,
        "changed": label_change(previous, labels),
        "cross_entropy": cross_entropy,
        "ln_k": math.log(clusters),
        "used": int(statistics["used"]),
        "size_min": int(statistics["size_min"]),
        "size_max": int(statistics["size_max"]),
        "nmi_previous": mutual_information(previous, labels),
    }
    if truth is not None:
        record["nmi"] = mutual_information(truth, labels)
    return record


def spread_of(embeddings: Tensor) -> float:
    """How far embeddings [N, E] point apart: 1 - |mean of them at length one|^2, 0 = all alike, near 1 = all over.

    Rows that are not finite are left out.

    Example:
        >>> spread_of(torch.eye(4)), spread_of(torch.ones(4, 3))
        (0.75, 0.0)
    """
    rows = embeddings.detach().double()
    unit = F.normalize(rows[torch.isfinite(rows).all(1)], dim=1)
    return max(0.0, 1.0 - float((unit.mean(0) ** 2).sum())) if len(unit) else math.nan


def _spread_over_ranks(embeddings: Tensor, valid: Tensor, ranks: Ranks) -> float:
    """The spread of the embeddings of all ranks, told from every so many of them."""
    places = valid.nonzero()[:, 0]
    before, count = 0, len(places)
    if ranks.several:
        counts = ranks.gather(len(places))
        before, count = sum(counts[: ranks.rank]), sum(counts)
    step = max(1, count // _COMPARED)
    some = embeddings[places[-before % step :: step]]
    return spread_of(torch.cat(ranks.gather_rows(some)) if ranks.several else some)


def _gathered(part: Tensor, ranks: Ranks) -> list[Tensor]:
    """What all ranks hold, by rank, on the CPU: by the devices' own way where they have one."""
    device = ranks.device
    return [one.cpu() for one in ranks.gather_rows(part.to(device))]


@dataclass(frozen=True)
class _Solved:
    """One head's labels, of the rows that have an embedding."""

    labels: NDArray[np.int32]
    log_p: NDArray[np.float32]
    potential: NDArray[np.float64]
    method: str
    backend: str
    error: float
    converged: bool
    passes: float
    warnings: list[str]


def _solve(
    logits: Tensor | FeatureLogits, start: NDArray[np.float64] | None, *, threads: int, **options: Any
) -> _Solved:
    """Labels of one head, and the log-probability that the network gives to each."""
    found = None
    passes, warnings = 0.0, []
    exact = options["relax"] is None and options["size_bounds"] is None
    nearby = start is not None and exact and options["method"] == "auto" and options["tol"] >= _LOOSE
    if nearby and isinstance(logits, Tensor) and not on_card(logits.device) and logits.shape[1] <= _FEW_CLUSTERS:
        few = {**options, "method": "anderson", "max_passes": min(_NEARBY_PASSES, options["max_passes"])}
        found = assign_silently(logits, start=start, threads=threads, **few)
        passes, warnings = float(found.passes), list(found.warnings)
    if found is None or (not found.converged and options["max_passes"] > _NEARBY_PASSES):
        found = assign_silently(logits, threads=threads, **options)
        passes += float(found.passes)
        warnings += found.warnings
    labels = _numpy(found.labels)
    return _Solved(
        labels,
        _log_probabilities(logits, found, threads),
        _numpy(found.potential).astype(np.float64),
        found.method,
        found.backend,
        float(found.error),
        bool(found.converged),
        passes,
        warnings,
    )


def _log_probabilities(logits: Tensor | FeatureLogits, found: Assignment, threads: int) -> NDArray[np.float32]:
    """Log softmax(logits) at the labels, float32 [rows]; whatever it is where there is no label."""
    if not logits.shape[0]:  # a rank without rows
        return np.zeros(0, np.float32)
    if isinstance(logits, Tensor) and not on_card(logits.device):
        values, own = logits.numpy(), np.maximum(_numpy(found.labels), 0)
        sums = sinkhorn_pass(values, np.zeros(values.shape[1]), scale=1.0, threads=threads)
        log_p: NDArray[np.float32] = values[np.arange(len(values)), own] - sums.lse
        return log_p
    labels = torch.as_tensor(found.labels).to(logits.device, torch.int64).clamp(min=0)[:, None]
    if isinstance(logits, Tensor):
        sums = sinkhorn_pass(logits, np.zeros(logits.shape[1]), scale=1.0, threads=threads)
        return _numpy(logits.gather(1, labels)[:, 0] - torch.as_tensor(sums.lse).to(logits.device))
    return _numpy(
        torch.cat(
            [
                F.log_softmax(logits[first : first + _CHUNK], 1).gather(1, labels[first : first + _CHUNK])[:, 0]
                for first in range(0, len(labels), _CHUNK)
            ]
        )
    )


def _at_once(work: Callable[[int], _Solved], count: int, workers: int) -> Iterator[_Solved]:
    """Do something for 0 .. count - 1, in so many threads; the results come in order."""
    if workers <= 1:
        yield from map(work, range(count))
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, range(count))


def _storage_of(logits: Tensor | FeatureLogits, ranks: Ranks) -> str:
    """What the solver keeps logits in: those that are computed when read, in 16 bits where that fits on every rank."""
    if isinstance(logits, Tensor) or on_card(logits.device):
        return "auto"
    rows, clusters = logits.shape
    fits = 2.0 * rows * clusters <= _MEMORY_SHARE * _free_memory(logits.device, ranks)
    return "fixed16" if ranks.least(float(fits)) else "auto"


def _groups(heads: Heads, chosen: Sequence[int], rows: int, device: torch.device, ranks: Ranks) -> Iterator[list[int]]:
    """Heads whose logits are stored together."""
    room = min(_TOGETHER, _MEMORY_SHARE * ranks.least(_free_memory(device, ranks)))
    rows = -int(ranks.least(-rows))
    group: list[int] = []
    for head in chosen:
        if group and 4.0 * rows * sum(heads.clusters[h] for h in [*group, head]) > room:
            yield group
            group = []
        group.append(head)
    if group:
        yield group


def _logits_of(
    heads: Heads, group: Sequence[int], embeddings: Tensor, rows: Tensor | None, workers: int, ranks: Ranks
) -> list[Tensor] | list[FeatureLogits]:
    """Logits of some heads for these rows (None = all): stored, or where one takes most of the memory, computed."""
    count = len(embeddings) if rows is None else len(rows)
    share = _MEMORY_SHARE_ON_DEMAND if is_on_demand(embeddings) else _MEMORY_SHARE
    most, free = -ranks.least(-count), ranks.least(_free_memory(embeddings.device, ranks))
    if 4.0 * most * max(heads.clusters[head] for head in group) > share * free:
        chosen = embeddings if rows is None else rows_of(embeddings, rows)
        chosen = chosen.float() if chosen.dtype == torch.float64 else chosen
        maps = (heads.as_linear(head) for head in group)
        return [
            FeatureLogits(chosen, weight.to(chosen.device), bias, normalize=normalize)
            for weight, bias, normalize in maps
        ]
    parts = [heads.as_linear(head) for head in group]
    weight = torch.cat([part[0] for part in parts]).to(embeddings.device)
    bias = None if parts[0][1] is None else torch.cat([part[1] for part in parts if part[1] is not None])
    normalize = parts[0][2]
    widths = [heads.clusters[head] for head in group]
    logits = [torch.empty(count, k, device=embeddings.device) for k in widths]
    step = _CHUNK if on_card(embeddings.device) else _TILE
    narrow = embeddings.dtype in (torch.bfloat16, torch.float16)

    def tile(first: int) -> None:
        rows_here = slice(first, first + step)
        chunk = embeddings[rows_here] if rows is None else embeddings[rows[rows_here]]
        chunk = chunk.float()
        if normalize and narrow:  # numbers of 16 bits stay what they are, whatever the product makes of float32
            product = F.linear(chunk, weight, bias)
            product /= torch.linalg.vector_norm(chunk, dim=1, keepdim=True).clamp_(min=1e-12)
        else:
            product = F.linear(F.normalize(chunk, dim=1) if normalize else chunk, weight, bias)
        for one, part in zip(logits, torch.split(product, widths, dim=1), strict=True):
            one[rows_here] = part

    with _short_products() if narrow else contextlib.nullcontext():
        for _ in in_order(tile, list(range(0, count, step)), workers, reading=None, step=step):
            pass
    return logits


@contextlib.contextmanager
def _short_products() -> Iterator[None]:
    """Products of float32 matrices with factors of 16 bits where the processor has them, and sums in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _numpy(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _free_memory(device: torch.device, ranks: Ranks) -> float:
    """Bytes that this rank can still have on a device; inf where nobody says. Ranks of a machine share its memory."""
    if on_card(device):
        return float(free_memory(device))
    free = available_memory()
    return math.inf if free is None else float(free) / ranks.local_world_size


def choose_head(records: Iterable[dict[str, Any]]) -> int:
    """The head whose labels its network predicts best: lowest cross-entropy. True labels play no part."""
    return int(min(records, key=lambda record: (record["cross_entropy"], record["head"]))["head"])
