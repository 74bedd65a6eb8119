"""Errors that a user can meet. Each is one line: what, where, what to do; each kind has its exit code."""

from __future__ import annotations

import contextlib
import difflib
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

# Characters of a value in a message.
_SHOWN = 100
# Categories of Unicode: controls, direction marks and the like, halves of characters, ends of lines and paragraphs.
_UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def harmless(text: str) -> str:
    r"""A text that may hold names of files, as it can be printed: what a terminal would obey is spelled out.

    Ends of lines stay: see `one_line`.

    Example:
        >>> harmless("a\x1b[2Jb.png")
        'a\\x1b[2Jb.png'
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(repr(c)[1:-1] if c != "\n" and unicodedata.category(c) in _UNSHOWN else c for c in text)


def one_line(text: str) -> str:
    """`harmless` on one line."""
    return harmless(text.replace("\n", "\\n"))


class SelaError(Exception):
    r"""Base of all errors raised on purpose by this package; their text holds nothing that a terminal would obey.

    Args:
        message: what was expected, what was found, what to do. It is made one line: names of files and values of
            options may hold line ends, and whatever else terminals take for commands.

    Attributes:
        exit_code: exit status of the command line.
        of_all_ranks: raised by every rank of a run at the same place, so that none needs to be told.

    Example:
        >>> print(DataError("a" + chr(10) + "b.jpg: expected an image"))
        a\nb.jpg: expected an image
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


# What libraries say when a process gets no more memory, in errors of other kinds. Of a thread it is its stack that is
# missing; the last words are those of oneDNN, and of CUDA's libraries.
_NO_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc"),
    *("can't start new thread", "could not create a primitive", "status_alloc_failed"),
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
        place = "GPU memory" if "cuda" in text.lower() or "cudnn" in text.lower() else "memory"
        raise ResourceError(f"{place}: expected more than this process can have{told}; {remedy}") from error


def nearest(found: object, known: Iterable[str]) -> str:
    """Words for the end of a message: the known name that is most like what was found; nothing where none is.

    Example:
        >>> nearest("resnt18", ["alexnet", "resnet18"]), nearest("x", ["alexnet"])
        ("; did you mean 'resnet18'?", '')
    """
    near = difflib.get_close_matches(str(found)[:_SHOWN].lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


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
