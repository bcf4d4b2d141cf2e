"""Several training runs side by side on one real Ray with two processors."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from pipeline.cluster.many import FitJob, fit_many
from pipeline.errors import ConfigError, UserError

pytestmark = pytest.mark.integration


def count(context, payload):
    """Count the steps, one checkpoint each."""
    if payload.get("raise"):
        raise ValueError("no such objective")
    with context.restore() as folder:
        start = int((folder / "step").read_text()) if folder is not None else 0
    for step in range(start, payload["steps"]):
        with tempfile.TemporaryDirectory() as scratch:
            saved = Path(scratch) if context.rank == 0 else None
            if saved is not None:
                (saved / "step").write_text(str(step + 1))
            context.report({"start": start, "step": step, "pid": os.getpid()}, saved)
        death = payload.get("kill_driver_once")
        if death and not Path(death).exists():
            Path(death).touch()
            for sibling in psutil.Process().parent().children():  # they all come from the same Ray
                if any("ImplicitFunc" in word for word in sibling.cmdline()):
                    sibling.kill()
            time.sleep(60)


def groups_left():
    """Return the placement groups that are there once everything that ends has had time to."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
        if not left and ray.available_resources().get("CPU") == 2:
            return []
        time.sleep(0.2)
    return left or [ray.available_resources()]


@pytest.fixture(scope="module")
def fitted(cluster, tmp_path_factory):
    """Two jobs are begun in this process, the second one is not finished; then come three on the cluster."""
    folder = tmp_path_factory.mktemp("many")
    begun = [FitJob("ended", {"steps": 2}), FitJob("half", {"steps": 1})]
    before = fit_many(count, begun, num_workers=0, storage=str(folder))
    heard = []

    def tell(name, metrics):
        heard.append((name, metrics, threading.current_thread() is threading.main_thread()))

    jobs = [FitJob("ended", {"steps": 2}), FitJob("bad", {"raise": True}), FitJob("half", {"steps": 4})]
    results = fit_many(count, jobs, num_workers=1, storage=str(folder), on_report=tell)
    return folder, before, results, heard, groups_left()


def test_more_jobs_than_room_all_end_in_order(fitted):
    folder, _, results, _, _ = fitted
    assert [error is None for _, error in results] == [True, False, True]
    assert [Path(outcome.checkpoint).parent for outcome, _ in results if outcome] == [folder / "ended", folder / "half"]


def test_a_second_call_continues_what_had_not_ended(fitted):
    _, before, results, heard, _ = fitted
    assert results[0] == before[0]
    half = results[2][0]
    assert [(metrics["start"], metrics["step"]) for name, metrics, _ in heard if name == "half"] == [
        (1, 1), (1, 2), (1, 3),
    ]  # fmt: skip
    assert (Path(half.checkpoint) / "step").read_text() == "4"


def test_a_job_that_fails_is_a_row(fitted):
    folder, _, results, _, _ = fitted
    outcome, error = results[1]
    assert outcome is None
    assert error.startswith("training 'bad' failed: worker 0: ValueError: no such objective") and "\n" not in error
    assert "in count" in (folder / "bad" / "error.log").read_text()


def test_every_report_arrives_in_this_process(fitted):
    _, _, results, heard, _ = fitted
    assert {name for name, _, _ in heard} == {"half"}
    assert heard[-1][1] == results[2][0].metrics
    assert all(main for _, _, main in heard)
    assert os.getpid() not in {metrics["pid"] for _, metrics, _ in heard}


def test_nothing_stays(fitted):
    folder, _, _, _, left = fitted
    assert left == []
    assert sorted(path.name for path in folder.iterdir()) == ["bad", "ended", "half"]


@pytest.mark.slow
def test_an_error_of_the_caller_ends_all_runs(cluster, tmp_path):
    def refuse(name, metrics):
        raise LookupError(f"no room for {name}")

    jobs = [FitJob("a", {"steps": 10_000}), FitJob("b", {"steps": 10_000})]
    with pytest.raises(LookupError, match=r"no room for [ab]"):
        fit_many(count, jobs, num_workers=1, storage=str(tmp_path), on_report=refuse)
    assert groups_left() == []
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "b"}


@pytest.mark.slow
def test_a_run_whose_driver_was_killed_is_taken_up_again(cluster, tmp_path):
    mark = tmp_path / "killed"
    job = FitJob("run", {"steps": 3, "kill_driver_once": str(mark)})
    # Both processors: the second try starts only if the first one's workers have been cleared away.
    [(outcome, error)] = fit_many(
        count, [job], num_workers=1, storage=str(tmp_path), max_failures=1, resources_per_worker={"CPU": 2}
    )
    assert mark.exists() and error is None
    assert (outcome.metrics["start"], outcome.metrics["step"]) == (1, 2)
    assert groups_left() == []


def test_what_can_not_run_is_refused(cluster, tmp_path):
    with pytest.raises(UserError, match=r"num_workers is 3 .* room for 2"):
        fit_many(count, [FitJob("a", {})], num_workers=3, storage=str(tmp_path))
    with pytest.raises(ValueError, match=r"unique, got \['a'\]"):
        fit_many(count, [FitJob("a", {}), FitJob("a", {})], num_workers=1, storage=str(tmp_path))
    with pytest.raises(ConfigError, match="num_workers must be >= 0, got -1"):
        fit_many(count, [FitJob("a", {})], num_workers=-1, storage=str(tmp_path))
    assert fit_many(count, [], num_workers=1, storage=str(tmp_path)) == []
    assert not list(tmp_path.iterdir())


def test_without_workers_the_jobs_run_here_one_after_the_other(tmp_path):
    heard = []
    jobs = [FitJob("a", {"steps": 2}), FitJob("bad", {"raise": True}), FitJob("b", {"steps": 1})]
    results = fit_many(
        count, jobs, num_workers=0, storage=str(tmp_path), on_report=lambda name, metrics: heard.append((name, metrics))
    )
    assert [name for name, _ in heard] == ["a", "a", "b"]
    assert {metrics["pid"] for _, metrics in heard} == {os.getpid()}
    assert "ValueError: no such objective" in results[1][1]
    assert results[2][0].metrics == heard[-1][1]

    def refuse(name, metrics):
        raise LookupError(f"no room for {name}")

    with pytest.raises(LookupError, match="no room for c"):
        fit_many(count, [FitJob("c", {"steps": 1})], num_workers=0, storage=str(tmp_path), on_report=refuse)


def test_ray_is_imported_only_where_it_is_used():
    code = "import sys, pipeline.cluster.many; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
