"""Arrays that are mapped from files: what is read next, what is done with, and whether the file is long enough."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

from sela_ext.errors import DataError
from sela_ext.kernels.device import is_tensor

PART_BYTES = 64 << 20  # rows that one call reads; about twice this is resident
SMALLEST = 32 << 20  # below this an array is read as a whole, wherever it lies
PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class MappedRows:
    """Rows of an array that a file is mapped to.

    Attributes:
        address: of the first row.
        stride: bytes from one row to the next.
        rows: number of rows.
        path: of the file.
        shared: whether pages can be given back and read again: not those of a private map that can be written.
    """

    address: int
    stride: int
    rows: int
    path: str
    shared: bool

    @staticmethod
    def find(array: Any, name: str) -> MappedRows | None:
        """The map that an array [N, ...] lies in; None for one in memory, a small one, or where Linux does not tell.

        Reading behind the end of a file that became shorter ends the process, so its length is looked at first.

        Raises:
            DataError: the file is too short.
        """
        rows = int(array.shape[0])
        if is_tensor(array):
            if array.device.type != "cpu":
                return None
            item = array.element_size()
            strides = tuple(int(step) * item for step in array.stride())
        else:
            item = array.itemsize
            strides = array.strides
        stride = strides[0]
        if stride * rows < SMALLEST or min(strides) < 0:
            return None
        address = array.data_ptr() if is_tensor(array) else array.ctypes.data
        size = item + sum((int(n) - 1) * step for n, step in zip(array.shape, strides, strict=True))
        found = _map_at(address)
        if found is None:
            return None
        start, offset, mode, path = found
        try:
            length = os.stat(path).st_size
        except OSError:
            length = None  # deleted meanwhile: it lives on as long as the map, and nobody can cut it by its name
        end = offset + (address - start) + size
        if length is not None and length < end:
            raise DataError(
                f"{name}: expected {end:,} bytes in {path} for {rows:,} rows, found {length:,}; the file is cut off"
            )
        return MappedRows(address, stride, rows, path, mode[3] == "s" or mode[1] != "w")

    @property
    def part_rows(self) -> int:
        """Rows to read at once: a multiple of 128."""
        return 128 * max(1, PART_BYTES // (128 * self.stride))

    def ahead(self, first: int, last: int) -> None:
        """Ask for rows that are read soon."""
        self._advise(first, last, mmap.MADV_WILLNEED)

    def done(self, first: int, last: int) -> None:
        """Rows that are not read again in this pass need not stay resident; the page cache keeps what it can."""
        if self.shared:
            self._advise(first, last, mmap.MADV_DONTNEED)

    def _advise(self, first: int, last: int, advice: int) -> None:
        begin = self.address + min(first, self.rows) * self.stride
        end = self.address + min(last, self.rows) * self.stride
        begin = -(-begin // PAGE) * PAGE  # whole pages only
        end = end // PAGE * PAGE
        if end > begin:
            _madvise()(begin, end - begin, advice)


def _map_at(address: int) -> tuple[int, int, str, str] | None:
    """Start, offset in the file, mode and path of the file map at an address."""
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)
                start, end = (int(part, 16) for part in fields[0].split("-"))
                if start <= address < end:
                    on_file = len(fields) == 6 and fields[4] != "0" and fields[5].startswith("/")
                    return (start, int(fields[2], 16), fields[1], fields[5]) if on_file else None
    except OSError:
        pass
    return None


@cache
def _madvise() -> Any:
    call = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    call.restype = ctypes.c_int
    return call
