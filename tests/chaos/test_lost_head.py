"""The head of a cluster is lost with all that ran on it: the same command goes on where another cluster is."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from pipeline.engine.checkpoint import CheckpointStore
from tests import rayhead
from tests.tiny import make_data, make_settings, make_zoo

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]
EPOCHS = 40


def test_another_head_goes_on(no_cluster: None, tmp_path: Path) -> None:
    make_data(tmp_path)
    make_zoo(tmp_path, ("flat", "solid", "mixed"))
    settings = make_settings(
        tmp_path,
        evaluate={"seeds": 1, "controls": []},
        register={"enabled": False},
        distill={
            "student": {"name": "small_cnn", "kwargs": {"width": 8}},
            "loop": {"epochs": EPOCHS, "batch_size": 32, "labelled_batch": 16},
            "guard": None,
            "resources": {"num_workers": 1},
        },
    )
    run = tmp_path / "run"
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    known = plain | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "jobs.cli", "run", "-c", str(settings), f"cluster.address=127.0.0.1:{port}"]

    def call(port: int, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(port), capture_output=True, text=True, env=environment, timeout=240, check=False)

    def newest() -> int:
        folder = next(run.glob("ray/epochs-*"), None)
        saved = CheckpointStore(str(run / "ray"), folder.name).newest() if folder is not None else None
        return -1 if saved is None else saved.index

    [port] = rayhead.free_ports(1)
    with rayhead.started(f"--port={port}", "--include-dashboard=false", environment=known) as (head, _):
        refused = call(port, plain)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: cluster.address '127.0.0.1:{port}' asks for a token, and has another")
        assert refused.stderr.count("\n") == 1
        driver = subprocess.Popen(command(port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=known)
        try:
            deadline = time.monotonic() + 240
            while newest() < 2:
                assert driver.poll() is None, driver.communicate()[0]
                assert time.monotonic() < deadline, "the third epoch was not reached"
                time.sleep(0.02)
            gone = rayhead.kill(head)
            output = driver.communicate(timeout=200)[0]
        finally:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
    assert driver.returncode not in (0, None)
    assert "does not answer. If it is lost, Ray ends this process within a minute" in output.splitlines()[-1], output
    _, alive = psutil.wait_procs(gone, timeout=30)
    assert not alive
    before = newest()
    assert before < EPOCHS - 1

    [port] = rayhead.free_ports(1)
    with rayhead.started(f"--port={port}", "--include-dashboard=false", environment=known):
        done = call(port, known)
    assert done.returncode == 0, done.stdout + done.stderr
    history = json.loads(next(run.glob("distill/*/history.json")).read_text())
    assert [row["epoch"] for row in history] == list(range(1, EPOCHS + 1))
    assert newest() == EPOCHS - 1  # a checkpoint an epoch: it did not begin anew
    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    [experiment] = [one for one in client.search_experiments() if one.name == "faculty"]
    names = set()
    for found in client.search_runs([experiment.experiment_id], max_results=100):
        assert found.info.run_name not in names, "a run that went on was recorded twice"
        names.add(found.info.run_name)
        for name in found.data.metrics:
            steps = [point.step for point in client.get_metric_history(found.info.run_id, name)]
            assert len(steps) == len(set(steps)), (found.info.run_name, name, steps)
