"""What can be augmented on the device where it lies, and batches of it: `augment_resident` for data sets.

Note [Images that come again]
    Where an epoch shows an image several times, each time is drawn with a number of its own (`keys`), beyond those of
    the images. The kernel for small images draws by the number of the image that it reads; so keys are drawn by the
    kernel that only draws, and what it has drawn, which stays on the device, is given to the other. The kernels for all
    others are told where each image of the batch lies, as for uploaded crops, and draw by the keys. Nothing is read
    back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sela_ext.errors import ResourceError, SelaError
from sela_ext.kernels import augment_device
from sela_ext.kernels.augment import PARAMETERS, Augment, augment_options, check_key, check_output, output_shape
from sela_ext.kernels.augment_resident import augment_resident, check_resident, takes_one_launch
from sela_ext.kernels.device import first_line, usable

if TYPE_CHECKING:
    import torch

_LARGEST = 16384  # pixels a side of what the kernels make, see csrc/cuda/augment_large.cu


def resident_refusal(shape: Sequence[int], augment: Augment, dtype: torch.dtype | None = None) -> str | None:
    """Why the CUDA kernels cannot augment these images; None where they can.

    Args:
        shape: of the images, uint8 [N, H, W, C].
        augment: what may be drawn, and the output's size.
        dtype: of the output; None = float32.

    Example:
        >>> resident_refusal((50_000, 32, 32, 3), Augment.cifar(32)) is None
        True
        >>> import torch
        >>> resident_refusal((50_000, 32, 32, 3), Augment.cifar(32), torch.uint8)
        'expected float32, bfloat16 or float16 on CUDA, found torch.uint8'
    """
    import torch

    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        return f"expected float32, bfloat16 or float16 on CUDA, found {dtype}"
    if augment.size > _LARGEST:
        return f"expected outputs of at most {_LARGEST} pixels a side on CUDA, found {augment.size}"
    try:
        check_resident(torch.empty(tuple(shape), dtype=torch.uint8, device="meta"))
    except SelaError as error:
        return str(error).partition(": ")[2]
    return None


def augment_kept(
    images: torch.Tensor,
    index: torch.Tensor,
    keys: torch.Tensor | None,
    augment: Augment,
    *,
    seed: int,
    epoch: int,
    view: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    """`augment_resident` for images on a device whose kernels are used, drawn by other numbers than theirs.

    Args:
        images: uint8 [N, H, W, C] on the device.
        index: int64 [B] there, numbers in [0, N), which nobody looks at any more.
        keys: int64 [B] there, what parameters are drawn with; None: `index`.
        augment: what is drawn.
        seed: the key, [0, 2^64).
        epoch: [0, 2^32).
        view: [0, 256).
        dtype: of the output.
        channels_last: its memory order.

    Returns:
        [B, C, size, size], on the current stream, which is not waited for.

    Raises:
        OptionError: seed, epoch or view out of range, or an output that the kernels do not make.
        ResourceError: a launch that failed.
    """
    if keys is None:
        return augment_resident(
            images,
            index,
            augment,
            seed=seed,
            epoch=epoch,
            view=view,
            dtype=dtype,
            channels_last=channels_last,
        )
    import torch

    check_key(seed, epoch, view)
    card = usable(images.device)
    assert card is not None
    height, width, channels = (int(n) for n in images.shape[1:])
    if not takes_one_launch(height, width, augment, None):
        crops = _crops(images, index)
        return augment_device.launch(
            card,
            augment,
            images.device,
            len(index),
            channels,
            (height, width),
            given=(None, None),
            key=(seed, epoch, view),
            out=None,
            dtype=dtype,
            channels_last=channels_last,
            crops=crops.data_ptr(),
            index=keys.data_ptr(),
        )[0]
    options = augment_options(augment, channels)
    shape = output_shape(augment, len(index), channels, dtype)
    result = check_output(None, shape, dtype, channels_last, images.device)
    drawn = torch.empty(len(keys), PARAMETERS.itemsize // 4, dtype=torch.int32, device=images.device)
    with card.current():
        try:
            stream = card.stream()
            card.core.sample_parameters_cuda(
                options, height, width, keys.data_ptr(), len(keys), seed, epoch, view, drawn.data_ptr(), stream
            )
            card.core.augment_resident_cuda(
                options,
                images.data_ptr(),
                len(images),
                height,
                width,
                channels,
                index.data_ptr(),
                len(index),
                *(0, 0, 0),  # nothing more is drawn
                drawn.data_ptr(),
                0,
                result.data_ptr(),
                str(dtype).removeprefix("torch."),
                channels_last,
                stream,
            )
        except RuntimeError as error:
            raise ResourceError(first_line(error)) from error
    return result


def _crops(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Records of `augment_device.CROPS` of whole images, three words of 64 bits each, made where the images lie."""
    import torch

    height, width, channels = (int(n) for n in images.shape[1:])
    records = torch.empty(len(index), 3, dtype=torch.int64, device=images.device)
    records[:, 0] = index * (height * width * channels) + images.data_ptr()
    records[:, 1] = height | width << 32
    records[:, 2] = width * channels
    return records
