"""Indexed JPEG files to planes on a CUDA device, for whoever augments there.

What is uploaded are the entropy-coded bytes of a box and a record of 32 bytes per checkpoint, less than half of what
the decoded planes would be. Files that the kernels do not take (no index, another kind of JPEG, anything with an
anomaly) are decoded on the CPU and uploaded; the samples are the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sela_ext.errors import DataError, OptionError, ResourceError, SelaError
from sela_ext.kernels.device import CudaDevice, first_line, place_of, usable
from sela_ext.kernels.jpeg import MAX_PIXELS, JpegPlanes, check_box, check_bytes, decode_planes

if TYPE_CHECKING:
    import torch

    from sela_ext.kernels.jpeg import Box

# Bytes of coefficients on the device at a time: some 100 boxes or more, about the second-level cache of a large card.
WORKSPACE = 64 << 20
# Files that are looked at for one group.
_MOST_FILES = 16384
# Why a file went to the CPU, by the bits that the kernels set (csrc/sela/jpeg_batch.h).
_REASONS = ((1, "damaged"), (2, "foreign index"), (4, "damaged"))


@dataclass(frozen=True)
class DevicePlane:
    """Samples of one component in device memory; see `JpegPlane`, whose attributes these are.

    Attributes:
        samples: uint8 [h, w] on the device, rows possibly apart.
        top: row of samples[0] in the component.
        left: column of samples[:, 0] in the component.
        full_height: rows of the whole component.
        full_width: columns of the whole component.
        step_y: pixels per sample, vertically.
        step_x: pixels per sample, horizontally.
        smooth_y: whether libjpeg interpolates vertically.
        smooth_x: whether libjpeg interpolates horizontally.
    """

    samples: torch.Tensor
    top: int
    left: int
    full_height: int
    full_width: int
    step_y: int
    step_x: int
    smooth_y: bool
    smooth_x: bool


@dataclass(frozen=True)
class DevicePlanes:
    """What a box needs, in device memory.

    Attributes:
        planes: one for "grey", three for "ycc" and "rgb".
        colour: what the planes are.
        box: (top, left, height, width) in pixels of the image.
        reason: empty where the device decoded the file; else why the CPU did.
    """

    planes: tuple[DevicePlane, ...]
    colour: Literal["grey", "ycc", "rgb"]
    box: Box
    reason: str = field(default="")


def decode_planes_cuda(
    files: Sequence[Any],
    indexes: Sequence[bytes | None],
    boxes: Iterable[Iterable[int] | None] | None = None,
    *,
    device: Any = "cuda",
    max_pixels: int = MAX_PIXELS,
    workspace: int = WORKSPACE,
) -> list[DevicePlanes]:
    """`decode_planes(file, box, index=index)` of many files, decoded on a CUDA device and left there.

    Waits for the device: only its word tells whether a file must go to the CPU.

    Args:
        files: The bytes of each file.
        indexes: The checkpoint index of each, as `jpeg_index` makes it; None: that file goes to the CPU.
        boxes: (top, left, height, width) in pixels of each, or None for the whole image; None for whole images.
        device: "cuda", "cuda:1", 1 or a torch.device.
        max_pixels: Largest height * width that a header may claim.
        workspace: Bytes of device memory for coefficients; files are decoded in groups that need no more, or alone.

    Returns:
        DevicePlanes of each file, in order.

    Raises:
        DataError: A file that Pillow refuses as well.
        OptionError: Lists that do not fit together, a box outside of its image, or a device that is none.
        ResourceError: No such device, a launch that failed, or a CUDA graph in the making.

    Example:
        >>> decode_planes_cuda([], [], device="cpu")
        Traceback (most recent call last):
            ...
        sela_ext.errors.OptionError: device: expected "cuda" or "cuda:N", found 'cpu'
    """
    place = place_of(device)
    files, indexes = list(files), list(indexes)
    chosen = _boxes(len(files), boxes)
    if len(indexes) != len(files):
        raise OptionError(
            f"indexes: expected one per file, or None in its place, found {len(indexes)} for {len(files)}"
        )
    card = usable(place)
    if card is None:
        return [
            _by_cpu(i, file, index, box, place, max_pixels, "the device's kernels are not used")
            for i, (file, index, box) in enumerate(zip(files, indexes, chosen, strict=True))
        ]
    return run_cuda(card, files, indexes, chosen, max_pixels, workspace)


def _boxes(count: int, boxes: Iterable[Iterable[int] | None] | None) -> list[Box | None]:
    if boxes is None:
        return [None] * count
    chosen = [None if box is None else check_box(box, f"boxes[{i}]") for i, box in enumerate(boxes)]
    if len(chosen) != count:
        raise OptionError(f"boxes: expected one per file, found {len(chosen)} for {count}")
    return chosen


@dataclass(frozen=True)
class DeviceGroup:
    """Files that are decoded together, and where their planes and statuses will be.

    Attributes:
        images: what became of each file that was taken: `JpegBatch.images`.
        taken: how many.
        uploaded: bytes.
        planes: uint8, device memory of all planes.
        status: int32, one of each image that the kernels got; 0 = decoded.
    """

    images: list[dict[str, Any]]
    taken: int
    uploaded: int
    planes: torch.Tensor
    status: torch.Tensor


def run_cuda(
    card: CudaDevice,
    files: Sequence[Any],
    indexes: Sequence[bytes | None],
    boxes: Sequence[Box | None],
    max_pixels: int = MAX_PIXELS,
    workspace: int = WORKSPACE,
) -> list[DevicePlanes]:
    """`decode_planes_cuda` on a device, whatever its self-check says."""
    card.refuse_capture("decode_planes_cuda")
    groups: list[DeviceGroup] = []
    done = 0
    while done < len(files):
        some = slice(done, done + _MOST_FILES)
        launch, group = prepared(card, files[some], indexes[some], boxes[some], max_pixels, workspace, done)
        launch()
        groups.append(group)
        done += group.taken
    found: list[DevicePlanes] = []
    for group in groups:
        words = group.status.tolist()  # waits for the device
        for image in group.images:
            reason = image["status"] if image["status"] != "ok" else _reason(words[image["image"]])
            i = len(found)
            if reason:
                found.append(_by_cpu(i, files[i], indexes[i], boxes[i], card.place, max_pixels, reason))
            else:
                planes = tuple(_plane(group.planes, plane) for plane in image["planes"])
                found.append(DevicePlanes(planes, image["colour"], image["box"]))
    return found


def prepared(
    card: CudaDevice,
    files: Sequence[Any],
    indexes: Sequence[bytes | None],
    boxes: Sequence[Box | None],
    max_pixels: int = MAX_PIXELS,
    workspace: int = WORKSPACE,
    first: int = 0,
) -> tuple[Callable[[], None], DeviceGroup]:
    """Uploads as many files as the workspace has room for: (the launch, where its results will be). Waits for nothing.

    Args:
        card: the device.
        files: as for `decode_planes_cuda`, as the following ones are.
        indexes: one per file, or None in its place.
        boxes: likewise.
        max_pixels: Largest height * width that a header may claim.
        workspace: Bytes for coefficients.
        first: number of the first file among all, for messages.
    """
    import torch

    place, cuda = card.place, card.place.type == "cuda"
    for i, (file, index) in enumerate(zip(files, indexes, strict=True), start=first):
        check_bytes(f"files[{i}]", file)
        if index is not None:
            check_bytes(f"indexes[{i}]", index)
    fours = [(0, 0, 0, 0) if box is None else box for box in boxes]
    try:
        batch = card.core.JpegBatch(files, indexes, fours, workspace, max_pixels)
    except (ValueError, BufferError) as error:
        raise OptionError(_numbered(error, first)) from error
    upload = torch.empty(batch.upload_bytes, dtype=torch.uint8, pin_memory=cuda)
    batch.write(upload.data_ptr())
    with card.current():
        sent = upload.to(place, non_blocking=True)
        planes = torch.empty(batch.plane_bytes, dtype=torch.uint8, device=place)
        scratch = torch.empty(batch.workspace_bytes, dtype=torch.uint8, device=place)
        status = torch.zeros(batch.image_count, dtype=torch.int32, device=place)
    addresses = [tensor.data_ptr() for tensor in (sent, scratch, planes, status)]

    def launch(keep: tuple[torch.Tensor, ...] = (sent, scratch)) -> None:
        with card.current():
            try:
                card.core.decode_jpeg_cuda(batch, *addresses, card.stream())
            except RuntimeError as error:
                raise ResourceError(first_line(error)) from error

    return launch, DeviceGroup(batch.images(), batch.taken, batch.upload_bytes, planes, status)


def _numbered(error: Exception, first: int) -> str:
    """The message, with the number that the file has among all."""
    message = first_line(error)
    name, bracket, rest = message.partition("[")
    number, closing, words = rest.partition("]")
    return f"{name}[{int(number) + first}]{words}" if bracket and closing and number.isdigit() else message


def _reason(word: int) -> str:
    return next((reason for bit, reason in _REASONS if word & bit), "")


def _plane(memory: torch.Tensor, plane: dict[str, Any]) -> DevicePlane:
    facts = dict(plane)
    offset, stride, height, width = (facts.pop(name) for name in ("offset", "stride", "height", "width"))
    return DevicePlane(memory.as_strided((height, width), (stride, 1), memory.storage_offset() + offset), **facts)


def _by_cpu(
    number: int,
    file: Any,
    index: bytes | None,
    box: Box | None,
    place: torch.device,
    max_pixels: int,
    reason: str,
) -> DevicePlanes:
    """Planes of the CPU's decoder, uploaded."""
    try:
        found = decode_planes(file, box, index=index, max_pixels=max_pixels)
    except SelaError as error:
        kind = DataError if isinstance(error, DataError) else OptionError
        raise kind(f"files[{number}]: {error}") from error
    return uploaded(found, place, reason)


def uploaded(found: JpegPlanes, place: torch.device, reason: str = "") -> DevicePlanes:
    """Planes in the CPU's memory as planes in a device's."""
    import numpy as np
    import torch

    planes = []
    for plane in found.planes:
        facts = {name: getattr(plane, name) for name in DevicePlane.__dataclass_fields__ if name != "samples"}
        planes.append(DevicePlane(torch.from_numpy(np.ascontiguousarray(plane.samples)).to(place), **facts))
    return DevicePlanes(tuple(planes), found.colour, found.box, reason)
