"""Augmentation of uint8 images: random parameters, the fused pass, and the shuffle of an epoch.

Everything random is a pure function of (seed, epoch, image, view): equal for any number of threads or processes, and
resumable without state.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from sela_ext import _core
from sela_ext.errors import DataError, OptionError
from sela_ext.kernels.device import cuda_place, is_tensor

if TYPE_CHECKING:
    import torch

    from sela_ext.kernels.augment_device import DeviceImages

Range: TypeAlias = "float | tuple[float, float]"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)

PARAMETERS = np.dtype(
    [
        ("top", np.int32),
        ("left", np.int32),
        ("height", np.int32),
        ("width", np.int32),
        ("flip", np.int32),
        ("gray", np.int32),
        ("jitter", np.int32),
        ("order", np.int32, (4,)),
        ("brightness", np.float32),
        ("contrast", np.float32),
        ("saturation", np.float32),
        ("hue", np.float32),
    ]
)
"""What is drawn for one image, as csrc/sela/augment.h lays it out."""

EFFECTS = np.dtype(
    [
        ("blur", np.float32),
        ("tone", np.int32),
        ("sharpness", np.float32),
        ("noise", np.float32),
        ("noise_key", np.uint32, (2,)),
    ]
)
"""What is drawn for one image besides, as csrc/sela/effects.h lays it out."""


@dataclasses.dataclass(frozen=True)
class Augment:
    """How an image becomes a training input; presets are the class methods.

    The steps, in torchvision's float semantics: crop and antialiased bilinear resampling to size x size; gray; colour
    jitter (clamped to [0, 1] after each operation); one tone operation; Gaussian blur; horizontal flip; Gaussian noise;
    normalisation; gradients. One-channel images pass through gray, saturation and hue unchanged, as in torchvision.

    Attributes:
        size: side of the square output, pixels, >= 1.
        crop: "random": a random box (torchvision's RandomResizedCrop). "center": short side to `resize`, then the
            central window (Resize + CenterCrop). "resize": the whole image, whatever its shape; images of size x size
            pixels keep their pixels.
        resize: short side before the central window, pixels, >= size; None: size * 256 / 224.
        scale: share of the image's area that a random box covers, within (0, 1].
        ratio: width / height of a random box, > 0.
        flip_probability: share of images mirrored left to right, in [0, 1].
        gray_probability: share of images turned gray, in [0, 1].
        jitter_probability: share of images that the four colour operations are applied to, in random order.
        brightness: factor's range (low, high), low >= 0; a number x stands for (max(0, 1 - x), 1 + x).
        contrast: likewise.
        saturation: likewise.
        hue: turn's range within [-0.5, 0.5]; a number x stands for (-x, x).
        gray_first: gray before the colour operations, else after them.
        blur_probability: share of images blurred, in [0, 1].
        blur_sigma: range of the Gaussian's deviation, pixels of the output, > 0.
        blur_kernel: its width, an odd number of pixels with blur_kernel // 2 < size; None: a tenth of the size, as
            SimCLR has it (23 at 224).
        tone_probability: share of images that one of equalize, autocontrast and sharpness is applied to, each as often.
        sharpness: range of the sharpness factor, as for brightness; 0 blurs, 1 changes nothing, 2 sharpens.
        noise_probability: share of images that noise is added to, in [0, 1].
        noise_sigma: range of its deviation, of channels in [0, 1], >= 0; the sum is clamped.
        sobel: the output is two channels, the horizontal and the vertical gradient of the normalised image's gray
            version, with zeros around it: the fixed first layers of DeepCluster's networks.
        mean: subtracted from channels in [0, 1], one per channel. One-channel images use the mean of the three.
        std: the divisor after that, 1e-15 to 1e15; likewise.

    Raises:
        OptionError: a value outside its range.

    Example:
        >>> Augment.sela(224).scale
        (0.08, 1.0)
        >>> Augment.sela(64, hue=0.1, flip_probability=0.0).size
        64

    Source: Asano, Rupprecht, Vedaldi (2020), section 4 and the appendix's augmentation study.
    """

    size: int
    crop: Literal["random", "center", "resize"] = "resize"
    resize: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.0
    gray_probability: float = 0.0
    jitter_probability: float = 1.0
    brightness: Range = 0.0
    contrast: Range = 0.0
    saturation: Range = 0.0
    hue: Range = 0.0
    gray_first: bool = True
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int | None = None
    tone_probability: float = 0.0
    sharpness: Range = 0.9
    noise_probability: float = 0.0
    noise_sigma: tuple[float, float] = (0.0, 0.1)
    sobel: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check(self.size >= 1, "size", ">= 1", self.size)
        _check(self.crop in ("random", "center", "resize"), "crop", '"random", "center" or "resize"', self.crop)
        _check(self.resize is None or self.resize >= self.size, "resize", ">= size", self.resize)
        for name in ("scale", "ratio", "blur_sigma", "noise_sigma", "mean", "std"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        low, high = self.scale if len(self.scale) == 2 else (0.0, 0.0)
        _check(0 < low <= high <= 1, "scale", "0 < low <= high <= 1", self.scale)
        low, high = self.ratio if len(self.ratio) == 2 else (0.0, 0.0)
        _check(0 < low <= high < math.inf, "ratio", "0 < low <= high", self.ratio)
        low, high = self.blur_sigma if len(self.blur_sigma) == 2 else (0.0, 0.0)
        _check(0 < low <= high < math.inf, "blur_sigma", "0 < low <= high", self.blur_sigma)
        low, high = self.noise_sigma if len(self.noise_sigma) == 2 else (-1.0, 0.0)
        _check(0 <= low <= high < math.inf, "noise_sigma", "0 <= low <= high", self.noise_sigma)
        width = self.blur_kernel
        fits = width is None or (width >= 1 and width % 2 == 1 and width // 2 < self.size)
        _check(fits, "blur_kernel", "an odd number >= 1 below 2 * size", width)
        for name in ("flip", "gray", "jitter", "blur", "tone", "noise"):
            share = getattr(self, f"{name}_probability")
            _check(0 <= share <= 1, f"{name}_probability", "a number in [0, 1]", share)
        for name in ("brightness", "contrast", "saturation", "hue", "sharpness"):
            low, high = self.factor_range(name)
            if isinstance(getattr(self, name), list):  # as read from JSON
                object.__setattr__(self, name, (low, high))
            bounds = (-0.5, 0.5) if name == "hue" else (0.0, math.inf)
            fits = bounds[0] <= low <= high <= bounds[1] and high < math.inf
            _check(fits, name, f"a range within [{bounds[0]}, {bounds[1]}]", getattr(self, name))
        for name in ("mean", "std"):
            values = getattr(self, name)
            low, high = (1e-15, 1e15) if name == "std" else (-1e15, 1e15)  # no float32 overflows
            fits = len(values) in (1, 3) and all(low <= x <= high for x in values)
            _check(fits, name, f"1 or 3 numbers within [{low:g}, {high:g}]", values)
        fields = [_plain(getattr(self, field.name)) for field in dataclasses.fields(self)]
        # Made here since torch.compile, which guards on it, cannot print numbers; no field: it follows from those.
        object.__setattr__(self, "_text", repr(tuple(fields)))

    def factor_range(self, name: str) -> tuple[float, float]:
        """The range (low, high) that `name`, a colour operation or "sharpness", is drawn from."""
        value = getattr(self, name)
        if isinstance(value, (tuple, list)):
            _check(len(value) == 2, name, "a number or (low, high)", value)
            return float(value[0]), float(value[1])
        x = float(value)
        _check(x >= 0, name, "a number >= 0 or (low, high)", value)
        return (-x, x) if name == "hue" else (max(0.0, 1.0 - x), 1.0 + x)

    @property
    def text(self) -> str:
        """The fields in their order, as `ast.literal_eval` reads them."""
        written: str = self._text  # type: ignore[attr-defined]
        return written

    @property
    def jitters(self) -> bool:
        """Whether any colour operation can change an image."""
        idle = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
        return self.jitter_probability > 0 and any(self.factor_range(n) != (x, x) for n, x in idle.items())

    @property
    def draws_effects(self) -> bool:
        """Whether `sample_effects` has anything to draw: tone, blur or noise."""
        return max(self.blur_probability, self.tone_probability, self.noise_probability) > 0

    @property
    def blur_radius(self) -> int:
        """Half the width of the blur's kernel, without its middle, pixels."""
        return self.blur_kernel // 2 if self.blur_kernel is not None else self.size // 20

    def output_channels(self, channels: int) -> int:
        """Channels of the output for images of `channels` channels."""
        return 2 if self.sobel else channels

    @property
    def resize_side(self) -> int:
        """Short side before the central window, pixels."""
        return self.resize if self.resize is not None else self.size * 256 // 224

    def channel_values(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) for images of `channels` channels, 1 or 3."""
        return _per_channel(self.mean, channels), _per_channel(self.std, channels)

    @classmethod
    def none(cls, size: int, **fields: Any) -> Augment:
        """Resample to size x size and normalise; nothing random."""
        return cls(size, **fields)

    @classmethod
    def flip(cls, size: int, **fields: Any) -> Augment:
        """`none` and a horizontal flip of half of the images."""
        return cls(size, **{"flip_probability": 0.5, **fields})

    @classmethod
    def resized_crop(cls, size: int, **fields: Any) -> Augment:
        """A random box of 8-100% of the area, and the flip."""
        return cls(size, **{"crop": "random", "flip_probability": 0.5, **fields})

    @classmethod
    def sela(cls, size: int, **fields: Any) -> Augment:
        """The paper's set: random box, gray (.2), colour jitter (.4, .4, .4, .4), flip."""
        jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4}
        return cls.resized_crop(size, **{"gray_probability": 0.2, **jitter, **fields})

    @classmethod
    def cifar(cls, size: int, **fields: Any) -> Augment:
        """The paper's set for CIFAR: boxes of 20-100%, jitter before gray, CIFAR's mean and deviation."""
        preset = {"scale": (0.2, 1.0), "gray_first": False, "mean": CIFAR_MEAN, "std": CIFAR_STD}
        return cls.sela(size, **{**preset, **fields})

    @classmethod
    def aug_plus(cls, size: int, **fields: Any) -> Augment:
        """Aug++: boxes of 20-100%, jitter (.4, .4, .4, .1) for 80%, gray (.2), blur of .1 to 2 pixels for half, flip.

        Source: the set of MoCo v2 (Chen et al. 2020), after SimCLR; the paper's "Aug++" models. Deviations are MoCo's,
        at 224 pixels; the kernel is SimCLR's.
        """
        preset = {"scale": (0.2, 1.0), "hue": 0.1, "jitter_probability": 0.8, "gray_first": False}
        return cls.sela(size, **{**preset, "blur_probability": 0.5, **fields})

    @classmethod
    def aug_plus_more(cls, size: int, **fields: Any) -> Augment:
        """`aug_plus` and one of equalize, autocontrast and sharpness, for training on fixed labels.

        Source: the paper's "+more". It publishes neither how often nor how sharp: here always, and a factor of .1 to
        1.9, AutoAugment's range.
        """
        return cls.aug_plus(size, **{"tone_probability": 1.0, **fields})

    @classmethod
    def deepcluster(cls, size: int, **fields: Any) -> Augment:
        """DeepCluster's training input: random box of 8-100%, flip, and the gradients that its networks see.

        Source: Caron et al., ECCV 2018: the Sobel filter in front of the network. With a network that has a Sobel
        filter of its own, use `resized_crop`.
        """
        return cls.resized_crop(size, **{"sobel": True, **fields})

    @classmethod
    def deepcluster_eval(cls, size: int, **fields: Any) -> Augment:
        """DeepCluster's input for clustering: short side to size * 256 / 224, central window, gradients."""
        return cls.eval(size, **{"sobel": True, **fields})

    @classmethod
    def multi_crop(
        cls,
        sizes: Sequence[int] = (224, 96),
        counts: Sequence[int] = (2, 6),
        *,
        scales: Sequence[tuple[float, float]] = ((0.14, 1.0), (0.05, 0.14)),
        **fields: Any,
    ) -> tuple[Augment, ...]:
        """SwAV's views of one image: counts[i] boxes of sizes[i] x sizes[i] pixels, in that order.

        Args:
            sizes: side of the output of each kind of view, pixels.
            counts: views of each kind, >= 1.
            scales: share of the image's area that their boxes cover.
            **fields: of `Augment`, for all views.

        Returns:
            One `Augment` per view, for `sela_ext.kernels.augment_views`.

        Raises:
            OptionError: sizes, counts and scales of different lengths, counts below 1, or more than 256 views.

        Example:
            >>> [view.size for view in Augment.multi_crop((160, 96), (2, 4))]
            [160, 160, 96, 96, 96, 96]

        Source: Caron et al., SwAV (NeurIPS 2020): colour jitter (.8, .8, .8, .2) for 80%, gray (.2), blur for half.
        SeLa-v2 is (160, 96) with counts (2, 4).
        """
        same = len(sizes) == len(counts) == len(scales)
        _check(same, "multi_crop", "as many sizes as counts and scales", (len(sizes), len(counts), len(scales)))
        _check(all(n >= 1 for n in counts) and sum(counts) <= 256, "counts", ">= 1 each, 256 in all", tuple(counts))
        jitter = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
        return tuple(
            cls.aug_plus(size, **{"scale": scale, **jitter, **fields})
            for size, count, scale in zip(sizes, counts, scales, strict=True)
            for _ in range(count)
        )

    @classmethod
    def eval(cls, size: int, **fields: Any) -> Augment:
        """Short side to size * 256 / 224, then the central window; nothing random.

        Small images are enlarged likewise; `none` keeps images of size x size pixels as they are.
        """
        return cls(size, **{"crop": "center", **fields})


