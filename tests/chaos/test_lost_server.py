"""The tracking server dies in the middle of a run and comes back minutes later: the run does not notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.loopback import TrackingServer
from tests.tiny import make_data, make_settings, make_zoo

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
EPOCHS = 30


@pytest.mark.slow
def test_a_server_lost_during_the_training_leaves_no_gap(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_data(tmp_path)
    make_zoo(tmp_path)
    (tmp_path / "server").mkdir()
    server = TrackingServer(tmp_path / "server").start()
    settings = make_settings(
        tmp_path,
        tracking={"uri": server.uri, "timeout": 60},
        evaluate={"seeds": 1, "controls": ["no_teacher"]},
        register={"gate": False},
        distill={
            "student": {"name": "small_cnn", "kwargs": {"width": 8}},
            "loop": {"epochs": EPOCHS, "batch_size": 32, "labelled_batch": 16},
            "resources": {"num_workers": 0},
        },
    )
    # One attempt a call, so that the test does not wait for MLflow's own.
    environment = os.environ | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    command = [sys.executable, "-m", "jobs.cli", "run", "-c", str(settings)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            reach(run, "ray/epochs-*/checkpoint_*/state.pt", process)
            server.kill()
            reach(run, "distill/*/stage.json", process)  # nobody waited for the server
            server.start()
            output = process.communicate(timeout=300)[0]
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    try:
        assert process.returncode == 0, output
        assert "does not answer; records wait until it does: Connection refused" in output
        assert "answers again" in output
        assert not (run / "tracking-journal").exists()
        check(MlflowClient(server.uri), run)
    finally:
        server.stop()


def reach(run: Path, pattern: str, process: subprocess.Popen[str], limit: float = 240) -> None:
    """Wait until a file of the run folder is there."""
    deadline = time.monotonic() + limit
    while not any(run.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{pattern} was not reached"
        time.sleep(0.05)


def check(client: MlflowClient, run_dir: Path) -> None:
    """Every run is there and finished; the student's epochs stand there once each, as its history has them."""
    (experiment,) = [one for one in client.search_experiments() if one.name == "faculty"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert {run.info.status for run in runs} == {"FINISHED"}
    stages = {run.data.tags.get("stage") for run in runs} - {None}
    assert stages == {"ingest", "assess", "select", "amalgamate", "distill", "evaluate", "register"}
    (history,) = [json.loads(path.read_text()) for path in run_dir.glob("distill/*/history.json")]
    expected = [(number, entry["loss"]) for number, entry in enumerate(history, start=1)]
    found = []
    for run in runs:
        for name in run.data.metrics:
            points = client.get_metric_history(run.info.run_id, name)
            steps = [point.step for point in points]
            if name.endswith("loss") and len(steps) == EPOCHS:
                found.append(sorted((point.step, point.value) for point in points))
            assert len(steps) == len(set(steps)), (run.info.run_name, name, steps)
    assert expected in found
