"""Other libraries' messages, for errors of one line."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    r"""The first line of an error's text, or its type if it has none.

    Example:
        >>> first_line(ValueError("too long\nand more"))
        'too long'
    """
    lines = str(error).split("\n")
    return " ".join(lines[0].split()) or type(error).__name__
