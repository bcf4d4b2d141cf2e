"""What nodes answer when they are asked what they see, over a real Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import ray

from pipeline.cluster.nodes import ask_nodes, forget_question, leave_question, other_nodes
from pipeline.cluster.tasks import map_tasks
from pipeline.stages.visibility import Place, look_at, look_later

pytestmark = pytest.mark.integration


def fail(argument: object) -> None:
    raise ValueError(f"no {argument}")


def double(number: int) -> int:
    return 2 * number


def test_a_node_that_comes_later_answers_before_it_works(cluster: None, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "token").write_text("abc")
    good = Place("run_dir", str(tmp_path / "token"), "share it", token="abc")
    bad = dataclasses.replace(good, path=str(tmp_path / "gone" / "token"))
    [node] = [node for node in ray.nodes() if node["Alive"]]
    try:
        leave_question(look_later, [good, bad], [])
        assert map_tasks(double, [1]) == [(2, None)]  # the driver's own node
        with monkeypatch.context() as patch:
            patch.setattr(type(ray.get_runtime_context()), "get_node_id", lambda self: "another")
            leave_question(look_later, [good, bad], [])
        [(value, error)] = map_tasks(double, [1], resources={"CPU": 2})
        line = f"run_dir: node {node['NodeManagerAddress']} does not see {tmp_path / 'gone'} as this one does"
        assert value is None and error == f"{line} (No such file or directory); share it"
    finally:
        forget_question()


def test_a_node_is_asked_over_ray(cluster: None, tmp_path: Path) -> None:
    assert other_nodes() == []  # a Ray of this machine alone has nobody else
    nodes = [(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    (tmp_path / "token").write_text("abc")
    good = Place("run_dir", str(tmp_path / "token"), "share it", token="abc")
    bad = dataclasses.replace(good, path=str(tmp_path / "none"))
    [answer] = ask_nodes(look_at, [good, bad], nodes)
    assert answer.address == nodes[0][1]
    assert answer.error is None
    assert answer.value == [(bad, "No such file or directory")]

    [answer] = ask_nodes(fail, "luck", nodes)
    assert answer.error == "ValueError: no luck"
    # A node that is gone says nothing, and holds nobody up.
    assert ask_nodes(look_at, [good], [("a1" * 28, "10.0.0.7")]) == []
