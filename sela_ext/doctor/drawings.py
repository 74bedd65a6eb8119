"""Histograms of the data check as charts of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sela_ext.report.charts import HEIGHT, WIDTH, Bar, Chart, Tick, nice_ticks, short_number

# More classes than this are not drawn one by one.
MOST_CLASSES = 60


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """The histograms of a result: sizes, shapes and classes, as far as they say anything."""
    drawn = []
    sizes = result["sizes"]
    if sizes is not None and not sizes["same"]:
        side = sizes["shorter_side"]
        drawn.append(
            histogram(
                "Shorter side",
                side["histogram"]["edges"],
                side["histogram"]["counts"],
                x_label="pixels",
                unit=" pixels",
                description=f"From {side['min']:,} to {side['max']:,} pixels, half of the images below "
                f"{side['median']:,.0f}."
                if side["median"] > side["min"]
                else f"From {side['min']:,} to {side['max']:,} pixels, half of them or more {side['min']:,}.",
                whole=True,
            )
        )
        aspect = sizes["aspect"]
        drawn.append(
            histogram(
                "Shape",
                aspect["histogram"]["edges"],
                aspect["histogram"]["counts"],
                x_label="width / height",
                unit="",
                name=shape_in_words,
                description=f"Width over height, from {short_number(aspect['min'])} to {short_number(aspect['max'])}; "
                "1 is a square. The outermost bars hold all that lies beyond.",
            )
        )
    classes = result["classes"]
    if classes is not None and 2 <= len(classes["classes"]) <= MOST_CLASSES:
        drawn.append(_class_chart(classes))
    return drawn


def histogram(
    title: str,
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    x_label: str,
    unit: str,
    description: str,
    whole: bool = False,
    name: Callable[[float], str] = short_number,
) -> Chart:
    """Draw counts as bars of equal width, whatever the width of the bins; the edges are written below.

    Args:
        title: Heading.
        edges: Of the bins, one more than counts.
        counts: Images per bin.
        x_label: What the edges are.
        unit: Behind the edges in the words about a bar.
        description: The caption.
        whole: The edges are whole numbers, and a bin ends one before the next.
        name: How an edge is written.
    """
    texts = [
        f"{name(low)}{unit}: {count:,} images"
        if whole and high - low == 1
        else f"{name(low)} to {name(high - 1 if whole else high)}{unit}: {count:,} images"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    chart, left, step = _bars(title, counts, texts, x_label, description)
    every = max(1, -(-len(counts) // 9))
    chart.x_ticks.extend(Tick(round(left + i * step, 2), name(edges[i])) for i in range(0, len(edges), every))
    return chart


def shape_in_words(ratio: float) -> str:
    """Width over height as people say it.

    Example:
        >>> shape_in_words(1.5), shape_in_words(0.25)
        ('1.5:1', '1:4')
    """
    return f"{ratio:.3g}:1" if ratio >= 1 else f"1:{1 / ratio:.3g}"


def _class_chart(classes: Mapping[str, Any]) -> Chart:
    listed = classes["classes"]
    counts = [one["images"] for one in listed]
    names = [one["name"] or str(one["label"]) for one in listed]
    texts = [f"{name}: {count:,} images" for name, count in zip(names, counts, strict=True)]
    chart, left, step = _bars(
        "Classes",
        counts,
        texts,
        "class",
        f"{classes['count']:,} classes of {classes['smallest']:,} to {classes['largest']:,} images. "
        "Point at a bar for its name.",
    )
    room = int(step / 7)  # letters that fit below a bar
    fits = max(len(name) for name in names) <= room
    every = max(1, -(-len(listed) // 15))
    chart.x_ticks.extend(
        Tick(round(left + (i + 0.5) * step, 2), names[i] if fits else str(listed[i]["label"]))
        for i in range(0, len(listed), every)
    )
    return chart


def _bars(
    title: str, counts: Sequence[int], texts: Sequence[str], x_label: str, description: str
) -> tuple[Chart, float, float]:
    """A chart of bars without ticks below them, its left edge and the distance of the bars."""
    chart = Chart(title=title, description=description, x_label=x_label, y_label="images", x_ticks=[], y_ticks=[])
    high = max(1.0, max(counts) * 1.04)
    step = (chart.right - chart.left) / len(counts)
    plot = chart.bottom - chart.top
    for place, (count, text) in enumerate(zip(counts, texts, strict=True)):
        height = count / high * plot
        chart.bars.append(
            Bar(
                round(chart.left + (place + 0.06) * step, 2),
                round(chart.bottom - height, 2),
                round(0.88 * step, 2),
                round(height, 2),
                text,
            )
        )
    chart.y_ticks.extend(
        Tick(round(chart.bottom - v / high * plot, 2), short_number(v)) for v in nice_ticks(0, high, 5) if v == int(v)
    )
    assert (chart.width, chart.height) == (WIDTH, HEIGHT)
    return chart, chart.left, step
