"""Sends records to MLflow in the background, in order, as often as it takes."""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from pipeline.tracking.entries import clean_name
from pipeline.tracking.journal import Journal
from pipeline.tracking.redact import one_line
from pipeline.tracking.tracker import ERROR_TAG, KEY_TAG

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
_BATCHED = ("params", "metrics", "tags")
_MOST = {"params": 100, "metrics": 1000, "tags": 100}  # of one request, as MLflow's servers have it
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_CLOSING_PAUSE_S = 1.0
_DOUBTS = 5  # times in a row that a record fails and the store answers otherwise: then the record is to blame
_LONGEST_UPLOAD_S = 600.0
_PATIENCE_S = 60.0  # an HTTP request's own time-out

_log = logging.getLogger("pipeline.tracking")


@dataclass
class _Item:
    """A record on its way, the journal it stands in, and where it ends there."""

    record: dict[str, Any]
    journal: Journal | None = None
    end: int = 0
    doubts: int = 0

    @property
    def upload(self) -> bool:
        return self.record["do"] in ("artifact", "document")

    @property
    def path(self) -> Path:
        path = Path(self.record["path"])
        return path if self.journal is None else self.journal.path.parent / path


@dataclass
class _State:
    """What a run of the store holds already, as far as it had to be looked up."""

    run_id: str
    continued: bool
    params: dict[str, str] = field(default_factory=dict)
    points: dict[str, dict[int, set[str]]] = field(default_factory=dict)


