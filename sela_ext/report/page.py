"""The page that a run ends with: report.html, one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from sela_ext.data.safe_files import replace_file
from sela_ext.errors import ResourceError
from sela_ext.report import summary
from sela_ext.report.bad_images import read_bad_images
from sela_ext.report.charts import Chart
from sela_ext.report.confusion import confusion, make_truth
from sela_ext.report.curves import curve_data, values_table
from sela_ext.report.embedding_map import map_data
from sela_ext.report.gallery import make_gallery
from sela_ext.report.heads import Heads, compare
from sela_ext.report.overview import FILE, Overview, nearest_clusters, read_overview
from sela_ext.report.run_folder import RunFolder, read_run
from sela_ext.report.sample import Sample, choose
from sela_ext.report.text import environment, plain, read_templates, source_hash
from sela_ext.report.thumbnails import ReadImage, Sheets, make_sheets
from sela_ext.report.weights import Weights, read_weights

_STYLES = ("report.css", "widgets.css", "gallery.css")
_SCRIPTS = ("page.js", "curves.js", "panel.js", "gallery.js", "map.js", "heads.js")


def write_report(
    run: Path,
    read_image: ReadImage | None = None,
    *,
    out: Path | None = None,
    at: Callable[[str], None] = lambda place: None,
) -> Path:
    """Write run/report.html: what went in, how training went, and the clusters to look at.

    The page holds its style, scripts, drawings and thumbnails itself and asks for nothing from elsewhere; it stays
    below 15 MB whatever the number of images, clusters and heads. It is written under a temporary name and renamed,
    so an older report survives a failure.

    Args:
        run: run folder with options.json and labels.npz; metrics.jsonl may be missing or end in half a line. Shown
            where they are there: report.npz (map, nearest clusters, true labels), network.pt (filters),
            bad_images.csv.
        read_image: index -> uint8 [H, W, C] or [H, W]; images that it cannot read, and all images when it is None,
            are shown as placeholders.
        out: the page; None: report.html in the run folder.
        at: told where the writing is, for tests of what a crash leaves.

    Returns:
        The path of the page.

    Raises:
        DataError: options.json or labels.npz is missing, or one of the files is unreadable or inconsistent.
        ResourceError: the report cannot be written.
    """
    folder = read_run(Path(run))
    overview = read_overview(folder.path / FILE, folder.labels.shape[1])
    target = folder.path / "report.html" if out is None else Path(out)
    write_page(target, _render(folder, overview, read_image), at)
    return target


def _render(folder: RunFolder, overview: Overview | None, read_image: ReadImage | None) -> str:
    labels, confidence = folder.labels[folder.head], folder.confidence[folder.head]

    def name(index: int) -> str:
        return plain(folder.name(index), 80)

    truth = None if overview is None else make_truth(overview.truth, overview.classes)
    table = None if truth is None else confusion(labels, folder.clusters, truth)
    weights = read_weights(folder.path / "network.pt", folder.head)
    also = None if overview is None else overview.index[labels[overview.index] >= 0]
    sample = choose(labels, confidence, folder.clusters, also)
    sheets = make_sheets(sample.order, read_image)
    near, near_by = _nearest(folder, overview, weights, sample)
    heads = summary.head_rows(folder)
    compared = compare(folder.labels, folder.head, [row.clusters for row in heads], np.sort(sample.clusters))
    passes = summary.pass_rows(folder)
    sizes = summary.size_drawing(folder)
    style = read_templates(*_STYLES) + _sheet_rules(sheets)
    script = f'(() => {{\n"use strict";\n{read_templates(*(f"scripts/{one}" for one in _SCRIPTS))}}})();\n'
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            policy=(
                f"default-src 'none'; img-src data:; style-src {source_hash(style)}; "
                f"script-src {source_hash(script)}; base-uri 'none'; form-action 'none'"
            ),
            style=Markup(style),
            script=Markup(script),
            run=folder,
            title=folder.path.resolve().name,
            sentences=summary.sentences(folder),
            notices=summary.notices(folder)[:50],
            tiles=summary.tiles(folder),
            charts=[(chart, curve_data(chart), values_table(chart)) for chart in summary.charts(folder)],
            sizes=sizes,
            sizes_even=float(sample.sizes.sum()) / folder.clusters,
            bars=_bars(sizes),
            heads=heads,
            heads_have_nmi=any(math.isfinite(row.nmi) for row in heads),
            passes=summary.listed_passes(passes),
            pass_count=len(passes),
            options=summary.option_rows(folder)[:500],
            facts=summary.fact_rows(folder.resolved)[:500],
            truth=truth,
            table=table,
            gallery=make_gallery(sample, sheets, name, confidence, truth, table, near, near_by),
            sheets=sheets,
            has_images=read_image is not None,
            map=map_data(overview, labels, name, sheets, truth),
            compared=compared,
            head_data=_head_data(folder, compared, sheets, sample),
            filters=weights.filters,
            bad=read_bad_images(folder.path / "bad_images.csv"),
        )
    )


def _nearest(
    folder: RunFolder, overview: Overview | None, weights: Weights, sample: Sample
) -> tuple[npt.NDArray[np.int32] | None, str]:
    """Clusters like each: by mean features where training left them, else by the network's prototypes."""
    if overview is not None and overview.neighbours is not None and overview.head == folder.head:
        return overview.neighbours, "the direction of their mean features"
    if weights.prototypes is not None and len(weights.prototypes) == folder.clusters:
        return nearest_clusters(weights.prototypes, sample.sizes > 0), "the direction of their prototypes"
    return None, ""


def _sheet_rules(sheets: Sheets) -> str:
    """A rule of style per sheet: thumbnails are windows on it."""
    return "".join(f'.s{i}{{background-image:url("{source}")}}\n' for i, source in enumerate(sheets.sources))


def _bars(chart: Chart) -> dict[str, Any]:
    """What the script says of the bars of a chart."""
    return {"texts": [bar.text for bar in chart.bars], "lefts": [bar.x for bar in chart.bars]}


def _head_data(folder: RunFolder, compared: Heads | None, sheets: Sheets, sample: Sample) -> dict[str, Any] | None:
    """What the script shows of other heads: matches, and the labels of the images that have a thumbnail."""
    if compared is None or not compared.matches:
        return None
    rows = np.fromiter(sheets.places, np.int64, len(sheets.places))
    clusters = np.sort(sample.clusters)
    return {
        "shown": folder.head,
        "clusters": clusters.tolist(),
        "sizes": sample.sizes[clusters].tolist(),
        "matches": {str(head): found for head, found in compared.matches.items()},
        "labels": {str(head): folder.labels[head, rows].tolist() for head in [folder.head, *compared.matches]},
    }


def write_page(target: Path, text: str, at: Callable[[str], None] = lambda place: None) -> None:
    """Write a page under a temporary name in the same folder, then rename it.

    Args:
        target: the page.
        text: what it holds.
        at: told where the writing is, as by `sela_ext.data.safe_files.replace_file`.

    Raises:
        ResourceError: it cannot be written.
    """
    data = text.encode("utf-8", "replace")
    try:
        replace_file(target, [data], at)
    except OSError as error:
        raise ResourceError(
            f"{target}: cannot write the report: {error.strerror or error} ({len(data):,} bytes needed); make room or "
            "make the folder writable"
        ) from error
