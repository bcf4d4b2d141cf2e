"""The whole pipeline with real Ray, real DDP on two workers and real MLflow, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tests.tiny import SHAPES, SIDE, make_data, make_settings, make_zoo, write_zoo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def faculty(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_data(folder)
    zoo = make_zoo(folder)
    entries = yaml.safe_load(zoo.read_text())["teachers"]
    entries.append({**entries[0], "name": "broken", "classes": ["a", "b", "c"]})
    entries.append(
        {**entries[0], "name": "lost", "source": {**entries[0]["source"], "path": "teachers/lost.safetensors"}}
    )
    write_zoo(zoo, entries)
    make_settings(
        folder,
        evaluate={"seeds": 2, "controls": ["no_teacher"]},
        distill={
            "student": {"name": "small_cnn", "kwargs": {"width": 8}},
            "loop": {"epochs": 10, "batch_size": 32, "labelled_batch": 16},
            "augment": {"shift": 1},
            "resources": {"num_workers": 2},
        },
    )
    return folder


@pytest.fixture(scope="module")
def finished(world: Path) -> subprocess.CompletedProcess[str]:
    result = faculty("run", "-c", world / "run.yaml")
    assert result.returncode == 0, result.stderr + result.stdout
    return result


def artefact(world: Path, stage: str, name: str) -> Path:
    """Return what the first run left; later tests run the world with other settings, too."""
    return min((world / "run" / stage).glob(f"*/{name}"), key=lambda path: path.stat().st_mtime_ns)


def test_the_output_is_ours_alone(finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.stderr == ""
    for word in ("ray", "Trial", "INFO", "WARNING", "alembic"):
        assert word not in finished.stdout.replace("/ray", ""), word
    for word in ("ingest", "assess", "select", "distill", "evaluate", "register", "k-NN", "models:/"):
        assert word in finished.stdout


def test_every_teacher_has_a_row_and_the_broken_one_its_error(world: Path, finished) -> None:
    rows = {row["teacher"]: row for row in pq.read_table(artefact(world, "assess", "assessment.parquet")).to_pylist()}
    assert set(rows) == {"flat", "solid", "mixed", "untrained", "blind", "broken", "lost"}
    assert "`classes` names 3" in rows["broken"]["error"]
    assert "lost.safetensors does not exist" in rows["lost"]["error"]
    for name in ("flat", "solid", "mixed", "untrained", "blind"):
        row = rows[name]
        assert row["error"] is None
        assert 0 <= row["transport_cost"] <= 1
        assert 0 <= row["knn"] <= 1
        assert row["seconds"] > 0
        assert row["peak_mb"] > 0
    assert rows["mixed"]["bridge_gain"] > rows["untrained"]["bridge_gain"] > rows["blind"]["bridge_gain"] == 0


def test_the_choice_gives_a_reason_for_every_teacher(world: Path, finished) -> None:
    choice = json.loads(artefact(world, "select", "faculty.json").read_text())
    assert set(choice["reasons"]) == {"flat", "solid", "mixed", "untrained", "blind", "broken", "lost"}
    assert choice["chosen"]
    assert "broken" not in choice["chosen"]


def test_the_student_is_tested_beside_no_teacher(world: Path, finished) -> None:
    found = json.loads(artefact(world, "evaluate", "evaluation.json").read_text())
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert set(arms) == {"student", "no_teacher"}
    for arm in arms.values():
        assert len(arm["accuracies"]) == 2
        assert arm["first"]["samples"] == 80
        assert set(arm["first"]["per_class"]) == set(SHAPES)
        assert 0 <= arm["ece"] <= 1
    confusion = np.array(arms["student"]["first"]["confusion"])
    assert confusion.sum() == 80
    assert np.trace(confusion) / 80 == pytest.approx(arms["student"]["accuracies"][0])


def test_the_registered_student_loads_elsewhere_without_pickle(world: Path, finished) -> None:
    registered = json.loads(artefact(world, "register", "registered.json").read_text())
    code = f"""
import json, sys
import mlflow, numpy as np
mlflow.set_tracking_uri("sqlite:///{world}/run/mlflow.db")
model = mlflow.pyfunc.load_model("{registered["uri"]}")
images = np.load("{world}/shapes.npz")["images"][:, None]
for size in (1, 3, 50):
    assert model.predict(images[:size]).shape == (size, 4), size
