"""Trials, data-parallel training and tasks on one real Ray with two processors."""

import contextlib
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from torch import nn

from pipeline.cluster.inline import fit_inline
from pipeline.cluster.relay import Relay
from pipeline.cluster.session import session
from pipeline.cluster.spec import ClusterSpec
from pipeline.cluster.tasks import map_tasks
from pipeline.cluster.train import fit
from pipeline.cluster.trials import TrialItem, run_trials
from pipeline.errors import StageError, UserError

pytestmark = pytest.mark.integration


# --- trials -----------------------------------------------------------------------------------------------------------


def assess(payload):
    kind, value = payload
    if kind == "raise":
        raise KeyError("the probe split\nis empty")
    if kind == "die" or (kind == "die once" and not Path(value).exists()):
        if kind == "die once":
            Path(value).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    buffer = bytearray(value * 2**20) if kind == "fill" else b""
    return {"value": value, "pid": os.getpid(), "length": len(buffer)}


@pytest.fixture(scope="module")
def assessed(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trials")
    heard = []
    items = [TrialItem(f"plain{i}", ("plain", i)) for i in range(5)]
    items += [
        TrialItem("large", ("fill", 200)),
        TrialItem("small", ("fill", 1)),
        TrialItem("bad", ("raise", 0)),
        TrialItem("known", ("raise", 0)),
        TrialItem("once", ("die once", str(folder / "died"))),
        TrialItem("dead", ("die", 0)),
    ]
    rows = run_trials(
        assess,
        items,
        storage=folder,
        experiment="assess",
        max_concurrent=1,
        max_failures=1,
        on_result=lambda name, row: heard.append((name, row)),
        done={"known": {"value": 7}, "of another run": {}},
    )
    return folder, items, rows, heard


def test_trials_share_a_process(assessed):
    rows = assessed[2]
    pids = {row["pid"] for name, row in rows.items() if "pid" in row and name != "once"}
    assert len(pids) == 1
    assert rows["once"]["pid"] not in pids  # the process that served the others died under it
    assert [rows[f"plain{i}"]["value"] for i in range(5)] == list(range(5))


def test_a_failing_trial_is_a_row(assessed):
    folder, _, rows, _ = assessed
    assert rows["bad"]["error_type"] == "KeyError"
    assert "the probe split" in rows["bad"]["error"]
    assert "\n" not in rows["bad"]["error"]
    assert "in assess" in (folder / "assess" / "errors" / "bad.log").read_text()
    assert [path.name for path in (folder / "assess").iterdir()] == ["errors"]  # nothing of Tune's stays


def test_a_killed_trial_is_repeated_and_then_given_up(assessed):
    rows = assessed[2]
    assert "error" not in rows["once"]
    assert rows["dead"]["error_type"] == "WorkerDied"
    assert "died" in rows["dead"]["error"]


def test_rows_come_in_the_items_order_and_each_is_announced_once(assessed):
    _, items, rows, heard = assessed
    assert list(rows) == [item.name for item in items]
    assert sorted(name for name, _ in heard) == sorted(set(rows) - {"known"})
    assert all(rows[name] == row for name, row in heard)
    assert rows["known"] == {"value": 7}


def test_peak_memory_is_that_of_the_trial(assessed):
    rows = assessed[2]
    assert rows["large"]["length"] == 200 * 2**20
    assert rows["large"]["peak_mb"] - rows["plain4"]["peak_mb"] == pytest.approx(200, abs=20)
    assert rows["small"]["peak_mb"] < rows["large"]["peak_mb"] - 150
    assert all(rows[f"plain{i}"]["seconds"] >= 0 for i in range(5))


def test_trials_that_never_fit_are_refused(cluster, tmp_path):
    with pytest.raises(UserError, match=r"16 CPU asked for"):
        run_trials(assess, [TrialItem("a", ("plain", 0))], storage=tmp_path, experiment="e", resources={"CPU": 16})


def test_names_must_differ(cluster, tmp_path):
    with pytest.raises(ValueError, match=r"unique, got \['a'\]"):
        run_trials(assess, [TrialItem("a", 1), TrialItem("a", 2)], storage=tmp_path, experiment="e")


def test_an_error_of_the_caller_stays_itself(cluster, tmp_path):
    def refuse(name, row):
        raise LookupError(f"no room for {name}")

    with pytest.raises(LookupError, match="no room for a"):
        run_trials(assess, [TrialItem("a", ("plain", 0))], storage=tmp_path, experiment="e", on_result=refuse)
    # Its room is free again: a training that needs all of it would wait for ever.
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == 2
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())


