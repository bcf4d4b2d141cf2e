"""One Ray for all tests that need one: starting it takes ten seconds on two processors."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

_running = contextlib.ExitStack()


@pytest.fixture(scope="module")
def cluster() -> None:
    """A Ray with two processors, and a GPU that exists on paper; it stays for the modules that follow."""
    import ray

    from pipeline.cluster.session import session
    from pipeline.cluster.spec import ClusterSpec

    if not ray.is_initialized():
        _running.enter_context(session(ClusterSpec(num_cpus=2, num_gpus=1)))


@pytest.fixture(scope="module")
def no_cluster() -> None:
    """This process is in no Ray session."""
    _running.close()


@pytest.fixture(scope="module", autouse=True)
def _same_interrupt() -> Iterator[None]:
    """Take back the handler that Ray Train leaves behind where a test fits in the main thread; its run is over."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _end() -> Iterator[None]:
    yield
    _running.close()
