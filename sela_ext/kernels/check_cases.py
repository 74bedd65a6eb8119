"""What the self-check of a CUDA device runs, and how near to the CPU kernels its results must be.

Fixed inputs, drawn from Philox4x32-10. The Sinkhorn pass: every storage type, every mapping of threads to columns,
aligned and unaligned rows, and rows that are to be masked or done again. The augmentation: every output type and memory
order, one and three channels, boxes that are shrunk and enlarged, drawn and given parameters. And of both one case of
more work than a card does at once: what a block does after its first tile of rows, or its first images, is what it does
most of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from sela_ext.kernels.augment import Augment, augment, sample_parameters
from sela_ext.kernels.sinkhorn import pass_on_cpu
from sela_ext.kernels.sinkhorn_sums import SinkhornSums

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import torch

    Case: TypeAlias = "tuple[str, Callable[[], str | None]]"

# On either side of where the mapping changes: one column, part of a warp, a whole one, one block per row, a wide block,
# and rows that are split over blocks.
COLUMNS = (1, 31, 256, 257, 1001, 1025, 3001, 8191, 8193)
FLOAT64_COLUMNS = (31, 1001, 8193)  # one mapping for all of them
SCALE = 4.0
SPANS = (0.1, 2.0, 16.0)  # logits of row i lie in a range this wide: from nearly even rows to one live entry
ALIGNMENT = 16  # elements

KEY = (0x5E1A_0123_4567_89AB, 7, 2)  # seed, epoch, view
PIXEL = 0.01 / 255  # how far a pixel may be off, in [0, 1]
IMAGES = 24

# More than the largest card takes at once, of the cheapest shapes: 64 rows for each of 24 warps on 190 multiprocessors;
# 16 images, whose parameters are drawn together, for each of 9 blocks on 270.
MANY_ROWS = 300_001
MANY_IMAGES = 40_009


class Runs(Protocol):
    """What the cases need of a device: host arrays in, host arrays out."""

    def sinkhorn_pass(
        self,
        logits: torch.Tensor,
        potential: Any,
        *,
        scale: float,
        row_weights: Any,
        reference: Any,
        want_labels: bool,
    ) -> SinkhornSums:
        """The CUDA kernels on a copy of the logits that has the same strides and offset."""

    def candidates(
        self,
        logits: torch.Tensor,
        potential: Any,
        *,
        kind: str,
        scale: float,
        row_weights: Any,
        reference: Any,
        every: int,
        keep: float,
    ) -> SinkhornSums:
        """The same with candidates; with a kind, of a copy that the CUDA kernel stores in 16 bits first."""

    def store_logits(
        self, logits: torch.Tensor, kind: str
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32], int]:
        """Values, maxima and saturated entries as the CUDA kernel stores logits with lambda SCALE."""

    def sample_parameters(
        self, augment: Augment, height: int, width: int, index: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.void]:
        """What the CUDA kernel draws with the key KEY."""

    def augment(
        self,
        images: npt.NDArray[np.uint8],
        index: npt.NDArray[np.int64],
        augment: Augment,
        params: npt.NDArray[np.void] | None,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> tuple[torch.Tensor, npt.NDArray[np.void]]:
        """The CUDA kernel with the key KEY, or given parameters, on a copy of the images: output, and what it drew."""


@dataclass(frozen=True)
class Tolerance:
    """How far a device may be from the CPU.

    Attributes:
        columns: sum over columns of the differences, per unit of weight.
        lse: of a row's log-sum-exp, and of the mean of all, nats.
        relative: the same, as a part of their size.
        tie: two labels are equally good when their scores differ by less, nats.
    """

    columns: float
    lse: float
    relative: float
    tie: float


# The hardware's 2^x has a relative error of about 2^-22, float32 scores of this size have 2^-19: five times as much.
FLOAT = Tolerance(columns=1e-5, lse=2e-5, relative=1e-6, tie=1e-4)
DOUBLE = Tolerance(columns=1e-10, lse=1e-10, relative=1e-12, tie=1e-9)


def cases(runs: Runs) -> Iterator[Case]:
    """Every case: what it is, and a call that gives None, or what was expected and what was found."""
    from sela_ext.kernels.check_candidates import candidate_cases  # it uses what is here

    yield from _sinkhorn_cases(runs)
    yield from candidate_cases(runs)
    yield from _augment_cases(runs)


def uniform(count: int, stream: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), the same in every process: Philox4x32-10 keyed by the stream."""
    from sela_ext.kernels.reference.augment import philox4x32

    counter = np.zeros((-(-count // 4), 4), np.uint64)
    counter[:, 0] = np.arange(len(counter))
    words = philox4x32(counter, [stream, 0]).reshape(-1)[:count]
    return (words >> np.uint64(8)).astype(np.float64) * 2.0**-24


def _sinkhorn_cases(runs: Runs) -> Iterator[Case]:
    import torch

    for cols in COLUMNS:
        rows = 131 if cols <= 256 else 67  # more than two tiles of rows, and more than one; a tail of three
        plain = _plain_logits(rows, cols)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            if dtype == torch.float64 and cols not in FLOAT64_COLUMNS:
                continue
            for aligned in (True, False):
                logits = _placed(plain.to(dtype), aligned)
                for labels in (True, False):
                    what = (
                        f"sinkhorn_pass, {str(dtype).removeprefix('torch.')} [{rows}, {cols}], "
                        f"{'aligned' if aligned else 'unaligned'} rows, {'with' if labels else 'without'} labels"
                    )
                    yield what, partial(_sinkhorn_differs, runs, logits, labels)
    few = _plain_logits(1001, 3)
    for dtype in (torch.float32, torch.float16):
        what = f"sinkhorn_pass, {str(dtype).removeprefix('torch.')} [{MANY_ROWS}, 3], aligned rows, with labels"
        yield what, partial(_many_rows_differ, runs, few.to(dtype))


def _plain_logits(rows: int, cols: int) -> torch.Tensor:
    """Float64 [rows, cols]: rows of several spans; three of them to be masked, one with an impossible column."""
    import torch

    values = uniform(rows * cols, 1).reshape(rows, cols) - 0.5
    values *= np.resize(SPANS, rows)[:, None]
    values[3, cols // 2] = np.nan
    values[8, cols - 1] = np.inf
    values[13] = -np.inf
    values[5, 0] = -np.inf
    return torch.from_numpy(values)


def _placed(values: torch.Tensor, aligned: bool) -> torch.Tensor:
    """The same values in rows that start at multiples of 16 elements, or anywhere but there."""
    rows, cols = values.shape
    offset = 0 if aligned else 1
    stride = -(-cols // ALIGNMENT) * ALIGNMENT if aligned else cols | 1
    room = values.new_full((offset + rows * stride,), float("nan"))  # what lies between the rows must not matter
    view = room.as_strided((rows, cols), (stride, 1), offset)
    view.copy_(values)
    return view


def _sinkhorn_differs(runs: Runs, logits: torch.Tensor, labels: bool) -> str | None:
    """Two passes: without weights and reference, and with both, where some references are far off."""
    rows, cols = logits.shape
    potential = 2.0 * uniform(cols, 2) - 1.0
    weights = (2.0 * uniform(rows, 3)).astype(np.float32)
    weights[::7] = 0.0
    before = None
    for row_weights in (None, weights):
        options: dict[str, Any] = {"scale": SCALE, "row_weights": row_weights, "want_labels": labels}
        expected = pass_on_cpu(logits, potential, threads=1, **options)
        found = runs.sinkhorn_pass(logits, potential, reference=before, **options)
        difference = sinkhorn_difference(logits, potential, found, expected)
        if difference is not None:
            return ("second pass, with weights and reference: " if before is not None else "") + difference
        before = expected.lse.clone()
        before[2] += 60.0
        before[4] = float("nan")
    return None


def _many_rows_differ(runs: Runs, few: torch.Tensor) -> str | None:
    import torch

    return _sinkhorn_differs(runs, _placed(few[torch.arange(MANY_ROWS) % len(few)], True), True)


def sinkhorn_difference(
    logits: torch.Tensor, potential: npt.NDArray[np.float64], found: SinkhornSums, expected: SinkhornSums
) -> str | None:
    """What of a pass is not as expected, in words; None when all is."""
    import torch

    tolerance = DOUBLE if logits.dtype == torch.float64 else FLOAT
    if found.masked != expected.masked:
        return f"masked rows: expected {expected.masked}, found {found.masked}"
    if not abs(found.weight - expected.weight) <= 1e-9 * expected.weight:
        return f"weight: expected {expected.weight:.9g}, found {found.weight:.9g}"

    nearly = tolerance.lse + tolerance.relative * expected.lse.double().abs()
    distance = (found.lse.double() - expected.lse.double()).abs()
    wrong = (found.lse.isnan() != expected.lse.isnan()) | (distance > nearly)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        return f"log-sum-exp of row {row}: expected {float(expected.lse[row]):.9g}, found {float(found.lse[row]):.9g}"
    allowed = tolerance.lse * expected.weight + tolerance.relative * abs(expected.objective)
    if not abs(found.objective - expected.objective) <= allowed:
        return f"objective: expected {expected.objective:.9g}, found {found.objective:.9g}"

    distance = (found.column_sums.double() - expected.column_sums.double()).abs()
    if not float(distance.sum()) <= tolerance.columns * expected.weight:
        column = int(distance.nan_to_num(nan=float("inf")).argmax())
        return (
            f"column sum {column}: expected {float(expected.column_sums[column]):.9g}, "
            f"found {float(found.column_sums[column]):.9g}"
        )
    if expected.labels is None or found.labels is None:
        return None if found.labels is expected.labels else "labels: expected some, found none, or the reverse"
    differ = (found.labels != expected.labels).nonzero()[:, 0].tolist()
    for row in differ:
        mine, theirs = int(found.labels[row]), int(expected.labels[row])
        score = SCALE * logits[row].double() + torch.from_numpy(potential)
        in_range = 0 <= mine < len(score) and theirs >= 0
        if not in_range or not float(score[theirs] - score[mine]) <= tolerance.tie:
            return f"label of row {row}: expected {theirs}, found {mine}"
    return None


def _augment_cases(runs: Runs) -> Iterator[Case]:
    import torch

    jitter = {"jitter_probability": 0.8, "gray_probability": 0.3}
    plans = (
        ((32, 32, 3), Augment.cifar(32, **jitter)),
        ((30, 32, 3), Augment.sela(32, **jitter)),
        ((40, 27, 3), Augment.sela(24, **jitter)),
        ((28, 28, 1), Augment.sela(28, **jitter)),
        ((64, 64, 3), Augment.cifar(64, **jitter)),
        ((33, 31, 3), Augment.eval(17)),
        ((5, 64, 3), Augment.flip(33)),
    )
    for shape, options in plans:
        images = (256 * uniform(IMAGES * int(np.prod(shape)), 4)).astype(np.uint8).reshape(IMAGES, *shape)
        images[1::4] //= 64  # dark, and of few colours
        images[2::4] = images[2::4, :1, :1]  # one colour
        box = f"{options.crop} box of {shape[0]} x {shape[1]} x {shape[2]} to {options.size}"
        yield f"sample_parameters, {box}", partial(_sample_differs, runs, options, shape[0], shape[1])
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for channels_last in (False, True):
                for given in (False, True):
                    what = (
                        f"augment, {box}, {str(dtype).removeprefix('torch.')}, {'NHWC' if channels_last else 'NCHW'}, "
                        f"{'given' if given else 'drawn'} parameters"
                    )
                    order = np.arange(2 * IMAGES)[::-1] % IMAGES  # every image twice, backwards
                    yield what, partial(_augment_differs, runs, images, order, options, dtype, channels_last, given)
    images = (256 * uniform(IMAGES * 48, 5)).astype(np.uint8).reshape(IMAGES, 4, 4, 3)
    what = f"augment, random box of 4 x 4 x 3 to 4, float16, NCHW, drawn parameters, {MANY_IMAGES} images"
    order = np.arange(MANY_IMAGES) * 5 % IMAGES
    yield what, partial(_augment_differs, runs, images, order, Augment.cifar(4, **jitter), torch.float16, False, False)


def _sample_differs(runs: Runs, options: Augment, height: int, width: int) -> str | None:
    index = np.concatenate([np.arange(61), [2**32 - 1, 2**32, 2**40 - 1]])
    seed, epoch, view = KEY
    drawn = sample_parameters(options, height, width, index, seed=seed, epoch=epoch, view=view)
    return parameter_difference(runs.sample_parameters(options, height, width, index), drawn)


def _augment_differs(
    runs: Runs,
    images: npt.NDArray[np.uint8],
    index: npt.NDArray[np.int64],
    options: Augment,
    dtype: torch.dtype,
    channels_last: bool,
    given: bool,
) -> str | None:
    seed, epoch, view = KEY
    height, width = images.shape[1:3]
    drawn = sample_parameters(options, height, width, index, seed=seed, epoch=epoch, view=view)
    params = drawn[::-1].copy() if given else None  # of other images of the same size
    wanted = drawn if params is None else params
    expected = augment(images, wanted, options, rows=index, dtype=dtype, channels_last=channels_last, threads=1)
    found, records = runs.augment(images, index, options, params, dtype, channels_last)
    return (None if given else parameter_difference(records, drawn)) or augment_difference(options, found, expected)


def parameter_difference(found: npt.NDArray[np.void], expected: npt.NDArray[np.void]) -> str | None:
    """The first parameter whose bits differ, in words; None when none does."""
    for name in expected.dtype.names or ():
        wrong = (found[name] != expected[name]).reshape(len(expected), -1).any(axis=1)
        if wrong.any():
            i = int(wrong.argmax())
            return f"parameter {name} of image {i}: expected {expected[name][i]}, found {found[name][i]}"
    return None


def augment_difference(options: Augment, found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """What of a batch is not as expected, in words; None when all is."""
    import torch

    rounding = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[expected.dtype]  # one unit
    wanted, got = expected.double(), found.double()
    allowed = PIXEL / min(options.std) + rounding * wanted.abs()
    wrong_pixels = ~((got - wanted).abs() <= allowed)
    if bool(wrong_pixels.any()):
        place = tuple(int(n) for n in wrong_pixels.nonzero()[0])
        return f"pixel {list(place)} of the output: expected {float(wanted[place]):.6g}, found {float(got[place]):.6g}"
    return None
