"""JPEG files to planes on the card: a part of gpu.py.

Boxes of RandomResizedCrop of photographs (SELA_DATA_DIR; generated files without it), with their checkpoint indexes.
Every sample is compared with the CPU's first. Timed are the kernels alone, on files that lie on the card, and the call
that plans, uploads, decodes and asks for the statuses, beside the CPU decoding the same boxes (one thread) and
uploading the planes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numpy as np

from sela_ext import kernels
from sela_ext.kernels import Augment
from sela_ext.kernels.check_jpeg import encoded, planes_difference
from sela_ext.kernels.jpeg_cuda import prepared, uploaded

if TYPE_CHECKING:
    from gpu import Card

    Box = tuple[int, int, int, int]

SEED = 7
BATCH = 256


def photographs(count: int) -> list[bytes]:
    """Baseline files, again and again where there are fewer."""
    paths = sorted(Path(os.environ.get("SELA_DATA_DIR", "data")).glob("*.JPEG"))[:count]
    found = [data for data in (path.read_bytes() for path in paths) if kernels.jpeg_header(data) is not None]
    if not found:
        rng = np.random.default_rng(SEED)
        y, x = np.mgrid[:375, :500]
        for _ in range(min(count, 16)):
            shade = 127 + 90 * np.sin(
                x[..., None] * rng.uniform(0.01, 0.1, 3) + y[..., None] * rng.uniform(0.01, 0.1, 3)
            )
            pixels = np.clip(shade + rng.normal(0, 9, shade.shape), 0, 255).astype(np.uint8)
            found.append(encoded(pixels, 2, quality=90))
    return [found[i % len(found)] for i in range(count)]


def boxes_of(files: list[bytes]) -> list[Box]:
    """A box of RandomResizedCrop in each."""
    boxes = []
    for i, data in enumerate(files):
        header = kernels.jpeg_header(data)
        assert header is not None
        drawn = kernels.sample_parameters(Augment.sela(224), header.height, header.width, [i], seed=SEED, epoch=0)
        top, left, height, width = (int(drawn[name][0]) for name in ("top", "left", "height", "width"))
        boxes.append((top, left, height, width))
    return boxes


def jpeg_case(card: Card, copy: float, rounds: int) -> list[dict[str, Any]]:
    """One batch of boxes; share of the copy bandwidth: of upload and planes, what has to move."""
    files = photographs(3 if card.dry else BATCH)
    indexes, boxes = [kernels.jpeg_index(data) for data in files], boxes_of(files)

    def on_cpu() -> list[Any]:
        return [
            uploaded(kernels.decode_planes(file, box, index=index), card.place)
            for file, index, box in zip(files, indexes, boxes, strict=True)
        ]

    competitors: dict[str, Callable[[], Any]] = {"CPU, one thread, and upload of planes": on_cpu}
    moved = 0
    if card.device is not None:
        competitors["sela_ext, with plan, upload and statuses"] = lambda: kernels.decode_planes_cuda(
            files, indexes, boxes, device=card.place
        )
        for number, planes in enumerate(kernels.decode_planes_cuda(files, indexes, boxes, device=card.place)):
            difference = planes_difference(planes, kernels.decode_planes(files[number], boxes[number]))
            if difference is not None:
                raise SystemExit(f"no agreement: file {number}: {difference}; nothing is timed")
        launch, group = prepared(card.device, files, indexes, boxes, workspace=1 << 32)
        assert group.taken == len(files)
        competitors["sela_ext, kernels alone"] = launch
        moved = group.uploaded + int(group.planes.numel())
    seconds = card.medians(competitors, rounds)
    table, recorded = [], []
    for label, value in seconds.items():
        share = moved / 1e9 / value / copy if label.endswith("alone") else None
        table.append((label, len(files) / value, value * 1e3, share and f"{share:.0%}"))
        recorded.append(
            {
                "case": "jpeg to planes",
                "what": label,
                "batch": len(files),
                "images_per_second": len(files) / value,
                "seconds": value,
                "bytes": moved,
                "share_of_copy": share,
            }
        )
    common.table(
        f"JPEG files to planes, {len(files)} boxes of RandomResizedCrop, with indexes; every sample is the CPU's",
        ("", "images / s", "ms", "of copy bandwidth"),
        table,
    )
    return recorded
