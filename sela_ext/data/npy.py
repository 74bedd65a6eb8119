"""Single arrays in .npy files, mapped and never unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from sela_ext.data.messages import first_line
from sela_ext.data.safe_files import open_regular
from sela_ext.errors import DataError, lacks_memory


def map_npy(path: str | Path, what: str) -> Any:
    """The array of a .npy file, as a memory map that cannot be written: a header that lies takes no memory.

    Args:
        path: The file.
        what: What is expected, for messages: "a .npy file of ...".

    Raises:
        DataError: No such file, damaged, shorter than its header says, or objects, which are pickles.
    """
    try:
        os.close(open_regular(path))  # a pipe would be waited for
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy's reader of headers raises many types on damaged files
        if lacks_memory(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DataError(f"{path}: expected {what}: {reason}") from error
