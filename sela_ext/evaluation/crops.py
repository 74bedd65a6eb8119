"""Ten views of every image for testing: the four corners and the middle, and each mirrored."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sela_ext import kernels
from sela_ext.data import Augment, Source
from sela_ext.data.prefetch import prefetch
from sela_ext.errors import DataError

CROPS = 10


def ten_crops(
    source: Source,
    augment: Augment,
    *,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    threads: int = 1,
    skip_bad: bool = False,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Ten crops of each image, in order: as torchvision's Resize and TenCrop.

    The short side is resampled to `augment.resize_side`; the windows are top left, top right, bottom left, bottom right
    and centre of the whole resampled image, and then the same of the mirrored image.

    Args:
        source: N images.
        augment: size, resize and normalisation count; nothing random is drawn.
        batch_size: images per batch.
        dtype: of the images.
        device: where they are put; None: the CPU.
        threads: for reading and resampling.
        skip_bad: leave images out that cannot be read.

    Yields:
        images [B * 10, C, size, size], the ten of an image one after the other, and the images' numbers, int64 [B].

    Raises:
        DataError: an image that cannot be read, unless `skip_bad`.

    Source: Krizhevsky et al. 2012; the paper's AlexNet probes.
    """
    windows = Augment.eval(augment.size, resize=augment.resize_side, mean=augment.mean, std=augment.std)
    batches = prefetch(
        _batches(source, windows, batch_size, dtype, threads, skip_bad), depth=3, on_wait=lambda seconds: None
    )
    try:
        for images, index in batches:
            yield images if device is None else images.to(device, non_blocking=True), index
    finally:
        batches.close()


def crop_records(heights: npt.ArrayLike, widths: npt.ArrayLike, augment: Augment) -> npt.NDArray[Any]:
    """The parameters of the ten windows of each image, for `sela_ext.kernels.augment`: records [B * 10].

    Args:
        heights: [B] pixels.
        widths: [B] pixels.
        augment: `Augment.eval` of some size.
    """
    tall, wide = np.atleast_1d(heights).astype(np.int32), np.atleast_1d(widths).astype(np.int32)
    centre = kernels.sample_parameters(augment, tall, wide, np.arange(len(tall)), seed=0, epoch=0)
    records = np.repeat(centre[:, None], CROPS, axis=1)
    bottom, right = centre["height"] - augment.size, centre["width"] - augment.size
    corners = ((0, 0), (0, right), (bottom, 0), (bottom, right))
    for place, (top, left) in enumerate(corners):
        records["top"][:, place], records["left"][:, place] = top, left
    # The mirrored image's left is the image's right: a window there is a mirrored window of the other side.
    mirrored = ((0, right), (0, 0), (bottom, right), (bottom, 0))
    for place, (top, left) in enumerate(mirrored, CROPS // 2):
        records["top"][:, place], records["left"][:, place] = top, left
    # In the middle an odd margin makes the difference of a pixel.
    records["left"][:, CROPS - 1] = right - centre["left"]
    records["flip"][:, CROPS // 2 :] = 1
    return records.reshape(-1)


def _batches(
    source: Source, augment: Augment, batch_size: int, dtype: torch.dtype, threads: int, skip_bad: bool
) -> Generator[tuple[Tensor, Tensor], None, None]:
    def read(index: int) -> npt.NDArray[np.uint8] | DataError:
        try:
            return source.read(index)
        except DataError as error:
            if not skip_bad:
                raise
            return error

    with ThreadPoolExecutor(max(1, threads if source.parallel_reads else 1), thread_name_prefix="sela-crops") as pool:
        for start in range(0, len(source), batch_size):
            numbers = range(start, min(start + batch_size, len(source)))
            found = list(pool.map(read, numbers))
            kept = [i for i, image in zip(numbers, found, strict=True) if not isinstance(image, DataError)]
            images = [image for image in found if not isinstance(image, DataError)]
            if not images:
                continue
            shapes = np.array([image.shape[:2] for image in images])
            records = crop_records(shapes[:, 0], shapes[:, 1], augment)
            each = [image for image in images for _ in range(CROPS)]
            views = kernels.augment(each, records, augment, dtype=dtype, channels_last=True, threads=threads)
            yield views, torch.tensor(kept, dtype=torch.int64)
