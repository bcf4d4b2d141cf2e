"""The jobs of a cluster as they are shown, addresses that lead nowhere, and what a process knows of its own job."""

from __future__ import annotations

import http.server
import io
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from jobs.cli import app
from jobs.shell import main, stoppable
from pipeline.cluster.in_job import job_environment, job_id, refuse_passing_folder
from pipeline.cluster.job_request import Job
from pipeline.cluster.session import _runtime_env
from pipeline.cluster.spec import ClusterSpec
from pipeline.errors import ConfigError, Interrupted, StageError
from pipeline.remote import command
from pipeline.report.console import Display

SECRET = "sentinel-81aa"


def in_job(monkeypatch: pytest.MonkeyPatch, **environment: object) -> None:
    said = {"runtime_env": environment, "metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(said))


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["faculty", *arguments])
    with pytest.raises(SystemExit) as ended:
        main(app)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.err


@pytest.fixture
def other_server() -> Iterator[str]:
    """A web server that is no Ray dashboard."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


class Silent(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(
    "words", [["jobs"], ["logs", "raysubmit_1"], ["stop", "raysubmit_1"], ["submit", "--resume", "raysubmit_1"]]
)
def test_a_cluster_that_does_not_answer_is_one_line(words: list[str], free_port, capsys, monkeypatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    code, err = call(capsys, monkeypatch, *words, "--address", f"http://127.0.0.1:{free_port}")
    assert code == 2
    assert err.startswith(f"error: no Ray dashboard answers at http://127.0.0.1:{free_port} (Connection refused)")
    assert len(err.splitlines()) == 1


def test_the_address_comes_from_the_environment_and_is_overridden(free_port, other_server, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{free_port}")
    assert f":{free_port} (" in call(capsys, monkeypatch, "jobs")[1]
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://me:{SECRET}@127.0.0.1:{free_port}")
    err = call(capsys, monkeypatch, "jobs")[1]
    assert f"http://127.0.0.1:{free_port} (" in err
    assert SECRET not in err
    code, err = call(capsys, monkeypatch, "jobs", "--address", other_server)
    assert code == 2
    assert f"no Ray dashboard answers at {other_server} (" in err
    assert len(err.splitlines()) == 1


def test_a_former_job_s_settings_are_its_own(capsys, monkeypatch) -> None:
    code, err = call(capsys, monkeypatch, "submit", "--resume", "raysubmit_1", "seed=3")
    assert code == 2
    assert "leave -c and overrides out" in err


def job(**changes: object) -> Job:
    fields = {
        "id": "raysubmit_1",
        "status": "RUNNING",
        "entrypoint": "python -m jobs.run",
        "metadata": {"faculty.run": "birds", "faculty.stage": "run"},
        "started": 1.7e9,
        "ended": None,
        "exit_code": None,
        "message": "",
        "stop_wait": 60.0,
    }
    return Job(**(fields | changes))


@pytest.mark.parametrize(
    ("status", "exit_code", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_a_follower_ends_as_its_job(status: str, exit_code: int | None, code: int) -> None:
    found = job(status=status, exit_code=exit_code)
    assert found.over
    assert found.code == code
    assert not job().over


class Listed:
    """A server with these jobs."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs

    def jobs(self) -> list[Job]:
        return self._jobs


def test_jobs_are_a_table_or_json(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    failed = job(id="raysubmit_2", status="FAILED", ended=1.7e9 + 3725, exit_code=2, message="log\nerror: no [x]\n\n")
    monkeypatch.setattr(command, "_connect", lambda *_: Listed([job(), failed]))
    text = io.StringIO()
    command.show_jobs(None, False, Display(Console(file=text, width=160)))
    lines = text.getvalue().splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["raysubmit_1", "birds", "run", "running"],
        ["raysubmit_2", "birds", "run", "failed"],
    ]
    assert "1:02:05" in lines[2]
    assert lines[2].rstrip().endswith("error: no [x]")
    command.show_jobs(None, True)
    found = json.loads(capsys.readouterr().out)
    assert [item["id"] for item in found] == ["raysubmit_1", "raysubmit_2"]
    assert found[1]["ended"] == "2023-11-14T23:15:25+00:00"
    assert found[1]["exit_code"] == 2


