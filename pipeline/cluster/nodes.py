"""One question to every node: a small task on each, pinned to it; nodes that come later answer before they work."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray
from ray import cloudpickle
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.causes import one_line
from pipeline.errors import StageError

PATIENCE_S = 120.0
_QUESTIONS = b"faculty-nodes"


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


def leave_question(function: Callable[[Any], str], argument: Any, asked: Collection[str]) -> None:
    """Let workers on nodes that come later answer before they begin: an autoscaler adds them while the run goes on.

    Parameters
    ----------
    function : callable
        ``function((address, argument))`` on the worker, importable by name; "" where all is well, else one line.
    argument : object
        Small and picklable.
    asked : collection of str
        Ids of nodes that need not answer any more. The driver's own is one of them, too.
    """
    here = ray.get_runtime_context()
    known = frozenset(asked) | {here.get_node_id()}
    data = cloudpickle.dumps((known, cloudpickle.dumps((function, argument))))
    _internal_kv_put(_key(), data, overwrite=True, namespace=_QUESTIONS)


def forget_question() -> None:
    """Take the question away."""
    _internal_kv_del(_key(), namespace=_QUESTIONS)


def answer_here() -> None:
    """Answer the question on this worker, if its node has not been asked; a process answers a question once.

    Raises
    ------
    StageError
        With what is wrong with this node.
    """
    question = _internal_kv_get(_key(), namespace=_QUESTIONS) if ray.is_initialized() else None
    why = "" if question is None else _answer(question)
    if why:
        raise StageError(why)


@lru_cache(maxsize=1)
def _answer(question: bytes) -> str:
    known, packed = cloudpickle.loads(question)
    if ray.get_runtime_context().get_node_id() in known:
        return ""
    function, argument = cloudpickle.loads(packed)
    return str(function((ray.util.get_node_ip_address(), argument)))


def _key() -> bytes:
    return ray.get_runtime_context().get_job_id().encode()
