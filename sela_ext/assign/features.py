"""Logits that are never stored: features times weights, a tile of rows at a time."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sela_ext.assign.mapped import MappedRows
from sela_ext.assign.plan import threads_of
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels.device import cache_and_multiprocessors, is_tensor
from sela_ext.kernels.sinkhorn import ROWS_TOGETHER, SAMPLE_ROWS, on_cuda

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt
    import torch

    Result = TypeVar("Result")

BLOCK = ROWS_TOGETHER  # rows of one product, those of one block of a pass
# Entries of a tile: 4 MiB in float32, which the pass reads from the cache, and work enough for a call.
TILE_ENTRIES = 1 << 20
MOST_BLOCKS = 64  # per tile
MOST_SAMPLED = 32  # times as large when only some rows are computed
# Note [Tiles on a device]
# The product of a tile is written, and read again by the pass. Where both find it in the second-level cache, 8 bytes
# per entry need not go to memory and back: 2.7 ps on an H100. Three things speak against small tiles. A product should
# fill the device: it is cut into blocks of 128 x 128 entries, of which each multiprocessor should get two. Each tile
# costs the host two launches, some 40 us, which are hidden only behind a product that takes longer: 6.5 million entries
# (half of an H100's cache) are such a tile from 256 features on, or 2,048 where products may be rounded to TF32
# (torch.set_float32_matmul_precision), which are ten times as fast. And the weights want to stay in the cache, too.
#   So: about half of the cache that the weights leave, but no less than three blocks for each multiprocessor; or, where
# products are short, a tile that makes the launches rare. Rows are 128 times the next power of 2, so that tiles of
# several heads begin at the same rows. Whether 40 us and ten times are so has not been measured yet.
DEVICE_ENTRIES = 1 << 26  # of the largest tile: 256 MiB
PRODUCT_BLOCK, BLOCKS_EACH = 128 * 128, 3
LONG, LONG_IN_TF32 = 256, 2048  # features
# Features on the host that take at most this part of the device's free memory are copied there once, for all reads.
RESIDENT_SHARE = 0.25


class FeatureLogits:
    """Logits = features @ weight.T + bias, [N, K] in float32, computed when they are read and never stored.

    Takes the place of logits in `assign`, `verify` and `Assignment.predict`. Memory: the features and O(N + K D); time:
    2 N K D operations for each read of the logits, about 110 billion per second and core, where reading stored ones
    takes a fraction. Peaked logits, as they are after some training, are solved with few reads (Newton's method).

    In torch: ``F.linear(features.float(), weight, bias)``, or with normalize ``F.linear(F.normalize(features.float()),
    weight, bias)``. The product is always that of 128 rows, on one thread each, so that a row's logits have the same
    bits for any number of threads, in any part of the rows that begins at a multiple of 128, and in every read.
    They may differ between processors and between versions of torch. On a CUDA device products have `tile_rows` rows
    instead, so that the same holds for parts that begin at multiples of those, and have as many rows or more.

    Args:
        features: [N, D] float32, float16 or bfloat16, numpy (memory-mapped, too) or torch; or an object that computes
            its rows when they are read: `shape`, `dtype`, `device`, `on_demand` = True, and torch rows by slice or
            numbers.
        weight: [K, D] of any float type; used in float32. Where it lives is where the products are computed: weights on
            a CUDA device take the features there: once where they fit well, else tile by tile.
        bias: [K], or None. It changes no label, but what the logits are.
        normalize: scale every row of features to length one, as a cosine head does (its weights must come normalised
            and divided by the temperature).

    Raises:
        DataError: features of a wrong shape or type.
        OptionError: weight or bias of a wrong shape or type.

    Example:
        >>> import numpy as np, sela_ext
        >>> rng = np.random.default_rng(0)
        >>> features = rng.standard_normal((600, 16)).astype(np.float16)
        >>> weight = rng.standard_normal((10, 16)).astype(np.float32)
        >>> a = sela_ext.assign(sela_ext.FeatureLogits(features, weight))
        >>> a.converged, a.labels.shape
        (True, (600,))

    Source: SeLa, section 3.1: the head is a linear map of the network's features.
    """

    def __init__(self, features: Any, weight: Any, bias: Any = None, *, normalize: bool = False) -> None:
        shape: tuple[int, ...] = tuple(getattr(features, "shape", ()))
        if len(shape) != 2 or shape[1] < 1:
            found = f"shape {shape}" if shape else type(features).__name__
            raise DataError(f"features: expected a numpy or torch array [N, D], found {found}")
        name = str(getattr(features.dtype, "name", features.dtype)).removeprefix("torch.")
        if name not in ("float32", "float16", "bfloat16"):
            raise DataError(f"features: expected float32, float16 or bfloat16, found {name}; convert them")
        self.weight = _parameter("weight", weight, (-1, int(shape[1])))
        cols = int(self.weight.shape[0])
        self.bias = None if bias is None else _parameter("bias", bias, (cols,)).to(self.weight.device)
        self.normalize = bool(normalize)
        self.shape = (int(shape[0]), cols)
        self.dtype = np.dtype(np.float32)
        computed = bool(getattr(features, "on_demand", False))
        self.features = self.weight if computed else features  # of its kind results are
        self._rows = features if computed else features.detach() if is_tensor(features) else _shared(features, name)
        if self._rows.device.type != "cpu" and self._rows.device != self.weight.device:
            raise OptionError(
                f"weight: expected it on {self._rows.device}, as the features, found {self.weight.device}; move it"
            )
        if self.weight.device.type not in ("cpu", "cuda"):
            raise OptionError(f"weight: expected it on cpu or cuda, found {self.weight.device}; move it")
        self._local = threading.local()
        self._resident: torch.Tensor | None = None
        self._tile_rows = self._choose_tile_rows()

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"FeatureLogits({self.shape[0]} x {self.shape[1]} from {self._rows.shape[1]} features)"

    @property
    def device(self) -> torch.device:
        """Where the products are computed."""
        return self.weight.device

    @property
    def on_cuda(self) -> bool:
        """Whether the products are computed on a CUDA device."""
        return on_cuda(self.weight)

    @property
    def dim(self) -> int:
        """D, the length of a feature vector."""
        return int(self._rows.shape[1])

    @property
    def tile_rows(self) -> int:
        """Rows of a tile, a multiple of 128."""
        return self._tile_rows

    def set_tile_rows(self, rows: int) -> None:
        """Other tiles than the chosen ones, for measurements; logits then have other bits on a CUDA device.

        Args:
            rows: a multiple of 128.

        Raises:
            OptionError: no such multiple.
        """
        if rows < BLOCK or rows % BLOCK:
            raise OptionError(f"rows: expected a multiple of {BLOCK}, found {rows}")
        self._tile_rows = rows
        self._local = threading.local()

    def _choose_tile_rows(self) -> int:
        import torch

        rows, cols = self.shape
        if not self.on_cuda:
            return BLOCK * max(1, min(MOST_BLOCKS, TILE_ENTRIES // (BLOCK * cols)))
        exact = torch.get_float32_matmul_precision() == "highest"
        wanted = device_tile_rows(cols, self.dim, *cache_and_multiprocessors(self.device), exact=exact)
        return min(wanted, BLOCK * max(1, -(-rows // BLOCK)))

    @property
    def product_rows(self) -> int:
        """Rows of each product: always the same, so that no shape changes a bit."""
        return self._tile_rows if self.on_cuda else BLOCK

    def mapped(self) -> MappedRows | None:
        """The file that the features are mapped from, where they are.

        Raises:
            DataError: it is too short for their shape.
        """
        computed = getattr(self._rows, "on_demand", False)
        return None if computed or self._rows.device.type != "cpu" else MappedRows.find(self.features, "features")

    def rows_read(self, first: int, last: int) -> torch.Tensor:
        """Features of these rows, copied to where the products are computed."""
        rows = self._source()[first:last]
        return rows.clone() if rows.device == self.device else rows.to(self.device)

    @property
    def uploaded_in_tiles(self) -> bool:
        """Whether every read takes the features from the host to a CUDA device."""
        return self.on_cuda and self._rows.device.type == "cpu" and not self._fits_there()

    def _fits_there(self) -> bool:
        """Whether a copy of the features takes little of the free memory of the device."""
        if not is_tensor(self._rows):  # they are read where they lie, for memory's sake
            return False
        return self._rows.numel() * self._rows.element_size() <= RESIDENT_SHARE * free_on(self.device)

    def _source(self) -> torch.Tensor:
        """Where the features are read: on a CUDA device a copy there, made at the first read, if it takes little room.

        Objects that compute their rows stay what they are.
        """
        import torch

        if self._resident is not None:
            return self._resident
        if not self.on_cuda or self._rows.device == self.device or not self._fits_there():
            return self._rows
        copy = torch.empty(self._rows.shape, dtype=self._rows.dtype, device=self.device)
        mapped, step = self.mapped(), 1 << 16
        for first in range(0, self.shape[0], step):
            copy[first : first + step].copy_(self._rows[first : first + step])
            if mapped is not None:
                mapped.done(first, first + step)
        self._resident = copy
        return copy

    def __getitem__(self, rows: Any) -> Any:
        """Logits of some rows, float32, of the kind of the features (torch where the weights are).

        Args:
            rows: a slice or integer array [n], or such for the rows and integers [m] for the columns.
        """
        import torch

        columns = None
        if isinstance(rows, tuple):
            rows, columns = rows
        weight, bias = self.weight, self.bias
        if columns is not None and not (isinstance(columns, slice) and columns == slice(None)):
            chosen = torch.arange(self.shape[1])[columns].to(self.device)
            weight, bias = weight[chosen].contiguous(), None if bias is None else bias[chosen]
        step, source = self.product_rows, self._source()
        with one_thread():
            if isinstance(rows, slice):
                first, last, stride = rows.indices(self.shape[0])
                if stride != 1:
                    raise OptionError(f"rows: expected a slice of step 1, found {stride}; use an array of row numbers")
                last = max(first, last)
                begin = first // step * step  # from a multiple on: the same products, whatever the slice
                out = torch.empty(-(-(last - begin) // step) * step, len(weight), device=self.device)
                for at in range(begin, last, step):
                    self._product(source[at : at + step], out[at - begin : at - begin + step], weight, bias)
                block = out[first - begin : last - begin]
            else:
                numbers = torch.arange(self.shape[0])[torch.as_tensor(rows)].to(source.device).reshape(-1)
                out = torch.empty(-(-len(numbers) // step) * step, len(weight), device=self.device)
                for at in range(0, len(numbers), step):
                    self._product(source[numbers[at : at + step]], out[at : at + step], weight, bias)
                block = out[: len(numbers)]
        return block if is_tensor(self.features) else block.cpu().numpy()

    def _product(self, rows: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Logits of up to `product_rows` rows into out [product_rows, K]."""
        import torch

        x = getattr(self._local, "x", None)
        if x is None:
            x = self._local.x = torch.zeros(self.product_rows, self.dim, device=self.device)
        # From the host as they are: 16 bits travel as 16 bits.
        x[: len(rows)].copy_(rows if rows.device == x.device else rows.to(x.device))
        if len(rows) < len(x):
            x[len(rows) :] = 0.0
        if self.normalize:
            x /= x.norm(dim=1, keepdim=True).clamp_(min=1e-12)
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)

    def tile(self, first: int, last: int, *, every: int = 1, first_row: int = 0, rows: Any = None) -> Any:
        """Logits of some rows, in memory that the next tile of this thread takes over; numpy, torch on a CUDA device.

        Args:
            first: row, a multiple of 128.
            last: row behind the last one, at most `step(every)` further.
            every: see `tiles`.
            first_row: see `tiles`.
            rows: features of these rows, where the caller has them at hand.
        """
        out = self._buffer("out", last - first)
        rows = self._source()[first:last] if rows is None else rows
        step = self.product_rows
        if every == 1:
            for at in range(0, last - first, step):
                self._product(rows[at : at + step], out[at : at + step], self.weight, self.bias)
        else:
            numbers = _sampled(first, last, every, first_row) - first
            products = self._buffer("products", step)
            for at in range(0, len(numbers), step):
                chosen = numbers[at : at + step]
                self._product(rows[chosen], products, self.weight, self.bias)
                out[chosen] = products[: len(chosen)]
        block = out[: last - first]
        return block if self.on_cuda else block.numpy()

    def _buffer(self, name: str, rows: int) -> torch.Tensor:
        """Memory of this thread for so many rows of logits, rounded up to whole products."""
        import torch

        buffer: torch.Tensor | None = getattr(self._local, name, None)
        if buffer is None or len(buffer) < rows:
            step = self.product_rows
            buffer = torch.empty(-(-rows // step) * step, self.shape[1], device=self.device)
            setattr(self._local, name, buffer)
        return buffer

    def tiles(
        self,
        task: Callable[[int, Any], Result],
        *,
        threads: int = 0,
        every: int = 1,
        first_row: int = 0,
        wanted: Callable[[int, int], bool] | None = None,
    ) -> Iterator[Result]:
        """Compute the logits tile by tile, several at once, and do something with each.

        Args:
            task: called with the first row of a tile and its logits (numpy; torch on a CUDA device), which it may
                use while it runs; in several threads at once.
            threads: 0 for all processors of this process; one on a CUDA device.
            every: compute only every so many groups of 4 rows, as a pass reads them; the logits of other rows are
                whatever they are. Tiles are larger then.
            first_row: number of the first row, for `every`.
            wanted: called with the first and last (exclusive) row of a tile; tiles for which it is false are left out.

        Yields:
            The results, in the order of the rows.
        """
        step = self.step(every)
        starts = [
            first
            for first in range(0, self.shape[0], step)
            if self.is_read(first, first + step, every, first_row)
            and (wanted is None or wanted(first, min(first + step, self.shape[0])))
        ]

        def work(first: int) -> Result:
            last = min(first + step, self.shape[0])
            return task(first, self.tile(first, last, every=every, first_row=first_row))

        workers = 1 if self.on_cuda else threads_of(threads)
        reading = self.mapped() if self._source() is self._rows else None
        yield from in_order(work, starts, workers, reading=reading, step=step)

    def step(self, every: int) -> int:
        """Rows of a tile of which only every so many groups are computed."""
        room = max(1, DEVICE_ENTRIES // (self.tile_rows * self.shape[1])) if self.on_cuda else MOST_SAMPLED
        return self.tile_rows * min(every, MOST_SAMPLED, room)

    def is_read(self, first: int, last: int, every: int, first_row: int) -> bool:
        """Whether one of these rows is read."""
        return every == 1 or len(_sampled(first, min(last, self.shape[0]), every, first_row)) > 0


def device_tile_rows(cols: int, dim: int, cache: int, multiprocessors: int, *, exact: bool) -> int:
    """Rows of a tile on a CUDA device, see Note [Tiles on a device]: 128 times a power of 2.

    Args:
        cols: K.
        dim: D.
        cache: bytes of the second-level cache.
        multiprocessors: of the device.
        exact: whether products are those of float32 numbers, not rounded to TF32.
    """
    entries = DEVICE_ENTRIES
    if dim >= (LONG if exact else LONG_IN_TF32):
        half = max(0, cache - 4 * cols * dim) // 2 // 4
        entries = min(DEVICE_ENTRIES, max(half, BLOCKS_EACH * multiprocessors * PRODUCT_BLOCK))
    blocks = max(1, entries // (BLOCK * cols))
    most = max(1, DEVICE_ENTRIES // (BLOCK * max(cols, dim)))  # the features of a tile are float32, too
    blocks = min(blocks, most)
    power = 1 << (blocks.bit_length() - 1)
    return BLOCK * (2 * power if 2 * blocks >= 3 * power and 2 * power <= most else power)


def pass_seconds(rows: int, cols: int, dim: int, *, size: int | None, copy: float, flops: float) -> float:
    """What a pass over logits [rows, cols] takes at the least on a CUDA device, in seconds; see docs/gpu.md.

    Args:
        rows: N.
        cols: K.
        dim: D, features of a row.
        size: bytes of a stored logit; None: they are computed when they are read, by tiles that stay in the cache.
        copy: bytes per second that a copy moves.
        flops: operations per second of the products.

    Example:
        >>> stored = pass_seconds(1_281_167, 3000, 512, size=2, copy=3.0e12, flops=55e12)
        >>> computed = pass_seconds(1_281_167, 3000, 512, size=None, copy=3.0e12, flops=55e12)
        >>> round(1e3 * stored, 1), round(1e3 * computed, 1)
        (2.6, 71.6)
    """
    if size is not None:
        return rows * cols * size / copy
    return max(2.0 * rows * cols * dim / flops, rows * dim * 2 / copy)


def free_on(place: torch.device) -> float:
    """Free bytes of a CUDA device; 0 for what is none."""
    import torch

    return float(torch.cuda.mem_get_info(place)[0]) if place.type == "cuda" else 0.0


def in_order(
    work: Callable[[int], Result], starts: list[int], workers: int, *, reading: MappedRows | None, step: int
) -> Iterator[Result]:
    """Do something for parts that begin at these rows, in several threads that compute products on one thread each.

    Args:
        work: called with each start.
        starts: ascending.
        workers: threads.
        reading: the map that the parts are read from, if any.
        step: rows of a part.

    Yields:
        The results, in their order; hardly more than are under way wait to be taken.
    """
    import torch

    workers = min(workers, len(starts))

    def advised(first: int) -> Result:
        if reading is None:
            return work(first)
        reading.ahead(first + workers * step, first + (workers + 1) * step)
        result = work(first)
        reading.done(first, first + step)
        return result

    if workers <= 1:
        for first in starts:
            with one_thread():  # not while the caller has its turn
                result = advised(first)
            yield result
        return
    before = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for first in starts:
                waiting.append(pool.submit(advised, first))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(before)  # what threads that are yet to come begin with


def _sampled(first: int, last: int, every: int, first_row: int) -> npt.NDArray[np.int64]:
    """The rows from first to last that a pass over a part of the rows reads."""
    numbers: npt.NDArray[np.int64] = np.arange(first, last)
    return numbers[np.flatnonzero((first_row + numbers) // SAMPLE_ROWS % every == 0)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Products on one thread of torch's: how it divides them among more is not for us to know."""
    import torch

    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parameter(name: str, value: Any, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    wanted = "[K, D] with D = " + str(shape[1]) if len(shape) == 2 else f"[{shape[0]}]"
    if not is_tensor(value):
        try:
            value = torch.from_numpy(np.array(value, dtype=np.float32))
        except (TypeError, ValueError) as error:
            raise OptionError(f"{name}: expected numbers {wanted}, found {type(value).__name__}") from error
    found = tuple(value.shape)
    if len(found) != len(shape) or found[-1] != shape[-1] or found[0] < 1:
        raise OptionError(f"{name}: expected shape {wanted}, found {found}")
    tensor: torch.Tensor = value.detach().float().contiguous()
    if not bool(torch.isfinite(tensor).all()):
        raise OptionError(f"{name}: expected finite numbers, found NaN or infinity")
    return tensor


def _shared(features: Any, name: str) -> torch.Tensor:
    """A tensor on the memory of a numpy array, whatever its flags say about writing: it is only read."""
    import torch

    if not features.dtype.isnative or min(features.strides) < 0 or any(s % features.itemsize for s in features.strides):
        features = np.ascontiguousarray(features, dtype=features.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if name == "bfloat16":
            return torch.from_numpy(features.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(features)
