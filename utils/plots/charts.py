"""Line charts, bars and tables as text: SVG and HTML for a page whose style sheet gives the colours."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24  # margins around the plot
MOST_POINTS = 300  # of a line; more are averaged
DOTTED_BELOW = 40  # points, each of which is then shown


@dataclass(frozen=True)
class Line:
    """One line of a chart: x ascending, both (n,) float64 without gaps."""

    name: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class _Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)


def line_of(rows: Sequence[Mapping[str, float]], name: str, *, x: str = "iters") -> Line:
    """The line of a scalar in rows of scalars, where both it and x are finite.

    Of a long one each point is the mean of as many values, at the last of their steps.
    """
    points = [(row[x], row[name]) for row in rows if x in row and math.isfinite(row.get(name, math.nan))]
    values = np.array(sorted(points), dtype=np.float64).reshape(-1, 2)
    together = -(-len(values) // MOST_POINTS)
    if together > 1:  # the first point alone may stand for fewer
        parts = np.split(values, range(len(values) % together or together, len(values), together))
        values = np.array([(part[-1, 0], part[:, 1].mean()) for part in parts])
    return Line(name, values[:, 0], values[:, 1])


def line_chart(title: str, lines: Sequence[Line], *, about: str = "", log: bool = False) -> str:
    """A figure of lines over the steps, with the last value of each; '' where none has a point.

    Args:
        title: above it.
        lines: those without points are left out.
        about: a sentence below the title.
        log: whether the vertical axis is logarithmic, which needs values above 0.
    """
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return ""
    everything = np.concatenate([line.y for line in lines])
    log = log and everything.min() > 0
    low, high = _range(everything, log=log)
    steps = np.concatenate([line.x for line in lines])
    first, last = steps.min(), max(steps.max(), steps.min() + 1)
    across = _Axis(first, last, LEFT, WIDTH - RIGHT)
    up = _Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    marks = [*_grid(up), *_steps(across), *(_path(n, line, across, up) for n, line in enumerate(lines))]
    legend = "".join(
        f'<li class="s{n}">{escape(line.name)} <b>{number(line.y[-1])}</b></li>'
        for n, line in enumerate(lines)
    )
    data = [[_rounded(line.x), _rounded(line.y)] for line in lines]
    ends = f'data-first="{first:g}" data-last="{last:g}" data-lines="{escape(json.dumps(data))}"'
    return (
        f'<figure class="chart"><figcaption><span class="step">step <b>{last:.0f}</b></span>{escape(title)}'
        f"<small>{escape(about)}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" {ends}>'
        f'{"".join(marks)}<line class="at" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def bars(
    values: Mapping[str, float], colours: Mapping[str, str], *, then: Mapping[str, float] | None = None
) -> str:
    """A list of bars of percentages, each in its colour; a mark stands where `then` has the value.

    Args:
        values: name -> percent; NaN has no bar.
        colours: name -> CSS colour.
        then: later values of the same names.
    """
    items = []
    for name, value in values.items():
        shown = "–" if not math.isfinite(value) else f"{value:.1f}"
        mark, later = "", (then or {}).get(name, math.nan)
        if math.isfinite(later):
            mark = f'<i style="left:{later:.1f}%"></i>'
            shown += f" → {later:.1f}"
        width = value if math.isfinite(value) else 0
        items.append(
            f'<li><span class="name">{escape(name)}</span><span class="track"><span class="bar" '
            f'style="width:{width:.1f}%;background:{escape(colours[name])}"></span>{mark}</span>'
            f'<span class="value">{shown}</span></li>'
        )
    return f'<ul class="bars">{"".join(items)}</ul>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """An HTML table of escaped cells; with `numbers` all columns but the first are set to the right."""
    kinds = ["", *[' class="number"' if numbers else ""] * (len(header) - 1)]

    def line(tag: str, cells: Sequence[str]) -> str:
        inner = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "".join(line("td", row) for row in rows)
    head = line("th", header) if any(header) else ""
    kind = "" if numbers else ' class="words"'
    return f'<div class="scroll"><table{kind}>{head}{body}</table></div>\n'


def number(value: float) -> str:
    """A number as a legend or an axis shows it: four significant digits, thousands apart."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _range(values: np.ndarray, *, log: bool) -> tuple[float, float]:
    """The ends of an axis, a little beyond the values; a flat line is given room."""
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.2, high * 1.2
    if low == high == 0:
        return -0.05, 1.0
    room = 0.06 * (high - low) or 0.05 * abs(high)
    return low - room, high + room


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers between two: three to six where the axis is linear."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for parts in ((1,), (1, 3), (1, 2, 5)):
            found = [part * 10.0**decade for decade in decades for part in parts]
            found = [tick for tick in found if low <= tick <= high]
            if len(found) >= 3:
                return found[:: 1 + len(found) // 7]
    rough = (high - low) / 5.5
    scale = 10.0 ** math.floor(math.log10(rough))
    step = scale * next(part for part in (1, 2, 2.5, 5, 10) if part * scale >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Ascending numbers with as few decimals as tell each of them exactly enough."""
    if len(ticks) < 2:
        return [number(tick) for tick in ticks]
    close = 0.01 * min(after - before for before, after in itertools.pairwise(ticks))
    fits = (d for d in range(7) if all(abs(round(tick, d) - tick) <= close for tick in ticks))
    decimals = next(fits, None)
    return [f"{tick:.1e}" if decimals is None else f"{tick:,.{decimals}f}" for tick in ticks]


def _grid(up: _Axis) -> list[str]:
    marks = []
    ticks = _ticks(up.low, up.high, log=up.log)
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        y = up(np.array(tick)).item()
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return marks


def _steps(across: _Axis) -> list[str]:
    """Labels of the horizontal axis."""
    ticks = [tick for tick in _ticks(across.low, across.high, log=False) if tick == int(tick)]
    places = across(np.array(ticks, dtype=np.float64)).tolist()
    return [
        f'<text x="{min(x, WIDTH - 14):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{tick:,.0f}</text>'
        for x, tick in zip(places, ticks, strict=True)
    ]


def _path(place: int, line: Line, across: _Axis, up: _Axis) -> str:
    xs, ys = across(line.x), up(line.y)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    dots = ""
    if len(xs) < DOTTED_BELOW:
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in zip(xs, ys, strict=True))
    return f'<g class="line s{place}"><polyline points="{points}"/>{dots}</g>'


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") if abs(value) < 1e5 else round(value) for value in values.tolist()]
