"""What pipeline.cluster does without a cluster."""

import errno
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import torch

from pipeline.cluster.causes import is_death, is_memory, one_line, root_cause, training_line
from pipeline.cluster.inline import bounds, fit_inline
from pipeline.cluster.many import FitJob, fit_many
from pipeline.cluster.measure import Meter
from pipeline.cluster.spec import ClusterSpec
from pipeline.cluster.train import fit
from pipeline.engine.checkpoint import MANIFEST, CheckpointStore
from pipeline.engine.context import LocalContext, store_checkpoint
from pipeline.errors import ConfigError, Interrupted, StageError
from pipeline.strict import validate

pytestmark = pytest.mark.integration


def folder_with(path, text):
    path.mkdir()
    (path / "inner").mkdir()
    (path / "inner" / "weights").write_text(text)
    return path


def test_only_a_checkpoint_with_all_its_bytes_is_whole(tmp_path):
    store = CheckpointStore(str(tmp_path / "runs"), "run")
    assert store.newest() is None
    for index in range(3):
        store.save(folder_with(tmp_path / f"s{index}", "x" * (index + 1)), {"step": index}, index)
    assert [saved.metrics["step"] for saved in store.whole()] == [0, 1, 2]
    newest = Path(store.path(store.newest().name))
    (newest / "inner" / "weights").write_text("xx")  # one byte short
    assert store.newest().index == 1
    (Path(store.path(store.newest().name)) / MANIFEST).write_text('{"files": {')
    assert store.newest().index == 0


def test_tidy_keeps_the_newest_whole_ones_and_what_is_not_a_checkpoint(tmp_path):
    store = CheckpointStore(str(tmp_path), "run")
    names = [store.save(folder_with(tmp_path / f"s{i}", "x"), {}, i).name for i in range(4)]
    (tmp_path / "run" / names[3] / "inner" / "weights").unlink()
    (tmp_path / "run" / "checkpoint_manager_snapshot.json").write_text("{")
    (tmp_path / "run" / "notes").write_text("keep me")
    store.tidy(2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([names[1], names[2], "notes"])


def test_a_uri_serves_like_a_folder(tmp_path):
    store = CheckpointStore(f"file://{tmp_path}", "run")
    saved = store.save(folder_with(tmp_path / "s", "hello"), {"loss": 0.5}, 3)
    assert store.newest() == saved
    assert store.path(saved.name) == f"file://{tmp_path}/run/{saved.name}"
    with store.local(saved.name) as folder:
        assert (folder / "inner" / "weights").read_text() == "hello"


def count(context, payload):
    with context.restore() as folder:
        start = int((folder / "step").read_text()) if folder else 0
    for step in range(start, payload["steps"]):
        if step == payload.get("fail_at"):
            raise ValueError("temperature must be > 0, got -1")
        scratch = Path(payload["scratch"]) / str(step)
        scratch.mkdir(parents=True)
        (scratch / "step").write_text(str(step + 1))
        context.report({"step": step, "start": start}, scratch)


def test_no_workers_train_here_and_resume(tmp_path):
    heard = []
    options = {"num_workers": 0, "storage": str(tmp_path / "runs"), "name": "run", "on_report": heard.append}
    with pytest.raises(StageError, match="ValueError: temperature must be > 0, got -1"):
        fit(count, {"steps": 5, "fail_at": 3, "scratch": str(tmp_path / "a")}, **options)
    assert "in count" in (tmp_path / "runs" / "run" / "error.log").read_text()
    outcome = fit(count, {"steps": 5, "scratch": str(tmp_path / "b")}, **options)
    assert [(report["step"], report["start"]) for report in heard] == [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3)]
    assert (Path(outcome.checkpoint) / "step").read_text() == "5"
    assert len(list((tmp_path / "runs" / "run").glob("checkpoint_*"))) == 2
    again = fit(count, {"steps": 5, "scratch": str(tmp_path / "c")}, **options)
    assert again == outcome
    assert len(heard) == 5


class HeldBack(CheckpointStore):
    """Stores nothing before it is let."""

    def __init__(self, *place):
        super().__init__(*place)
        self.go = Event()
        self.begun = []

    def save(self, folder, metrics, index):
        self.begun.append(index)
        assert self.go.wait(60)
        return super().save(folder, metrics, index)


