"""Tables as we write them: every name comes back as it was."""

from __future__ import annotations

import csv
from typing import IO, Any


class _Lines:
    """Ends lines by a line feed alone.

    The csv module quotes what would end a line: before Python 3.13 only characters of the line end that it writes
    itself. So it writes both, and one is taken away again; a carriage return in a name is quoted.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


def csv_writer(file: IO[str]) -> Any:
    r"""A writer of rows for a file that was opened with newline="".

    Names are written as they are, whatever they begin with: see SECURITY.md about spreadsheets.

    Example:
        >>> import io
        >>> text = io.StringIO()
        >>> csv_writer(text).writerow([0, 'a, "b"\r.png'])
        >>> text.getvalue()
        '0,"a, ""b""\r.png"\n'
    """
    return csv.writer(_Lines(file), lineterminator="\r\n")
