"""Placement groups that this job made, and what is to become of those that nobody removes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup


@dataclass(frozen=True)
class OwnGroup:
    """A placement group of this job.

    Attributes
    ----------
    group : PlacementGroup
    by_actor : bool
        Made by an actor, not by the driver.
    orphaned : bool
        Its creator has died.
    """

    group: PlacementGroup
    by_actor: bool
    orphaned: bool


def own_groups() -> list[OwnGroup]:
    """Return the groups of this job, but for detached ones and those that are removed.

    Ray's own table of them names neither job nor creator, and lists those of all jobs of a cluster.
    """
    job = ray.get_runtime_context().get_job_id()
    table: Any = gcs_pb2
    found = []
    for data in state.state._connect_and_get_accessor().get_placement_group_table():
        group = table.PlacementGroupTableData.FromString(data)
        removed = group.state == table.PlacementGroupTableData.PlacementGroupState.REMOVED
        if group.creator_job_id.hex() == job and not group.is_detached and not removed:
            by_actor = any(byte != 0xFF for byte in group.creator_actor_id)
            handle = PlacementGroup(ray.PlacementGroupID(group.placement_group_id))
            found.append(OwnGroup(handle, by_actor, group.creator_actor_dead))
    return found
