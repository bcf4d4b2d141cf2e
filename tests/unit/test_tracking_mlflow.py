import logging
import math
import os
import pickle
import socket
import threading

import pytest

from pipeline.errors import ConfigError, StageError
from pipeline.tracking.connect import open_tracker
from pipeline.tracking.mlflow import MlflowTracker
from pipeline.tracking.spec import TrackingSpec
from pipeline.tracking.tracker import Tracker

# MLflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")
SECRET = "sentinel-7f3a"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """One database for all tests: creating it takes seconds."""
    return tmp_path_factory.mktemp("run dir")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder and look that nothing strays into it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    assert os.listdir(tmp_path) == []


def opened(run_dir, key, **named):
    return open_tracker(TrackingSpec(), run_dir, name="run", key=key, **named)


def test_a_run_and_its_child_are_recorded(run_dir, capfd):
    with opened(run_dir, "plain", tags={"t": 1}, params={"a": {"b": 2}}) as tracker:
        assert isinstance(tracker, Tracker)
        with tracker.run("child", tags={"u": f"http://u:{SECRET}@h"}, params={"long": "x" * 9000}) as child:
            child.metrics({"acc": 0.5, "lost": math.nan, "huge": math.inf}, step=3)
            child.metrics({f"many/{i}": i for i in range(1200)})
            child.document("settings", {"x": float("nan")})
            child.table("rows", [{"x": 1}])
    client = tracker.client
    parent, kid = client.get_run(tracker.run_id), client.get_run(child.run_id)
    assert (parent.info.status, kid.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params == {"a.b": "2"}
    assert kid.data.tags["mlflow.parentRunId"] == tracker.run_id
    assert kid.data.tags["u"] == "http://h"
    assert kid.data.params["long"].endswith("[cut, 9000 characters]")
    assert kid.data.metrics["acc"] == 0.5
    assert math.isnan(kid.data.metrics["lost"])
    assert math.isnan(kid.data.metrics["huge"])
    assert kid.data.metrics["many/1199"] == 1199
    assert client.get_metric_history(child.run_id, "acc")[0].step == 3
    assert {file.path for file in client.list_artifacts(child.run_id)} == {"settings.json", "rows.json"}
    assert kid.info.artifact_uri.startswith((run_dir / "mlartifacts").as_uri())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_run_ends_as_its_block_does(run_dir, error, status):
    with pytest.raises(type(error)), opened(run_dir, f"end-{status}") as tracker, tracker.run("child") as child:
        raise error
    runs = [tracker.client.get_run(run_id) for run_id in (tracker.run_id, child.run_id)]
    assert [run.info.status for run in runs] == [status, status]
    assert runs[0].data.tags["faculty.error"].startswith(type(error).__name__)


def test_a_resumed_pipeline_continues_its_runs_without_doubles(run_dir):
    with pytest.raises(ValueError, match="crash"), opened(run_dir, "resumed") as tracker:
        with tracker.run("stage", key="s", params={"lr": 0.1, "workers": 1}) as stage:
            stage.metrics({"loss": 2.0}, step=0)
            stage.metrics({"loss": 1.0}, step=1)
            raise ValueError("crash")
    with opened(run_dir, "resumed") as again:
        with again.run("stage", key="s", params={"lr": 0.1, "workers": 2}) as stage_again:
            again.flush()
            assert again.client.get_run(stage.run_id).info.status == "RUNNING"
            assert "faculty.error" not in again.client.get_run(stage.run_id).data.tags
            stage_again.metrics({"loss": 1.25}, step=1)  # this epoch was recorded before the crash
            stage_again.metrics({"loss": 0.5}, step=2)
            stage_again.metrics({"loss": 0.75}, step=2)  # reported again after a worker was lost
            stage_again.metrics({"best": 0.5})
            stage_again.metrics({"best": 0.5})
            stage_again.metrics({"best": 0.25})
        with again.run("stage", key="other") as other:
            pass
    assert (again.run_id, stage_again.run_id) == (tracker.run_id, stage.run_id)
    assert other.run_id != stage.run_id
    client = again.client
    query = f"tags.`mlflow.parentRunId` = '{again.run_id}'"
    assert len(client.search_runs([again.experiment_id], query)) == 2
    resumed = client.get_run(stage.run_id)
    assert resumed.info.status == "FINISHED"
    assert "faculty.error" not in resumed.data.tags
    history = client.get_metric_history(stage.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(0, 2.0), (1, 1.0), (2, 0.5)]
    assert sorted(point.value for point in client.get_metric_history(stage.run_id, "best")) == [0.25, 0.5]
    assert resumed.data.metrics["best"] == 0.25
    assert resumed.data.params == {"lr": "0.1", "workers": "1"}
    assert resumed.data.tags["changed.workers"] == "2"


def test_threads_that_open_the_same_key_share_one_run(run_dir):
    seen, gate = [], threading.Barrier(4)

    def work(tracker, number):
        gate.wait()
        with tracker.run("stage", key="shared") as child:
            child.metrics({f"m{number}": number}, step=number)
            seen.append(child.run_id)

    with opened(run_dir, "threads") as tracker:
        threads = [threading.Thread(target=work, args=(tracker, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 4
    assert len(set(seen)) == 1
    assert tracker.client.get_run(seen[0]).data.metrics == {f"m{number}": number for number in range(4)}


def test_a_worker_may_be_sent_the_tracker(run_dir):
    with opened(run_dir, "sent") as tracker, tracker.run("child") as child:
        child.metrics({"loss": 1.0}, step=1)
        tracker.flush()
        copy = pickle.loads(pickle.dumps(child))
        copy.metrics({"loss": 1.0}, step=1)  # there already
        copy.metrics({"loss": 0.5}, step=2)
        copy.flush()
        assert copy.run_id == child.run_id
    assert len(tracker.client.get_metric_history(child.run_id, "loss")) == 2


def test_what_the_store_refuses_costs_one_line_and_nothing_else(run_dir, caplog):
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"), opened(run_dir, "refused") as tracker:
        tracker.client.delete_run(tracker.run_id)
        with tracker.run("lost") as lost:
            lost.metrics({"a": 1.0})
        tracker.metrics({"b": 1.0})
        tracker.flush()
        tracker.client.restore_run(tracker.run_id)
        tracker.metrics({"c": 1.0})
        with pytest.raises(FileNotFoundError):
            tracker.artifact(run_dir / "missing")
    run = tracker.client.get_run(tracker.run_id)
    assert (run.data.metrics, run.info.status) == ({"c": 1.0}, "FINISHED")
    told = [record.getMessage() for record in caplog.records]
    assert any("refused metrics b" in line for line in told)
    assert all("\n" not in line for line in told)


def test_data_sets_and_files_are_kept_as_they_were(run_dir):
    changing = run_dir / "changing.txt"
    changing.write_text("before")
    with opened(run_dir, "inputs") as tracker:
        for _ in range(2):
            tracker.dataset(
                "images", digest="f" * 64, source=f"s3://u:{SECRET}@b/i", context="training", profile={"n": 3}
            )
        tracker.artifact(changing, "folder")
        changing.unlink()
        changing.write_text("after")
        (run_dir / "tree" / "inner").mkdir(parents=True)
        (run_dir / "tree" / "inner" / "leaf").write_text("leaf")
        tracker.artifact(run_dir / "tree")
    run = tracker.client.get_run(tracker.run_id)
    (image,) = run.inputs.dataset_inputs
    assert (image.dataset.name, image.dataset.digest) == ("images", "f" * 36)
    assert image.dataset.source == '{"uri": "s3://b/i"}'
    assert image.dataset.profile == '{"n": 3}'
    assert [(tag.key, tag.value) for tag in image.tags] == [("mlflow.data.context", "training")]
    stored = run_dir / "mlartifacts" / tracker.run_id / "artifacts"
    assert (stored / "folder" / "changing.txt").read_text() == "before"
    assert (stored / "inner" / "leaf").read_text() == "leaf"
    assert not (run_dir / "tracking-journal").exists()


def test_a_deleted_experiment_is_refused_with_a_remedy(run_dir):
    with opened(run_dir, "any") as tracker:
        gone = tracker.client.create_experiment("gone")
        tracker.client.delete_experiment(gone)
    with (
        pytest.raises(ConfigError, match="'gone' was deleted"),
        open_tracker(TrackingSpec(experiment="gone"), run_dir, name="run"),
    ):
        pytest.fail("the block must not be entered")


def test_an_outage_costs_one_warning_and_no_time(caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as closed, caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        closed.bind(("127.0.0.1", 0))
        uri = f"http://u:{SECRET}@127.0.0.1:{closed.getsockname()[1]}"
        tracker = MlflowTracker(uri, "0" * 32, "1", timeout=0.1)
        tracker.metrics({"a": 1.0})
        tracker.tags({"a": 1})
        with tracker.run("child") as child:
            child.params({"a": 1})
        with pytest.raises(StageError, match="does not answer, and 5 records wait"):
            for _ in range(100):  # only an attempt that failed tells that nobody is there
                tracker.flush()
        assert tracker.close() == 5
    assert [record.levelname for record in caplog.records if record.name == "pipeline.tracking"] == ["WARNING"]
    assert "does not answer" in caplog.text
    assert SECRET not in caplog.text
    assert SECRET not in repr(tracker)
