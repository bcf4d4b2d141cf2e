"""The journal and the thread that sends it, against a store that fails as a network does."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace as Simple

import pytest
from mlflow.exceptions import MlflowException

from pipeline.errors import StageError
from pipeline.tracking import sender as sending
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.journal import Journal
from pipeline.tracking.sender import Sender

STORE = "http://host"


class Store:
    """What MLflow's store does with the calls a sender makes; `fault` may raise before or after each."""

    def __init__(self):
        self.runs, self.points, self.files, self.calls = {}, {}, [], []
        self.fault = lambda name, after: None

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments, **named):
            self.fault(name, after=False)
            self.calls.append(name)
            found = getattr(self, f"_{name}")(*arguments, **named)
            self.fault(name, after=True)
            return found

        return call

    def _search_experiments(self, max_results):
        return []

    def _search_runs(self, experiments, query, order_by, max_results):
        return [run for run in self.runs.values() if run.data.tags.get("faculty.key", "?") in query]

    def _create_run(self, experiment, start_time, tags, run_name):
        run = Simple(
            info=Simple(run_id=f"{len(self.runs):032x}", status="RUNNING"), data=Simple(params={}, tags=dict(tags))
        )
        self.runs[run.info.run_id] = run
        return run

    def _update_run(self, run_id, status):
        self.runs[run_id].info.status = status

    def _delete_tag(self, run_id, name):
        del self.runs[run_id].data.tags[name]

    def _get_run(self, run_id):
        return self.runs[run_id]

    def _get_metric_history(self, run_id, name):
        return [
            Simple(step=step, value=value) for run, key, _, step, value in self.points if (run, key) == (run_id, name)
        ]

    def _log_batch(self, run_id, metrics, params, tags):
        if any(metric.key == "bad" for metric in metrics):
            raise MlflowException("bad is not admitted", error_code=1000)  # INVALID_PARAMETER_VALUE
        for param in params:
            assert self.runs[run_id].data.params.setdefault(param.key, param.value) == param.value
        self.runs[run_id].data.tags |= {tag.key: tag.value for tag in tags}
        for metric in metrics:  # MLflow's key of a point: the same one again changes nothing
            self.points[run_id, metric.key, metric.timestamp, metric.step, metric.value] = None

    def _log_artifacts(self, run_id, path, folder):
        self.files.append((run_id, sorted(file.name for file in Path(path).iterdir()), folder))

    def _log_dict(self, run_id, data, name):
        self.files.append((run_id, name, json.dumps(data)))

    def _set_terminated(self, run_id, status, end_time):
        self.runs[run_id].info.status = status

    def series(self, run_id, name):
        return [(step, value) for run, key, _, step, value in self.points if (run, key) == (run_id, name)]


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(sending, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(sending, "_LONGEST_PAUSE_S", 0.01)
    found = Store()
    found._create_run("0", 0, {}, "root")
    return found


ROOT = "0" * 32


def sender(store, folder=None):
    journal = None if folder is None else Journal.create(folder, STORE)
    left = () if folder is None else tuple(Journal.left(folder, STORE))
    made = Sender(Delivery(lambda: store, "1", {ROOT: False}, "user"), STORE, journal=journal, left=left)
    made.start()
    return made


def opened(run, key, parent=ROOT):
    return {"do": "open", "run": run, "parent": parent, "name": key, "key": key, "time": 1}


def metrics(run, step, time=None, **values):
    return {"do": "metrics", "run": run, "values": values, "step": step, "time": 1000 + step if time is None else time}


def end(run, status="FINISHED"):
    return {"do": "end", "run": run, "status": status, "time": 5}


def killed(one):
    """Do to a sender what the end of its process does."""
    with one._changed:
        one._abandoned = True
        one._changed.notify_all()
    if one._thread is not None:
        one._thread.join()
    for journal in [*one._former, one._journal]:
        journal.close()


def down(name, after):
    raise MlflowException("API request to http://host/api failed with exception: refused")


def test_numbers_that_stand_together_are_one_request(store):
    gate = threading.Event()
    store.fault = lambda name, after: gate.wait()
    one = sender(store)
    for step in range(300):
        one.put(metrics(ROOT, step, a=1.0, b=2.0))
    one.put({"do": "tags", "run": ROOT, "values": {"t": "1"}})
    gate.set()
    assert one.close(5) == 0
    assert len(store.calls) <= 2  # some went ahead, the rest of 600 numbers in one
    assert store.series(ROOT, "a") == [(step, 1.0) for step in range(300)]


def test_a_store_that_comes_back_gets_all_in_order(store, tmp_path, caplog):
    store.fault = down
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        one = sender(store, tmp_path / "journal")
        started = time.monotonic()
        one.put(opened("c", "stage"))
        for step in range(50):
            one.put(metrics("c", step, loss=float(step)))
        one.put(end("c"))
        assert time.monotonic() - started < 5  # nobody waited for the store
        with pytest.raises(StageError, match="has no such run yet"):
            one.id_of("c", 0.05)
        assert not one.flush(0.05)
        store.fault = lambda name, after: None
        assert one.id_of("c", 10) == f"{1:032x}"
        assert one.close(10) == 0
    run = store.runs[f"{1:032x}"]
    assert run.info.status == "FINISHED"
    assert store.series(run.info.run_id, "loss") == [(step, float(step)) for step in range(50)]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "MLflow at http",
        "MLflow at http",
    ]  # gone, and back
    assert not (tmp_path / "journal").exists()


