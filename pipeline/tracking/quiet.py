"""MLflow's environment and loggers: no banner, no progress bar, no telemetry, no minutes of retries."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

_LOGGERS = ("mlflow", "alembic", "sqlalchemy", "urllib3.connectionpool", "git")
_environment_lock = threading.RLock()

_DEFAULTS = {
    # MLflow sends usage data to its makers unless told not to; a run of ours talks to no one but the user's server.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The defaults (120 s, 7 retries, doubling) let one call on a dead server hang for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def prepare(*, verbose: bool = False) -> None:
    """Set what MLflow reads from the environment and quieten its loggers; call it before the first ``import mlflow``.

    Variables that the user has set are left alone.

    Parameters
    ----------
    verbose : bool
        Leave the loggers at MLflow's own levels.
    """
    with _environment_lock:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        if verbose:
            return
        # Importing MLflow sets its loggers' levels anew from this variable; without it the migrations' lines come back.
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while; only one thread at a time is inside.

    Parameters
    ----------
    **values : str
        Names and values; the former ones come back at the end.
    """
    with _environment_lock:
        former = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in former.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def load() -> None:
    """Import MLflow, prepared: what takes seconds is then over."""
    prepare()
    import mlflow  # noqa: F401
