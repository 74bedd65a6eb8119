"""Upper bounds of chunks of logits, by which passes over peaked logits spare reading most of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext import _core
from sela_ext.errors import OptionError
from sela_ext.kernels.logits import check_logits

if TYPE_CHECKING:
    import numpy.typing as npt

# Fewer columns are always read as a whole.
BOUNDED_COLUMNS = 256


@dataclass
class ChunkBounds:
    """One upper bound for each row and chunk of 32 columns of logits [N, K], for `sinkhorn_pass(..., bounds=...)`.

    The first pass over all rows that is given them fills them in; later passes over the same logits, at any potential,
    scale and row weights, use them. Logits that change need new ones.

    Attributes:
        values: uint16 [N, about K / 32], bits of bfloat16.
        of: type and shape of the logits.
        complete: whether they are filled in.
    """

    values: npt.NDArray[np.uint16]
    of: tuple[str, int, int]
    complete: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.values.nbytes


def bounds_nbytes(rows: int, cols: int, dtype: str) -> int:
    """Bytes of the bounds of logits [rows, cols] of a type or kind, by name; 0 where passes make no use of them."""
    if dtype == "float64" or cols < BOUNDED_COLUMNS:
        return 0
    return 2 * rows * _core.sinkhorn_bounds_stride(cols)


def chunk_bounds(logits: Any) -> ChunkBounds | None:
    """Empty bounds for logits [N, K] on the CPU, to be filled in by the first pass that gets them.

    They pay where a row has few columns that count, and then from the second pass on; the first one takes a little
    longer. No bit of any result depends on them.

    Args:
        logits: as for `sinkhorn_pass`, also `StoredLogits`.

    Returns:
        ChunkBounds of 2 bytes for 32 columns (rows are filled up to 512), or None where passes make no use of bounds:
        float64, or fewer than 256 columns.

    Raises:
        DataError: logits of a wrong shape or type.

    Example:
        >>> import numpy as np
        >>> from sela_ext.kernels import sinkhorn_pass
        >>> logits = 100 * np.random.default_rng(0).standard_normal((300, 1000)).astype(np.float32)
        >>> bounds = chunk_bounds(logits)
        >>> first = sinkhorn_pass(logits, np.zeros(1000), bounds=bounds)
        >>> again = sinkhorn_pass(logits, np.ones(1000), bounds=bounds, reference=first.lse)
        >>> bounds.complete, bounds.nbytes / logits.nbytes < 0.02
        (True, True)
    """
    name = check_logits(logits)
    rows, cols = (int(n) for n in logits.shape)
    if not bounds_nbytes(max(rows, 1), cols, name):
        return None
    return ChunkBounds(np.empty((rows, _core.sinkhorn_bounds_stride(cols)), np.uint16), (name, rows, cols))


def check_bounds(bounds: ChunkBounds, logits: Any) -> None:
    """Refuse bounds that were made for something else.

    Raises:
        OptionError: bounds of another type or shape.
    """
    if not isinstance(bounds, ChunkBounds):
        raise OptionError(f"bounds: expected ChunkBounds or None, found {type(bounds).__name__}")
    found = (check_logits(logits), int(logits.shape[0]), int(logits.shape[1]))
    if bounds.of != found:
        raise OptionError(f"bounds: expected those of {found}, found those of {bounds.of}")
