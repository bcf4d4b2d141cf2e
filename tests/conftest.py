"""One Ray for all tests that need one: starting it takes ten seconds on two processors."""

from __future__ import annotations

import contextlib
import os
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
def _interrupt() -> None:
    """Let Ctrl-C interrupt, here and in what is started from here.

    A shell has what it runs in the background ignore it, and Ray Train leaves a handler behind where a test fits in the
    main thread, though its run is over.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Keep what a command with -v sets for its process from the tests that follow."""
    yield
    os.environ.pop("FACULTY_VERBOSE", None)


@pytest.fixture(scope="session", autouse=True)
def _end() -> Iterator[None]:
    yield
    _running.close()
