"""Image files in a folder tree or in a list of paths.

Note [Class folders]
    A folder's images carry labels, for metrics only, if every image lies in a sub-folder of it and there is more than
    one such sub-folder: the first-level sub-folders, in sorted order, are the classes. An image directly in the folder
    makes it unlabelled. Deeper levels do not matter. A list of classes, one name per line, fixes the numbers instead of
    the order: given as `classes`, or as `classes.txt` or `class_names.txt` in the folder if it names all of them.

Note [Which files are images]
    A regular file whose name does not begin with a dot, and whose suffix or first bytes are those of a JPEG, PNG, GIF,
    BMP, WebP or TIFF image. So a picture with a wrong suffix or none is found, a damaged .jpg is reported when it is
    read instead of vanishing, and other files are ignored. Pipes, sockets and devices are never opened. Symbolic links
    are followed, folders that were visited already are not entered again.

Note [Train and test folders]
    A folder that holds no image itself, but `train` and at least one of `test`, `val`, `valid` and `validation`, is
    divided: the images below `train` are the data. Those of the first of the others that has class folders, or else
    that has images, are for evaluation.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sela_ext.data.classes import ClassList, class_file_in
from sela_ext.data.decode import HEAD_BYTES, decode_file, sniff
from sela_ext.data.labels import read_labels
from sela_ext.data.path_list import PathList
from sela_ext.data.safe_files import OUT_OF_RESOURCES, open_regular
from sela_ext.data.source import Int64Array, Located, LocatedImages, Source, UInt8Array
from sela_ext.errors import DataError
from sela_ext.kernels import JoinedPaths

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"})
TRAIN_FOLDER = "train"
EVAL_FOLDERS = ("test", "val", "valid", "validation")
# Files whose sizes enter the fingerprint: all of a small folder, an even sample of a large one.
FINGERPRINT_FILES = 10_000
# Small images (up to 104 x 104 pixels) are kept once decoded, as far as this room goes: 50,000 of 32 x 32 fit, and
# decoding one takes about ten times as long as augmenting it.
CACHE_BYTES = 1 << 28
CACHE_IMAGE_BYTES = 1 << 15


class FileSource(Source):
    """Image files, decoded when read; always RGB. Small images are decoded once: `CACHE_BYTES`."""

    def __init__(
        self,
        paths: Sequence[str],
        *,
        kind: str,
        root: str = "",
        labels: Int64Array | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.kind = kind
        self.class_names = class_names
        self._paths = paths if isinstance(paths, PathList) else PathList(paths)
        self._prefix = os.path.join(root, "") if root else ""
        self._uniform = not self._prefix or not self._paths.any_absolute()  # the prefix is before all paths
        self._labels = labels
        self._names: list[str] | None = None
        self._cache: dict[int, UInt8Array] = {}
        self._cache_room = CACHE_BYTES
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        if self._names is None:
            self._names = [printable_path(path) for path in self._paths]
        return self._names

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return printable_path(self._paths[index])

    def iter_names(self) -> Iterator[str]:
        """See `Source.iter_names`."""
        return map(printable_path, self._paths)

    @property
    def labels(self) -> Int64Array | None:
        """See `Source.labels`."""
        return self._labels

    def path(self, index: int) -> str:
        """Path of the file of image `index`."""
        path = self._paths[index]
        return path if path.startswith("/") else self._prefix + path

    @property
    def encoded(self) -> bool:
        """See `Source.encoded`."""
        return True

    def locate(self, index: int) -> Located:
        """See `Source.locate`."""
        return Located(path=self.path(index))

    def locate_all(self, index: Int64Array) -> LocatedImages:
        """See `Source.locate_all`."""
        if not self._uniform:
            return super().locate_all(index)
        return LocatedImages(JoinedPaths(self._paths.joined(index, os.fsencode(self._prefix))))

    def read(self, index: int) -> UInt8Array:
        """See `Source.read`."""
        kept = self._cache.get(index)
        if kept is not None:
            return kept
        path = self.path(index)
        pixels = decode_file(path, printable_path(path))
        if pixels.nbytes <= CACHE_IMAGE_BYTES:
            with self._lock:
                if pixels.nbytes <= self._cache_room and index not in self._cache:
                    pixels.flags.writeable = False
                    self._cache[index] = pixels
                    self._cache_room -= pixels.nbytes
        return pixels

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        digest = hashlib.sha256()
        for row in np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_FILES).astype(np.int64)):
            try:
                size = os.stat(self.path(int(row))).st_size
            except OSError:
                size = -1
            digest.update(f"{size},".encode())
        return {**super().fingerprint(), "file_sizes": digest.hexdigest()}


def open_folder(folder: Path, *, classes: ClassList | None = None, labelled: bool = True) -> FileSource:
    """Open a folder tree of images.

    Args:
        folder: See Note [Class folders] and Note [Which files are images].
        classes: Names and numbers of the classes known already.
        labelled: Whether class folders matter.

    Returns:
        A source whose names are the paths relative to `folder`, with "/", sorted level by level.

    Raises:
        DataError: No image, a folder that cannot be read, or a class folder that is not among the `classes`.
    """
    paths = list_images(folder)
    if not paths:
        raise DataError(
            f"{folder}: expected JPEG, PNG, GIF, BMP, WebP or TIFF images in the folder or below, found none"
        )
    return folder_source(folder, paths, classes=classes, labelled=labelled)


def folder_source(
    folder: Path, paths: Sequence[str], *, classes: ClassList | None = None, labelled: bool = True
) -> FileSource:
    """`open_folder` for the images that `list_images` has found, at least one."""
    found = class_folders(paths, classes, folder) if labelled else None
    labels, class_names = (None, None) if found is None else found
    return FileSource(paths, kind="folder", root=str(folder), labels=labels, class_names=class_names)


def class_folders(
    paths: Sequence[str], classes: ClassList | None = None, folder: Path | None = None
) -> tuple[Int64Array, list[str]] | None:
    """Labels and class names by Note [Class folders]; None if the images are unlabelled.

    Args:
        paths: With "/", of all images.
        classes: Names known already.
        folder: Where a class list may lie.

    Raises:
        DataError: A folder that is not among classes that are all known.
    """
    tops: set[str] = set()
    for path in paths:
        top, slash, _ = path.partition("/")
        if not slash:
            return None
        tops.add(top)
    if len(tops) < 2 and (classes is None or not classes.fixed):
        return None
    # Class names are kept as file names while they are compared, and made printable at the end.
    if classes is None and folder is not None:
        classes = class_file_in(folder, [printable_path(name) for name in tops])
    known = [] if classes is None else list(classes.names)
    others = [name for name in sorted(tops) if printable_path(name) not in known]
    if others and classes is not None and classes.fixed:
        raise DataError(
            f"{folder or 'data'}: expected folders of the {len(known)} classes of {classes.where}, found "
            f"{printable_path(others[0])}"
        )
    names = [printable_path(name) for name in known + others]
    number = {name: i for i, name in reversed(list(enumerate(names)))}
    number |= {name: number[printable_path(name)] for name in tops}
    values = np.fromiter((number[path.split("/", 1)[0]] for path in paths), dtype=np.int64, count=len(paths))
    return values, names


def open_paths(paths: Sequence[str | Path], *, labels: Any = None) -> FileSource:
    """Open a list of image files; the files are looked at when they are read.

    Raises:
        DataError: The list is empty or holds something other than paths.
    """
    if not paths:
        raise DataError("data: expected at least one path, found an empty list")
    for kind in set(map(type, paths)):
        if not issubclass(kind, (str, os.PathLike)):
            i = next(i for i, path in enumerate(paths) if type(path) is kind)
            raise DataError(f"data: expected a list of paths, found {kind.__name__} at position {i}")
    checked = None if labels is None else read_labels(labels, len(paths))
    try:
        compact = PathList(paths)
    except ValueError as error:
        raise DataError(f"data: {error}") from error
    return FileSource(compact, kind="paths", labels=checked)


def find_split(folder: Path) -> tuple[Path, list[Path]] | None:
    """The folders of training and evaluation images: Note [Train and test folders].

    Returns:
        (train, [test, val, ...] as far as they exist), or None if the folder is not divided in this way.
    """
    train = folder / TRAIN_FOLDER
    others = [folder / name for name in EVAL_FOLDERS if (folder / name).is_dir()]
    if not train.is_dir() or not others:
        return None
    with os.scandir(folder) as entries:
        if any(_is_image(entry) for entry in entries if not entry.name.startswith(".")):
            return None
    return train, others


def find_files(folder: Path, suffix: str, split: str) -> list[Path] | None:
    """Files that hold many images each, of one split: archives, or tables of images.

    They lie in the folder, where neither images nor folders may lie, and are divided by the first word of their names
    if some are named train* and others test*, val*, valid* or validation*; or in its folders of these names; or in its
    folder `data`, as they do in copies of the Hugging Face hub.

    Args:
        folder: Where to look.
        suffix: Of the files, with the dot.
        split: "train" or "test".

    Returns:
        The files, sorted; None if there are none at all, or none of that split.
    """
    for place in (folder, folder / "data"):
        found = sole_files(place, suffix)
        if found:
            by_word = {word: [path for path in found if _word(path) == word] for word in (TRAIN_FOLDER, *EVAL_FOLDERS)}
            train, test = by_word[TRAIN_FOLDER], next((by_word[w] for w in EVAL_FOLDERS if by_word[w]), None)
            if split == "test":
                return test if train else None
            return train if train and test else found
    if sole_files(folder / TRAIN_FOLDER, suffix):
        places = (TRAIN_FOLDER,) if split == "train" else EVAL_FOLDERS
        return next((found for name in places if (found := sole_files(folder / name, suffix))), None)
    return None


def _word(path: Path) -> str:
    """The word that a file name begins with, in lower case."""
    return re.split(r"[^a-z]", path.name.lower(), maxsplit=1)[0]


def sole_files(folder: Path, suffix: str) -> list[Path]:
    """Files of a suffix in a folder, sorted; none if a visible folder or an image lies there, or it cannot be listed.

    The first of these ends the search, so that a folder of a million images costs nothing.
    """
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.endswith(suffix) and entry.is_file():
                    found.append(Path(entry.path))
                elif _is_dir(entry) or _is_image(entry):
                    return []
    except OSError:  # not there, or said when the images are listed
        return []
    return sorted(found)


def list_images(folder: Path) -> list[str]:
    """Relative paths, with "/", of all images below a folder: Note [Which files are images].

    Raises:
        DataError: A folder cannot be listed.
    """
    found: list[str] = []
    visited: set[tuple[int, int]] = set()
    # Links wait until the real folders are done, so that a folder has its own name rather than that of a link to it.
    plain, links = [""], list[str]()
    while plain or links:
        if plain:
            relative = plain.pop()
        else:
            links.sort(key=_sort_key, reverse=True)
            relative = links.pop()
        path = os.path.join(folder, relative)
        try:
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino)
            if identity in visited:
                continue
            visited.add(identity)
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    name = f"{relative}/{entry.name}" if relative else entry.name
                    if _is_dir(entry):
                        (links if entry.is_symlink() else plain).append(name)
                    elif _is_image(entry):
                        found.append(name)
        except OSError as error:
            raise DataError(f"{printable_path(path)}: cannot be listed: {error.strerror or error}") from error
    found.sort(key=_sort_key)
    return found


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    try:
        if not entry.is_file():
            return False  # pipes, sockets, devices, dangling links
        if os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            return True
        with os.fdopen(open_regular(entry.path), "rb") as file:
            return sniff(file.read(HEAD_BYTES)) is not None
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise  # or images would be missing without a word
        return False


def _sort_key(path: str) -> str:
    # Level by level: "a/x" before "a-b/x", although "-" sorts before "/".
    return path.replace("/", "\0")


def printable_path(path: str) -> str:
    """A path for tables and messages: file names need not be UTF-8, those must be."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    return path
