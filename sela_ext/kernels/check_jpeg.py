"""What the self-check of a CUDA device runs of the JPEG decoder: every sample must be the CPU's.

Files of every common sampling, with codes of their own and with the standard ones, with restart markers, whole and in
part; and one batch of more work than a card does at once.
"""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sela_ext.kernels.jpeg import decode_planes, jpeg_index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from sela_ext.kernels.jpeg import Box, JpegPlanes
    from sela_ext.kernels.jpeg_cuda import DevicePlanes

# Pieces of work of 64 entries whose codes differ from one to the next: more than 32 blocks for each of 270
# multiprocessors; and of rows of blocks, two each, more than 16 blocks of four.
MANY_FILES = 9001


class RunsJpeg(Protocol):
    """What the cases need of a device."""

    def decode_planes(
        self, files: Sequence[bytes], indexes: Sequence[bytes], boxes: Sequence[Box | None]
    ) -> list[DevicePlanes]:
        """The CUDA kernels on these files."""


def jpeg_cases(
    runs: RunsJpeg, uniform: Callable[[int, int], npt.NDArray[np.float64]]
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Every case: what it is, and a call that gives None, or what was expected and what was found.

    Args:
        runs: the device.
        uniform: numbers in [0, 1), `uniform(count, stream)`.
    """
    pixels = (256 * uniform(97 * 131 * 3, 6)).reshape(97, 131, 3)
    shade = np.linspace(0, 255, 131)[:, None] * np.linspace(0.2, 1.0, 97)[:, None, None]
    picture = (0.15 * pixels + 0.85 * shade).astype(np.uint8)
    for name, subsampling in (("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2), ("grey", None)):
        files = [
            encoded(picture, subsampling, quality=quality, optimize=optimize, restart_marker_blocks=restart)
            for quality, optimize, restart in ((90, False, 0), (75, True, 0), (40, False, 5), (95, True, 1))
        ]
        yield f"decode_planes, {name}, whole images", partial(_differs, runs, files, [None] * len(files))
        boxes = [(0, 0, 1, 1), (40, 3, 57, 128), (13, 70, 8, 61), (96, 130, 1, 1)]
        yield f"decode_planes, {name}, boxes", partial(_differs, runs, files, boxes)
    small = [encoded(picture[:16, :8], None, quality=quality, optimize=True) for quality in (30, 97)]
    yield f"decode_planes, grey 16 x 8, {MANY_FILES} images", partial(_many_differ, runs, small)


def encoded(pixels: npt.NDArray[np.uint8], subsampling: int | None, **options: Any) -> bytes:
    """A JPEG file; subsampling: as Pillow counts it, None = grey."""
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    if subsampling is None:
        image.convert("L").save(file, "JPEG", **options)
    else:
        image.save(file, "JPEG", subsampling=subsampling, **options)
    return file.getvalue()


def _indexes(files: Sequence[bytes]) -> list[bytes]:
    found = [jpeg_index(file) for file in files]
    assert all(index is not None for index in found)  # the decoder takes what Pillow writes
    return [index for index in found if index is not None]


def _differs(runs: RunsJpeg, files: Sequence[bytes], boxes: Sequence[Box | None]) -> str | None:
    found = runs.decode_planes(files, _indexes(files), boxes)
    for i, (planes, file, box) in enumerate(zip(found, files, boxes, strict=True)):
        difference = planes_difference(planes, decode_planes(file, box))
        if difference is not None:
            return f"image {i}: {difference}"
    return None


def _many_differ(runs: RunsJpeg, files: Sequence[bytes]) -> str | None:
    import torch

    order = [i % len(files) for i in range(MANY_FILES)]
    indexes = _indexes(files)
    found = runs.decode_planes([files[i] for i in order], [indexes[i] for i in order], [None] * len(order))
    expected = [decode_planes(file) for file in files]
    for i, planes in zip(order, found[: len(files)], strict=False):
        difference = planes_difference(planes, expected[i])
        if difference is not None:
            return f"image {i}: {difference}"
    for k in range(len(files)):
        same = torch.stack([planes.planes[0].samples for planes in found[k :: len(files)]])
        wrong = (same != same[0]).flatten(1).any(1) | torch.tensor(
            [bool(planes.reason) for planes in found[k :: len(files)]], device=same.device
        )
        if bool(wrong.any()):
            return (
                f"image {k + len(files) * int(wrong.int().argmax())}: expected the samples of image {k}, found others"
            )
    return None


def planes_difference(found: DevicePlanes, expected: JpegPlanes) -> str | None:
    """What of an image's planes is not as expected, in words; None when all is."""
    if found.reason:
        return f"expected planes, found the status {found.reason!r}"
    if (found.colour, found.box, len(found.planes)) != (expected.colour, expected.box, len(expected.planes)):
        return f"expected {expected.colour} of {expected.box}, found {found.colour} of {found.box}"
    for c, (mine, theirs) in enumerate(zip(found.planes, expected.planes, strict=True)):
        for name in type(mine).__dataclass_fields__:
            if name != "samples" and getattr(mine, name) != getattr(theirs, name):
                return f"{name} of plane {c}: expected {getattr(theirs, name)}, found {getattr(mine, name)}"
        samples = mine.samples.cpu().numpy()
        if samples.shape != theirs.samples.shape:
            return f"plane {c}: expected {theirs.samples.shape} samples, found {samples.shape}"
        wrong = samples != theirs.samples
        if wrong.any():
            y, x = (int(n) for n in np.argwhere(wrong)[0])
            return f"sample ({y}, {x}) of plane {c}: expected {theirs.samples[y, x]}, found {samples[y, x]}"
    return None
