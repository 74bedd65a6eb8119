"""What else lies in a folder of images."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from sela_ext.data.decode import HEAD_BYTES, sniff
from sela_ext.data.folder import SUFFIXES

FIRST = 20


@dataclass
class OtherFiles:
    """Files below a folder that are not taken for images.

    Attributes:
        count: regular files that are not images, hidden ones left out.
        first: the first of their names, relative to the folder, as the folder lists them.
        hidden: files and folders whose name begins with a dot: never looked at.
        special: pipes, sockets, devices and links that lead nowhere: never opened.
        images: regular files that are taken for images, for comparison.
    """

    count: int = 0
    first: list[str] = field(default_factory=list)
    hidden: int = 0
    special: int = 0
    images: int = 0


def other_files(folder: Path) -> OtherFiles:
    """Walk a folder by the rules by which its images are listed: see `sela_ext.data.folder`."""
    found = OtherFiles()
    visited: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        path = os.path.join(folder, relative)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda one: one.name):
                    name = f"{relative}/{entry.name}" if relative else entry.name
                    if entry.name.startswith("."):
                        found.hidden += 1
                    elif _is_folder(entry):
                        waiting.append(name)
                    else:
                        _sort_in(found, entry, name)
        except OSError:
            continue  # a folder that cannot be listed: opening the data has said so already
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _sort_in(found: OtherFiles, entry: os.DirEntry[str], name: str) -> None:
    try:
        regular = entry.is_file()
    except OSError:
        regular = False
    if not regular:
        found.special += 1
    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES or _begins_like_an_image(entry.path):
        found.images += 1
    else:
        found.count += 1
        if len(found.first) < FIRST:
            found.first.append(name)


def _begins_like_an_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return sniff(file.read(HEAD_BYTES)) is not None
    except OSError:
        return False
