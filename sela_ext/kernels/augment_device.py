"""Augmentation on a CUDA device of images of any size: what lies there already, and what is uploaded for it.

Uploaded are the bytes of the images alone, uint8 [H, W, C] or the planes of JPEG files, in one copy from pinned memory
with all records; floats are made on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sela_ext import _core
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels.augment import (
    PARAMETERS,
    Augment,
    augment_options,
    check_effects,
    check_output,
    effect_options,
    output_shape,
)
from sela_ext.kernels.augment_planes import Planes, check_params, planar_tuple
from sela_ext.kernels.device import first_line, place_of, usable

if TYPE_CHECKING:
    import torch

    from sela_ext.kernels.device import CudaDevice

CROPS = np.dtype([("data", np.uint64), ("height", np.int32), ("width", np.int32), ("stride", np.int64)])
"""One image in device memory, as csrc/sela/augment.h lays out ImageView."""

_PLANE = [
    *(("data", np.uint64), ("stride", np.int64)),
    *((name, np.int32) for name in ("top", "left", "height", "width", "full_height", "full_width", "step_y", "step_x")),
    *(("smooth_y", np.bool_), ("smooth_x", np.bool_), ("room", np.uint8, (6,))),
]
PLANAR = np.dtype(
    [
        *(("plane", _PLANE, (3,)), ("count", np.int32), ("rgb", np.bool_), ("room", np.uint8, (3,))),
        *(("height", np.int32), ("width", np.int32)),
    ]
)
"""One image as planes, as csrc/sela/planes.h lays out PlanarImage."""

_ALIGNMENT = 16  # bytes; of every image's first one, and of the records


@dataclasses.dataclass(frozen=True)
class DeviceImages:
    """A batch of images of any sizes on a device, for `augment`, `augment_planes` and `augment_views`.

    Made by `upload_images` and `upload_planes`. Several views may be taken of one upload.

    Attributes:
        host: the images, uint8 [H, W, C] or `Planes`; a device whose kernels are not used has its work done from them.
        place: the device.
        heights: int32 [B], pixels.
        widths: int32 [B].
        channels: of the images, 1 or 3; 3 for planes.
        memory: bytes and records on the device; None where its kernels are not used, and on the CPU.
        records: where in `memory` the records begin, bytes.
    """

    host: tuple[Any, ...]
    place: torch.device
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    channels: int
    memory: torch.Tensor | None
    records: int

    def __len__(self) -> int:
        return len(self.host)

    @property
    def planar(self) -> bool:
        """Whether these are planes."""
        return bool(self.host) and isinstance(self.host[0], Planes)


def upload_images(images: Sequence[npt.NDArray[np.uint8]], device: torch.device | str | int = "cuda") -> DeviceImages:
    """Copy images of any sizes to a device, in one transfer that is not waited for.

    Args:
        images: B arrays uint8 [H, W, C] (or [H, W]) with the same C of 1 or 3.
        device: "cuda", "cuda:1", ...; or "cpu", where nothing is copied.

    Returns:
        DeviceImages, a source for `augment` and `augment_views`.

    Raises:
        DataError: images that are not uint8 of 1 or 3 channels.
        OptionError: an unknown device.
        ResourceError: no such device.

    Example:
        >>> from sela_ext.kernels import Augment, augment, sample_parameters, upload_images
        >>> batch = upload_images([np.zeros((40, 50, 3), np.uint8), np.zeros((9, 70, 3), np.uint8)], "cpu")
        >>> drawn = sample_parameters(Augment.sela(32), batch.heights, batch.widths, [0, 1], seed=0, epoch=0)
        >>> augment(batch, drawn, Augment.sela(32)).shape
        torch.Size([2, 3, 32, 32])
    """
    from sela_ext.kernels.augment import check_source

    arrays, _, channels = check_source(list(images), None, np.zeros(len(images), PARAMETERS))
    place, card = _open(device)
    return put_images(card, place, arrays, channels)


def upload_planes(planes: Sequence[Planes], device: torch.device | str | int = "cuda") -> DeviceImages:
    """The same for the planes of JPEG files: half of the bytes of RGB where chroma has half of the resolution.

    Args:
        planes: B images.
        device: as for `upload_images`.

    Returns:
        DeviceImages, a source for `augment_planes`.

    Raises:
        DataError: something else than `Planes`.
        OptionError: an unknown device.
        ResourceError: no such device.

    Example:
        >>> from sela_ext.kernels import Augment, Planes, augment_planes, sample_parameters, upload_planes
        >>> y, c = np.zeros((10, 15), np.uint8), np.zeros((5, 8), np.uint8)
        >>> batch = upload_planes([Planes((y, c, c), 10, 15, subsampling="4:2:0")], "cpu")
        >>> drawn = sample_parameters(Augment.sela(8), batch.heights, batch.widths, [0], seed=0, epoch=0)
        >>> augment_planes(batch, drawn, Augment.sela(8)).shape
        torch.Size([1, 3, 8, 8])
    """
    from sela_ext.kernels.augment_planes import check_planes

    check_planes(planes, 3)
    place, card = _open(device)
    return put_planes(card, place, planes)


def _open(device: Any) -> tuple[torch.device, CudaDevice | None]:
    """The device, and the card behind it; None where no kernels of a card are used."""
    import torch

    if str(device) == "cpu":
        return torch.device("cpu"), None
    place = place_of(device)
    return place, usable(place)


def put_images(
    card: CudaDevice | None, place: torch.device, images: Sequence[npt.NDArray[np.uint8]], channels: int
) -> DeviceImages:
    """`upload_images` of checked ones to a card."""
    sizes = np.array([image.shape[:2] for image in images], np.int32).reshape(-1, 2)
    records = np.zeros(len(images), CROPS)
    records["height"], records["width"] = sizes.T
    records["stride"] = records["width"].astype(np.int64) * channels

    def describe(addresses: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        records["data"] = addresses
        return records

    memory, start = _copied(card, place, list(images), records.nbytes, describe)
    return DeviceImages(tuple(images), place, sizes[:, 0].copy(), sizes[:, 1].copy(), channels, memory, start)


def put_planes(card: CudaDevice | None, place: torch.device, planes: Sequence[Planes]) -> DeviceImages:
    """`upload_planes` to a card."""
    sizes = np.array([(image.height, image.width) for image in planes], np.int32).reshape(-1, 2)
    source = [planar_tuple(image) for image in planes]
    counts = [len(image.data) for image in planes]
    size = _core.plane_records(source, np.zeros((len(source), 3), np.int64)).nbytes

    def describe(addresses: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        places, at = np.zeros((len(counts), 3), np.int64), 0
        for i, count in enumerate(counts):
            places[i, :count] = addresses[at : at + count]
            at += count
        return _core.plane_records(source, places)

    memory, start = _copied(card, place, [plane for image in planes for plane in image.data], size, describe)
    return DeviceImages(tuple(planes), place, sizes[:, 0].copy(), sizes[:, 1].copy(), 3, memory, start)


def _copied(
    card: CudaDevice | None, place: torch.device, arrays: list[npt.NDArray[np.uint8]], size: int, describe: Any
) -> tuple[torch.Tensor | None, int]:
    """Arrays one after the other in device memory, then records of `size` bytes: describe(addresses)."""
    import torch

    if card is None or not arrays:
        return None, 0
    lengths = np.array([array.nbytes for array in arrays], np.int64)
    ends = np.cumsum(-(-lengths // _ALIGNMENT) * _ALIGNMENT)
    offsets, start = ends - -(-lengths // _ALIGNMENT) * _ALIGNMENT, int(ends[-1])
    staging = torch.empty(start + size, dtype=torch.uint8, pin_memory=place.type == "cuda")
    memory = torch.empty(start + size + _ALIGNMENT, dtype=torch.uint8, device=place)
    shift = -memory.data_ptr() % _ALIGNMENT
    room = staging.numpy()
    for array, offset, length in zip(arrays, offsets, lengths, strict=True):
        room[offset : offset + length].reshape(array.shape)[:] = array
    room[start:] = describe(memory.data_ptr() + shift + offsets).view(np.uint8).reshape(-1)
    memory[shift : shift + start + size].copy_(staging, non_blocking=True)
    return memory, shift + start


def augment_uploaded(
    images: DeviceImages,
    params: npt.NDArray[np.void],
    augment: Augment,
    *,
    effects: npt.NDArray[np.void] | None,
    exact: bool,
    out: torch.Tensor | None,
    dtype: torch.dtype | None,
    channels_last: bool,
    threads: int,
) -> torch.Tensor:
    """`augment` and `augment_planes` of an uploaded batch."""
    if images.memory is None:
        return _from_host(images, params, augment, effects, exact, out, dtype, channels_last, threads)
    card = usable(images.place)
    if card is None:
        return _from_host(images, params, augment, effects, exact, out, dtype, channels_last, threads)
    return run_uploaded(card, images, params, augment, effects, exact, out, dtype, channels_last)


def _from_host(
    images: DeviceImages,
    params: npt.NDArray[np.void],
    augment: Augment,
    effects: npt.NDArray[np.void] | None,
    exact: bool,
    out: torch.Tensor | None,
    dtype: torch.dtype | None,
    channels_last: bool,
    threads: int,
) -> torch.Tensor:
    """By the CPU, then on to the device where the images belong."""
    from sela_ext.kernels.augment import augment as augment_on_cpu
    from sela_ext.kernels.augment_planes import augment_planes

    on_cpu = images.place.type == "cpu"
    given = out if on_cpu else None
    kind = dtype if out is None or dtype is not None else out.dtype
    if images.planar:
        result = augment_planes(
            images.host, params, augment, effects=effects, exact=exact, out=given, dtype=kind,
            channels_last=channels_last, threads=threads,
        )  # fmt: skip
    else:
        result = augment_on_cpu(
            images.host, params, augment, effects=effects, out=given, dtype=kind, channels_last=channels_last,
            threads=threads,
        )  # fmt: skip
    if on_cpu:
        return result
    there = check_output(out, tuple(result.shape), dtype, channels_last, images.place)
    return there.copy_(result)


def drawn_needs(augment: Augment) -> tuple[bool, bool, bool, float]:
    """Which steps images of `augment` may need: (contrast, tone, any effect, longest deviation of a blur)."""
    contrast = augment.jitters and augment.factor_range("contrast") != (1.0, 1.0)
    blur = augment.blur_sigma[1] if augment.blur_probability > 0 else 0.0
    return contrast, augment.tone_probability > 0, augment.draws_effects, blur


def given_needs(params: npt.NDArray[np.void], effects: npt.NDArray[np.void] | None) -> tuple[bool, bool, bool, float]:
    """The same of given records."""
    contrast = bool(((params["jitter"] != 0) & (params["contrast"] != 1)).any())
    if effects is None or not len(effects):
        return contrast, False, False, 0.0
    tone, blur = bool((effects["tone"] != 0).any()), float(effects["blur"].max())
    return contrast, tone, tone or blur > 0 or bool((effects["noise"] > 0).any()), blur


def run_uploaded(
    card: CudaDevice,
    images: DeviceImages,
    params: npt.NDArray[np.void],
    augment: Augment,
    effects: npt.NDArray[np.void] | None,
    exact: bool,
    out: torch.Tensor | None,
    dtype: torch.dtype | None,
    channels_last: bool,
) -> torch.Tensor:
    """Check, allocate and launch, whatever the device's self-check says."""
    records = check_params(params, len(images))
    drawn = check_effects(effects, augment, len(images))
    options = augment_options(augment, images.channels)
    try:
        if images.planar:
            _core.check_planes(options, [planar_tuple(image) for image in images.host], records)
        else:
            for i in range(len(images)):
                _core.check_parameters(options, records[i : i + 1], int(images.heights[i]), int(images.widths[i]))
    except ValueError as error:
        raise DataError(str(error)) from error
    assert images.memory is not None or not len(images)
    place = _address(images.memory) + images.records
    sides = (int(images.heights.max(initial=1)), int(images.widths.max(initial=1)))
    return launch(
        card,
        augment,
        images.place,
        len(images),
        images.channels,
        sides,
        given=(records, drawn),
        key=(0, 0, 0),
        out=out,
        dtype=dtype,
        channels_last=channels_last,
        crops=0 if images.planar else place,
        planes=place if images.planar else 0,
        exact=exact and images.planar,
    )[0]


