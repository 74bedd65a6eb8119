"""What is asked for: the run, its labels, its images and their features, each found when it is needed."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sela_ext.data import Source, open_source
from sela_ext.data.messages import first_line
from sela_ext.errors import CheckpointError, DataError, OptionError
from sela_ext.export.labels import Labels, choose_heads
from sela_ext.inference.apply import features_of, label_images
from sela_ext.inference.passes import Machine, choose_machine, look, settle
from sela_ext.inference.subject import Subject, open_subject
from sela_ext.report.run_folder import RunFolder, read_run
from sela_ext.training.machine import torch_settings


@dataclass(frozen=True)
class Request:
    """The options of `sela_ext.export` that formats look at; see there."""

    run: Any
    head: int | str | None = None
    data: Any = None
    embeddings: Any = None
    images: bool = False
    link: str = "symbolic"
    opset: int = 18
    model: Any = None
    image_size: int | None = None
    batch_size: int = 256
    device: str = "auto"
    precision: str = "auto"
    threads: Any = "auto"
    on_bad_image: str = "raise"

    @property
    def folder(self) -> Path | None:
        """The run folder, where a run is exported as it ended; None for checkpoints and all else."""
        run = getattr(self.run, "out", self.run)
        if not isinstance(run, (str, os.PathLike)):
            return None
        path = Path(run).expanduser()
        return path if path.is_dir() and (path / "options.json").exists() else None

    @functools.cached_property
    def subject(self) -> Subject:
        """The network, with what is known of it."""
        return open_subject(self.run, model=self.model, image_size=self.image_size)

    @functools.cached_property
    def machine(self) -> Machine:
        """Where and how it computes."""
        return choose_machine(
            self.subject,
            device=self.device,
            precision=self.precision,
            threads=self.threads,
            batch_size=self.batch_size,
            on_bad_image=self.on_bad_image,
        )

    @functools.cached_property
    def source(self) -> Source:
        """The images: those named, else those of the run.

        Raises:
            DataError: they are not there, or no longer those of the run.
        """
        if self.data is not None:
            return open_source(self.data)
        written = None if self.folder is None else _options(self.folder).get("data")
        name = str(self.folder or self.run)
        known = (
            isinstance(written, list) or written == "digits" or (isinstance(written, str) and os.path.exists(written))
        )
        if not known:
            found = "none known" if written is None else repr(written)[:80]
            raise DataError(f"{name}: expected its images, found {found}; name them as data")
        source = open_source(written)
        names = self._stored().names
        if names != source.names:
            raise DataError(
                f"{name}: expected the {len(names):,} images that were labelled, found others in {source.describe()}; "
                "name the images as data"
            )
        return source

    def labels(self, default: str) -> Labels:
        """Labels of the heads that are asked for; `default` stands for a `head` of None.

        Raises:
            OptionError: no such head.
            CheckpointError: a network without heads.
            DataError: a run without labels, or damaged ones.
        """
        everything = self._stored() if self.data is None or self._same_images() else self._predicted()
        return everything.of(choose_heads(self.head, len(everything.heads), self._best(), default))

    @functools.cached_property
    def features(self) -> NDArray[np.float32]:
        """Features of the images, float32 [N, D]; NaN for those that cannot be read."""
        machine = self.machine
        with torch_settings(machine.threads):
            found = features_of(settle(self.subject.prepare(self.source), self.source, machine), self.source, machine)
        return np.asarray(found, np.float32)

    @functools.cached_property
    def _ended(self) -> RunFolder | None:
        """A run that has ended, with its labels."""
        return None if self.folder is None else read_run(self.folder)

    @functools.cached_property
    def _run_labels(self) -> Labels | None:
        """Labels that it stored, of all heads."""
        run = self._ended
        if run is None:
            return None
        count = len(run.labels)
        least = [max(1, int(row.max()) + 1) for row in run.labels]
        told = run.options.get("clusters")
        clusters = told if isinstance(told, list) and len(told) == count else least
        return Labels(
            run.labels,
            run.confidence,
            [run.name(i) for i in range(run.labels.shape[1])] if run.names is None else run.names.tolist(),
            list(range(count)),
            [max(int(k), low) for k, low in zip(clusters, least, strict=True)],
            f"of the run {run.path}",
        )

    def _stored(self) -> Labels:
        stored = self._run_labels
        if stored is not None:
            return stored
        raise OptionError(
            f"run: expected the folder of a finished run, which has labels, found {self.subject.name}; name the images "
            "as data, and the network labels them"
        )

    def _predicted(self) -> Labels:
        """Labels by network and potentials, of all heads."""
        subject, source = self.subject, self.source
        prepared = subject.prepare(source)
        clusters = list(prepared.network.heads.clusters)
        if not clusters:
            raise CheckpointError(f"{subject.name}: expected a network with cluster heads, found none; export features")
        with torch_settings(self.machine.threads):
            labels, confidence = label_images(subject, prepared, look(prepared, source, self.machine))
        return Labels(
            np.asarray(labels, np.int32),
            np.asarray(confidence, np.float32),
            list(source.names),
            list(range(len(clusters))),
            clusters,
            f"by the network of {subject.name}",
        )

    def _same_images(self) -> bool:
        """Whether the images that are named are the run's: files of the same names in the same order."""
        stored = self._run_labels
        return stored is not None and is_files(self.source) and self.source.names == stored.names

    def _best(self) -> int | None:
        return self.subject.head if self._ended is None else self._ended.head


def is_files(source: Source) -> bool:
    """Whether images are files of their own, as far as the first one tells."""
    return source.encoded and source.locate(0).path is not None


def _options(folder: Path) -> dict[str, Any]:
    """The options of a run, as options.json has them."""
    try:
        found = json.loads((folder / "options.json").read_text(encoding="utf-8"))["options"]
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: expected the options.json of a run: {first_line(error)}") from error
