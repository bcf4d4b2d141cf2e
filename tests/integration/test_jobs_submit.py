"""A real cluster with its dashboard, on loopback: stages run as jobs, are followed, left, stopped, and go on."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import rayhead
from tests.tiny import make_data, make_settings, make_zoo

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECRET = "sentinel-5d20"
TOKEN = secrets.token_hex(32)
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}


def environment(token: str = TOKEN) -> dict[str, str]:
    """The environment of a user who has the cluster's token."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "RAY_"))}
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": token}
    return kept | own | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def ask(url: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=AUTHORIZATION), timeout=5) as response:
        return json.load(response)


def until(reached: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def head(no_cluster: None) -> Iterator[str]:
    """The address of the dashboard of a cluster of one node, beside any other that runs on this machine."""
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    ports = dict(zip(names, rayhead.free_ports(len(names)), strict=True))
    options = ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    options += [f"--{name}={port}" for name, port in ports.items()]
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    with rayhead.started(*options, environment=environment() | {"RAY_AUTH_MODE": "token"}) as (process, folder):

        def answers() -> bool:
            assert process.poll() is None, (folder / "start.log").read_text()
            try:
                return bool(ask(f"{address}/api/version"))
            except (urllib.error.URLError, OSError):
                return False

        try:
            until(answers, "no dashboard")
        except AssertionError:
            for log in (folder / "start.log", *folder.glob("session_latest/logs/dashboard*.*")):
                print(log.name, log.read_text(errors="replace")[-3000:])
            raise
        yield address


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of its own: settings, images, a zoo whose nets are built by a module that only this folder has."""
    folder = tmp_path_factory.mktemp("project")
    make_data(folder)
    zoo = make_zoo(folder, ("flat", "solid", "mixed"))
    entries = yaml.safe_load(zoo.read_text())
    for entry in entries["teachers"]:
        entry["source"]["factory"] = "my_nets:tiny"
    zoo.write_text(yaml.safe_dump(entries))
    (folder / "my_nets.py").write_text(
        "from pipeline.models.nets import mlp\n\n\n"
        "def tiny(num_classes, in_channels=1, **kwargs):\n    return mlp(num_classes, in_channels, **kwargs)\n"
    )
    make_settings(
        folder,
        zoo={"path": "zoo.yaml", "trusted_factories": ["my_nets"]},
        run_dir=str(folder.parent / f"{folder.name}-run"),
        evaluate={"seeds": 1, "controls": []},
        register={"gate": False},
        distill={
            "student": {"name": "small_cnn", "kwargs": {"width": 8}},
            "loop": {"epochs": 150, "batch_size": 32, "labelled_batch": 16},
            "guard": None,
            "resources": {"num_workers": 0},
        },
    )
    return folder


def faculty(world: Path, *arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "faculty"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment(), cwd=world, check=False
    )


def test_a_cluster_with_another_token_says_so(head: str, world: Path) -> None:
    command = [str(BIN / "faculty"), "jobs", "--address", head]
    other = environment(token="0" * 64)
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=other, cwd=world, check=False)
    assert result.returncode == 2
    assert f"{head} asks for a token" in one_line(result)
    assert TOKEN not in result.stderr


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize("stage", ["assess", pytest.param("distill", marks=pytest.mark.slow)])
def test_ray_s_own_command_runs_a_stage_of_the_demo(stage: str, head: str, tmp_path: Path) -> None:
    user = environment() | {"RAY_AUTH_MODE": "token"}
    command = [str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", "."]
    command += ["--runtime-env", "conf/runtime_env.yaml", "--", "python", "-m", f"jobs.{stage}"]
    command += ["-c", "conf/demo/run.yaml", "cluster.address=auto", "zoo.only=[shoes, tops]", "select.teachers=all"]
    command += ["task.splits.train_unlabelled=200", "task.splits.test=5", "distill.loop.epochs=2", "distill.guard=null"]

    command += [f"run_dir={tmp_path}/run", "distill.resources.num_workers=2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=user, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(next((tmp_path / "run").glob(f"{stage}/*/stage.json")).read_text())["digest"]
    if stage == "distill":
        history = json.loads(next((tmp_path / "run").glob("distill/*/history.json")).read_text())
        assert [row["epoch"] for row in history] == [1, 2]


def test_a_job_is_followed_left_stopped_and_goes_on(head: str, world: Path) -> None:
    run = world.parent / f"{world.name}-run"
    submit = [str(BIN / "faculty"), "submit", "-c", "run.yaml", "--address", head, "--env", "MLFLOW_TRACKING_PASSWORD"]
    follower = subprocess.Popen(
        submit,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"MLFLOW_TRACKING_PASSWORD": SECRET},
        cwd=world,
        start_new_session=True,
    )

    def training() -> bool:
        if follower.poll() is not None:
            pytest.fail("".join(follower.communicate()))
        return any(run.glob("ray/epochs-*/checkpoint_*/state.pt"))

    until(training, "no checkpoint")
    os.killpg(follower.pid, signal.SIGINT)
    out, err = follower.communicate(timeout=30)
    assert follower.returncode == 130, out + err
    assert err == ""
    job_id = next(word for word in out.split() if word.startswith("raysubmit_"))
    assert "assess" in out  # the job's progress
    left = out.splitlines()[-1]
    assert f"detached, job {job_id} goes on; follow: faculty logs {job_id} --follow --address {head}" in left
    assert f"faculty stop {job_id}" in left

    listed = {job["id"]: job for job in json.loads(faculty(world, "jobs", "--json", "--address", head).stdout)}
    assert listed[job_id]["status"] == "RUNNING"
    assert (listed[job_id]["run"], listed[job_id]["stage"]) == ("tiny", "run")
    refused = faculty(world, "submit", "--resume", job_id, "--address", head)
    assert refused.returncode == 2
    assert f"job {job_id} is running" in one_line(refused)

    stopped = faculty(world, "stop", job_id, "--address", head)
    assert stopped.returncode == 0, stopped.stderr
    assert f"faculty submit --resume {job_id}" in stopped.stdout
    assert not any(run.glob("distill/*/stage.json"))
    log = faculty(world, "logs", job_id, "--address", head).stdout
    assert log.splitlines()[-1].startswith("error: ended by SIGTERM"), log[-2000:]
    assert log.splitlines()[-1].count("continues") == 1
    assert "Traceback" not in log
    again = faculty(world, "stop", job_id, "--address", head)
    assert again.returncode == 2
    assert "over already (stopped)" in one_line(again)
    wrong = faculty(world, "logs", "raysubmit_none", "--address", head)
    assert wrong.returncode == 2
    assert f"there is no job raysubmit_none on {head}" in one_line(wrong)

    assessed = {path: path.stat().st_mtime_ns for path in run.glob("teachers/*/row.json")}
    assert len(assessed) == 3
    (world / "run.yaml").rename(world / "elsewhere.yaml")  # what was uploaded counts, not what is here now
    resumed = faculty(world, "submit", "--resume", job_id, "--address", head)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "assess unchanged since" in resumed.stdout
    assert "succeeded" in resumed.stdout.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in assessed} == assessed
    assert len(list(run.glob("register/*/stage.json"))) == 1
    history = json.loads(next(run.glob("distill/*/history.json")).read_text())
    assert [row["epoch"] for row in history] == list(range(1, 151))

    table = faculty(world, "jobs", "--address", head)
    details = faculty(world, "jobs", "--json", "--address", head)
    assert SECRET not in out + table.stdout + details.stdout + log + resumed.stdout
    found = json.loads(details.stdout)[0]
    assert found["metadata"]["faculty.resumes"] == job_id
    for name in (job_id, found["id"]):  # it has arrived, though, and went on with the job
        assert ask(f"{head}/api/jobs/{name}")["runtime_env"]["env_vars"]["MLFLOW_TRACKING_PASSWORD"] == SECRET


def test_a_job_s_own_failure_is_the_follower_s(head: str, world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the run folder's place")
    settings = "run.yaml" if (world / "run.yaml").exists() else "elsewhere.yaml"
    result = faculty(world, "submit", "-c", settings, f"run_dir={tmp_path}/run", "--stage=ingest", "--address", head)
    assert result.returncode == 2, result.stdout + result.stderr
    assert f"error: run_dir {tmp_path}/run: can't be written" in result.stdout
    assert "failed with exit code 2" in result.stdout.splitlines()[-1]
