"""What a call shows while it runs: the stages that it runs, and one line for those that stand already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from pipeline.face.notebook import WIDTH, Working, in_notebook, notebook_bar, notebook_console, show_table
from pipeline.report.console import Advance, Display, unit_of
from pipeline.report.pace import Pace


class CallDisplay(Display):
    """Progress of one call of the Python face.

    A call goes through all stages up to its own. What former calls have found was shown then, and is in their results.

    Parameters
    ----------
    quiet : bool
        Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._notebook = in_notebook() and not quiet
        super().__init__(notebook_console(quiet) if self._notebook else Console(highlight=False, quiet=quiet))
        if self._notebook:
            self.console.width = WIDTH
        self._former, self._working = False, Working()

    @property
    def moving(self) -> bool:
        """Whether a bar moves, so that a note may come before the first step."""
        return self._notebook or super().moving

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show that something without countable steps is going on."""
        with self._working.on(what) if self._notebook else super().working(what):
            yield

    @contextlib.contextmanager
    def bar(
        self, title: str, total: int, unit: str = "", *, work: float | None = None, at_once: int = 1
    ) -> Iterator[Advance]:
        """Show progress, its rate, and the time that is left."""
        if not self._notebook:
            with super().bar(title, total, unit, work=work, at_once=at_once) as advance:
                yield advance
            return
        with notebook_bar(
            title, total, unit_of(title, unit), Pace(total if work is None else work, at_once)
        ) as advance:
            yield advance

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, and the time it took once it is over."""
        self._former, self._working = False, Working()
        with super().stage(name):
            yield

    def fresh(self, name: str, finished: str) -> None:
        """Say that a stage's result is reused."""
        super().fresh(name, finished)
        self._former = True

    def table(self, table: Table) -> None:
        """Print a table."""
        if self._former:
            return
        if self._notebook:
            show_table(table)
        else:
            super().table(table)

    def note(self, text: str) -> None:
        """Print one line that matters."""
        if not self._former:
            super().note(text)

    def warn(self, text: str) -> None:
        """Print one line that should worry."""
        if not self._former:
            super().warn(text)
