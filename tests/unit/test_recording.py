"""What stages record, from artefacts to records."""

from __future__ import annotations

import json
import logging
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distillation.step import Head
from pipeline.engine.evaluation import evaluate, evaluate_heads
from pipeline.stages import recording
from pipeline.stages.artefacts import Record
from pipeline.stages.plans import ClassPlan, plan_rows
from pipeline.stages.recording import environment, git_tags, optional, summary
from pipeline.stages.recording_data import record_histograms, source_name
from pipeline.stages.recording_teachers import choice_rows, outcome, record_teacher, rung_metrics
from pipeline.stages.recording_trainings import class_rows, control_rows, epoch_metrics, numbers_of
from tests.recorder import Recorder


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_and_whether_it_was_changed_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "--quiet")
    (repository / "file").write_text("one")
    git(repository, "add", "file")
    git(repository, "commit", "--quiet", "-m", "first")
    commit = git(repository, "rev-parse", "HEAD")
    found = {"mlflow.source.git.commit": commit, "git.commit": commit}
    assert git_tags(repository) == found | {"git.dirty": "false"}
    (repository / "other").write_text("not tracked")
    assert git_tags(repository)["git.dirty"] == "false"
    (repository / "file").write_text("two")
    assert git_tags(repository) == found | {"git.dirty": "true"}
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "none").mkdir()
    assert git_tags(tmp_path / "none") == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_tags(repository) == {}


def test_the_environment_names_what_was_computed_with() -> None:
    found = environment()
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"].count(".") == 2 and found["processors"] >= 1
    assert json.loads(json.dumps(found)) == found


def test_what_can_not_be_recorded_is_warned_of_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), optional("the picture"):
        raise OSError("disk full: http://user:secret@host\nand more")
    assert "the picture could not be recorded: OSError: disk full: http://host" in caplog.text
    assert "secret" not in caplog.text and "and more" not in caplog.text
    with pytest.raises(KeyboardInterrupt), optional("the picture"):
        raise KeyboardInterrupt


def record(stage: str, **found: Any) -> Record:
    return Record(stage, "k", "d" * 20, {}, found, 1.5, 0.0)


ARM = {"title": "the faculty", "accuracies": [0.5, 0.7], "mean": 0.6, "std": 0.1414, "ece": 0.05}


def test_the_summary_begins_with_the_verdict_and_leaves_out_what_is_not_known() -> None:
    records = {
        "ingest": record("ingest", rows=10, classes=2),
        "assess": record("assess", teachers=7, dropped=1, failed=2),
        "distill": record("distill", parameters=12345, epochs=3, validation_accuracy=0.5),
    }
    control = ARM | {"title": "a | b", "accuracies": [0.4], "mean": 0.4, "difference": 0.2, "difference_2se": None}
    evaluation = {"verdict": "student 60.0 %: better", "arms": [ARM, control, control]}
    text = summary(records, {"chosen": ["x", "y"], "verdict": "two teachers"}, evaluation)
    assert text.startswith("**Student 60.0 %: better.**\n\n| student taught by")
    assert "| the faculty | 2 | 60.0 ± 14.1 | 0.050 |  |" in text
    assert text.count("| a / b | 1 | 40.0 | 0.050 | +20.0 |") == 2
    assert "Faculty: `x`, `y`. Two teachers." in text
    assert "Teachers: 7 in all, 1 dropped, 2 failed." in text
    assert "12,345 parameters, 3 epochs, validation accuracy 50.0 %" in text
    assert "ingest 1.5 s, assess 1.5 s, distill 1.5 s" in text
    assert summary(records, None, evaluation, arms=2).count("a / b") == 1
    early = summary({"ingest": records["ingest"]}, None, None, "StageError: no room")
    assert early.startswith("**Ended early: StageError: no room**")
    assert "Faculty" not in early and "Student" not in early
    assert summary({}, None, None) == ""


def test_a_run_without_git_or_package_has_a_version_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise recording.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(recording.importlib.metadata, "version", missing)
    assert recording.version() == "unknown"


