"""Errors that a user can meet. Each is one line: what, where, what to do; each kind has its exit code."""

from __future__ import annotations

from typing import Any

# Characters of a value in a message.
_SHOWN = 100


class SelaError(Exception):
    """Base of all errors raised on purpose by this package.

    Args:
        message: what was expected, what was found, what to do. It is made one line: names of files and values of
            options may hold line ends, and whatever else terminals take for commands.

    Attributes:
        exit_code: exit status of the command line.
        of_all_ranks: raised by every rank of a run at the same place, so that none needs to be told.

    Example:
        >>> str(DataError("a" + chr(10) + "b.jpg: expected an image"))
        'a b.jpg: expected an image'
    """

    exit_code: int = 1
    of_all_ranks: bool = False

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class OptionError(SelaError, ValueError):
    """An option has an unknown name, a wrong type or a value outside its range."""

    exit_code = 2


class DataError(SelaError):
    """Images, labels or logits are missing, unreadable or do not fit together."""

    exit_code = 3


class CheckpointError(SelaError):
    """A checkpoint is missing, damaged, or belongs to another run."""

    exit_code = 4


class NumericsError(SelaError):
    """A number that must be finite is not."""

    exit_code = 5


class DistributedError(SelaError):
    """A rank died, hung, or sees other data or options than the rest."""

    exit_code = 6


class ResourceError(SelaError):
    """Disk, memory or a device does not suffice."""

    exit_code = 7


def one_line(text: str) -> str:
    """A text as one line that every terminal shows: white space is one blank, other characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def shown(value: Any) -> str:
    """A value for a message: as it is written in Python, in one line, and cut where it is long.

    Example:
        >>> shown(0.5), len(shown([0] * 1000)), shown("x" * 1000)[-6:]
        ('0.5', 103, 'xxx...')
    """
    try:
        text = one_line(repr(value))
    except ValueError:  # a whole number with more digits than Python writes
        text = f"a value of type {type(value).__name__} that is too long to be shown"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
