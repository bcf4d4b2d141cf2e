"""What notebooks show of a result: all of it, in order, and nothing that a text could smuggle in."""

from __future__ import annotations

import html.parser
import io
import json
import re
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config import Settings
from pipeline.errors import DataError
from pipeline.face import html as face_html
from pipeline.face.progress import CallDisplay
from pipeline.face.results import Assessment, Faculty
from pipeline.face.student import Student, Version
from pipeline.stages.artefacts import Record

EVIL = "<script>alert('x')</script> & \"more\""


def settings(folder: Path) -> Settings:
    return Settings.model_validate(
        {
            "name": "t",
            "run_dir": str(folder),
            "task": {"source": {"type": "image_folder", "path": "x"}, "image": {"size": 8}},
            "zoo": {"path": "zoo.yaml"},
        }
    )


def record(stage: str, **summary: object) -> Record:
    return Record(stage, "key", "digest", {}, summary, 1.0, 0.0)


def row(name: str, score: float | None, error: str | None = None, dropped: str | None = None) -> dict:
    around = {"score": score, "score_low": score and score - 0.1, "score_high": score and score + 0.1}
    return {"teacher": name, "transport_cost": score and 0.25, "error": error, "dropped": dropped} | around


ROWS = [row("first", 0.75), row("second", 0.5), row("third", None, dropped="rung 1"), row("last", None, error=EVIL)]
CHOICE = {
    "chosen": ["second"],
    "best_single": "first",
    "verdict": EVIL,
    "reasons": {"first": "too little, +0.001", "second": "1. choice, +0.1", "third": "dropped", "last": EVIL},
    "verdicts": {"first": {"gain": 0.001}, "second": {"gain": 0.1}},
    "coverage": {"a": 0.5, "b": 1.0},
    "shares": {},
}


@pytest.fixture
def found(tmp_path: Path) -> Assessment:
    folder = tmp_path / "assess" / "key"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "assessment.parquet")
    return Assessment(settings(tmp_path), {"assess": record("assess")})


@pytest.fixture
def chosen(found: Assessment, tmp_path: Path) -> Faculty:
    (tmp_path / "select" / "key").mkdir(parents=True)
    (tmp_path / "select" / "key" / "faculty.json").write_text(json.dumps(CHOICE), encoding="utf-8")
    records = {**found.records, "select": record("select")}
    return Faculty(found.settings, records, Assessment(found.settings, records))