assert model.metadata.signature is not None
assert model.metadata.metadata["classes"] == {list(SHAPES)!r}
assert "pipeline" not in sys.modules
print(json.dumps(np.asarray(model.predict(images[:50])).tolist()))
"""
    environment = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=world,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    import torch

    from pipeline.models.student import load_student

    student = load_student(artefact(world, "distill", "student.json").parent).eval()
    images = torch.from_numpy(np.load(world / "shapes.npz")["images"][:50, None])
    assert images.shape[1:] == (1, SIDE, SIDE)
    with torch.no_grad():
        expected = student(images)
    torch.testing.assert_close(torch.tensor(json.loads(result.stdout.splitlines()[-1])), expected, atol=1e-4, rtol=1e-4)


def test_mlflow_holds_one_parent_with_stages_and_teachers(world: Path, finished) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{world}/run/mlflow.db")
    experiment = client.get_experiment_by_name("faculty")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    names = sorted(run.info.run_name for run in runs)
    assert names.count("tiny") == 1
    assert {"assess", "select", "distill", "evaluate", "register"} <= set(names)
    teachers = [run for run in runs if run.info.run_name.startswith("teacher ")]
    assert len(teachers) == 7
    assert {run.data.metrics.get("knn") is not None for run in teachers} == {True, False}
    parents = {run.data.tags["mlflow.parentRunId"] for run in teachers}
    assert parents == {next(run.info.run_id for run in runs if run.info.run_name == "assess")}
    assert not (Path.cwd() / "mlruns").exists()


def test_mlflow_tells_what_a_user_looks_for(world: Path, finished) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{world}/run/mlflow.db")
    experiment = client.get_experiment_by_name("faculty")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    children: dict[str | None, list] = {}
    for run in runs:
        children.setdefault(run.data.tags.get("mlflow.parentRunId"), []).append(run)

    def files(run) -> set[str]:
        return {item.path for item in client.list_artifacts(run.info.run_id)}

    def series(run, name: str) -> list[int]:
        return [point.step for point in client.get_metric_history(run.info.run_id, name)]

    (root,) = children[None]
    tags = root.data.tags
    assert tags["mlflow.note.content"].startswith("**") and "| student taught by |" in tags["mlflow.note.content"]
    assert {"settings.hash", "faculty.version", "run_dir", "ray.job_id", "ray.cpus", "data.fingerprint"} <= set(tags)
    assert root.data.params["distill.loop.epochs"] == "10" and root.data.params["task.image.channels"] == "1"
    assert {"settings.yaml", "environment.json", "requirements.lock", "summary.md"} <= files(root)
    inputs = {one.dataset.name: one for one in root.inputs.dataset_inputs}
    assert set(inputs) == {
        f"tiny.{name}" for name in ("train_labelled", "train_unlabelled", "probe", "validation", "test")
    }
    assert {tag.value for tag in inputs["tiny.probe"].tags} == {"probe"}
    stages = {run.info.run_name: run for run in children[root.info.run_id]}
    assert {run.info.status for run in [root, *stages.values()]} == {"FINISHED"}

    teachers = {run.data.tags["teacher"]: run for run in children[stages["assess"].info.run_id]}
    assert {name for name, run in teachers.items() if run.info.status == "FAILED"} == {"broken", "lost"}
    mixed = teachers["mixed"]
    assert {"plan.png", "plan.json"} <= files(mixed) and mixed.data.params["source.type"] == "safetensors"
    assert mixed.data.metrics["score_low"] < mixed.data.metrics["score"] < mixed.data.metrics["score_high"]
    assert {"images", "seconds", "peak_mb", "rung", "rung_seconds", "knn", "leep"} <= set(mixed.data.metrics)
    assert "scores.png" in files(stages["assess"])
    assert {"choice.json", "faculty.json", "plans"} <= files(stages["select"])
    assert {"choices.json", "ambiguity.json", "histograms.png"} <= files(stages["amalgamate"])

    epochs = list(range(1, 11))
    assert series(stages["distill"], "loss") == series(stages["distill"], "transport") == epochs
    assert {"checkpoints.json", "curves.png", "history.json"} <= files(stages["distill"])
    arms = {run.info.run_name: run for run in children[stages["evaluate"].info.run_id]}
    assert {f"{kind}-seed{seed}" for kind in ("faculty", "no_teacher") for seed in (0, 1)} == set(arms)
    for arm in arms.values():
        assert series(arm, "loss") == epochs and arm.info.status == "FINISHED"
        assert 0 <= arm.data.metrics["test.accuracy"] <= 1 and arm.data.params["loop.epochs"] == "10"
    assert {"confusion.png", "accuracies.png", "controls.json", "evaluation.json"} <= files(stages["evaluate"])
    assert root.data.metrics["evaluate.difference.no_teacher"] == pytest.approx(
        stages["evaluate"].data.metrics["difference.no_teacher"]
    )


def test_a_second_run_reuses_everything(world: Path, finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in (world / "run").rglob("*") if path.suffix == ".parquet"}
    result = faculty("run", "-c", world / "run.yaml", timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("unchanged since") == 7
    assert "models:/" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_status_says_what_is_stale_and_why(world: Path, finished) -> None:
    fresh = faculty("run", "-c", world / "run.yaml", "--status", timeout=60)
    assert fresh.stdout.count("fresh") == 7
    changed = faculty("run", "-c", world / "run.yaml", "--status", "select.max_teachers=1", timeout=60)
    text = " ".join(changed.stdout.split())
    assert "select stale select.max_teachers: 4 → 1" in text
    assert "assess fresh" in text
    assert "distill waiting" in text
    resources = faculty("run", "-c", world / "run.yaml", "--status", "distill.resources.num_workers=1", timeout=60)
    assert resources.stdout.count("fresh") == 7


@pytest.mark.slow
def test_going_back_to_former_settings_brings_the_alias_back(world: Path, finished) -> None:
    import mlflow

    def champion() -> str:
        client = mlflow.MlflowClient(f"sqlite:///{world}/run/mlflow.db")
        return str(client.get_model_version_by_alias("faculty-student", "challenger").version)

    def run(*overrides: str) -> str:
        result = faculty("run", "-c", world / "run.yaml", *overrides)
        assert result.returncode == 0, result.stderr
        return " ".join(result.stdout.split())

    assert champion() == "1"
    other = "distill.loop.epochs=2", "distill.resources.num_workers=0", "evaluate.seeds=1", "evaluate.controls=[]"
    run(*other)
    assert champion() == "2"
    status = faculty("run", "-c", world / "run.yaml", "--status", timeout=60)
    assert "register stale another student has been registered since" in " ".join(status.stdout.split())
    text = run()
    assert champion() == "1"
    assert "version 1" in text
    assert text.count("unchanged since") == 6


@pytest.mark.slow
def test_another_teacher_is_assessed_alone(world: Path, finished, tmp_path: Path) -> None:
    copy = tmp_path / "world"
    shutil.copytree(world, copy, ignore=shutil.ignore_patterns("mlartifacts", "mlflow.db"))
    settings = yaml.safe_load((copy / "run.yaml").read_text())
    settings["run_dir"] = str(copy / "run")
    settings["tracking"] = {"enabled": False}
    (copy / "run.yaml").write_text(yaml.safe_dump(settings))
    zoo = copy / "zoo.yaml"
    entries = yaml.safe_load(zoo.read_text())["teachers"]
    write_zoo(
        zoo, [entry for entry in entries if entry["name"] not in ("broken", "lost")] + [{**entries[0], "name": "twin"}]
    )
    result = faculty("assess", "-c", copy / "run.yaml", timeout=120)
    assert result.returncode == 0, result.stderr
    assert "teachers 1/1" in result.stdout


def without_tracking(world: Path, folder: Path, *overrides: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run the finished world again in a copy, with other settings and nothing recorded."""
    copy = folder / "world"
    shutil.copytree(world, copy, ignore=shutil.ignore_patterns("mlartifacts", "mlflow.db"))
    common = (f"run_dir={copy / 'run'}", "tracking.enabled=false", "register.enabled=false")
    result = faculty("run", "-c", copy / "run.yaml", *common, "distill.resources.num_workers=0", *overrides)
    return copy, result


