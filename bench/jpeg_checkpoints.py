"""How much a GPU finds to do at once in JPEG files: entries per image, and how unequal they are within a warp.

    SELA_DATA_DIR=folder python bench/jpeg_checkpoints.py [--quick]

Nothing is timed. Photographs as a whole, and eight boxes of RandomResizedCrop in each: checkpoints that a decoder
begins at, entropy-coded bits behind each of them, and what a warp of 32 consecutive ones waits for, its longest, as a
multiple of their mean. Then the bytes per image: of the upload, of coefficients, of planes. The table is in
docs/design/0010-jpeg-on-the-gpu.md.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np

from sela_ext import _core
from sela_ext.kernels import Augment, jpeg_header, jpeg_index, sample_parameters

BOXES = 8
WARP = 32
# csrc/sela/jpeg_batch.h, JpegDeviceEntry: an upload begins with them.
ENTRY = np.dtype(
    [
        ("begin", "<u4"),
        ("end", "<u4"),
        ("image", "<u4"),
        ("mcu", "<u4"),
        ("dc", "<i2", 3),
        ("next", "<i2", 3),
        ("bit", "u1"),
        ("next_bit", "u1"),
        ("mcus", "u1"),
        ("checked", "u1"),
    ]
)


def entry_bits(entries: np.ndarray) -> np.ndarray:
    """Bits from each checkpoint to the next one."""
    return (entries["end"].astype(np.int64) - 2 - entries["begin"]) * 8 + entries["next_bit"] - entries["bit"]


def waits(bits: np.ndarray, warp: int = WARP) -> tuple[float, float]:
    """(what all warps have to do, what they wait for): sums over warps of all entries, of the longest for each."""
    parts = [bits[start : start + warp] for start in range(0, len(bits), warp)]
    return float(bits.sum()), float(sum(warp * int(part.max()) for part in parts))


def boxes_of(height: int, width: int, number: int) -> list[tuple[int, int, int, int]]:
    """Boxes of RandomResizedCrop."""
    index = np.arange(BOXES) + BOXES * number
    drawn = sample_parameters(Augment.sela(224), height, width, index, seed=0, epoch=0)
    return [tuple(int(record[name]) for name in ("top", "left", "height", "width")) for record in drawn]


def look(
    files: Sequence[bytes], indexes: Sequence[bytes], boxes: Sequence[tuple[int, int, int, int]]
) -> dict[str, float]:
    """What a batch of these files gives, per image."""
    batch = _core.JpegBatch(files, indexes, boxes, 1 << 40, 1 << 40)
    upload = np.empty(batch.upload_bytes, np.uint8)
    batch.write(upload.ctypes.data)
    images = batch.images()
    entries = upload[: ENTRY.itemsize * sum(image["entries"] for image in images)].view(ENTRY)
    bits = entry_bits(entries[entries["checked"] != 0])
    work, longest = waits(bits)
    return {
        "entries": len(entries) / len(images),
        "bytes per entry": float(bits.mean()) / 8,
        "spread": float(bits.std() / bits.mean()),
        "longest / mean in a warp": longest / work,
        "file": sum(map(len, files)) / len(files),
        "upload": batch.upload_bytes / len(images),
        "coefficients": batch.coefficient_bytes / len(images),
        "planes": batch.plane_bytes / len(images),
        "blocks of threads": batch.work_count / len(images),
        "tiles": batch.tile_count / len(images),
    }


def main() -> None:
    options = common.arguments("What a GPU finds to do at once in JPEG files.").parse_args()
    folder = Path(os.environ.get("SELA_DATA_DIR", "data"))
    paths = sorted(folder.glob("*.JPEG"))[:: 10 if options.quick else 1]
    read = [path.read_bytes() for path in paths]
    found = [(data, jpeg_index(data), jpeg_header(data)) for data in read]
    taken = [(data, index, header) for data, index, header in found if index is not None and header is not None]
    if not taken:
        raise SystemExit(f"expected photographs (*.JPEG) in {folder}, found none: set SELA_DATA_DIR")
    files, indexes = [data for data, _, _ in taken], [index for _, index, _ in taken]
    drawn = [boxes_of(header.height, header.width, i) for i, (_, _, header) in enumerate(taken)]
    whole = look(files, indexes, [(0, 0, 0, 0)] * len(files))
    repeated = [i for i in range(len(files)) for _ in range(BOXES)]
    part = look([files[i] for i in repeated], [indexes[i] for i in repeated], [box for boxes in drawn for box in boxes])
    counts = [look([data], [index], [(0, 0, 0, 0)])["entries"] for data, index, _ in taken]
    quartiles = statistics.quantiles(counts, n=4)
    common.table(
        f"{len(files)} photographs, {BOXES} boxes each; entries per whole image: {min(counts):.0f} to "
        f"{max(counts):.0f}, quartiles {', '.join(f'{q:.0f}' for q in quartiles)}",
        ("per image", "whole", "boxes"),
        [(name, f"{whole[name]:,.2f}", f"{part[name]:,.2f}") for name in whole],
    )


if __name__ == "__main__":
    main()
