"""What the data check asks of a source beside pixels: the name and the encoded bytes of one image."""

from __future__ import annotations

import os
import stat
from typing import Any

from sela_ext.data.folder import FileSource
from sela_ext.data.source import Source
from sela_ext.errors import DataError


def name_of(source: Source, index: int) -> str:
    """Name of one image."""
    one: Any = getattr(source, "name", None)
    return str(one(index)) if callable(one) else source.names[index]


def is_encoded(source: Source) -> bool:
    """Whether the images are encoded files, or bytes like those of one."""
    return bool(getattr(source, "encoded", isinstance(source, FileSource)))


def encoded_bytes(source: Source, index: int, name: str) -> bytes:
    """The encoded bytes of one image of an encoded source.

    Raises:
        DataError: They cannot be read, or are those of a pipe, a device or a folder, which are not opened.
    """
    located: Any = source.locate(index) if hasattr(source, "locate") else None
    if located is not None and located.path is None:
        return bytes(located.data)
    path = located.path if located is not None else source.path(index)  # type: ignore[attr-defined]
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{name}: expected an image file, found something that is not a regular file")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
