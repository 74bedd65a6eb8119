"""What bench/images.py checks before it times: our batches beside torchvision on the same drawn parameters.

The reference shares no code with the package: Pillow's pixels, and torchvision v2's functions in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import images_cases as cases
import numpy as np
import torch
from torchvision.transforms.v2 import functional

from sela_ext import kernels
from sela_ext.data.loader import Batch
from sela_ext.kernels import Augment

LIMIT = 0.01  # of 255: largest difference of the exact way from torchvision in float
PLANAR_LIMIT = 0.3  # of 255: mean difference of the planar way from the exact one


class DisagreementError(Exception):
    """Programs that should give the same do not; nothing is timed."""


def reference(image: np.ndarray, augment: Augment, params: np.void, effects: np.void | None) -> torch.Tensor:
    """Torchvision v2's functions in float on drawn parameters, in [0, 1]."""
    x = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    top, left, height, width = (int(params[name]) for name in ("top", "left", "height", "width"))
    side = augment.size
    if augment.crop == "center":
        x = functional.resize(x, [height, width], antialias=True)[:, top : top + side, left : left + side]
    else:
        x = functional.resized_crop(x, top, left, height, width, [side, side], antialias=True)
    if params["gray"] and augment.gray_first:
        x = functional.rgb_to_grayscale(x, 3)
    if params["jitter"]:
        steps = (
            ("brightness", functional.adjust_brightness),
            ("contrast", functional.adjust_contrast),
            ("saturation", functional.adjust_saturation),
            ("hue", functional.adjust_hue),
        )
        for k in params["order"]:
            name, step = steps[k]
            x = step(x, float(params[name]))
    if params["gray"] and not augment.gray_first:
        x = functional.rgb_to_grayscale(x, 3)
    if effects is not None and effects["blur"] > 0:
        width = 2 * augment.blur_radius + 1
        x = functional.gaussian_blur(x, [width, width], [float(effects["blur"])] * 2)
    return functional.horizontal_flip(x) if params["flip"] else x


def from_torchvision(batches: Iterable[Batch], augment: Augment, image: Callable[[int], np.ndarray]) -> float:
    """Largest difference of our images from the reference, of 255.

    image: number -> pixels.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in augment.channel_values(3))
    worst = 0.0
    for batch in batches:
        for i, number in enumerate(batch.index.tolist()):
            effects = None if batch.effects is None else batch.effects[i]
            wanted = reference(image(number), augment, batch.params[i], effects)
            worst = max(worst, float((batch.images[i] * std + mean - wanted).abs().max()))
    return 255 * worst


def apart(some: Iterable[Batch], others: Iterable[Batch], augment: Augment) -> tuple[float, float]:
    """(mean, largest) difference of the images of two ways that drew the same, of 255."""
    std = torch.tensor(augment.channel_values(3)[1])[:, None, None]
    total, count, worst = 0.0, 0, 0.0
    for a, b in zip(some, others, strict=True):
        if a.params.tobytes() != b.params.tobytes():
            raise DisagreementError("two ways drew different parameters")
        difference = ((a.images - b.images) * std).abs()
        total, count = total + float(difference.sum(dtype=torch.float64)), count + difference.numel()
        worst = max(worst, float(difference.max()))
    return 255 * total / count, 255 * worst


def unequal_pixels(files: Sequence[bytes], wanted: Sequence[np.ndarray]) -> int:
    """Files that we decode to other pixels than Pillow."""
    return sum(not np.array_equal(kernels.decode_jpeg(d), image) for d, image in zip(files, wanted, strict=True))


def pillow(files: Sequence[str]) -> Callable[[int], np.ndarray]:
    """The pixels of a file by its number."""
    return lambda number: cases.pixels(files[number])
