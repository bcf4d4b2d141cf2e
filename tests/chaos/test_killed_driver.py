"""`kill -9` of a run at any stage: the same command finishes it, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.engine.checkpoint import CheckpointStore
from tests.tiny import make_data, make_settings, make_zoo

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


def start(settings: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run", "-c", str(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_when(settings: Path, reached: Callable[[], bool], limit: float = 200) -> list[psutil.Process]:
    """Start a run, kill its driver with SIGKILL once a point is reached; return the processes it had started."""
    process = start(settings)
    driver = psutil.Process(process.pid)
    deadline = time.monotonic() + limit
    try:
        while not reached():
            assert process.poll() is None, f"ended before the point: {process.communicate()[0]}"
            assert time.monotonic() < deadline, "the point was not reached"
            time.sleep(0.02)
        return driver.children(recursive=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(Exception):
            process.communicate(timeout=5)


def is_agent(process: psutil.Process) -> bool:
    """Whether it is a process that Ray keeps beside a node, which has seen its end and closes its server meanwhile."""
    try:
        command = process.cmdline()[0]
    except (psutil.Error, IndexError):  # it has ended, or is about to
        return False
    return command.strip() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def assert_gone(processes: list[psutil.Process]) -> None:
    """All have ended, but for agents of Ray that take their minute to do so; that is cut short."""
    others = [one for one in processes if not is_agent(one)]
    psutil.wait_procs(others, timeout=60)
    for agent in filter(is_agent, processes):
        agent.kill()
    _, alive = psutil.wait_procs(processes, timeout=5)
    alive = [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not alive, [one.cmdline() for one in alive]


@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["early", "late"])
def test_killed_at_every_stage_and_finished(tmp_path: Path, late: bool) -> None:
    """Early: while teachers are assessed, and the student taught; late: besides, while others are, and at the end."""
    make_data(tmp_path)
    make_zoo(tmp_path)
    settings = make_settings(
        tmp_path,
        evaluate={"seeds": 2, "controls": ["no_teacher"]} if late else {"seeds": 1, "controls": []},
        register={"gate": False},  # this small a student need not gain by its teachers
        distill={
            "student": {"name": "small_cnn", "kwargs": {"width": 8}},
            "loop": {"epochs": 60, "batch_size": 32, "labelled_batch": 16},
            "guard": None,
            "resources": {"num_workers": 0},
        },
    )
    run = tmp_path / "run"

    def some(pattern: str) -> Callable[[], bool]:
        return lambda: any(run.glob(pattern))

    # During the assessment: some teachers are done, others are not.
    children = kill_when(settings, some("teachers/*/row.json"))
    assessed = {path: path.stat().st_mtime_ns for path in run.glob("teachers/*/row.json")}
    assert not some("assess/*/stage.json")()
    # During the student's training: a checkpoint is there, the student is not.
    children += kill_when(settings, some("ray/epochs-*/checkpoint_*/state.pt"))
    assert {path: path.stat().st_mtime_ns for path in assessed} == assessed  # not assessed a second time
    assert not some("distill/*/stage.json")()

    def second_control_has_begun() -> bool:
        folder = next(run.glob("ray/controls-*"), None)
        newest = CheckpointStore(str(run / "ray"), folder.name).newest() if folder is not None else None
        return newest is not None and newest.metrics["arm"] == 1 and newest.metrics["epoch"] >= 5

    if late:
        # During the training of the second of three controls.
        children += kill_when(settings, second_control_has_begun)
        assert some("distill/*/stage.json")()
        assert len(list(run.glob("students/*/done.json"))) == 2
        assert not some("evaluate/*/stage.json")()
        # During registration.
        children += kill_when(settings, some("register/*"))

    process = start(settings)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert_gone(children)

    for stage in ("ingest", "assess", "select", "amalgamate", "distill", "evaluate", "register"):
        records = list((run / stage).glob("*/stage.json"))
        assert len(records) == 1, stage
        assert json.loads(records[0].read_text())["digest"]
    history = json.loads(next(run.glob("distill/*/history.json")).read_text())
    assert [metrics["epoch"] for metrics in history] == list(range(1, 61))

    if late:
        # Three trainings of 60 epochs with a checkpoint each: had the second one started over, there would be more.
        saved = CheckpointStore(str(run / "ray"), next(run.glob("ray/controls-*")).name).newest()
        assert saved is not None
        assert saved.index == 3 * 60 - 1

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("faculty")
    assert experiment is not None
    names = [found.info.run_name for found in client.search_runs([experiment.experiment_id], max_results=100)]
    assert sorted(names) == sorted(set(names)), "a continued run was recorded twice"
    versions = client.search_model_versions("name='faculty-student'")
    assert [version.version for version in versions] == [1] or [str(v.version) for v in versions] == ["1"]
