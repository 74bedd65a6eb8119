"""Logits as the passes read them: what is accepted, and how they are stored in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sela_ext import _core
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.kernels.device import cuda_place, first_line, is_tensor, usable

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from sela_ext.kernels.device import CudaDevice

# Of fixed16: steps per nat of lambda * logit, and what stands for -inf.
STEPS = 64.0
IMPOSSIBLE = 65535
KINDS = ("fixed16", "float16", "bfloat16")
# Rows on a device are padded to a multiple of so many columns: 16 bytes.
_DEVICE_COLUMNS = 8
# Rows of logits that are copied at a time where their columns are not adjacent.
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class StoredLogits:
    """Logits [N, K] in 16 bits each, relative to their row's maximum; what `store_logits` makes.

    Arrays are numpy, or tensors on the CUDA device of the logits. There rows begin at multiples of 16 bytes, the types
    are torch's float16 and bfloat16, and int16 with the bits of uint16.

    Attributes:
        values: [N, K], rows adjacent. fixed16: uint16, round(64 * lam * (maxima - logits)) in nats / 64, 65535 for -inf
            and for everything from 1,024 nats on. float16: logits - maxima. bfloat16: the bits of that, as uint16.
        kind: "fixed16", "float16" or "bfloat16".
        maxima: float32 [N], maximum of each row of the logits; NaN for rows that a pass masks.
        saturated: finite entries that are stored as -inf; their p is 0 in a pass.
        lam: lambda of the steps of fixed16.
    """

    values: Any
    kind: str
    maxima: Any
    saturated: int
    lam: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, cols = self.values.shape
        return rows, cols

    @property
    def nbytes(self) -> int:
        """Bytes of memory, without what lies between the rows."""
        return int(self.values.nbytes + self.maxima.nbytes)

    def rows(self, first: int, last: int) -> StoredLogits:
        """Rows first .. last - 1, without a copy; `saturated` stays that of all."""
        return StoredLogits(self.values[first:last], self.kind, self.maxima[first:last], self.saturated, self.lam)

    def decoded(self, first: int, last: int, columns: Any = None) -> npt.NDArray[np.float64]:
        """What rows first .. last - 1 stand for, as float64 logits; NaN in masked rows.

        Args:
            first: row.
            last: row.
            columns: indices or a slice of columns; None: all.
        """
        part, maxima = self.values[first:last], self.maxima[first:last]
        part = part if columns is None else part[:, columns]
        if is_tensor(part):
            part, maxima = bits_of(part), maxima.cpu().numpy()
        if self.kind == "fixed16":
            x = np.where(part == IMPOSSIBLE, -np.inf, part / (-STEPS * self.lam))
        elif self.kind == "float16":
            x = part.astype(np.float64)
        else:
            x = (part.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return np.asarray(x + maxima[:, None], np.float64)


def bits_of(values: torch.Tensor) -> npt.NDArray[Any]:
    """Values of a device in the types that they have on the host."""
    import torch

    host = values.cpu()
    if host.dtype == torch.float16:
        return host.numpy()
    return host.view(torch.int16).numpy().view(np.uint16)


def check_logits(logits: Any) -> str:
    """Check that logits are [N, K] of a supported type, and return the name of that type, or the kind they are of."""
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2:
        found = type(logits).__name__ if shape is None else f"shape {tuple(shape)}"
        raise DataError(f"logits: expected a numpy or torch array [N, K], found {found}")
    if isinstance(logits, StoredLogits):
        return logits.kind
    name = _type_name(logits.dtype)
    if name not in ("float32", "float16", "bfloat16", "float64"):
        raise DataError(
            f"logits: expected float32, float16, bfloat16 or float64, found {name}; convert them, e.g. to float32"
        )
    if shape[1] < 1:
        raise DataError("logits: expected at least one column, found K = 0")
    return name


def check_kind(kind: str) -> None:
    """Check the name of a kind of storage."""
    if kind not in KINDS:
        raise OptionError(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")


def check_store(kind: str, lam: Any, threads: Any) -> None:
    """Check how logits are to be stored."""
    check_kind(kind)
    if isinstance(lam, bool) or not isinstance(lam, (int, float, np.floating, np.integer)) or not 1e-30 < lam < 1e30:
        raise OptionError(f"lam: expected a number in 1e-30 .. 1e30, found {lam!r}")
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 <= threads <= 4096:
        raise OptionError(f"threads: expected an integer in 0 .. 4096 (0 = all), found {threads!r}")


@cache
def _type_name(dtype: Any) -> str:
    """A number type of numpy or torch by its name."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def store_logits(
    logits: Any,
    kind: str = "fixed16",
    *,
    lam: float = 1.0,
    threads: int = 0,
    out: StoredLogits | None = None,
    first_row: int = 0,
    isa: str = "",
) -> StoredLogits:
    """Store logits in 16 bits each, relative to their row's maximum, for `sinkhorn_pass`.

    In torch, for fixed16: ``m = logits.amax(1); q = (64 * lam * (m[:, None] - logits)).round().clamp(max=65535)``; for
    the others ``(logits - m[:, None]).to(kind)``. Rounding near the maximum, where p is, is then small: at most 1/128
    nat of lam * logit everywhere for fixed16. Rows that hold NaN or +inf, or only -inf, or whose maximum times lam
    leaves float32's range, are stored so that a pass masks them. The same bits for any number of threads and any
    instruction set.

    Args:
        logits: [N, K] float32, float16, bfloat16 or float64, numpy (also memory-mapped) or torch, of any strides.
        kind: "fixed16", "float16" or "bfloat16".
        lam: lambda, > 0; fixed16 holds lam * logits.
        threads: CPU threads, 0 for all.
        out: write into rows first_row .. first_row + N - 1 of these, whose kind and lam must be the same.
        first_row: only with `out`.
        isa: CPU instruction set (for tests).

    Returns:
        StoredLogits, where the logits are; with `out` these same arrays, `saturated` grown.

    Raises:
        DataError: logits of a wrong shape or type.
        OptionError: another argument of a wrong value.
        ResourceError: a launch on a CUDA device that failed.

    Example:
        >>> import numpy as np
        >>> stored = store_logits(np.array([[1.0, 0.5, -np.inf]], np.float32), lam=2.0)
        >>> stored.values.tolist(), stored.maxima.tolist(), stored.saturated
        ([[0, 64, 65535]], [1.0], 0)
    """
    name = check_logits(logits)
    if isinstance(logits, StoredLogits):
        raise OptionError("logits: expected logits in floating point, found StoredLogits")
    check_store(kind, lam, threads)
    place = cuda_place(logits)
    if is_tensor(logits) and place is None and logits.device.type != "cpu":
        raise OptionError(f"logits: expected a tensor on cpu or cuda, found {logits.device}; move it with .cpu()")
    rows, cols = (int(n) for n in logits.shape)
    if out is None:
        if first_row != 0:
            raise OptionError(f"first_row: expected 0 without `out`, found {first_row}")
        out = empty_stored(rows, cols, kind, lam=lam, place=place)
    elif (out.kind, out.lam, out.shape[1]) != (kind, float(lam), cols):
        raise OptionError(
            f"out: expected {kind} of lam {lam} with {cols} columns, "
            f"found {out.kind} of lam {out.lam} with {out.shape[1]}"
        )
    if not 0 <= first_row <= out.shape[0] - rows:
        raise OptionError(f"first_row: expected 0 .. {out.shape[0] - rows}, found {first_row}")
    if (cuda_place(out.values) is None) != (place is None):
        raise OptionError("out: expected memory where the logits are, found it elsewhere; see `empty_stored(place=)`")
    if place is not None:
        card = usable(place)
        if card is None:
            return _stored_in_torch(logits.detach(), kind, float(lam), out, first_row)
        return store_on_device(card, logits, kind, lam=float(lam), out=out, first_row=first_row)
    saturated = 0
    step = max(rows, 1) if _adjacent(logits) else _ROWS_AT_ONCE
    for first in range(0, rows, step):
        part = logits[first : first + step]
        memory, address, stride = rows_of(part)
        saturated += _core.store_logits_cpu(
            address,
            name,
            len(part),
            cols,
            stride,
            kind,
            float(lam),
            out.values[first_row + first :].ctypes.data,
            out.maxima[first_row + first :].ctypes.data,
            threads,
            isa,
        )
        del memory
    return StoredLogits(out.values, kind, out.maxima, out.saturated + saturated, float(lam))


