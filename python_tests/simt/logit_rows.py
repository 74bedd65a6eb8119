"""Logits in memory as the kernels read them, and in the 16 bits that the kernel of the conversion makes of them."""

from dataclasses import dataclass

import numpy as np

STEPS, IMPOSSIBLE = 64.0, 65535  # of fixed16


def to_bfloat16(values):
    """float32 to the nearest bfloat16, of two the even one, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@dataclass
class Rows:
    """Rows in memory as a kernel reads them, and the numbers that they are."""

    memory: np.ndarray
    address: int
    kind: str
    stride: int
    exact: np.ndarray

    @property
    def where(self):
        return self.address, self.kind, *self.exact.shape, self.stride


def laid_out(values, kind, aligned=True):
    """Rows amid NaNs, at multiples of 16 bytes or not; those of fixed16 are whole numbers already."""
    rows, cols = values.shape
    if kind == "bfloat16":
        raw = to_bfloat16(values)
        exact = (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    elif kind == "fixed16":
        raw = values.astype(np.uint16)
        exact = np.where(raw == IMPOSSIBLE, -np.inf, -raw.astype(np.float64))
    else:
        raw = values.astype(kind)
        exact = raw.astype(np.float64)
    per = 16 // raw.itemsize
    stride = -(-cols // per) * per + (per if aligned else 1)
    memory = np.full(rows * stride + 2 * per, 0x7FFF if raw.dtype == np.uint16 else np.nan, raw.dtype)
    start = -(memory.ctypes.data // raw.itemsize) % per
    np.lib.stride_tricks.as_strided(memory[start:], (rows, cols), (stride * raw.itemsize, raw.itemsize))[...] = raw
    return Rows(memory, memory.ctypes.data + start * raw.itemsize, kind, stride, exact)


def address(array):
    return 0 if array is None else array.ctypes.data


def stored(simt, rows, kind, lam, out_stride, where="cuda"):
    """Values and maxima of logits in 16 bits, and how many were too far down."""
    n, cols = rows.exact.shape
    values, maxima = np.full(n * out_stride + 8, 7, np.uint16), np.full(n, -777, np.float32)
    count = np.zeros(1, np.int64)
    start = -(values.ctypes.data // 2) % 8
    to = values.ctypes.data + 2 * start
    assert start + (n - 1) * out_stride + cols <= len(values)
    simt.store_logits_cuda(*rows.where, kind, lam, to, out_stride, address(maxima), address(count), 0)
    whole = np.lib.stride_tricks.as_strided(values[start:], (n, out_stride), (2 * out_stride, 2))
    assert (whole[:-1, cols:] == 7).all()
    return whole[:, :cols].copy(), maxima, int(count[0])
