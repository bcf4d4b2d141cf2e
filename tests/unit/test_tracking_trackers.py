import json
import os
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import Interrupted, UserError
from pipeline.tracking.connect import check_server, open_tracker
from pipeline.tracking.jsonlines import JsonLinesTracker, read_events
from pipeline.tracking.spec import TrackingSpec
from pipeline.tracking.tracker import NoTracker, Tracker

SECRET = "sentinel-7f3a"


def test_no_tracker_takes_everything_and_is_its_own_child():
    tracker = NoTracker()
    assert isinstance(tracker, Tracker)
    with tracker.run("child", key="k", tags={"a": 1}, params={"b": 2}) as child:
        child.params({"a": object()})
        child.metrics({"a": 1.0}, step=3)
        child.tags({"a": 1})
        child.artifact("nowhere")
        child.document("d", {})
        child.table("t", [])
        child.dataset("d", digest="f", source="s", context="training")
        child.flush()
        assert child is tracker
    assert (tracker.run_id, tracker.uri) == (None, None)


def test_json_lines_hold_what_was_recorded(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    path = tmp_path / "sub" / "tracking.jsonl"
    with JsonLinesTracker.root(path, "run", key="r", tags={"t": 1}) as tracker:
        assert isinstance(tracker, Tracker)
        tracker.params({"a": {"b": f"http://u:{SECRET}@h"}})
        tracker.metrics({"loss": 0.5, "bad": float("inf")}, step=2)
        tracker.artifact(tmp_path / "file.txt", "folder")
        tracker.table("rows", [{"x": 1}])
        tracker.dataset("images", digest="f0", source=f"s3://u:{SECRET}@b", context="test", profile={"n": 3})
        tracker.flush()
        with pytest.raises(FileNotFoundError):
            tracker.artifact(tmp_path / "missing")
    events = list(read_events(path))
    assert [event["event"] for event in events] == [
        "start",
        "tags",
        "params",
        "metrics",
        "artifact",
        "table",
        "dataset",
        "end",
    ]
    assert events[2]["values"] == {"a.b": "http://h"}
    assert (events[3]["step"], events[3]["values"]) == (2, {"loss": 0.5, "bad": None})
    assert events[5]["data"] == {"columns": ["x"], "data": [[1]]}
    found = {key: events[6][key] for key in ("name", "digest", "source", "context", "profile")}
    assert found == {"name": "images", "digest": "f0", "source": "s3://b", "context": "test", "profile": {"n": 3}}
    assert {event["run"] for event in events} == {tracker.run_id}
    assert SECRET not in path.read_text()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("no"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(3), "KILLED"),
        (Interrupted("notice"), "KILLED"),
    ],
)
def test_a_run_ends_as_its_block_does(tmp_path, error, status):
    def body():
        with JsonLinesTracker.root(tmp_path / "t.jsonl", "run") as root, root.run("child"):
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    ends = [event for event in read_events(tmp_path / "t.jsonl") if event["event"] == "end"]
    assert [event["status"] for event in ends] == [status, status]
    assert ends[0]["reason"] == ("ValueError: no" if status == "FAILED" else ends[0]["reason"])


def test_json_lines_continue_a_run_by_key_and_survive_a_torn_line(tmp_path):
    path = tmp_path / "t.jsonl"
    with pytest.raises(RuntimeError), JsonLinesTracker.root(path, "run", key="r") as first:
        with first.run("stage", key="s") as stage:
            stage.metrics({"a": 1})
        raise RuntimeError
    with path.open("a") as file:
        file.write('{"time": 1, "run": "x", "event": "metr')
    with JsonLinesTracker.root(path, "run", key="r") as again:
        assert again.run_id == first.run_id
        with again.run("stage", key="s") as stage_again, again.run("stage", key="other") as other:
            assert stage_again.run_id == stage.run_id
            assert other.run_id != stage.run_id
            with other.run("stage", key="s") as elsewhere:  # the same key under another parent is another run
                assert elsewhere.run_id != stage.run_id
    lines = path.read_text().splitlines()
    unreadable = [line for line in lines if not _parses(line)]
    assert unreadable == ['{"time": 1, "run": "x", "event": "metr']
    assert len(list(read_events(path))) == len(lines) - 1


def test_json_lines_from_threads_and_pickles_do_not_interleave(tmp_path):
    path = tmp_path / "t.jsonl"
    with JsonLinesTracker.root(path, "run") as tracker, ThreadPoolExecutor(8) as pool:
        copy = pickle.loads(pickle.dumps(tracker))
        assert copy.run_id == tracker.run_id
        list(pool.map(lambda i: (tracker if i % 2 else copy).metrics({"m": i, "pad": 0}, step=i), range(200)))
    steps = [event["step"] for event in read_events(path) if event["event"] == "metrics"]
    assert sorted(steps) == list(range(200))


def test_open_tracker_without_mlflow(tmp_path):
    with open_tracker(TrackingSpec(enabled=False), tmp_path, name="run") as tracker:
        assert isinstance(tracker, NoTracker)
    assert not os.listdir(tmp_path)
    with open_tracker(TrackingSpec(uri="jsonl"), tmp_path, name="run", key="k", params={"a": 1}) as tracker:
        assert tracker.uri == str(tmp_path / "tracking.jsonl")
    assert [event["event"] for event in read_events(tmp_path / "tracking.jsonl")] == ["start", "params", "end"]


def test_a_server_that_is_not_there_is_a_user_error_without_credentials(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        uri = f"http://someone:{SECRET}@127.0.0.1:{port}"
        with (
            pytest.raises(
                UserError, match=rf"tracking server http://127.0.0.1:{port} .*no connection; start it"
            ) as caught,
            open_tracker(TrackingSpec(uri=uri, timeout=5), tmp_path, name="run"),
        ):
            pytest.fail("the block must not be entered")
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_a_server_that_never_answers_is_a_user_error():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match=r"no answer within 0\.3 s"):
            check_server(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.3)


def _parses(line):
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True