def test_a_checkpoint_is_stored_while_the_loop_goes_on(tmp_path):
    store = HeldBack(str(tmp_path), "run")
    told = []
    with LocalContext(store, lambda metrics: told.append(metrics["step"]), torch.device("cpu")) as context:
        folder = folder_with(tmp_path / "s0", "x")
        context.report({"step": 0}, folder)
        context.report({"step": 1})
        assert told == [0, 1]  # at once, and in order
        assert not folder.exists()  # taken over
        assert store.newest() is None  # on its way, it does not count
        store.go.set()
        context.report({"step": 2}, folder_with(tmp_path / "s2", "x"))
        assert store.whole()[0].metrics == {"step": 0}  # the second one has waited for the first
    assert store.begun == [0, 1]
    assert [saved.metrics["step"] for saved in store.whole()] == [0, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # and deleted


class Full(CheckpointStore):
    """Fails in the middle of a copy."""

    error = OSError(errno.ENOSPC, "Error writing bytes to file")

    def save(self, folder, metrics, index):
        if index == 1:
            partial = Path(self.root) / f"checkpoint_{index:06d}-abcdef"
            partial.mkdir(parents=True)
            (partial / "weights").write_text("ha")
            raise self.error
        return super().save(folder, metrics, index)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_names_the_folder(tmp_path):
    store = Full(str(tmp_path), "run")
    context = LocalContext(store, device=torch.device("cpu"))
    context.report({"step": 0}, folder_with(tmp_path / "s0", "x"))
    context.report({"step": 1}, folder_with(tmp_path / "s1", "x"))
    with pytest.raises(StageError, match=rf"checkpoint 1 can't be stored in {tmp_path}/run: No space left on device"):
        context.close()
    [left] = (tmp_path / "run").iterdir()
    assert store.newest().name == left.name
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_network_may_be_away_for_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.engine.context._PAUSES", (0.0, 0.0))
    store = Full(str(tmp_path), "run")
    tries = []

    def save(folder, metrics, index):
        tries.append(index)
        if len(tries) < 3:
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation")
        return CheckpointStore.save(store, folder, metrics, index)

    monkeypatch.setattr(store, "save", save)
    assert store_checkpoint(store, folder_with(tmp_path / "s", "x"), {}, 7) == store.newest()
    tries.clear()
    monkeypatch.setattr("pipeline.engine.context._PAUSES", (0.0,))
    with pytest.raises(StageError, match=r"checkpoint 8 can't be stored .* NETWORK_CONNECTION"):
        store_checkpoint(store, folder_with(tmp_path / "s", "x"), {}, 8)
    assert len(tries) == 2 and len(store.whole()) == 1


def end_on_term(context, payload):
    assert not context.leaving()
    for step in range(3):
        if step == payload["term_at"]:
            signal.raise_signal(signal.SIGTERM)
            assert context.leaving()
        (Path(payload["scratch"]) / "s").mkdir(parents=True)
        (Path(payload["scratch"]) / "s" / "step").write_text(str(step + 1))
        context.report({"step": step}, Path(payload["scratch"]) / "s")


def test_sigterm_stores_a_checkpoint_and_ends_the_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    options = {"storage": str(tmp_path / "runs"), "name": "run", "on_term": True}
    with pytest.raises(Interrupted, match="SIGTERM"):
        fit_inline(end_on_term, {"term_at": 1, "scratch": str(tmp_path)}, **options)
    assert signal.getsignal(signal.SIGTERM) == before
    assert CheckpointStore(str(tmp_path / "runs"), "run").newest().metrics == {"step": 1}
    fit_inline(end_on_term, {"term_at": None, "scratch": str(tmp_path)}, **options)
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_all_the_runs_of_a_call(tmp_path):
    runs = [FitJob(name, {"term_at": term, "scratch": str(tmp_path)}) for name, term in (("a", 1), ("b", None))]
    options = {"num_workers": 0, "storage": str(tmp_path / "runs"), "on_term": True}
    with pytest.raises(Interrupted, match="SIGTERM"):
        fit_many(end_on_term, runs, **options)
    assert CheckpointStore(str(tmp_path / "runs"), "a").newest().metrics == {"step": 1}
    assert CheckpointStore(str(tmp_path / "runs"), "b").newest() is None
    runs[0].payload["term_at"] = None
    assert [error for _, error in fit_many(end_on_term, runs, **options)] == [None, None]


def need_memory(context, payload):
    assert (context.last_failure, context.memory_failures) == payload["known"]
    if payload["short"]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_short_memory_is_named_with_its_remedy_and_remembered(tmp_path):
    options = {"num_workers": 0, "storage": str(tmp_path), "name": "run"}
    for known in ((None, 0), ("memory", 1)):
        with pytest.raises(StageError, match=r"out of memory .*; raise distill\.loop\.parts") as caught:
            fit(need_memory, {"short": True, "known": known}, **options)
        assert "\n" not in str(caught.value)
    fit(need_memory, {"short": False, "known": ("memory", 2)}, **options)
    fit(need_memory, {"short": False, "known": (None, 0)}, **options)


def test_short_memory_is_known_by_its_type_or_its_text():
    import ray

    class WorkerHealthCheckFailedError(Exception):
        def __init__(self, failure):
            self.health_check_failure = failure

    killed = WorkerHealthCheckFailedError(ray.exceptions.OutOfMemoryError("the node ran low"))
    assert is_memory(killed) and is_death(killed)
    assert "its node ran out of memory" in one_line(killed)
    on_gpu = torch.OutOfMemoryError("CUDA out of memory.")
    assert is_memory(on_gpu) and not is_death(on_gpu)
    assert is_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"))
    assert is_memory(MemoryError())
    died = WorkerHealthCheckFailedError(ray.exceptions.ActorDiedError())
    assert is_death(died) and not is_memory(died)
    assert one_line(died).startswith("the worker process died")
    assert not is_memory(RuntimeError("Connection closed by peer")) and not is_memory(ValueError("out of memory"))
    assert training_line(ValueError("temperature")) == "ValueError: temperature"


def test_a_storage_that_can_not_be_used_is_named(tmp_path):
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(StageError, match=rf"the storage {tmp_path}/run can't be used: "):
        fit(count, {"steps": 1}, num_workers=0, storage=str(tmp_path), name="run")


def test_a_cause_is_found_beneath_its_wrappers():
    class Wrapper(Exception):
        pass

    class RayActorError(Exception):
        pass

    group, task, origin = Wrapper("60 lines"), Wrapper("more"), KeyError("logits")
    task.cause = origin
    group.worker_failures = {0: task}
    assert root_cause(group) is origin
    assert one_line(group) == "KeyError: 'logits'"
    group.worker_failures = {0: task, 1: RayActorError("actor died")}
    assert one_line(group).startswith("the worker process died")
    assert one_line(StageError("as it is")) == "as it is"


def test_a_meter_forgets_the_peak_before_it():
    with Meter() as large:
        held = bytearray(150 * 2**20)
    del held
    with Meter() as small:
        pass
    assert large.peak_mb - small.peak_mb == pytest.approx(150, abs=15)


def test_the_settings_are_strict():
    assert ClusterSpec().local
    assert not validate(ClusterSpec, {"address": "auto"}, where="run.yaml").local
    with pytest.raises(ConfigError, match=r"did you mean `num_cpus`"):
        validate(ClusterSpec, {"num_cpu": 4}, where="run.yaml")
    with pytest.raises(ConfigError, match=r"address.*empty"):
        validate(ClusterSpec, {"address": " "}, where="run.yaml")
    with pytest.raises(ConfigError, match="num_workers must be >= 0"):
        fit(count, {}, num_workers=-1, storage="x", name="y")
    for refused in ((0, 2), (3, 2)):
        with pytest.raises(ConfigError, match="1 <= fewest <= most"):
            fit(count, {}, num_workers=refused, storage="x", name="y")
    assert bounds(3) == (3, 3) and bounds((2, 5)) == (2, 5)


def test_the_inline_half_imports_neither_ray_nor_torch():
    modules = ["engine.checkpoint", *(f"cluster.{name}" for name in ("spec", "inline", "train", "causes", "measure"))]
    code = "import sys\n" + "".join(f"import pipeline.{name}\n" for name in modules)
    code += "print(sorted({'ray', 'torch', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
