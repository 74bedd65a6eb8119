"""The map of a run, made again after the fact: of more images, or for a run that left none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from sela_ext.data import Source
from sela_ext.errors import DataError, OptionError
from sela_ext.inference.apply import embed
from sela_ext.report.overview import FILE, MOST_MAPPED, Overview, lay_out, map_rows, read_overview
from sela_ext.training.checkpoint import write_atomically
from sela_ext.training.overview import truth_of


def map_again(run: Path, source: Source, points: int) -> Path:
    """Run a run's network over some of its images, place them on a map, and write report.npz.

    Nearest clusters and true labels that the run left stay; where it left no true labels, those of the source are
    taken.

    Args:
        run: the run folder, with network.pt or a checkpoint.
        source: the images that were labelled, all of them in order.
        points: images on the map.

    Returns:
        The path of report.npz.

    Raises:
        OptionError: `points` out of range.
        CheckpointError: no network that can be read.
        DataError: fewer than five of the images can be read.
    """
    if not 5 <= points <= MOST_MAPPED:
        raise OptionError(f"map: expected 5 to {MOST_MAPPED} images, found {points}")
    index = map_rows(len(source), points)
    features = np.asarray(embed(run, source.subset(index), on_bad_image="skip"))
    usable = np.isfinite(features).all(1)
    if int(usable.sum()) < 5:
        raise DataError(f"map: expected at least 5 images that can be read, found {int(usable.sum())}")
    tsne, pca = lay_out(features[usable])
    target = run / FILE
    found = read_overview(target, len(source)) or Overview(index, tsne, pca)
    found = dataclasses.replace(found, index=index[usable], tsne=tsne, pca=pca)
    if found.truth is None:
        truth, classes = truth_of(source)
        found = dataclasses.replace(found, truth=truth, classes=classes)
    write_atomically(target, found.to_bytes())
    return target
