"""Mapped files that become shorter while they are read: a line and a status, not a process that ends in silence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sela_ext import _core


@contextlib.contextmanager
def told_mapped_faults() -> Iterator[None]:
    """While this lasts, a mapped file that cannot be read ends the process with its name, and status 3.

    Nothing can raise an exception there: any thread of any library may be reading. By itself the system ends the
    process by SIGBUS. A handler that is there already stays, such as faulthandler's.

    Example:
        >>> with told_mapped_faults():
        ...     pass  # read arrays that files are mapped to
    """
    begun = _core.mapped_faults_begin()
    try:
        yield
    finally:
        if begun:
            _core.mapped_faults_end()
