"""Small tables for notebooks: no script, no colour of their own, every text escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDE, _HIGH = 120, 14  # of an interval's picture, in pixels
_CELL = "padding:2px 10px;text-align:{side};vertical-align:top"
_NUMBER = ";white-space:nowrap"  # what stands on the right is one
MARK = "✓"


def table(
    heads: Mapping[str, str], rows: Sequence[Sequence[str]], *, title: str = "", notes: Sequence[str] = ()
) -> str:
    """Return an HTML table in the colours of the page it stands on.

    Parameters
    ----------
    heads : mapping of str to str
        Columns: what they are called, and ``left`` or ``right``.
    rows : sequence of sequences of str
        Cells, HTML already: text must have gone through `text`.
    title : str
        A line above, text.
    notes : sequence of str
        Lines below, text.
    """
    cells = [_CELL.format(side=side) + _NUMBER * (side == "right") for side in heads.values()]
    head = "".join(
        f'<th style="{style}" scope="col">{escape(name)}</th>' for name, style in zip(heads, cells, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f'<td style="{style}">{cell}</td>' for cell, style in zip(row, cells, strict=True)) + "</tr>"
        for row in rows
    )
    caption = f'<caption style="text-align:left;font-weight:bold">{escape(title)}</caption>' if title else ""
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return (
        f'<div><table style="border-collapse:collapse;background:none">{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{below}</div>"
    )


def text(value: Any) -> str:
    """Return a cell of text."""
    return "" if value is None else escape(str(value))


def interval(low: float, middle: float, high: float, least: float, most: float) -> str:
    """Return a picture of an interval on an axis from `least` to `most`, drawn in the colour of the text."""
    spread = (most - least) or 1.0

    def place(value: float) -> str:
        return f"{5 + (_WIDE - 10) * (value - least) / spread:.1f}"

    line = 'stroke="currentColor" stroke-width="{}" stroke-opacity="{}"'
    return (
        f'<svg width="{_WIDE}" height="{_HIGH}" role="img" aria-label="{low:.3f} to {high:.3f}">'
        f'<line x1="5" x2="{_WIDE - 5}" y1="7" y2="7" {line.format(1, 0.2)}/>'
        f'<line x1="{place(low)}" x2="{place(high)}" y1="7" y2="7" {line.format(3, 0.6)}/>'
        f'<circle cx="{place(middle)}" cy="7" r="4" fill="currentColor"/></svg>'
    )


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number; nothing where there is none."""
    return "" if value is None else format(value, form)
