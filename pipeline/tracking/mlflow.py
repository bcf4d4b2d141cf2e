"""The MLflow tracker: an explicit client, no global active run; threads may share it and workers may be sent it."""

from __future__ import annotations

import contextlib
import getpass
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from pipeline.tracking.entries import (
    check_key,
    clean_document,
    clean_metrics,
    clean_name,
    clean_params,
    clean_tags,
    clean_text,
    document_name,
    table_document,
)
from pipeline.tracking.quiet import prepare
from pipeline.tracking.redact import redact
from pipeline.tracking.tracker import ERROR_TAG, KEY_TAG, ending

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_PARENT_TAG = "mlflow.parentRunId"
_PARAMS_A_BATCH = 100
_METRICS_A_BATCH = 1000
_PAUSE_S = 60.0
_OUTAGE_CODES = {"TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED"}

_log = logging.getLogger("pipeline.tracking")


class MlflowTracker:
    """One MLflow run.

    What is recorded during the run is dropped, with one warning, while the store does not answer: hours of compute
    don't end for a number that was not written. Opening a run, in contrast, must succeed.

    Parameters
    ----------
    uri : str
        The tracking URI; it may carry credentials, which are never shown.
    run_id, experiment_id : str
        An existing run and its experiment.
    continued : bool
        Whether the run held values before: points that it has already are then not recorded a second time.
    """

    def __init__(self, uri: str, run_id: str, experiment_id: str, *, continued: bool = False) -> None:
        prepare()
        self._uri = uri
        self._run_id = run_id
        self._experiment_id = experiment_id
        self._continued = continued
        self._client: MlflowClient | None = None
        self._outage = _Outage(redact(uri))
        self._lock = threading.RLock()
        self._known_params: dict[str, str] | None = None if continued else {}
        self._known_points: dict[str, set[tuple[int, str]]] = {}

    def __repr__(self) -> str:
        return f"MlflowTracker(uri={self.uri!r}, run_id={self._run_id!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self._uri, "run_id": self._run_id, "experiment_id": self._experiment_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Another process may have written meanwhile, so that this one has to look at what is there.
        self.__init__(**state, continued=True)  # type: ignore[misc]

    @property
    def run_id(self) -> str:
        """The run's identifier."""
        return self._run_id

    @property
    def experiment_id(self) -> str:
        """The experiment's identifier."""
        return self._experiment_id

    @property
    def uri(self) -> str:
        """The tracking URI without its credentials."""
        return redact(self._uri)

    @property
    def secret_uri(self) -> str:
        """The tracking URI as it was given; never print or record it."""
        return self._uri

    @property
    def client(self) -> MlflowClient:
        """The client that all calls go through."""
        if self._client is None:
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(self._uri, registry_uri=self._uri)
        return self._client

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        *,
        key: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Iterator[MlflowTracker]:
        """Open a child run, or continue the one with the same key.

        Raises
        ------
        StageError
            When the store can't be reached or refuses the run.
        """
        with self._lock, translated(self.uri):  # two threads with the same key share one run
            child = open_run(
                self.client, self._uri, self._experiment_id, name, key=key, parent=self._run_id, outage=self._outage
            )
        with child.recording(tags, params):
            yield child

    @contextlib.contextmanager
    def recording(self, tags: Mapping[str, Any] | None, params: Mapping[str, Any] | None) -> Iterator[None]:
        """Record `tags` and `params`, run the block and set the run's status by how the block ended."""
        with ending(self._close):
            if tags:
                self.tags(tags)
            if params:
                self.params(params)
            yield

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; one that the run holds with another value keeps it, and the new value becomes a tag.

        Raises
        ------
        StageError
            When the store refuses them.
        """
        texts = clean_params(values)
        with self._lock:
            known = self._params_of_run()
            fresh = {name: text for name, text in texts.items() if name not in known}
            changed = {name: text for name, text in texts.items() if name in known and known[name] != text}
            known.update(fresh)
        if fresh:
            from mlflow.entities import Param

            items = [Param(name, text) for name, text in fresh.items()]
            for batch in _batches(items, _PARAMS_A_BATCH):
                self._send(self.client.log_batch, self._run_id, params=batch)
        if changed:  # MLflow's parameters are written once
            self.tags({clean_name(f"changed.{name}"): text for name, text in changed.items()})

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers at a step; a point that a continued run holds already is not recorded again.

        Raises
        ------
        ValueError
            When a value is not a number.
        StageError
            When the store refuses them.
        """
        from mlflow.entities import Metric

        at, now = 0 if step is None else int(step), int(time.time() * 1000)
        numbers = clean_metrics(values)
        if self._continued:
            numbers = {name: number for name, number in numbers.items() if not self._holds(name, at, number)}
        items = [Metric(name, number, now, at) for name, number in numbers.items()]
        for batch in _batches(items, _METRICS_A_BATCH):
            self._send(self.client.log_batch, self._run_id, metrics=batch)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags.

        Raises
        ------
        StageError
            When the store refuses them.
        """
        from mlflow.entities import RunTag

        items = [RunTag(name, text) for name, text in clean_tags(values).items()]
        for batch in _batches(items, _PARAMS_A_BATCH):
            self._send(self.client.log_batch, self._run_id, tags=batch)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Upload a file, or a folder's content.

        Raises
        ------
        FileNotFoundError
            When it does not exist.
        StageError
            When the store refuses it.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"the artefact {path} does not exist")
        upload = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        self._send(upload, self._run_id, str(path), folder)

    def document(self, name: str, data: Any) -> None:
        """Upload nested data as JSON."""
        self._send(self.client.log_dict, self._run_id, clean_document(data), document_name(name))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Upload rows as a table in JSON."""
        self.document(name, table_document(list(rows)))

    def _close(self, status: str, reason: str | None) -> None:
        # A store that refuses the status must not hide how the block ended.
        with contextlib.suppress(StageError):
            if reason:
                self.tags({ERROR_TAG: reason})
            self._send(self.client.set_terminated, self._run_id, status)

    def _params_of_run(self) -> dict[str, str]:
        if self._known_params is None:
            run = self._send(self.client.get_run, self._run_id)
            self._known_params = dict(run.data.params) if run is not None else {}
        return self._known_params

    def _holds(self, name: str, step: int, number: float) -> bool:
        with self._lock:
            if name not in self._known_points:
                history = self._send(self.client.get_metric_history, self._run_id, name) or []
                self._known_points[name] = {_point(metric) for metric in history}
            return (step, repr(number)) in self._known_points[name]

    def _send(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return what the client's call returns; None while the store does not answer."""
        if self._outage.lasts():
            return None
        try:
            return call(*arguments, **named)
        except Exception as error:
            if not _is_outage(error):
                raise StageError(f"MLflow at {self.uri}: {one_line(error)}") from None
            self._outage.begins(error)
            return None


class _Outage:
    """Remembers that the store did not answer, so that not every call waits for it anew; shared by a run's children."""

    def __init__(self, shown_uri: str) -> None:
        self._shown_uri = shown_uri
        self._until = 0.0
        self._told = False

    def lasts(self) -> bool:
        return time.monotonic() < self._until

    def begins(self, error: Exception) -> None:
        self._until = time.monotonic() + _PAUSE_S
        if not self._told:
            self._told = True
            _log.warning(
                "MLflow at %s does not answer; the run goes on unrecorded: %s", self._shown_uri, one_line(error)
            )


def open_run(
    client: MlflowClient,
    uri: str,
    experiment_id: str,
    name: str,
    *,
    key: str | None,
    parent: str | None,
    outage: _Outage | None = None,
) -> MlflowTracker:
    """Continue the run that has this key under this parent, or create one.

    Parameters
    ----------
    client : MlflowClient
        A client of `uri`.
    uri, experiment_id : str
        The store and the experiment.
    name : str
        The run's name, where one is created.
    key : str, optional
        What the run is found again by; without it a run is always created.
    parent : str, optional
        The parent's run id.
    """
    tags = {"mlflow.source.name": "faculty", "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    if parent is not None:
        tags[_PARENT_TAG] = parent
    if key is not None:
        tags[KEY_TAG] = check_key(key)
        found = _find_run(client, experiment_id, key, parent)
        if found is not None:
            client.update_run(found.info.run_id, status="RUNNING")
            if ERROR_TAG in found.data.tags:  # what went wrong the last time does not hold for this time
                client.delete_tag(found.info.run_id, ERROR_TAG)
            tracker = MlflowTracker(uri, found.info.run_id, experiment_id, continued=True)
    if key is None or found is None:
        created = client.create_run(experiment_id, tags=tags, run_name=clean_text(name)[:250])
        tracker = MlflowTracker(uri, created.info.run_id, experiment_id)
    tracker._client = client
    if outage is not None:
        tracker._outage = outage
    return tracker


def _find_run(client: MlflowClient, experiment_id: str, key: str, parent: str | None) -> Run | None:
    query = f"tags.`{KEY_TAG}` = '{key}'"
    if parent is not None:
        query += f" and tags.`{_PARENT_TAG}` = '{parent}'"
    found = client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"], max_results=1000)
    return next((run for run in found if run.data.tags.get(_PARENT_TAG) == parent), None)


@contextlib.contextmanager
def translated(shown_uri: str) -> Iterator[None]:
    """Turn what MLflow raises into a StageError of one line, without credentials."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise StageError(f"MLflow at {redact(shown_uri)}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """Return an error's message without credentials, in one line of at most 500 characters."""
    text = " ".join(redact(str(error)).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:497]}…"


def _is_outage(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        # MLflow wraps a failed connection in an exception that has no code of its own, so the message tells.
        return error.error_code in _OUTAGE_CODES or "API request to" in str(error)
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("requests.")


def _point(metric: Any) -> tuple[int, str]:
    return metric.step, repr(float(metric.value))


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"
