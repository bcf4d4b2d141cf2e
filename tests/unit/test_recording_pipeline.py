"""What a whole run records, and that an interrupted one goes on without a gap and without a step twice.

The pipeline is the real one, in this process: tasks and trials that would go to Ray are called one after the other.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from pipeline.cluster.spec import ClusterSpec
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.stages import recording_trainings
from pipeline.stages.artefacts import digest_of_file
from pipeline.stages.base import Run
from pipeline.stages.plans import transport_plan
from pipeline.stages.probe import labelled_features
from pipeline.stages.recording_trainings import TrainingRuns
from pipeline.stages.run import run_pipeline
from pipeline.stages.teachers import table_of
from pipeline.tracking.tracker import Tracker
from tests.inprocess import without_ray
from tests.recorder import Recorder
from tests.tiny import SHAPES, make_data, make_settings, make_zoo, write_zoo

EPOCHS = 3
SEARCH = {"search": {"rungs": [0.5, 1], "eta": 2, "least": 2}}


@contextlib.contextmanager
def here(store: Recorder) -> Iterator[None]:
    """Let the pipeline run in this process and record in `store`."""
    with without_ray() as patch:

        def open_tracker(*arguments: Any, key: str, name: str, tags: Any, params: Any, **how: Any) -> Any:
            return store.run(name, key=key, tags=tags, params=params)

        patch.setattr("pipeline.tracking.connect.open_tracker", open_tracker)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On nets this small threads wait for each other more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_data(folder, per_class=60)
    zoo = make_zoo(folder)
    import yaml

    entries = yaml.safe_load(zoo.read_text(encoding="utf-8"))["teachers"]
    lost = {"name": "lost", "source": entries[0]["source"] | {"path": "teachers/lost.safetensors"}}
    write_zoo(zoo, [*entries, entries[0] | lost])
    make_settings(
        folder,
        assess=SEARCH,
        register={"enabled": False},
        evaluate={"seeds": 2, "controls": ["no_teacher", "ensemble"]},
        distill={
            "student": {"name": "small_cnn", "kwargs": {"width": 8}},
            "loop": {"epochs": EPOCHS, "batch_size": 32, "labelled_batch": 16},
            "resources": {"num_workers": 0},
        },
    )
    return folder


def faculty(world: Path, store: Recorder, *overrides: str, until: str = "register") -> dict[str, Any]:
    settings = load_settings([world / "run.yaml"], ["select.teachers=[mixed, flat]", *overrides])
    with here(store):
        return run_pipeline(settings, until=until, display=Display(Console(file=io.StringIO(), width=200)))


@pytest.fixture(scope="module")
def finished(world: Path) -> tuple[Path, Recorder, dict[str, Any]]:
    store = Recorder("store")
    records = faculty(world, store)
    (root,) = store.children.values()
    return world / "run", root, records


def once_more(finished: tuple[Path, Recorder, dict[str, Any]], folder: Path, *gone: str) -> str:
    """Copy the finished run without what the patterns match; return the setting that makes it the run folder."""
    shutil.copytree(finished[0], folder / "run")
    (folder / "run" / "recorded.json").unlink()
    for path in (found for pattern in gone for found in (folder / "run").glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"run_dir={folder / 'run'}"


def stage_of(root: Recorder, name: str) -> Recorder:
    (found,) = [run for run in root.children.values() if run.name == name]
    return found


def assert_picture(content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_the_whole_run_says_where_it_comes_from_and_what_came_out(finished) -> None:
    folder, root, records = finished
    assert root.status == "FINISHED" and root.name == "tiny"
    assert root.tags_["run_dir"] == str(folder) and len(root.tags_["settings.hash"]) == 16
    assert root.tags_["faculty.version"] and root.tags_["data.fingerprint"] == records["ingest"].digest
    assert root.params_["distill.loop.epochs"] == str(EPOCHS) and root.params_["task.source.type"] == "numpy"
    assert root.documents["environment"]["packages"]["torch"]
    assert {"settings.yaml", "requirements.lock", "summary.md"} <= set(root.files)
    note = root.tags_["mlflow.note.content"]
    assert note.startswith("**Student ") and "Faculty: `mixed`, `flat`" in note.replace(
        "`flat`, `mixed`", "`mixed`, `flat`"
    )
    assert note in root.files["summary.md"].decode()
    assert root.last("evaluate.accuracy.student") == records["evaluate"].summary["accuracy.student"]
    assert root.last("evaluate.difference.no_teacher") == records["evaluate"].summary["difference.no_teacher"]
    assert {f"{stage}.seconds" for stage in records} <= set(root.points)
    assert root.tags_["verdict"] == records["evaluate"].summary["verdict"]
    assert [run.name for run in root.children.values()] == list(records)
    assert all(run.status == "FINISHED" for run in root.children.values())


def test_data_sets_are_inputs_of_the_run_and_of_the_stages_that_use_them(finished) -> None:
    _, root, _ = finished
    by_name = {one["name"]: one for one in root.datasets}
    assert set(by_name) == {
        f"tiny.{split}" for split in ("train_labelled", "train_unlabelled", "probe", "validation", "test")
    }
    assert by_name["tiny.probe"]["profile"]["classes"] == dict.fromkeys(SHAPES, 8)
    assert by_name["tiny.train_unlabelled"]["context"] == "training"
    assert len({one["digest"] for one in root.datasets}) == 5
    assert by_name["tiny.test"]["source"].endswith("shapes.npz")
    assert stage_of(root, "ingest").datasets == root.datasets
    assert [one["name"] for one in stage_of(root, "assess").datasets] == ["tiny.probe"]
    assert {one["context"] for one in stage_of(root, "distill").datasets} == {"training", "validation"}
    assert [one["name"] for one in stage_of(root, "evaluate").datasets] == ["tiny.test"]
    assert {"class": "bar", "train_labelled": 4, "probe": 8}.items() <= stage_of(root, "ingest").tables["classes"][
        0
    ].items()


def test_every_teacher_has_a_run_with_the_history_of_its_rungs(finished) -> None:
    _, root, _ = finished
    stage = stage_of(root, "assess")
    runs = {run.tags_["teacher"]: run for run in stage.children.values()}
    assert set(runs) == {"flat", "solid", "mixed", "untrained", "blind", "lost"}
    assert runs["lost"].status == "FAILED" and runs["lost"].tags_["outcome"].startswith("failed: ")
    table = {row["teacher"]: row for row in stage.tables["assessment"]}
    climbed = 0
    for name, run in runs.items():
        if name == "lost":
            continue
        row = table[name]
        last = row["rung"]
        assert run.status == "FINISHED" and run.last("score") == row["score"] and run.last("knn") == row["knn"]
        assert sorted(run.points["score"]) == list(range(1, last + 1)) == sorted(run.points["rung_seconds"])
        assert run.last("images") == row["images"] and run.last("score_low") <= row["score"] <= run.last("score_high")
        assert run.tags_["ray.trial_id"].startswith("trial_")
        assert run.tags_["outcome"].startswith("dropped: ") == (last == 1)
        climbed += last == 2
        assert ("plan.png" in run.files) == (last == 2) == ("plan" in run.tables)
        if last == 2:
            assert run.points["images"][1][0] < run.points["images"][2][0]
            assert_picture(run.files["plan.png"])
            assert sum(row["mass"] for row in run.tables["plan"]) > 0.9
    assert 2 <= climbed < 5
    assert_picture(stage.files["scores.png"])
    assert "rungs" not in stage.tables["assessment"][0]


def test_the_plan_is_what_the_teacher_says_of_each_class(finished, world: Path) -> None:
    folder, _, records = finished
    settings = load_settings([world / "run.yaml"], [])
    from pipeline.models.zoo import load_zoo
    from pipeline.stages.artefacts import RunFolder

    run = Run(settings=settings, files=RunFolder(folder), display=Display(), zoo=load_zoo(settings.zoo.path))
    run.records |= records
    plan = transport_plan(run, "mixed")
    assert plan.sources == ("post", "block", "slash") and plan.targets == SHAPES
    table = table_of(run)
    seen = [table.split("train_labelled"), table.split("probe")]
    from pipeline.models.sources import load_teacher
    from pipeline.models.teacher import predict

    p = predict(load_teacher(run.zoo["mixed"]), [split.images() for split in seen]).logits.softmax(1)
    y = torch.cat([split.labels for split in seen])
    expected = torch.stack([p[y == label].sum(0) for label in range(4)], 1) / len(y)
    torch.testing.assert_close(plan.mass, expected, atol=2e-3, rtol=0)
    assert float(plan.mass.sum()) == pytest.approx(1)
    # It knows three of the four shapes, and says of each what it is.
    assert plan.mass[:, 1:].argmax(0).tolist() == [0, 1, 2]
    assert labelled_features(run, "mixed").shape[0] > len(y)


def test_the_choice_and_who_teaches_what(finished) -> None:
    _, root, _ = finished
    select = stage_of(root, "select")
    assert set(select.tags_["chosen"].split(", ")) == {"mixed", "flat"}
    assert [row["place"] for row in select.tables["choice"]][:3] == [1, 2, None]
    assert all(row["why"] for row in select.tables["choice"])
    assert {"plans/mixed.png", "plans/flat.png", "scores.png", "faculty.json"} <= set(select.files)
    stage = stage_of(root, "amalgamate")
    assert [row["class"] for row in stage.tables["choices"]] == list(SHAPES)
    taught = [value for name, points in stage.points.items() if name.startswith("taught.") for value in points[0]]
    assert sum(taught) == pytest.approx(1)
    assert 0 <= stage.last("ambiguity.mixed") <= 1
    assert stage.last("surest.mixed") + stage.last("surest.flat") == pytest.approx(1)
    assert sum(row["mixed"] + row["flat"] for row in stage.tables["surest"]) == sum(
        row["mixed"] + row["flat"] + row["(together)"] for row in stage.tables["choices"]
    )
    assert_picture(stage.files["histograms.png"])


def test_the_student_has_its_epochs_in_the_stage_and_its_checkpoints_their_hashes(finished) -> None:
    folder, root, records = finished
    stage = stage_of(root, "distill")
    assert stage.steps("loss") == [1, 2, 3] and {"cross_entropy", "transport", "kd", "lr"} <= set(stage.points)
    assert {"history.json", "student.json", "curves.png", "guard.json"} <= set(stage.files)
    assert_picture(stage.files["curves.png"])
    home = folder / "distill" / records["distill"].key
    rows = {row["file"]: row for row in stage.documents["checkpoints"]}
    for name in ("model.safetensors", "history.json"):
        assert rows[name]["sha256"] == digest_of_file(home / name) and rows[name]["epoch"] == EPOCHS
    states = [row for row in stage.documents["checkpoints"] if row["file"] == "state.pt"]
    assert {row["epoch"] for row in states} >= {1, 2} and all(len(row["sha256"]) == 64 for row in states)
    assert stage.tags_["kept"] in ("faculty-seed0", "no_teacher-seed0")
    (guard,) = stage.children.values()
    assert guard.name == "no_teacher-seed0" and guard.steps("loss") == [1, 2, 3] and guard.status == "FINISHED"


def test_every_arm_of_the_evaluation_is_a_run_with_epochs_and_test(finished) -> None:
    folder, root, records = finished
    stage = stage_of(root, "evaluate")
    found = json.loads((folder / "evaluate" / records["evaluate"].key / "evaluation.json").read_text())
    runs = {run.name: run for run in stage.children.values()}
    kinds = {"faculty-seed0", "faculty-seed1", "no_teacher-seed0", "no_teacher-seed1"}
    assert set(runs) == kinds | {"ensemble"}
    for name in kinds:
        run = runs[name]
        assert run.steps("loss") == [1, 2, 3] and run.status == "FINISHED", name
        assert run.params_["loop.epochs"] == str(EPOCHS) and run.params_["seed"] in ("0", "1")
        assert 0 <= run.last("test.accuracy") <= 1 and run.last("test.samples") == 80
        assert run.tags_["contender"] in ("student", "no_teacher", "taught") and run.documents["checkpoints"]
    assert "objective.transport.weight" in runs["faculty-seed1"].params_
    assert "objective.transport.weight" not in runs["no_teacher-seed1"].params_
    accuracies = [value for arm in found["arms"] for value in arm["accuracies"]]
    assert sorted(run.last("test.accuracy") for run in runs.values()) == sorted(accuracies)
    assert len(stage.tables["controls"]) == len(found["arms"])
    assert [row["class"] for row in stage.tables["classes"]] == list(SHAPES)
    for name in ("accuracies.png", "confusion.png"):
        assert_picture(stage.files[name])


def test_nothing_is_recorded_of_a_run_that_has_nothing_new(finished, world: Path) -> None:
    store = Recorder("store")
    faculty(world, store)
    assert store.calls == 0
    faculty(world, store, until="select")
    assert store.calls == 0


def points_of(run: Recorder) -> dict[str, list[int]]:
    """The steps of every metric of a run and its children; ordered, one for each record."""
    found = {name: run.steps(name) for name in run.points}
    return found | {
        f"{child.name}/{name}": steps for child in run.children.values() for name, steps in points_of(child).items()
    }


class _Killed(BaseException):
    """Stands for SIGKILL: nothing is recorded after it."""


@pytest.mark.parametrize("epochs", [2, 5, 9])
def test_a_killed_run_goes_on_in_the_same_runs_without_gap_or_step_twice(
    finished, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """Killed in the second epoch of the student, of its guard, and of a control: trained, and not recorded."""
    _, whole, _ = finished
    store, seen = Recorder("store"), {"epochs": 0}
    report, folder = TrainingRuns.report, once_more(finished, tmp_path, "distill", "evaluate", "students", "ray")

    def dying(self: TrainingRuns, arm: Any, metrics: dict[str, Any]) -> None:
        seen["epochs"] += "epoch" in metrics
        if seen["epochs"] == epochs:
            store.dead = True
            raise _Killed
        report(self, arm, metrics)

    monkeypatch.setattr(TrainingRuns, "report", dying)
    with pytest.raises(_Killed):
        faculty(world, store, folder)
    monkeypatch.setattr(TrainingRuns, "report", report)
    (root,) = store.children.values()
    assert root.status == "RUNNING" and "RUNNING" in {run.status for run in root.children.values()}
    store.dead = False
    faculty(world, store, folder)
    assert list(store.children.values()) == [root] and root.status == "FINISHED"
    for name in ("distill", "evaluate"):
        found, expected = stage_of(root, name), stage_of(whole, name)
        assert found.status == "FINISHED"
        assert {run.name: run.status for run in found.children.values()} == {
            run.name: run.status for run in expected.children.values()
        }
        assert points_of(found) == points_of(expected)


def test_epochs_that_restarted_workers_report_again_are_recorded_once(tmp_path: Path) -> None:
    from pipeline.engine.spec import Arm

    stage = Recorder("evaluate")
    run: Any = type("Run", (), {"tracker": stage, "root": stage})()
    arms = [Arm(f"kind-seed{n}-key", n, str(tmp_path / str(n)), None) for n in range(3)]
    told = {epoch: {"epoch": epoch, "loss": 1 / epoch, "arm": 0} for epoch in (1, 2, 3)}
    for arm in arms[1:]:
        Path(arm.folder).mkdir()
        (Path(arm.folder) / "history.json").write_text(json.dumps(list(told.values())))
    (Path(arms[1].folder) / "done.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt), TrainingRuns(run, arms, loop={}) as runs:
        for epoch in (1, 2, 1, 2, 3):
            runs.report(arms[0], told[epoch])
        runs.report(arms[0], {"step": 7})
        raise KeyboardInterrupt
    first = stage.children["training-kind-seed0-key"]
    assert first.steps("loss") == [1, 2, 3] and first.status == "KILLED"
    assert list(stage.children) == ["training-kind-seed0-key"]  # what was not begun has no run
    with TrainingRuns(run, arms[1:2], loop={}) as runs:
        runs.report(arms[1], told[2])
    second = stage.children["training-kind-seed1-key"]
    assert second.steps("loss") == [1, 2, 3] and second.status == "FINISHED"


def test_a_picture_that_can_not_be_drawn_ends_nothing(
    finished, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **how: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("pipeline.report.plots._write", broken)
    monkeypatch.setattr(recording_trainings, "arm_params", broken)
    store = Recorder("store")
    records = faculty(world, store, once_more(finished, tmp_path, "*/*/stage.json", "teachers/*/plan.png"))
    assert "evaluate" in records
    for what in ("plan of mixed", "assessment", "picture of the choice", "who teaches what", "student", "evaluation"):
        assert f"{what} could not be recorded: RuntimeError: no font" in caplog.text, what
    (root,) = store.children.values()
    assert root.status == "FINISHED"


def test_what_was_computed_before_is_recorded_in_full(finished, world: Path, tmp_path: Path) -> None:
    """Stages that find all their work done, as after a change of settings that matters to them alone."""
    _, whole, _ = finished
    store = Recorder("store")
    faculty(world, store, once_more(finished, tmp_path, "*/*/stage.json"))
    (root,) = store.children.values()
    for name in ("assess", "distill", "evaluate"):
        assert points_of(stage_of(root, name)).keys() == points_of(stage_of(whole, name)).keys()
        for metric, steps in points_of(stage_of(whole, name)).items():
            assert points_of(stage_of(root, name))[metric] == steps, metric


def test_a_stage_that_fails_is_told_in_the_description(
    finished, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.errors import StageError
    from pipeline.stages.amalgamate import Amalgamate

    def broken(*arguments: Any) -> None:
        raise StageError("amalgamate: no room on the disk")

    monkeypatch.setattr(Amalgamate, "run", broken)
    store = Recorder("store")
    with pytest.raises(StageError):
        faculty(world, store, once_more(finished, tmp_path, "*/*/stage.json"))
    (root,) = store.children.values()
    assert root.status == "FAILED" and stage_of(root, "amalgamate").status == "FAILED"
    assert root.tags_["mlflow.note.content"].startswith("**Ended early: StageError: amalgamate: no room on the disk**")
    assert stage_of(root, "select").status == "FINISHED"


def test_teachers_of_a_cut_off_assessment_are_recorded_once(
    finished, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages.recording_teachers import TeacherRuns

    store, seen = Recorder("store"), []
    record = TeacherRuns.record

    def dying(self: TeacherRuns, row: dict[str, Any]) -> None:
        if len(seen) == 2:  # its row is kept, its run is not
            store.dead = True
            raise _Killed
        seen.append(row["teacher"])
        record(self, row)

    folder = once_more(finished, tmp_path, "assess", "select", "teachers/*/row.json")
    overrides = folder, "assess.search.rungs=[1]"
    monkeypatch.setattr(TeacherRuns, "record", dying)
    with pytest.raises(_Killed):
        faculty(world, store, *overrides, until="assess")
    monkeypatch.setattr(TeacherRuns, "record", record)
    store.dead = False
    faculty(world, store, *overrides, until="assess")
    (root,) = store.children.values()
    stage = stage_of(root, "assess")
    assert {run.tags_["teacher"] for run in stage.children.values()} == {
        "flat",
        "solid",
        "mixed",
        "untrained",
        "blind",
        "lost",
    }
    for run in stage.children.values():
        assert all(len(values) == 1 for points in run.points.values() for values in points.values()), run.name
        assert run.status == ("FAILED" if run.tags_["teacher"] == "lost" else "FINISHED")


def test_of_a_thousand_teachers_the_best_are_drawn_and_former_ones_looked_up_once(
    finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages import plans
    from pipeline.stages.recording_teachers import TeacherRuns

    stage, drawn = Recorder("assess"), []
    spec = type("Spec", (), {"licence": "MIT", "source": ClusterSpec()})()
    zoo = type("Zoo", (), {"__getitem__": lambda self, name: spec})()
    run: Any = type("Run", (), {"tracker": stage, "root": stage, "zoo": zoo})()
    (row, *_) = stage_of(finished[1], "assess").tables["assessment"]
    rows = [row | {"teacher": f"t{number:04d}"} for number in range(1000)]
    picture = tmp_path / "plan.png"
    picture.write_bytes(b"")
    monkeypatch.setattr(plans, "transport_plan", lambda run, name: drawn.append(name))
    monkeypatch.setattr(plans, "draw_plan", lambda run, row, plan: picture)
    monkeypatch.setattr(plans, "plan_rows", lambda plan: [])
    for _ in range(2):
        runs = TeacherRuns(run, tmp_path)
        for one in rows[-5:]:
            if len(stage.children) < 5:
                runs.record(one)
        runs.record_others(rows)
        runs.record_plans(rows)
    assert [name for name in drawn if drawn.count(name) > 1] == [] and len(drawn) == 20
    assert set(stage.children) == {
        f"assess-{one['teacher']}-{row['fingerprint'][:12]}" for one in rows[:200] + rows[-5:]
    }


def test_the_recorder_is_a_tracker() -> None:
    assert isinstance(Recorder("any"), Tracker)
