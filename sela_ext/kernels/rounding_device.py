"""The candidate search where the logits are: what goes to the host are the lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext.errors import ResourceError
from sela_ext.kernels.device import first_line
from sela_ext.kernels.rounding import Candidates

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from sela_ext.kernels.device import CudaDevice

    Vector = npt.NDArray[np.float64]

LIST_BYTES = 1 << 28  # of lists that are on the device at a time


class _OnDevice:
    """What a search reads, on the device: logits in place, the rest uploaded."""

    def __init__(
        self,
        card: CudaDevice,
        name: str,
        logits: torch.Tensor,
        labels: npt.NDArray[np.int32],
        selected: npt.NDArray[np.int64] | None,
        prices: list[Vector | None],
    ) -> None:
        import torch

        logits = logits.detach()
        rows, cols = (int(n) for n in logits.shape)
        if (cols > 1 and logits.stride(1) != 1) or (rows > 1 and logits.stride(0) < cols):
            logits = logits.contiguous()
        self.logits, self.rows, self.cols = logits, rows, cols
        self.stride = max(int(logits.stride(0)), cols)
        self.size = int(logits.element_size())
        # Copies: torch takes neither what may not be written to nor strides below 0, which one element may have.
        self.labels = torch.from_numpy(labels.copy()).to(card.place)
        self.selected = None if selected is None else torch.from_numpy(selected.copy()).to(card.place)
        # As the CPU's loops take them: rounded, but for float64; the bonus always.
        with np.errstate(over="ignore"):
            rounded = [
                None if one is None else np.ascontiguousarray(one, np.float32 if name != "float64" or i == 2 else None)
                for i, one in enumerate(prices)
            ]
        self.prices = [None if one is None else torch.from_numpy(one.copy()).to(card.place) for one in rounded]

    def address(self, index: int) -> int:
        """Of prices, label prices or bonus; 0: none."""
        tensor = self.prices[index] if index < len(self.prices) else None
        return 0 if tensor is None else tensor.data_ptr()


def candidates_on_device(
    card: CudaDevice,
    logits: torch.Tensor,
    name: str,
    *,
    prices: Vector,
    label_prices: Vector,
    bonus: Vector | None,
    labels: npt.NDArray[np.int32],
    selected: npt.NDArray[np.int64] | None,
    scale: float,
    count: int,
    slack: float,
    floor: float,
    tie: float,
    first_row: int,
) -> Candidates:
    """`find_candidates` by the CUDA kernels of a device, whatever its self-check says; all arguments are checked.

    Lists are found for a part of the rows at a time, and leave the device only where there are any.

    Raises:
        ResourceError: a launch that failed, or a stream that is being captured.
    """
    import torch

    width = 2 * count + 2
    with card.current():
        card.refuse_capture("find_candidates")
        there = _OnDevice(card, name, logits, labels, selected, [prices, label_prices, bonus])
        n = there.rows if selected is None else len(selected)
        lists = Candidates(
            np.zeros((n, width), np.int32),
            np.zeros((n, width), np.float32),
            np.zeros(n, np.int32),
            np.empty(n, np.float32),
        )
        step = max(1, LIST_BYTES // (8 * width))
        for first in range(0, n, step):
            places = min(step, n - first)
            columns = torch.zeros(places, width, dtype=torch.int32, device=card.place)
            values = torch.zeros(places, width, dtype=torch.float32, device=card.place)
            found = torch.empty(places, dtype=torch.int32, device=card.place)
            regret = torch.empty(places, dtype=torch.float32, device=card.place)
            # Without row numbers a part is a matrix of its own, which begins further down.
            down = 0 if there.selected is not None else first
            try:
                card.core.find_candidates_cuda(
                    there.logits.data_ptr() + down * there.stride * there.size,
                    name,
                    there.rows - down,
                    there.cols,
                    there.stride,
                    scale,
                    there.address(0),
                    there.address(1),
                    there.address(2),
                    there.labels.data_ptr() + 4 * down,
                    0 if there.selected is None else there.selected.data_ptr() + 8 * first,
                    places,
                    count,
                    slack,
                    floor,
                    tie,
                    columns.data_ptr(),
                    values.data_ptr(),
                    found.data_ptr(),
                    regret.data_ptr(),
                    first_row + down,
                    card.stream(),
                )
            except RuntimeError as error:
                raise ResourceError(first_line(error)) from error
            part = slice(first, first + places)
            lists.found[part] = found.cpu().numpy()
            lists.regret[part] = regret.cpu().numpy()
            listed = np.flatnonzero(lists.found[part])
            if 2 * len(listed) > places:
                lists.columns[part], lists.values[part] = columns.cpu().numpy(), values.cpu().numpy()
            elif len(listed):
                chosen = torch.from_numpy(listed).to(card.place)
                lists.columns[first + listed] = columns[chosen].cpu().numpy()
                lists.values[first + listed] = values[chosen].cpu().numpy()
    return lists


def margins_on_device(
    card: CudaDevice,
    logits: torch.Tensor,
    name: str,
    *,
    prices: Vector,
    labels: npt.NDArray[np.int32],
    selected: npt.NDArray[np.int64] | None,
    scale: float,
) -> npt.NDArray[np.float32]:
    """`column_margins` by the CUDA kernels of a device, whatever its self-check says; all arguments are checked.

    Raises:
        ResourceError: a launch that failed, or a stream that is being captured.
    """
    import torch

    with card.current():
        card.refuse_capture("column_margins")
        there = _OnDevice(card, name, logits, labels, selected, [prices])
        n = there.rows if selected is None else len(selected)
        margins = torch.empty(4, there.cols, dtype=torch.float32, device=card.place)
        room = card.core.column_margins_workspace_cuda(n, there.cols)
        scratch = torch.empty(-(-room // 8), dtype=torch.float64, device=card.place)
        try:
            card.core.column_margins_cuda(
                there.logits.data_ptr(),
                name,
                there.rows,
                there.cols,
                there.stride,
                scale,
                there.address(0),
                there.labels.data_ptr(),
                0 if there.selected is None else there.selected.data_ptr(),
                n,
                margins.data_ptr(),
                scratch.data_ptr(),
                card.stream(),
            )
        except RuntimeError as error:
            raise ResourceError(first_line(error)) from error
        found: npt.NDArray[Any] = margins.cpu().numpy()
    return found
