"""What the self-check of a CUDA device runs, and how near to the CPU kernels its results must be.

Fixed inputs, drawn from Philox4x32-10. The Sinkhorn pass: every storage type, every mapping of threads to columns,
aligned and unaligned rows, and rows that are to be masked or done again. The augmentation: every output type and memory
order, one and three channels, boxes that are shrunk and enlarged, drawn and given parameters; of images of any size
also every effect, uploaded images and planes. The candidate search and the margins of columns: every storage type,
aligned and unaligned rows, plain rows, equal columns and columns that crowd a few groups. And of each one case of more
work than a card does at once: what a block does after its first tile of rows, or its first images, is what it does most
of the time. JPEG files: see check_jpeg.py; Newton's method: see check_newton.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from sela_ext import _core
from sela_ext.kernels import check_anderson, check_newton
from sela_ext.kernels.augment import Augment, augment, sample_effects, sample_parameters
from sela_ext.kernels.augment_planes import Planes, augment_planes
from sela_ext.kernels.check_jpeg import RunsJpeg, jpeg_cases
from sela_ext.kernels.rounding import Candidates, candidates_on_cpu, margins_on_cpu
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

LIST_COLUMNS = (1, 33, 257, 1001, 3001)  # parts of a warp's turn, and one or several turns; a cut piece at the end

KEY = (0x5E1A_0123_4567_89AB, 7, 2)  # seed, epoch, view
PIXEL = 0.01 / 255  # how far a pixel may be off, in [0, 1]
IMAGES = 24

# More than the largest card takes at once, of the cheapest shapes: 64 rows for each of 24 warps on 190 multiprocessors;
# 16 images, whose parameters are drawn together, for each of 9 blocks on 270.
MANY_ROWS = 300_001
MANY_IMAGES = 40_009
# More than one round of launches: 270 multiprocessors take 1,390 images of 65 x 65.
MANY_LARGE_IMAGES = 1_501


class Runs(RunsJpeg, check_anderson.Runs, check_newton.Runs, Protocol):
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

    def find_candidates(
        self, logits: torch.Tensor, prices: Any, labels: npt.NDArray[np.int32], **options: Any
    ) -> Candidates:
        """The CUDA kernel on such a copy; all options of `find_candidates` that count."""

    def column_margins(
        self, logits: torch.Tensor, prices: Any, labels: npt.NDArray[np.int32], **options: Any
    ) -> npt.NDArray[np.float32]:
        """Likewise."""

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

    def augment_uploaded(
        self,
        images: list[Any],
        augment: Augment,
        params: npt.NDArray[np.void],
        effects: npt.NDArray[np.void] | None,
        exact: bool,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> torch.Tensor:
        """The CUDA kernels on copies of images of different sizes, or of `Planes`."""


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
    yield from _rounding_cases(runs)
    yield from check_newton.newton_cases(runs, uniform, MANY_ROWS)
    yield from check_anderson.anderson_cases(runs, uniform)
    yield from candidate_cases(runs)
    yield from _augment_cases(runs)
    yield from jpeg_cases(runs, uniform)
    yield from _large_cases(runs)


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


def _rounding_cases(runs: Runs) -> Iterator[Case]:
    import torch

    for cols in LIST_COLUMNS:
        rows = 37 if cols <= 257 else 11
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            for aligned in (True, False):
                logits = _placed(_list_logits(rows, cols).to(dtype), aligned)
                name, placing = str(dtype).removeprefix("torch."), "aligned" if aligned else "unaligned"
                what = f"{name} [{rows}, {cols}], {placing} rows"
                yield f"find_candidates, {what}", partial(_lists_differ, runs, logits)
                yield f"column_margins, {what}", partial(_margins_differ, runs, logits)
    few = _list_logits(1001, 3)
    for dtype in (torch.float32, torch.float16):
        what = f"{str(dtype).removeprefix('torch.')} [{MANY_ROWS}, 3]"
        many = partial(_placed_many, few.to(dtype))
        yield f"find_candidates, {what}", partial(_many_lists_differ, runs, many)


def _list_logits(rows: int, cols: int) -> torch.Tensor:
    """Float64 [rows, cols]: plain rows; equal columns; columns that crowd a group; one row without any, one impossible.

    No NaN: rows that hold it have no label, and are never searched.
    """
    import torch

    values = uniform(rows * cols, 6).reshape(rows, cols) - 0.5
    values[3::8] = np.round(values[3::8])
    values[4::8, ::64] += 5.0
    values[5] = -np.inf
    values[6, 0] = -np.inf
    return torch.from_numpy(values)


def _placed_many(few: torch.Tensor) -> torch.Tensor:
    import torch

    return _placed(few[torch.arange(MANY_ROWS) % len(few)], True)


def _list_arguments(logits: torch.Tensor) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Prices and labels; some rows have none."""
    rows, cols = logits.shape
    prices = np.round(2.0 * uniform(cols, 7) - 1.0, 1)
    labels = (uniform(rows, 8) * cols).astype(np.int32)
    labels[7::9] = -1
    return prices, labels


