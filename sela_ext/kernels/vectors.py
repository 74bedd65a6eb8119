"""Rows of feature vectors, gathered in float32: as they are, or as noisy views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext import _core
from sela_ext.errors import OptionError
from sela_ext.kernels.augment import check_key

if TYPE_CHECKING:
    import numpy.typing as npt

MOST_FEATURES: int = _core.most_features
TYPES = ("float16", "float32", "float64")
# Shares of left-out features are kept in parts of this.
DROPOUT_PARTS = 65536


@dataclass(frozen=True, eq=False)
class VectorView:
    """A noisy view of feature vectors: features left out at random, noise added.

    With d = x - mean: ``mean + d * kept / (1 - dropout) + noise * g``, g of mean 0 and deviation 1, the centred and
    scaled sum of four random bytes, which is close to a Gaussian.

    Attributes:
        mean: float32 [D], what a left-out feature becomes.
        noise: float32 [D], deviation of the noise of every feature, >= 0.
        dropout: probability that a feature is left out, in [0, 1); kept to 1/65536.
    """

    mean: npt.NDArray[np.float32]
    noise: npt.NDArray[np.float32]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        width = len(self.mean)
        for name in ("mean", "noise"):
            value = getattr(self, name)
            if value.dtype != np.float32 or value.shape != (width,) or not np.isfinite(value).all():
                raise OptionError(f"{name}: expected {width} finite float32 numbers, found {value.dtype} {value.shape}")
        if (self.noise < 0).any():
            raise OptionError(f"noise: expected deviations of at least 0, found {self.noise.min()}")
        if not 0 <= self.dropout < 1 or self.dropout_parts >= DROPOUT_PARTS:
            raise OptionError(f"dropout: expected a probability below 1, found {self.dropout}")
        if width > MOST_FEATURES:
            raise OptionError(f"vectors: expected at most {MOST_FEATURES} features in a view, found {width}")

    @property
    def dropout_parts(self) -> int:
        """The probability in parts of 65,536."""
        return round(self.dropout * DROPOUT_PARTS)


def check_rows(rows: Any, index: Any, number: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Check the arrays of `vector_rows`; return the row numbers and the numbers that draws are keyed by."""
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.name not in TYPES or not rows.dtype.isnative:
        found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise OptionError(f"rows: expected numpy [N, D] of {', '.join(TYPES)}, found {found}")
    if not rows.flags.c_contiguous:
        raise OptionError(f"rows: expected C order, found strides {rows.strides}; use numpy.ascontiguousarray")
    chosen = np.ascontiguousarray(index, np.int64)
    keys = chosen if number is None else np.ascontiguousarray(number, np.int64)
    if chosen.ndim != 1 or (len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(rows)):
        raise OptionError(f"index: expected row numbers in 0 .. {len(rows) - 1}, found shape {chosen.shape}")
    if keys.shape != chosen.shape or (len(keys) and not 0 <= int(keys.min()) <= int(keys.max()) < 2**40):
        raise OptionError(f"number: expected {len(chosen)} numbers in 0 .. 2^40 - 1, found shape {keys.shape}")
    return chosen, keys


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
    """Gather rows in float32, seen through a view; the draws of a row depend on (seed, epoch, its number) alone.

    Without a view, in numpy: ``rows[index].astype(float32)``.

    Args:
        rows: [N, D] float16, float32 or float64, C order; a memory map, too.
        index: int64 [B] in 0 .. N - 1.
        view: see `VectorView`; None: rows as they are.
        seed: the key, [0, 2^64).
        epoch: [0, 2^32).
        number: int64 [B] in [0, 2^40): what the draws of each row are keyed by; None: `index`.
        view_number: [0, 256): another draw of the same row and epoch.
        out: float32 [B, D] to write to; None: new memory.
        threads: 0 = all processors; the bits do not depend on it.

    Returns:
        float32 [B, D], and bool [B]: whether all numbers of the row are finite in float32 (before noise).

    Raises:
        OptionError: another type or shape, or a key out of range.

    Example:
        >>> import numpy as np
        >>> rows = np.arange(6, dtype=np.float16).reshape(3, 2)
        >>> vector_rows(rows, [2, 0])[0].tolist()
        [[4.0, 5.0], [0.0, 1.0]]
    """
    check_key(seed, epoch)
    chosen, keys = check_rows(rows, index, number)
    if not 0 <= view_number < 256:
        raise OptionError(f"view_number: expected 0 .. 255, found {view_number}")
    if view is not None and len(view.mean) != rows.shape[1]:
        raise OptionError(f"view: expected {rows.shape[1]} features, found {len(view.mean)}")
    shape = len(chosen), rows.shape[1]
    found = np.empty(shape, np.float32) if out is None else out
    if found.shape != shape or found.dtype != np.float32 or not found.flags.c_contiguous:
        raise OptionError(f"out: expected float32 {list(shape)} in C order, found {found.dtype} {list(found.shape)}")
    finite = np.empty(len(chosen), np.uint8)
    noisy = view is not None and bool(view.noise.any())
    _core.vector_rows_cpu(
        rows.ctypes.data,
        rows.dtype.name,
        rows.shape[1],
        chosen.ctypes.data,
        keys.ctypes.data,
        len(chosen),
        0 if view is None else view.mean.ctypes.data,
        view.noise.ctypes.data if view is not None and noisy else 0,
        0 if view is None else view.dropout_parts,
        seed,
        epoch,
        view_number,
        found.ctypes.data,
        finite.ctypes.data,
        threads,
    )
    return found, finite.view(np.bool_)
