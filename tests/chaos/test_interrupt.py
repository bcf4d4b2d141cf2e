"""Ctrl-C and SIGTERM to a run on this machine: one line, a state to go on from, and none of Ray's processes left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.tiny import make_data, make_settings, make_zoo

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


@pytest.fixture
def session_dir() -> Iterator[Path]:
    """Where this run's Ray keeps its sockets: its processes are told by this path."""
    folder = Path(tempfile.mkdtemp(prefix="fi-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def of_session(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def interrupt_when(
    settings: Path, session: Path, reached: Callable[[], bool], number: signal.Signals
) -> tuple[int, str, str, list[psutil.Process]]:
    """Run, send the signal once a point is reached; return exit code, output, errors and the processes there were."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.run", "-c", str(settings), f"cluster.temp_dir={session}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    try:
        while not reached():
            assert process.poll() is None, f"ended before the point: {process.communicate()}"
            assert time.monotonic() < deadline, "the point was not reached"
            time.sleep(0.02)
        started = psutil.Process(process.pid).children(recursive=True) + of_session(session)
        # A terminal sends Ctrl-C to all of its foreground processes, `kill` a signal to one.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode, out, err, started


@pytest.mark.parametrize(
    ("number", "how", "stage", "point"),
    [
        pytest.param(signal.SIGINT, "interrupted", "assess", "teachers/*/row.json", id="ctrl-c"),
        pytest.param(
            signal.SIGTERM,
            "ended by SIGTERM",
            "distill",
            "ray/epochs-*/checkpoint_*/state.pt",
            id="sigterm",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_interrupted_run_leaves_a_line_and_no_process(
    number: signal.Signals, how: str, stage: str, point: str, tmp_path: Path, session_dir: Path
) -> None:
    make_data(tmp_path)
    make_zoo(tmp_path, ("flat", "solid", "mixed", "untrained", "blind"))
    settings = make_settings(
        tmp_path,
        register={"enabled": False},
        distill={
            "student": {"name": "small_cnn", "kwargs": {"width": 8}},
            "loop": {"epochs": 400, "batch_size": 32, "labelled_batch": 16},
            "guard": None,
            "resources": {"num_workers": 1},
        },
    )
    run = tmp_path / "run"
    code, out, err, started = interrupt_when(settings, session_dir, lambda: any(run.glob(point)), number)
    assert code == 130, out + err
    assert err == f"error: {how}; the same command continues where it stopped\n"
    assert "Traceback" not in out
    assert len(started) >= 3  # Ray's, at least
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive, [process.cmdline() for process in alive]
    assert not of_session(session_dir)
    assert any(run.glob(point))
    assert not any(run.glob(f"{stage}/*/stage.json"))

    command = [sys.executable, "-m", "jobs.run", "-c", str(settings), "--status"]
    status = subprocess.run(command, capture_output=True, text=True, check=True)
    states = {line.split()[0]: line.split()[1] for line in status.stdout.splitlines() if len(line.split()) > 1}
    assert states["ingest"] == "fresh"
    assert states[stage] == "partial"
