"""The geometry of the charts."""

from __future__ import annotations

import numpy as np
import pytest

from sela_ext.report.charts import HEIGHT, WIDTH, Series, line_chart, nice_ticks, short_number, size_chart


def _series(y: list[float], **how: object) -> Series:
    return Series(np.arange(len(y), dtype=np.float64), np.array(y, dtype=np.float64), **how)  # type: ignore[arg-type]


def _draw(*series: Series, **how: object):  # type: ignore[no-untyped-def]
    return line_chart("title", series, x_label="x", y_label="y", **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.7, 12.2), (1e-12, 3e-12), (1e9, 1e9 + 1), (0, 31), (5, 5), (0, 1e300)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 6)
    assert 1 <= len(ticks) <= 7
    assert sorted(set(ticks)) == ticks
    room = (high - low) * 1e-6
    assert all(low - room <= tick <= high + room for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1234.0, "1,234"), (0.05, "0.05"), (3e-7, "3e-07"), (-2.0, "-2"), (9.99999, "10")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text


def test_a_curve_spans_the_plot_and_rises_upwards() -> None:
    chart = _draw(_series([0.0, 1.0, 4.0]), from_zero=True)
    (first, middle, last) = chart.paths[0].points
    assert first == (chart.left, chart.bottom)
    assert last[0] == chart.right
    assert chart.top <= last[1] < middle[1] < first[1]
    assert chart.description == "From 0 to 4."


def test_points_that_are_not_finite_interrupt_the_curve() -> None:
    chart = _draw(_series([1.0, np.nan, 2.0, 3.0, np.inf]))
    assert chart.paths[0].d.count("M") == 2
    assert "nan" not in chart.paths[0].d
    assert len(chart.paths[0].points) == 3


def test_nothing_to_draw_is_no_chart() -> None:
    assert _draw() is None
    assert _draw(_series([np.nan, np.inf])) is None
    assert _draw(_series([])) is None


@pytest.mark.parametrize("y", [[2.5], [0.0], [-1.0, -1.0], [7.0] * 31])
def test_a_flat_curve_is_drawn_inside(y: list[float]) -> None:
    chart = _draw(_series(y))
    assert all(0 <= x <= WIDTH and 0 <= v <= HEIGHT for x, v in chart.paths[0].points)


def test_long_curves_are_thinned_to_their_means() -> None:
    chart = _draw(_series(list(np.tile([0.0, 2.0], 32_000)), dashed=True))
    assert 300 <= chart.paths[0].d.count("L") < 400
    heights = {part.split(" ")[1] for part in chart.paths[0].d[1:].split("L")}
    assert len(heights) == 1


def test_size_bars_are_sorted_and_say_their_cluster() -> None:
    chart = size_chart(np.array([3, 0, 10]), even=13 / 3, title="sizes")
    assert [bar.text for bar in chart.bars] == ["cluster 2: 10 images", "cluster 0: 3 images", "cluster 1: 0 images"]
    assert [bar.height == 0 for bar in chart.bars] == [False, False, True]
    assert chart.bars[0].height / chart.bars[1].height == pytest.approx(10 / 3, rel=1e-3)
    assert [tick.text for tick in chart.x_ticks] == ["2", "0", "1"]
    assert chart.description.startswith("2 of 3 clusters hold images; the largest holds 10, the smallest 0;")


def test_many_bars_are_merged() -> None:
    chart = size_chart(np.arange(10_007), even=5003.0, title="sizes")
    assert len(chart.bars) == 240
    assert chart.bars[0].text == "42 clusters of 9,965 to 10,006 images"
    assert chart.bars[-1].x + chart.bars[-1].width == pytest.approx(chart.right, abs=0.1)
