"""Twins of sela_ext.kernels.augment_planes: planes become an image of full size first, then torch's own operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sela_ext.kernels.augment import Augment, check_effects, check_output, check_sampling, output_shape
from sela_ext.kernels.augment_planes import Planes, check_params, check_planes, libjpeg_smooth, step_of
from sela_ext.kernels.reference.augment import finish, resample

if TYPE_CHECKING:
    import torch

Longs = npt.NDArray[np.int64]


def needed_boxes(
    params: npt.NDArray[np.void],
    augment: Augment,
    heights: npt.ArrayLike,
    widths: npt.ArrayLike,
    *,
    subsampling: str | tuple[int, int] = "4:2:0",
) -> npt.NDArray[np.int32]:
    """Twin of sela_ext.kernels.needed_boxes."""
    step = step_of(subsampling)
    records = check_params(params, len(params))
    boxes = np.empty((len(records), 2, 2), np.int32)
    tall, wide, _ = check_sampling(augment, heights, widths, np.zeros(len(records), np.int64))
    sizes = zip(tall.tolist(), wide.tolist(), strict=True)
    for i, (record, size) in enumerate(zip(records, sizes, strict=True)):
        smooth = libjpeg_smooth(size[1], step)
        for axis, names in enumerate((("top", "height"), ("left", "width"))):
            first, length = (int(record[name]) for name in names)
            last = first + length
            if augment.crop == "center":  # (first, length): the window's place in the resampled image, and its length
                scale = size[axis] / length
                reach = max(scale, 1.0)
                first, last = (
                    max(0, int((first + 0.5) * scale - reach + 0.5)),
                    min(size[axis], int((first + augment.size - 0.5) * scale + reach + 0.5)),
                )
            s = step[axis]
            low, high = first // s - smooth[axis], (last - 1) // s + 1 + smooth[axis]
            boxes[i, :, axis] = min(first, max(0, low) * s), min(max(last, high * s), size[axis])
    return boxes.reshape(-1, 4)


def _along(plane: Longs, axis: int, step: int, smooth: bool) -> tuple[Longs, Longs]:
    """Samples of pixels along one axis: (the one that covers a pixel, its neighbour on the pixel's side)."""
    pixels = np.arange(plane.shape[axis] * step)
    near = pixels // step
    if not smooth:
        return np.take(plane, near, axis), np.take(plane, near, axis)
    far = np.clip(np.where(pixels % 2 == 0, near - 1, near + 1), 0, plane.shape[axis] - 1)
    return np.take(plane, near, axis), np.take(plane, far, axis)


def _upsample(plane: npt.NDArray[np.uint8], step: tuple[int, int], smooth: tuple[bool, bool], exact: bool) -> Longs:
    """A component at full resolution, times 16: rounded as libjpeg does when exact."""
    near, far = _along(plane.astype(np.int64), 0, step[0], smooth[0])
    rows = 3 * near + far if smooth[0] else 4 * near
    near, far = _along(rows, 1, step[1], smooth[1])
    sixteenths = 3 * near + far if smooth[1] else 4 * near
    if not exact:
        return sixteenths
    row, column = np.ogrid[: sixteenths.shape[0], : sixteenths.shape[1]]
    if smooth == (True, True):
        bias = np.where(column % 2 == 0, 8, 7)
    elif smooth[1]:
        bias = np.where(column % 2 == 0, 4, 8)
    else:
        bias = np.where(row % 2 == 0, 4, 8) if smooth[0] else np.zeros((1, 1), np.int64)
    result: Longs = (sixteenths + bias) // 16 * 16
    return result


def _whole(planes: Planes, exact: bool) -> torch.Tensor:
    """[1 or 3, H, W] in [0, 1], not clamped unless exact; pixels outside what the planes cover are arbitrary."""
    import torch

    full: list[Longs] = []
    for (row, column), data in zip(planes.steps, planes.data, strict=True):
        canvas = np.zeros((-(-planes.height // row), -(-planes.width // column)), np.uint8)
        top, left = planes.top // row, planes.left // column
        canvas[top : top + data.shape[0], left : left + data.shape[1]] = data
        smooth = (False, False)
        if full:
            smooth = libjpeg_smooth(planes.width, planes.step) if planes.smooth is None else planes.smooth
        full.append(_upsample(canvas, (row, column), smooth, exact)[: planes.height, : planes.width])
    if len(full) == 1 or planes.colour == "rgb":
        return torch.from_numpy(np.stack(full)).float() / (16 * 255)
    if exact:
        y, b, r = full[0] // 16, full[1] // 16 - 128, full[2] // 16 - 128
        half = 1 << 15  # libjpeg's fixed point: sixteen bits behind the point
        red = y + ((91881 * r + half) >> 16)
        green = y + ((-22554 * b - 46802 * r + half) >> 16)
        blue = y + ((116130 * b + half) >> 16)
        return torch.from_numpy(np.stack([red, green, blue]).clip(0, 255)).float() / 255
    luma, more_blue, more_red = (torch.from_numpy(p).float() / (16 * 255) for p in full)
    more_blue, more_red = more_blue - 128 / 255, more_red - 128 / 255
    return torch.stack(
        [luma + 1.402 * more_red, luma - 0.34414 * more_blue - 0.71414 * more_red, luma + 1.772 * more_blue]
    )


def augment_planes(
    source: Sequence[Planes],
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
    """Twin of sela_ext.kernels.augment_planes: the whole image first, one at a time. threads is not used."""
    check_planes(source, channels)
    records = check_params(params, len(source))
    drawn = check_effects(effects, augment, len(source))
    shape = output_shape(augment, len(source), channels, out.dtype if dtype is None and out is not None else dtype)
    result = check_output(out, shape, dtype, channels_last)
    for i, (planes, record) in enumerate(zip(source, records, strict=True)):
        image = resample(_whole(planes, exact), record, augment).clamp(0, 1).expand(channels, -1, -1)
        result[i] = finish(image, record, None if drawn is None else drawn[i], augment, result.dtype)
    return result
