"""Twins of sela_ext.kernels.augment: random numbers and boxes in numpy, images in torch's own operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sela_ext.errors import OptionError
from sela_ext.kernels.augment import (
    EFFECTS,
    PARAMETERS,
    Augment,
    check_effects,
    check_key,
    check_output,
    check_sampling,
    check_source,
    output_shape,
)
from sela_ext.kernels.augment_resident import check_index

if TYPE_CHECKING:
    import torch

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]

_SHUFFLE, _CROP, _FLIP, _COLOUR, _EFFECTS, _NOISE = range(6)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: npt.ArrayLike, key: npt.ArrayLike) -> Words:
    """Philox4x32 with ten rounds.

    Args:
        counter: 32-bit words [..., 4].
        key: 32-bit words [2].

    Returns:
        Random 32-bit words [..., 4], as uint64.

    Example:
        >>> [hex(word) for word in philox4x32([0, 0, 0, 0], [0, 0]).tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']

    Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    words = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    key0, key1 = (int(word) for word in np.asarray(key, dtype=np.uint64))
    c0, c1, c2, c3 = words
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(key0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(key1),
            product0 & _LOW,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def _draw(seed: int, epoch: int, ids: npt.NDArray[np.int64], view: int, draw: int, purpose: int) -> Words:
    """Four words per image, [B, 4]."""
    image = ids.astype(np.uint64)
    counter = np.empty((len(ids), 4), np.uint64)
    counter[:, 0] = image & _LOW
    counter[:, 1] = ((image >> _SHIFT) << np.uint64(24)) | np.uint64(view << 16 | draw)
    counter[:, 2] = epoch
    counter[:, 3] = purpose
    return philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32])


def _unit(words: Words) -> Floats:
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def _below(words: Words, n: npt.ArrayLike) -> npt.NDArray[np.int32]:
    return ((words * np.asarray(n).astype(np.uint64)) >> _SHIFT).astype(np.int32)


def _between(bounds: tuple[float, float], unit: Floats) -> Floats:
    low, high = np.float32(bounds[0]), np.float32(bounds[1])
    return (low + (high - low) * unit).astype(np.float32)


def _exp(x: Floats) -> Floats:
    """e^x in float32 by range reduction and a polynomial (Cephes' coefficients): the same bits anywhere."""
    f = np.float32
    n = np.rint(x * f(1.44269504))
    r = (x - n * f(0.693359375)) - n * f(-2.12194440e-4)
    p = np.full_like(r, f(1.9875691500e-4))
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + f(c)
    p = p * (r * r) + r + f(1.0)
    power: Floats = np.ldexp(p, n.astype(np.int32)).astype(np.float32)
    return power


def sample_parameters(
    augment: Augment,
    heights: npt.ArrayLike,
    widths: npt.ArrayLike,
    index: npt.ArrayLike,
    *,
    seed: int,
    epoch: int,
    view: int = 0,
) -> npt.NDArray[np.void]:
    """Twin of sela_ext.kernels.sample_parameters: equal bits, vectorised over images in numpy."""
    check_key(seed, epoch, view)
    tall, wide, ids = check_sampling(augment, heights, widths, index)
    out = np.zeros(len(ids), PARAMETERS)
    if augment.crop == "random":
        _sample_boxes(augment, tall, wide, seed, epoch, ids, view, out)
    elif augment.crop == "center":
        side, short = augment.resize_side, np.minimum(tall, wide).astype(np.int64)
        out["height"], out["width"] = side * tall.astype(np.int64) // short, side * wide.astype(np.int64) // short
        out["top"] = np.rint((out["height"] - augment.size) / 2)
        out["left"] = np.rint((out["width"] - augment.size) / 2)
    else:
        out["height"], out["width"] = tall, wide

    chance = _unit(_draw(seed, epoch, ids, view, 0, _FLIP))
    out["flip"] = chance[:, 0] < np.float32(augment.flip_probability)
    out["gray"] = chance[:, 1] < np.float32(augment.gray_probability)
    out["jitter"] = chance[:, 2] < np.float32(augment.jitter_probability if augment.jitters else 0.0)

    order = np.tile(np.arange(4, dtype=np.int32), (len(ids), 1))
    words = _draw(seed, epoch, ids, view, 1, _COLOUR)
    everyone = np.arange(len(ids))
    for i in (3, 2, 1):
        j = _below(words[:, i], i + 1)
        order[everyone, i], order[everyone, j] = order[everyone, j], order[everyone, i].copy()
    jitter = out["jitter"] == 1
    out["order"] = np.where(jitter[:, None], order, np.arange(4))
    unit = _unit(_draw(seed, epoch, ids, view, 0, _COLOUR))
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        out[name] = np.where(jitter, _between(augment.factor_range(name), unit[:, k]), 0.0 if name == "hue" else 1.0)
    return out


