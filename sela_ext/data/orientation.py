"""EXIF orientation: which way a camera was held, and the picture turned accordingly."""

from __future__ import annotations

import os
import warnings
from io import BytesIO
from typing import IO

import numpy as np
from PIL import Image

from sela_ext.data.safe_files import open_regular
from sela_ext.data.source import Located, Source, UInt8Array
from sela_ext.errors import DataError
from sela_ext.kernels.jpeg import warning_lock

_TAG = 0x0112


def turn(pixels: UInt8Array, orientation: int) -> UInt8Array:
    """The picture upright.

    Args:
        pixels: uint8 [H, W, C] as stored.
        orientation: EXIF's number, 1..8: 1 upright, 2 mirrored, 3 upside down, 4 both; 5 to 8 the same with the axes
            exchanged, to [W, H, C]. Any other number counts as 1.

    Example:
        >>> turn(np.zeros((2, 3, 3), np.uint8), 6).shape
        (3, 2, 3)
    """
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def read_upright(source: Source, index: int) -> UInt8Array:
    """`source.read(index)`, turned as the image's EXIF data say; pixels of sources without files stay as they are."""
    pixels = source.read(index)
    return turn(pixels, find_orientation(source.locate(index))) if source.encoded else pixels


def find_orientation(image: Located) -> int:
    """EXIF's number for an encoded image, 1..8; 1 where it says nothing, or nothing that can be read.

    1 for TIFF too, whose orientation is a part of the format: Pillow turns its pixels while it decodes them.

    Raises:
        DataError: The file cannot be read any more.
    """
    try:
        file: IO[bytes] = BytesIO(image.data or b"")
        if image.path is not None:
            file = os.fdopen(open_regular(image.path), "rb")
    except OSError as error:
        raise DataError(f"{image.path}: cannot be read: {error.strerror or error}") from error
    # Pillow warns of damaged EXIF data. The filters are global, so they are changed by one thread at a time.
    with file, warning_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file) as picture:
                found = 1 if picture.format == "TIFF" else picture.getexif().get(_TAG, 1)
        except Exception:  # Pillow's plugins raise many types on damaged data
            return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1
