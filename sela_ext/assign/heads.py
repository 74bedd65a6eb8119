"""Several heads on the same features: each feature is read once for all heads, where reading is what takes the time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sela_ext.assign.features import FeatureLogits, in_order
from sela_ext.assign.mapped import MappedRows
from sela_ext.assign.plan import SPARE, available_memory, memory_plan, threads_of
from sela_ext.assign.result import Assignment
from sela_ext.assign.solve import assign
from sela_ext.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS_TOGETHER = 8192  # features that a thread holds while the heads take their turns on them


def assign_heads(
    features: Any,
    heads: Sequence[Any],
    *,
    normalize: bool = False,
    joint: bool | None = None,
    marginals: Sequence[Any] | None = None,
    start: Sequence[Any] | None = None,
    threads: int = 0,
    **options: Any,
) -> list[Assignment]:
    """Label assignments of several heads on the same features, each with its own number of clusters.

    The same as ``[assign(FeatureLogits(features, weight, bias), ...) for weight, bias in heads]``, bit by bit. Joint,
    the solves go on side by side, and what all of them wait for is read in one go.

    Args:
        features: [N, D], see `FeatureLogits`.
        heads: (weight [K, D], bias [K]) or (weight, None) or a weight alone, for each head.
        normalize: see `FeatureLogits`.
        joint: whether to read the features once for all heads. None: where they lie in a file that the page cache
            cannot hold, or on the host and too large for the CUDA device where the products are computed, which they
            then travel to once for all heads; otherwise the products take the time, and head by head takes the least
            memory. Heads that do not fit into memory together are taken in groups. Not with group=, whose ranks go head
            by head.
        marginals: one for each head, see `assign`; None: equal shares.
        start: one for each head, see `assign`; entries may be None.
        threads: CPU threads, 0 for all.
        options: see `assign`; the same for all heads.

    Returns:
        One Assignment per head.

    Raises:
        OptionError: no head, other numbers of marginals or starts than of heads, or joint=True with group=.

    Example:
        >>> import numpy as np, sela_ext
        >>> rng = np.random.default_rng(0)
        >>> features = rng.standard_normal((300, 8)).astype(np.float32)
        >>> heads = [(rng.standard_normal((k, 8)), None) for k in (3, 5)]
        >>> [len(a.sizes) for a in sela_ext.assign_heads(features, heads)]
        [3, 5]

    Source: SeLa, section 3.3, multiple heads.
    """
    if not len(heads):
        raise OptionError("heads: expected at least one (weight, bias), found none")
    for name, given in (("marginals", marginals), ("start", start)):
        if given is not None and len(given) != len(heads):
            raise OptionError(f"{name}: expected {len(heads)}, one for each head, found {len(given)}")
    own = [
        options
        | {
            "marginals": None if marginals is None else marginals[i],
            "start": None if start is None else start[i],
            "threads": threads,
        }
        for i in range(len(heads))
    ]
    pairs = [(head[0], head[1]) if isinstance(head, tuple) else (head, None) for head in heads]
    logits = [_JointLogits(features, *pair, normalize=normalize) for pair in pairs]
    if options.get("group") is not None:  # side by side, solves would meet those of other heads on other ranks
        if joint:
            raise OptionError("joint: expected False or None with group=, found True; ranks go head by head")
        joint = False
    if joint is None and logits[0].on_cuda:
        joint = logits[0].uploaded_in_tiles
    elif joint is None:
        mapped = logits[0].mapped()
        free = available_memory()
        joint = mapped is not None and free is not None and mapped.rows * mapped.stride > free
    group = _heads_at_once(logits, options) if joint else 1
    results: list[Assignment] = []
    for first in range(0, len(heads), group):
        some = range(first, min(first + group, len(heads)))
        if len(some) == 1:
            results.append(assign(logits[first], **own[first]))
        else:
            workers = 1 if logits[0].on_cuda else threads_of(threads)
            results += _Meeting(workers).solve([logits[i] for i in some], [own[i] for i in some])
    return results


def _heads_at_once(logits: Sequence[FeatureLogits], options: dict[str, Any]) -> int:
    """Heads whose solves fit into memory side by side; on a CUDA device each takes little more than its rows."""
    if logits[0].on_cuda:
        return len(logits)
    known = {name: options[name] for name in ("method", "storage", "balance", "stop") if name in options}
    known["storage"] = "float32" if known.get("storage", "auto") == "auto" else known["storage"]
    largest = max(memory_plan(*one.shape, source="features", **known).extra for one in logits)
    free = available_memory()
    return len(logits) if free is None else max(1, min(len(logits), int(SPARE * free / largest)))


def _stream_of(logits: FeatureLogits) -> Callable[[], AbstractContextManager[Any]]:
    """What puts another thread on this one's CUDA stream, in whose order tiles are computed."""
    if logits.device.type != "cuda":
        return nullcontext
    import torch

    stream = torch.cuda.current_stream(logits.device)
    return lambda: torch.cuda.stream(stream)


