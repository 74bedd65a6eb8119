"""Curves as the page's script takes them, and as tables for those who do not look at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sela_ext.report.charts import Chart, Numbers, Series, short_number, thinned

# Points of all curves of a chart, and of one: more than a drawing has, for those who zoom in.
_MOST_POINTS, _MOST_OF_ONE = 12_000, 2000
# Curves that can be read off; more are drawn, but not told apart.
_MOST_SERIES = 64
# Rows and columns of a table.
_ROWS, _COLUMNS = 12, 8


@dataclass(frozen=True)
class Table:
    """Some values of the curves of a chart: names of the columns, rows of (x, values), and what is left out."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    left_out: int


def curve_data(chart: Chart) -> dict[str, Any] | None:
    """What the script needs to draw a chart anew at any range; None for a chart without curves.

    Args:
        chart: with the curves that it was made of.
    """
    if not chart.series:
        return None
    series = chart.series[-_MOST_SERIES:]  # the shown head and the reference lines come last
    most = max(2, min(_MOST_OF_ONE, _MOST_POINTS // len(series)))
    return {
        "x": chart.x_label,
        "y": chart.y_label,
        "fromZero": chart.from_zero,
        "ceiling": chart.ceiling,
        "series": [
            {
                "name": curve.name or curve.legend or chart.title,
                "group": curve.group or curve.legend,
                "colour": curve.colour,
                "strong": curve.strong,
                "dashed": curve.dashed,
                "points": _points(thinned(curve, most)),
            }
            for curve in series
        ],
    }


def values_table(chart: Chart) -> Table | None:
    """Values at even distances, the last among them; None for a chart without curves.

    Args:
        chart: with the curves that it was made of.
    """
    measured = [curve for curve in chart.series if not curve.dashed and np.isfinite(curve.y).any()]
    if not measured:
        return None
    chosen = sorted(measured, key=lambda curve: not curve.strong)[:_COLUMNS]
    every = np.unique(np.concatenate([curve.x[np.isfinite(curve.x)] for curve in chosen]))
    if every.size > _ROWS:
        every = every[np.round(np.linspace(0, every.size - 1, _ROWS)).astype(np.int64)]
    rows = [(short_number(round(float(x), 4)), [_nearest(curve, float(x)) for curve in chosen]) for x in every]
    names = [curve.name or curve.legend or chart.y_label for curve in chosen]
    return Table(names, rows, len(measured) - len(chosen))


def _points(curve: Series) -> list[list[float | None]]:
    return [[_short(x), _short(y)] for x, y in zip(curve.x, curve.y, strict=True) if np.isfinite(x)]


def _short(value: float) -> float | None:
    """Six digits are more than a reader takes in; None where there is no number."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _nearest(curve: Series, x: float) -> str:
    """The value at the point next to x, a dash where there is none."""
    distance: Numbers = np.where(np.isfinite(curve.x) & np.isfinite(curve.y), np.abs(curve.x - x), np.inf)
    if not distance.size or not np.isfinite(distance.min()):
        return "\N{EN DASH}"
    return short_number(float(curve.y[int(distance.argmin())]))
