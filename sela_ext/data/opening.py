"""`open_source`: from what the user has to a source of images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from sela_ext.data.arrays import open_array, open_npy
from sela_ext.data.cifar import GZIP, cifar_kind_of, find_cifar, open_cifar, open_cifar_archive, open_cifar_file
from sela_ext.data.classes import ClassList, read_classes
from sela_ext.data.dataset import DatasetSource
from sela_ext.data.digits import digits_source
from sela_ext.data.folder import (
    EVAL_FOLDERS,
    TRAIN_FOLDER,
    find_files,
    find_split,
    folder_source,
    list_images,
    open_folder,
    open_paths,
    printable_path,
)
from sela_ext.data.huggingface import find_hf_folder, is_hf_dataset, is_parquet, open_hf_dataset, open_hf_files
from sela_ext.data.idx import find_idx, is_idx, open_idx
from sela_ext.data.labels import read_labels
from sela_ext.data.npz import open_npz
from sela_ext.data.shards import find_pack, open_pack, open_packs
from sela_ext.data.source import LabelledSource, Source
from sela_ext.data.stl10 import find_stl10, is_stl10_file, open_stl10, open_stl10_file
from sela_ext.data.svhn import find_svhn, is_mat, open_svhn
from sela_ext.data.table import is_table, open_table, read_label_table, table_beside
from sela_ext.data.tar import BLOCK, is_tar
from sela_ext.data.webdataset import expand_braces, open_tars
from sela_ext.errors import DataError

_EXPECTED = (
    'expected "digits", the path of a folder, of a table or of a file of images (docs/data.md lists the kinds), a list '
    "of paths, a uint8 array [N, H, W] or [N, H, W, C], floats [N, D], or a torch or Hugging Face Dataset"
)
_IDX_SPLITS = {"train": "train", "test": "t10k"}


def open_source(data: Any, *, labels: Any = None, classes: Any = None) -> Source:
    """Open images of any supported kind, or feature vectors.

    * `"digits"`: scikit-learn's 1,797 digits as 32 x 32 x 1, labelled.
    * uint8 arrays [N, H, W] or [N, H, W, C], C = 1 or 3, numpy (memory maps stay so) or torch; .npy and .npz files.
    * Feature vectors: float arrays [N, D], numpy (memory maps stay so) or torch; .npy and .npz files of them, such as
      `sela embed` writes.
    * A folder of image files, nested, unlabelled or with class folders; where it is divided into `train` and `test`
      (or `val`, ...), the images below `train` are taken. The rules are the notes in `sela_ext.data.folder`.
    * A list of paths of image files; a .csv, .tsv or .txt file that lists them (`sela_ext.data.table`).
    * IDX files, gzip-compressed or not, with the labels file beside them; or a folder in MNIST's naming, of which the
      training files are taken (`find_eval_source` gives the others).
    * CIFAR-10 and CIFAR-100, python or binary version, as a folder, a single file or the archive; STL-10's binary
      files; SVHN's cropped digits.
    * A pack that `sela_ext.pack` has made, or a folder with the packs `train` and `test` (or `val`, ...).
    * Tar archives, WebDataset shards among them: a file, a folder of them, or a pattern `shard-{000..012}.tar`
      (`sela_ext.data.webdataset`).
    * A Hugging Face Dataset or DatasetDict, what it saved on disk, or parquet files (`sela_ext.data.huggingface`).
    * A torch Dataset whose items are images or (image, label, ...): slow, see `DatasetSource`.
    * A `Source`, returned as it is if no labels are given.

    Args:
        data: One of the above.
        labels: True labels, int [N] or the path of a .npy file, -1 = unknown; or of a .csv, .tsv or .txt file that
            names the images, see `sela_ext.data.table`. They replace those found with the images. True labels serve
            metrics only. In a folder of images, `labels.csv` or `labels.tsv` does the same.
        classes: Names of the classes, a list or a text file with one per line, which fixes their numbers.

    Returns:
        The source.

    Raises:
        DataError: Nothing readable; the message says what was expected and found.

    Example:
        >>> source = open_source("digits")
        >>> source.describe()
        'digits: 1797 images, 32 x 32, grey, 10 classes (for metrics only)'
    """
    listed = None if classes is None else read_classes(classes)
    source = _open(data, listed, labelled=labels is None)
    if labels is None:
        return source if listed is None else _checked_classes(source, listed)
    if isinstance(labels, (str, os.PathLike)) and is_table(Path(labels)):
        return _labelled(source, Path(labels), listed)
    given = LabelledSource(source, read_labels(labels, len(source)))
    return given if listed is None else _checked_classes(given, listed)


def find_eval_source(data: Any, *, classes: Any = None) -> Source | None:
    """The images set aside for evaluation beside `data`, where their place follows from its layout.

    The folder `test` (or `val`, ...) beside `train`, with the same class numbers, and tables `test.csv` (or `val.csv`)
    beside `train.csv`; MNIST's `t10k` files, CIFAR's test batch, STL-10's and SVHN's test files, archives and parquet
    files named test* beside train*, "test" in a .npz file or a DatasetDict. The built-in digits have none: see
    `digits_split`.

    Args:
        data: As for `open_source`.
        classes: As for `open_source`.

    Returns:
        The source, or None.
    """
    listed = None if classes is None else read_classes(classes)
    found = _find_eval(data, listed)
    return found if found is None or listed is None else _checked_classes(found, listed)


def _find_eval(data: Any, classes: ClassList | None) -> Source | None:
    if is_hf_dataset(data):
        return open_hf_dataset(data, "test")
    if not isinstance(data, (str, os.PathLike)) or data == "digits":
        return None
    path = Path(data)
    if path.is_dir():
        known = _known_folder(path)
        return _find_eval_images(path, classes) if known is None else known("test", classes, labelled=True)
    if path.is_file():
        return _find_eval_beside(path, classes)
    shards = [Path(name) for name in expand_braces(str(path))]
    if len(shards) > 1 and shards[0].name.startswith("train"):
        found = find_files(shards[0].parent, ".tar", "test")
        return None if found is None else open_tars(found, classes=classes)
    return None


def _open(data: Any, classes: ClassList | None, *, labelled: bool) -> Source:
    if isinstance(data, Source):
        return data
    if isinstance(data, str) and data == "digits":
        return digits_source()
    if isinstance(data, (str, os.PathLike)):
        if not os.fspath(data):  # a variable of the shell that is not set
            raise DataError(f'data: {_EXPECTED}; found an empty path; give "." for this folder')
        try:
            return _open_path(Path(data), classes, labelled=labelled)
        except OSError as error:  # a name that is too long, a link that points to itself, a folder that is closed to us
            raise DataError(f"{printable_path(os.fspath(data)[:200])}: cannot be opened: {error.strerror}") from error
    if isinstance(data, (np.ndarray, torch.Tensor)):
        return open_array(data)
    if isinstance(data, (list, tuple)):
        return open_paths(data)
    if is_hf_dataset(data):
        found = open_hf_dataset(data)
        assert found is not None
        return found
    if isinstance(data, Dataset):
        return DatasetSource(data)
    raise DataError(f"data: {_EXPECTED}; found {type(data).__name__}")


def _open_path(path: Path, classes: ClassList | None, *, labelled: bool) -> Source:
    packed = find_pack(path)
    if packed is not None:
        return open_pack(packed)
    if path.is_dir():
        known = _known_folder(path)
        found = None if known is None else known("train", classes, labelled=labelled)
        return _open_image_folder(path, classes, labelled=labelled) if found is None else found
    if not path.exists():
        if "{" in path.name:
            return open_tars([Path(name) for name in expand_braces(str(path))], classes=classes)
        raise DataError(f"{path}: no such file or folder; {_EXPECTED}")
    if not path.is_file():
        raise DataError(f"{path}: {_EXPECTED}; found something that is neither a regular file nor a folder")
    return _open_file(path, classes, labelled=labelled)


def _open_file(path: Path, classes: ClassList | None, *, labelled: bool) -> Source:
    """One file, by its suffix where that says it all, and by its first bytes."""
    if path.suffix == ".npy":
        return open_npy(path)
    if path.suffix == ".npz":
        found = open_npz(path)
        assert found is not None
        return found
    if is_table(path):
        return open_table(path, classes=classes)
    if is_stl10_file(path):
        return open_stl10_file(path)
    if is_idx(path):
        return open_idx(path, labelled=labelled)
    head = _head(path)
    if is_tar(head):
        archive = open_cifar_archive(path)
        return open_tars([path], classes=classes) if archive is None else archive
    if head.startswith(GZIP):
        archive = open_cifar_archive(path)
        if archive is None:
            raise DataError(
                f"{path}: expected CIFAR's archive or IDX files in gzip, found another; images are read in place, so "
                "unpack it first: gunzip for a .tar of images, tar xf for files in folders"
            )
        return archive
    if is_mat(head):
        return open_svhn(path)
    if is_parquet(head):
        return open_hf_files([path])
    kind = cifar_kind_of(path, head)
    if kind is not None:
        return open_cifar_file(path, kind)
    raise DataError(f"{path}: {_EXPECTED}; found a file of another kind")


class _Opener(Protocol):
    """Opens a folder of a known layout; None if the split ("train" or "test") is not there."""

    def __call__(self, split: str, classes: ClassList | None, *, labelled: bool) -> Source | None: ...


def _known_folder(folder: Path) -> _Opener | None:
    """How to open a folder in the layout of a known data set; None for any other folder."""
    cifar, stl10 = find_cifar(folder), find_stl10(folder)

    def open_idx_split(split: str, classes: ClassList | None, *, labelled: bool) -> Source | None:
        images = find_idx(folder, _IDX_SPLITS[split])
        return None if images is None else open_idx(images, labelled=labelled)

    def open_cifar_split(split: str, classes: ClassList | None, *, labelled: bool) -> Source | None:
        assert cifar is not None
        place, kind = cifar
        there = split == "train" or any((place / name).is_file() for name in kind.test)
        return open_cifar(place, kind, split) if there else None

    def open_stl10_split(split: str, classes: ClassList | None, *, labelled: bool) -> Source | None:
        assert stl10 is not None
        there = split == "train" or (stl10 / "test_X.bin").is_file()
        return open_stl10(stl10, split) if there else None

    def open_svhn_split(split: str, classes: ClassList | None, *, labelled: bool) -> Source | None:
        path = find_svhn(folder, split)
        return None if path is None else open_svhn(path)

    def open_tar_split(split: str, classes: ClassList | None, *, labelled: bool) -> Source | None:
        shards = find_files(folder, ".tar", split)
        return None if shards is None else open_tars(shards, classes=classes)

    def open_pack_split(split: str, classes: ClassList | None, *, labelled: bool) -> Source | None:
        return open_packs(folder, split)

    def open_table_split(split: str, classes: ClassList | None, *, labelled: bool) -> Source | None:
        files = find_hf_folder(folder, split)
        return None if files is None else open_hf_files(files)

    if find_pack(folder / TRAIN_FOLDER) is not None:
        return open_pack_split
    if find_idx(folder, "train") is not None:
        return open_idx_split
    if cifar is not None:
        return open_cifar_split
    if stl10 is not None:
        return open_stl10_split
    if find_svhn(folder, "train") is not None:
        return open_svhn_split
    if find_hf_folder(folder) is not None:
        return open_table_split
    return open_tar_split if find_files(folder, ".tar", "train") is not None else None


def _open_image_folder(folder: Path, classes: ClassList | None, *, labelled: bool) -> Source:
    split = find_split(folder)
    place = folder if split is None else split[0]
    table = (table_beside(place) or table_beside(folder)) if labelled else None
    if table is None:
        return open_folder(place, classes=classes, labelled=labelled)
    return _labelled(open_folder(place, labelled=False), table, classes)


def _find_eval_images(folder: Path, classes: ClassList | None) -> Source | None:
    split = find_split(folder)
    if split is None:
        return None
    known = classes or _classes_of(_open_image_folder(folder, None, labelled=True))
    sources: list[Source] = []
    for place in split[1]:
        paths = list_images(place)
        if not paths:
            continue
        table = table_beside(place) or table_beside(folder)
        if table is None:
            sources.append(folder_source(place, paths, classes=known))
        else:
            sources.append(_labelled(folder_source(place, paths, labelled=False), table, known))
    return next((source for source in sources if source.labels is not None), sources[0] if sources else None)


def _find_eval_beside(path: Path, classes: ClassList | None) -> Source | None:
    """What belongs to a single training file."""
    if path.name.startswith("train-images"):
        test = find_idx(path.parent, "t10k")
        return None if test is None else open_idx(test)
    if path.suffix == ".npz":
        return open_npz(path, "test")
    if path.name == "train_32x32.mat":
        digits = find_svhn(path.parent, "test")
        return None if digits is None else open_svhn(digits)
    if path.name in ("train_X.bin", "unlabeled_X.bin"):
        return open_stl10(path.parent, "test") if path.with_name("test_X.bin").is_file() else None
    if is_table(path) and path.stem.lower() == TRAIN_FOLDER:
        beside = (path.with_name(f"{word}{path.suffix}") for word in EVAL_FOLDERS)
        found = next((table for table in beside if table.is_file()), None)
        if found is None:
            return None
        return open_table(found, classes=classes or _classes_of(open_table(path)))
    if is_idx(path):  # MNIST's test images, or others of another name: nothing is known to lie beside them
        return None
    head = _head(path)
    if is_tar(head) or head.startswith(GZIP):
        return open_cifar_archive(path, "test")
    return None


def _classes_of(source: Source) -> ClassList | None:
    """The classes of the training images; those that are evaluated may have others, which follow."""
    names = source.class_names
    return None if names is None else ClassList(tuple(names), fixed=False, where="the training images")


def _labelled(source: Source, table: Path, classes: ClassList | None) -> Source:
    values, names = read_label_table(table, source, classes=classes)
    return LabelledSource(source, values, names)


def _checked_classes(source: Source, classes: ClassList) -> Source:
    """The source with the names of its classes, where it has numbers only."""
    labels = source.labels
    if labels is not None and labels.max() >= len(classes.names):
        raise DataError(
            f"{classes.where}: expected a name for each label, found {len(classes.names)} names and the label "
            f"{int(labels.max())}"
        )
    if source.class_names is None and labels is not None:
        return LabelledSource(source, labels, list(classes.names))
    return source


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(BLOCK)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