@dataclass
class _Request:
    """What a solve waits for: a task on the tiles of its logits, as `FeatureLogits.tiles` describes it."""

    logits: FeatureLogits
    task: Callable[[int, Any], Any]
    every: int
    first_row: int
    wanted: Callable[[int, int], bool] | None
    ready: threading.Event = field(default_factory=threading.Event)
    results: list[Any] = field(default_factory=list)
    error: BaseException | None = None

    def work(self, first: int, last: int, rows: Any) -> list[Any]:
        """The task on all tiles of these rows."""
        results = []
        step = self.logits.step(self.every)
        for at in range(first, last, step):
            end = min(at + step, last)
            if self.logits.is_read(at, end, self.every, self.first_row) and (
                self.wanted is None or self.wanted(at, end)
            ):
                tile = self.logits.tile(
                    at, end, every=self.every, first_row=self.first_row, rows=rows[at - first : end - first]
                )
                results.append(self.task(at, tile))
        return results


class _JointLogits(FeatureLogits):
    """Logits whose tiles are computed together with those of other heads, while there is a meeting to ask for them."""

    meeting: _Meeting | None = None

    def tiles(self, task: Callable[[int, Any], Any], **options: Any) -> Iterator[Any]:
        """See `FeatureLogits.tiles`; all results are there before the first is taken."""
        if self.meeting is None:
            yield from super().tiles(task, **options)
            return
        every, first_row = options.get("every", 1), options.get("first_row", 0)
        yield from self.meeting.ask(_Request(self, task, every, first_row, options.get("wanted")))


class _Meeting:
    """Where solves meet: when all that still run wait for tiles, the features are read once for all of them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.changed = threading.Condition()
        self.running = 0
        self.requests: list[_Request] = []
        self.closed: BaseException | None = None

    def ask(self, request: _Request) -> list[Any]:
        """Wait for the tiles, in the thread of a solve."""
        with self.changed:
            if self.closed is not None:
                raise self.closed
            self.requests.append(request)
            self.changed.notify_all()
        request.ready.wait()
        if request.error is not None:
            raise request.error
        return request.results

    def solve(self, logits: Sequence[_JointLogits], options: Sequence[dict[str, Any]]) -> list[Assignment]:
        """Run the solves in threads of their own, and read for them in this one."""
        results: list[Any] = [None] * len(logits)
        errors: list[BaseException] = []
        stream = _stream_of(logits[0])

        def run(i: int) -> None:
            try:
                with stream():
                    results[i] = assign(logits[i], **options[i])
            except BaseException as error:  # it is raised again below
                errors.append(error)
            finally:
                with self.changed:
                    self.running -= 1
                    self.changed.notify_all()

        workers = [threading.Thread(target=run, args=(i,), name=f"head {i}") for i in range(len(logits))]
        self.running = len(workers)
        try:
            for one in logits:
                one.meeting = self
            for worker in workers:
                worker.start()
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: len(self.requests) >= self.running)
                    requests, self.requests = self.requests, []
                if not requests:
                    break
                self._answer(requests)
        except BaseException as error:  # Ctrl-C: the solves end at their next read
            self._close(error)
            raise
        finally:
            for worker in workers:
                worker.join()
            for one in logits:
                one.meeting = None
        if errors:
            raise errors[0]
        return results

    def _answer(self, requests: list[_Request]) -> None:
        error: BaseException | None = None
        try:
            self._read(requests)
        except Exception as raised:
            error = raised
        except BaseException:
            self.requests += requests  # for them to end, too
            raise
        for request in requests:
            request.error = error
            request.ready.set()

    def _close(self, error: BaseException) -> None:
        with self.changed:
            self.closed = error
            for request in self.requests:
                request.error = error
                request.ready.set()
            self.requests = []

    def _read(self, requests: list[_Request]) -> None:
        """All requests on all rows, each part of the features read once."""
        logits = requests[0].logits
        rows = logits.shape[0]
        # On a CUDA device a product has the rows of a tile, 128 times a power of 2: it begins where it would alone.
        step = max(r.logits.product_rows for r in requests) if logits.on_cuda else ROWS_TOGETHER

        def work(first: int) -> list[list[Any]]:
            last = min(first + step, rows)
            held = logits.rows_read(first, last)
            return [request.work(first, last, held) for request in requests]

        starts = [
            first
            for first in range(0, rows, step)
            if any(r.logits.is_read(first, first + step, r.every, r.first_row) for r in requests)
        ]
        mapped: MappedRows | None = logits.mapped()
        for found in in_order(work, starts, self.threads, reading=mapped, step=step):
            for request, results in zip(requests, found, strict=True):
                request.results += results
