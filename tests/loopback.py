"""A tracking server of one's own on a free loopback port, which can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path


class TrackingServer:
    """MLflow's server with a SQLite database and artefacts in a folder.

    Parameters
    ----------
    folder : Path
        What it keeps outlives it.
    artifacts : str, optional
        Where the server itself keeps artefacts; default: in the folder.
    options : sequence of str
        Further options of `mlflow server`.
    environment : mapping
        Added to this process's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        artifacts: str | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self._artifacts, self._options = artifacts or f"{folder}/artifacts", list(options)
        self._environment = dict(environment or {})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> TrackingServer:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", self._artifacts, *self._options]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {**os.environ, **quiet, **self._environment}
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 240
        while not self._healthy():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.2)
        return self

    def kill(self) -> None:
        """End it at once, its worker too."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order; nothing happens where it is not running."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)  # the session that was started above: the server and its worker
            self._process.wait(30)
            self._process = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False