class Sender:
    """A queue of records for one store, and the thread that empties it.

    While the store does not answer, records wait: in memory and, where there is one, in a journal that the next process
    takes over. A record that the store refuses is left out, with a warning, so that it does not hold up the others.
    Sending a record twice changes nothing: points have the time they were recorded at, and runs are found by key.

    Parameters
    ----------
    client : callable
        Gives the client; called in the sending thread.
    experiment : str or callable
        The experiment of new runs: its id, or what finds it, called in the sending thread.
    shown_uri : str
        The store without credentials.
    roots : mapping of str to bool
        Runs that exist, and whether they held values before.
    journal : Journal, optional
        Takes new records.
    left : iterable of Journal
        Of former processes; sent first.
    user : str
        Whom new runs belong to.
    """

    def __init__(
        self,
        client: Callable[[], MlflowClient],
        experiment: str | Callable[[], str],
        shown_uri: str,
        roots: dict[str, bool],
        *,
        journal: Journal | None = None,
        left: Iterable[Journal] = (),
        user: str = "unknown",
    ) -> None:
        self._client, self._experiment, self._shown_uri, self._user = client, experiment, shown_uri, user
        self._journal = journal
        self._ids: dict[str, str | None] = {run_id: run_id for run_id in roots}
        self._states = {run_id: _State(run_id, continued) for run_id, continued in roots.items()}
        self._by_key: dict[tuple[str | None, str], str] = {}
        self._queue: deque[_Item] = deque()
        self._later: deque[_Item] = deque()  # uploads that failed, so that they don't hold up the numbers
        self._pauses = {"numbers": _Pause(), "uploads": _Pause()}
        self._reached: dict[Journal, int] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = self._abandoned = self._uploading = False
        self._progress = time.monotonic()
        self._former = list(left)
        for one in self._former:
            self._take_over(one)

    def put(self, record: dict[str, Any]) -> None:
        """Write a record down and let it be sent; returns at once."""
        with self._changed:
            if self._closing:
                _log.warning("MLflow at %s: %s came after the end of the run", self._shown_uri, _described(record))
                return
            end = 0 if self._journal is None else self._journal.append(record)
            if record["do"] == "end" and self._journal is not None:
                self._journal.sync()
            self._queue.append(_Item(record, self._journal, end))
        self.start()

    def keep(self, source: Path) -> str:
        """Keep a file, or what a folder holds, as it is now until it is uploaded; return where it is."""
        if self._journal is None:
            return str(source.absolute())
        try:
            return str(self._journal.keep(source).relative_to(self._journal.path.parent))
        except OSError:
            return str(source.absolute())

    def start(self) -> None:
        """Begin to send what waits."""
        with self._changed:
            if self._queue and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
                self._progress = time.monotonic()
                self._thread.start()
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Number of records that were not sent yet."""
        with self._changed:
            return len(self._queue) + len(self._later)

    @property
    def experiment_id(self) -> str:
        """The experiment of new runs; asks the store where that is not known yet."""
        if not isinstance(self._experiment, str):
            self._experiment = self._experiment()
        return self._experiment

    def id_of(self, handle: str, timeout: float) -> str:
        """Return a run's identifier in the store; wait for it.

        Raises
        ------
        StageError
            When the store did not give one within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while handle not in self._ids and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            found = self._ids.get(handle)
        if found is None:
            raise StageError(f"MLflow at {self._shown_uri} has no such run yet; it does not answer, or refused it")
        return found

    def flush(self, timeout: float) -> bool:
        """Wait until all has been sent; give up when nothing has moved for `timeout` seconds. Return whether it was."""
        with self._changed:
            self._progress = max(self._progress, time.monotonic())
            while self._queue or self._later:
                silent = any(pause.told for pause in self._pauses.values())
                patience = timeout if silent else max(timeout, _PATIENCE_S)
                left = self._progress + (_LONGEST_UPLOAD_S if self._uploading else patience) - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 1.0))
        return True

    def close(self, timeout: float) -> int:
        """Send the rest, as :meth:`flush` does; return the number of records that could not be sent.

        These stay in the journal for the next process.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        done = self.flush(timeout)
        with self._changed:
            self._abandoned = True
            waiting = len(self._queue) + len(self._later)
            self._changed.notify_all()
        if self._thread is not None and done:
            self._thread.join()
        for journal in [*self._former, *([self._journal] if self._journal is not None else [])]:
            if any(item.journal is journal for item in (*self._queue, *self._later)):
                journal.close()
            else:
                journal.remove()
        self._former, self._journal = [], None
        return waiting

    def _take_over(self, journal: Journal) -> None:
        records = list(journal.records())
        needed = {record["run"] for record, _, confirmed in records if not confirmed}
        for record, _, _ in reversed(records):
            if record["do"] == "open" and record["run"] in needed:
                needed.add(record["parent"])
        for record, end, confirmed in records:
            if not confirmed:
                self._queue.append(_Item(record, journal, end))
            elif record["do"] == "open" and record["run"] in needed:
                # Later records name the run by a handle, so it is looked up again; its status stays.
                self._queue.append(_Item(record | {"again": True}, journal, end))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._abandoned and (items := self._next()) is None:
                    if self._closing and not (self._queue or self._later):
                        return
                    self._changed.wait(self._rest())
                if self._abandoned:
                    return
            assert items is not None
            self._try(items)

    def _rest(self) -> float | None:
        """Return the seconds until something may be tried again; None when nothing waits."""
        waiting = [self._pauses[name] for name, queue in self._lanes() if queue]
        if not waiting:
            return None
        longest = _CLOSING_PAUSE_S if self._closing else _LONGEST_PAUSE_S
        return max(min(min(pause.until for pause in waiting) - time.monotonic(), longest), 0.01)

    def _lanes(self) -> tuple[tuple[str, deque[_Item]], ...]:
        return (("numbers", self._queue), ("uploads", self._later))

    def _next(self) -> list[_Item] | None:
        """Return records for one request, as many numbers of one run as stand together; None while all rest."""
        now = time.monotonic()
        ready = {name: bool(queue) and (self._pauses[name].over(now, self._closing)) for name, queue in self._lanes()}
        if not ready["numbers"]:
            return [self._later[0]] if ready["uploads"] else None
        first = self._queue[0]
        items = [first]
        if first.record["do"] not in _BATCHED:
            return items
        room = dict(_MOST)
        room[first.record["do"]] -= len(first.record["values"])
        for at in range(1, len(self._queue)):
            item = self._queue[at]
            kind = item.record["do"]
            if kind not in _BATCHED or item.record["run"] != first.record["run"]:
                break
            room[kind] -= len(item.record["values"])
            if room[kind] < 0:
                break
            items.append(item)
        return items

    def _try(self, items: list[_Item]) -> bool:
        """Send records; return whether they are off the queue."""
        upload = items[0].upload
        pause = self._pauses["uploads" if upload else "numbers"]
        try:
            self._uploading = upload
            self._deliver(items)
        except Exception as error:
            again = _worth_another(items[0], error) if upload else False
            if again or (is_outage(error) and not self._to_blame(items[0], error)):
                self._wait(items[0], pause, error)
                return False
            if len(items) > 1:  # one of them is refused, which is not the others' fault
                return all(self._try([item]) for item in items)
            # What belongs to a run that was refused is refused with it: one line is enough.
            level = logging.DEBUG if isinstance(error, _Refused) else logging.WARNING
            what = _described(items[0].record)
            _log.log(level, "MLflow at %s refused %s: %s", self._shown_uri, what, one_line(error))
        else:
            if pause.told and not any(other.told for other in self._pauses.values() if other is not pause):
                _log.warning("MLflow at %s answers again", self._shown_uri)
            pause.end()
        finally:
            self._uploading = False
        self._done(items)
        return True

    def _wait(self, item: _Item, pause: _Pause, error: Exception) -> None:
        """Try again later; an upload lets the numbers behind it pass."""
        if not any(other.told for other in self._pauses.values()):
            _log.warning("MLflow at %s does not answer; records wait until it does: %s", self._shown_uri, _cause(error))
        with self._changed:
            pause.begin()
            if item.upload:
                self._off(item)
                self._later.append(item)

    def _to_blame(self, item: _Item, error: Exception) -> bool:
        """Whether the store stumbles over this very record: it answers, with an error, and other calls without one."""
        if "failed with exception" in str(error) or not _from_mlflow(error):
            return False  # nobody answered
        try:
            self._client().search_experiments(max_results=1)
        except Exception:
            item.doubts = 0
            return False
        item.doubts += 1
        return item.doubts >= _DOUBTS

    def _off(self, item: _Item) -> None:
        (self._queue if self._queue and self._queue[0] is item else self._later).popleft()

    def _done(self, items: list[_Item]) -> None:
        with self._changed:
            if self._abandoned:
                return
            for item in items:
                self._off(item)
                if item.journal is not None:
                    self._reached[item.journal] = max(self._reached.get(item.journal, 0), item.end)
            self._progress = time.monotonic()
            for journal in {item.journal for item in items if item.journal is not None}:
                behind = min((item.end for item in self._later if item.journal is journal), default=None)
                reached = self._reached[journal]
                journal.confirm(reached if behind is None else min(reached, behind - 1))
            self._changed.notify_all()
        for item in items:
            if item.record["do"] == "artifact" and not Path(item.record["path"]).is_absolute():
                shutil.rmtree(item.path, ignore_errors=True)

    def _deliver(self, items: list[_Item]) -> None:
        record = items[0].record
        if record["do"] == "open":
            self._open(record)
            return
        with self._changed:
            run_id = self._ids.get(record["run"])
        if run_id is None:
            raise _Refused("its run could not be opened")
        state, client = self._states[run_id], self._client()
        match record["do"]:
            case "artifact":
                upload = client.log_artifacts if items[0].path.is_dir() else client.log_artifact
                upload(run_id, str(items[0].path), record["folder"])
            case "document":
                client.log_dict(run_id, record["data"], record["name"])
            case "dataset":
                client.log_inputs(run_id, datasets=[_dataset(record)])
            case "end":
                client.set_terminated(run_id, record["status"], end_time=record["time"])
            case _:
                self._log_batch(client, state, [item.record for item in items])

    def _log_batch(self, client: MlflowClient, state: _State, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        metrics: list[Metric] = []
        new: dict[str, dict[int, set[str]]] = {}
        for record in records:
            if record["do"] == "tags":
                tags |= record["values"]
            elif record["do"] == "params":
                known = self._params(client, state) | params
                params |= {name: text for name, text in record["values"].items() if name not in known}
                # MLflow's parameters are written once.
                changed = {name: text for name, text in record["values"].items() if known.get(name, text) != text}
                tags |= {clean_name(f"changed.{name}"): text for name, text in changed.items()}
            else:
                step, summary = record["step"] or 0, record["step"] is None
                for name, number in record["values"].items():
                    held = self._held(client, state, name, step) | new.get(name, {}).get(step, set())
                    if not held or (summary and repr(number) not in held):
                        metrics.append(Metric(name, number, record["time"], step))
                        new.setdefault(name, {}).setdefault(step, set()).add(repr(number))
        client.log_batch(
            state.run_id,
            metrics=metrics,
            params=[Param(name, text) for name, text in params.items()],
            tags=[RunTag(name, text) for name, text in tags.items()],
        )
        state.params |= params
        for name, points in new.items():
            for step, numbers in points.items():
                state.points[name].setdefault(step, set()).update(numbers)

    def _params(self, client: MlflowClient, state: _State) -> dict[str, str]:
        if state.continued and not state.params:
            state.params = dict(client.get_run(state.run_id).data.params)
        return state.params

    def _held(self, client: MlflowClient, state: _State, name: str, step: int) -> set[str]:
        """Return the numbers that a run holds at a step."""
        if name not in state.points:
            history = client.get_metric_history(state.run_id, name) if state.continued else ()
            points: dict[int, set[str]] = {}
            for metric in history:
                points.setdefault(metric.step, set()).add(repr(float(metric.value)))
            state.points[name] = points
        return state.points[name].get(step, set())

    def _open(self, record: dict[str, Any]) -> None:
        """Continue the run that has this key under this parent, or create one."""
        with self._changed:
            parent, known = self._ids.get(record["parent"]), record["run"] in self._ids
        if known:
            return
        if parent is None and record["parent"] is not None:
            with self._changed:
                self._ids[record["run"]] = None
            raise _Refused("its parent could not be opened")
        client, key = self._client(), record["key"]
        found = self._by_key.get((parent, key))
        if found is None:
            try:
                run, continued = open_run(
                    client,
                    self.experiment_id,
                    record["name"],
                    key,
                    parent,
                    user=self._user,
                    start=record["time"],
                    resume=not record.get("again"),
                )
            except Exception as error:
                if not is_outage(error):
                    with self._changed:
                        self._ids[record["run"]] = None
                raise
            found = self._by_key[parent, key] = run.info.run_id
            self._states.setdefault(found, _State(found, continued))
        elif not record.get("again"):
            client.update_run(found, status="RUNNING")
        with self._changed:
            self._ids[record["run"]] = found
            self._changed.notify_all()


@dataclass
class _Pause:
    """Growing waits between attempts that fail."""

    seconds: float = 0.0
    since: float = 0.0
    told: bool = False

    @property
    def until(self) -> float:
        return self.since + self.seconds

    def begin(self) -> None:
        self.seconds = min(max(_FIRST_PAUSE_S, 2 * self.seconds), _LONGEST_PAUSE_S)
        self.since, self.told = time.monotonic(), True

    def end(self) -> None:
        self.seconds, self.told = 0.0, False

    def over(self, now: float, closing: bool) -> bool:
        return now >= self.since + (min(self.seconds, _CLOSING_PAUSE_S) if closing else self.seconds)


class _Refused(Exception):
    """A record that can't be sent, whatever the store says."""


