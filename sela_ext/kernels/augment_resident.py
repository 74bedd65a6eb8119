"""Augmentation of a uint8 data set on the device where it lies: parameters are drawn there too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from sela_ext import _core
from sela_ext.errors import DataError, ResourceError
from sela_ext.kernels.augment import (
    PARAMETERS,
    Augment,
    augment_options,
    check_effects,
    check_key,
    check_output,
    output_shape,
    sample_effects,
    sample_parameters,
)
from sela_ext.kernels.augment import augment as augment_on_cpu
from sela_ext.kernels.device import cuda_place, first_line, is_tensor, on_card, usable

if TYPE_CHECKING:
    import torch

    from sela_ext.kernels.device import CudaDevice

_WORDS = PARAMETERS.itemsize // 4
"""One record as 32-bit words."""


@overload
def augment_resident(
    images: torch.Tensor | npt.NDArray[np.uint8],
    index: npt.ArrayLike | torch.Tensor,
    augment: Augment,
    *,
    seed: int,
    epoch: int,
    view: int = ...,
    out: torch.Tensor | None = ...,
    dtype: torch.dtype | None = ...,
    channels_last: bool = ...,
    return_parameters: Literal[False] = ...,
    threads: int = ...,
) -> torch.Tensor: ...


@overload
def augment_resident(
    images: torch.Tensor | npt.NDArray[np.uint8],
    index: npt.ArrayLike | torch.Tensor,
    augment: Augment,
    *,
    seed: int,
    epoch: int,
    view: int = ...,
    out: torch.Tensor | None = ...,
    dtype: torch.dtype | None = ...,
    channels_last: bool = ...,
    return_parameters: Literal[True],
    threads: int = ...,
) -> tuple[torch.Tensor, npt.NDArray[np.void]]: ...


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
    """Draw the parameters of images `index` and augment these, where `images` lie.

    The same as ``params = sample_parameters(augment, H, W, index, seed=seed, epoch=epoch, view=view)`` and
    ``augment(images, params, augment, rows=index)``, with `sample_effects` where there are any. On a CUDA device it is
    one launch on the current stream for images and outputs of at most 64 pixels a side without effects, and a few for
    others; they are not waited for. Parameters have the same bits there, and pixels are within 0.01 of 255. On a
    device whose kernels are not used (see `sela_ext.kernels.device_verdict`) the images of the batch visit the CPU.

    Args:
        images: uint8 [N, H, W, C] with C = 1 or 3, numpy or torch; contiguous on CUDA.
        index: int64 [B], numbers of images in [0, N), which are also the ids that parameters are drawn with. Numbers
            that lie on a CUDA device are not looked at before the launch: one outside [0, N) gives NaN.
        augment: what may be drawn, and the output's size.
        seed: the key, [0, 2^64).
        epoch: [0, 2^32).
        view: several views of an image in one epoch differ by this, [0, 256).
        out: [B, C, size, size] tensor to write into, where the images are; default a new one.
        dtype: torch.float32, bfloat16 or float16, or uint8 on the CPU, as for `augment`; default that of out, or
            float32.
        channels_last: NHWC memory (the shape stays NCHW).
        return_parameters: also return the records [B] of PARAMETERS; on CUDA this waits for the launch.
        threads: CPU threads, 0 = all processors.

    Returns:
        [B, C, size, size] tensor: out, where given; and the records, if asked for. C is 2 with augment.sobel.

    Raises:
        DataError: images, index or out that do not fit together.
        OptionError: seed, epoch, view or dtype out of range.
        ResourceError: a launch on a CUDA device that failed.

    Example:
        >>> images = np.zeros((5, 32, 32, 3), np.uint8)
        >>> augment_resident(images, [4, 0, 4], Augment.cifar(32), seed=0, epoch=1).shape
        torch.Size([3, 3, 32, 32])
    """
    import torch

    source: Any = images
    if torch.compiler.is_compiling() and isinstance(source, torch.Tensor) and out is None and not return_parameters:
        from sela_ext.kernels import ops

        return ops.augment_resident(
            source,
            torch.as_tensor(index),
            augment,
            seed=seed,
            epoch=epoch,
            view=view,
            dtype=dtype,
            channels_last=channels_last,
            threads=threads,
        )
    check_key(seed, epoch, view)
    place = cuda_place(source)
    if place is not None:
        key = (seed, epoch, view)
        card = usable(place)
        if card is None:
            result, params = run_refused(source, index, augment, key, None, None, out, dtype, channels_last)
            return (result, params) if return_parameters else result
        result, words = run_cuda(
            card, source, index, augment, key, None, None, out, dtype, channels_last, return_parameters
        )
        return (result, as_records(words)) if return_parameters else result
    source = source.detach().numpy() if is_tensor(source) else source
    if not isinstance(source, np.ndarray) or source.ndim != 4:
        found = getattr(source, "shape", type(source).__name__)
        raise DataError(f"images: expected uint8 images [N, H, W, C], found {found}")
    rows = check_index(index, len(source))
    params = sample_parameters(augment, source.shape[1], source.shape[2], rows, seed=seed, epoch=epoch, view=view)
    effects = sample_effects(augment, rows, seed=seed, epoch=epoch, view=view) if augment.draws_effects else None
    result = augment_on_cpu(
        source,
        params,
        augment,
        effects=effects,
        rows=rows,
        out=out,
        dtype=dtype,
        channels_last=channels_last,
        threads=threads,
    )
    return (result, params) if return_parameters else result


def augment_given(
    images: Any,
    params: npt.NDArray[np.void],
    augment: Augment,
    effects: npt.NDArray[np.void] | None,
    rows: npt.ArrayLike | torch.Tensor | None,
    out: torch.Tensor | None,
    dtype: torch.dtype | None,
    channels_last: bool,
) -> torch.Tensor:
    """kernels.augment for images on a CUDA device: uploads the parameters, which are checked before."""
    picked = np.arange(len(params)) if rows is None else rows
    card = usable(images.device)
    if card is None:
        return run_refused(images, picked, augment, (0, 0, 0), params, effects, out, dtype, channels_last)[0]
    return run_cuda(card, images, picked, augment, (0, 0, 0), params, effects, out, dtype, channels_last, False)[0]


def check_index(index: npt.ArrayLike | torch.Tensor, count: int) -> npt.NDArray[np.int64]:
    """Numbers of images as int64 [B] in the CPU's memory.

    Raises:
        DataError: numbers that are not integers or lie outside [0, count).
    """
    given = index.detach().cpu().numpy() if is_tensor(index) else np.asarray(index)  # type: ignore[union-attr]
    if given.size and given.dtype.kind not in "iu":
        raise DataError(f"index: expected integers, found {given.dtype}")
    rows = np.ascontiguousarray(given, dtype=np.int64).reshape(-1)
    if rows.size and (rows.min() < 0 or rows.max() >= count):
        bad = rows.max() if rows.max() >= count else rows.min()
        raise DataError(f"index: expected image numbers in [0, {count}), found {bad}")
    return rows


def check_resident(images: Any) -> None:
    """Refuse images that the CUDA kernels do not take.

    Raises:
        DataError: not contiguous uint8 [N, H, W, C] with C = 1 or 3.
    """
    import torch

    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or min(shape[1:]) < 1:
        raise DataError(f"images: expected uint8 [N, H, W, C] with C = 1 or 3, found {images.dtype} {shape}")
    if not images.is_contiguous():
        raise DataError(f"images: expected contiguous memory, found strides {images.stride()}; call .contiguous() once")


def takes_one_launch(height: int, width: int, augment: Augment, effects: npt.NDArray[np.void] | None) -> bool:
    """Whether the kernel for small images does these: one block per image, all of which is in its shared memory."""
    fits = max(height, width, augment.size) <= _core.AUGMENT_CUDA_SIDE
    return fits and effects is None and not (augment.draws_effects or augment.sobel)


def run_refused(
    images: Any,
    index: Any,
    augment: Augment,
    key: tuple[int, int, int],
    params: npt.NDArray[np.void] | None,
    effects: npt.NDArray[np.void] | None,
    out: torch.Tensor | None,
    dtype: torch.dtype | None,
    channels_last: bool,
) -> tuple[torch.Tensor, npt.NDArray[np.void]]:
    """The same for images on a device whose kernels are not used: the images of the batch visit the CPU."""
    import torch

    device = images.device
    check_resident(images)
    rows = check_index(index, len(images))
    height, width, channels = (int(n) for n in images.shape[1:])
    shape = output_shape(augment, len(rows), channels, dtype)
    result = check_output(out, shape, dtype, channels_last, device)
    if params is None:
        seed, epoch, view = key
        params = sample_parameters(augment, height, width, rows, seed=seed, epoch=epoch, view=view)
        if augment.draws_effects:
            effects = sample_effects(augment, rows, seed=seed, epoch=epoch, view=view)
    batch = images.detach()[torch.from_numpy(rows).to(device)].cpu().numpy()
    result.copy_(
        augment_on_cpu(batch, params, augment, effects=effects, dtype=result.dtype, channels_last=channels_last)
    )
    return result, params


def run_cuda(
    card: CudaDevice,
    images: Any,
    index: Any,
    augment: Augment,
    key: tuple[int, int, int],
    params: npt.NDArray[np.void] | None,
    effects: npt.NDArray[np.void] | None,
    out: torch.Tensor | None,
    dtype: torch.dtype | None,
    channels_last: bool,
    want_parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check, allocate and launch, whatever the device's self-check says.

    Returns the output, and what was drawn as int32 [B, 15] ([0, 15] unless asked for). Without params these and the
    effects are drawn with key = (seed, epoch, view).
    """
    import torch

    from sela_ext.kernels import augment_device

    device = images.device
    check_resident(images)
    if is_tensor(index) and index.device == device and on_card(device):
        if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
            raise DataError(f"index: expected integers, found {index.dtype}")
        rows = index.detach().reshape(-1).to(torch.int64).contiguous()
    else:
        rows = torch.from_numpy(check_index(index, len(images))).to(device)
    channels = int(images.shape[3])
    height, width = int(images.shape[1]), int(images.shape[2])
    options = augment_options(augment, channels)
    records = None if params is None else _checked(params, len(rows), options, height, width)
    drawn_effects = check_effects(effects, augment, len(rows)) if params is not None else None
    if not takes_one_launch(height, width, augment, drawn_effects):
        return augment_device.launch(
            card,
            augment,
            device,
            len(rows),
            channels,
            (height, width),
            given=(records, drawn_effects),
            key=key,
            out=out,
            dtype=dtype,
            channels_last=channels_last,
            resident=(images.data_ptr(), len(images)),
            index=rows.data_ptr(),
            want_parameters=want_parameters,
        )
    result = check_output(out, (len(rows), channels, augment.size, augment.size), dtype, channels_last, device)
    given = None
    if records is not None:
        given = torch.from_numpy(records.view(np.int32).reshape(len(rows), _WORDS)).to(device)
    drawn = torch.empty(len(rows) if want_parameters else 0, _WORDS, dtype=torch.int32, device=device)
    with card.current():
        try:
            card.core.augment_resident_cuda(
                options,
                images.data_ptr(),
                len(images),
                height,
                width,
                channels,
                rows.data_ptr(),
                len(rows),
                *key,
                0 if given is None else given.data_ptr(),
                drawn.data_ptr() if want_parameters else 0,
                result.data_ptr(),
                str(result.dtype).removeprefix("torch."),
                channels_last,
                card.stream(),
            )
        except RuntimeError as error:
            raise ResourceError(first_line(error)) from error
    return result, drawn


def _checked(
    params: npt.NDArray[np.void], count: int, options: _core.AugmentOptions, height: int, width: int
) -> npt.NDArray[np.void]:
    """Records that fit the images, in memory of their own."""
    if getattr(params, "dtype", None) != PARAMETERS or params.ndim != 1:
        found = f"{getattr(params, 'dtype', type(params).__name__)}"
        raise DataError(f"params: expected records [B] as sample_parameters returns them, found {found}")
    if len(params) != count:
        raise DataError(f"params: expected {count} records, one per row, found {len(params)}")
    records = np.array(params)  # contiguous, and writable as torch asks
    try:
        _core.check_parameters(options, records, height, width)
    except ValueError as error:
        raise DataError(str(error)) from error
    return records


def as_records(words: torch.Tensor) -> npt.NDArray[np.void]:
    """What `run_cuda` drew, as records [B] of PARAMETERS."""
    return words.cpu().numpy().view(PARAMETERS).reshape(-1)
