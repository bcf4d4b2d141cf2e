"""What a call shows while it runs: the stages that it runs, and one line for those that stand already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from pipeline.report.console import Display


class CallDisplay(Display):
    """Progress of one call of the Python face.

    A call goes through all stages up to its own. What former calls have found was shown then, and is in their results.

    Parameters
    ----------
    quiet : bool
        Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(Console(highlight=False, quiet=quiet))
        self._former = False

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, and the time it took once it is over."""
        self._former = False
        with super().stage(name):
            yield

    def fresh(self, name: str, finished: str) -> None:
        """Say that a stage's result is reused."""
        super().fresh(name, finished)
        self._former = True

    def table(self, table: Table) -> None:
        """Print a table."""
        if not self._former:
            super().table(table)

    def note(self, text: str) -> None:
        """Print one line that matters."""
        if not self._former:
            super().note(text)

    def warn(self, text: str) -> None:
        """Print one line that should worry."""
        if not self._former:
            super().warn(text)