def _sample_boxes(
    augment: Augment,
    tall: npt.NDArray[np.int32],
    wide: npt.NDArray[np.int32],
    seed: int,
    epoch: int,
    ids: npt.NDArray[np.int64],
    view: int,
    out: npt.NDArray[np.void],
) -> None:
    area = tall.astype(np.float32) * wide.astype(np.float32)
    log_ratio = (float(np.log(augment.ratio[0])), float(np.log(augment.ratio[1])))
    found = np.zeros(len(ids), bool)
    for draw in range(10):
        words = _draw(seed, epoch, ids, view, draw, _CROP)
        unit = _unit(words)
        target, ratio = area * _between(augment.scale, unit[:, 0]), _exp(_between(log_ratio, unit[:, 1]))
        width, height = np.rint(np.sqrt(target * ratio)), np.rint(np.sqrt(target / ratio))
        fits = (width >= 1) & (height >= 1) & (width <= wide) & (height <= tall) & ~found
        out["height"][fits], out["width"][fits] = height[fits], width[fits]
        out["top"][fits] = _below(words[fits, 2], tall[fits] - out["height"][fits] + 1)
        out["left"][fits] = _below(words[fits, 3], wide[fits] - out["width"][fits] + 1)
        found |= fits
    low, high = np.float32(augment.ratio[0]), np.float32(augment.ratio[1])
    shape = wide.astype(np.float32) / tall.astype(np.float32)
    height = np.where(shape < low, np.rint(wide.astype(np.float32) / low), tall)
    width = np.where((shape >= low) & (shape > high), np.rint(tall.astype(np.float32) * high), wide)
    left_over = ~found
    out["height"][left_over] = np.clip(height, 1, tall)[left_over]
    out["width"][left_over] = np.clip(width, 1, wide)[left_over]
    out["top"][left_over] = ((tall - out["height"]) // 2)[left_over]
    out["left"][left_over] = ((wide - out["width"]) // 2)[left_over]


def sample_effects(
    augment: Augment, index: npt.ArrayLike, *, seed: int, epoch: int, view: int = 0
) -> npt.NDArray[np.void]:
    """Twin of sela_ext.kernels.sample_effects: equal bits."""
    check_key(seed, epoch, view)
    ids = check_sampling(augment, 1, 1, index)[2]
    out = np.zeros(len(ids), EFFECTS)
    first, second, third = (_draw(seed, epoch, ids, view, draw, _EFFECTS) for draw in range(3))
    unit, more = _unit(first), _unit(second)
    blurs = unit[:, 0] < np.float32(augment.blur_probability)
    out["blur"] = np.where(blurs, _between(augment.blur_sigma, unit[:, 1]), 0.0)
    tones = unit[:, 2] < np.float32(augment.tone_probability)
    out["tone"] = np.where(tones, 1 + _below(first[:, 3], 3), 0)
    out["sharpness"] = np.where(out["tone"] == 3, _between(augment.factor_range("sharpness"), more[:, 0]), 1.0)
    noisy = more[:, 1] < np.float32(augment.noise_probability)
    out["noise"] = np.where(noisy, _between(augment.noise_sigma, more[:, 2]), 0.0)
    out["noise_key"] = third[:, :2]
    return out


def _luma(image: torch.Tensor) -> torch.Tensor:
    return 0.2989 * image[0:1] + 0.587 * image[1:2] + 0.114 * image[2:3] if len(image) == 3 else image


def _turn_hue(image: torch.Tensor, turn: float) -> torch.Tensor:
    """RGB to hue, saturation, value; hue + turn; and back."""
    import torch

    red, green, blue = image
    value, spread = image.amax(0), image.amax(0) - image.amin(0)
    divisor = torch.where(spread == 0, 1.0, spread)
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = torch.remainder(sector / 6 + turn, 1.0)
    turned = []
    for start in (5.0, 3.0, 1.0):
        k = torch.remainder(start + 6 * hue, 6.0)
        turned.append(value - spread * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(turned)


def _jitter(image: torch.Tensor, record: npt.NDArray[np.void]) -> torch.Tensor:
    brightness, contrast, saturation, hue = (
        float(record[name]) for name in ("brightness", "contrast", "saturation", "hue")
    )
    for operation in record["order"].tolist():
        if operation == 0:
            image = (image * brightness).clamp(0, 1)
        elif operation == 1:
            image = (image * contrast + (1 - contrast) * _luma(image).mean()).clamp(0, 1)
        elif operation == 2 and len(image) == 3:
            image = (image * saturation + (1 - saturation) * _luma(image)).clamp(0, 1)
        elif operation == 3 and len(image) == 3:
            image = _turn_hue(image, hue)
    return image


def _equalize(plane: torch.Tensor) -> torch.Tensor:
    """Histogram equalisation over 256 levels, as Pillow's ImageOps and torchvision do it."""
    import torch

    levels = (plane * 255.999).to(torch.uint8).long()
    counts = torch.bincount(levels.flatten(), minlength=256)
    step = int(counts.sum() - counts[counts.nonzero().max()]) // 255
    if step == 0:
        return levels / 255
    below = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)[:-1]])
    return ((below + step // 2) // step).clamp(0, 255)[levels] / 255


def _autocontrast(plane: torch.Tensor) -> torch.Tensor:
    low, high = plane.min(), plane.max()
    return ((plane - low) / (high - low)).clamp(0, 1) if high - low > 1e-4 else plane


def _sharpen(image: torch.Tensor, factor: float) -> torch.Tensor:
    import torch

    if min(image.shape[1:]) < 3:
        return image.clamp(0, 1)
    kernel = torch.ones(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = 5
    mean = torch.nn.functional.conv2d(image[:, None], kernel / 13)[:, 0]
    result = image.clone()
    middle = image[:, 1:-1, 1:-1]
    result[:, 1:-1, 1:-1] = factor * middle + (1 - factor) * mean
    return result.clamp(0, 1)


def _blur(image: torch.Tensor, sigma: float, radius: int) -> torch.Tensor:
    import torch
    import torch.nn.functional as functional

    weight = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    weight = (weight / weight.sum()).float()
    padded = functional.pad(image[:, None], [radius] * 4, mode="reflect")
    return functional.conv2d(functional.conv2d(padded, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))[:, 0]


def _normal(key: npt.NDArray[np.uint32], channel: int, pixels: int) -> Floats:
    """Standard normal numbers [pixels], by the polar form of Box and Muller.

    Counter 16 b + l has the numbers of the pixels 64 b + 16 j + l, j = 0..3.
    """
    counter = np.zeros((-(-pixels // 64) * 16, 4), np.uint64)
    counter[:, 0], counter[:, 1], counter[:, 3] = np.arange(len(counter)), channel, _NOISE
    words = philox4x32(counter, key).reshape(-1, 16, 2, 2) >> np.uint64(8)
    radius = np.sqrt(-2 * np.log((words[..., 0] + np.uint64(1)) / 2.0**24))
    angle = 2 * np.pi * (words[..., 1] / 2.0**24)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)  # [b, l, pair, half]
    normal: Floats = pairs.transpose(0, 2, 3, 1).reshape(-1)[:pixels].astype(np.float32)
    return normal


def _apply_effects(image: torch.Tensor, record: npt.NDArray[np.void], augment: Augment, flip: bool) -> torch.Tensor:
    """Tone, blur, flip and noise."""
    import torch

    tone = int(record["tone"])
    if tone in (1, 2):
        image = torch.stack([(_equalize if tone == 1 else _autocontrast)(plane) for plane in image])
    if tone == 3:
        image = _sharpen(image, float(record["sharpness"]))
    if record["blur"] > 0:
        image = _blur(image, float(record["blur"]), augment.blur_radius)
    if flip:
        image = image.flip(2)
    if record["noise"] > 0:
        normal = [_normal(record["noise_key"], c, image[0].numel()) for c in range(len(image))]
        image = (image + float(record["noise"]) * torch.from_numpy(np.stack(normal)).view(image.shape)).clamp(0, 1)
    return image


def _gradients(image: torch.Tensor) -> torch.Tensor:
    """DeepCluster's fixed filters on a normalised image [C, S, S]: gray of 1/C each, then Sobel's two."""
    import torch

    along = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    kernel = torch.stack([along, along.T])[:, None]
    return torch.nn.functional.conv2d(image.mean(0)[None, None], kernel, padding=1)[0]


def augment(
    source: npt.NDArray[np.uint8] | torch.Tensor | Sequence[npt.NDArray[np.uint8]],
    params: npt.NDArray[np.void],
    augment: Augment,
    *,
    effects: npt.NDArray[np.void] | None = None,
    rows: npt.ArrayLike | None = None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    threads: int = 0,
) -> torch.Tensor:
    """Twin of sela_ext.kernels.augment: step by step with torch, one image at a time. threads is not used."""
    import torch

    images, picked, channels = check_source(source, rows, params)
    drawn = check_effects(effects, augment, len(params))
    shape = output_shape(augment, len(params), channels, out.dtype if dtype is None and out is not None else dtype)
    result = check_output(out, shape, dtype, channels_last)
    for i, record in enumerate(params):
        pixels = images[i if picked is None else picked[i]]
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
        result[i] = finish(
            resample(image, record, augment), record, None if drawn is None else drawn[i], augment, result.dtype
        )
    return result


def resample(image: torch.Tensor, record: npt.NDArray[np.void], augment: Augment) -> torch.Tensor:
    """Crop and resample [C, H, W] to [C, size, size]; the flip comes later."""
    size = augment.size
    top, left, height, width = (int(record[name]) for name in ("top", "left", "height", "width"))
    if augment.crop == "center":
        return _resample(image, height, width)[:, top : top + size, left : left + size]
    return _resample(image[:, top : top + height, left : left + width], size, size)


def finish(
    image: torch.Tensor,
    record: npt.NDArray[np.void],
    effects: npt.NDArray[np.void] | None,
    augment: Augment,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Everything behind the resampling, for [C, size, size] in [0, 1]."""
    import torch

    channels = len(image)
    gray = channels == 3 and bool(record["gray"])
    if gray and augment.gray_first:
        image = _luma(image).expand(3, -1, -1)
    if record["jitter"]:
        image = _jitter(image, record)
    if gray and not augment.gray_first:
        image = _luma(image).expand(3, -1, -1)
    if effects is not None:
        image = _apply_effects(image, effects, augment, bool(record["flip"]))
    elif record["flip"]:
        image = image.flip(2)
    if dtype == torch.uint8:
        return (image.clamp(0, 1) * 255).round()
    mean, std = (torch.tensor(values)[:, None, None] for values in augment.channel_values(channels))
    image = (image - mean) / std
    return _gradients(image) if augment.sobel else image


def augment_views(
    source: npt.NDArray[np.uint8] | torch.Tensor | Sequence[npt.NDArray[np.uint8]],
    views: Sequence[Augment],
    index: npt.ArrayLike,
    *,
    seed: int,
    epoch: int,
    first_view: int = 0,
    rows: npt.ArrayLike | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    threads: int = 0,
) -> list[torch.Tensor]:
    """Twin of sela_ext.kernels.augment_views."""
    shapes = [source.shape[1:3]] if hasattr(source, "shape") else [image.shape[:2] for image in source]
    heights, widths = np.array(shapes, dtype=np.int64).reshape(-1, 2).T
    batches = []
    for view, what in enumerate(views, first_view):
        params = sample_parameters(what, heights, widths, index, seed=seed, epoch=epoch, view=view)
        effects = sample_effects(what, index, seed=seed, epoch=epoch, view=view)
        batches.append(
            augment(source, params, what, effects=effects, rows=rows, dtype=dtype, channels_last=channels_last)
        )
    return batches


_augment = augment  # the name below is an argument's too


def augment_resident(
    images: torch.Tensor | npt.NDArray[np.uint8],
    index: npt.ArrayLike | torch.Tensor,
    augment: Augment,
    *,
    seed: int,
    epoch: int,
    view: int = 0,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    return_parameters: bool = False,
    threads: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, npt.NDArray[np.void]]:
    """Twin of sela_ext.kernels.augment_resident, for images on any device; works on the CPU. threads is not used."""
    import torch

    tensor = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.array(images))
    pixels, rows = tensor.cpu().numpy(), check_index(index, len(tensor))
    params = sample_parameters(augment, pixels.shape[1], pixels.shape[2], rows, seed=seed, epoch=epoch, view=view)
    effects = sample_effects(augment, rows, seed=seed, epoch=epoch, view=view)
    shape = output_shape(augment, len(rows), pixels.shape[3], dtype)
    result = check_output(out, shape, dtype, channels_last, tensor.device)
    result.copy_(
        _augment(pixels, params, augment, effects=effects, rows=rows, dtype=result.dtype, channels_last=channels_last)
    )
    return (result, params) if return_parameters else result


def _resample(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    import torch.nn.functional as functional

    if tuple(image.shape[1:]) == (height, width):
        return image
    if width == 1 and height > 1:  # torch 2.14 repeats the first row where the output is one pixel wide
        return _resample(image.transpose(1, 2), width, height).transpose(1, 2)
    return functional.interpolate(
        image[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]


def permutation(n: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Twin of sela_ext.kernels.permutation: equal numbers, one Python swap at a time."""
    check_key(seed, epoch)
    if n < 0:
        raise OptionError(f"n: expected a number >= 0, found {n}")
    blocks = np.arange((n + 1) // 2, dtype=np.uint64)
    counter = np.zeros((len(blocks), 4), np.uint64)
    counter[:, 0], counter[:, 1] = blocks & _LOW, blocks >> _SHIFT
    counter[:, 2], counter[:, 3] = epoch, _SHUFFLE
    words: Any = philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32]).reshape(-1, 2)
    draws = (words[:, 0] | words[:, 1] << _SHIFT).tolist()
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = draws[i] * (i + 1) >> 64
        order[i], order[j] = order[j], order[i]
    return np.array(order, np.int64)