def test_one_bad_record_is_left_out_alone(store, caplog):
    gate = threading.Event()
    store.fault = lambda name, after: gate.wait()
    one = sender(store)
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        for step, name in enumerate(("first", "good", "bad", "better")):
            one.put(metrics(ROOT, step, **{name: 1.0}))
        gate.set()
        assert one.close(5) == 0
    assert {key for _, key, *_ in store.points} == {"first", "good", "better"}
    assert [record.getMessage() for record in caplog.records] == [
        "MLflow at http://host refused metrics bad: bad is not admitted"
    ]


def test_a_record_the_store_stumbles_over_is_given_up_and_an_outage_is_not(store):
    def stumbles(name, after):
        if name == "set_terminated":
            raise MlflowException("internal")  # INTERNAL_ERROR, as of a store without its database

    store.fault = stumbles
    one = sender(store)
    one.put(end(ROOT))
    one.put(metrics(ROOT, 0, a=1.0))
    assert one.close(5) == 0
    assert store.series(ROOT, "a") == [(0, 1.0)]

    store.fault = down
    other = sender(store)
    other.put(metrics(ROOT, 1, a=2.0))
    time.sleep(0.3)  # dozens of attempts
    assert other.waiting == 1
    store.fault = lambda name, after: None
    assert other.close(5) == 0
    assert store.series(ROOT, "a") == [(0, 1.0), (1, 2.0)]


def test_files_that_can_not_be_stored_do_not_hold_up_the_numbers(store, tmp_path):
    file = tmp_path / "file"
    file.write_text("as it was")
    full = True

    def fault(name, after):
        if full and name in ("log_artifacts", "log_dict"):
            raise OSError("no space left")

    store.fault = fault
    one = sender(store, tmp_path / "journal")
    one.put({"do": "artifact", "run": ROOT, "name": "file", "path": one.keep(file), "folder": "f"})
    one.put({"do": "document", "run": ROOT, "name": "d.json", "data": {"x": 1}})
    file.unlink()
    one.put(metrics(ROOT, 0, a=1.0))
    one.put(end(ROOT))
    while store.runs[ROOT].info.status != "FINISHED":
        time.sleep(0.01)
    assert one.waiting == 2
    assert one.close(0.1) == 2

    full = False
    two = sender(store, tmp_path / "journal")
    assert two.close(5) == 0
    assert sorted(store.files, key=str) == [(ROOT, "d.json", '{"x": 1}'), (ROOT, ["file"], "f")]
    assert store.series(ROOT, "a") == [(0, 1.0)]
    assert not (tmp_path / "journal").exists()


def test_a_journal_belongs_to_its_store_and_to_whoever_lives(tmp_path):
    folder = tmp_path / "journal"
    script = (
        "import sys, time\n"
        "from pipeline.tracking.journal import Journal\n"
        "journal = Journal.create(sys.argv[1], 'http://host')\n"
        "journal.append({'do': 'tags', 'run': 'r', 'values': {'é': '\\ud800'}})\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert not Journal.waiting(folder, STORE)  # its writer lives
        finally:
            process.kill()
    assert not Journal.waiting(folder, "http://elsewhere")
    assert Journal.waiting(folder, STORE)
    (path,) = folder.glob("*.jsonl")
    with path.open("ab") as file:
        file.write(b'{"do": "tags", "run": "r", "val')  # torn
    (left,) = Journal.left(folder, STORE)
    assert [record["values"] for record, _, _ in left.records()] == [{"é": "?"}]
    left.remove()
    assert not folder.exists()


def test_a_folder_that_can_not_be_written_ends_nothing(store, tmp_path, caplog):
    (tmp_path / "taken").write_text("a file")
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        one = sender(store, tmp_path / "taken" / "journal")
        one.put(metrics(ROOT, 0, a=1.0))
        assert one.close(5) == 0
    assert store.series(ROOT, "a") == [(0, 1.0)]
    assert "records wait in memory alone" in caplog.text


@pytest.mark.parametrize("seed", range(12))
def test_however_often_it_fails_or_is_killed_the_store_ends_up_the_same(store, tmp_path, seed, caplog):
    """Calls fail before or after they took effect, processes die anywhere; epochs are reported again after a death."""
    chance = random.Random(seed)
    lock = threading.Lock()

    def fault(name, after):
        with lock:
            if chance.random() < 0.3:
                raise MlflowException("API request to http://host failed with exception lost")

    store.fault = fault
    epoch, deaths = 0, 0
    while epoch < 20:
        one = sender(store, tmp_path / "journal")
        run = f"handle{deaths}"
        one.put(opened(run, "stage"))
        one.put({"do": "params", "run": run, "values": {"lr": "1"}})
        while epoch < 20:
            one.put(metrics(run, epoch, time=100 * deaths + epoch, loss=float(epoch), speed=chance.random()))
            epoch += 1
            if chance.random() < 0.2 and deaths < 4:
                time.sleep(0.02 * chance.random())
                killed(one)
                deaths, epoch = deaths + 1, max(epoch - 2, 0)
                break
        else:
            one.put(end(run))
            assert one.close(20) == 0
    (stage,) = [run for run in store.runs.values() if run.data.tags.get("faculty.key") == "stage"]
    assert stage.info.status == "FINISHED"
    assert stage.data.params == {"lr": "1"}
    assert sorted(store.series(stage.info.run_id, "loss")) == [(step, float(step)) for step in range(20)]
    assert sorted(step for step, _ in store.series(stage.info.run_id, "speed")) == list(range(20))
    assert not (tmp_path / "journal").exists()
    assert "refused" not in caplog.text
