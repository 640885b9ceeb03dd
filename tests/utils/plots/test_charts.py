import math
from xml.etree import ElementTree

import numpy as np
import pytest

from utils.plots.charts import MOST_POINTS, Line, _ticks, bars, line_chart, line_of, number, tick_labels


def test_line_of__leaves_out_gaps_and_thins_out():
    rows = [{"iters": 1.0, "a": 2.0}, {"iters": 2.0}, {"a": 1.0}, {"iters": 3.0, "a": math.nan}]
    line = line_of(rows, "a")
    assert (line.x.tolist(), line.y.tolist()) == ([1.0], [2.0])
    long = line_of([{"iters": float(k), "a": float(k)} for k in range(5000)], "a")
    assert len(long.x) <= MOST_POINTS
    assert (long.x[0], long.y[0]) == (1, 0.5)  # 5000 = 294 * 17 + 2
    assert (long.x[-1], long.y[-1]) == (4999, 4991)
    assert set(np.diff(long.x)) == {17}


def test_line_chart__is_well_formed_and_lies_within_its_axes():
    lines = [Line("a<b", np.array([1.0, 50, 100]), np.array([3.0, 1, 2])), Line("gone", *np.empty((2, 0)))]
    chart = ElementTree.fromstring(line_chart("A & B", lines))
    assert next(each.text for each in chart.iter("li")).startswith("a<b")
    (points,) = [each.get("points") for each in chart.iter("polyline")]
    for point in points.split():
        x, y = map(float, point.split(","))
        assert 52 <= x <= 410
        assert 10 <= y <= 206
    assert line_chart("nothing", lines[1:]) == ""


@pytest.mark.parametrize(
    ("values", "log"),
    [([0, 0], False), ([5, 5], False), ([-1e-9, 1e-9], False), ([1, 1e6], True), ([0, 9], True)],
)
def test_line_chart__any_range(values, log):
    chart = line_chart("x", [Line("a", np.array([1.0, 2.0]), np.array(values, dtype=float))], log=log)
    assert "nan" not in chart
    assert chart.count('class="grid"') >= 2
    single = line_chart("x", [Line("a", np.array([1.0]), np.array([2.0]))])
    assert "<circle" in single


@pytest.mark.parametrize(("low", "high"), [(0, 1), (23.5, 28.2), (-0.2, 2.1), (0.0009, 0.0011), (1e5, 3e6)])
def test_ticks__are_few_round_and_inside(low, high):
    ticks = _ticks(low, high, log=False)
    assert 3 <= len(ticks) <= 6
    assert low <= ticks[0] < ticks[-1] <= high
    assert 2 <= len(_ticks(high, high * 50, log=True)) <= 7


def test_tick_labels__tell_neighbours_apart():
    assert tick_labels([-0.14420, -0.14425, -0.1443][::-1]) == ["-0.14430", "-0.14425", "-0.14420"]
    assert tick_labels([0.0, 0.1 + 0.2, 0.6]) == ["0.0", "0.3", "0.6"]
    assert tick_labels([300.0, 1000.0, 3000.0]) == ["300", "1,000", "3,000"]
    assert tick_labels([1e-9, 2e-9]) == ["1.0e-09", "2.0e-09"]


def test_number__as_a_legend_shows_it():
    assert [number(v) for v in (0.0, 1234.5, 0.12345, 1e-5)] == ["0", "1,234", "0.1235", "1.0e-05"]


def test_bars__gaps_and_marks():
    text = bars({"a<": 50.0, "b": math.nan}, {"a<": "red", "b": "blue"}, then={"a<": 60.0})
    assert "a&lt;" in text
    assert "50.0 → 60.0" in text
    assert "width:0.0%" in text
    ElementTree.fromstring(text)
