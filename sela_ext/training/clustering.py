"""K-means and PCA-whitening, for the methods that label by clustering.

Note [Same bits for every number of threads]
    Rows are cut into chunks of a fixed size. A chunk is one task of one thread, whose libraries use no further threads,
    and what the chunks give is put together in their order. So threads decide when a chunk is worked on, never how.
    The rest, which takes little time, is torch in one thread.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import pairwise_distances_argmin
from threadpoolctl import ThreadpoolController
from torch import Tensor

from sela_ext.errors import DataError, OptionError

T = TypeVar("T")

# Rows of a task. A chunk of distances to 10,000 centroids takes 160 MB at most, and faiss works on it in parts.
_CHUNK = 4096
# Above this many clusters they are matched greedily: the exact algorithm takes minutes for 10,000.
_MATCHED_EXACTLY = 2048
# Directions whose variance is below this part of the largest are rounding errors of float32: whitening would blow
# them up.
_SMALLEST_VARIANCE = 1e-7

BACKENDS = ("auto", "faiss", "scikit-learn", "torch")


@dataclass(frozen=True)
class Clustering:
    """What k-means found.

    Attributes:
        labels: int32 [N], the cluster of each point.
        centroids: float32 [K, D], the means that the points were compared with last.
        objective: mean squared distance of a point to the centroid of its cluster, after each iteration.
        gain: part by which the last iteration lowered the objective; 0 where no label changed any more.
        repaired: empty clusters that were filled, over all iterations.
        backend: what looked for the nearest centroids.
    """

    labels: NDArray[np.int32]
    centroids: Tensor
    objective: list[float]
    gain: float
    repaired: int
    backend: str


@torch.no_grad()
def kmeans(
    points: Tensor,
    clusters: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    stream: int = 0,
    start: Tensor | None = None,
    threads: int = 1,
    backend: str = "auto",
) -> Clustering:
    """Lloyd's algorithm from random points, without empty clusters.

    In torch, one iteration: ``labels = torch.cdist(points, centroids).argmin(1)``, then each centroid is the mean of
    its points. A cluster that came out empty gets a part of the largest one: of its points those on the side of the
    one farthest from their mean, as seen from the mean. So none is empty while there are as many distinct points as
    clusters. The same bits for every number of threads, see Note [Same bits for every number of threads]; backends
    differ by rounding alone.

    Args:
        points: float32 [N, D], finite.
        clusters: K, 1..N.
        iterations: of Lloyd's algorithm, >= 1; fewer where nothing changes any more.
        seed: with `stream` it determines which points are the first centroids.
        stream: of the random numbers: another one gives another start.
        start: first centroids [K, D] instead.
        threads: of the processor; 0 = one.
        backend: "faiss", "scikit-learn", "torch" (on the points' device, one thread on a CPU), or "auto": torch for
            points on a GPU; else faiss where it is installed (``pip install sela_ext[faiss]``), else scikit-learn.

    Returns:
        Labels and centroids.

    Raises:
        OptionError: more clusters than points, or a backend that is not there.
        DataError: points that are not finite, or of another shape or type.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0], [0, 1], [9, 9], [9, 8]])
        >>> found = kmeans(points, 2, seed=1)
        >>> found.labels.tolist() in ([0, 0, 1, 1], [1, 1, 0, 0]), found.objective[-1]
        (True, 0.25)

    Source: Caron et al., "Deep clustering for unsupervised learning of visual features", ECCV 2018, section 3.3, whose
    faiss k-means starts at random points and splits clusters in place of empty ones too.
    """
    if backend == "torch":  # nothing for workers to do: what they limit is the whole process's
        with _one_torch_thread():
            return _kmeans(points, clusters, iterations, seed, stream, start, None, backend)
    with Workers(max(1, threads)) as workers:
        return _kmeans(points, clusters, iterations, seed, stream, start, workers, backend)


def _kmeans(
    points: Tensor,
    clusters: int,
    iterations: int,
    seed: int,
    stream: int,
    start: Tensor | None,
    workers: Workers | None,
    backend: str,
) -> Clustering:
    _check_points(points)
    count = len(points)
    if not 1 <= clusters <= count:
        raise OptionError(f"clusters: expected 1..{count}, the number of points, found {clusters}")
    if start is not None and tuple(start.shape) != (clusters, points.shape[1]):
        raise DataError(f"start: expected [{clusters}, {points.shape[1]}], found {list(start.shape)}")
    name, nearest = _searcher(backend, points, workers)
    if start is None:
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, 2**34 + stream], np.uint64)))
        first = np.sort(generator.choice(count, clusters, replace=False))
        centroids = points[torch.from_numpy(first).to(points.device)].clone()
    else:
        centroids = start.to(points.device, torch.float32, copy=True)
    objective, repaired = [], 0
    labels = np.full(count, -1, np.int64)
    for iteration in range(iterations + 1):
        before, labels = labels, nearest(centroids)
        repaired += _fill_empty(points, labels, centroids)
        objective.append(_mean_distance(points, labels, centroids))
        # The last look is at the final centroids: they are those that label new points as these were.
        still = np.array_equal(labels, before)
        if still or iteration == iterations:
            break
        centroids = _means(points, labels, clusters)
    gain = 0.0 if still or not objective[-2] else max(0.0, 1.0 - objective[-1] / objective[-2])
    return Clustering(labels.astype(np.int32), centroids, objective, gain, repaired, name)


def _check_points(points: Tensor) -> None:
    if points.ndim != 2 or points.dtype != torch.float32:
        raise DataError(f"points: expected float32 [N, D], found {points.dtype} {list(points.shape)}")
    for start in range(0, len(points), _CHUNK):
        if not bool(torch.isfinite(points[start : start + _CHUNK]).all()):
            raise DataError(f"points: expected finite numbers, found others in rows from {start} on")


def _searcher(
    backend: str, points: Tensor, workers: Workers | None
) -> tuple[str, Callable[[Tensor], NDArray[np.int64]]]:
    """Name and function: from centroids [K, D] to the nearest one of each point, int64 [N]."""
    if backend not in BACKENDS:
        raise OptionError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if workers is None or backend == "torch" or (backend == "auto" and points.device.type != "cpu"):
        return "torch", lambda centroids: _nearest_torch(points, centroids)
    rows = np.ascontiguousarray(points.cpu().numpy())
    faiss = _faiss() if backend in ("auto", "faiss") else None
    if faiss is None and backend == "faiss":
        raise OptionError('backend: "faiss" needs the package faiss-cpu, found none; pip install "sela_ext[faiss]"')

    def by_faiss(centroids: Tensor) -> NDArray[np.int64]:
        assert faiss is not None
        index = faiss.IndexFlatL2(centroids.shape[1])
        index.add(centroids.cpu().numpy())
        return np.concatenate(list(workers.chunks(lambda cut: index.search(rows[cut], 1)[1][:, 0], len(rows), _CHUNK)))

    def by_sklearn(centroids: Tensor) -> NDArray[np.int64]:
        means = centroids.cpu().numpy()
        return np.concatenate(
            list(workers.chunks(lambda cut: pairwise_distances_argmin(rows[cut], means), len(rows), _CHUNK))
        ).astype(np.int64)

    return ("scikit-learn", by_sklearn) if faiss is None else ("faiss", by_faiss)


def _faiss() -> Any:
    """The package, or None where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        return None


