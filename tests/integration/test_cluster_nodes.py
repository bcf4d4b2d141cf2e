"""What nodes answer when they are asked what they see, over a real Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import ray

from pipeline.cluster.nodes import ask_nodes, other_nodes
from pipeline.stages.visibility import Place, look_at

pytestmark = pytest.mark.integration


def fail(argument: object) -> None:
    raise ValueError(f"no {argument}")


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