def test_sources_are_named_by_path_or_by_their_published_name() -> None:
    @dataclass
    class Published:
        type: str = "torchvision"
        name: str = "CIFAR10"

    @dataclass
    class Local:
        type: str = "numpy"
        path: str = "/data/a.npz"

    assert source_name(Published()) == "torchvision://CIFAR10"
    assert source_name(Local()) == "/data/a.npz"


HISTOGRAMS = {
    "edges": [0.0, 0.5, 1.0],
    "ambiguity": {"a": [3, 1], "b": [0, 4]},
    "mean": {"a": 0.3, "b": 0.8},
    "classes": ["cat", "dog"],
    "taught": {"a": [2, 1], "b": [0, 1]},
    "surest": {"a": [1, 0], "b": [1, 2]},
}


def test_histograms_become_numbers_and_tables() -> None:
    tracker = Recorder("amalgamate")
    record_histograms(tracker, HISTOGRAMS)
    assert tracker.last("taught.a") == 0.75 and tracker.last("taught.b") == 0.25
    assert tracker.last("ambiguity.b") == 0.8 and tracker.last("surest.a") == 0.25
    assert tracker.tables["surest"] == [{"class": "cat", "a": 1, "b": 1}, {"class": "dog", "a": 0, "b": 2}]
    assert tracker.tables["choices"] == [{"class": "cat", "a": 2, "b": 0}, {"class": "dog", "a": 1, "b": 1}]
    assert {"teacher": "b", "from": 0.5, "to": 1.0, "images": 4} in tracker.tables["ambiguity"]
    assert len(tracker.tables["ambiguity"]) == 4
    several = Recorder("amalgamate")
    record_histograms(several, {"first": HISTOGRAMS, "second": HISTOGRAMS})
    assert several.last("second.taught.a") == 0.75
    assert several.tables["choices"][2] == {"subtask": "second", "class": "cat", "a": 2, "b": 0}


ROW = {name: None for name in ("dropped", "error", "precision", "forward_seconds", "peak_gpu_mb")}


def teacher_row(**changes: Any) -> dict[str, Any]:
    from pipeline.stages.assess import SCORES

    row = {name: None for name in SCORES} | ROW
    row |= {"teacher": "t", "fingerprint": "f" * 64, "classes": 5, "parameters": 10, "rung": 2, "images": 40}
    row |= {"score": 0.8, "score_low": 0.7, "score_high": 0.9, "knn": 0.5, "seconds": 3.0, "peak_mb": 100.0}
    return row | changes


RUNGS = json.dumps(
    [
        {"rung": 0, "score": 0.6, "images": 20, "seconds": 1.0, "classes": 5, "forward_seconds": 0.5},
        {"rung": 1, "score": 0.8, "images": 40, "seconds": 2.0, "classes": 5, "forward_seconds": 0.9},
    ]
)
ABOUT = {"licence": "MIT", "source": {"type": "timm", "name": "r", "path": "https://user:secret@host/x"}}


def test_a_teacher_is_a_run_with_its_scores_over_the_rungs() -> None:
    stage = Recorder("assess")
    record_teacher(stage, teacher_row(rungs=RUNGS, trial_id="trial_7"), ABOUT)
    (run,) = stage.children.values()
    assert run.name == "teacher t" and run.status == "FINISHED"
    assert run.points["score"] == {1: [0.6], 2: [0.8]}
    assert run.points["images"] == {1: [20], 2: [40]}
    assert run.points["rung_seconds"] == {1: [1.0], 2: [2.0]}
    assert run.points["seconds"] == {2: [3.0]} and run.points["score_low"] == {2: [0.7]}
    assert run.tags_["outcome"] == "assessed" and run.tags_["ray.trial_id"] == "trial_7"
    assert run.params_["source.type"] == "timm" and run.params_["source.path"] == "https://host/x"


