"""How fast this machine loads these images, and what memory and disk training takes."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

import numpy as np

from sela_ext.assign.plan import available_memory, memory_plan
from sela_ext.data import Loader, Source
from sela_ext.data.decode import HEAD_BYTES, decode_image, sniff
from sela_ext.data.loader import BATCHES_AHEAD
from sela_ext.data.pack_plan import SMALL_PIXELS
from sela_ext.data.source import Int64Array
from sela_ext.doctor.table import Table
from sela_ext.errors import DataError
from sela_ext.kernels import Augment
from sela_ext.kernels.jpeg import jpeg_index
from sela_ext.training.resolve import Plan

# Images to measure with, and the time after which enough was measured.
_SAMPLE_BYTES, _FEWEST, _MOST, _SECONDS = 1 << 27, 64, 4096, 2.0
# Width of the embeddings that a label pass keeps: that of resnet18 and of most small networks.
FEATURES = 512
# Part of the free memory that decoded images may take for good.
_RESIDENT_SHARE = 0.5


def throughput(
    source: Source, good: Int64Array, pixels: float, augment: Augment, threads: int
) -> dict[str, Any] | None:
    """Measure decoding on one thread, and loading with augmentation on all of them.

    Args:
        source: The images.
        good: Rows that can be read.
        pixels: Of an image, in the mean.
        augment: Of the training steps.
        threads: Threads of the loader.

    Returns:
        For the JSON; None where nothing can be read.
    """
    if not len(good):
        return None
    most = int(np.clip(_SAMPLE_BYTES / max(1.0, pixels * 3), _FEWEST, _MOST))
    rows = good[np.unique(np.linspace(0, len(good) - 1, most).astype(np.int64))]
    decoded, decode_seconds, indexes, indexed = _decode(source, rows) if source.encoded else (0, 0.0, 0, 0)
    loader = Loader(
        source.subset(rows),
        batch_size=min(64, len(rows)),
        augment=augment,
        threads=threads,
        on_bad_image="skip",
        max_bad_fraction=1.0,
    )
    images, began = 0, time.perf_counter()
    for batch in loader.epoch(0):
        images += len(batch.index)
        if time.perf_counter() - began > _SECONDS:
            break
    seconds = max(time.perf_counter() - began, 1e-9)
    rate = images / seconds
    return {
        "measured_images": images,
        "decode_images_per_second_one_thread": round(decoded / max(decode_seconds, 1e-9), 1)
        if source.encoded
        else None,
        "load_images_per_second": round(rate, 1),
        "threads": threads,
        "load_seconds_per_epoch": round(len(source) / max(rate, 1e-9), 2),
        "index_share_of_bytes": round(indexes / indexed, 5) if indexed else None,
    }


def _decode(source: Source, rows: Int64Array) -> tuple[int, float, int, int]:
    """Images decoded and seconds taken by it; bytes of JPEG indexes, and of the files that they are of."""
    done, spent, indexes, indexed = 0, 0.0, 0, 0
    for row in rows:
        name = source.name(int(row))
        try:
            data = source.encoded_bytes(int(row))
            began = time.thread_time()
            decode_image(data, name)
            spent += time.thread_time() - began
        except DataError:
            continue  # read a moment ago: the file has changed since
        done += 1
        index = jpeg_index(data) if sniff(data[:HEAD_BYTES]) == "JPEG" else None
        if index is not None:
            indexes, indexed = indexes + len(index), indexed + len(data)
        if spent > _SECONDS:
            break
    return done, spent, indexes, indexed


def memory(count: int, channels: int, plan: Plan, table: Table) -> dict[str, Any]:
    """Memory of training: label pass, loader, and all images decoded.

    Args:
        count: N.
        channels: of the images.
        plan: of the run.
        table: of the images; its own size is reported too.
    """
    options = plan.options
    clusters = max(options.clusters)
    size = plan.augment.size
    free = available_memory()
    stored = memory_plan(count, clusters)
    computed = memory_plan(count, clusters, source="features")
    resident = count * size * size * channels
    return {
        "available_bytes": free,
        "label_pass": {
            "clusters": clusters,
            "stored_logits_bytes": stored.total,
            "computed_logits_bytes": computed.total,
            "stored_logits_fit": free is None or stored.total <= free,
            "embeddings_bytes": count * FEATURES * 4,
            "features": FEATURES,
        },
        "loader_bytes": (BATCHES_AHEAD + 1) * options.batch_size * channels * size * size * 4,
        "resident_bytes": resident,
        "resident_fits": free is None or resident <= _RESIDENT_SHARE * free,
        "check_bytes": table.nbytes,
    }


def disk(table: Table, count: int, looked_at: int, index_share: float | None, *, encoded: bool) -> dict[str, Any]:
    """Disk that the images take, and that an index or a pack of them would.

    Args:
        table: Of the images looked at.
        count: N.
        looked_at: Those of the data among the rows of the table.
        index_share: Bytes of an index per byte of JPEG; None where there are none.
        encoded: Whether the images are encoded files.
    """
    rows = np.flatnonzero(~table.held)
    scale = count / max(1, looked_at)
    total = int(table.bytes[rows].sum() * scale)
    good = rows[table.good[rows]]
    pixels = table.height[good].astype(np.int64) * table.width[good]
    one_size = len(good) > 0 and np.ptp(table.height[good]) == 0 and np.ptp(table.width[good]) == 0
    as_pixels = encoded and one_size and pixels[0] <= SMALL_PIXELS and not table.orientations
    index = None if index_share is None else int(total * index_share)
    return {
        "bytes": total,
        "mean_bytes": round(total / max(1, count), 1),
        "index_bytes": index,
        "pack_bytes": int(pixels.sum() * 3 * scale) if as_pixels else total + (index or 0),
        "pixels_bytes": int(pixels.sum() * 3 * scale),
        "free_bytes": shutil.disk_usage(os.curdir).free,
    }