def _address(memory: torch.Tensor | None) -> int:
    return 0 if memory is None else memory.data_ptr()


def launch(
    card: CudaDevice,
    augment: Augment,
    place: torch.device,
    count: int,
    channels: int,
    sides: tuple[int, int],
    *,
    given: tuple[npt.NDArray[np.void] | None, npt.NDArray[np.void] | None],
    key: tuple[int, int, int],
    out: torch.Tensor | None,
    dtype: torch.dtype | None,
    channels_last: bool,
    resident: tuple[int, int] = (0, 0),
    crops: int = 0,
    planes: int = 0,
    exact: bool = False,
    index: int = 0,
    want_parameters: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate and launch for checked arguments: addresses of one of the three sources, sides of the largest image.

    Returns the output, and what was drawn as int32 [B, 15] ([0, 15] unless asked for).
    """
    import torch

    kind = out.dtype if dtype is None and out is not None else dtype
    result = check_output(out, output_shape(augment, count, channels, kind), dtype, channels_last, place)
    params, effects = given
    words = PARAMETERS.itemsize // 4
    drawn = torch.empty(count if want_parameters else 0, words, dtype=torch.int32, device=place)
    if not count:
        return result, drawn
    needs = drawn_needs(augment) if params is None else given_needs(params, effects)
    parts = [np.ascontiguousarray(part).view(np.int32).reshape(-1) for part in (params, effects) if part is not None]
    uploaded = torch.from_numpy(np.concatenate(parts)).to(place) if parts else None
    first = _address(uploaded)
    further = first + 4 * words * count if params is not None else 0
    records = (0 if params is None else first, 0 if effects is None else further)
    _launch_at(
        card, augment, count, channels, sides, needs=needs, records=records, key=key, result=result,
        channels_last=channels_last, resident=resident, crops=crops, planes=planes, exact=exact, index=index,
        drawn=drawn.data_ptr() if want_parameters else 0,
    )  # fmt: skip
    return result, drawn


def launch_planes(
    card: CudaDevice,
    augment: Augment,
    result: torch.Tensor,
    *,
    planes: int,
    records: tuple[int, int],
    needs: tuple[bool, bool, bool, float],
    sides: tuple[int, int],
    exact: bool,
    channels_last: bool,
) -> None:
    """Make the views of images whose planes and parameters lie on a device already, checked by who put them there.

    Args:
        card: The device.
        augment: What was drawn.
        result: [B, C, size, size] there, is filled on the current stream.
        planes: Address of B records of PLANAR.
        records: Addresses of B records of PARAMETERS, and of EFFECTS or 0.
        needs: As `given_needs` says of them.
        sides: Of the largest box, pixels.
        exact: As for `augment_planes`.
        channels_last: Memory format of the result.

    Raises:
        OptionError: An output that the kernels do not make.
        ResourceError: A launch that failed.
    """
    _launch_at(
        card, augment, len(result), 3, sides, needs=needs, records=records, key=(0, 0, 0), result=result,
        channels_last=channels_last, resident=(0, 0), crops=0, planes=planes, exact=exact, index=0, drawn=0,
    )  # fmt: skip


def _launch_at(
    card: CudaDevice,
    augment: Augment,
    count: int,
    channels: int,
    sides: tuple[int, int],
    *,
    needs: tuple[bool, bool, bool, float],
    records: tuple[int, int],
    key: tuple[int, int, int],
    result: torch.Tensor,
    channels_last: bool,
    resident: tuple[int, int],
    crops: int,
    planes: int,
    exact: bool,
    index: int,
    drawn: int,
) -> None:
    """Launch for addresses on the device, on its current stream."""
    import torch

    options, further = augment_options(augment, channels), effect_options(augment)
    try:
        with card.current():
            size = card.core.augment_workspace_cuda(options, further, channels, *sides, count, needs)
            workspace = torch.empty(-(-size // 16) + 1, 4, dtype=torch.int32, device=result.device)
            card.core.augment_device_cuda(
                options,
                further,
                *resident,
                crops,
                planes,
                exact,
                *sides,
                channels,
                index,
                count,
                needs,
                *key,
                *records,
                drawn,
                workspace.data_ptr() + -workspace.data_ptr() % 16,
                result.data_ptr(),
                str(result.dtype).removeprefix("torch."),
                channels_last,
                card.stream(),
            )
    except ValueError as error:
        raise OptionError(str(error)) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ResourceError(first_line(error)) from error
