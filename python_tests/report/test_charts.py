import re

import numpy as np
import pytest

from sela_ext.report.charts import HEIGHT, WIDTH, Series, line_chart, nice_ticks, size_chart


def points(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.e+-]+) (-?[\d.e+-]+)", path.d)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (1e-9, 2e-9), (0.999, 1.001), (0, 1e12), (-1e-3, 0)])
def test_ticks_are_even_inside_and_few(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert min(ticks) >= low - 1e-9 * (high - low)
    assert max(ticks) <= high + 1e-9 * (high - low)
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 31, 33, 1001, 100_003])
def test_a_curve_stays_inside_and_is_short(count):
    x = np.linspace(0, 7, count)
    chart = line_chart("loss", [Series(x, np.exp(-x))], x_label="epoch", y_label="loss")
    drawn = points(chart.paths[0])
    assert len(drawn) == min(count, 320)
    assert all(chart.left - 0.01 <= px <= chart.right + 0.01 for px, _ in drawn)
    assert all(chart.top - 0.01 <= py <= chart.bottom + 0.01 for _, py in drawn)


def test_higher_values_are_drawn_higher():
    chart = line_chart("x", [Series(np.array([0.0, 1.0]), np.array([1.0, 2.0]))], x_label="", y_label="")
    (x0, y0), (x1, y1) = points(chart.paths[0])
    assert x1 > x0
    assert y1 < y0


def test_a_missing_value_lifts_the_pen():
    series = Series(np.arange(5.0), np.array([1.0, 2.0, np.nan, 2.0, 1.0]))
    chart = line_chart("x", [series], x_label="", y_label="")
    assert chart.paths[0].d.count("M") == 2
    assert len(points(chart.paths[0])) == 4


def test_nothing_finite_draws_no_chart():
    empty = np.array([])
    assert line_chart("x", [], x_label="", y_label="") is None
    assert line_chart("x", [Series(empty, empty)], x_label="", y_label="") is None
    assert line_chart("x", [Series(np.arange(2.0), np.full(2, np.inf))], x_label="", y_label="") is None


def test_constant_curves_have_room_around():
    chart = line_chart("x", [Series(np.arange(3.0), np.zeros(3))], x_label="", y_label="")
    assert all(chart.top < y < chart.bottom for _, y in points(chart.paths[0]))


def test_the_caption_tells_first_and_last_value():
    chart = line_chart("x", [Series(np.arange(3.0), np.array([4.5, 9.0, 0.25]))], x_label="", y_label="")
    assert chart.description == "From 4.5 to 0.25."


@pytest.mark.parametrize("clusters", [1, 2, 31, 33, 241, 10_007])
def test_bar_heights_are_in_proportion_to_the_sizes(clusters):
    sizes = np.random.default_rng(clusters).integers(1, 100, size=clusters)
    chart = size_chart(sizes, even=sizes.mean(), title="sizes")
    assert len(chart.bars) == min(clusters, 240)
    heights = [bar.height for bar in chart.bars]
    assert heights == sorted(heights, reverse=True)
    if clusters <= 240:
        scale = heights[0] / sizes.max()
        np.testing.assert_allclose(heights, np.sort(sizes)[::-1] * scale, atol=0.011)
    assert all(bar.x >= 0 and bar.x + bar.width <= WIDTH and bar.y + bar.height <= HEIGHT for bar in chart.bars)


def test_empty_clusters_are_told():
    chart = size_chart(np.array([0, 6, 0, 2]), even=2.0, title="sizes")
    assert "2 of 4 clusters hold images; the largest holds 6, the smallest 0" in chart.description
    assert [bar.text for bar in chart.bars][:2] == ["cluster 1: 6 images", "cluster 3: 2 images"]
