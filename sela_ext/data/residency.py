"""Data sets that are kept on the device which trains on them: uint8 images of one size, augmented where they lie.

Note [Kept on the device]
    The pixels go to the device once. Of each epoch its order follows, eight bytes per image, and then nothing more:
    a batch is a launch per view, or a few for large images and effects, on the consumer's own stream, which draw,
    crop, resample and normalise, and write the batch. No thread works ahead, and nothing is waited for. Order and
    drawn parameters are the bits of the CPU's batches, pixels are within 0.01 of 255 of theirs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from sela_ext.data.source import Int64Array, Source, UInt8Array
from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels import Augment
from sela_ext.kernels.device import free_memory, indexed, on_card, usable
from sela_ext.kernels.resident import resident_refusal

Wish = bool | Literal["auto"]

# Share of the free memory that a data set may take where nobody has planned for what else is to be there.
UNPLANNED_SHARE = 0.5
# Bytes that are gathered and sent at once: of a memory map no more is in memory at a time.
_PIECE = 1 << 25


@dataclass(frozen=True)
class Residency:
    """Whether images are kept on the device, and why.

    Attributes:
        kept: They are.
        reason: In words, with numbers.
        nbytes: What they take there; 0 where they are not kept.
    """

    kept: bool
    reason: str
    nbytes: int = 0


def plan_residency(
    source: Source,
    views: Sequence[Augment],
    dtype: torch.dtype,
    device: torch.device,
    *,
    wish: Wish = "auto",
    room: float | None = None,
) -> Residency:
    """Decide whether the images of a source are kept on a device.

    Args:
        source: The images.
        views: What is done to them there.
        dtype: Of the batches.
        device: Where batches are wanted.
        wish: "auto": where it can be done and there is room for them; True: or else it is an error; False: not.
        room: Bytes that they may take; None: half of what is free.

    Raises:
        OptionError: They are to be kept, and the device or the kernels cannot do that.
        ResourceError: They are to be kept, and there is no room.

    Example:
        >>> from sela_ext.data import open_source
        >>> digits, views = open_source("digits"), [Augment.none(32)]
        >>> plan_residency(digits, views, torch.float32, torch.device("cpu")).reason
        'not kept: batches are made on the CPU, where the images are'
    """
    if wish is False:
        return Residency(False, "not kept: resident is False")
    problem = _refusal(source, views, dtype, device)
    if problem is not None:
        if wish is True:
            raise OptionError(f"resident: expected images that can be kept on the device, found {problem}")
        return Residency(False, f"not kept: {problem}")
    nbytes = bytes_of(source)
    free = float(free_memory(device))
    allowed = UNPLANNED_SHARE * free if room is None else room
    if nbytes > allowed:
        words = f"{size(nbytes)} of images, room for {size(max(allowed, 0))} of {size(free)} free on {device}"
        if wish is True:
            raise ResourceError(f"resident: expected images that fit beside all else, found {words}; use resident auto")
        return Residency(False, f"not kept: {words}")
    return Residency(True, f"kept on the device: {size(nbytes)} of {size(free)} free", nbytes)


def _refusal(source: Source, views: Sequence[Augment], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the images of a source cannot be kept on a device, whatever room there is; None where they can."""
    if not on_card(device):
        return "batches are made on the CPU, where the images are"
    lying = source.array_rows
    if lying is None:
        return "images that lie in files, or have different sizes"
    shape = (len(source), *lying[0].shape[1:])
    problem = next((found for view in views if (found := resident_refusal(shape, view, dtype)) is not None), None)
    if problem is not None:
        return f"images that CUDA kernels do not augment: {problem}"
    if usable(indexed(device)) is None:
        return f"{device}, whose kernels are not used"
    return None


def bytes_of(source: Source) -> int:
    """Bytes of all images of a source that has an array of them."""
    lying = source.array_rows
    assert lying is not None
    return len(source) * math.prod(lying[0].shape[1:])


class ResidentImages:
    """The images of a source on a device, for all loaders of that source. They go there at their first use.

    Args:
        source: Images in an array, see `Source.array_rows`.
        device: Where they are kept.

    Attributes:
        shape: (N, H, W, C).

    Example:
        >>> from sela_ext.data import open_source
        >>> kept = ResidentImages(open_source(np.zeros((5, 8, 8, 3), np.uint8)), torch.device("cpu"))
        >>> kept.shape, kept.images().dtype
        ((5, 8, 8, 3), torch.uint8)
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        lying = source.array_rows
        if lying is None:
            raise OptionError(f"resident: expected images in an array, found {source.describe()}")
        array, rows = lying
        self.shape: tuple[int, int, int, int] = (len(source), *array.shape[1:])
        self._device = indexed(device)
        self._array, self._rows = array, rows
        self._images: torch.Tensor | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return math.prod(self.shape)

    @property
    def there(self) -> bool:
        """Whether they have been sent."""
        return self._images is not None

    def fits(self, source: Source) -> bool:
        """Whether these are the images of a source, as far as numbers and sizes tell."""
        lying = source.array_rows
        return lying is not None and self.shape == (len(source), *lying[0].shape[1:])

    def images(self) -> torch.Tensor:
        """uint8 [N, H, W, C] on the device, complete for every stream."""
        with self._lock:
            if self._images is None:
                self._images = _sent(self._array, self._rows, self.shape, self._device)
            return self._images

    def close(self) -> None:
        """Let go of the memory on the device; the next use sends them anew."""
        with self._lock:
            self._images = None


def _sent(
    array: UInt8Array, rows: Int64Array | None, shape: tuple[int, int, int, int], device: torch.device
) -> torch.Tensor:
    """A copy of images on a device, piece by piece; it is waited for."""
    there = torch.empty(shape, dtype=torch.uint8, device=device)
    step = max(1, _PIECE // math.prod(shape[1:]))
    for begin in range(0, shape[0], step):
        place = slice(begin, begin + step)
        piece = np.array(array[place if rows is None else rows[place]])  # a copy: memory maps may not be written to
        there[place].copy_(torch.from_numpy(piece))  # of memory that is not pinned: done when it returns
    card = usable(device) if on_card(device) else None
    if card is not None:
        card.synchronize()  # whichever stream uses them
    return there


class Orders:
    """The part of an epoch's order that is still to come, on the device.

    Args:
        index: Numbers of the images, int64 [L].
        keys: What is drawn for them goes by these, int64 [L].
        device: Where it goes; it is not waited for.
    """

    def __init__(self, index: Int64Array, keys: Int64Array, device: torch.device) -> None:
        same = bool(np.array_equal(index, keys))
        self._index = to_device(index, device)
        self._keys = None if same else to_device(keys, device)

    def piece(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Numbers and keys of positions begin .. end - 1; None: the keys are the numbers."""
        return self._index[begin:end], None if self._keys is None else self._keys[begin:end]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What lies on the device."""
        return [self._index] if self._keys is None else [self._index, self._keys]


def to_device(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Numbers on a device: sent from pinned memory, on the current stream, which is not waited for."""
    here = torch.from_numpy(np.ascontiguousarray(numbers))
    if device.type == "cpu":
        return here
    with torch.cuda.device(device):
        return here.pin_memory().to(device, non_blocking=True)


def size(nbytes: float) -> str:
    """Write bytes for people, in powers of 1,000 as memory is sold.

    Example:
        >>> size(154_000_000), size(900), size(78.2e9)
        ('154 MB', '900 B', '78.2 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
