import numpy as np
import pytest

from sela_ext.report.charts import Series, line_chart
from sela_ext.report.curves import curve_data, values_table


def chart(*series):
    return line_chart("loss", series, x_label="epoch", y_label="nats")


def test_points_are_given_as_they_are_and_gaps_as_none():
    made = chart(Series(np.array([0.0, 1, 2]), np.array([3.0, np.nan, 1 / 3])))
    (series,) = curve_data(made)["series"]
    assert series["points"] == [[0.0, 3.0], [1.0, None], [2.0, 0.333333]]
    assert series["name"] == "loss"


@pytest.mark.parametrize("curves", [1, 33, 200])
def test_the_number_of_points_is_bounded(curves):
    x = np.arange(10_001.0)
    data = curve_data(chart(*[Series(x, x + i, name=f"head {i}", group="heads") for i in range(curves)]))
    assert sum(len(one["points"]) for one in data["series"]) <= 12_000
    assert data["series"][-1]["name"] == f"head {curves - 1}"
    assert {one["group"] for one in data["series"]} == {"heads"}


def test_the_table_has_the_values_at_even_distances_and_the_last_one():
    x = np.arange(101.0)
    table = values_table(chart(Series(x, 2 * x, name="twice"), Series(x, np.ones(101), dashed=True, legend="one")))
    assert table.columns == ["twice"]
    assert len(table.rows) == 12
    assert table.rows[-1] == ("100", ["200"])
    assert all(float(values[0]) == 2 * float(at) for at, values in table.rows)


def test_the_table_has_few_columns_the_shown_head_first():
    x = np.arange(3.0)
    heads = [Series(x, x, name=f"head {i}", strong=i == 20) for i in range(21)]
    table = values_table(chart(*heads))
    assert table.columns[0] == "head 20"
    assert (len(table.columns), table.left_out) == (8, 13)


def test_a_chart_without_curves_has_neither():
    from sela_ext.report.charts import size_chart

    made = size_chart(np.array([1, 2]), even=1.5, title="sizes")
    assert curve_data(made) is None
    assert values_table(made) is None
