"""The process group of a training run, set up by Ray Train's controller.

Ray's own ``TorchConfig`` does the same but imports torch where it is unpickled: in the driver and in the controller,
which compute nothing. Here torch is imported on the workers alone, seconds earlier on a small machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


class ProcessGroupConfig(BackendConfig):
    """Settings of the group.

    Parameters
    ----------
    backend : str
        ``gloo`` or ``nccl``.
    timeout : float
        How long a collective may take [s].
    """

    def __init__(self, backend: str, timeout: float = 1800.0) -> None:
        self.backend = backend
        self.timeout = timeout

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that does the setting up."""
        return ProcessGroupBackend

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"backend": self.backend, "timeout": self.timeout}


class ProcessGroupBackend(Backend):
    """Joins the workers into one group before the loop starts and takes it down after it."""

    # Every worker sees all GPUs of its node, so that NCCL finds the direct links between them.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Agree on an address at rank 0 and let every worker join."""
        assert isinstance(backend_config, ProcessGroupConfig)
        size = len(worker_group)
        if size == 1:
            return
        address, port = worker_group.execute_single(0, _free_address)
        joins = [
            worker_group.execute_single_async(
                rank, _join, address, port, rank, size, backend_config.backend, backend_config.timeout
            )
            for rank in range(size)
        ]
        ray.get(joins)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Leave the group; a worker that has died can't and need not."""
        if len(worker_group) > 1:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(worker_group.execute_async(_leave), timeout=5)


def _free_address() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _join(address: str, port: int, rank: int, size: int, backend: str, timeout: float) -> None:
    import torch
    from torch import distributed

    if backend == "nccl":
        # Set before NCCL makes its communicators: else every rank would open a context on GPU 0.
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    distributed.init_process_group(
        backend,
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )


def _leave() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
