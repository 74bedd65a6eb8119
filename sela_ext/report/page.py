"""The page that a run ends with: report.html, one file that needs nothing else."""

from __future__ import annotations

import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jinja2

from sela_ext.data.safe_files import sync_folder
from sela_ext.errors import ResourceError
from sela_ext.report import summary
from sela_ext.report.contact_sheet import ReadImage, contact_sheet
from sela_ext.report.run_folder import read_run

_TEMPLATES = Path(__file__).parent / "templates"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write_report(run: Path, read_image: ReadImage | None = None) -> Path:
    """Write run/report.html: what went in, how training went, and the clusters to look at.

    The page holds its style, drawings and thumbnails itself and asks for nothing from elsewhere. It is written under
    a temporary name and renamed, so an older report survives a failure.

    Args:
        run: run folder with options.json and labels.npz; metrics.jsonl may be missing or end in half a line.
        read_image: index -> uint8 [H, W, C] or [H, W]; images that it cannot read, and all images when it is None,
            are shown as placeholders.

    Returns:
        The path of report.html.

    Raises:
        DataError: options.json or labels.npz is missing, unreadable or inconsistent.
        ResourceError: the report cannot be written.
    """
    folder = read_run(Path(run))
    passes = summary.pass_rows(folder)
    heads = summary.head_rows(folder)
    sheet = contact_sheet(
        folder.labels[folder.head], folder.confidence[folder.head], folder.clusters, folder.name, read_image
    )
    html = (
        environment()
        .get_template("report.html.j2")
        .render(
            run=folder,
            title=folder.path.resolve().name,
            sentences=summary.sentences(folder),
            notices=summary.notices(folder),
            tiles=summary.tiles(folder),
            charts=summary.charts(folder),
            sizes=summary.size_drawing(folder),
            heads=heads,
            heads_have_nmi=any(math.isfinite(row.nmi) for row in heads),
            passes=summary.listed_passes(passes),
            pass_count=len(passes),
            options=summary.option_rows(folder),
            facts=summary.fact_rows(folder.resolved),
            sheet=sheet,
            has_images=read_image is not None,
        )
    )
    target = folder.path / "report.html"
    write_page(target, html)
    return target


def environment(*folders: Path) -> jinja2.Environment:
    """Templates of the report and of `folders`, with escaping, and filters for numbers and names."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_without_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["fixed"] = _fixed
    made.filters["percent"] = _percent
    made.filters["small"] = _small
    made.filters["plain"] = _plain
    return made


def _without_controls(value: Any) -> Any:
    """A value as a page may hold it: text without control characters but ends of lines and tabs."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _fixed(value: float, digits: int = 3) -> str:
    """Write a number with so many digits after the point, a dash for none."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "\N{EN DASH}"


def _percent(value: float, digits: int = 1) -> str:
    """Write a share as percent, a dash for none."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "\N{EN DASH}"


def _small(value: float) -> str:
    """Write an error with two digits, a dash for none."""
    return f"{value:.2g}" if math.isfinite(value) else "\N{EN DASH}"


def _plain(text: Any, longest: int = 120) -> str:
    """Make a file name printable: no control characters or halves of characters, the end kept where it is long."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return clean if len(clean) <= longest else "\N{HORIZONTAL ELLIPSIS}" + clean[-longest:]


def write_page(target: Path, text: str) -> None:
    """Write a page under a temporary name in the same folder, then rename it.

    Raises:
        ResourceError: it cannot be written.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".report-", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(handle, 0o644)
            os.fsync(handle)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        size = len(text.encode("utf-8", "replace"))
        raise ResourceError(
            f"{target}: cannot write the report: {error.strerror or error} ({size:,} bytes needed); make room or make "
            "the folder writable"
        ) from error