def store_on_device(
    card: CudaDevice,
    logits: torch.Tensor,
    kind: str,
    *,
    lam: float,
    out: StoredLogits | None = None,
    first_row: int = 0,
) -> StoredLogits:
    """`store_logits` by the CUDA kernel of a device, whatever its self-check says; the logits are there already.

    Raises:
        ResourceError: a launch that failed, or a stream that is being captured.
    """
    card.refuse_capture("store_logits")
    out, saturated = launch_store(card, logits, kind, lam=lam, out=out, first_row=first_row)
    return StoredLogits(out.values, kind, out.maxima, out.saturated + int(saturated.item()), lam)


def launch_store(
    card: CudaDevice,
    logits: torch.Tensor,
    kind: str,
    *,
    lam: float,
    out: StoredLogits | None = None,
    first_row: int = 0,
) -> tuple[StoredLogits, torch.Tensor]:
    """`store_on_device` without waiting: the memory, and how many saturated as int64 [1] on the device.

    Raises:
        ResourceError: a launch that failed.
    """
    import torch

    rows, cols = (int(n) for n in logits.shape)
    with card.current():
        if out is None:
            out = empty_stored(rows, cols, kind, lam=lam, place=card.place)
        logits = logits.detach()
        if logits.stride(1) != 1 or (rows > 1 and logits.stride(0) < cols):
            logits = logits.contiguous()
        saturated = torch.zeros(1, dtype=torch.int64, device=card.place)
        try:
            card.core.store_logits_cuda(
                logits.data_ptr(),
                check_logits(logits),
                rows,
                cols,
                max(int(logits.stride(0)), cols),
                kind,
                lam,
                out.values[first_row:].data_ptr(),
                max(int(out.values.stride(0)), cols),
                out.maxima[first_row:].data_ptr(),
                saturated.data_ptr(),
                card.stream(),
            )
        except RuntimeError as error:
            raise ResourceError(first_line(error)) from error
    return out, saturated


