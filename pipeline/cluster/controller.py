"""What happens in Ray Train's controller: what it tells the driver, and what it need not do on a single machine.

This module is imported by the controller, and therefore imports no torch.
"""

from __future__ import annotations

from typing import Any, cast

import ray
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipeline.cluster.relay import Relay


class ReportCallback(UserCallback):
    """Passes every report of rank 0 on, once all ranks have made it and its checkpoint is registered."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Send rank 0's metrics."""
        self._relay.push("report", metrics[0])


class HandleCallback(ControllerCallback):
    """Gives the driver the controller itself, so that it can end the run early and in good order."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def after_controller_start(self, train_run_context: Any) -> None:
        """Send the controller's handle."""
        self._relay.push("controller", ray.get_runtime_context().current_actor)


def callbacks(relay: Relay) -> list[Any]:
    """Return the callbacks of a run."""
    return [ReportCallback(relay), HandleCallback(relay)]


class ClusterTrainer(DataParallelTrainer):
    """Ray's trainer without the actor that splits Ray Data sets among the workers: each opens its shard itself."""

    _skipped = frozenset({"DatasetsCallback"})

    def _create_default_callbacks(self) -> list[Any]:
        return [item for item in super()._create_default_callbacks() if type(item).__name__ not in self._skipped]


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
