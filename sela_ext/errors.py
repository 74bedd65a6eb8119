"""Errors that a user can meet. Each is one line: what, where, what to do; each kind has its exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


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


# What libraries say when a process gets no more memory, in errors of other kinds. Of a thread it is its stack that is
# missing; the last words are oneDNN's.
_NO_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc"),
    *("can't start new thread", "could not create a primitive"),
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, of whatever kind, says that an allocation failed: then nothing else is to blame.

    Example:
        >>> lacks_memory(MemoryError()), lacks_memory(OSError(12, "Cannot allocate memory")), lacks_memory(ValueError())
        (True, True, False)
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in _NO_MEMORY)


@contextlib.contextmanager
def out_of_memory(remedy: str) -> Iterator[None]:
    """What fails inside for want of memory is a `ResourceError`; also a decorator.

    Args:
        remedy: what to do.

    Raises:
        ResourceError: in place of MemoryError, and of what PyTorch raises when an allocation fails.

    Example:
        >>> with out_of_memory("use a smaller batch_size"):
        ...     raise MemoryError
        Traceback (most recent call last):
        sela_ext.errors.ResourceError: memory: expected more than this process can have; use a smaller batch_size
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not lacks_memory(error):
            raise
        text = " ".join(str(error).split())
        told = f" ({text[:200]})" if text else ""
        raise ResourceError(f"memory: expected more than this process can have{told}; {remedy}") from error
