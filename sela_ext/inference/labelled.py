"""Labelled data sets to evaluate on: which images teach a probe, and which judge it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sela_ext.data import Source, digits_split, find_eval_source, open_source
from sela_ext.errors import DataError, OptionError
from sela_ext.inference.subject import Subject
from sela_ext.training.fixed_labels import is_there
from sela_ext.training.options import Options
from sela_ext.training.split import choose_images, has_labels

# Between the images that teach and those that judge, where both are named in one text.
SEPARATOR = "::"


@dataclass(frozen=True)
class DataSet:
    """Labelled images.

    Attributes:
        name: what the report calls them.
        train: images that vote and teach.
        test: images that are judged; None: none are set aside.
        how: how they were divided.
        own: whether `train` are the images that the run was trained on, in its order.
        everything: names of all images of the run, held-out ones included, where `own`.
        kept: where `train` lies among them.
    """

    name: str
    train: Source
    test: Source | None
    how: str
    own: bool = False
    everything: Source | None = None
    kept: NDArray[np.int64] | None = None

    def apart(self, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of labelled training images, four fifths to teach and one to judge: for probes without test images."""
        labels = self.train.labels
        assert labels is not None
        rows = np.flatnonzero(labels >= 0)
        order = np.random.Generator(np.random.Philox(key=np.array([seed, 2**35], np.uint64))).permutation(len(rows))
        fifth = max(1, len(rows) // 5)
        return np.sort(rows[order[fifth:]]), np.sort(rows[order[:fifth]])


def data_sets(subject: Subject, data: Any) -> list[DataSet]:
    """Open what is to be evaluated on.

    Args:
        subject: whose own images are meant by None.
        data: None; one of what `open_source` takes, a path that says "TRAIN::TEST" among it; a pair (train, test); a
            list of any of these; or a mapping of names to any of these. A list of image files is written
            {"name": [files]}.

    Raises:
        OptionError: None for what was not trained on images of its own.
        DataError: nothing readable, or no labels.
    """
    if data is None:
        if subject.kind != "run":
            raise OptionError(f"data: expected labelled images to evaluate {subject.name} on, found none")
        return [_own(subject)]
    if isinstance(data, Mapping):
        return [_open(subject, str(name), value) for name, value in data.items()]
    if isinstance(data, list):
        return [_open(subject, _name(value, number), value) for number, value in enumerate(data)]
    return [_open(subject, _name(data, 0), data)]


def _name(data: Any, number: int) -> str:
    if isinstance(data, tuple) and len(data) == 2:
        return _name(data[0], number)
    return os.fspath(data) if isinstance(data, (str, os.PathLike)) else f"data {number}"


def _open(subject: Subject, name: str, data: Any) -> DataSet:
    test: Source | None = None
    if isinstance(data, str) and SEPARATOR in data:
        first, second = data.split(SEPARATOR, 1)
        data = (first, second)
    if isinstance(data, tuple) and len(data) == 2:
        train, test, how = open_source(data[0]), open_source(data[1]), "train and test as given"
    elif subject.kind == "run" and _same_place(data, subject.options.get("data")):
        return _own(subject)
    elif isinstance(data, str) and data == "digits":
        everything = open_source(data)
        teach, judge = digits_split()
        train, test, how = everything.subset(teach), everything.subset(judge), "360 of the digits are held out"
    else:
        train, test = open_source(data), find_eval_source(data)
        how = "no test images" if test is None else f"{test.describe()} lies beside the training images"
    for which, source in (("training", train), ("test", test)):
        if source is not None and not has_labels(source):
            raise DataError(
                f"{name}: expected labelled {which} images, found none with a label in {source.describe()}; add a "
                'labels.csv to a folder, "labels" to an .npz archive, or say open_source(data, labels=...) from Python'
            )
    return DataSet(name, train, test, how)


def _same_place(one: Any, other: Any) -> bool:
    if not isinstance(one, (str, os.PathLike)) or not isinstance(other, str):
        return False
    if one == "digits":  # the built-in ones, whatever else is called so
        return other == one
    return os.fspath(one) == other or (os.path.exists(other) and Path(one).resolve() == Path(other).resolve())


def _own(subject: Subject) -> DataSet:
    """The images of a run, divided as they were in training."""
    written = subject.options
    data = written.get("data")
    if not isinstance(data, (str, list)) or (isinstance(data, str) and data != "digits" and not os.path.exists(data)):
        raise DataError(f"{subject.name}: expected its images, found {str(data)[:80]!r}; name them as data")
    labels, judged, fixed = written.get("labels"), written.get("eval_data"), written.get("fixed_labels")
    options = Options(
        holdout=written.get("holdout", "auto"),
        seed=int(written.get("seed", 0)),
        labels=labels if isinstance(labels, list) or (isinstance(labels, str) and os.path.exists(labels)) else None,
        eval_data=judged if isinstance(judged, str) else None,
        imbalance=str(written.get("imbalance", "none")),
        fixed_labels=fixed if is_there(fixed) else None,
    )
    images = choose_images(data, options)
    if not has_labels(images.train):
        raise DataError(f"{subject.name}: expected labelled images, found none in {images.everything.describe()}")
    name = data if isinstance(data, str) else "its own images"
    return DataSet(name, images.train, images.judged, images.reason, True, images.everything, images.kept)
