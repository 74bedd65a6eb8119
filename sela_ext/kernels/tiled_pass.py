"""A pass over logits that are computed tile by tile on a CUDA device, where what the tiles give is added up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.errors import OptionError, ResourceError
from sela_ext.kernels.device import first_line, is_tensor
from sela_ext.kernels.sinkhorn import ROWS_TOGETHER, check_largest, check_scale, check_vector, check_weights
from sela_ext.kernels.sinkhorn_sums import SinkhornSums, exact_sums, from_exact, sinkhorn_resolution

if TYPE_CHECKING:
    import torch

    from sela_ext.kernels.device import CudaDevice

TOTALS_ROWS = 64  # of the kernels: a total of each so many rows


class TiledPass:
    """`sinkhorn_pass` over float32 logits [N, K] that never exist as a whole.

    Everything is checked and allocated once. Each tile costs the host one launch: the kernels add the tiles' column
    sums up in integers, so nothing is read back before `result`, and the device never waits for the host. The bits are
    those of one pass over all rows.

    Args:
        card: the device.
        rows: N.
        cols: K.
        potential: see `sinkhorn_pass`, also for the other arguments.
        scale: lambda.
        row_weights: [N] or None.
        reference: [N] or None.
        want_labels: also labels.
        first_row: a multiple of 128.
        rows_in_all: rows of the whole matrix.
        largest_weight: of that.

    Raises:
        OptionError: an argument of a wrong shape or value.
        ResourceError: a stream that is being captured.
    """

    def __init__(
        self,
        card: CudaDevice,
        rows: int,
        cols: int,
        potential: Any,
        *,
        scale: float,
        row_weights: Any = None,
        reference: Any = None,
        want_labels: bool = False,
        first_row: int = 0,
        rows_in_all: int | None = None,
        largest_weight: float | None = None,
    ) -> None:
        import torch

        self.card, self.rows, self.cols = card, rows, cols
        self.scale = check_scale(scale, "float32")
        self.rows_in_all = first_row + rows if rows_in_all is None else rows_in_all
        weights = None if row_weights is None else check_weights(row_weights, rows)
        self.largest = check_largest(largest_weight, weights)
        place = card.place
        with card.current():
            card.refuse_capture("sinkhorn_pass")
            self.potential = torch.from_numpy(check_vector("potential", potential, cols).copy()).to(place)
            self.weights = None if weights is None else torch.from_numpy(weights).to(place)
            self.reference = None
            if reference is not None:
                given = reference if is_tensor(reference) else torch.from_numpy(np.array(reference))
                self.reference = given.detach().to(place).float().contiguous()
                if self.reference.shape != (rows,):
                    raise OptionError(f"reference: expected shape ({rows},), found {tuple(self.reference.shape)}")
            self.columns = torch.zeros(cols, dtype=torch.int64, device=place)
            self.masked = torch.zeros(1, dtype=torch.int64, device=place)
            self.lse = torch.empty(rows, dtype=torch.float32, device=place)
            self.labels = torch.empty(rows, dtype=torch.int32, device=place) if want_labels else None
            self.totals = torch.zeros(2 * max(1, -(-rows // TOTALS_ROWS)), dtype=torch.float64, device=place)
        self.scratch: torch.Tensor | None = None
        self.tiles: list[tuple[int, int]] = []  # first row and rows

    def take(self, first: int, tile: torch.Tensor) -> None:
        """Launch the pass over one tile, in the order of the current stream; its memory may be used again after that.

        Args:
            first: its first row, a multiple of 128.
            tile: float32 logits [n, K], contiguous, on the device.

        Raises:
            ResourceError: the launch failed.
        """
        import torch

        assert first % ROWS_TOGETHER == 0
        rows, card = len(tile), self.card
        where = (tile.data_ptr(), "float32", rows, self.cols, self.cols)
        with card.current():
            _, room = card.core.sinkhorn_workspace_cuda(*where, 0, 1, False, False)
            if self.scratch is None or len(self.scratch) < room:
                self.scratch = torch.empty(room, dtype=torch.uint8, device=card.place)
            try:
                card.core.sinkhorn_pass_cuda(
                    *where,
                    self.scale,
                    self.potential.data_ptr(),
                    0 if self.weights is None else self.weights.data_ptr() + 4 * first,
                    self.largest,
                    0 if self.reference is None else self.reference.data_ptr() + 4 * first,
                    self.columns.data_ptr(),
                    self.lse.data_ptr() + 4 * first,
                    0 if self.labels is None else self.labels.data_ptr() + 4 * first,
                    self.totals.data_ptr() + 16 * (first // TOTALS_ROWS),
                    self.masked.data_ptr(),
                    self.scratch.data_ptr(),
                    card.stream(),
                    self.rows_in_all,
                    *(0, 1, 0.0, 0, 0, 0.0),  # every row, no candidates, as they are
                )
            except RuntimeError as error:
                raise ResourceError(first_line(error)) from error
        self.tiles.append((first, rows))

    def result(self) -> SinkhornSums:
        """What the tiles gave together; waits for the device."""
        with self.card.current():
            found = self.totals.cpu().numpy()
            parts = []
            for first, rows in self.tiles:  # of each tile: its objectives, then its weights
                begin, count = 2 * (first // TOTALS_ROWS), -(-rows // TOTALS_ROWS)
                parts.append(found[begin : begin + 2 * count].reshape(2, count))
            totals = np.ascontiguousarray(np.concatenate(parts, axis=1)) if parts else np.zeros((2, 1))
            exact = exact_sums(self.columns.cpu().numpy(), totals, int(self.masked.item()), self.largest)
            _, objective, weight, masked = from_exact(exact, self.rows_in_all, self.largest)
            sums = self.columns.double() * sinkhorn_resolution(self.rows_in_all, self.largest)
        entries = self.rows * self.cols
        return SinkhornSums(
            *(sums, objective, weight, self.lse, self.labels, masked, None, exact),
            *(self.rows_in_all, self.largest, entries, entries),
        )
