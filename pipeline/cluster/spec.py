"""Where the work runs: settings of the cluster."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from pipeline.strict import StrictModel


class ClusterSpec(StrictModel):
    """A local Ray in this process tree, or an existing cluster.

    Parameters
    ----------
    address : str, optional
        None starts a local Ray that ends with the session. ``auto`` takes the cluster of this node (`ray job submit`
        and KubeRay RayJobs), ``host:6379`` joins a cluster as a driver, ``ray://host:10001`` goes through Ray Client.
    num_cpus : int, optional
        Processors of the local Ray; None counts those of the machine. Not for an existing cluster.
    num_gpus : int, optional
        GPUs of the local Ray; None detects them, 0 hides them. Not for an existing cluster.
    object_store_mb : int, optional
        Shared memory of the local Ray [MiB]; None leaves the choice to Ray. Not for an existing cluster.
    runtime_env : dict
        Ray's runtime environment of every worker (``working_dir``, ``pip``, ``env_vars``, ``image_uri``, …), for an
        existing cluster whose nodes do not have this package installed.
    autoscaling : bool
        The cluster adds nodes on demand: requests beyond its present size are waited for instead of refused.
    temp_dir : str, optional
        Where the local Ray keeps its sockets and logs; None takes Ray's default where its path is short enough for a
        Unix socket and a folder under ``/tmp`` otherwise.
    """

    address: str | None = None
    num_cpus: int | None = Field(default=None, ge=1)
    num_gpus: int | None = Field(default=None, ge=0)
    object_store_mb: int | None = Field(default=None, ge=80)
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    autoscaling: bool = False
    temp_dir: str | None = None

    @field_validator("address")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty; leave it out for a local Ray")
        return value

    @property
    def local(self) -> bool:
        """Whether the session starts its own Ray on this machine."""
        return self.address is None or self.address == "local"