def _check(fits: bool, name: str, expected: str, found: object) -> None:
    if not fits:
        raise OptionError(f"Augment {name}: expected {expected}, found {found!r}")


def _plain(value: Any) -> Any:
    """A field without numpy's types."""
    if isinstance(value, (tuple, list)):
        return tuple(_plain(x) for x in value)
    return value.item() if isinstance(value, np.generic) else value


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    return values * 3 if len(values) == 1 else (sum(values) / 3,)


@functools.lru_cache(maxsize=64)
def augment_options(augment: Augment, channels: int) -> _core.AugmentOptions:
    """`augment` as the kernels take it, for images of `channels` channels."""
    return _core.AugmentOptions(**option_fields(augment, channels))


def option_fields(augment: Augment, channels: int) -> dict[str, Any]:
    """The fields of the compiled AugmentOptions."""
    mean, std = augment.channel_values(channels)
    return {
        "size": augment.size,
        "crop": augment.crop,
        "resize": augment.resize_side,
        "scale": augment.scale,
        "log_ratio": (math.log(augment.ratio[0]), math.log(augment.ratio[1])),
        "ratio": augment.ratio,
        "flip_probability": augment.flip_probability,
        "gray_probability": augment.gray_probability,
        "jitter_probability": augment.jitter_probability if augment.jitters else 0.0,
        "brightness": augment.factor_range("brightness"),
        "contrast": augment.factor_range("contrast"),
        "saturation": augment.factor_range("saturation"),
        "hue": augment.factor_range("hue"),
        "gray_first": augment.gray_first,
        "mean": mean * (3 // channels),
        "std": std * (3 // channels),
    }


@functools.lru_cache(maxsize=64)
def effect_options(augment: Augment) -> _core.EffectOptions:
    """What follows the colour operations, as the kernels take it."""
    return _core.EffectOptions(**effect_fields(augment))


def effect_fields(augment: Augment) -> dict[str, Any]:
    """The fields of the compiled EffectOptions."""
    return {
        "blur_probability": augment.blur_probability,
        "blur_sigma": augment.blur_sigma,
        "blur_radius": augment.blur_radius,
        "tone_probability": augment.tone_probability,
        "sharpness": augment.factor_range("sharpness"),
        "noise_probability": augment.noise_probability,
        "noise_sigma": augment.noise_sigma,
        "sobel": augment.sobel,
    }


def check_key(seed: int, epoch: int, view: int = 0) -> None:
    """Refuse a seed, epoch or view that the random numbers have no room for.

    Raises:
        OptionError: seed outside [0, 2^64), epoch outside [0, 2^32) or view outside [0, 256).
    """
    for name, value, bits in (("seed", seed, 64), ("epoch", epoch, 32), ("view", view, 8)):
        if not 0 <= value < 1 << bits:
            raise OptionError(f"{name}: expected an integer in [0, 2^{bits}), found {value}")


def check_sampling(
    augment: Augment, heights: npt.ArrayLike, widths: npt.ArrayLike, index: npt.ArrayLike
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The arguments of sample_parameters as arrays of one length.

    Raises:
        DataError: sizes below 1 pixel, ids outside [0, 2^40), lengths that differ.
    """
    ids = np.ascontiguousarray(index, dtype=np.int64).reshape(-1)
    sizes = []
    for name, given in (("heights", heights), ("widths", widths)):
        values = np.asarray(given)
        if values.ndim > 1 or values.size not in (1, len(ids)):
            raise DataError(f"{name}: expected one number or {len(ids)}, as in index, found shape {values.shape}")
        low, high = (int(values.min()), int(values.max())) if values.size else (1, 1)
        if low < 1 or high >= 1 << 24:
            raise DataError(f"{name}: expected sizes in [1, 2^24) pixels, found {low} to {high}")
        same = values.size == 1
        sizes.append(np.full(ids.shape, low, np.int32) if same else np.ascontiguousarray(values, dtype=np.int32))
    if augment.crop == "center" and ids.size:
        longest = augment.resize_side * (np.maximum(*sizes) / np.minimum(*sizes)).max()
        if longest >= 1 << 30:
            raise DataError(
                f"heights, widths: expected a long side below 2^30 pixels once resized, found {longest:.3g}"
            )
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 40):
        raise DataError(f"index: expected image ids in [0, 2^40), found {ids.min()} to {ids.max()}")
    return sizes[0], sizes[1], ids


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
    """Draw the augmentation parameters of a batch: torchvision's distributions, from Philox4x32-10.

    Args:
        augment: what may be drawn.
        heights: [B] image heights, pixels, or one number for all.
        widths: [B] image widths, likewise.
        index: int64 [B], the images' ids in [0, 2^40).
        seed: the key, [0, 2^64).
        epoch: [0, 2^32).
        view: several views of an image in one epoch differ by this, [0, 256).

    Returns:
        Records [B] of dtype PARAMETERS. With crop "random" and "resize", (top, left, height, width) is the box that is
        resampled to the output. With crop "center" the image is resampled to height x width, and the output is its
        window at (top, left). order: 0 brightness, 1 contrast, 2 saturation, 3 hue. jitter 0: the factors are unused.

    Raises:
        DataError: sizes or ids out of range, or lengths that differ.
        OptionError: seed, epoch or view out of range.

    Example:
        >>> drawn = sample_parameters(Augment.sela(32), 40, 50, [7, 8], seed=1, epoch=0)
        >>> bool((drawn["height"] <= 40).all())
        True
    """
    check_key(seed, epoch, view)
    tall, wide, ids = check_sampling(augment, heights, widths, index)
    out = np.empty(len(ids), PARAMETERS)
    _core.sample_parameters(augment_options(augment, 3), tall, wide, ids, seed, epoch, view, out)
    return out


def sample_effects(
    augment: Augment, index: npt.ArrayLike, *, seed: int, epoch: int, view: int = 0
) -> npt.NDArray[np.void]:
    """Draw what follows the colour operations for a batch, from Philox4x32-10.

    Independent of `sample_parameters`, which draws the same with these steps and without them.

    Args:
        augment: what may be drawn.
        index: int64 [B], the images' ids in [0, 2^40).
        seed: the key, [0, 2^64).
        epoch: [0, 2^32).
        view: several views of an image in one epoch differ by this, [0, 256).

    Returns:
        Records [B] of dtype EFFECTS. blur: the deviation, pixels, 0 = none. tone: 0 none, 1 equalize, 2 autocontrast,
        3 sharpness, of which `sharpness` is the factor. noise: the deviation, of channels in [0, 1], 0 = none;
        noise_key: the key of its numbers.

    Raises:
        DataError: ids out of range.
        OptionError: seed, epoch or view out of range.

    Example:
        >>> drawn = sample_effects(Augment.aug_plus(32), [7, 8], seed=1, epoch=0)
        >>> bool((drawn["blur"] <= 2).all())
        True
    """
    check_key(seed, epoch, view)
    ids = check_sampling(augment, 1, 1, index)[2]
    out = np.zeros(len(ids), EFFECTS)
    _core.sample_effects(effect_options(augment), ids, seed, epoch, view, out)
    return out


def check_effects(effects: npt.NDArray[np.void] | None, augment: Augment, count: int) -> npt.NDArray[np.void] | None:
    """The records as the kernels take them; None where there are none.

    Raises:
        DataError: no records although `augment` draws them, or records of another type or number.
    """
    if effects is None:
        if augment.draws_effects:
            raise DataError("effects: expected records as sample_effects returns them, since augment draws some")
        return None
    if getattr(effects, "dtype", None) != EFFECTS or effects.shape != (count,):
        found = f"{getattr(effects, 'dtype', type(effects).__name__)} {getattr(effects, 'shape', '')}"
        raise DataError(f"effects: expected {count} records as sample_effects returns them, found {found}")
    return np.ascontiguousarray(effects)


def check_source(source: Any, rows: npt.ArrayLike | None, params: npt.NDArray[np.void]) -> tuple[Any, Any, int]:
    """(source, rows, channels): an array and int64 rows, or a list of arrays [H, W, C] and None.

    Raises:
        DataError: images that are not uint8 of 1 or 3 channels, or rows and params that do not fit them.
    """
    if getattr(params, "dtype", None) != PARAMETERS or params.ndim != 1:
        found = f"{getattr(params, 'dtype', type(params).__name__)}"
        raise DataError(f"params: expected records [B] as sample_parameters returns them, found {found}")
    if is_tensor(source):
        if source.device.type != "cpu":
            raise DataError(
                f"source: expected images in the CPU's memory, found {source.device}; move them with .cpu()"
            )
        source = source.detach().numpy()
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise DataError(f"source: expected uint8 images [N, H, W, C], found shape {source.shape}")
        _check_image(source, source.shape[1:])
        if rows is None:
            picked = np.arange(len(params), dtype=np.int64)
        else:
            picked = np.ascontiguousarray(rows, dtype=np.int64).reshape(-1)
        if len(picked) != len(params):
            raise DataError(f"params: expected {len(picked)} records, one per row, found {len(params)}")
        return source, picked, source.shape[3]
    if rows is not None:
        raise DataError("rows: expected None with a list of images, found an array")
    images = [image[:, :, None] if image.ndim == 2 else image for image in source]
    if len(images) != len(params):
        raise DataError(f"params: expected {len(images)} records, one per image, found {len(params)}")
    for image in images:
        if image.ndim != 3:
            raise DataError(f"source: expected uint8 images [H, W, C], found shape {image.shape}")
        _check_image(image, image.shape)
        if image.shape[2] != images[0].shape[2]:
            raise DataError(
                f"source: expected images of {images[0].shape[2]} channels as the first, found {image.shape[2]}"
            )
    return images, None, images[0].shape[2] if images else 3


def _check_image(array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.dtype != np.uint8:
        raise DataError(f"source: expected uint8 images, found {array.dtype}")
    if shape[2] not in (1, 3) or shape[0] < 1 or shape[1] < 1 or max(shape) >= 1 << 24:
        raise DataError(f"source: expected images of at least 1 x 1 pixels and 1 or 3 channels, found {shape}")


def check_output(
    out: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype | None,
    channels_last: bool,
    device: torch.device | None = None,
) -> torch.Tensor:
    """`out` when it fits, or a fresh tensor of that shape on `device` (None: the CPU).

    Raises:
        DataError: `out` of another shape, dtype, device or memory order.
        OptionError: a dtype other than float32, bfloat16, float16, or uint8 on the CPU.
    """
    import torch

    wanted = dtype if dtype is not None else torch.float32 if out is None else out.dtype
    on_cpu = device is None or device.type == "cpu"
    if wanted not in (torch.float32, torch.bfloat16, torch.float16) and not (wanted == torch.uint8 and on_cpu):
        known = "float32, bfloat16, float16 or uint8" if on_cpu else "float32, bfloat16 or float16 on CUDA"
        raise OptionError(f"dtype: expected torch.{known}, found {wanted}")
    order = torch.channels_last if channels_last else torch.contiguous_format
    place = torch.device("cpu") if device is None else device
    if out is None:
        return torch.empty(tuple(shape), dtype=wanted, memory_format=order, device=place)
    if tuple(out.shape) != tuple(shape) or out.dtype != wanted or out.device != place:
        where = "the CPU" if place.type == "cpu" else str(place)
        raise DataError(
            f"out: expected {wanted} {tuple(shape)} on {where}, found {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if not out.is_contiguous(memory_format=order):
        raise DataError(f"out: expected memory in {order}, found strides {out.stride()}")
    return out


def output_shape(augment: Augment, count: int, channels: int, dtype: torch.dtype | None) -> tuple[int, ...]:
    """[B, C, size, size].

    Raises:
        OptionError: gradients as uint8, which has no negative numbers.
    """
    import torch

    if augment.sobel and dtype == torch.uint8:
        raise OptionError("dtype: expected a floating-point type with sobel, found torch.uint8")
    return (count, augment.output_channels(channels), augment.size, augment.size)


def augment(
    source: npt.NDArray[np.uint8] | torch.Tensor | Sequence[npt.NDArray[np.uint8]] | DeviceImages,
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
    """Crop, resample, flip, jitter, gray, blur and normalise a batch of images in one pass each.

    Equal to torchvision.transforms.v2 in float on the same parameters, within 0.01 of 255. The same bits for every
    number of threads. Runs where the images are: on a CUDA device for a tensor there, and for what `upload_images` has
    put there.

    Args:
        source: uint8 [N, H, W, C] with C = 1 or 3, numpy or torch, or a list of B arrays uint8 [H, W, C] of any sizes,
            or such a list on a device.
        params: [B] records of sample_parameters (or edited ones); honoured exactly.
        augment: the size, the order of gray and jitter, the normalisation, the blur's kernel, gradients.
        effects: [B] records of sample_effects (or edited ones); needed where augment draws tone, blur or noise.
        rows: int64 [B], the images of an array to take; default the first B.
        out: [B, C, size, size] tensor to write into, where the images are; default a new one.
        dtype: torch.float32, bfloat16 or float16; or uint8, which is not normalised: [0, 1] becomes 0..255, rounded.
            Default that of out, or float32.
        channels_last: NHWC memory (the shape stays NCHW).
        threads: CPU threads, 0 = all processors.

    Returns:
        [B, C, size, size] tensor: out, where given. C is 2 with augment.sobel.

    Raises:
        DataError: images, rows, params, effects or out that do not fit together.
        OptionError: an unknown dtype.
        ResourceError: a launch on a CUDA device that failed.

    Example:
        >>> images = np.zeros((2, 8, 8, 3), np.uint8)
        >>> drawn = sample_parameters(Augment.sela(32), 8, 8, [0, 1], seed=0, epoch=0)
        >>> from sela_ext.kernels import augment
        >>> augment(images, drawn, Augment.sela(32)).shape
        torch.Size([2, 3, 32, 32])
    """
    if cuda_place(source) is not None:
        from sela_ext.kernels.augment_resident import augment_given

        return augment_given(source, params, augment, effects, rows, out, dtype, channels_last)
    from sela_ext.kernels.augment_device import DeviceImages, augment_uploaded

    if isinstance(source, DeviceImages):
        if rows is not None:
            raise DataError("rows: expected None with uploaded images, found an array")
        if source.planar:
            raise DataError("source: expected images as upload_images puts them there, found planes; augment_planes")
        return augment_uploaded(
            source,
            params,
            augment,
            effects=effects,
            exact=False,
            out=out,
            dtype=dtype,
            channels_last=channels_last,
            threads=threads,
        )
    images, picked, channels = check_source(source, rows, params)
    drawn = check_effects(effects, augment, len(params))
    shape = output_shape(augment, len(params), channels, out.dtype if dtype is None and out is not None else dtype)
    result = check_output(out, shape, dtype, channels_last)
    options, further = augment_options(augment, channels), effect_options(augment)
    records = np.ascontiguousarray(params)
    target = (result.data_ptr(), str(result.dtype).removeprefix("torch."), channels_last, threads)
    try:
        if picked is None:
            images = [_pixels_together(image) for image in images]
            _core.augment_list(options, further, images, records, drawn, *target)
        else:
            images = _pixels_together(images)
            _core.augment_array(options, further, images, picked, records, drawn, *target)
    except ValueError as error:
        raise DataError(str(error)) from error
    return result


def augment_views(
    source: npt.NDArray[np.uint8] | torch.Tensor | Sequence[npt.NDArray[np.uint8]] | DeviceImages,
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
    """Several views of every image, as multi-crop training takes them; the images are decoded once.

    View i is drawn with the number first_view + i: the same as `sample_parameters`, `sample_effects` and `augment` with
    that number.

    Args:
        source: images as for `augment`; on a device these are uploaded once for all views.
        views: what each view is, as `Augment.multi_crop` returns them.
        index: int64 [B], the images' ids in [0, 2^40).
        seed: the key, [0, 2^64).
        epoch: [0, 2^32).
        first_view: number of the first view; all are within [0, 256).
        rows: int64 [B], the images of an array to take; default the first B.
        dtype: as for `augment`.
        channels_last: NHWC memory.
        threads: CPU threads, 0 = all processors.

    Returns:
        One tensor [B, C, views[i].size, views[i].size] per view.

    Raises:
        DataError: images, rows or index that do not fit together.
        OptionError: seed, epoch or a view's number out of range, an unknown dtype.

    Example:
        >>> images = np.zeros((2, 40, 50, 3), np.uint8)
        >>> views = Augment.multi_crop((32, 16), (1, 2))
        >>> [tuple(batch.shape) for batch in augment_views(images, views, [0, 1], seed=0, epoch=0)]
        [(2, 3, 32, 32), (2, 3, 16, 16), (2, 3, 16, 16)]
    """
    from sela_ext.kernels.augment_device import DeviceImages

    if isinstance(source, DeviceImages):
        heights, widths = source.heights.astype(np.int64), source.widths.astype(np.int64)
    else:
        shapes = [source.shape[1:3]] if hasattr(source, "shape") else [image.shape[:2] for image in source]
        heights, widths = np.array(shapes, dtype=np.int64).reshape(-1, 2).T
    batches = []
    for view, what in enumerate(views, first_view):
        params = sample_parameters(what, heights, widths, index, seed=seed, epoch=epoch, view=view)
        effects = sample_effects(what, index, seed=seed, epoch=epoch, view=view) if what.draws_effects else None
        batches.append(
            augment(
                source,
                params,
                what,
                effects=effects,
                rows=rows,
                dtype=dtype,
                channels_last=channels_last,
                threads=threads,
            )
        )
    return batches


def _pixels_together(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """`array` itself when every row of pixels is contiguous in memory, else a copy."""
    channels, width = array.shape[-1], array.shape[-2]
    row, pixel, byte = array.strides[-3:]
    fits = (byte == 1 or channels == 1) and (pixel == channels or width == 1) and row >= width * channels
    return array if fits and min(array.strides) >= 0 else np.ascontiguousarray(array)


def permutation(n: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A random order of 0 .. n - 1: Fisher-Yates, keyed by Philox4x32-10 (purpose shuffle).

    Args:
        n: how many, >= 0.
        seed: the key, [0, 2^64).
        epoch: [0, 2^32).

    Returns:
        int64 [n], every number once.

    Raises:
        OptionError: n, seed or epoch out of range.

    Example:
        >>> sorted(permutation(5, seed=0, epoch=3).tolist())
        [0, 1, 2, 3, 4]
    """
    check_key(seed, epoch)
    if n < 0:
        raise OptionError(f"n: expected a number >= 0, found {n}")
    return _core.shuffle(n, seed, epoch)
