"""Twin of `sela_ext.kernels.vectors`, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sela_ext.kernels.reference.augment import philox4x32
from sela_ext.kernels.vectors import DROPOUT_PARTS, VectorView, check_rows

_VECTOR = 6  # the purpose, in csrc/sela/philox.h
_GROUP = 8  # features that share three draws
# Of the sum of four bytes.
_BYTE_SUM = 510
_BYTE_SCALE = np.float32(1.0) / np.float32(147.80054127)


def vector_rows(
    rows: npt.NDArray[Any],
    index: npt.ArrayLike,
    view: VectorView | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    number: npt.ArrayLike | None = None,
    view_number: int = 0,
    out: npt.NDArray[np.float32] | None = None,
    threads: int = 0,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """See `sela_ext.kernels.vector_rows`; `threads` is not looked at."""
    chosen, keys = check_rows(rows, index, number)
    with np.errstate(over="ignore"):
        found = rows[chosen].astype(np.float32)
    finite = np.asarray(np.isfinite(found).all(axis=1))
    if view is not None and (view.noise.any() or view.dropout_parts):
        noise, halves = _drawn(keys, rows.shape[1], seed, epoch, view_number)
        kept_scale = np.float32(1) / (np.float32(1) - np.float32(view.dropout_parts) / np.float32(DROPOUT_PARTS))
        scale = np.where(halves < view.dropout_parts, np.float32(0), kept_scale)
        with np.errstate(invalid="ignore", over="ignore"):
            seen = (found - view.mean) * (scale if view.dropout_parts else np.float32(1))
            if view.noise.any():
                seen = seen + view.noise * noise
            found = view.mean + seen
    if out is not None:
        out[...] = found
        found = out
    return found, finite


def _drawn(
    keys: npt.NDArray[np.int64], width: int, seed: int, epoch: int, view: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint64]]:
    """Noise float32 [B, D] and 16-bit numbers [B, D]."""
    groups = -(-width // _GROUP)
    number = keys.astype(np.uint64)[:, None]
    draw = np.arange(3 * groups, dtype=np.uint64)[None]
    shape = len(keys), 3 * groups
    counter = np.stack(
        [
            np.broadcast_to(number & np.uint64(0xFFFFFFFF), shape),
            ((number >> np.uint64(32)) << np.uint64(24)) | np.uint64(view << 16) | draw,
            np.full(shape, epoch, np.uint64),
            np.full(shape, _VECTOR, np.uint64),
        ],
        axis=-1,
    )
    words = philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32]).reshape(len(keys), groups, 3, 4)
    of_noise = words[:, :, :2].reshape(len(keys), -1)
    sums = sum((of_noise >> np.uint64(shift)) & np.uint64(0xFF) for shift in (0, 8, 16, 24))
    noise = (np.asarray(sums).astype(np.int64) - _BYTE_SUM).astype(np.float32) * _BYTE_SCALE
    of_dropout = words[:, :, 2]
    halves = np.stack([of_dropout & np.uint64(0xFFFF), of_dropout >> np.uint64(16)], axis=-1).reshape(len(keys), -1)
    return noise[:, :width], halves[:, :width]
