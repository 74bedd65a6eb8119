"""The fused pass on the planes of JPEG files: luma and chroma at the resolution that they are stored in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from sela_ext import _core
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels.augment import (
    PARAMETERS,
    Augment,
    augment_options,
    check_effects,
    check_output,
    check_sampling,
    effect_options,
    output_shape,
)

if TYPE_CHECKING:
    import torch

    from sela_ext.kernels.augment_device import DeviceImages

SUBSAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:4:0": (2, 1), "4:2:0": (2, 2), "4:1:1": (1, 4)}
"""Pixels per chroma sample, (rows, columns)."""


@dataclasses.dataclass(frozen=True)
class Planes:
    """An image, or a part of it, as a JPEG file stores it.

    Attributes:
        data: Y alone (gray), or Y, Cb, Cr (or R, G, B): uint8 [h, w] each, the samples from (top, left) on.
        height: of the whole image, pixels.
        width: likewise.
        top: first row of pixels that `data` covers, a multiple of the pixels per sample.
        left: first column, likewise.
        subsampling: chroma's, "4:4:4", "4:2:2", "4:4:0", "4:2:0" or "4:1:1", or (rows, columns) per sample, each 1, 2
            or 4 (in reduced images up to 32, a power of two).
        colour: "ycc" or "rgb": what three planes are.
        smooth: whether chroma is interpolated between (rows, columns), or repeated; None: where libjpeg does.
        reduced: pixels per luma sample in both directions, 1, 2, 4 or 8: more than 1 where the image was decoded with a
            reduced transform. Samples stand for all of their pixels.

    Raises:
        DataError: planes that do not fit together.
        OptionError: an unknown subsampling or colour.

    Example:
        >>> y, c = np.zeros((10, 15), np.uint8), np.zeros((5, 8), np.uint8)
        >>> Planes((y, c, c), 10, 15, subsampling="4:2:0").steps
        ((1, 1), (2, 2), (2, 2))
    """

    data: tuple[npt.NDArray[np.uint8], ...]
    height: int
    width: int
    top: int = 0
    left: int = 0
    subsampling: str | tuple[int, int] = "4:4:4"
    colour: Literal["ycc", "rgb"] = "ycc"
    smooth: tuple[bool, bool] | None = None
    reduced: int = 1

    def __post_init__(self) -> None:
        step = step_of(self.subsampling)
        if not isinstance(self.subsampling, str):
            object.__setattr__(self, "subsampling", step)
        if self.colour not in ("ycc", "rgb"):
            raise OptionError(f'colour: expected "ycc" or "rgb", found {self.colour!r}')
        if self.reduced not in (1, 2, 4, 8):
            raise OptionError(f"reduced: expected 1, 2, 4 or 8 pixels per sample, found {self.reduced!r}")
        object.__setattr__(self, "data", tuple(self.data))
        if len(self.data) not in (1, 3) or any(p.dtype != np.uint8 or p.ndim != 2 for p in self.data):
            found = [f"{p.dtype} {p.shape}" for p in self.data]
            raise DataError(f"planes: expected 1 or 3 arrays uint8 [h, w], found {found}")
        if not (1 <= self.height < 1 << 24 and 1 <= self.width < 1 << 24):
            raise DataError(f"planes: expected sizes in [1, 2^24) pixels, found {self.height} x {self.width}")
        for (row, column), plane in zip(self.steps, self.data, strict=True):
            if self.top < 0 or self.left < 0 or self.top % row or self.left % column:
                raise DataError(
                    f"planes: expected (top, left) >= 0 in multiples of ({row}, {column}), "
                    f"found ({self.top}, {self.left})"
                )
            room = (-(-self.height // row) - self.top // row, -(-self.width // column) - self.left // column)
            if min(plane.shape) < 1 or plane.shape[0] > room[0] or plane.shape[1] > room[1]:
                raise DataError(f"planes: expected at most {room[0]} x {room[1]} samples, found {plane.shape}")

    @property
    def step(self) -> tuple[int, int]:
        """Pixels per chroma sample, (rows, columns)."""
        return SUBSAMPLINGS[self.subsampling] if isinstance(self.subsampling, str) else self.subsampling

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """Pixels per sample of every plane, (rows, columns)."""
        return ((self.reduced, self.reduced), self.step, self.step)[: len(self.data)]


def step_of(subsampling: str | Sequence[int]) -> tuple[int, int]:
    """Pixels per chroma sample, (rows, columns).

    Raises:
        OptionError: an unknown subsampling.
    """
    step = SUBSAMPLINGS.get(subsampling) if isinstance(subsampling, str) else tuple(subsampling)
    if step is None or len(step) != 2 or any(s not in (1, 2, 4, 8, 16, 32) for s in step):
        raise OptionError(
            f"subsampling: expected one of {', '.join(SUBSAMPLINGS)} or (rows, columns) of 1, 2, 4, 8, 16 or 32, "
            f"found {subsampling!r}"
        )
    return int(step[0]), int(step[1])


def libjpeg_smooth(width: int, step: tuple[int, int]) -> tuple[bool, bool]:
    """Whether libjpeg interpolates chroma between (rows, columns), which it does not in narrow planes."""
    wide = -(-width // step[1]) > 2
    if step == (1, 2):
        return False, wide
    if step == (2, 2):
        return wide, wide
    return step == (2, 1), False


def needed_boxes(
    params: npt.NDArray[np.void],
    augment: Augment,
    heights: npt.ArrayLike,
    widths: npt.ArrayLike,
    *,
    subsampling: str | tuple[int, int] = "4:2:0",
) -> npt.NDArray[np.int32]:
    """What a decoder has to deliver so that `augment_planes` can make its output.

    Args:
        params: [B] records of sample_parameters.
        augment: what they were drawn for.
        heights: [B] image heights, pixels, or one number for all.
        widths: [B] image widths, likewise.
        subsampling: of chroma, as in `Planes`.

    Returns:
        int32 [B, 4]: top, left, bottom, right of the pixels whose samples are needed, within the image; chroma's
        neighbours, which its interpolation reads, are included.

    Raises:
        DataError: params that do not fit the sizes.
        OptionError: an unknown subsampling.

    Example:
        >>> from sela_ext.kernels import sample_parameters
        >>> params = sample_parameters(Augment.none(32), 40, 50, [0], seed=0, epoch=0)
        >>> needed_boxes(params, Augment.none(32), 40, 50).tolist()
        [[0, 0, 40, 50]]
    """
    step = step_of(subsampling)
    records = check_params(params, len(params))
    tall, wide, _ = check_sampling(augment, heights, widths, np.zeros(len(records), np.int64))
    try:
        return _core.needed_boxes(augment_options(augment, 3), records, tall, wide, step, None)
    except ValueError as error:
        raise DataError(str(error)) from error


def check_params(params: Any, count: int) -> npt.NDArray[np.void]:
    """`params` in one piece of memory.

    Raises:
        DataError: not `count` records of PARAMETERS.
    """
    if getattr(params, "dtype", None) != PARAMETERS or params.shape != (count,):
        found = f"{getattr(params, 'dtype', type(params).__name__)} {getattr(params, 'shape', '')}"
        raise DataError(f"params: expected {count} records as sample_parameters returns them, found {found}")
    return np.ascontiguousarray(params)


def check_planes(source: Sequence[Planes], channels: int) -> None:
    """Refuse what is not a list of `Planes`, or does not give `channels` channels.

    Raises:
        DataError: something else, or three planes for one channel.
        OptionError: channels other than 1 and 3.
    """
    if channels not in (1, 3):
        raise OptionError(f"channels: expected 1 or 3, found {channels}")
    for planes in source:
        if not isinstance(planes, Planes):
            raise DataError(f"source: expected a list of Planes, found {type(planes).__name__}")
        if channels == 1 and len(planes.data) != 1:
            raise DataError("channels: expected 3 for images of 3 planes, found 1")


def planar_tuple(planes: Planes) -> tuple[Any, ...]:
    """An image as the compiled functions take it."""
    return (
        [p if p.strides[1] == 1 and p.strides[0] >= p.shape[1] else np.ascontiguousarray(p) for p in planes.data],
        planes.top,
        planes.left,
        planes.height,
        planes.width,
        planes.step,
        planes.smooth,
        planes.colour == "rgb",
        planes.reduced,
    )


def augment_planes(
    source: Sequence[Planes] | DeviceImages,
    params: npt.NDArray[np.void],
    augment: Augment,
    *,
    effects: npt.NDArray[np.void] | None = None,
    exact: bool = False,
    channels: int = 3,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    threads: int = 0,
) -> torch.Tensor:
    """`sela_ext.kernels.augment` for images given as planes.

    By default every plane is resampled from its own resolution, libjpeg's interpolation of chroma included, and colours
    are converted at the size of the output: about 0.2 of 255 from `exact` in the mean, more at single saturated pixels.

    Args:
        source: B images, which hold at least what `needed_boxes` says; or what `upload_planes` has put on a device,
            where the work is then done.
        params: [B] records of sample_parameters (or edited ones); honoured exactly.
        augment: as for `sela_ext.kernels.augment`.
        effects: likewise.
        exact: the output is that of the pixels which libjpeg makes of these planes, upsampled, rounded and clamped.
        channels: of the output, 1 or 3; gray images are shown in three equal channels.
        out: [B, C, size, size] tensor to write into; default a new one.
        dtype: as for `sela_ext.kernels.augment`.
        channels_last: NHWC memory (the shape stays NCHW).
        threads: CPU threads, 0 = all processors.

    Returns:
        [B, C, size, size] tensor: out, where given. C is 2 with augment.sobel.

    Raises:
        DataError: planes, params, effects or out that do not fit together, planes that lack samples.
        OptionError: an unknown dtype or number of channels.
        ResourceError: a launch on a CUDA device that failed.

    Example:
        >>> from sela_ext.kernels import augment_planes, sample_parameters
        >>> y, c = np.zeros((10, 15), np.uint8), np.zeros((5, 8), np.uint8)
        >>> drawn = sample_parameters(Augment.sela(8), 10, 15, [0], seed=0, epoch=0)
        >>> augment_planes([Planes((y, c, c), 10, 15, subsampling="4:2:0")], drawn, Augment.sela(8)).shape
        torch.Size([1, 3, 8, 8])
    """
    from sela_ext.kernels.augment_device import DeviceImages, augment_uploaded

    if isinstance(source, DeviceImages):
        if not source.planar and len(source):
            raise DataError("source: expected planes, as upload_planes puts them there, found images of upload_images")
        if channels != 3:
            raise OptionError(f"channels: expected 3 for planes on a device, found {channels}")
        return augment_uploaded(
            source,
            params,
            augment,
            effects=effects,
            exact=exact,
            out=out,
            dtype=dtype,
            channels_last=channels_last,
            threads=threads,
        )
    check_planes(source, channels)
    records = check_params(params, len(source))
    drawn = check_effects(effects, augment, len(source))
    shape = output_shape(augment, len(source), channels, out.dtype if dtype is None and out is not None else dtype)
    result = check_output(out, shape, dtype, channels_last)
    images = [planar_tuple(planes) for planes in source]
    try:
        _core.augment_planes(
            augment_options(augment, channels),
            effect_options(augment),
            images,
            exact,
            channels,
            records,
            drawn,
            result.data_ptr(),
            str(result.dtype).removeprefix("torch."),
            channels_last,
            threads,
        )
    except ValueError as error:
        raise DataError(str(error)) from error
    return result
