"""What the first stages found, as objects: who was assessed how, and who was chosen why."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Settings
from pipeline.errors import DataError
from pipeline.face import html

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.stages.artefacts import Record

_SHOWN = 40  # teachers in a table: of thousands the best are enough, all are in `table`


@dataclass(frozen=True, repr=False)
class Found:
    """What a call has found, and where it lies.

    Attributes
    ----------
    settings : Settings
        All settings of the run, with those of this call.
    records : mapping of str to Record
        By stage: key, numbers, seconds.
    """

    settings: Settings
    records: Mapping[str, Record]

    @property
    def run_dir(self) -> str:
        """The run folder; ``faculty run -c RUN_DIR/settings.yaml`` goes on from here."""
        return self.settings.run_dir

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's artefacts."""
        from pipeline.data.mirror import here
        from pipeline.stages.artefacts import RunFolder

        return here(RunFolder(self.run_dir).folder(stage, self.records[stage].key))

    def _json(self, stage: str, name: str) -> Any:
        path = self.folder(stage) / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: can't be read ({error}); run {stage} again") from None


@dataclass(frozen=True)
class Picture:
    """A plot that notebooks show.

    Attributes
    ----------
    content : bytes
        A PNG file's.
    """

    content: bytes

    def _repr_png_(self) -> bytes:
        return self.content

    def __repr__(self) -> str:
        return f"Picture({len(self.content)} bytes; .save(path) writes it)"

    def save(self, path: str | Path) -> Path:
        """Write it to a PNG file."""
        Path(path).write_bytes(self.content)
        return Path(path)


@dataclass(frozen=True, repr=False)
class Assessment(Found):
    """Every teacher's scores on the task, best first."""

    @cached_property
    def table(self) -> pa.Table:
        """A row a teacher and a column a score: a pyarrow table, ``.to_pandas()`` where that is wanted."""
        import pyarrow.parquet as pq

        path = self.folder("assess") / "assessment.parquet"
        try:
            return pq.read_table(path)
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error}); run assess again") from None

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The table as mappings."""
        return self.table.to_pylist()

    @property
    def ranking(self) -> list[str]:
        """The teachers that could be assessed to the end, best first."""
        return [row["teacher"] for row in self.rows if _problem(row) is None]

    @property
    def failed(self) -> dict[str, str]:
        """Teachers that failed, and why."""
        return {row["teacher"]: row["error"] for row in self.rows if row["error"]}

    @property
    def dropped(self) -> dict[str, str]:
        """Teachers that the search of a large zoo left behind, and why."""
        return {row["teacher"]: row["dropped"] for row in self.rows if row["dropped"]}

    def best(self) -> dict[str, Any]:
        """Return the row of the teacher with the highest score."""
        if not self.ranking:
            raise DataError("assess: no teacher could be assessed to the end; see .failed and .dropped")
        return self[self.ranking[0]]

    def __getitem__(self, teacher: str) -> dict[str, Any]:
        """Return a teacher's row."""
        for row in self.rows:
            if row["teacher"] == teacher:
                return row
        raise DataError(f"assess: there is no teacher {teacher!r}; there are {', '.join(self._names[:20])}")

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    @property
    def _names(self) -> list[str]:
        return [row["teacher"] for row in self.rows]

    def plot(self) -> Picture:
        """Draw the best teachers' scores with their intervals."""
        return _picture(self.rows, ())

    def __repr__(self) -> str:
        lines = [f"Assessment of {len(self)} teachers, {self.run_dir}"]
        return "\n".join(lines + _lines(self.rows, {}, {row["teacher"]: _problem(row) for row in self.rows}))

    def _repr_html_(self) -> str:
        why = {row["teacher"]: _problem(row) for row in self.rows}
        return _teachers(f"{len(self)} teachers", self.rows, None, why, ())


