"""When a page is written, from which results, and how several runs stand beside each other."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.report.console import Display
from pipeline.report.page_format import NOT_KNOWN
from pipeline.stages import report
from pipeline.stages.artefacts import Record, write_json
from pipeline.stages.base import Run
from pipeline.stages.report_folder import kept_run
from tests.madefolder import Made, make_run
from tests.readpage import Page


def quiet() -> Display:
    return Display(Console(file=io.StringIO(), width=200))


def artefact(root: Path, stage: str, name: str):
    (path,) = (root / stage).glob(f"*/{name}")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("made"))


def test_the_page_is_written_once_and_again_when_the_results_are_others(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "run")
    run = kept_run(tmp_path / "run", quiet())
    told: list[Path] = []
    run.root = run.tracker = type("Told", (), {"artifact": lambda self, path, folder=None: told.append(path)})()  # type: ignore[assignment]
    report.add_report(run)
    path = tmp_path / "run" / "report.html"
    assert told == [path] and Page(path.read_text(encoding="utf-8"))
    before = path.stat().st_mtime_ns
    report.add_report(run)
    assert told == [path] and path.stat().st_mtime_ns == before
    old = run.records["register"]
    run.records["register"] = Record(**(vars(old) | {"key": "another"}))
    (tmp_path / "run" / "register" / "registerkey").rename(tmp_path / "run" / "register" / "another")
    report.add_report(run)
    assert told == [path, path] and path.stat().st_mtime_ns > before


def test_a_run_that_stops_early_tells_of_later_results_that_are_of_the_same(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "run")
    run = kept_run(tmp_path / "run", quiet())
    run.root = run.tracker = type("Told", (), {"artifact": lambda self, path, folder=None: None})()  # type: ignore[assignment]
    report.add_report(run)
    path = tmp_path / "run" / "report.html"
    before = path.stat().st_mtime_ns
    run.records = {name: run.records[name] for name in ("ingest", "assess")}
    report.add_report(run)
    assert path.stat().st_mtime_ns == before  # all that came of these teachers still holds
    run.records["assess"] = Record(**(vars(run.records["assess"]) | {"digest": "other teachers"}))
    report.add_report(run)
    assert "mixed knows most of this task" in Page(path.read_text(encoding="utf-8")).by_id("verdict")


def test_a_page_that_can_not_be_written_ends_nothing(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no room [at] all")

    display = quiet()
    run = Run(
        settings=made.run.settings, files=made.run.files, display=display, zoo=made.run.zoo, records=made.run.records
    )
    monkeypatch.setattr(report, "write_page", broken)
    report.add_report(run)
    said = display.console.file.getvalue()  # type: ignore[attr-defined]
    assert said.strip() == "no report: RuntimeError: no room [at] all"


def test_results_that_belong_together_are_found(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "run")
    root = tmp_path / "run"
    stage = json.loads((root / "select" / "selectkey" / "stage.json").read_text())
    # Another choice was made later and nothing went on from it.
    shutil.copytree(root / "select" / "selectkey", root / "select" / "later")
    write_json(root / "select" / "later" / "stage.json", stage | {"key": "later", "digest": "x", "finished": 2e9})
    assert list(kept_run(root).records) == ["ingest", "assess", "select"]
    # Unless the last whole run had the former one.
    write_json(root / "recorded.json", {"select": "selectkey"})
    found = kept_run(root).records
    assert found["select"].key == "selectkey" and "register" in found
    (root / "evaluate" / "evaluatekey" / "stage.json").write_text("{")
    assert "evaluate" not in kept_run(root).records and "register" not in kept_run(root).records


def test_the_command_writes_the_page_again(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    display = quiet()
    assert report.report_run([made.config], out=out, display=display) == out
    assert Page(out.read_text(encoding="utf-8")).by_id("figure")
    said = display.console.file.getvalue()  # type: ignore[attr-defined]
    assert str(out) in said and "left out: Knowledge flow" in said
    with pytest.raises(UserError, match=r"is no run folder \(it has no run.json\)"):
        report.report_run([made.config], [f"run_dir={tmp_path / 'nothing'}"], display=display)
    with pytest.raises(UserError, match=r"--out .*: can't be written"):
        report.report_run([made.config], out=tmp_path / "no" / "folder" / "x" / ("y" * 300), display=display)


def test_runs_side_by_side(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "same")
    other = make_run(tmp_path / "other", seed=1, name="other", teachers=("mixed", "new", "solid"))
    out, display = tmp_path / "comparison.html", quiet()
    report.compare_runs([made.root, tmp_path / "same", other.root], out=out, display=display)
    found = Page(out.read_text(encoding="utf-8"))
    assert {"verdict", "settings", "size", "teachers", "classes", "training", "calibration", "cost"} <= set(found.ids())
    verdict = " ".join(found.by_id("verdict").split())
    assert "made (1) and made (2) and other" in verdict
    assert "+0.0 ± 0.0 points against made (1)" in verdict  # the very same student
    assert "they were tested on other images" in verdict
    rows = {cells[0][0]: cells[1:] for cells in found.rows("teacher-table")[1:]}
    assert rows["new"][0][0] == NOT_KNOWN and rows["new"][4][0] == "chosen 2"
    for name, (first, second, third, _) in {c[0][0]: c[1:] for c in found.rows("class-table")[1:]}.items():
        own = artefact(made.root, "evaluate", "evaluation.json")["arms"][0]["first"]["per_class"][name]
        assert float(first[1]) == float(second[1]) == own
        assert (
            float(third[1])
            == artefact(other.root, "evaluate", "evaluation.json")["arms"][0]["first"]["per_class"][name]
        )
    assert "None but the names" not in found.by_id("settings")  # the source is another
    with pytest.raises(UserError, match="takes two run folders or more, got 1"):
        report.compare_runs([made.root], display=display)


def test_a_pair_of_students_is_compared_on_the_same_images(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "worse")
    (path,) = (tmp_path / "worse" / "evaluate").glob("*/credits.safetensors")
    from safetensors.torch import save_file

    from pipeline.stages.report_pairs import pairs

    credits = load_file(path)
    before = credits["student"].double().mean(0)
    credits["student"] = credits["no_teacher"].clone()
    save_file(credits, path)
    (found,) = pairs([kept_run(made.root), kept_run(tmp_path / "worse")])
    gap = credits["no_teacher"].double().mean(0) - before
    assert found["difference"] == pytest.approx(float(gap.mean()))
    assert found["error"] == pytest.approx(2 * float(gap.std()) / len(gap) ** 0.5)
    assert found["images"] == len(before)
