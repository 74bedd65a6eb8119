"""A folder in the layout of PASCAL VOC: image sets, boxes, classes and masks.

    JPEGImages/NAME.jpg
    Annotations/NAME.xml                  objects with their boxes
    ImageSets/Main/SPLIT.txt              names, one a line
    ImageSets/Main/CLASS_SPLIT.txt        NAME 1 | 0 | -1: there, hard to tell, not there
    ImageSets/Segmentation/SPLIT.txt
    SegmentationClass/NAME.png            palette images: the class of each pixel, 255 = undecided

Source: Everingham et al., "The PASCAL visual object classes (VOC) challenge", IJCV 2010.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sela_ext.data.decode import decode_file
from sela_ext.errors import DataError
from sela_ext.kernels.jpeg import MAX_PIXELS

# A VOC annotation has a few kilobytes.
_MOST_XML_BYTES = 1 << 20
_MOST_LIST_BYTES = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
UNDECIDED = 255


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one image.

    Attributes:
        names: their classes, M of them.
        boxes: float32 [M, 4]: left, top, right, bottom in pixels from 0; right and bottom just behind the object.
        difficult: bool [M]: not counted, neither for nor against.
    """

    names: list[str]
    boxes: NDArray[np.float32]
    difficult: NDArray[np.bool_]


