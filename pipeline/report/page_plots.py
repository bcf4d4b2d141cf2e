"""The report's plots as SVG: few marks, widths in percent so that they fit a phone, colours from the page's variables.

Each function returns markup; texts in it are escaped. Lines keep their width and texts their size whatever the width of
the page: lines are drawn in a view of 1,000 units that is stretched, texts lie on top of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

_WIDE = 1000.0
COLOURS = 7  # of the page's palette; the eighth is for all others


def colour(number: int) -> str:
    """Return the page's variable for the n-th of several things."""
    return f"var(--c{number + 1})" if number < COLOURS else "var(--c8)"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, `most` at most, steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    factor = next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * step) <= most)
    step *= factor
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def span(values: Sequence[float | None], margin: float = 0.06) -> tuple[float, float]:
    """Return the range of some values with a margin; a range about a single value."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    room = margin * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _place(value: float, low: float, high: float) -> str:
    return f"{100 * (value - low) / (high - low):.2f}%"


def interval(
    value: float | None,
    low: float | None,
    high: float | None,
    limits: Sequence[float],
    *,
    kind: str = "",
    dots: Sequence[float] = (),
    reference: float | None = None,
) -> Markup:
    """Draw a value with its interval on a line that all rows of a table share.

    Parameters
    ----------
    value, low, high : float or None
    limits : (float, float)
        What the line begins and ends with.
    kind : str
        A class of the mark: ``own`` for the student and the chosen.
    dots : sequence of float
        Single measurements behind the mean.
    reference : float, optional
        Where a dotted line stands.
    """
    if value is None:
        return Markup('<svg class="line" height="24" aria-hidden="true"></svg>')
    begin, end = limits
    marks = ['<line class="axis" x1="0" x2="100%" y1="12" y2="12"/>']
    if reference is not None:
        x = _place(reference, begin, end)
        marks.append(f'<line class="reference" x1="{x}" x2="{x}" y1="0" y2="24"/>')
    if low is not None and high is not None:
        a, b = _place(max(low, begin), begin, end), _place(min(high, end), begin, end)
        marks.append(f'<line class="interval" x1="{a}" x2="{b}" y1="12" y2="12"/>')
    marks += [f'<circle class="seed" cx="{_place(dot, begin, end)}" cy="12" r="3"/>' for dot in dots]
    marks.append(f'<circle class="value" cx="{_place(value, begin, end)}" cy="12" r="5"/>')
    return Markup(f'<svg class="line {escape(kind)}" height="24" aria-hidden="true">{"".join(marks)}</svg>')


def scale(limits: Sequence[float], form: Callable[[float], str] = lambda value: f"{value:g}", most: int = 5) -> Markup:
    """Draw the numbers under lines of `interval`."""
    begin, end = limits
    texts = []
    for tick in ticks(begin, end, most):
        part = (tick - begin) / (end - begin)
        anchor = "start" if part < 0.06 else "end" if part > 0.94 else "middle"
        texts.append(f'<text x="{100 * part:.2f}%" y="12" text-anchor="{anchor}">{escape(form(tick))}</text>')
    return Markup(f'<svg class="line scale" height="16" aria-hidden="true">{"".join(texts)}</svg>')


def lines(
    series: Sequence[Mapping[str, Any]],
    *,
    title: str,
    height: int = 180,
    limits: Sequence[float] | None = None,
    form: Callable[[float], str] = lambda value: f"{value:g}",
    unit: str = "epoch",
) -> Markup:
    """Draw curves.

    Parameters
    ----------
    series : sequence of mappings
        ``values``: [x, y] pairs, y None where there is none; ``colour``: number in the palette; optional ``own`` (drawn
        strong), ``thin``, ``dash``.
    title : str
        What a screen reader says of it.
    height : int
        Pixels of the plot, without the numbers under it.
    limits : (float, float), optional
        Of y; default: those of the values.
    form : callable
        Writes a number of the y axis.
    unit : str
        What x counts.
    """
    points = [point for one in series for point in one["values"]]
    low, high = limits or span([y for _, y in points])
    first, last = (min(x for x, _ in points), max(x for x, _ in points)) if points else (0, 1)
    width = (last - first) or 1
    body, labels = _grid(low, high, height, form)
    paths = []
    for one in series:
        drawn = _paths(one["values"], first, width, low, high, height)
        style = f"stroke:{colour(one.get('colour', 0))}"
        kinds = " ".join(name for name in ("own", "thin", "dash") if one.get(name))
        paths += [f'<polyline class="curve {kinds}" style="{style}" points="{part}"/>' for part in drawn]
    body.append(
        f'<svg class="stretched" viewBox="0 0 {_WIDE:.0f} {height}" width="100%" height="{height}" '
        f'preserveAspectRatio="none">{"".join(paths)}</svg>'
    )
    if first == last:  # a line needs two points
        for one in series:
            for _, y in one["values"]:
                if y is not None:
                    mark = f'cx="50%" cy="{_down(y, low, high, height):.1f}" r="4"'
                    body.append(f'<circle class="single" style="fill:{colour(one.get("colour", 0))}" {mark}/>')
    under = height + 15
    body.append(f'<text x="0" y="{under}">{unit} {first:g}</text>')
    if last != first:
        body.append(f'<text x="100%" y="{under}" text-anchor="end">{last:g}</text>')
    return _chart(body, labels, height + 20, title)


def _paths(
    values: Sequence[Sequence[float | None]], first: float, width: float, low: float, high: float, height: int
) -> list[str]:
    """Return the points of a curve, in pieces where a value is missing."""
    pieces: list[list[str]] = [[]]
    for x, y in values:
        if y is None or x is None:
            pieces.append([])
            continue
        pieces[-1].append(f"{_WIDE * (x - first) / width:.1f},{_down(y, low, high, height):.1f}")
    return [" ".join(piece) for piece in pieces if len(piece) > 1]


def _down(value: float, low: float, high: float, height: int) -> float:
    return height * (high - value) / (high - low)


def _grid(low: float, high: float, height: int, form: Callable[[float], str]) -> tuple[list[str], list[str]]:
    """Return the lines across a plot, and the numbers beside them."""
    lines, labels = [], []
    for tick in ticks(low, high, 4):
        y = _down(tick, low, high, height)
        lines.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        labels.append(f'<span style="top:{y:.1f}px">{escape(form(tick))}</span>')
    return lines, labels


def steps(edges: Sequence[float], rows: Sequence[Mapping[str, Any]], *, title: str, height: int = 140) -> Markup:
    """Draw histograms as outlines over common bins: ``counts`` and ``colour`` of each."""
    highest = max((max(one["counts"], default=0) for one in rows), default=0) or 1
    low, high = edges[0], edges[-1]
    paths = []
    for one in rows:
        points = [f"0,{height}"]
        for left, right, counted in zip(edges, edges[1:], one["counts"], strict=False):
            y = height * (1 - 0.94 * counted / highest)
            points += [f"{_WIDE * (edge - low) / (high - low):.1f},{y:.1f}" for edge in (left, right)]
        points.append(f"{_WIDE:.0f},{height}")
        own = " own" if one.get("own") else ""
        style = f"stroke:{colour(one.get('colour', 0))}"
        paths.append(f'<polyline class="curve{own}" style="{style}" points="{" ".join(points)}"/>')
    body, labels = _grid(0, highest / 0.94, height, lambda value: f"{value:,g}")
    body += [
        f'<svg class="stretched" viewBox="0 0 {_WIDE:.0f} {height}" width="100%" height="{height}" '
        f'preserveAspectRatio="none">{"".join(paths)}</svg>',
        f'<text x="0" y="{height + 15}">{low:g} sure</text>',
        f'<text x="100%" y="{height + 15}" text-anchor="end">{high:g} no idea</text>',
    ]
    return _chart(body, labels, height + 20, title)


def stacked(counts: Sequence[float], rest: float, total: float) -> Markup:
    """Draw counts side by side as one bar of length `total`, the n-th in the n-th colour, all others last."""
    marks, begun = [], 0.0
    for number, value in enumerate([*counts, rest]):
        if value and total:
            style = f"fill:{colour(number) if number < len(counts) else 'var(--c8)'}"
            x, width = 100 * begun / total, 100 * value / total
            marks.append(f'<rect x="{x:.2f}%" width="{width:.2f}%" y="3" height="12" style="{style}"/>')
        begun += value
    return Markup(f'<svg class="line bar" height="18" aria-hidden="true">{"".join(marks)}</svg>')


def bar(value: float | None, most: float, *, kind: str = "", mark: float | None = None) -> Markup:
    """Draw one value as a bar of at most `most`, with a mark where another value is."""
    if value is None:
        return Markup('<svg class="line bar" height="18" aria-hidden="true"></svg>')
    most = most or 1.0
    width = 100 * min(max(value, 0) / most, 1)
    marks = [f'<rect class="amount {escape(kind)}" x="0" width="{width:.2f}%" y="4" height="10"/>']
    if mark is not None:
        x = f"{100 * min(max(mark, 0) / most, 1):.2f}%"
        marks.append(f'<line class="mark" x1="{x}" x2="{x}" y1="1" y2="17"/>')
    return Markup(f'<svg class="line bar" height="18" aria-hidden="true">{"".join(marks)}</svg>')


def reliability(bins: Sequence[Sequence[float]], *, title: str, number: int = 0) -> Markup:
    """Draw accuracy over confidence: bins [confidence, accuracy, images]; the dots' areas are the images."""
    side, most = 300, max((count for *_, count in bins), default=1) or 1
    body = [
        f'<rect class="frame" x="0" y="0" width="{side}" height="{side}"/>',
        *(
            f'<line class="grid" x1="0" x2="{side}" y1="{side * part}" y2="{side * part}"/>'
            f'<line class="grid" x1="{side * part}" x2="{side * part}" y1="0" y2="{side}"/>'
            for part in (0.25, 0.5, 0.75)
        ),
        f'<line class="diagonal" x1="0" y1="{side}" x2="{side}" y2="0"/>',
    ]
    for confidence, accuracy, images in bins:
        x, y = side * confidence, side * (1 - accuracy)
        radius = 3 + 13 * math.sqrt(images / most)
        told = f"confidence {confidence:.3f}, right {accuracy:.3f}, {images:,} images"
        body.append(f'<line class="gap" x1="{x:.1f}" x2="{x:.1f}" y1="{side - x:.1f}" y2="{y:.1f}"/>')
        body.append(
            f'<circle class="bin" style="fill:{colour(number)};stroke:{colour(number)}" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{radius:.1f}"><title>{told}</title></circle>'
        )
    body.append(f'<text x="0" y="{side + 16}">confidence 0</text>')
    body.append(f'<text x="{side}" y="{side + 16}" text-anchor="end">1</text>')
    body.append('<text class="tick" x="4" y="12">1 right</text>')
    inner = "".join(body)
    return Markup(
        f'<svg class="chart square" viewBox="-6 -6 {side + 12} {side + 28}" role="img" aria-label="{escape(title)}">'
        f"{inner}</svg>"
    )


def _chart(body: Sequence[str], labels: Sequence[str], height: int, title: str) -> Markup:
    told, inner = "".join(labels), "".join(body)
    return Markup(
        f'<div class="plotted"><div class="ys" aria-hidden="true">{told}</div>'
        f'<svg class="chart" width="100%" height="{height}" role="img" aria-label="{escape(title)}">{inner}</svg></div>'
    )


def percent_axis(value: float) -> str:
    """Write a share on an axis as a percentage."""
    return f"{100 * value:g}"


PLOTS: dict[str, Callable[..., Any]] = {
    "colour": colour,
    "interval": interval,
    "scale": scale,
    "lines": lines,
    "steps": steps,
    "stacked": stacked,
    "bar": bar,
    "reliability": reliability,
    "span": span,
    "percent_axis": percent_axis,
}
