"""Progress in a notebook: one line of the output that is rewritten in its place, without widgets or a script."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.face import html
from pipeline.report.console import Advance, pace_told
from pipeline.report.pace import Pace

_EVERY_S = 0.3  # between two messages to the page: an output is kept with all of them while a cell runs
_STYLE = "font-family:monospace;font-size:var(--jp-code-font-size,13px);white-space:pre-wrap;padding-left:1.2em"
_LONG_S = 1.0  # what takes less is of no interest afterwards
WIDTH = 100  # of a table in characters; a page breaks lines that are wider than it


def in_notebook() -> bool:
    """Return whether output goes to a notebook's page."""
    return Console().is_jupyter


def notebook_console(quiet: bool) -> Console:
    """Return a console whose lines are one text of the page. Rich's own sets each apart, and its bars need widgets."""
    return Console(
        highlight=False,
        quiet=quiet,
        force_jupyter=False,
        force_terminal=False,
        color_system=None if quiet else "standard",
    )


@contextlib.contextmanager
def notebook_bar(title: str, total: int, unit: str, pace: Pace) -> Iterator[Advance]:
    """Show progress in a notebook; see `pipeline.report.console.Display.bar`."""
    line = _Line()
    done, shown = 0, -float("inf")

    def advance(step: int = 1, note: str = "", work: float | None = None, took: float | None = None) -> None:
        nonlocal done, shown
        done += step
        pace.advance(step if work is None else work, took)
        now = time.monotonic()
        if now - shown < _EVERY_S and done < total:
            return
        shown = now
        told = [f"{title} {done:,}/{total:,}", pace_told(pace, unit, done >= total), note]
        line.show("  ".join(part for part in told if part), done / max(total, 1))

    line.show(f"{title} 0/{total:,}", 0.0)
    yield advance


class Working:
    """One line for all that goes on without countable steps: what goes on now, and then what took over a second."""

    def __init__(self) -> None:
        self._line, self._kept = _Line(), ""

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Say that something is going on, as long as it does."""
        began = time.monotonic()
        self._line.show(f"{what} …")
        try:
            yield
        finally:  # an output that was emptied would leave a gap
            took = time.monotonic() - began
            told = f"{what}: {took:.1f} s"
            if took > _LONG_S:
                self._kept = f"{self._kept}, {told}" if self._kept else told
            self._line.show(self._kept or told)


def show_table(table: Table) -> None:
    """Show a console's table as one of the page."""
    from IPython.display import DisplayHandle

    heads: dict[str, str] = {}
    for column in table.columns:
        name = plain(column.header)
        while name in heads:  # two columns of one name
            name += " "
        heads[name] = "right" if column.justify == "right" else "left"
    rows = zip(*([html.text(plain(cell)) for cell in column.cells] for column in table.columns), strict=True)
    shown = html.table(heads, [list(row) for row in rows], title=plain(table.title or ""))
    console = Console(file=io.StringIO(), width=WIDTH, force_jupyter=False, color_system=None)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    DisplayHandle().display({"text/plain": text, "text/html": shown}, raw=True)


def plain(cell: Any) -> str:
    """Return what a cell says, without its markup."""
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


class _Line:
    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str, share: float | None = None) -> None:
        from IPython.display import DisplayHandle

        bar = (
            "" if share is None else f'<progress value="{share:.4f}" max="1" style="vertical-align:middle"></progress> '
        )
        content = {
            "text/plain": text,
            "text/html": f'<div style="{_STYLE}">{bar}{escape(text)}</div>',
        }
        if self._handle is None:
            self._handle = DisplayHandle()
            self._handle.display(content, raw=True)
        else:
            self._handle.update(content, raw=True)