@dataclass(frozen=True, repr=False)
class Faculty(Found):
    """The teachers that were chosen, and why these; it may be empty where none helps."""

    assessment: Assessment

    @cached_property
    def choice(self) -> dict[str, Any]:
        """`faculty.json`."""
        return self._json("select", "faculty.json")

    @property
    def who(self) -> tuple[str, ...]:
        """The chosen teachers, in the order in which they were chosen."""
        return tuple(self.choice["chosen"])

    @property
    def why(self) -> dict[str, str]:
        """The reason for each teacher, chosen or not."""
        return dict(self.choice["reasons"])

    @property
    def gain(self) -> dict[str, float]:
        """What each teacher adds, or would add, to the set's score; empty where the choice was not tested."""
        return {name: one["gain"] for name, one in self.choice["verdicts"].items()}

    @property
    def coverage(self) -> dict[str, float]:
        """How well the set knows each class, in [0, 1]; empty where the choice was not tested."""
        return dict(self.choice["coverage"])

    @property
    def best_single(self) -> str | None:
        """The teacher that is best alone."""
        return self.choice["best_single"]

    @property
    def verdict(self) -> str:
        """What the choice rests on, or that no teacher helps."""
        return self.choice["verdict"]

    def plot(self) -> Picture:
        """Draw the best teachers' scores with their intervals, the chosen ones marked."""
        return _picture(self.assessment.rows, self.who)

    def __len__(self) -> int:
        return len(self.who)

    def __iter__(self) -> Iterator[str]:
        return iter(self.who)

    def __contains__(self, name: object) -> bool:
        return name in self.who

    def __repr__(self) -> str:
        names = ", ".join(self.who) or "nobody"
        lines = [f"Faculty: {names}", f"  {self.verdict}"]
        places = {name: place for place, name in enumerate(self.who, start=1)}
        return "\n".join(lines + _lines(self.assessment.rows, places, self.why))

    def _repr_html_(self) -> str:
        title = f"Faculty: {', '.join(self.who)}" if self.who else "Faculty: nobody"
        return _teachers(title, self.assessment.rows, self.who, self.why, (self.verdict,))


def _problem(row: Mapping[str, Any]) -> str | None:
    return row["error"] or row["dropped"]


def _picture(rows: list[dict[str, Any]], chosen: tuple[str, ...]) -> Picture:
    from pipeline.report.plots import plot_scores

    if all(row["score"] is None for row in rows):
        raise DataError("plot: no teacher has a score")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.png"
        plot_scores(rows, path, chosen=chosen)
        return Picture(path.read_bytes())


def _worth_showing(rows: list[dict[str, Any]], chosen: Any) -> list[tuple[int, dict[str, Any]]]:
    return [(place, row) for place, row in enumerate(rows, start=1) if place <= _SHOWN or row["teacher"] in chosen]


def _lines(rows: list[dict[str, Any]], chosen: Mapping[str, int], why: Mapping[str, str | None]) -> list[str]:
    shown = _worth_showing(rows, chosen)
    wide = max((len(row["teacher"]) for _, row in shown), default=0)
    lines = []
    for place, row in shown:
        mark = "*" if row["teacher"] in chosen else " "
        score = "" if row["score"] is None else f"{row['score']:7.3f} [{row['score_low']:.3f}, {row['score_high']:.3f}]"
        reason = why.get(row["teacher"]) or ""
        lines.append(f"{mark}{place:3d}  {row['teacher']:{wide}}  {score:24}  {reason}".rstrip())
    return lines + ([f"   … {len(rows) - len(shown)} more in .table"] if len(rows) > len(shown) else [])


def _teachers(
    title: str,
    rows: list[dict[str, Any]],
    chosen: tuple[str, ...] | None,
    why: Mapping[str, str | None],
    notes: tuple[str, ...],
) -> str:
    """Return the teachers as an HTML table: rank, name, score with its interval, transport cost, chosen, why."""
    scored = [row for row in rows if row["score"] is not None]
    least = min((row["score_low"] for row in scored), default=0.0)
    most = max((row["score_high"] for row in scored), default=1.0)
    heads = {"": "right", "teacher": "left", "score": "right", "interval": "left", "transport cost": "right"}
    heads |= {} if chosen is None else {"chosen": "left"}
    shown = _worth_showing(rows, chosen or ())
    cells = []
    for place, row in shown:
        low, score, high = row["score_low"], row["score"], row["score_high"]
        line = [str(place), html.text(row["teacher"]), html.number(score)]
        line += ["" if score is None else html.interval(low, score, high, least, most)]
        line += [html.number(row["transport_cost"])]
        if chosen is not None:
            line.append(html.MARK if row["teacher"] in chosen else "")
        cells.append([*line, html.text(why.get(row["teacher"]))])
    more = (f"{len(rows) - len(shown)} more in .table",) if len(rows) > len(shown) else ()
    return html.table({**heads, "why": "left"}, cells, title=title, notes=(*notes, *more))
