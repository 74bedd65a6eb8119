"""A folder per cluster, with links to the image files or copies of them."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from sela_ext.data.csv_file import csv_writer
from sela_ext.data.safe_files import open_regular
from sela_ext.errors import DataError, OptionError, ResourceError
from sela_ext.export.destination import Exported, new_folder
from sela_ext.export.request import Request, is_files

LINKS = ("symbolic", "hard", "copy")
# Bytes of a file's own name that stay; file systems take 255 in all.
_MOST_NAME = 160
_UNSAFE = re.compile(r'[\\/:*?"<>|]')


def write_folders(path: Path, request: Request) -> Exported:
    """Sort the image files into folders by the labels of one head.

    Raises:
        OptionError: an unknown kind of link, or several heads.
        DataError: the images are no files, or not there.
        ResourceError: a file system that does not take such links, or is full.
    """
    if request.link not in LINKS:
        raise OptionError(f"link: expected {', '.join(LINKS)}, found {request.link!r}")
    labels = request.labels("best")
    if len(labels.heads) != 1:
        raise OptionError(f"head: expected one head to sort by, found {len(labels.heads)}; name best or a number")
    source = request.source
    if not is_files(source):
        raise DataError(f"data: expected images that are files of their own, found {source.describe()}")
    row, clusters = labels.labels[0], labels.clusters[0]
    digits = max(len(str(clusters - 1)), 2)
    images = max(len(str(len(row) - 1)), 5)
    done = 0
    with new_folder(path) as folder, open(folder / "index.csv", "x", encoding="utf-8", newline="") as table:
        writer = csv_writer(table)
        writer.writerow(["file", "name", "index", "cluster", "confidence"])
        for index, cluster in enumerate(row.tolist()):
            if cluster < 0:
                continue
            original = source.locate(index).path
            if original is None:
                raise DataError(f"data: expected image files, found {labels.names[index]}, which is none")
            place = folder / f"cluster_{cluster:0{digits}d}"
            place.mkdir(exist_ok=True)
            file = place / f"{index:0{images}d}_{safe_name(original)}"
            _put(original, file, request.link)
            confidence = f"{labels.confidence[0, index]:.4f}"
            writer.writerow([f"{place.name}/{file.name}", labels.names[index], index, cluster, confidence])
            done += 1
    what = {"symbolic": "symbolic links", "hard": "hard links", "copy": "copies"}[request.link]
    facts = {"heads": labels.heads, "clusters": labels.clusters, "images": done}
    return Exported(path, "folders", [*labels.told(), f"{done:,} {what}; {path / 'index.csv'} lists them"], facts)


def safe_name(path: str) -> str:
    r"""A file's name that is harmless anywhere: printable, without separators, of bounded length, its suffix kept.

    Example:
        >>> safe_name("a/b/we ird:na\nme?.JPG"), len(safe_name("x" * 250 + ".png"))
        ('we ird_na_me_.JPG', 160)
    """
    name = os.path.basename(path)
    name = "".join(c if c.isprintable() else "_" for c in name)
    stem, suffix = os.path.splitext(_UNSAFE.sub("_", name).strip(" "))
    if len(suffix.encode()) > 16:
        stem, suffix = stem + suffix, ""
    stem = stem.encode()[: _MOST_NAME - len(suffix.encode())].decode(errors="ignore")
    return (stem + suffix).rstrip(" .")


def _put(original: str, file: Path, link: str) -> None:
    target = os.path.realpath(original)
    try:
        handle = open_regular(target)
    except OSError as error:
        raise DataError(
            f"{os.fsencode(original).decode(errors='backslashreplace')}: cannot be linked or copied: "
            f"{error.strerror or error}; name the place of the images as data"
        ) from error
    with os.fdopen(handle, "rb") as stream:
        if link == "symbolic":
            os.symlink(target, file)
            return
        if link == "copy":
            with open(file, "xb") as copy:
                shutil.copyfileobj(stream, copy, 1 << 20)
            return
    try:
        os.link(target, file)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        raise ResourceError(
            f"{file.name}: a hard link cannot be made: {error.strerror}; use symbolic links or copies"
        ) from error
