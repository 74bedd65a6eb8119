"""Charts as inline SVG: geometry is worked out here, the template draws it, the page's style sheet colours it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

# One drawing, in SVG units; the page scales it.
WIDTH, HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 16, 14, 40
# More points than this per curve cannot be seen; they are averaged in bins.
_MOST_POINTS = 320
# More bars than this cannot be seen; neighbours are merged.
_MOST_BARS = 240


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        x, y: float64 [points]; points that are not finite interrupt the curve.
        legend: its entry in the legend, "" for none.
        colour: number of the colour, 0 .. 5.
        strong: drawn bold, in front, with points where there is room.
        dashed: a reference line rather than a measurement.
        name: what it is called where it is read off; "": its legend, or the chart's title.
        group: legend that it belongs to, where that stands for several curves; "": its own.
    """

    x: Numbers
    y: Numbers
    legend: str = ""
    colour: int = 0
    strong: bool = True
    dashed: bool = False
    name: str = ""
    group: str = ""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in SVG units."""

    at: float
    text: str


@dataclass(frozen=True)
class Path:
    """A drawn curve: SVG path data and how it looks; points are its marks."""

    d: str
    colour: int
    strong: bool
    dashed: bool
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A drawn bar and what it says when pointed at."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawing ready for the template.

    Attributes:
        title: heading of the figure.
        description: what a reader who cannot see it needs to know; also the caption.
        x_label, y_label: what the axes show, with units.
        reference: height of a dashed horizontal line, None for none.
        legend: the curves that have an entry in the legend.
        series: the curves as they were given.
        from_zero, ceiling: as they were given.
    """

    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    paths: list[Path] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    reference: float | None = None
    legend: list[Series] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    from_zero: bool = False
    ceiling: float | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) inside [low, high], at most `most` + 1 of them.

    Example:
        >>> nice_ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def short_number(value: float) -> str:
    """Write a number for an axis or a sentence.

    Example:
        >>> [short_number(v) for v in (0.0, 0.25, 1234567.0, 3e-7, 12.0)]
        ['0', '0.25', '1,234,567', '3e-07', '12']
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9 or size < 1e-4:
        return f"{value:.3g}"
    if size >= 1000 or (value == int(value) and size >= 1):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    description: str = "",
    from_zero: bool = False,
    ceiling: float | None = None,
) -> Chart | None:
    """Draw curves over a common range; returns None when no curve has a finite point.

    Args:
        title: heading.
        series: the curves; later ones are drawn over earlier ones.
        x_label: what x is, with unit.
        y_label: what y is, with unit.
        description: the caption; "": first and last value of the strong curves.
        from_zero: the y axis starts at 0 when all values are positive.
        ceiling: y that the axis reaches at least.
    """
    shown = [thinned(curve) for curve in series]
    finite = [np.isfinite(curve.x) & np.isfinite(curve.y) for curve in shown]
    if not any(mask.any() for mask in finite):
        return None
    x = np.concatenate([curve.x[mask] for curve, mask in zip(shown, finite, strict=True)])
    y = np.concatenate([curve.y[mask] for curve, mask in zip(shown, finite, strict=True)])
    x_low, x_high = _padded(float(x.min()), float(x.max()), 0.0)
    top = float(y.max()) if ceiling is None else max(float(y.max()), ceiling)
    bottom = 0.0 if from_zero and y.min() >= 0 else float(y.min())
    y_low, y_high = _padded(bottom, top, 0.04)
    if from_zero and y.min() >= 0:
        y_low = 0.0
    if ceiling is not None and y.max() <= ceiling:
        y_high = ceiling

    def to_x(value: float) -> float:
        return round(_LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT), 2)

    def to_y(value: float) -> float:
        return round(HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM), 2)

    paths = []
    for curve, mask in zip(shown, finite, strict=True):
        places = [
            (to_x(float(a)), to_y(float(b))) if ok else None for a, b, ok in zip(curve.x, curve.y, mask, strict=True)
        ]
        marked = [place for place in places if place is not None]
        dotted = len(marked) == 1 or (curve.strong and not curve.dashed and len(marked) <= 40)
        paths.append(Path(_path_data(places), curve.colour, curve.strong, curve.dashed, marked if dotted else []))
    return Chart(
        title=title,
        description=description or _first_and_last(series),
        x_label=x_label,
        y_label=y_label,
        x_ticks=[Tick(to_x(v), short_number(v)) for v in nice_ticks(x_low, x_high, 8)],
        y_ticks=[Tick(to_y(v), short_number(v)) for v in nice_ticks(y_low, y_high, 5)],
        paths=paths,
        legend=[curve for curve in series if curve.legend],
        series=list(series),
        from_zero=from_zero,
        ceiling=ceiling,
    )


def size_chart(sizes: npt.NDArray[np.int64], *, even: float, title: str) -> Chart:
    """Draw cluster sizes, largest first, with a dashed line at the even split.

    Args:
        sizes: [K] images per cluster, empty clusters included.
        even: images per cluster of an even split.
        title: heading.
    """
    order = np.argsort(-sizes, kind="stable")
    count = sizes.size
    high = max(float(sizes.max()), even, 1.0) * 1.04
    plot_width, plot_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    groups = np.array_split(order, min(count, _MOST_BARS))
    step = plot_width / len(groups)
    bars = []
    for place, group in enumerate(groups):
        value = float(sizes[group].mean())
        text = (
            f"cluster {group[0]}: {sizes[group[0]]:,} images"
            if group.size == 1
            else f"{group.size} clusters of {sizes[group].min():,} to {sizes[group].max():,} images"
        )
        height = value / high * plot_height
        gap = 0.15 * step if len(groups) <= 120 else 0.0
        bars.append(
            Bar(
                round(_LEFT + place * step + gap / 2, 2),
                round(HEIGHT - _BOTTOM - height, 2),
                round(step - gap, 2),
                round(height, 2),
                text,
            )
        )
    used = int((sizes > 0).sum())
    if count <= 30:
        x_ticks = [Tick(round(_LEFT + (i + 0.5) * step, 2), str(int(order[i]))) for i in range(count)]
        x_label = "cluster, largest first"
    else:
        x_ticks = [Tick(round(_LEFT + v / count * plot_width, 2), short_number(v)) for v in nice_ticks(0, count, 8)]
        x_label = "clusters, largest first"
    return Chart(
        title=title,
        description=(
            f"{used:,} of {count:,} clusters hold images; the largest holds {int(sizes.max()):,}, "
            f"the smallest {int(sizes.min()):,}; an even split would be {short_number(round(even, 1))}."
        ),
        x_label=x_label,
        y_label="images",
        x_ticks=x_ticks,
        y_ticks=[
            Tick(round(HEIGHT - _BOTTOM - v / high * plot_height, 2), short_number(v)) for v in nice_ticks(0, high, 5)
        ],
        bars=bars,
        reference=round(HEIGHT - _BOTTOM - even / high * plot_height, 2),
    )


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """Widen a range by a share of its length; a single value gets room on both sides."""
    if high > low:
        return low - share * (high - low), high + share * (high - low)
    room = abs(low) * 0.1 or 0.5
    return low - room, high + room


def thinned(curve: Series, most: int = _MOST_POINTS) -> Series:
    """Average neighbouring points where there are more than `most`; a bin with a non-finite point keeps it."""
    count = curve.x.size
    if count <= most:
        return curve
    edges = np.linspace(0, count, most + 1).astype(np.int64)[:-1]
    lengths = np.diff(np.append(edges, count))
    with np.errstate(invalid="ignore"):
        x, y = np.add.reduceat(curve.x, edges) / lengths, np.add.reduceat(curve.y, edges) / lengths
    return replace(curve, x=x, y=y)


def _path_data(places: Sequence[tuple[float, float] | None]) -> str:
    """Write SVG path data; None lifts the pen."""
    parts = []
    pen_down = False
    for place in places:
        if place is not None:
            parts.append(f"{'L' if pen_down else 'M'}{place[0]:g} {place[1]:g}")
        pen_down = place is not None
    return "".join(parts)


def _first_and_last(series: Sequence[Series]) -> str:
    """Say where the strong curves start and end, for those who cannot see them."""
    said = []
    for curve in series:
        values = curve.y[np.isfinite(curve.y)]
        if curve.strong and not curve.dashed and values.size:
            what = f"{curve.legend}: " if curve.legend else ""
            said.append(f"{what}from {short_number(float(values[0]))} to {short_number(float(values[-1]))}")
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}." if text else ""