def climb(payload, rung, shared):
    """Write down every call; the score is that of the rung."""
    name, scores, folder = payload
    with (Path(folder) / f"{name}-{rung}").open("x"):
        pass
    if scores[rung] == "raise":
        raise KeyError("no such file")
    if scores[rung] == "die once" and not (Path(folder) / f"{name}-died").exists():
        (Path(folder) / f"{name}-died").touch()
        (Path(folder) / f"{name}-{rung}").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    score = 0.9 if scores[rung] == "die once" else scores[rung]
    writeable = shared["images"].flags.writeable
    return {"score": score, "pid": os.getpid(), "sum": int(shared["images"].sum()), "writeable": writeable}


def hold(payload, rung):
    """Leave a mark while running; report how many marks there are."""
    name, folder = payload
    mark = Path(folder) / f"{name}-{rung}"
    mark.touch()
    time.sleep(0.3)
    side_by_side = len(list(Path(folder).iterdir()))
    mark.unlink()
    return {"score": float(len(name)), "side_by_side": side_by_side}


def test_halving_keeps_to_the_limit_on_every_rung(cluster, tmp_path):
    (tmp_path / "marks").mkdir()
    items = [TrialItem(f"t{'x' * i}", (f"t{'x' * i}", str(tmp_path / "marks"))) for i in range(4)]
    rows = run_trials(hold, items, storage=tmp_path, experiment="limit", max_concurrent=1, climbing=(3,))
    assert [row["rung"] for row in rows.values()] == [0, 1, 1, 1]
    assert {row["side_by_side"] for row in rows.values()} == {1}


def test_halving_runs_the_later_rungs_of_the_best_alone(cluster, tmp_path):
    scores = {f"low{i}": [0.1 + i / 100, None, None] for i in range(6)}
    scores |= {"best": [0.8, 0.8, 0.8], "second": [0.7, 0.9, 0.5], "third": [0.6, 0.1, None], "bad": ["raise"]}
    scores["fragile"] = ["die once", 0.2, None]
    (tmp_path / "calls").mkdir()
    items = [TrialItem(name, (name, values, str(tmp_path / "calls"))) for name, values in scores.items()]
    rows = run_trials(
        climb,
        items,
        storage=tmp_path,
        experiment="halving",
        max_concurrent=2,
        climbing=(4, 2),
        shared={"images": np.ones((3, 4), dtype=np.uint8)},
    )
    calls = {path.name for path in (tmp_path / "calls").iterdir()} - {"fragile-died"}
    assert calls == (
        {f"{name}-0" for name in scores}
        | {f"{name}-1" for name in ("best", "second", "third", "fragile")}
        | {f"{name}-2" for name in ("best", "second")}
    )
    assert {name: row["rung"] for name, row in rows.items() if name != "bad"} == {
        **{f"low{i}": 0 for i in range(6)}, "best": 2, "second": 2, "third": 1, "fragile": 1,
    }  # fmt: skip
    assert rows["low3"]["dropped"] == "score 0.130 on rung 1 of 3, not among the best 4 of 11"
    assert rows["fragile"]["dropped"] == "score 0.200 on rung 2 of 3, not among the best 2 of 4"
    assert "dropped" not in rows["best"] and "no such file" in rows["bad"]["error"]
    assert len({row["pid"] for row in rows.values() if "pid" in row}) <= 5  # processes serve many trials
    assert all(row["sum"] == 12 and not row["writeable"] for name, row in rows.items() if name != "bad")
    assert not list((tmp_path / "halving").glob("Assessment_*"))


# --- training ---------------------------------------------------------------------------------------------------------

STEPS = 4


def tiny_student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.arange(8) % 3


def train_loop(context, payload):
    """Plain SGD on the same global batch whatever the number of workers; rank 1 dies once, after the second report."""
    net = tiny_student()
    start = 0
    with context.restore() as folder:
        if folder is not None:
            state = torch.load(folder / "state.pt", weights_only=True)
            net.load_state_dict(state["net"])
            start = state["step"]
    if payload.get("raise_at_start"):
        raise ValueError(f"no such objective (restored step {start})")
    model = context.prepare(net)
    images, labels = (part[context.rank :: context.world_size] for part in batch())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(start, STEPS):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
        context.barrier()
        with tempfile.TemporaryDirectory() as scratch:
            saved = None
            if context.rank == 0:
                saved = Path(scratch)
                gradients = [parameter.grad for parameter in net.parameters()]
                torch.save({"net": net.state_dict(), "step": step + 1, "gradients": gradients}, saved / "state.pt")
            context.report({"step": step, "loss": loss.detach(), "start": start}, saved)
        death = payload.get("death")
        if step == 1 and death and context.rank == 1 and not Path(death).exists():
            time.sleep(1)  # until the controller has taken up what was reported
            Path(death).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if context.world_size > 1:
        # A second lesson in the same group: the checkpoint that the first one was restored from is gone by now.
        with context.restore() as later:
            assert later is None


