"""What a training run on workers stands: short memory, a full disk, more or fewer processors than asked for."""

import json
import resource
import tempfile
from pathlib import Path
from threading import Event

import pytest

from pipeline.cluster.train import fit
from pipeline.engine.checkpoint import CheckpointStore
from pipeline.errors import ConfigError, StageError, UserError

pytestmark = pytest.mark.integration


def checkpoint(context, step, size=1):
    """Return a folder for rank 0 to report."""
    if context.rank:
        return None
    folder = Path(tempfile.mkdtemp())
    (folder / "step").write_text(str(step))
    (folder / "ballast").write_bytes(b"x" * size)
    return folder


def restored(context):
    with context.restore() as folder:
        return int((folder / "step").read_text()) if folder is not None else 0


def hold_back(until):
    """Let no checkpoint of this process be stored before an event."""
    save = CheckpointStore.save

    def waiting(self, folder, metrics, index):
        assert until.wait(60), "the loop did not go on"
        return save(self, folder, metrics, index)

    CheckpointStore.save = waiting


def run_out_of_memory(context, payload):
    """Report four steps with a checkpoint each; the first attempt has no memory for the third."""
    gone_on = Event()
    start = restored(context)
    for step in range(start, 4):
        if context.attempt == 0 and step == 0:
            hold_back(gone_on)
        if context.attempt == 0 and step == 2:
            context.barrier()
            if context.rank == 1:
                raise MemoryError("no room for a batch")
            context.barrier()  # never passed
        metrics = {"step": step, "start": start, "attempt": context.attempt, "workers": context.world_size}
        metrics |= {"memory": context.last_failure == "memory", "memory_failures": context.memory_failures}
        folder = checkpoint(context, step + 1)
        context.report(metrics, folder)
        assert folder is None or not folder.exists()
        gone_on.set()  # only now may the first checkpoint be stored
        assert not context.leaving()


@pytest.mark.slow
def test_short_of_memory_the_run_goes_on_and_says_so_to_the_loop(cluster, tmp_path):
    heard = []
    outcome = fit(
        run_out_of_memory,
        None,
        num_workers=(1, 8),
        storage=str(tmp_path),
        name="run",
        max_failures=1,
        on_report=heard.append,
    )
    assert {row["workers"] for row in heard} == {2}
    first = [row for row in heard if row["attempt"] == 0]
    assert [(row["step"], row["memory"], row["memory_failures"]) for row in first] == [(0, False, 0), (1, False, 0)]
    second = heard[2:]
    assert second[0]["start"] in (1, 2)  # the second checkpoint may have been on its way
    assert [row["step"] for row in second] == list(range(second[0]["start"], 4))
    assert all(row["memory"] and row["memory_failures"] == 1 and row["attempt"] == 1 for row in second)
    assert outcome.metrics == heard[-1]
    assert (Path(outcome.checkpoint) / "step").read_text() == "4"
    assert not (tmp_path / "run" / "failure.json").exists()


def fill_the_disk(context, payload):
    """Let the second of three checkpoints be too large for the storage."""
    for step in range(3):
        folder = checkpoint(context, step + 1, size=2**22 if step == 1 else 1)
        if step == 1:
            context.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
        context.report({"step": step, "attempt": context.attempt}, folder)


def test_a_storage_that_takes_no_more_ends_the_run_with_the_last_good_checkpoint(cluster, tmp_path):
    heard = []
    with pytest.raises(StageError) as caught:
        fit(
            fill_the_disk,
            None,
            num_workers=1,
            storage=str(tmp_path),
            name="run",
            max_failures=5,
            on_report=heard.append,
        )
    message = str(caught.value)
    assert f"checkpoint 1 can't be stored in {tmp_path / 'run'}: File too large" in message
    assert "\n" not in message
    assert {row["attempt"] for row in heard} == {0}
    [left] = (tmp_path / "run").glob("checkpoint_0*")
    newest = CheckpointStore(str(tmp_path), "run").newest()
    assert newest.name == left.name and newest.metrics["step"] == 0
    assert (left / "step").read_text() == "1"


def test_a_lost_storage_is_named_and_leaves_no_log(cluster, tmp_path):
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(StageError, match=rf"the storage {tmp_path / 'run'} can't be used: .*mend it"):
        fit(fill_the_disk, None, num_workers=1, storage=str(tmp_path), name="run")


def test_a_range_of_workers_is_checked(cluster, tmp_path):
    with pytest.raises(UserError, match=r"num_workers is 3 .* room for 2"):
        fit(fill_the_disk, None, num_workers=(3, 4), storage=str(tmp_path), name="run")
    with pytest.raises(ConfigError, match=r"\(fewest, most\) with 1 <= fewest <= most, got \(2, 1\)"):
        fit(fill_the_disk, None, num_workers=(2, 1), storage=str(tmp_path), name="run")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_was_written_down_about_memory_is_read_by_the_next_driver(cluster, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failure.json").write_text(json.dumps({"failure": "memory", "times": 2}))
    heard = []
    fit(tell_failures, None, num_workers=1, storage=str(tmp_path), name="run", on_report=heard.append)
    assert heard == [{"attempt": 0, "memory": True, "memory_failures": 2}]
    assert not (tmp_path / "run" / "failure.json").exists()


def tell_failures(context, payload):
    memory = context.last_failure == "memory"
    context.report({"attempt": context.attempt, "memory": memory, "memory_failures": context.memory_failures})