class VocTree:
    """A VOC folder.

    Args:
        path: the folder that holds JPEGImages, or a devkit with one such year in it.

    Raises:
        DataError: no such folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _find(Path(path).expanduser())

    def split(self, kind: str, split: str) -> list[str]:
        """Names of the images of an image set.

        Args:
            kind: "Main" or "Segmentation".
            split: e.g. "trainval".

        Raises:
            DataError: the set is missing, empty, or holds something that is no name.
        """
        file = self.path / "ImageSets" / kind / f"{split}.txt"
        names = [line.split()[0] for line in _lines(file)]
        if not names:
            raise DataError(f"{file}: expected names of images, one a line, found none")
        for name in names:
            if not _NAME.fullmatch(name):
                raise DataError(f"{file}: expected names of images, found {name[:60]!r}")
        return names

    def choose_splits(self, kind: str, train: str, test: str) -> tuple[str, str]:
        """The splits to train and to judge on; "auto" is trainval and test where both are there, else train and val.

        Raises:
            DataError: there is neither pair.
        """
        folder = self.path / "ImageSets" / kind
        for first, second in (("trainval", "test"), ("train", "val")):
            pair = (first if train == "auto" else train), (second if test == "auto" else test)
            if all((folder / f"{name}.txt").is_file() for name in pair):
                return pair
        raise DataError(f"{folder}: expected trainval.txt and test.txt, or train.txt and val.txt, found neither pair")

    def image_path(self, name: str) -> str:
        """Path of an image."""
        return str(self.path / "JPEGImages" / f"{name}.jpg")

    def image(self, name: str) -> NDArray[np.uint8]:
        """Pixels of an image, uint8 [H, W, 3].

        Raises:
            DataError: missing or unreadable.
        """
        path = self.image_path(name)
        return decode_file(path, path)

    def objects(self, name: str) -> Objects:
        """The objects of an image.

        Raises:
            DataError: the annotation is missing, or not as VOC writes it.
        """
        return read_annotation(self.path / "Annotations" / f"{name}.xml")

    def presence(self, split: str) -> tuple[list[str], list[str], NDArray[np.int8]]:
        """Which classes are in which images.

        From the files CLASS_SPLIT.txt where there are any, else from the annotations: 1 where an object is there, 0
        where all objects of the class are difficult, -1 where there is none.

        Returns:
            Names of the N images, names of the C classes in alphabetical order, int8 [N, C].

        Raises:
            DataError: sets or annotations that do not fit.
        """
        names = self.split("Main", split)
        folder, ending = self.path / "ImageSets" / "Main", f"_{split}.txt"
        files = {file.name.removesuffix(ending): file for file in folder.glob(f"*{ending}")}
        if not files:
            return self._presence_of_objects(names)
        classes = sorted(files)
        row = {name: i for i, name in enumerate(names)}
        table = np.full((len(names), len(classes)), -1, np.int8)
        for column, label in enumerate(classes):
            for line in _lines(files[label]):
                parts = line.split()
                if len(parts) != 2 or parts[0] not in row or parts[1] not in ("1", "0", "-1"):
                    raise DataError(
                        f"{files[label]}: expected a name of {split}.txt and 1, 0 or -1 on every line, found "
                        f"{line[:60]!r}"
                    )
                table[row[parts[0]], column] = int(parts[1])
        return names, classes, table

    def _presence_of_objects(self, names: list[str]) -> tuple[list[str], list[str], NDArray[np.int8]]:
        found = [self.objects(name) for name in names]
        classes = sorted({label for objects in found for label in objects.names})
        if not classes:
            raise DataError(f"{self.path / 'Annotations'}: expected objects in {len(names)} images, found none")
        table = np.full((len(names), len(classes)), -1, np.int8)
        for i, objects in enumerate(found):
            for label, difficult in zip(objects.names, objects.difficult, strict=True):
                column = classes.index(label)
                table[i, column] = max(int(table[i, column]), 0 if difficult else 1)
        return names, classes, table

    def mask(self, name: str, shape: tuple[int, int], classes: int) -> NDArray[np.uint8]:
        """The class of each pixel, uint8 [H, W]; 255 = undecided.

        Args:
            name: of the image.
            shape: height and width of the image, which the mask must have too.
            classes: number of classes, background among them.

        Raises:
            DataError: missing, damaged, not a palette image, of another size, or with other classes.
        """
        path = self.path / "SegmentationClass" / f"{name}.png"
        _regular(path)
        try:
            with Image.open(path, formats=("PNG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"{path}: the header claims {image.width} x {image.height} pixels")
                if image.mode not in ("P", "L"):
                    raise DataError(f"{path}: expected a palette image, found mode {image.mode}")
                mask = np.array(image, np.uint8)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be read as a mask: {error}") from error
        if mask.shape != shape:
            raise DataError(f"{path}: expected the size of the image, {shape}, found {mask.shape}")
        strange = np.unique(mask[(mask >= classes) & (mask != UNDECIDED)])
        if strange.size:
            raise DataError(f"{path}: expected classes 0 .. {classes - 1} and 255, found {strange[:3].tolist()}")
        return mask


def read_annotation(path: Path) -> Objects:
    """Read the objects of a VOC annotation; no entities, no document type, at most a megabyte.

    Raises:
        DataError: missing, too large, no XML of VOC, or a box that is none.
    """
    data = _read(path, _MOST_XML_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected an annotation in UTF-8, found other bytes") from error
    # Entities can only come from a document type: without one there is nothing that could expand or be fetched.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{path}: expected a plain annotation, found a document type or entities; it is not read")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path}: expected an annotation, found no XML: {error}") from error
    names, boxes, difficult = [], [], []
    for item in root.findall("object"):
        box = item.find("bndbox")
        name = (item.findtext("name") or "").strip()
        if box is None or not name:
            raise DataError(f"{path}: expected objects with name and bndbox, found one without")
        left, top, right, bottom = (_number(path, box.findtext(key), key) for key in ("xmin", "ymin", "xmax", "ymax"))
        if not (left <= right and top <= bottom):
            raise DataError(f"{path}: expected a box, found {left:g}, {top:g} to {right:g}, {bottom:g}")
        names.append(name)
        boxes.append((left - 1, top - 1, right, bottom))
        difficult.append((item.findtext("difficult") or "0").strip() == "1")
    return Objects(names, np.array(boxes, np.float32).reshape(-1, 4), np.array(difficult, np.bool_))


def _number(path: Path, text: str | None, what: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or abs(value) > 1e6:
        raise DataError(f"{path}: expected a number for {what}, found {str(text)[:40]!r}")
    return value


def _find(path: Path) -> Path:
    if (path / "JPEGImages").is_dir():
        return path
    years = sorted(
        folder.parent for pattern in ("*/JPEGImages", "VOCdevkit/*/JPEGImages") for folder in path.glob(pattern)
    )
    if len(years) == 1:
        return years[0]
    found = f"{len(years)}: {', '.join(year.name for year in years)}; name one of them" if years else "none"
    raise DataError(f"{path}: expected a VOC folder, with JPEGImages in it, found {found}")


def _regular(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: expected a file, found something else")
    return status.st_size


def _read(path: Path, most: int) -> bytes:
    size = _regular(path)
    if size > most:
        raise DataError(f"{path}: expected at most {most:,} bytes, found {size:,}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _lines(path: Path) -> list[str]:
    try:
        text = _read(path, _MOST_LIST_BYTES).decode("ascii")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a list of names, found other bytes") from error
    return [line for line in text.splitlines() if line.strip()]