def _worth_another(item: _Item, error: Exception) -> bool:
    """Whether an upload may succeed later: what a file store or a network does passes, a refusal does not."""
    if item.record["do"] == "artifact" and not item.path.exists():
        return False
    return not isinstance(error, _Refused) and not _from_mlflow(error)


def _from_mlflow(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException)


def open_run(
    client: MlflowClient,
    experiment_id: str,
    name: str,
    key: str | None,
    parent: str | None,
    *,
    user: str,
    start: int | None = None,
    resume: bool = True,
) -> tuple[Run, bool]:
    """Continue the run that has this key under this parent, or create one; return it and whether it was there.

    Parameters
    ----------
    client : MlflowClient
    experiment_id : str
    name : str
        Of a new run.
    key : str, optional
        What the run is found again by; without it a run is always created.
    parent : str, optional
        The parent's run id.
    user : str
        Whom a new run belongs to.
    start : int, optional
        When it began, in milliseconds since 1970.
    resume : bool
        Set a run that is there to RUNNING.
    """
    tags = {"mlflow.source.name": "faculty", "mlflow.source.type": "LOCAL", "mlflow.user": user}
    if parent is not None:
        tags[PARENT_TAG] = parent
    if key is not None:
        tags[KEY_TAG] = key
        found = _find_run(client, experiment_id, key, parent)
        if found is not None:
            if resume:
                client.update_run(found.info.run_id, status="RUNNING")
            if resume and ERROR_TAG in found.data.tags:  # what went wrong the last time does not hold for this time
                client.delete_tag(found.info.run_id, ERROR_TAG)
            return found, True
    return client.create_run(experiment_id, start_time=start, tags=tags, run_name=name), False


