"""The calls build the settings that files and overrides would, and refuse what these refuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import pipeline as faculty
from pipeline.config import Settings
from pipeline.face.results import Assessment, Faculty
from pipeline.face.student import Student
from pipeline.settings_files import load_settings
from tests.tiny import write_zoo

README = Path(__file__).parents[2] / "README.md"
ENTRY = {
    "name": "mine",
    "source": {"type": "safetensors", "path": "mine.safetensors", "factory": "pipeline.models.nets:small_cnn"},
    "classes": ["a", "b"],
    "preprocessing": {"channels": 3, "mean": [0.5], "std": [0.5]},
}


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, str]]:
    """Note what the pipeline would run, and with what settings."""
    calls: list[tuple[Settings, str]] = []

    def note(settings: Settings, *, until: str, verbose: bool, display: object) -> dict:
        calls.append((settings, until))
        return {}

    monkeypatch.setattr("pipeline.stages.run.run_pipeline", note)
    monkeypatch.chdir(tmp_path)
    write_zoo(tmp_path / "zoo.yaml", [ENTRY])
    (tmp_path / "birds").mkdir()
    return calls


def from_file(folder: Path, *overrides: str, **changes: object) -> Settings:
    settings = {
        "name": "birds",
        "run_dir": str(folder / "runs" / "birds"),
        "task": {"source": {"type": "image_folder", "path": "birds"}, "image": {"size": 32}, "splits": {"probe": 5}},
        "zoo": {"path": "zoo.yaml"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
    return load_settings([folder / "run.yaml"], overrides)


def test_each_call_runs_up_to_its_stage_with_the_settings_of_a_file(ran, tmp_path: Path) -> None:
    found = faculty.assess(faculty.load_zoo("zoo.yaml"), faculty.load_task("birds", probe=5))
    chosen = faculty.select(found, max_teachers=2, min_gain=0.02, teachers=["mine"])
    student = faculty.distill(
        chosen,
        student={"name": "mlp", "kwargs": {"width": 8}},
        epochs=3,
        batch_size=16,
        lr=1e-3,
        workers=0,
        gpus=0.5,
        seeds=2,
        controls=["no_teacher", "ensemble"],
        settings={"distill.augment.flip": True, "distill.objective.own": {"my_losses:Order": {"weight": 0.5}}},
    )
    faculty.register(student, name="birds", uri="sqlite:///m.db", alias="new", gate=False, promote=True)
    assert [until for _, until in ran] == ["assess", "select", "evaluate", "register"]
    chosen_by = ("select.max_teachers=2", "select.min_gain=0.02", "select.teachers=[mine]")
    taught_by = (
        "distill.student={name: mlp, kwargs: {width: 8}}",
        "distill.loop={epochs: 3, batch_size: 16, optim: {lr: 1e-3}}",
        "distill.resources={num_workers: 0, gpus_per_worker: 0.5}",
        "evaluate={seeds: 2, controls: [no_teacher, ensemble]}",
        "distill.augment.flip=true",
        'distill.objective.own={"my_losses:Order": {weight: 0.5}}',
    )
    registered_by = (
        "register={name: birds, alias: new, gate: false, promote: true}",
        "tracking.uri=sqlite:///m.db",
    )
    expected = [
        from_file(tmp_path),
        from_file(tmp_path, *chosen_by),
        from_file(tmp_path, *chosen_by, *taught_by),
        from_file(tmp_path, *chosen_by, *taught_by, *registered_by),
    ]
    assert [settings for settings, _ in ran] == expected


def test_the_arguments_of_assess(ran, tmp_path: Path) -> None:
    more = "distill: {loop: {epochs: 7}}\nassess: {names: {path: w.txt}}\n"
    (tmp_path / "more.yaml").write_text(more, encoding="utf-8")
    faculty.assess(
        "zoo.yaml",
        "birds",
        name="n",
        run_dir="elsewhere",
        seed=3,
        scores=["logme"],
        tracking=False,
        cluster={"num_cpus": 2},
        settings=["more.yaml", {"distill.loop.epochs": 8, "assess.own": {"my_scores:separation": {"power": 2.0}}}],
    )
    settings = ran[0][0]
    assert (settings.name, settings.seed, settings.run_dir) == ("n", 3, str(tmp_path / "elsewhere"))
    assert settings.assess.scores == ("logme",) and settings.assess.names.path == str(tmp_path / "w.txt")
    assert settings.assess.own == {"my_scores:separation": {"power": 2.0}}
    assert not settings.tracking.enabled and settings.cluster.num_cpus == 2 and settings.distill.loop.epochs == 8
    faculty.assess("zoo.yaml", "birds", tracking="http://mlflow:5000", cluster="auto", run_dir="s3://bucket/run")
    settings = ran[1][0]
    assert (settings.tracking.uri, settings.cluster.address) == ("http://mlflow:5000", "auto")
    assert settings.run_dir == "s3://bucket/run"


def test_another_student_leaves_nothing_of_the_former(ran, tmp_path: Path) -> None:
    settings = from_file(tmp_path, distill={"student": {"name": "small_cnn", "kwargs": {"width": 8}}})
    chosen = Faculty(settings, {}, Assessment(settings, {}))
    assert faculty.distill(chosen, student="resnet8").settings.distill.student.kwargs == {}
    assert faculty.distill(chosen).settings.distill.student.kwargs == {"width": 8}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda found: faculty.select(found, settings={"select.max_teacher": 1}), "did you mean `max_teachers`"),
        (lambda found: faculty.select(found, max_teachers=0), "`select.max_teachers` is 0"),
        (lambda found: faculty.select(found, settings="none.yaml"), "none.yaml: can't be read"),
        (lambda found: faculty.select(found, settings=[3]), "takes a mapping or the path of a YAML file, got int"),
        (lambda found: faculty.distill(found), "distill: takes what select returned, got Assessment"),
        (lambda found: faculty.register(found), "register: takes what distill returned, got Assessment"),
        (lambda found: faculty.select("zoo.yaml"), "select: takes what assess returned, got str"),
        (lambda found: faculty.assess("zoo.yaml", "birds", name="a b"), "`name` is 'a b'"),
        (lambda found: faculty.assess("zoo.yaml", "birds", cluster={"cpus": 2}), "`cluster.cpus` is not a setting"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_before_anything_runs(ran, tmp_path: Path, call, message: str) -> None:
    found = Assessment(from_file(tmp_path), {})
    with pytest.raises(faculty.FacultyError, match=message) as caught:
        call(found)
    assert "\n" not in str(caught.value)
    assert not ran


def test_no_credential_stands_in_an_error(ran, tmp_path: Path) -> None:
    student = Student(from_file(tmp_path), {})
    with pytest.raises(faculty.FacultyError) as caught:
        faculty.register(student, uri="http://ann:secret@mlflow:5000", settings={"tracking.uri": 3})
    with pytest.raises(faculty.FacultyError) as other:
        faculty.register(student, settings={"tracking": {"url": "http://ann:secret@mlflow:5000"}})
    for error in (caught.value, other.value):
        assert "secret" not in str(error)
        assert error.__cause__ is None


def test_notebooks_show_the_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    error = faculty.FacultyError("mend it")
    monkeypatch.delenv("FACULTY_VERBOSE", raising=False)
    assert error._render_traceback_() == ["FacultyError: mend it"]
    monkeypatch.setenv("FACULTY_VERBOSE", "1")
    with pytest.raises(NotImplementedError):
        error._render_traceback_()


def test_the_readme_s_calls_are_calls(ran, tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(import pipeline as faculty\n.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    (tmp_path / "data" / "birds").mkdir(parents=True)
    exec(compile(block, "README.md", "exec"), {})
    assert [until for _, until in ran] == ["assess", "select", "evaluate", "register"]
    assert ran[-1][0].task.image.size == 64 and ran[-1][0].distill.student.name == "resnet8"
