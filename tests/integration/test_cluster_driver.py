"""A driver of its own: what it prints, what it leaves when it is killed, what it says when there is no cluster."""

import functools
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.cluster import session as session_module
from pipeline.cluster.session import session
from pipeline.cluster.spec import ClusterSpec
from pipeline.engine.checkpoint import CheckpointStore
from pipeline.errors import ConfigError, UserError

pytestmark = pytest.mark.integration

LOOPS = """
import os, tempfile, time
from pathlib import Path

def count(context, steps):
    with context.restore() as folder:
        start = int((folder / "step").read_text()) if folder else 0
    for step in range(start, steps):
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "step").write_text(str(step + 1))
            context.report({"start": start, "step": step, "pid": os.getpid()}, Path(scratch))
        print("a worker's own words")
        time.sleep(0.2)
"""
DRIVER = """
import sys
from driver_loops import count
from pipeline.engine.checkpoint import CheckpointStore
from pipeline.cluster.session import session
from pipeline.cluster.spec import ClusterSpec
from pipeline.cluster.train import fit

def tell(row):
    print(row["start"], row["step"], row["pid"], flush=True)

with session(ClusterSpec(num_cpus=1)):
    fit(count, int(sys.argv[2]), num_workers=1, storage=sys.argv[1], name="run", on_report=tell)
print("end", flush=True)
"""


def start(folder, steps):
    (folder / "driver_loops.py").write_text(textwrap.dedent(LOOPS))
    (folder / "driver.py").write_text(textwrap.dedent(DRIVER))
    long = folder / ("a-long-folder-for-temporary-files" * 3)
    long.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(folder / "driver.py"), str(folder / "storage"), str(steps)],
        env=os.environ | {"TMPDIR": str(long), "PYTHONWARNINGS": "default"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow  # tests/chaos kills a driver at every stage
def test_a_killed_driver_is_quiet_leaves_no_worker_and_is_continued(tmp_path):
    driver = start(tmp_path, 10_000)
    lines = [driver.stdout.readline().split() for _ in range(3)]
    driver.kill()
    _, errors = driver.communicate()
    assert [line[:2] for line in lines] == [["0", "0"], ["0", "1"], ["0", "2"]]
    assert errors == ""
    deadline = time.monotonic() + 30
    while alive(int(lines[0][2])) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(int(lines[0][2]))

    # The worker may have gone on for a moment; what it saved whole is what counts.
    reached = CheckpointStore(str(tmp_path / "storage"), "run").newest().metrics["step"] + 1
    assert reached >= 3
    driver = start(tmp_path, reached + 4)
    out, errors = driver.communicate(timeout=200)
    assert errors == ""
    assert driver.returncode == 0
    rows = [line.split() for line in out.splitlines()]
    assert [row[:2] for row in rows[:-1]] == [[str(reached), str(reached + step)] for step in range(4)]
    assert rows[-1] == ["end"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "auto"])
def test_a_cluster_that_is_not_there_is_one_line(no_cluster, address, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Whatever else runs on this machine; Ray clears the function's cache.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(lambda: set()))
    with (
        tempfile.TemporaryDirectory(prefix="f", dir="/tmp") as empty,
        pytest.raises(UserError, match="can't be reached") as caught,
    ):
        monkeypatch.setenv("RAY_TMPDIR", empty)
        with session(ClusterSpec(address=address)):
            pass
    assert "\n" not in str(caught.value)
    assert repr(address) in str(caught.value)


def test_a_temp_dir_too_long_for_a_socket_is_refused(no_cluster, tmp_path):
    with (
        pytest.raises(ConfigError, match=r"cluster\.temp_dir .* too long"),
        session(ClusterSpec(temp_dir=str(tmp_path / ("x" * 60)))),
    ):
        pass


def test_a_head_that_is_gone_is_told_once_and_so_is_its_return(capsys, monkeypatch):
    monkeypatch.setattr(session_module, "_WATCH_S", 0.02)
    told = ""

    def heard(text):
        nonlocal told
        told += capsys.readouterr().err
        return text in told

    head = socket.create_server(("127.0.0.1", 0))
    port = head.getsockname()[1]
    with session_module._watched_head(f"ray://127.0.0.1:{port}"):
        time.sleep(0.1)
        assert not heard("cluster")
        head.close()
        until(lambda: heard("does not answer"))
        time.sleep(0.1)
        assert not heard("again")
        with socket.create_server(("127.0.0.1", port)):
            until(lambda: heard("its head answers again"))
    assert told.count("does not answer. If it is lost, Ray ends this process within a minute") == 1
    assert told.count("answers again") == 1


def test_native_lines_are_held_back_and_others_are_not(capfd):
    with session_module._native_lines(shown=False) as told:
        os.write(2, b"[2026-11-30 21:24:40,256 W 12991 12991] gcs_client.cc:210: InvalidAuthToken\n")
        os.write(2, b"what somebody else has to say\n")
        assert "InvalidAuthToken" in told()
    assert capfd.readouterr().err == "what somebody else has to say\n"


def until(reached):
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)