def _stored_in_torch(logits: torch.Tensor, kind: str, lam: float, out: StoredLogits, first_row: int) -> StoredLogits:
    """`store_logits` by the pure-torch twin, a block of rows at a time, to where `out` is."""
    import torch

    from sela_ext.kernels.reference.logits import store_logits as twin

    saturated = 0
    for first in range(0, int(logits.shape[0]), _ROWS_AT_ONCE):
        part = twin(logits[first : first + _ROWS_AT_ONCE].cpu(), kind, lam=lam)
        into = slice(first_row + first, first_row + first + part.shape[0])
        bits = torch.from_numpy(part.values if kind == "float16" else part.values.view(np.int16).copy())
        out.values[into] = (bits.view(torch.bfloat16) if kind == "bfloat16" else bits).to(out.values.device)
        out.maxima[into] = torch.from_numpy(part.maxima).to(out.maxima.device)
        saturated += part.saturated
    return StoredLogits(out.values, kind, out.maxima, out.saturated + saturated, lam)


def tensor_type(kind: str) -> torch.dtype:
    """What tensors hold a kind in; int16 has the bits of uint16."""
    import torch

    return {"fixed16": torch.int16, "float16": torch.float16, "bfloat16": torch.bfloat16}[kind]


def device_stride(cols: int) -> int:
    """Entries from one row to the next on a device."""
    return -(-cols // _DEVICE_COLUMNS) * _DEVICE_COLUMNS


def empty_stored(
    rows: int, cols: int, kind: str = "fixed16", *, lam: float = 1.0, place: torch.device | None = None
) -> StoredLogits:
    """Memory for `store_logits(..., out=...)`, on a CUDA device or the host; what it holds before is not defined."""
    if place is not None:
        import torch

        whole = torch.empty(rows, device_stride(cols), dtype=tensor_type(kind), device=place)
        return StoredLogits(whole[:, :cols], kind, torch.empty(rows, device=place), 0, float(lam))
    values = np.empty((rows, cols), np.float16 if kind == "float16" else np.uint16)
    return StoredLogits(values, kind, np.empty(rows, np.float32), 0, float(lam))


def _adjacent(logits: Any) -> bool:
    rows, cols = logits.shape
    if is_tensor(logits):
        return bool((cols == 1 or logits.stride(1) == 1) and (rows <= 1 or logits.stride(0) >= cols))
    size = logits.dtype.itemsize
    step, inner = logits.strides
    good = (cols == 1 or inner == size) and (rows <= 1 or (step % size == 0 and step >= cols * size))
    return bool(good and logits.dtype.isnative and logits.flags.aligned)


def rows_of(logits: Any) -> tuple[Any, int, int]:
    """The array itself or a copy with adjacent columns; its address; elements from one row to the next."""
    rows, cols = logits.shape
    if isinstance(logits, StoredLogits):
        logits = logits.values
    if is_tensor(logits):
        logits = logits.detach()
        if rows and not _adjacent(logits):
            logits = logits.contiguous()
        return logits, logits.data_ptr(), max(int(logits.stride(0)), int(cols))
    if rows and not _adjacent(logits):
        logits = np.ascontiguousarray(logits.astype(logits.dtype.newbyteorder("=")))
    return logits, logits.ctypes.data, max(int(logits.strides[0]) // logits.dtype.itemsize, int(cols))
