"""The head of a Ray cluster of one node, as `ray start --head` makes it, and its end."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback device that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextlib.contextmanager
def started(*options: str, environment: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a head with two processors on loopback; yield its process and its folder, which has `start.log`."""
    folder = Path(tempfile.mkdtemp(prefix="fj-", dir="/tmp"))  # a socket's path may not be long
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
    command += ["--num-gpus=0", f"--object-store-memory={150 * 2**20}", f"--temp-dir={folder}"]
    with (folder / "start.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--disable-usage-stats", *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield process, folder
    finally:
        begun = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        process.wait(30)
        _, alive = psutil.wait_procs(begun, timeout=20)
        for one in alive:
            one.kill()
        psutil.wait_procs(alive, timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def kill(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """`kill -9` of all that a head has started, and itself, as where its machine goes; return these processes."""
    head = psutil.Process(process.pid)
    gone = [head, *head.children(recursive=True)]
    for one in gone:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(30)
    return gone