def _nearest_torch(points: Tensor, centroids: Tensor) -> NDArray[np.int64]:
    half = centroids.square().sum(1) / 2
    found = [(half - points[start : start + _CHUNK] @ centroids.T).argmin(1) for start in range(0, len(points), _CHUNK)]
    return torch.cat(found).cpu().numpy()


class Workers:
    """Threads that work on chunks of rows; see Note [Same bits for every number of threads].

    Args:
        threads: tasks at a time, >= 1; one is done by the caller itself.

    Example:
        >>> with Workers(2) as workers:
        ...     list(workers.chunks(lambda cut: (cut.start, cut.stop), 10, 4))
        [(0, 4), (4, 8), (8, 10)]
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._stack = contextlib.ExitStack()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        self._stack.enter_context(_one_torch_thread())
        # The BLAS counts threads for the whole process, OpenMP for each thread that calls it.
        self._stack.enter_context(_libraries().limit(limits=1))
        if self._threads > 1:
            limit = functools.partial(_libraries().limit, limits=1, user_api="openmp")
            self._pool = self._stack.enter_context(ThreadPoolExecutor(self._threads, initializer=limit))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def chunks(self, work: Callable[[slice], T], count: int, size: int) -> Iterator[T]:
        """Results of `work` on consecutive chunks of rows, in their order.

        Args:
            work: from rows to a result; it should leave Python's lock alone for most of the time.
            count: rows.
            size: rows of a chunk.
        """
        cuts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        if self._pool is None:
            yield from map(work, cuts)
            return
        waiting: deque[Future[T]] = deque()
        for cut in cuts:
            waiting.append(self._pool.submit(work, cut))
            if len(waiting) > 2 * self._threads:  # results that nobody has taken yet stay few
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _libraries() -> ThreadpoolController:
    """What has threads of its own in this process."""
    _faiss()  # or it could be loaded later, and would be missing
    return _controller()


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Have torch use no threads but the caller's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cluster_sums(points: Tensor, labels: NDArray[np.int64], clusters: int) -> Tensor:
    """Sum of the points of each cluster, float64 [K, D], added in the order of the points."""
    total = torch.zeros(clusters, points.shape[1], dtype=torch.float64, device=points.device)
    step = 16 * _CHUNK
    for start in range(0, len(points), step):
        part = labels[start : start + step]
        sorting = torch.from_numpy(np.argsort(part, kind="stable")).to(points.device)
        lengths = torch.from_numpy(np.bincount(part, minlength=clusters)).to(points.device)
        total += torch.segment_reduce(points[start : start + step][sorting].double(), "sum", lengths=lengths)
    return total


def _means(points: Tensor, labels: NDArray[np.int64], clusters: int) -> Tensor:
    """Mean of the points of each cluster, float32 [K, D]; clusters without points are at 0."""
    sizes = torch.from_numpy(np.bincount(labels, minlength=clusters)).to(points.device)
    return (cluster_sums(points, labels, clusters) / sizes.clamp(min=1)[:, None]).float()


def _mean_distance(points: Tensor, labels: NDArray[np.int64], centroids: Tensor) -> float:
    places = torch.from_numpy(labels).to(points.device)
    parts = [
        (points[start : start + _CHUNK] - centroids[places[start : start + _CHUNK]]).double().square().sum()
        for start in range(0, len(points), _CHUNK)
    ]
    return float(torch.stack(parts).sum()) / len(points)


def _fill_empty(points: Tensor, labels: NDArray[np.int64], centroids: Tensor) -> int:
    """Split the largest clusters until none is empty, as far as there are distinct points; all in place.

    Args:
        points: [N, D].
        labels: int64 [N].
        centroids: [K, D]; those of clusters that were split or filled become the means of their points.

    Returns:
        Clusters that were filled.
    """
    sizes = np.bincount(labels, minlength=len(centroids))
    empty = np.flatnonzero(sizes == 0)
    if not len(empty):
        return 0
    sorting = np.argsort(labels, kind="stable")
    members = dict(enumerate(np.split(sorting, np.cumsum(sizes)[:-1])))
    sizes = sizes.copy()
    filled = 0
    for target in empty.tolist():
        while True:
            largest = int(sizes.argmax())
            if sizes[largest] < 2:
                return filled  # fewer distinct points than clusters
            rows = members[largest]
            away = _far_side(points[torch.from_numpy(rows).to(points.device)])
            if away.any():
                break
            sizes[largest] = 0  # all of its points are the same: it is not looked at again
        members[largest], members[target] = rows[~away], rows[away]
        for cluster in (largest, target):
            sizes[cluster] = len(members[cluster])
            here = points[torch.from_numpy(members[cluster]).to(points.device)]
            centroids[cluster] = here.double().mean(0).float()
        labels[rows[away]] = target
        filled += 1
    return filled


def _far_side(points: Tensor) -> NDArray[np.bool_]:
    """Which points lie on the side of the one farthest from the mean, as seen from it.

    The deviations from the mean sum to 0, so that some, but never all of them, are on one side. Where all points are
    the same, none is.
    """
    deviation = points.double()
    deviation = deviation - deviation.mean(0)
    distance = deviation.square().sum(1)
    far = int(distance.argmax())
    away: NDArray[np.bool_] = ((deviation @ deviation[far] > 0) & (distance[far] > 0)).cpu().numpy()
    return away if not away.all() else np.zeros_like(away)


@dataclass(frozen=True)
class Whitening:
    """A projection to the main directions of some features, all of the same variance.

    Attributes:
        mean: float32 [D].
        matrix: float32 [D, P].
        share: part of the variance that the P directions hold, 0..1.
    """

    mean: Tensor
    matrix: Tensor
    share: float

    @staticmethod
    @_one_torch_thread()
    def fit(features: Tensor, dimensions: int, *, power: float = -0.5, threads: int = 1) -> Whitening:
        """Find the main directions; the same bits for every number of threads.

        Args:
            features: [N, D], N >= 2, of any float type.
            dimensions: P; fewer where there are fewer directions with any variance.
            power: of the variances, which the directions are multiplied by: -0.5 makes the variances 1, 0 keeps them.
            threads: of the processor.

        Raises:
            DataError: all features are the same.

        Example:
            >>> import torch
            >>> features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
            >>> whitened = Whitening.fit(features, 3)(features)
            >>> torch.cov(whitened.T, correction=0).round(decimals=3).abs()
            tensor([[1., 0., 0.],
                    [0., 1., 0.],
                    [0., 0., 1.]])

        Source: faiss's PCAMatrix with eigen_power -0.5, as DeepCluster uses it; its output is this times sqrt(N).
        """
        count, width = features.shape
        mean = torch.zeros(width, dtype=torch.float64, device=features.device)
        for start in range(0, count, _CHUNK):
            mean += features[start : start + _CHUNK].double().sum(0)
        mean = (mean / count).float()
        covariance = _scatter(features, mean, max(1, threads)) / count
        if covariance.device.type == "cpu":
            with _libraries().limit(limits=1):
                values, vectors = (torch.from_numpy(part) for part in np.linalg.eigh(covariance.numpy()))
        else:
            values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0), vectors.flip(1)
        if not float(values[0]) > 0:
            raise DataError("features: expected some variance to whiten, found the same features in all rows")
        kept = min(dimensions, int((values > _SMALLEST_VARIANCE * values[0]).sum()))
        top = vectors[:, :kept]
        largest = top.abs().argmax(0)
        top = top * top[largest, torch.arange(kept, device=top.device)].sign()  # of the two directions always the same
        matrix = top * values[:kept] ** power
        share = float(values[:kept].sum() / values.clamp(min=0).sum())
        return Whitening(mean, matrix.float(), share)

    def __call__(self, features: Tensor, *, threads: int = 1) -> Tensor:
        """Project features [N, D] to float32 [N, P]."""
        if features.device.type != "cpu":
            parts = _parts(features)
            return torch.cat([(part.float() - self.mean) @ self.matrix for part in parts])
        mean, matrix = self.mean.numpy(), self.matrix.numpy()
        with Workers(max(1, threads)) as workers:
            parts = workers.chunks(lambda cut: (features[cut].float().numpy() - mean) @ matrix, len(features), _CHUNK)
            return torch.from_numpy(np.concatenate(list(parts)))


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """Chunks of rows, which share their memory."""
    return (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))


def _scatter(features: Tensor, mean: Tensor, threads: int) -> Tensor:
    """Sum over rows of the outer products of deviations from the mean, float64 [D, D]."""
    width = features.shape[1]
    if features.device.type != "cpu":
        total = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for part in _parts(features):
            deviation = part.float() - mean
            total += (deviation.T @ deviation).double()
        return total
    centre, sums = mean.numpy(), np.zeros((width, width))

    def work(cut: slice) -> NDArray[np.float32]:
        deviation = features[cut].float().numpy() - centre
        product: NDArray[np.float32] = deviation.T @ deviation
        return product

    with Workers(threads) as workers:
        for product in workers.chunks(work, len(features), _CHUNK):
            sums += product
    return torch.from_numpy(sums)


@_one_torch_thread()
def unit_rows(points: Tensor) -> Tensor:
    """Rows of length one; rows of zeros stay. In place."""
    for part in _parts(points):
        part /= part.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return points


def match_clusters(
    reference: NDArray[np.integer[Any]], labels: NDArray[np.integer[Any]], clusters: int
) -> NDArray[np.int32]:
    """New numbers for clusters, such that as many points as possible keep the number that they had.

    Exact (the Hungarian algorithm on the overlaps) up to 2,048 clusters; above, the pairs of largest overlap go first.

    Args:
        reference: numbers so far, [N]; -1 = none.
        labels: the new clusters, [N]; -1 = none.
        clusters: K, of both.

    Returns:
        `labels` with other numbers, int32 [N].

    Example:
        >>> import numpy as np
        >>> match_clusters(np.array([0, 0, 1, 1, 2]), np.array([2, 2, 0, 0, 1]), 3).tolist()
        [0, 0, 1, 1, 2]
    """
    known = (reference >= 0) & (labels >= 0)
    pairs = labels[known].astype(np.int64) * clusters + reference[known]
    number = np.empty(clusters, np.int32)
    if clusters <= _MATCHED_EXACTLY:
        overlap = np.bincount(pairs, minlength=clusters * clusters).reshape(clusters, clusters)
        rows, columns = linear_sum_assignment(overlap, maximize=True)
        number[rows] = columns
    else:
        number[:] = -1
        found, overlaps = np.unique(pairs, return_counts=True)
        taken = np.zeros(clusters, bool)
        for pair in found[np.argsort(-overlaps, kind="stable")].tolist():
            new, old = divmod(pair, clusters)
            if number[new] < 0 and not taken[old]:
                number[new], taken[old] = old, True
        number[number < 0] = np.flatnonzero(~taken)
    return np.where(labels >= 0, number[labels], -1).astype(np.int32)