def test_when_no_teacher_helps_it_says_so_and_trains_on_the_labels(world: Path, finished, tmp_path: Path) -> None:
    copy, result = without_tracking(world, tmp_path, "zoo.only=[blind]")
    assert result.returncode == 0, result.stderr
    assert "do not transfer" in result.stdout
    choice = max((copy / "run" / "select").glob("*/faculty.json"), key=lambda path: path.stat().st_mtime_ns)
    assert json.loads(choice.read_text())["chosen"] == []
    evaluation = max((copy / "run" / "evaluate").glob("*/evaluation.json"), key=lambda path: path.stat().st_mtime_ns)
    arms = json.loads(evaluation.read_text())["arms"]
    former = json.loads(artefact(world, "evaluate", "evaluation.json").read_text())["arms"]
    assert [arm["name"] for arm in arms] == ["student"]
    assert (
        arms[0]["accuracies"] == former[1]["accuracies"]
    )  # the student is the former run's "no teacher", seed by seed


@pytest.mark.slow
def test_a_zoo_with_one_teacher_works(world: Path, finished, tmp_path: Path) -> None:
    _, result = without_tracking(world, tmp_path, "zoo.only=[mixed]", "evaluate.controls=[no_teacher, best_single]")
    assert result.returncode == 0, result.stderr
    assert "faculty: mixed" in result.stdout
    assert "the best single teacher is the whole faculty" in result.stdout
