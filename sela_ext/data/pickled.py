"""Pickles of plain values, read without executing anything.

A pickle is a program: it may name any function and have it called. Here its instructions are read first, and only
those that build dicts, lists, tuples, numbers, text, bytes and uint8 arrays are admitted; the few names that arrays
need stand for inert objects of this module, so that not even numpy's own functions are called with what a file says.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from sela_ext.errors import DataError

_CODES = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES"),
        *("BINBYTES8", "SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
        *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    )
)
# Numbers of memory cells that an instruction may name; a file needs about one per value that it holds.
_MOST_CELLS = 1 << 20
# Values in all. A CIFAR batch holds some 50,000 labels and as many file names.
_MOST_CODES = 1 << 21


class _Array:
    """What becomes of an array: its state is checked, then kept as uint8."""

    __slots__ = ("values",)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise DataError("expected an array's state of five values")
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Kind) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise DataError("expected an array of uint8")
        if not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
            raise DataError(f"expected an array's shape, found {shape!r:.80}")
        if math.prod(shape) != len(data):
            raise DataError(f"expected {math.prod(shape)} bytes for an array of shape {list(shape)}, found {len(data)}")
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Kind:
    """What becomes of a dtype: there is only one."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 8 or state[3:5] != (None, None):
            raise DataError("expected the plain type uint8")


class _NdArray:
    __slots__ = ()


class _Reconstruct:
    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, code: Any) -> _Array:
        if not isinstance(kind, _NdArray) or shape != (0,) or code not in (b"b", "b"):
            raise DataError("expected an empty array to be filled")
        return _Array()


class _MakeKind:
    __slots__ = ()

    def __call__(self, name: Any, align: Any, copy: Any) -> _Kind:
        if name not in (b"u1", "u1") or align not in (0, 1) or copy not in (0, 1):
            raise DataError(f"expected arrays of uint8 (u1), found {name!r:.80}")
        return _Kind()


class _Encode:
    """Python 3 writes bytes in this way for readers of Python 2."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding not in (b"latin1", "latin1"):
            raise DataError("expected text in latin1")
        return text.encode("latin1")


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _NdArray(),
    ("numpy", "dtype"): _MakeKind(),
    ("_codecs", "encode"): _Encode(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = _NAMES.get((module_name, global_name))
        if found is None:
            raise DataError(f"it asks for {module_name}.{global_name}, which no data file needs; nothing was executed")
        return found


def read_pickle(data: bytes, where: str) -> Any:
    """Values in a pickle.

    Args:
        data: The whole pickle; text of Python 2 comes back as bytes.
        where: What to call it in messages.

    Returns:
        dict, list, tuple, int, bool, None, bytes, str, or uint8 arrays, nested.

    Raises:
        DataError: Truncated, damaged, followed by other bytes, or a pickle that holds or asks for anything else.

    Example:
        >>> read_pickle(pickle.dumps({"labels": [1, 2]}), "x")
        {'labels': [1, 2]}
        >>> read_pickle(pickle.dumps(print), "x")
        Traceback (most recent call last):
        sela_ext.errors.DataError: x: it asks for builtins.print, which no data file needs; nothing was executed
    """
    try:
        stop = 0
        for number, (code, argument, place) in enumerate(pickletools.genops(data)):
            if code.name not in _CODES:
                raise DataError(f"the instruction {code.name}, which no data file needs; nothing was executed")
            if number > _MOST_CODES or (code.name == "LONG_BINPUT" and int(argument or 0) > _MOST_CELLS):
                raise DataError("more values than any data file holds; nothing was executed")
            stop = (place or 0) + 1
        if stop != len(data):
            raise DataError(f"{len(data) - stop} bytes behind the end; copy or download the file again")
        value = _Unpickler(io.BytesIO(data), fix_imports=False, encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # whatever a damaged pickle makes of the machine: index, key, type, value errors
        raise DataError(
            f"{where}: expected a whole pickle, found one that is truncated or damaged ({error}); download it again"
        ) from error
    return _plain(value, where)


def _plain(value: Any, where: str) -> Any:
    """The arrays of a dict, or the value itself; what stands for something else does not leave this module."""
    if isinstance(value, _Array):
        return _filled(value, where)
    if isinstance(value, dict):
        return {key: _filled(item, where) if isinstance(item, _Array) else item for key, item in value.items()}
    return value


def _filled(array: _Array, where: str) -> Any:
    if not hasattr(array, "values"):
        raise DataError(f"{where}: expected arrays with values, found an empty one")
    return array.values
