"""The terminal: stages as they run, progress bars, tables. Nothing else in the package prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Advance = Callable[..., None]
_PIPED_WIDTH = 120  # a file or a log has no width of its own


class Display:
    """Prints what a run does. Colours and moving bars appear only on a terminal.

    Parameters
    ----------
    console : rich.console.Console, optional
        Default: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, _PIPED_WIDTH)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, and the time it took once it is over."""
        started = time.perf_counter()
        self.console.print(f"[bold]{name}[/bold]")
        yield
        self.console.print(f"  [dim]{name}: {time.perf_counter() - started:.1f} s[/dim]")

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show that something without countable steps is going on; only on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(f"  {what}"):
            yield

    def fresh(self, name: str, finished: str) -> None:
        """Say that a stage's result is reused."""
        self.console.print(f"[bold]{name}[/bold] [dim]unchanged since {finished}[/dim]")

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Show progress; yields ``advance(done=1, note="")``.

        Away from a terminal a line is printed at the first and last step and at most every ten seconds between.
        """
        if not self.console.is_terminal:
            yield _Lines(self.console, title, total)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}[/dim]"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total, note="")

            def advance(done: int = 1, note: str = "") -> None:
                progress.update(task, advance=done, note=note)

            yield advance

    def table(self, table: Table) -> None:
        """Print a table."""
        self.console.print(table)

    def note(self, text: str) -> None:
        """Print one line that matters."""
        self.console.print(f"  {text}", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one line that should worry."""
        self.console.print(f"  [yellow]{text}[/yellow]", soft_wrap=True)


class _Lines:
    """Progress for logs: few lines instead of a moving bar."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._done, self._printed = 0, -float("inf")

    def __call__(self, done: int = 1, note: str = "") -> None:
        self._done += done
        now = time.monotonic()
        if self._done >= self._total or now - self._printed > 10:
            self._printed = now
            ending = f"  {note}" if note else ""
            self._console.print(f"  {self._title} {self._done}/{self._total}{ending}", soft_wrap=True, markup=False)
