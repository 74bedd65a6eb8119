"""Checkpoint indexes of many images, kept in files: every epoch but the first decodes no more than it shows."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

from sela_ext import _core
from sela_ext.errors import OptionError


class IndexStoreWarning(UserWarning):
    """Checkpoint indexes are not kept, or not in the folder; training goes on, somewhat slower."""


class IndexStore:
    """Checkpoint indexes by image number; see Note [Checkpoint index] in `sela_ext.kernels.jpeg`.

    A `Reader` fills it while it decodes images for the first time and looks there before it decodes. An entry belongs
    to one state of one image: size and modification time of its file (0 for bytes in memory), and a digest that the
    index carries; where these differ it is made anew. Images whose data turned out damaged are remembered as well.

    Every process of a run writes a file of its own in the folder and reads the files of all. What was not written
    completely, after a crash, is cut off. Where the folder cannot be written to, or the disk is full, there is one
    warning, and what can be kept is kept in an unnamed temporary file, or not at all.

    Args:
        folder: Where `jpeg_index-<rank>.bin` is, or will be; made if need be. None: an unnamed temporary file in
            $TMPDIR or /tmp, gone with the store.
        rank: This process among those of the run, >= 0.

    Raises:
        OptionError: `rank` is negative.

    Example:
        >>> with IndexStore() as store:
        ...     len(store)
        0
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, rank: int = 0) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise OptionError(f"rank: expected an integer >= 0, found {rank!r}")
        self._warned = False
        if folder is not None:
            with contextlib.suppress(OSError):  # told below
                os.makedirs(folder, exist_ok=True)
        self._core = _core.IndexStore(b"" if folder is None else os.fsencode(folder), rank)
        self.warn_once()

    @property
    def core(self) -> _core.IndexStore:
        """What the compiled reader takes."""
        return self._core

    def __len__(self) -> int:
        """Images of which something is known."""
        return len(self._core)

    @property
    def nbytes(self) -> int:
        """Size of all files, bytes."""
        return self._core.bytes()

    @property
    def failure(self) -> str | None:
        """Why new indexes are not kept (in the folder); None as long as they are."""
        return self._core.failure() or None

    @property
    def path(self) -> Path | None:
        """The file that is written to; None for an unnamed one."""
        path = self._core.path()
        return Path(path) if path else None

    def get(self, image: int, size: int, modified_ns: int = 0) -> bytes | None:
        """The index of an image.

        Args:
            image: Its number, [0, 2^40).
            size: Of its file, bytes.
            modified_ns: Modification time of its file, nanoseconds since 1970; 0 for bytes in memory.

        Returns:
            The index; None where there is none for this state of the image.
        """
        kind, payload = self._core.find(image, size, modified_ns)
        return payload if kind == "index" else None

    def put(self, image: int, size: int, index: bytes, modified_ns: int = 0) -> None:
        """Keep the index of an image, as `jpeg_index` makes it; arguments as for `get`."""
        known = self._core.find(image, size, modified_ns)[0] != "nothing"
        self._core.add(image, size, modified_ns, index, not known)
        self.warn_once()

    def refresh(self) -> None:
        """Take in what other processes have written meanwhile; cheap, once per epoch is enough."""
        self._core.refresh()

    def close(self) -> None:
        """Close the files; readers that still have the store go on without it."""
        self._core.close()

    def __enter__(self) -> IndexStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def warn_once(self) -> None:
        """Warn of `failure`, if there is one and nobody was warned of it."""
        failure = self.failure
        if failure is None or self._warned:
            return
        self._warned = True
        failure = os.fsencode(failure).decode("utf-8", "backslashreplace")
        if self._core.writes():
            problem = f"checkpoint indexes of JPEG files are not kept after this run: {failure}"
        else:
            problem = f"checkpoint indexes of JPEG files are not kept: {failure}; images are read in full instead"
        warnings.warn(
            problem,
            IndexStoreWarning,
            stacklevel=3,
        )
