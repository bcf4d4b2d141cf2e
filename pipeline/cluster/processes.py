"""Processes on the cluster that do nothing: how long Ray takes to begin one."""

from __future__ import annotations

from typing import Any

import ray


def answered(count: int) -> None:
    """Begin so many processes at once, wait until each has answered, and end them."""
    processes: list[Any] = [ray.remote(_Idle).options(num_cpus=0).remote() for _ in range(count)]
    try:
        ray.get([process.answer.remote() for process in processes])
    finally:
        for process in processes:
            ray.kill(process)


class _Idle:
    def answer(self) -> None:
        """Be there."""
