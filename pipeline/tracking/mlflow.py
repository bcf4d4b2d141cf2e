"""The MLflow tracker: an explicit client, no global active run; threads may share it and workers may be sent it."""

from __future__ import annotations

import atexit
import contextlib
import getpass
import json
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.entries import (
    check_key,
    clean_document,
    clean_metrics,
    clean_params,
    clean_tags,
    clean_text,
    document_name,
    table_document,
)
from pipeline.tracking.quiet import prepare
from pipeline.tracking.redact import redact
from pipeline.tracking.sender import Sender
from pipeline.tracking.tracker import ERROR_TAG, ending

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from pipeline.tracking.journal import Journal

_PATIENCE_S = 60.0
_AT_EXIT_S = 5.0
_DIGEST_LIMIT = 36  # the width of MLflow's column


class MlflowTracker:
    """One MLflow run.

    What is recorded goes to a journal and from there, in the background and in order, to MLflow: recording returns at
    once, and while the store does not answer nothing is lost. A record that the store refuses is left out with a
    warning. Reading (:attr:`run_id` of a child, the registry) waits for the store.

    Parameters
    ----------
    uri : str
        The tracking URI; it may carry credentials, which are never shown.
    run_id : str
        An existing run; or a handle of one that :meth:`opened` asks for.
    experiment_id : str or callable
        Its experiment, or what finds it when it is needed.
    continued : bool
        Whether the run held values before: points that it has already are then not recorded a second time.
    exists : bool
        Whether `run_id` is one of the store.
    journal : Journal, optional
        Takes the records until they are sent; without it they wait in memory alone.
    left : sequence of Journal
        What former processes could not send; it goes first.
    timeout : float
        Seconds without an answer after which the end of the run does not wait any longer.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        experiment_id: str | Callable[[], str],
        *,
        continued: bool = False,
        exists: bool = True,
        journal: Journal | None = None,
        left: Sequence[Journal] = (),
        timeout: float = 10.0,
    ) -> None:
        prepare()
        self._uri = uri
        self._handle = run_id
        self._timeout = timeout
        self._access = _Access(uri)
        self._delivery = Delivery(self._access.client, experiment_id, {run_id: continued} if exists else {}, user())
        self._sender = Sender(self._delivery, redact(uri), journal=journal, left=left)
        self._sender.start()
        _at_exit(self._sender)

    def __repr__(self) -> str:
        return f"MlflowTracker(uri={self.uri!r}, run={self._handle!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "uri": self._uri,
            "run_id": self.run_id,
            "experiment_id": self.experiment_id,
            "timeout": self._timeout,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Another process may have written meanwhile, so that this one has to look at what is there.
        self.__init__(**state, continued=True)  # type: ignore[misc]

    @property
    def run_id(self) -> str:
        """The run's identifier; of a child run that is being opened it is waited for.

        Raises
        ------
        StageError
            When the store does not answer.
        """
        return self._sender.id_of(self._handle, max(self._timeout, _PATIENCE_S))

    @property
    def experiment_id(self) -> str:
        """The experiment's identifier."""
        return self._delivery.experiment_id

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
        """A client of the store, for what is not recorded but read or registered; :meth:`flush` before."""
        return self._access.client()

    @property
    def waiting(self) -> int:
        """Number of records on their way, those of parent and children included."""
        return self._sender.waiting

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        *,
        key: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Iterator[MlflowTracker]:
        """Open a child run, or continue the one with the same key."""
        child = object.__new__(MlflowTracker)
        child.__dict__ |= self.__dict__ | {"_handle": uuid.uuid4().hex}
        child.opened(name, key=key, parent=self._handle)
        with child.recording(tags, params):
            yield child

    def opened(self, name: str, *, key: str | None, parent: str | None = None) -> None:
        """Ask for the run of this tracker to be opened, or continued where there is one with the same key."""
        self._sender.put(
            {
                "do": "open",
                "run": self._handle,
                "parent": parent,
                "name": clean_text(name)[:250],
                # A record that is sent twice must not open two runs, so that every run has a key.
                "key": check_key(key) if key is not None else self._handle,
                "time": _now(),
            }
        )

    @contextlib.contextmanager
    def recording(self, tags: Mapping[str, Any] | None, params: Mapping[str, Any] | None) -> Iterator[None]:
        """Record `tags` and `params`, run the block and set the run's status by how the block ended."""
        with ending(self._end):
            if tags:
                self.tags(tags)
            if params:
                self.params(params)
            yield

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; one that the run holds with another value keeps it, and the new value becomes a tag."""
        self._put("params", clean_params(values))

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers at a step; a point that a run holds at that step already is not recorded again.

        Numbers without a step stand at 0 and are recorded whenever they change.

        Raises
        ------
        ValueError
            When a value is not a number.
        """
        self._put("metrics", clean_metrics(values), step=None if step is None else int(step), time=_now())

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags."""
        self._put("tags", clean_tags(values))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Upload a file, or a folder's content, as it is now.

        Raises
        ------
        FileNotFoundError
            When it does not exist.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"the artefact {path} does not exist")
        kept = self._sender.keep(path)
        self._sender.put({"do": "artifact", "run": self._handle, "name": path.name, "path": kept, "folder": folder})

    def document(self, name: str, data: Any) -> None:
        """Upload nested data as JSON."""
        self._sender.put(
            {"do": "document", "run": self._handle, "name": document_name(name), "data": clean_document(data)}
        )

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Upload rows as a table in JSON."""
        self.document(name, table_document(list(rows)))

    def dataset(
        self, name: str, *, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record images that the run used as an input; the digest is cut to the 36 characters MLflow holds."""
        self._sender.put(
            {
                "do": "dataset",
                "run": self._handle,
                "name": clean_text(name)[:500],
                "digest": digest[:_DIGEST_LIMIT],
                "source": json.dumps({"uri": redact(source)}),
                "context": clean_text(context),
                "profile": None if profile is None else json.dumps(clean_document(profile)),
            }
        )

    def flush(self) -> None:
        """Wait until the store has all that was recorded.

        Raises
        ------
        StageError
            When it does not answer.
        """
        if not self._sender.flush(self._timeout):
            raise StageError(f"MLflow at {self.uri} does not answer, and {self._sender.waiting} records wait for it")

    def close(self) -> int:
        """End the recording of this run and its children; return the number of records that could not be sent.

        They stay in the journal, where there is one, and the next run with the same folder sends them.
        """
        return self._sender.close(self._timeout)

    def _put(self, what: str, values: Mapping[str, Any], **fields: Any) -> None:
        if values:
            self._sender.put({"do": what, "run": self._handle, "values": values, **fields})

    def _end(self, status: str, reason: str | None) -> None:
        if reason:
            self.tags({ERROR_TAG: reason})
        self._sender.put({"do": "end", "run": self._handle, "status": status, "time": _now()})


class _Access:
    """The client of a store, made when it is first needed."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._made: MlflowClient | None = None
        self._lock = threading.Lock()

    def client(self) -> MlflowClient:
        with self._lock:
            if self._made is None:
                from mlflow.tracking import MlflowClient

                # Without a registry URI of its own the client would take one from the environment or the process.
                self._made = MlflowClient(self._uri, registry_uri=self._uri)
            return self._made


def user() -> str:
    """Return the name of whoever runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def _at_exit(sender: Sender) -> None:
    """Give a tracker that nobody closed, as a worker's, a little time to send the rest when the process ends."""
    reference = weakref.ref(sender)

    def finish() -> None:
        if (left := reference()) is not None and left.waiting:
            left.close(_AT_EXIT_S)

    atexit.register(finish)


def _now() -> int:
    """Return the time in milliseconds, never the same twice: of two points at one time the larger one would count."""
    global _latest
    with _clock:
        _latest = max(int(time.time() * 1000), _latest + 1)
        return _latest


_latest = 0
_clock = threading.Lock()
