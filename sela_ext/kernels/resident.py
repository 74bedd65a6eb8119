"""What can be augmented on the device where it lies, and batches of it: `augment_resident` for data sets.

Note [Images that come again]
    Where an epoch shows an image several times, each time is drawn with a number of its own (`keys`), beyond those of
    the images. The kernel draws by the number of the image that it reads; so keys are drawn by the kernel that only
    draws, and what it has drawn, which stays on the device, is given to the other. Nothing is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sela_ext.errors import OptionError, ResourceError, SelaError
from sela_ext.kernels.augment import PARAMETERS, Augment, augment_options, check_key
from sela_ext.kernels.augment_resident import augment_resident, check_resident, run_cuda
from sela_ext.kernels.device import first_line, usable

if TYPE_CHECKING:
    import torch

    from sela_ext.kernels.device import CudaDevice


def resident_refusal(shape: Sequence[int], augment: Augment, dtype: torch.dtype | None = None) -> str | None:
    """Why the CUDA kernels cannot augment these images; None where they can.

    Args:
        shape: of the images, uint8 [N, H, W, C].
        augment: what may be drawn, and the output's size.
        dtype: of the output; None = float32.

    Example:
        >>> resident_refusal((50_000, 32, 32, 3), Augment.cifar(32)) is None
        True
        >>> resident_refusal((8, 32, 32, 4), Augment.sela(32))
        'expected uint8 [N, H, W, C] with C = 1 or 3, found torch.uint8 (8, 32, 32, 4)'
    """
    import torch

    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        return f"expected float32, bfloat16 or float16 on CUDA, found {dtype}"
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
        index: int64 [B] there, numbers in [0, N).
        keys: int64 [B] there, what parameters are drawn with, see Note [Images that come again]; None: `index`.
        augment: what is drawn, without effects where there are keys.
        seed: the key, [0, 2^64).
        epoch: [0, 2^32).
        view: [0, 256).
        dtype: of the output.
        channels_last: its memory order.

    Returns:
        [B, C, size, size], on the current stream, which is not waited for.

    Raises:
        OptionError: keys with effects.
        ResourceError: a launch that failed.
    """
    import torch

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
    check_key(seed, epoch, view)
    if augment.draws_effects:
        raise OptionError("keys: expected an augmentation without tone, blur and noise, found one that draws them")
    card = usable(images.device)
    assert card is not None
    height, width, channels = (int(n) for n in images.shape[1:])
    drawn = torch.empty(len(keys), PARAMETERS.itemsize // 4, dtype=torch.int32, device=images.device)
    _sample(card, augment, (height, width, channels), keys, (seed, epoch, view), drawn)
    return run_cuda(card, images, index, augment, (0, 0, 0), drawn, None, None, dtype, channels_last, False)[0]


def _sample(
    card: CudaDevice, augment: Augment, shape: tuple[int, int, int], keys: Any, key: tuple[int, int, int], drawn: Any
) -> None:
    """Draw by `keys`, int64 [B], into int32 [B, 15] beside them."""
    height, width, channels = shape
    options = augment_options(augment, channels)
    with card.current():
        try:
            card.core.sample_parameters_cuda(
                options, height, width, keys.data_ptr(), len(keys), *key, drawn.data_ptr(), card.stream()
            )
        except RuntimeError as error:
            raise ResourceError(first_line(error)) from error