def _lists_differ(runs: Runs, logits: torch.Tensor) -> str | None:
    """Lists of all rows, and of some, where only good columns of rows with a loss count."""
    rows, cols = logits.shape
    prices, labels = _list_arguments(logits)
    own = prices.copy()
    own[: cols // 2] += 0.25
    some = (uniform(2 * rows, 9) * rows).astype(np.int64)
    usual: dict[str, Any] = {"scale": SCALE, "label_prices": prices, "slack": -np.inf, "floor": -np.inf, "first_row": 0}
    plans: tuple[dict[str, Any], ...] = (
        {"count": 4, "tie": 2e-5, "bonus": None, "selected": None},
        {"count": 8, "tie": 0.0, "bonus": None, "selected": None},
        {"count": 16, "tie": 2e-5, "bonus": uniform(cols, 10), "selected": some, "floor": -1.5, "first_row": 12_345},
        {"count": 4, "tie": 0.0, "bonus": None, "selected": some, "slack": 0.5, "label_prices": own},
    )
    for plan in plans:
        options = usual | plan | {"count": min(plan["count"], cols)}
        expected = candidates_on_cpu(logits, prices, labels, threads=1, **options)
        difference = list_difference(runs.find_candidates(logits, prices, labels, **options), expected)
        if difference is not None:
            return f"lists of {options['count']}: {difference}"
    return None


def _many_lists_differ(runs: Runs, many: Callable[[], torch.Tensor]) -> str | None:
    return _lists_differ(runs, many())


def list_difference(found: Candidates, expected: Candidates) -> str | None:
    """What of candidate lists is not as expected, in words; None when all is.

    All numbers must be the same, unless the CPU's loops are the generic ones, which round a fma twice: then columns and
    lengths may differ in one row of fifty.
    """
    exact = _core.build_info()["cpu_isa"] != "generic"
    for name, words in (("regret", "loss"), ("found", "length"), ("columns", "columns"), ("values", "values")):
        mine, wanted = getattr(found, name), getattr(expected, name)
        same = np.equal(mine, wanted)
        if not exact and name == "regret":
            with np.errstate(invalid="ignore"):
                same |= np.abs(mine - wanted) <= FLOAT.tie
        wrong = ~same.reshape(len(same), -1).all(axis=1)
        if wrong.sum() > (0 if exact or name == "regret" else 1 + len(wrong) // 50):
            place = int(wrong.argmax())
            return f"{words} at place {place}: expected {wanted[place].tolist()}, found {mine[place].tolist()}"
    return None


def _margins_differ(runs: Runs, logits: torch.Tensor) -> str | None:
    prices, labels = _list_arguments(logits)
    for selected in (None, np.arange(0, len(labels), 2)[::-1].copy()):
        options: dict[str, Any] = {"scale": SCALE, "selected": selected}
        expected = margins_on_cpu(logits, prices, labels, threads=1, **options)
        found = runs.column_margins(logits, prices, labels, **options)
        near = 0.0 if _core.build_info()["cpu_isa"] != "generic" else FLOAT.tie
        with np.errstate(invalid="ignore"):
            wrong = ~((found == expected) | (np.abs(found - expected) <= near))
        if wrong.any():
            m, column = (int(n) for n in np.argwhere(wrong)[0])
            return f"loss {m} of column {column}: expected {expected[m, column]:.9g}, found {found[m, column]:.9g}"
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


def _large_cases(runs: Runs) -> Iterator[Case]:
    """Images of any size. Equalize has its levels in the middle of bins here: at an edge either side is right."""
    import torch

    jitter = {"jitter_probability": 0.8, "gray_probability": 0.3}
    effects = {"blur_probability": 0.7, "noise_probability": 0.5}
    tones = {"tone_probability": 1.0, "noise_probability": 0.3}
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    plans = (
        ((70, 90, 3), Augment.sela(66, **jitter)),
        ((97, 65, 1), Augment.sela(33, **jitter)),
        ((90, 131, 3), Augment.aug_plus(65, **effects)),
        ((66, 66, 3), Augment.none(66, **tones)),
        ((130, 75, 3), Augment.deepcluster(48)),
        ((75, 130, 3), Augment.deepcluster_eval(40, **effects)),
        ((300, 280, 3), Augment.sela(224, **jitter)),
        ((3, 2500, 3), Augment.flip(9)),
    )
    for number, (shape, options) in enumerate(plans):
        count = 6
        images = (256 * uniform(count * int(np.prod(shape)), 6)).astype(np.uint8).reshape(count, *shape)
        images[1::3] //= 64
        order = np.arange(2 * count if options.size < 224 else 3)[::-1] % count
        for channels_last in (False, True):
            dtype = kinds[(number + channels_last) % 3]
            what = (
                f"augment, {options.crop} box of {shape[0]} x {shape[1]} x {shape[2]} to {options.size}, "
                f"{str(dtype).removeprefix('torch.')}, {'NHWC' if channels_last else 'NCHW'}, effects"
            )
            yield what, partial(_augment_differs, runs, images, order, options, dtype, channels_last, False)
    images = (256 * uniform(4 * 70 * 66 * 3, 7)).astype(np.uint8).reshape(4, 70, 66, 3)
    what = f"augment, random box of 70 x 66 x 3 to 65, float16, NCHW, {MANY_LARGE_IMAGES} images"
    order = np.arange(MANY_LARGE_IMAGES) % 4
    yield what, partial(_augment_differs, runs, images, order, Augment.sela(65), torch.float16, False, False)

    sides = ((97, 65), (33, 140), (5, 3), (120, 70))
    crops = [(256 * uniform(h * w * 3, 8)).astype(np.uint8).reshape(h, w, 3) for h, w in sides]
    for number, options in enumerate((Augment.sela(66, **jitter), Augment.aug_plus(31, **effects))):
        what = f"augment, uploaded images of several sizes to {options.size}"
        yield what, partial(_uploaded_differs, runs, crops, options, False, kinds[number], number == 1)
    for step in ((2, 2), (1, 2), (1, 1)):
        planes = [_planes(h, w, step) for h, w in sides]
        for exact in (False, True):
            what = f"augment_planes, {step[0]} x {step[1]} pixels per sample{', exact' if exact else ''}"
            yield what, partial(_uploaded_differs, runs, planes, Augment.sela(40, **jitter), exact, kinds[0], False)


def _planes(height: int, width: int, step: tuple[int, int]) -> Planes:
    data = []
    for c, (row, column) in enumerate(((1, 1), step, step)):
        shape = (-(-height // row), -(-width // column))
        data.append((256 * uniform(shape[0] * shape[1], 9 + c)).astype(np.uint8).reshape(shape))
    return Planes(tuple(data), height, width, subsampling=step)


def _uploaded_differs(
    runs: Runs, images: list[Any], options: Augment, exact: bool, dtype: torch.dtype, channels_last: bool
) -> str | None:
    seed, epoch, view = KEY
    planar = isinstance(images[0], Planes)
    heights, widths = np.array([(i.height, i.width) if planar else i.shape[:2] for i in images]).T
    index = np.arange(len(images))
    params = sample_parameters(options, heights, widths, index, seed=seed, epoch=epoch, view=view)
    effects = sample_effects(options, index, seed=seed, epoch=epoch, view=view) if options.draws_effects else None
    output: dict[str, Any] = {"effects": effects, "dtype": dtype, "channels_last": channels_last, "threads": 1}
    if planar:
        expected = augment_planes(images, params, options, exact=exact, **output)
    else:
        expected = augment(images, params, options, **output)
    found = runs.augment_uploaded(images, options, params, effects, exact, dtype, channels_last)
    return augment_difference(options, found, expected)


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
    effects = sample_effects(options, index, seed=seed, epoch=epoch, view=view) if options.draws_effects else None
    output: dict[str, Any] = {"effects": effects, "dtype": dtype, "channels_last": channels_last, "threads": 1}
    expected = augment(images, wanted, options, rows=index, **output)
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
