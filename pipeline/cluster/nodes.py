"""One question to every node: a small task on each, pinned to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.causes import one_line

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Answer:
    """What a node said.

    Attributes
    ----------
    address : str
        Its IP address.
    value : object
        What the function returned there.
    error : str or None
        One line, instead of a value: what it raised, or why it could not be called.
    """

    address: str
    value: Any
    error: str | None = None


def other_nodes() -> list[tuple[str, str]]:
    """Return id and address of the nodes that work may go to, without the one that this process runs on."""
    from ray.util.client import ray as client

    # Through Ray Client this process is on none of them; what counts as its node is that of the client's server.
    own = None if client.is_connected() else ray.get_runtime_context().get_node_id()
    return [
        (node["NodeID"], node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own and any(node["Resources"].get(key, 0) > 0 for key in ("CPU", "GPU"))
    ]


def ask_nodes(
    function: Callable[[Any], Any], argument: Any, nodes: list[tuple[str, str]], *, patience: float = PATIENCE_S
) -> list[Answer]:
    """Call a function on every node, all at once.

    Parameters
    ----------
    function : callable
        Importable by name on the workers.
    argument : object
        Small and picklable.
    nodes : list of (str, str)
        See `other_nodes`.
    patience : float
        Seconds; of a node that has not answered by then nothing is said.

    Returns
    -------
    list of Answer
        A node that went meanwhile is not among them.
    """
    packed = cloudpickle.dumps((function, argument))  # unpickled under guard: a worker may lack the module
    call: Any = ray.remote(_guarded)
    asked = {
        call.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(identity, soft=False)
        ).remote(packed): address
        for identity, address in nodes
    }
    if not asked:
        return []
    ready, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=patience)
    for reference in waiting:
        ray.cancel(reference, force=True)
    found = []
    for reference in ready:
        try:
            value, error = ray.get(reference)
        except ray.exceptions.RayTaskError as problem:  # this package is not there
            value, error = None, one_line(problem)
        except ray.exceptions.RayError:
            continue
        found.append(Answer(asked[reference], value, error))
    return found


def _guarded(packed: bytes) -> tuple[Any, str | None]:
    try:
        function, argument = cloudpickle.loads(packed)
        return function(argument), None
    except Exception as error:
        return None, one_line(error)
