"""Messages from a running job to its driver, through one small actor."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Message = tuple[str, Any]


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class RelayActor:
    """Holds messages until the driver fetches them; where its process is killed, Ray starts an empty one."""

    def __init__(self) -> None:
        self._messages: list[bytes] = []

    def push(self, message: bytes) -> None:
        """Keep one message, still pickled: to unpickle an actor's handle would import that actor's class here."""
        self._messages.append(message)

    def drain(self) -> list[bytes]:
        """Hand over what has come since the last call, oldest first."""
        messages, self._messages = self._messages, []
        return messages


class Relay:
    """A line from controller and workers to the driver; it travels by pickle.

    A lost line never fails the work: messages are then dropped. Where its process is killed, those are lost that the
    driver had not fetched, and the line goes on with the next one.
    """

    def __init__(self) -> None:
        # Beside the driver: a worker's node that dies then takes no message along. Hard: Ray puts an actor that asks
        # for nothing on any node, whatever it softly prefers.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor = RelayActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]

    def push(self, kind: str, data: Any) -> None:
        """Deliver a message; it has arrived when the call returns, so the sender may die afterwards."""
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            ray.get(self._actor.push.remote(cloudpickle.dumps((kind, data))), timeout=30)

    def drain(self) -> list[Message]:
        """Fetch the messages that have come since the last call."""
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            return [cloudpickle.loads(message) for message in ray.get(self._actor.drain.remote(), timeout=30)]
        return []

    def close(self) -> None:
        """End the actor."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._actor)