def test_a_teacher_that_failed_is_a_failed_run_and_its_next_try_mends_it() -> None:
    stage = Recorder("assess")
    record_teacher(stage, teacher_row(error="no such file", score=None, rung=None), ABOUT)
    (run,) = stage.children.values()
    assert run.status == "FAILED" and run.tags_["outcome"] == "failed: no such file"
    assert "no such file" in run.tags_["faculty.error"]
    record_teacher(stage, teacher_row(), ABOUT)
    assert list(stage.children.values()) == [run] and run.status == "FINISHED"
    assert run.tags_["outcome"] == "assessed"
    assert outcome(teacher_row(dropped="too low")) == "dropped: too low"


def test_rungs_end_at_the_one_that_was_reached() -> None:
    assert rung_metrics(None, 2) == {}
    assert set(rung_metrics(RUNGS, 2)) == {1, 2}
    one = json.dumps([{"rung": 0, "score": 1.0, "seconds": 1.0}])
    assert rung_metrics(one, 2) == {2: {"score": 1.0, "rung_seconds": 1.0}}  # not climbed: all images at once
    assert set(rung_metrics(one, None)) == {1}


def test_the_choice_lists_the_chosen_ones_first_and_why() -> None:
    choice = {
        "chosen": ["b", "a"],
        "reasons": {"a": "2. choice", "b": "1. choice", "c": "over budget"},
        "verdicts": {"a": {"reason": "chosen", "score": 0.5, "gain": 0.1, "confidence": 0.9}},
        "shares": {"b": 0.6},
    }
    rows = choice_rows(choice)
    assert [(row["teacher"], row["place"]) for row in rows] == [("b", 1), ("a", 2), ("c", None)]
    assert rows[1] | {"why": "2. choice", "gain": 0.1, "share": None} == rows[1]
    assert rows[0]["share"] == 0.6


def test_a_plan_is_kept_as_its_largest_masses() -> None:
    mass = torch.tensor([[0.5, 0.0], [0.1, 0.395], [0.005, 0.0]])
    plan = ClassPlan(mass, ("x", "y", "z"), ("a", "b"))
    rows = plan_rows(plan)
    assert [(row["teacher class"], row["task class"]) for row in rows] == [("x", "a"), ("y", "b"), ("y", "a")]
    assert [row["mass"] for row in rows] == pytest.approx([0.5, 0.395, 0.1])
    assert len(plan_rows(plan, most=2)) == 2
    assert len(plan_rows(plan, share=1.0)) == 4  # nothing is not listed


def test_flow_weights_are_recorded_by_the_names_of_their_teachers() -> None:
    told = {"arm": 0, "epoch": 3, "loss": 1.0, "flow.s.1.student": 0.5, "flow.s.1.1": 0.25, "flow.s.1.7": 0.25}
    found = epoch_metrics(told, ("a", "b.c"))
    assert found == {"loss": 1.0, "flow.s.1.student": 0.5, "flow.s.1.b.c": 0.25, "flow.s.1.7": 0.25}
    assert "flow.s.1.1" in epoch_metrics(told)


def test_the_numbers_of_a_test_with_one_head_or_several() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 1, 2])
    numbers = numbers_of(evaluate(logits, labels))
    assert numbers["accuracy"] == pytest.approx(2 / 3) and numbers["samples"] == 3 and numbers["nll"] > 0
    heads = (Head("one", slice(0, 2), (0, 1, -1)), Head("two", slice(1, 3), (-1, 0, 1)))
    found = numbers_of(evaluate_heads(logits, labels, heads))
    assert found["accuracy.one"] == 1.0 and found["accuracy.two"] == 0.5 and found["accuracy"] == 0.75


def test_the_tables_of_an_evaluation() -> None:
    student = ARM | {"name": "student", "first": {"per_class": {"a": 1.0}}}
    control = ARM | {"name": "alone", "difference": 0.1, "difference_2se": 0.05, "first": {"per_class": {"b": 0.5}}}
    assert class_rows([student, control], ["a", "b"]) == [
        {"class": "a", "student": 1.0, "alone": None},
        {"class": "b", "student": None, "alone": 0.5},
    ]
    rows = control_rows([student, control])
    assert rows[0]["seeds"] == 2 and rows[0]["difference"] is None and rows[1]["difference_2se"] == 0.05
