"""What happens in Ray Train's controller: what it tells the driver, and what it need not do on a single machine.

This module is imported by the controller, and therefore imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import ray
from ray._private.state import state
from ray.train import UserCallback
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy, ScalingDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipeline.cluster.causes import is_death, is_memory, memory_failures, note_memory_failure, tell_attempt
from pipeline.cluster.relay import Relay
from pipeline.engine.checkpoint import CheckpointStore

_ROOM_S = 30.0
_LOOK_S = 5.0
_KNOCK_S = 2.0


class MemoryCallback(UserCallback):
    """Writes down that Ray ended a worker because memory ran short: the worker itself had no time to."""

    def __init__(self, storage: str, name: str) -> None:
        self._storage = storage
        self._name = name
        self._seen: set[str] = set()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Count one failure, however many workers and looks at them tell of it."""
        killed = {str(error) for error in worker_exceptions.values() if is_death(error) and is_memory(error)}
        if killed - self._seen:
            store = CheckpointStore(self._storage, self._name)
            note_memory_failure(store, memory_failures(store) + 1)
        self._seen |= killed


class HandleCallback(ControllerCallback):
    """Gives the driver the controller itself, so that it can end the run early and in good order."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def after_controller_start(self, train_run_context: Any) -> None:
        """Send the controller's handle."""
        self._relay.push("controller", ray.get_runtime_context().current_actor)


class AttemptCallback(WorkerGroupCallback):
    """Tells rank 0 how often the workers were started before. It is the controller that starts them, so it can count.

    Parameters
    ----------
    starts : int
        How often the controllers before this one started workers.
    """

    def __init__(self, starts: int) -> None:
        self._starts = starts

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Tell and count."""
        worker_group.execute_single(0, tell_attempt, self._starts)
        self._starts += 1


def callbacks(relay: Relay, storage: str, name: str, starts: int) -> list[Any]:
    """Return the callbacks of a run whose checkpoints lie in `storage`/`name` and that had `starts` starts before."""
    return [HandleCallback(relay), MemoryCallback(storage, name), AttemptCallback(starts)]


class ClusterTrainer(DataParallelTrainer):
    """Ray's trainer without the actor that splits Ray Data sets among the workers: each opens its shard itself."""

    _skipped = frozenset({"DatasetsCallback"})

    def _create_default_callbacks(self) -> list[Any]:
        return [item for item in super()._create_default_callbacks() if type(item).__name__ not in self._skipped]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        scaling: Any = self.scaling_config
        if scaling.elasticity_enabled:
            arguments["scaling_policy"] = Elastic(scaling)
        return super()._initialize_and_run_controller(**arguments)


class LocalTrainer(ClusterTrainer):
    """The same for a Ray that lives and ends with its driver, on one machine.

    Ray Train starts one more process that frees the resources of a controller that died and one that asks the
    autoscaler for nodes; here the session's end does the former, and there are no nodes to ask for. Each would take
    about three seconds of a processor before the loop starts.
    """

    _skipped = frozenset({"DatasetsCallback", "PlacementGroupCleanerCallback"})

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = FixedSize(cast(Any, self.scaling_config))
        return super()._initialize_and_run_controller(**arguments)


class Elastic(ElasticScalingPolicy):
    """As many workers as the nodes have room for, within bounds, on a view of the cluster that is not old.

    Ray looks at the nodes every 20 s, and takes 10 to 15 s to see that one has died. Right after one was lost it would
    ask for as many workers as before, and wait for them in vain.
    """

    _going: frozenset[str] = frozenset()

    def after_controller_start(self, train_run_context: Any) -> None:
        """Limit the wait for room: when it is over, the size is chosen anew."""
        os.environ[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR] = str(_ROOM_S)
        super().after_controller_start(train_run_context)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Look at the nodes before deciding; those that are about to go, or are silent, are no room."""
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            coordinator = self._autoscaling_coordinator
            ray.get(coordinator.get_reserved_resources.remote(self._requester_id, recompute=True), timeout=_LOOK_S)
        self._going = frozenset(state.get_draining_nodes() or ()) | _silent()
        try:
            return super().make_decision_for_non_running_worker_group()
        finally:
            self._going = frozenset()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        staying = {node: room for node, room in reserved_resources.items() if node not in self._going}
        return super()._count_possible_workers(staying)


def _silent() -> frozenset[str]:
    """Return the nodes that Ray takes for alive and whose raylet takes no connection."""

    def silent(node: dict[str, Any]) -> bool:
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_KNOCK_S).close()
        except OSError:
            return True
        return False

    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(max_workers=32) as threads:
        found = list(threads.map(silent, nodes))
    return frozenset(node["NodeID"] for node, gone in zip(nodes, found, strict=True) if gone)


class FixedSize(FixedScalingPolicy):
    """A fixed number of workers that no autoscaler hears of."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask for nothing."""

    def before_controller_abort(self) -> None:
        """Take nothing back."""

    async def before_controller_shutdown(self) -> None:
        """Take nothing back."""

    def _maybe_send_resource_request(self) -> None:
        pass