def test_credentials_of_a_command_are_not_shown() -> None:
    from ray.job_submission import JobDetails, JobStatus, JobType

    from pipeline.cluster.jobs import _job

    uri = f"http://me:{SECRET}@host:5000"
    details = JobDetails(
        type=JobType.SUBMISSION,
        submission_id="raysubmit_1",
        status=JobStatus.FAILED,
        entrypoint=f"python -m jobs.run tracking.uri={uri}",
        message=f"no answer from {uri}",
        metadata={"about": uri},
        runtime_env={"env_vars": {"MLFLOW_TRACKING_PASSWORD": SECRET, "RAY_JOB_STOP_WAIT_TIME_S": "7"}},
        start_time=1_700_000_000_000,
        end_time=1_700_000_001_000,
        driver_exit_code=1,
    )
    found = _job(details)
    assert SECRET not in repr(found)
    assert found.entrypoint == "python -m jobs.run tracking.uri=http://host:5000"
    assert (found.stop_wait, found.started, found.ended) == (7.0, 1.7e9, 1.7e9 + 1)


def test_workers_are_not_told_twice_what_the_job_told_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    outside = _runtime_env(ClusterSpec(address="auto"))["env_vars"]
    assert outside["OMP_NUM_THREADS"] == "1"
    in_job(monkeypatch, working_dir="gcs://_ray_pkg_1.zip", env_vars={"NCCL_DEBUG": "WARN", "A": "b"})
    assert job_id() == "raysubmit_1"
    given = job_environment()
    ours = _runtime_env(ClusterSpec(address="auto"))
    assert set(ours) == {"env_vars"}
    assert not set(ours["env_vars"]) & set(given["env_vars"])
    assert "OMP_NUM_THREADS" not in ours["env_vars"]  # of the command alone: Ray's choice, not the user's
    assert ours["env_vars"]["TUNE_DISABLE_SIGINT_HANDLER"] == "1"


@pytest.mark.parametrize("asked", [{"working_dir": "s3://b/a.zip"}, {"env_vars": {"A": SECRET}}])
def test_settings_that_contradict_the_job_s_environment_are_refused(asked, monkeypatch) -> None:
    in_job(monkeypatch, working_dir="gcs://_ray_pkg_1.zip", env_vars={"A": "b"})
    with pytest.raises(ConfigError, match=r"cluster\.runtime_env\.(working_dir|env_vars\.A): the job") as caught:
        _runtime_env(ClusterSpec(address="auto", runtime_env=asked))
    assert SECRET not in str(caught.value)


def test_a_run_folder_in_the_job_s_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    refuse_passing_folder("runs/demo")  # not in a job
    in_job(monkeypatch)
    with pytest.raises(ConfigError, match="run_dir runs/demo: lies in the job's copy"):
        refuse_passing_folder("runs/demo")
    refuse_passing_folder(str(tmp_path / "run"))
    refuse_passing_folder("s3://bucket/run")


@pytest.mark.parametrize(("number", "how"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")])
def test_both_signals_end_a_run_with_a_line(number: signal.Signals, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=f"^{how}; the same command continues") as caught, stoppable():
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == 130
    in_job(monkeypatch)
    with pytest.raises(Interrupted, match=f"^{how}; faculty submit --resume raysubmit_1 continues"), stoppable():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise StageError("broken off") from None  # what was broken off may say anything
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_error_of_its_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match="own"), stoppable():
        raise StageError("own")
    with pytest.raises(Interrupted, match="from the checkpoint"), stoppable():
        raise Interrupted("from the checkpoint")


class Breaking:
    """A connection that hands over a log in pieces, breaks in the middle, and begins again from the first line."""

    log = f"first\nsecond from http://me:{SECRET}@host\nthird\n"

    def __init__(self) -> None:
        self.calls = 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.calls += 1
        yield self.log[:6]
        if self.calls == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        yield self.log[6:]

    def get_job_info(self, job_id: str) -> object:
        from ray.job_submission import JobDetails, JobStatus, JobType

        status = JobStatus.SUCCEEDED if self.calls > 1 else JobStatus.RUNNING
        return JobDetails(type=JobType.SUBMISSION, submission_id=job_id, status=status, entrypoint="python")


def test_a_connection_that_breaks_shows_nothing_twice() -> None:
    from pipeline.cluster.jobs import JobServer

    server = JobServer.__new__(JobServer)
    server.address, server._client = "http://127.0.0.1:8265", Breaking()
    shown: list[str] = []
    assert server.follow("raysubmit_1", shown.append).status == "SUCCEEDED"
    assert "".join(shown) == "first\nsecond from http://host\nthird\n"
