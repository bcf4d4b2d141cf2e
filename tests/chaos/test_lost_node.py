"""A cluster whose nodes go, with and without notice: the training goes on with what is left."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray._private.state import state
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from torch import nn

from pipeline.cluster.inline import fit_inline
from pipeline.cluster.session import session
from pipeline.cluster.spec import ClusterSpec
from pipeline.cluster.train import fit
from pipeline.engine.checkpoint import CheckpointStore, load_state, save_state

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

STEPS = 8
INTERVAL = 2
PATIENCE_S = 90.0


@pytest.fixture
def cluster(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that computes nothing and two nodes of one processor each."""
    here = Path(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here.parents[2]), str(here.parent)]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    options: dict[str, Any] = {"object_store_memory": 100 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **options})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, **options)
        made.wait_for_nodes()
        with session(ClusterSpec(address=made.address)):
            yield made
    finally:
        made.shutdown()


def until(reached: Callable[[], object], what: str, deadline: float) -> None:
    """Wait for a condition; fail where it has not come when the clock, of driver and workers, shows the deadline."""
    while not reached():
        assert time.time() < deadline, what
        time.sleep(0.05)


def train(context, payload) -> None:
    """Full-batch SGD on two workers or one, a checkpoint every other step and when a node is about to go.

    On the first attempt all wait after the fifth step until a node goes. An AssertionError ends the run: it is none of
    those that are tried again.
    """
    marks = Path(payload["marks"])
    deadline = payload["deadline"]
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
    (marks / f"node-{context.attempt}-{context.rank}").write_text(node)
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    start = 0
    with context.restore() as folder:
        if folder is not None:
            state = load_state(folder)
            net.load_state_dict(state["net"])
            start = state["step"]
    model = context.prepare(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 4, generator=generator, dtype=torch.float64)[context.rank :: context.world_size]
    labels = (torch.arange(8) % 3)[context.rank :: context.world_size]
    for step in range(start, STEPS):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
        waits = payload["waits"] and context.attempt == 0 and step == 4
        if waits:
            mark = marks / f"waiting-{context.rank}"
            assert not mark.exists(), "the second start of the workers was taken for the first"
            mark.touch()
        leaving = context.leaving()
        while waits and not leaving:
            assert time.time() < deadline, "the node was not taken away"
            time.sleep(0.2)
            leaving = context.leaving()
        saved = None
        if ((step + 1) % INTERVAL == 0 or leaving) and context.rank == 0:
            saved = Path(tempfile.mkdtemp())
            save_state(saved, {"net": net.state_dict(), "step": step + 1})
        metrics = {"step": step, "start": start, "attempt": context.attempt, "workers": context.world_size}
        context.report(metrics | {"leaving": leaving}, saved)
        if waits:
            until(lambda: False, "the node was drained and stayed", deadline)


def relay_nodes() -> list[str]:
    return [
        actor["Address"]["NodeID"]
        for actor in state.actor_table(None).values()
        if actor["ActorClassName"] == "RelayActor" and actor["State"] == "ALIVE"
    ]


def run(cluster: Cluster, folder: Path, take_away: Callable[[Any, float], None]) -> list[dict[str, Any]]:
    """Train while the node of rank 1 is taken away; compare the weights with those of a run of its own."""
    deadline = time.time() + PATIENCE_S
    marks = folder / "marks"
    marks.mkdir()
    heard: list[dict[str, Any]] = []
    failed: list[BaseException] = []

    def thread() -> None:
        try:
            until(lambda: len(list(marks.glob("waiting-*"))) == 2, "the fifth step was not reached", deadline)
            assert relay_nodes() == [cluster.head_node.node_id]  # the driver's
            node_id = (marks / "node-0-1").read_text()
            [node] = [node for node in cluster.worker_nodes if node.node_id == node_id]
            take_away(node, deadline)
        except BaseException as error:
            failed.append(error)

    taker = threading.Thread(target=thread, daemon=True)
    taker.start()
    payload = {"marks": str(marks), "waits": True, "deadline": deadline}
    try:
        outcome = fit(
            train,
            payload,
            num_workers=(1, 2),
            storage=str(folder),
            name="lost",
            max_failures=2,
            on_report=heard.append,
            resources_per_worker={"CPU": 1},
        )
    finally:
        assert not failed, failed
    alone = fit_inline(train, payload | {"waits": False}, storage=str(folder), name="alone")
    found, expected = (load_state(Path(one.checkpoint or "")) for one in (outcome, alone))
    assert found["step"] == expected["step"] == STEPS
    for key, value in expected["net"].items():
        torch.testing.assert_close(found["net"][key], value, rtol=0, atol=1e-12)
    first = [row for row in heard if row["attempt"] == 0]
    assert {row["workers"] for row in first} == {2}
    last = [row for row in heard if row["attempt"] == heard[-1]["attempt"]]
    assert {row["workers"] for row in last} == {1}
    assert last[-1]["step"] == STEPS - 1
    return heard


def test_a_node_is_lost_and_the_rest_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "lost")

    def take_away(node: Any, deadline: float) -> None:
        until(
            lambda: (saved := store.newest()) and saved.metrics["step"] == 3,
            "the second checkpoint was not stored",
            deadline,
        )
        cluster.remove_node(node, allow_graceful=False)

    heard = run(cluster, tmp_path, take_away)
    assert {row["start"] for row in heard if row["attempt"] > 0} == {4}
    assert not any(row["leaving"] for row in heard)


@pytest.mark.slow
def test_a_node_that_is_drained_is_left_with_nothing_lost(cluster: Cluster, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "lost")

    def take_away(node: Any, deadline: float) -> None:
        deadline_ms = int((time.time() + 30) * 1000)
        accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(
            node.node_id, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "the price went up", deadline_ms
        )
        assert accepted, why
        until(lambda: (saved := store.newest()) and saved.metrics["leaving"], "no checkpoint was made", deadline)
        cluster.remove_node(node, allow_graceful=False)

    heard = run(cluster, tmp_path, take_away)
    assert [row["step"] for row in heard] == list(range(STEPS))  # no step was made twice
    assert [row["leaving"] for row in heard] == [step == 4 for step in range(STEPS)]
