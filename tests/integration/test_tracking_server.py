import logging
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.tracking.connect import open_tracker, records_wait
from pipeline.tracking.registry import register_student, registered
from pipeline.tracking.resolve import load_mlflow_module
from pipeline.tracking.spec import TrackingSpec
from tests.loopback import TrackingServer
from tests.tiny import TinyClassifier

pytestmark = [
    pytest.mark.integration,
    # MLflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]
SECRET = "sentinel-7f3a"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    server = TrackingServer(tmp_path_factory.mktemp("server")).start()
    yield server
    server.stop()


@pytest.fixture
def server(running):
    """The server's URI with credentials in it, and its folder."""
    return f"http://someone:{SECRET}@127.0.0.1:{running.port}", running.folder


def test_a_server_records_resumes_registers_and_never_sees_the_credentials(server, tmp_path, monkeypatch, capfd):
    uri, folder = server
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    torch.manual_seed(0)
    student = TinyClassifier()
    example = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    runs, versions = [], []
    for crash in (True, False):
        try:
            with open_tracker(TrackingSpec(), tmp_path / "run", name="run", key="k", params={"uri": uri}) as tracker:
                with tracker.run("stage", key="s", tags={"uri": uri}) as stage:
                    stage.metrics({"loss": 1.0, "lost": math.nan, "huge": -math.inf}, step=1)
                    stage.document("settings", {"uri": uri})
                versions.append(
                    register_student(
                        tracker,
                        student=student,
                        example=example,
                        classes=["a", "b"],
                        name="served",
                        alias="challenger",
                        metadata={"uri": uri},
                    )
                )
                runs.append((tracker.run_id, stage.run_id))
                if crash:
                    raise RuntimeError(f"lost {uri}")
        except RuntimeError:
            assert tracker.client.get_run(tracker.run_id).info.status == "FAILED"
    assert runs[0] == runs[1]
    assert [version.created for version in versions] == [True, False]
    assert versions[0].version == versions[1].version == registered(tracker, "served", "challenger").version

    stage_run = tracker.client.get_run(stage.run_id)
    assert stage_run.info.status == "FINISHED"
    assert math.isnan(stage_run.data.metrics["lost"])
    assert math.isnan(stage_run.data.metrics["huge"])
    assert [len(tracker.client.get_metric_history(stage.run_id, name)) for name in ("loss", "lost", "huge")] == [1] * 3
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"

    module = load_mlflow_module("models:/served@challenger")
    with torch.no_grad():
        batch = torch.from_numpy(example)
        assert torch.allclose(module(batch), student(batch), atol=1e-5)

    assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == []
    assert not {"mlruns", "mlflow.db", "mlartifacts"} & set(os.listdir(tmp_path))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert SECRET not in tracker.uri + repr(tracker)
    stored = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "model.pt2" for path in stored)
    assert [path for path in stored if SECRET.encode() in path.read_bytes()] == []


def test_a_server_that_answers_with_errors_is_refused(server, tmp_path):
    uri, _ = server
    wrong = TrackingSpec(uri=f"{uri}/no/such/place", timeout=20)
    with pytest.raises(UserError, match="can't be used") as caught, open_tracker(wrong, tmp_path, name="run"):
        pytest.fail("the block must not be entered")
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_processes_that_come_first_share_one_database(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from pipeline.tracking.connect import open_tracker
        from pipeline.tracking.spec import TrackingSpec
        with open_tracker(TrackingSpec(), "run", name="run", key="same") as tracker:
            tracker.metrics({"own": 1}, step=int(sys.argv[1]))
            print(tracker.run_id, tracker.experiment_id)
        """
    )
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(number)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], answers
    assert answers[0] == answers[1]
    assert answers[0][1] == ""
    assert sorted(os.listdir(tmp_path)) == ["run"]
    assert sorted(os.listdir(tmp_path / "run")) == [".mlflow.lock", "mlflow.db"]


def test_a_server_that_is_killed_and_comes_back_has_all_of_it_once(running, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    patient, hasty = (TrackingSpec(uri=running.uri, timeout=seconds) for seconds in (60, 1))
    run_dir, file = tmp_path / "run", tmp_path / "weights"

    def epochs(tracker, name, numbers):
        with tracker.run(name, key=name, params={"lr": 0.1}) as stage:
            for epoch in numbers:
                stage.metrics({"loss": 1 / (epoch + 1)}, step=epoch)
            file.write_text(name)
            stage.artifact(file)

    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        with open_tracker(patient, run_dir, name="run", key="outage") as tracker:
            epochs(tracker, "before", range(3))
            running.kill()
            epochs(tracker, "during", range(50))
            running.start()
            epochs(tracker, "after", range(3))
        assert not records_wait(patient, run_dir)
        # Gone until after the end: the next run of the folder brings what is missing.
        with open_tracker(patient, run_dir, name="run", key="outage") as tracker:
            tracker.flush()
        with open_tracker(hasty, run_dir, name="run", key="outage") as tracker:
            running.kill()
            epochs(tracker, "late", range(3))
        assert caplog.messages[-2].endswith("does not answer; records wait until it does: Connection refused")
        assert " 8 records wait in" in caplog.messages[-1]  # a run, its parameters, 3 epochs, a file, two ends
        assert records_wait(patient, run_dir)
        running.start()
        with open_tracker(patient, run_dir, name="run", key="outage") as tracker:
            epochs(tracker, "late", range(2, 5))
        assert not records_wait(patient, run_dir)
    client, query = tracker.client, f"tags.`mlflow.parentRunId` = '{tracker.run_id}'"
    runs = {run.info.run_name: run for run in client.search_runs([tracker.experiment_id], query)}
    assert set(runs) == {"before", "during", "after", "late"}
    for name, count in (("before", 3), ("during", 50), ("after", 3), ("late", 5)):
        run = runs[name]
        assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "0.1"})
        history = client.get_metric_history(run.info.run_id, "loss")
        assert sorted((point.step, point.value) for point in history) == [(n, 1 / (n + 1)) for n in range(count)]
        assert Path(client.download_artifacts(run.info.run_id, "weights", tmp_path)).read_text() == name
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert not (run_dir / "tracking-journal").exists()
