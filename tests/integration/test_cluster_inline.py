"""What pipeline.cluster does without a cluster."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.causes import one_line, root_cause
from pipeline.cluster.measure import Meter
from pipeline.cluster.spec import ClusterSpec
from pipeline.cluster.train import fit
from pipeline.engine.checkpoint import MANIFEST, CheckpointStore
from pipeline.errors import ConfigError, StageError
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


def test_the_inline_half_imports_neither_ray_nor_torch():
    modules = ["engine.checkpoint", *(f"cluster.{name}" for name in ("spec", "inline", "train", "causes", "measure"))]
    code = "import sys\n" + "".join(f"import pipeline.{name}\n" for name in modules)
    code += "print(sorted({'ray', 'torch', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