class Cells(html.parser.HTMLParser):
    """The texts of a table's cells, row by row, and every tag; an unclosed one is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_an_assessment_is_a_table_and_tells_who_is_best(found: Assessment) -> None:
    assert found.ranking == ["first", "second"]
    assert found.best()["score"] == 0.75 and found["second"]["score"] == 0.5
    assert found.failed == {"last": EVIL} and found.dropped == {"third": "rung 1"}
    assert found.table.num_rows == len(found) == 4
    assert [one["teacher"] for one in found] == ["first", "second", "third", "last"]
    with pytest.raises(DataError, match="no teacher 'fist'"):
        found["fist"]
    lines = repr(found).splitlines()
    assert lines[1].split() == ["1", "first", "0.750", "[0.650,", "0.850]"]
    assert len(lines) == 5


def test_a_notebook_shows_rank_score_interval_cost_and_why(found: Assessment, chosen: Faculty) -> None:
    shown = Cells(found._repr_html_())
    assert shown.rows[0] == ["", "teacher", "score", "interval", "transport cost", "why"]
    assert shown.rows[1] == ["1", "first", "0.750", "", "0.250", ""]
    assert shown.rows[4] == ["4", "last", "", "", "", EVIL]
    shown = Cells(chosen._repr_html_())
    assert [line[5] for line in shown.rows[1:]] == ["", face_html.MARK, "", ""]
    assert shown.rows[2][6] == "1. choice, +0.1"


def test_nothing_in_a_text_becomes_a_tag(found: Assessment, chosen: Faculty) -> None:
    for shown in (found._repr_html_(), chosen._repr_html_()):
        assert Cells(shown).tags == {
            *("div", "table", "caption", "thead", "tbody", "tr", "th", "td", "svg", "line", "circle"),
        } - (set() if "<caption" in shown else {"caption"})
        assert "<script" not in shown and "&lt;script&gt;" in shown


def test_it_takes_its_colours_from_the_page(found: Assessment) -> None:
    shown = found._repr_html_()
    assert "currentColor" in shown
    assert "#" not in shown.replace("&#x27;", "") and "color:" not in shown


def test_an_interval_s_picture_is_to_scale() -> None:
    drawn = face_html.interval(0.25, 0.5, 0.75, 0.0, 1.0)
    assert 'x1="32.5"' in drawn and 'x2="87.5"' in drawn and 'cx="60.0"' in drawn
    assert 'cx="5.0"' in face_html.interval(1.0, 1.0, 1.0, 1.0, 1.0)


def test_of_thousands_the_best_and_the_chosen_are_shown(tmp_path: Path) -> None:
    (tmp_path / "assess" / "key").mkdir(parents=True)
    (tmp_path / "select" / "key").mkdir(parents=True)
    many = [row(f"teacher{place}", 1 - place / 1000) for place in range(1000)]
    pq.write_table(pa.Table.from_pylist(many), tmp_path / "assess" / "key" / "assessment.parquet")
    choice = CHOICE | {"chosen": ["teacher900"], "reasons": {one["teacher"]: "" for one in many}}
    (tmp_path / "select" / "key" / "faculty.json").write_text(json.dumps(choice), encoding="utf-8")
    records = {"assess": record("assess"), "select": record("select")}
    faculty = Faculty(settings(tmp_path), records, Assessment(settings(tmp_path), records))
    shown = Cells(faculty._repr_html_())
    assert len(shown.rows) == 42 and shown.rows[-1][:2] == ["901", "teacher900"]
    assert "959 more" in faculty._repr_html_() and "959 more" in repr(faculty)


def test_a_faculty_tells_who_why_gain_and_coverage(chosen: Faculty) -> None:
    assert chosen.who == ("second",) and list(chosen) == ["second"] and "second" in chosen and len(chosen) == 1
    assert chosen.gain == {"first": 0.001, "second": 0.1} and chosen.coverage == {"a": 0.5, "b": 1.0}
    assert chosen.why["first"] == "too little, +0.001" and chosen.best_single == "first" and chosen.verdict == EVIL
    assert repr(chosen).splitlines()[3].startswith("*  2  second")


def test_a_plot_is_a_png(found: Assessment, chosen: Faculty, tmp_path: Path) -> None:
    for result in (found, chosen):
        picture = result.plot()
        assert Image.open(io.BytesIO(picture._repr_png_())).format == "PNG"
        assert picture.save(tmp_path / "p.png").read_bytes() == picture.content


def test_results_whose_files_are_gone_say_so(found: Assessment, chosen: Faculty, tmp_path: Path) -> None:
    (tmp_path / "assess" / "key" / "assessment.parquet").unlink()
    (tmp_path / "select" / "key" / "faculty.json").unlink()
    with pytest.raises(DataError, match=r"assessment\.parquet: can't be read .*run assess again"):
        len(found)
    with pytest.raises(DataError, match=r"faculty\.json: can't be read .*run select again"):
        bool(chosen)


def test_a_student_shows_its_controls(tmp_path: Path) -> None:
    (tmp_path / "evaluate" / "key").mkdir(parents=True)
    arms = [
        {"title": EVIL, "accuracies": [0.7, 0.8], "mean": 0.75, "std": 0.05, "ece": 0.1},
        {"title": "no teacher", "accuracies": [0.5, 0.6], "mean": 0.55, "std": 0.05, "ece": 0.2}
        | {"difference": 0.2, "difference_2se": 0.03},
    ]
    evaluation = {"arms": arms, "verdict": "student 75.0 %", "classes": ["a", "b"]}
    (tmp_path / "evaluate" / "key" / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    student = Student(settings(tmp_path), {"evaluate": record("evaluate")})
    assert student.accuracy == 0.75 and student.verdict == "student 75.0 %"
    assert "no teacher: 55.0 ± 5.0" in repr(student)
    shown = Cells(student._repr_html_())
    assert shown.rows[1] == [EVIL, "2", "75.0 ± 5.0", "0.100", "", ""]
    assert shown.rows[2] == ["no teacher", "2", "55.0 ± 5.0", "0.200", "+20.0", "3.0"]
    assert "<script" not in student._repr_html_()
    (tmp_path / "evaluate" / "key" / "evaluation.json").write_text('{"arms": [], "verdict": "not evaluated"}')
    assert Student(settings(tmp_path), {"evaluate": record("evaluate")}).accuracy is None


def test_a_version_that_was_kept_out_is_false(tmp_path: Path) -> None:
    told = {"name": "birds", "gate": "failed", "why": "no lead", "promoted": False, "warnings": []}
    out = Version(settings(tmp_path), {"register": record("register", **told)})
    assert not out and out.number is None and repr(out) == "not registered: no lead"
    told |= {"version": "3", "uri": "models:/birds/3", "alias": "challenger", "gate": "passed"}
    version = Version(settings(tmp_path), {"register": record("register", **told)})
    assert version and version.number == "3" and "models:/birds/3 (gate passed" in repr(version)


def test_a_call_shows_what_it_runs_and_one_line_of_what_is_there(capsys: pytest.CaptureFixture) -> None:
    display = CallDisplay()
    display.console = Console(file=io.StringIO(), width=100)
    display.fresh("assess", "today")
    display.note("former note")
    display.warn("former warning")
    display.table(Table("former"))
    with display.stage("select"):
        display.note("note")
    display.warn("warning")
    text = display.console.file.getvalue()  # type: ignore[attr-defined]
    assert "former" not in text and "assess unchanged since today" in text
    assert "note" in text and "warning" in text
    quiet = CallDisplay(quiet=True)
    with quiet.stage("select"), quiet.bar("teachers", 2) as advance:
        advance(2)
    assert capsys.readouterr().out == ""


class Page(types.ModuleType):
    """`IPython.display` as far as progress needs it: keeps what stands on the page, and how often it was told."""

    def __init__(self) -> None:
        super().__init__("IPython.display")
        self.outputs: list[dict[str, str]] = []
        self.told = 0
        page = self

        class DisplayHandle:
            def display(self, content: dict[str, str], raw: bool) -> None:
                page.outputs.append(dict(content))
                self.place, page.told = len(page.outputs) - 1, page.told + 1

            def update(self, content: dict[str, str], raw: bool) -> None:
                page.outputs[self.place] = dict(content)
                page.told += 1

        self.DisplayHandle = DisplayHandle


def test_progress_in_a_notebook_is_one_line_that_is_rewritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page()
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", page)
    monkeypatch.setattr("pipeline.face.progress.in_notebook", lambda: True)
    display = CallDisplay()
    assert display.moving
    with display.stage("assess"):
        with display.working("reading <all>"):
            assert "reading &lt;all&gt; …" in page.outputs[0]["text/html"]
        assert page.outputs[0]["text/plain"].startswith("reading <all>: 0.")
        with display.working("starting Ray"):
            assert page.outputs[0]["text/plain"] == "starting Ray …"  # in the same place
        with display.bar("teachers", 500) as advance:
            for _ in range(500):
                advance(1, "a<b")
        display.note("done")
        shown = Table("teacher", "score", title="found")
        shown.columns[1].justify = "right"
        shown.add_row(escape("a<b> [1]"), "[red]0.5[/]")
        display.table(shown)
    told = page.outputs.pop()["text/html"]
    assert "a&lt;b&gt; [1]" in told and ">0.5<" in told and "found" in told and "[red]" not in told
    assert len(page.outputs) == 2 and page.told < 20  # not a message for each step
    assert page.outputs[1]["text/plain"].startswith("teachers 500/500  ")
    assert page.outputs[1]["text/plain"].endswith("  a<b")
    assert "a&lt;b" in page.outputs[1]["text/html"] and '<progress value="1.0000"' in page.outputs[1]["text/html"]
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert lines[0] == "assess" and lines[1] == "  done" and lines[2].startswith("  assess: ")

    quiet = CallDisplay(quiet=True)
    with quiet.stage("assess"), quiet.working("x"), quiet.bar("teachers", 2) as advance:
        advance(2)
    assert len(page.outputs) == 2 and capsys.readouterr().out == ""
