"""Reading a PyTorch checkpoint that nobody vouches for.

What a checkpoint says about itself is not believed: the file is looked at before PyTorch sees it, PyTorch unpickles
tensors and plain values alone (`weights_only`), and no more memory is asked for than the file is long.
"""

from __future__ import annotations

import io
import pickle
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from sela_ext.errors import CheckpointError, ResourceError, lacks_memory

# The first bytes of the format before PyTorch 1.6: a pickled magic number of ten bytes.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"
# A directory or pickle beyond these sizes describes no network; both become Python objects of many times their size.
_DIRECTORY_BYTES = 8 << 20
_PICKLE_BYTES = 64 << 20
# What torch.load raises on files that are not as torch.save wrote them.
_OF_DAMAGE = (
    *(RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, AssertionError),
    *(struct.error, OverflowError, RecursionError, MemoryError, OSError),
)


def read_archive(path: Path) -> Any:
    """Read a checkpoint of tensors and plain values, on the CPU.

    Tensors of the zip format (PyTorch 1.6 and later) are mapped, not read: copy what is kept.

    Args:
        path: a file written by `torch.save`.

    Raises:
        CheckpointError: missing, not a checkpoint, damaged, carries code, or claims more than the file holds.
        ResourceError: memory does not suffice.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: expected a checkpoint file, found something else; name the file itself")
        with open(path, "rb") as file:
            head = file.read(265)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint file: {error.strerror}; check the path") from error
    # torch.load goes by the suffix where it is this one, whatever the file holds.
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: expected a file of torch.save, found one named .safetensors; rename it")
    if head.startswith(_ZIP):
        with open(path, "rb") as file:
            _check_zip(str(path), file, status.st_size)
        content = _load(str(path), path, mmap=True)
    elif head.startswith(_LEGACY):
        # Once without data, for the sizes alone: the format allocates first and compares afterwards.
        with torch.serialization.skip_data():
            _check_claims(str(path), _load(str(path), path, map_location="meta"), status.st_size)
        content = _load(str(path), path)
    elif head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path}: this is the tar format of PyTorch before 0.2, which cannot be read safely; "
            "load and save it again with an old PyTorch, where you trust the file"
        )
    else:
        raise CheckpointError(f"{path}: expected a file written by torch.save, found {_describe(head)}")
    _check_claims(str(path), content, status.st_size)
    return content


def read_saved(data: bytes, where: str) -> Any:
    """Tensors and plain values out of the bytes that `torch.save` made of them, on the CPU.

    Args:
        data: the zip format alone, which this package writes.
        where: what to call it in messages.

    Raises:
        CheckpointError, ResourceError: as `read_archive`.
    """
    if not data.startswith(_ZIP):
        raise CheckpointError(f"{where}: expected what torch.save writes, found {_describe(data[:8])}")
    _check_zip(where, io.BytesIO(data), len(data))
    content = _load(where, io.BytesIO(data))
    _check_claims(where, content, len(data))
    return content


def tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts and sequences, each container looked into once."""
    todo, seen = [content], set()
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)


def _load(where: str, source: Path | IO[bytes], **how: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on how the file was written; what matters is checked here
            how = {"map_location": "cpu", **how}
            if not isinstance(source, Path) or _is_utf8(source):
                return torch.load(source, weights_only=True, **how)
            how.pop("mmap", None)  # torch maps and opens no other names
            with open(source, "rb") as file:
                return torch.load(file, weights_only=True, **how)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|function|class|global)\W+([A-Za-z_][\w.]*\.[\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{where}: expected tensors and plain values, found objects that need code{what}; nothing of it was run. "
            "Where you trust the file, load it yourself and save its state dict and labels alone"
        ) from error
    except _OF_DAMAGE as error:
        if lacks_memory(error):  # a checkpoint that is whole must not be passed over
            raise ResourceError(f"{where}: expected memory to read it, found too little; free some") from error
        raise CheckpointError(f"{where}: the checkpoint is damaged or incomplete: {_first_line(error)}") from error


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_zip(where: str, file: IO[bytes], size: int) -> None:
    """Refuse a zip file that is not as torch.save writes it: stored, not compressed, nothing larger than the file."""
    file.seek(max(0, size - 65_557))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < 22:
        raise CheckpointError(f"{where}: the checkpoint is damaged or incomplete: its directory is missing")
    (directory,) = struct.unpack_from("<I", tail, end + 12)
    if directory > _DIRECTORY_BYTES:
        raise CheckpointError(f"{where}: expected a checkpoint, found a directory of {directory:,} bytes; not read")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{where}: the checkpoint is damaged or incomplete: {_first_line(error)}") from error
    claimed = sum(entry.file_size for entry in entries)
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or claimed > size:
        found = f"compressed entries ({packed[0][:80]!r})" if packed else f"{claimed:,} bytes claimed in {size:,}"
        raise CheckpointError(f"{where}: expected the uncompressed zip of torch.save, found {found}; not read")
    for entry in entries:
        if entry.filename.endswith(".pkl") and entry.file_size > _PICKLE_BYTES:
            found = f"{entry.file_size:,} bytes of pickle"
            raise CheckpointError(f"{where}: expected a checkpoint, found {found}; not read")


def _check_claims(where: str, content: Any, size: int) -> None:
    """Refuse tensors that are, one by one or together, larger than the file they came from."""
    storages: set[int] = set()
    total = 0
    for tensor in tensors_in(content):
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"{where}: expected plain tensors, found a sparse one; it is not loaded")
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages.add(storage._cdata)
            total += storage.nbytes()
        if max(total, tensor.numel() * tensor.element_size()) > size:
            raise CheckpointError(
                f"{where}: expected tensors within its {size:,} bytes, found one of {tuple(tensor.shape)} that is not; "
                "it is not loaded"
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _describe(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head.startswith((b"\x80", b"(")):
        return "a pickle of another kind"
    return f"a file that starts with {head[:8]!r}"
