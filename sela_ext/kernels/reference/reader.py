"""Twin of sela_ext.kernels.Reader: one image after the other, whole, from the kernels that it fuses."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sela_ext import _core
from sela_ext.kernels.augment import EFFECTS, PARAMETERS, Augment, augment, sample_effects, sample_parameters
from sela_ext.kernels.augment_planes import Planes, augment_planes, libjpeg_smooth
from sela_ext.kernels.jpeg import MAX_PIXELS, JpegHeader, jpeg_header, jpeg_index
from sela_ext.kernels.reader import (
    READ_NOT_REGULAR,
    READ_OK,
    READ_OTHER,
    READ_TOO_LARGE,
    READ_UNREADABLE,
    ReadBatch,
)

if TYPE_CHECKING:
    import torch

    UInt8Array = npt.NDArray[np.uint8]

SMALL_SIDE = 104
"""Images of at most so many pixels in both directions are taken exactly."""


def reduction_for(augment: Augment, params: npt.NDArray[np.void], height: int, width: int) -> int:
    """The largest of 1, 2, 4, 8 at which what is shown still has twice the output's size in both directions.

    Args:
        augment: What the parameters were drawn for.
        params: One record of PARAMETERS.
        height: Of the image, pixels.
        width: Likewise.

    Returns:
        The divisor of the resolution that the image is decoded at.
    """
    tall, wide = int(params["height"]), int(params["width"])
    rows = columns = augment.size
    if augment.crop == "center":
        tall, wide, rows, columns = height, width, tall, wide
    scale = 1
    while scale < 8 and tall >= 4 * scale * rows and wide >= 4 * scale * columns:
        scale *= 2
    return scale


class Ticket:
    """A batch that is done."""

    def __init__(self, batch: ReadBatch) -> None:
        self._batch = batch

    def done(self) -> bool:
        """True."""
        return True

    def wait(self) -> ReadBatch:
        """What became of the images."""
        return self._batch


class Reader:
    """Twin of sela_ext.kernels.Reader. threads, index and cache_bytes change nothing, there as here."""

    def __init__(
        self,
        augments: Sequence[Augment],
        *,
        threads: int = 0,
        channels: int = 3,
        exact: bool = False,
        exif: bool = False,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        max_pixels: int = MAX_PIXELS,
        index: Any = None,
        reduce: bool = True,
        cache_bytes: int = 0,
        isa: str = "",
    ) -> None:
        self.augments = tuple(augments)
        self.channels = channels
        self.dtype = dtype
        self.channels_last = channels_last
        self._exact = exact
        self._exif = exif
        self._max_pixels = max_pixels
        self._reduce = reduce
        self._isa = isa

    def submit(
        self,
        items: Sequence[Any],
        index: npt.ArrayLike,
        out: Sequence[torch.Tensor],
        *,
        seed: int,
        epoch: int,
        views: Sequence[int] = (0,),
        indexes: Sequence[Any] | None = None,
        keys: npt.ArrayLike | None = None,
    ) -> Ticket:
        """Twin of Reader.submit."""
        count = len(items)
        drawn = np.asarray(index if keys is None else keys, dtype=np.int64)
        batch = ReadBatch(
            status=np.zeros(count, np.uint8),
            error=np.zeros(count, np.int32),
            height=np.zeros(count, np.int32),
            width=np.zeros(count, np.int32),
            params=[np.zeros(count, PARAMETERS) for _ in self.augments],
            effects=[np.zeros(count, EFFECTS) if augment.draws_effects else None for augment in self.augments],
        )
        for i, item in enumerate(items):
            try:
                data = _bytes_of(item)
            except IsADirectoryError:
                batch.status[i] = READ_NOT_REGULAR
                continue
            except OSError as error:
                batch.status[i], batch.error[i] = READ_UNREADABLE, error.errno or errno.EIO
                continue
            batch.status[i] = self._read(data, i, int(drawn[i]), batch, out, seed, epoch, views)
        return Ticket(batch)

    def close(self) -> None:
        """Nothing to do."""

    def _read(
        self,
        data: Any,
        i: int,
        number: int,
        batch: ReadBatch,
        out: Sequence[torch.Tensor],
        seed: int,
        epoch: int,
        views: Sequence[int],
    ) -> int:
        header = jpeg_header(data)
        if header is None:
            return READ_OTHER
        if header.height * header.width > self._max_pixels:
            return READ_TOO_LARGE
        if self.channels == 1 and header.colour != "grey":
            return READ_OTHER
        orientation = _core.jpeg_orientation(data) if self._exif else 1
        if orientation == 0 or jpeg_index(data, isa=self._isa) is None:
            return READ_OTHER
        height, width = header.height, header.width
        if orientation >= 5:
            height, width = width, height
        batch.height[i], batch.width[i] = height, width
        small = max(height, width) <= SMALL_SIDE
        for v, (what, view) in enumerate(zip(self.augments, views, strict=True)):
            params = sample_parameters(what, height, width, [number], seed=seed, epoch=epoch, view=view)
            batch.params[v][i] = params[0]
            drawn = None
            effects = batch.effects[v]
            if effects is not None:
                drawn = sample_effects(what, [number], seed=seed, epoch=epoch, view=view)
                effects[i] = drawn[0]
            row = out[v][i : i + 1]
            scale = reduction_for(what, params[0], height, width) if self._reduce and not self._exact else 1
            step = None if small or orientation > 1 else chroma_step(header)
            if step is not None:
                planes = self._planes(data, header, step, scale)
                if planes is None:
                    return READ_OTHER
                augment_planes(
                    [planes],
                    params,
                    what,
                    effects=drawn,
                    exact=self._exact,
                    channels=self.channels,
                    out=row,
                    channels_last=self.channels_last,
                )
                continue
            status, pixels, _ = _core.jpeg_rgb(data, 0, 0, 0, 0, 1, None, False, self._max_pixels, self._isa)
            if status != "ok":
                return READ_OTHER
            turned = np.ascontiguousarray(turn(pixels, orientation)[..., : self.channels])
            augment([turned], params, what, effects=drawn, out=row, channels_last=self.channels_last)
        return READ_OK

    def _planes(self, data: Any, header: JpegHeader, step: tuple[int, int], scale: int) -> Planes | None:
        """The whole image as planes, decoded at 1/scale; None where it is out of range."""
        status, found, _ = _core.jpeg_planes(data, 0, 0, 0, 0, scale, None, False, self._max_pixels, self._isa)
        if status != "ok":
            return None
        planes = found[1]
        last = planes[-1]
        now = (last["step_y"] * scale, last["step_x"] * scale)
        # Chroma that a reduced transform has not touched is interpolated as ever.
        smooth = libjpeg_smooth(header.width, step) if now == step else (False, False)
        return Planes(
            tuple(plane["samples"] for plane in planes),
            header.height,
            header.width,
            subsampling=now,
            colour="rgb" if header.colour == "rgb" else "ycc",
            smooth=smooth,
            reduced=scale,
        )


def chroma_step(header: JpegHeader) -> tuple[int, int] | None:
    """Pixels per chroma sample, (rows, columns), of a file whose planes are augmented; None of one whose RGB is."""
    most_h, most_v = (max(factors) for factors in zip(*header.sampling, strict=True))
    steps = [(most_v // v, most_h // h) for h, v in header.sampling]
    usual = steps[0] == (1, 1) and steps[1:2] == steps[2:3] and all(s in (1, 2, 4) for step in steps for s in step)
    return steps[-1] if usual else None


def turn(pixels: UInt8Array, orientation: int) -> UInt8Array:
    """An image [H, W, C] as its EXIF orientation, 1..8, wants it shown; the same as ``PIL.ImageOps.exif_transpose``."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _bytes_of(item: Any) -> Any:
    if not isinstance(item, str):
        return item
    if not stat.S_ISREG(os.stat(item).st_mode):
        raise IsADirectoryError(item)
    with open(item, "rb") as file:
        return file.read()
