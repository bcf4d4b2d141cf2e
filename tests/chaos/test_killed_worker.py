"""`kill -9` of a training worker or of a trial's process: the run ends with what it would have ended with anyway."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
from torch import nn

from pipeline.cluster.session import session
from pipeline.cluster.spec import ClusterSpec
from pipeline.cluster.train import fit
from pipeline.cluster.trials import TrialItem, run_trials
from pipeline.engine.checkpoint import CheckpointStore, load_state, save_state

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

STEPS = 10
INTERVAL = 2
PATIENCE_S = 100.0


@pytest.fixture(scope="module")
def cluster(no_cluster: None) -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    with session(ClusterSpec(num_cpus=2)):
        yield
    until(lambda: set(psutil.Process().children(recursive=True)) <= before, "processes of Ray stay")


def until(reached: Callable[[], object], what: str) -> None:
    """Wait for a condition; fail where it does not come."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images, labels = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    return images[rank::2], labels[rank::2]


def alone() -> dict[str, torch.Tensor]:
    """Return the weights of the same training in this process: with two workers, halves of gradients sum exactly."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimiser.zero_grad()
        for images, labels in (batch(step, 0), batch(step, 1)):
            (nn.functional.cross_entropy(net(images), labels) / 2).backward()
        optimiser.step()
    return net.state_dict()


def train(context, payload) -> None:
    """Plain SGD with momentum, a checkpoint every other step.

    Rank 1 waits to be killed at the fifth step of the first attempt; on the second one rank 0 kills itself when it has
    copied a checkpoint but for the manifest; the third waits for its controller to be killed.
    """
    marks = Path(payload["marks"])
    (marks / f"pid-{context.attempt}-{context.rank}").write_text(str(os.getpid()))
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    model = context.prepare(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    start = 0
    with context.restore() as folder:
        if folder is not None:
            state = load_state(folder)
            net.load_state_dict(state["net"])
            optimiser.load_state_dict(state["optimiser"])
            start = state["step"]
    if context.attempt == 1:
        die_before_the_manifest()
    for step in range(start, STEPS):
        images, labels = batch(step, context.rank)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
        saved = None
        if (step + 1) % INTERVAL == 0 and context.rank == 0:
            saved = Path(tempfile.mkdtemp())
            save_state(saved, {"net": net.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1})
        context.report({"step": step, "start": start, "attempt": context.attempt}, saved)
        if (context.attempt, step) in ((0, 4), (2, 6)) and context.rank == 1:
            (marks / f"ready-{context.attempt}").touch()
            time.sleep(PATIENCE_S)
            raise AssertionError("nobody was killed")


def die_before_the_manifest() -> None:
    def die(self: CheckpointStore, relative: str, data: bytes) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    CheckpointStore.write = die  # type: ignore[method-assign]


def pids(marks: Path) -> dict[str, int]:
    return {path.name: int(path.read_text()) for path in marks.glob("pid-*")}


def test_killed_workers_change_nothing(cluster: None, tmp_path: Path) -> None:
    heard: list[dict[str, float]] = []
    marks = tmp_path / "marks"
    marks.mkdir()
    store = CheckpointStore(str(tmp_path), "killed")

    def stored(step: int) -> bool:
        newest = store.newest()
        return newest is not None and newest.metrics["step"] == step

    def kill() -> None:
        until((marks / "ready-0").exists, "the first attempt did not come to its fifth step")
        until(lambda: stored(3), "the second checkpoint was not stored")
        os.kill(pids(marks)["pid-0-1"], signal.SIGKILL)
        until((marks / "ready-2").exists, "the third attempt did not come to its seventh step")
        until(lambda: stored(5), "the third checkpoint was not stored")
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # the dead have no command line
                if any("TrainController" in word for word in process.cmdline()):
                    process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    killed = fit(
        train,
        {"marks": str(marks)},
        num_workers=2,
        storage=str(tmp_path),
        name="killed",
        max_failures=3,
        on_report=heard.append,
    )
    workers = pids(marks)
    assert len(workers) == 8
    until(lambda: ray.available_resources().get("CPU") == 2, "processors were not given back")
    assert not [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    until(lambda: not any(map(psutil.pid_exists, workers.values())), "workers stay")

    # Killed after five steps of which four were stored, then while the sixth was stored, then after seven.
    steps = {attempt: [row["step"] for row in heard if row["attempt"] == attempt] for attempt in range(4)}
    assert steps[0] == [0, 1, 2, 3, 4]
    assert steps[1][:2] == [4, 5]
    assert steps[2] == [4, 5, 6]
    assert steps[3] == [6, 7, 8, 9]
    assert all(row["start"] == (0, 4, 4, 6)[int(row["attempt"])] for row in heard)

    found = load_state(Path(killed.checkpoint or ""))
    assert found["step"] == STEPS
    for key, value in alone().items():
        assert torch.equal(found["net"][key], value)
    assert len(list((tmp_path / "killed").glob("checkpoint_0*"))) == len(store.whole()) == 2


def assess(payload: tuple[str, str]) -> dict[str, object]:
    """Leave a mark for each call; the second trial waits to be killed, once."""
    name, folder = payload
    calls = Path(folder)
    number = len(list(calls.glob(f"{name}-*")))
    (calls / f"{name}-{number}").write_text(str(os.getpid()))
    if name == "b" and number == 0:
        time.sleep(PATIENCE_S)
    return {"name": name, "calls": number + 1}


def test_a_killed_trial_is_repeated_and_leaves_the_others_alone(cluster: None, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()

    def kill_b() -> None:
        until(lambda: (calls / "b-0").exists() and (calls / "b-0").read_text(), "the second trial did not begin")
        until(lambda: len({path.name[0] for path in calls.iterdir()}) > 2, "no trial ran beside it")
        os.kill(int((calls / "b-0").read_text()), signal.SIGKILL)

    items = [TrialItem(name, (name, str(calls))) for name in "abcde"]
    killer = threading.Thread(target=kill_b, daemon=True)
    killer.start()
    rows = run_trials(assess, items, storage=tmp_path, experiment="trials", max_failures=1)
    assert {name: row["calls"] for name, row in rows.items()} == {"a": 1, "b": 2, "c": 1, "d": 1, "e": 1}
    assert not any("error" in row for row in rows.values())
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int((calls / "b-0").read_text())).status() == psutil.STATUS_ZOMBIE