def is_outage(error: BaseException) -> bool:
    """Whether a call failed because the store was not there, or could not be used for now."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, _Refused):
        return False
    if isinstance(error, MlflowException):
        # MLflow wraps a failed connection in an exception that has no code of its own, so the message tells.
        return error.error_code in _OUTAGE_CODES or "API request to" in str(error)
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(_NETWORK)


_OUTAGE_CODES = {"TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "UNAUTHENTICATED"}
_NETWORK = ("requests.", "urllib3.", "botocore.", "boto3.")


def _find_run(client: MlflowClient, experiment_id: str, key: str, parent: str | None) -> Run | None:
    query = f"tags.`{KEY_TAG}` = '{key}'"
    if parent is not None:
        query += f" and tags.`{PARENT_TAG}` = '{parent}'"
    found: Iterator[Run] = iter(
        client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"], max_results=1000)
    )
    return next((run for run in found if run.data.tags.get(PARENT_TAG) == parent), None)


def _dataset(record: dict[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=record["name"],
        digest=record["digest"],
        source_type="faculty",
        source=record["source"],
        profile=record["profile"],
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", record["context"])])


def _cause(error: Exception) -> str:
    """Return what is at the bottom of an error: ``Connection refused`` of three layers of wrapping."""
    text = one_line(error)
    reason = re.search(r"\[Errno -?\d+\] ([\w ]+)|((?:read|connect)[\w ]* timed? ?out)", text, re.IGNORECASE)
    return text if reason is None else (reason[1] or reason[2])


def _described(record: dict[str, Any]) -> str:
    """Say what a record is: ``metrics loss, accuracy of the run …``."""
    values = record.get("values")
    what = ", ".join(list(values)[:3]) if values else str(record.get("name") or record.get("status") or "")
    return f"{record['do']} {what}".strip()
