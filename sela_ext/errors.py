"""Errors that a user can meet. Each is one line: what, where, what to do; each kind has its exit code."""

from __future__ import annotations


class SelaError(Exception):
    """Base of all errors raised on purpose by this package.

    Attributes:
        exit_code: exit status of the command line.
        of_all_ranks: raised by every rank of a run at the same place, so that none needs to be told.
    """

    exit_code: int = 1
    of_all_ranks: bool = False


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