def state_of(outcome):
    return torch.load(Path(outcome.checkpoint) / "state.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    heard = []
    outcome = fit(
        train_loop,
        {"death": str(folder / "died")},
        num_workers=2,
        storage=str(folder),
        name="run",
        max_failures=1,
        on_report=heard.append,
    )
    return folder, outcome, heard


def test_two_workers_compute_what_one_does(trained, tmp_path):
    alone = fit_inline(train_loop, {}, storage=str(tmp_path), name="alone")
    one, two = state_of(alone), state_of(trained[1])
    for expected, found in zip(one["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    for key, expected in one["net"].items():
        torch.testing.assert_close(two["net"][key], expected, rtol=0, atol=1e-8)


def test_a_killed_worker_is_restarted_from_the_newest_checkpoint(trained):
    folder, outcome, heard = trained
    assert (folder / "died").exists()
    assert [report["start"] for report in heard] == [0, 0, 2, 2]
    assert outcome.metrics["start"] == 2


def test_every_report_arrives_in_order(trained):
    _, outcome, heard = trained
    assert [report["step"] for report in heard] == list(range(STEPS))
    assert heard[-1] == outcome.metrics
    assert isinstance(heard[0]["loss"], float)


def test_two_checkpoints_are_kept(trained):
    folder, outcome, _ = trained
    kept = sorted(path for path in (folder / "run").glob("checkpoint_*"))
    assert len(kept) == 2
    assert kept[-1] == Path(outcome.checkpoint)
    assert json.loads((kept[-1] / "faculty-manifest.json").read_text())["metrics"] == outcome.metrics


def test_an_error_that_would_repeat_ends_the_run_at_once(trained):
    folder, outcome, _ = trained
    # What a killed driver may leave: a list cut short, and a checkpoint of which not every file arrived.
    (folder / "run" / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.')
    partial = folder / "run" / "checkpoint_000099-abcdef"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"")
    with pytest.raises(StageError) as caught:
        fit(
            train_loop,
            {"raise_at_start": True},
            num_workers=1,
            storage=str(folder),
            name="run",
            max_failures=50,
        )
    message = str(caught.value)
    assert f"ValueError: no such objective (restored step {STEPS})" in message
    assert "\n" not in message
    assert "in train_loop" in (folder / "run" / "error.log").read_text()
    assert not partial.exists()
    assert Path(outcome.checkpoint).exists()


def test_more_workers_than_processors_are_refused(cluster, tmp_path):
    with pytest.raises(UserError, match=r"num_workers is 3 .* room for 2; set num_workers to at most 2"):
        fit(train_loop, {}, num_workers=3, storage=str(tmp_path), name="run")
    assert not list(tmp_path.iterdir())


# --- tasks ------------------------------------------------------------------------------------------------------------


def square(value):
    if value == 3:
        raise KeyError("three")
    if value == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return value * value


def test_tasks_keep_order_and_isolate_errors(cluster):
    heard = []
    results = map_tasks(square, range(6), max_failures=1, on_result=lambda *row: heard.append(row))
    assert [value for value, _ in results] == [0, 1, 4, None, None, 25]
    assert results[3][1] == "KeyError: 'three'"
    assert "died" in results[4][1]
    assert sorted(heard) == [(index, value, error) for index, (value, error) in enumerate(results)]


def test_an_inner_session_uses_the_outer_one(cluster):
    with session(ClusterSpec(num_cpus=1)):
        assert map_tasks(square, [2]) == [(4, None)]
    assert map_tasks(square, [5]) == [(25, None)]


# --- the line to the driver -------------------------------------------------------------------------------------------


def test_a_relay_goes_on_when_its_process_is_killed(cluster):
    relay = Relay()
    relay.push("report", {"step": 0})
    assert relay.drain() == [("report", {"step": 0})]
    before = {one.pid for one in relays()}
    for process in relays():
        process.kill()
    relay.push("report", {"step": 1})
    assert relay.drain() == [("report", {"step": 1})]
    assert relays() and not before & {one.pid for one in relays()}
    relay.close()
    relay.push("report", {"step": 2})  # dropped, at once
    assert relay.drain() == []


def relays():
    found = psutil.Process().children(recursive=True)
    return [one for one in found if one.is_running() and any("RelayActor" in word for word in titles(one))]


def titles(process):
    with contextlib.suppress(psutil.Error):  # the dead have none
        return process.cmdline()
    return []
