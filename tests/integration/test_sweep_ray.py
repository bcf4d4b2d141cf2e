"""Sweeps on one real Ray with two processors: trials that drive workers of their own, and what is left of them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from ray._private.state import actors
from rich.console import Console

from pipeline.errors import Interrupted
from pipeline.report.console import Display
from pipeline.settings_files import apply, load_settings
from pipeline.stages import sweep_trials
from pipeline.stages.base import Run
from pipeline.stages.run import run_pipeline, show_status
from pipeline.stages.sweep import sweep
from pipeline.stages.sweep_assess import faculty_scores
from pipeline.stages.sweep_fit import _Fleet
from tests import tiny
from tests.inprocess import without_ray
from tests.recorder import Recorder
from tests.unit.test_stages_remote import Machine

pytestmark = pytest.mark.integration

LR = "distill.loop.optim.lr"
# The first learns, those next to nothing can't, and one is thrown off at once.
RATES = [1e-2, 1e-9, 1e38, 2e-9, 5e-3, 3e-9]


def settings_of(folder, *overrides, **swept):
    loaded = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(loaded | {"sweep": swept}), encoding="utf-8")
    return load_settings([folder / "sweep.yaml"], [f"run_dir={folder / 'run'}", *overrides])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run whose teachers have said all they know: images to amalgamate are done."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny.make_data(folder, per_class=60)
    tiny.make_zoo(folder, ("flat", "solid", "mixed"))
    tiny.make_settings(
        folder,
        tracking={"enabled": False},
        register={"enabled": False},
        distill={
            "student": {"name": "mlp", "kwargs": {"width": 16}},
            "loop": {"epochs": 3, "batch_size": 32, "labelled_batch": 16},
            "guard": None,
            "resources": {"num_workers": 0},
        },
    )
    with without_ray():  # teachers are run in this process: what is tested comes after that
        run_pipeline(load_settings([folder / "run.yaml"]), until="amalgamate", display=quiet())
    return folder


@pytest.fixture
def world(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "world")
    return tmp_path / "world"


def quiet():
    return Display(Console(file=io.StringIO(), width=200, record=True))


def left():
    """Return the actors and placement groups that are there once everything that ends has had time to.

    Ray Data's coordinator, of which a cluster has one for good, may be there from the tests of another module.
    """
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
        alive = {one["ActorClassName"] for one in actors().values() if one["State"] != "DEAD"}
        alive -= {"_AutoscalingCoordinatorActor"}
        if not groups and not alive and ray.available_resources().get("CPU") == 2:
            return []
        time.sleep(0.2)
    return groups + sorted(alive) or [ray.available_resources()]


@pytest.fixture(scope="module")
def nested(cluster, prepared, tmp_path_factory):
    """Six trials, each with a worker that takes a whole processor, on two processors."""
    folder = tmp_path_factory.mktemp("nested") / "world"
    shutil.copytree(prepared, folder)
    settings = settings_of(
        folder,
        "distill.resources.num_workers=1",
        space={LR: RATES},
        metric="validation_nll",
        search="grid",
        scheduler={"asha": {"grace": 1, "reduction": 2}},
        promote=False,
    )
    store, display = Recorder("store"), quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pipeline.tracking.connect.open_tracker",
            lambda *arguments, key, name, tags, params, **how: store.run(name, key=key, tags=tags, params=params),
        )
        swept = sweep(settings, display=display)
    return folder, settings, swept, store, display.console.export_text(), left()


def test_nested_trials_neither_starve_nor_leave_anything(nested):
    _, _, swept, _, text, leaks = nested
    assert len(swept.rows) == len(RATES) and leaks == []
    assert "2 trials side by side" in text and "trials 6/6" in text
    assert all(row.seconds > 0 for row in swept.rows if row.state != "failed")


def test_a_trial_that_fails_is_a_row(nested):
    _, _, swept, _, text, _ = nested
    [failed] = [row for row in swept.rows if row.values[LR] == 1e38]
    assert (failed.state, failed.metric) == ("failed", None) and "must be finite" in failed.error
    assert "Traceback" in (swept.folder / "trials" / failed.trial / "error.log").read_text(encoding="utf-8")
    assert f"trial {failed.trial} failed: " in text
    assert len([row for row in swept.rows if row.state == "failed"]) == 1


def test_the_worse_ones_end_early_and_the_best_is_one_that_learns(nested):
    _, _, swept, _, _, _ = nested
    by_rate = {row.values[LR]: row for row in swept.rows}
    assert {by_rate[2e-9].state, by_rate[3e-9].state} == {"stopped"}
    assert by_rate[3e-9].epochs < 3 and by_rate[1e-2].epochs == 3 and by_rate[1e-2].state == "done"
    assert swept.best.values[LR] in (1e-2, 5e-3)
    assert [epoch for epoch, _ in by_rate[1e-2].curve] == [1, 2, 3]
    # What the student was worth on the way, on its worker, is what its stored predictions say at the end.
    assert by_rate[1e-2].curve[-1][1] == pytest.approx(by_rate[1e-2].metric, rel=1e-5)


def test_table_overlay_and_pictures_are_written(nested):
    folder, _, swept, _, _, _ = nested
    table = pq.read_table(swept.folder / "trials.parquet").to_pylist()
    assert table[0]["trial"] == swept.best.trial and table[-1]["state"] == "failed"
    best = load_settings([folder / "run.yaml", swept.folder / "best.yaml"])
    assert best.distill.loop.optim.lr == swept.best.values[LR]
    told = json.loads((swept.folder / "importance.json").read_text(encoding="utf-8"))
    assert told["epoch"] == 1 and told["trials"] == 5  # where all but the one that failed have been
    assert {path.name for path in swept.folder.glob("parallel.*")} == {"parallel.svg", "parallel.png"}
    assert not list((folder / "run" / "ray").glob("*sweep*/checkpoint_*"))  # of trials that have ended


def test_each_trial_is_a_run_beneath_the_sweep(nested):
    _, _, swept, store, _, _ = nested
    [root] = store.children.values()
    parent = root.children[f"sweep-{swept.folder.name}"]
    assert parent.status == "FINISHED" and parent.tags_["best"] == swept.best.trial
    assert {"trials.parquet", "best.yaml", "parallel.png", "sweep.yaml"} <= set(parent.files)
    children = {child.tags_["trial"]: child for child in parent.children.values()}
    assert set(children) == {row.trial for row in swept.rows}
    for row in swept.rows:
        child = children[row.trial]
        assert child.tags_["state"] == row.state and child.status == ("FAILED" if row.error else "FINISHED")
        assert float(child.params_[LR]) == row.values[LR]
        assert sorted(child.points.get("validation_nll", {})) == [epoch for epoch, _ in row.curve]


def test_an_interrupted_sweep_goes_on(cluster, world):
    space = {LR: [1e-2, 5e-3, 2e-3], "distill.loop.epochs": [40]}
    settings = settings_of(world, space=space, search="grid", max_concurrent=1)

    def interrupt():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list((world / "run" / "sweep").glob("*/trials/*/row.json")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match=r"[12] of 3 trials have ended and are kept in .*, the same command goes on"):
        sweep(settings, display=quiet())
    thread.join()
    assert left() == []
    [folder] = (world / "run" / "sweep").iterdir()
    rows = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/row.json")}
    assert 1 <= len(rows) < 3
    junk = world / "run" / "ray" / ".sweep-0badc0de"
    junk.mkdir(parents=True)
    (junk / "tuner.pkl").write_bytes(b"\x80\x05\x95")  # Tune's state, cut off
    swept = sweep(settings, display=quiet())
    assert [row.state for row in swept.rows] == ["done"] * 3
    assert {path: path.stat().st_mtime_ns for path in rows} == rows
    assert left() == [] and not junk.exists()
    # The best one is the run's student: what comes after finds it there.
    [state] = [one for one in show_status(best_of(world, swept), until="distill", display=quiet())][-1:]
    assert (state.stage, state.state) == ("distill", "fresh")
    summary = json.loads(next((world / "run" / "distill").glob("*/stage.json")).read_text(encoding="utf-8"))["summary"]
    assert summary["validation_accuracy"] == swept.best.metric
    # A row that was cut off is made anew from the student, which is there; nothing is trained.
    path = swept.folder / "trials" / swept.best.trial / "row.json"
    path.write_text(path.read_text(encoding="utf-8")[:40], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "open_cluster", lambda self: pytest.fail("something was to be run"))
        again = sweep(settings, display=quiet())
    assert (again.best.trial, again.best.metric) == (swept.best.trial, swept.best.metric)


def best_of(world, swept):
    return load_settings([world / "run.yaml", swept.folder / "best.yaml"], [f"run_dir={world / 'run'}"])


def test_settings_of_the_assessment_are_swept_without_a_forward_pass(prepared, tmp_path, monkeypatch):
    world = tmp_path / "world"
    shutil.copytree(prepared, world)

    def refuse(*arguments, **how):
        raise AssertionError("a teacher was to be run")

    monkeypatch.setattr("pipeline.models.teacher.predict", refuse)
    monkeypatch.setattr("pipeline.models.sources.load_teacher", refuse)
    monkeypatch.setattr(Run, "open_cluster", refuse)
    before = {path: path.stat().st_mtime_ns for path in (world / "run" / "outputs").rglob("*.safetensors")}
    space = {
        "assess.bridge.kind": ["centres", "prototype"],
        "assess.bridge.temperature": {"dist": "loguniform", "lower": 0.05, "upper": 2, "points": 3},
        "select.teachers": ["all", ["flat", "solid"]],
    }
    settings = settings_of(world, space=space, search="grid", metric="faculty_nll")
    swept = sweep(settings, display=quiet())
    assert [row.state for row in swept.rows] == ["done"] * 12
    assert len({row.metric for row in swept.rows}) > 6  # the settings matter
    assert swept.best.metric == min(row.metric for row in swept.rows)
    assert {row.scores["faculty_size"] for row in swept.rows} == {2.0, 3.0}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # What the trials were judged by is what the stages say under the same settings.
    state = {one.stage: one.state for one in show_status(best_of(world, swept), until="select", display=quiet())}
    assert state["assess"] == state["select"] == "fresh"
    assert sweep(settings, display=quiet()).rows == swept.rows


def test_a_sweep_in_a_store_is_finished_by_another_machine(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "world")
    bucket = tmp_path / "bucket"
    (tmp_path / "world" / "run").rename(bucket)
    (bucket / ".lock").unlink()
    machines = Machine(tmp_path, monkeypatch, "mock://bucket/run")  # such a store holds no checkpoints: none are made
    monkeypatch.setattr("pipeline.data.claim._SETTLE_S", 0.0)
    monkeypatch.setattr(Run, "open_cluster", lambda self: pytest.fail("a teacher was to be run"))
    space = {"select.teachers": ["all", ["flat", "solid"], ["mixed"]], "assess.bridge.temperature": [0.5, 1.0]}
    swept = settings_of(tmp_path / "world", space=space, search="grid", metric="faculty_accuracy")
    settings, calls = apply(swept, {"run_dir": machines.uri}), []

    def third_time_cut_off(run):
        calls.append(run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return faculty_scores(run)

    machines.on("first")
    with monkeypatch.context() as patch:
        patch.setattr(sweep_trials, "faculty_scores", third_time_cut_off)
        with pytest.raises(Interrupted, match="2 of 6 trials have ended"):
            sweep(settings, display=quiet())
    [folder] = (bucket / "sweep").iterdir()
    before = {path: path.read_bytes() for path in folder.glob("trials/*/row.json")}
    assert len(before) == 2

    machines.on("second")
    whole = sweep(settings, display=quiet())
    assert [row.state for row in whole.rows] == ["done"] * 6
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(folder.glob("trials/*/row.json"))) == 6
    assert {"trials.parquet", "best.json", "best.yaml", "parallel.svg", "importance.json"} <= set(os.listdir(folder))
    told = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    assert (told["trial"], told["images"]) == (whole.best.trial, 32) and told["standard_error"] > 0

    # A machine that has seen nothing of it has nothing to do, and says the same.
    machines.on("third")
    monkeypatch.setattr(sweep_trials, "faculty_scores", lambda run: pytest.fail("a trial was run again"))
    display = quiet()
    again = sweep(settings, display=display)
    assert (again.rows, again.best) == (whole.rows, whole.best)
    assert f"± {told['standard_error']:.4f} on 32 images" in display.console.export_text()


@pytest.mark.slow
def test_a_population_takes_over_weights_and_values(cluster, world):
    settings = settings_of(
        world,
        "distill.loop.epochs=6",
        space={LR: {"dist": "loguniform", "lower": 1e-9, "upper": 1e-2}},
        metric="validation_nll",
        trials=4,
        scheduler={"pbt": {"interval": 1, "quantile": 0.5, "resample": 0.0}},
    )
    swept = sweep(settings, display=quiet())
    assert [row.state for row in swept.rows] == ["done"] * 4 and left() == []
    begun = {row.trial: float(json.loads((swept.folder / "trials" / row.trial / "row.json").read_text())["values"][LR])
             for row in swept.rows}  # fmt: skip
    assert len(begun) == 4 and all(1e-9 <= rate <= 1e-2 for rate in begun.values())
    # Those that could not learn went on from those that could.
    assert max(row.metric for row in swept.rows) < 1.39
    assert all((swept.folder / "trials" / row.trial / "student" / "model.safetensors").exists() for row in swept.rows)


@pytest.mark.slow
def test_an_interrupted_population_goes_on(cluster, world, monkeypatch):
    settings = settings_of(
        world,
        "distill.loop.epochs=12",
        space={LR: {"dist": "loguniform", "lower": 1e-4, "upper": 1e-2}},
        metric="validation_nll",
        trials=2,
        scheduler={"pbt": {"interval": 2}},
    )

    def kept():
        paths = (world / "run" / "sweep").glob("*/trials/*/member.json")
        return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}

    def interrupt():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(kept()) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match="0 of 2 trials have ended"):
        sweep(settings, display=quiet())
    thread.join()
    before, proposed, heard = kept(), {}, {}
    assert left() == [] and len(before) == 2

    def noted(propose):
        def call(self):
            found = propose(self)
            if found is not None:
                proposed[self._names[found.name]] = found.values
            return found

        return call

    monkeypatch.setattr(_Fleet, "propose", noted(_Fleet.propose))
    monkeypatch.setattr(
        sweep_trials.Trials, "report", lambda self, trial, metrics: heard.setdefault(trial, []).append(metrics["epoch"])
    )
    swept = sweep(settings, display=quiet())
    assert [row.state for row in swept.rows] == ["done"] * 2 and left() == []
    for row in swept.rows:
        member = before[row.trial]
        assert proposed[row.trial] == member["values"]
        assert heard[row.trial][0] > 2 and heard[row.trial][-1] == 12  # no epoch of its first leg was trained again
        assert row.curve[0] == tuple(member["curve"][0])


# The last one: it ends the Ray that the others share.
@pytest.mark.slow
def test_a_sweep_whose_driver_was_killed_goes_on(world, no_cluster):
    space = {LR: [1e-2, 5e-3, 2e-3], "distill.loop.epochs": [40]}
    settings = settings_of(world, space=space, search="grid", max_concurrent=1)
    command = [sys.executable, "-m", "jobs.sweep", "-c", str(world / "sweep.yaml"), f"run_dir={world / 'run'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list((world / "run" / "sweep").glob("*/trials/*/row.json")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    rows = {path: path.stat().st_mtime_ns for path in (world / "run" / "sweep").glob("*/trials/*/row.json")}
    assert 1 <= len(rows) < 3
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
    assert "have ended before" in done.stdout and "trials 3/3" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in rows} == rows
    assert settings.sweep is not None
