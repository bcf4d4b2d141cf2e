"""The terminal: stages as they run, progress bars, tables. Nothing else in the package prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pipeline.report.pace import Pace, shown_rate, shown_time

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

    @property
    def moving(self) -> bool:
        """Whether a bar moves, so that a note may come before the first step: on a terminal that can go back."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

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
        if not self.moving:
            yield
            return
        with self.console.status(f"  {what}"):
            yield

    def fresh(self, name: str, finished: str) -> None:
        """Say that a stage's result is reused."""
        self.console.print(f"[bold]{name}[/bold] [dim]unchanged since {finished}[/dim]")

    @contextmanager
    def bar(
        self, title: str, total: int, unit: str = "", *, work: float | None = None, at_once: int = 1
    ) -> Iterator[Advance]:
        """Show progress, its rate, and the time that is left.

        Yields ``advance(done=1, note="", work=None, took=None)``: `done` steps, which were `work`, took `took` seconds.
        Away from a terminal a line is printed at the first and last step and at most every ten seconds between.

        Parameters
        ----------
        title : str
            What the steps are.
        total : int
            Steps.
        unit : str
            What the rate counts, in the plural; by default the title where it is one, else steps.
        work : float, optional
            All work, where steps differ in it, in `unit`; by default every step is as much as another.
        at_once : int
            How many steps are done side by side.
        """
        pace, unit = Pace(total if work is None else work, at_once), unit_of(title, unit)
        if not self.moving:
            yield _Lines(self.console, title, total, unit, pace)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _Left(pace, unit),
            TextColumn(" [dim]{task.fields[note]}[/dim]"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total, note="")

            def advance(done: int = 1, note: str = "", work: float | None = None, took: float | None = None) -> None:
                pace.advance(done if work is None else work, took)
                progress.update(task, advance=done, note=escape(note))

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


class _Left(ProgressColumn):
    """The time that is left, and the rate."""

    def __init__(self, pace: Pace, unit: str) -> None:
        super().__init__()
        self._pace, self._unit = pace, unit

    def render(self, task: Task) -> Text:
        """Return both; nothing before the first step, when nobody can know."""
        return Text(pace_told(self._pace, self._unit, task.finished), style="cyan")


def unit_of(title: str, unit: str = "") -> str:
    """Return what a bar's rate counts: `unit`, else the title where it is a plural, else steps."""
    return unit or (title if title.endswith("s") else "steps")


def pace_told(pace: Pace, unit: str, finished: bool) -> str:
    """Return rate and time left in a few words; "" before the first step, when nobody can know."""
    rate, eta = pace.rate, pace.eta
    told = [] if rate is None else [shown_rate(rate, unit)]
    if eta is not None and not finished:
        told.append(f"ETA {shown_time(eta)}")
    return "  ".join(told)


class _Lines:
    """Progress for logs: few lines instead of a moving bar."""

    def __init__(self, console: Console, title: str, total: int, unit: str, pace: Pace) -> None:
        self._console, self._title, self._total = console, title, total
        self._unit, self._pace = unit, pace
        self._done, self._printed = 0, -float("inf")

    def __call__(self, done: int = 1, note: str = "", work: float | None = None, took: float | None = None) -> None:
        self._done += done
        self._pace.advance(done if work is None else work, took)
        now = time.monotonic()
        if self._done >= self._total or now - self._printed > 10:
            self._printed = now
            pace = pace_told(self._pace, self._unit, self._done >= self._total)
            told = "  ".join(part for part in (f"{self._title} {self._done}/{self._total}", pace, note) if part)
            self._console.print(f"  {told}", soft_wrap=True, markup=False)
