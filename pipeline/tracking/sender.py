"""Sends records to MLflow in the background, in order, as often as it takes."""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import StageError
from pipeline.tracking.delivery import Delivery, Refused, is_outage
from pipeline.tracking.journal import Journal
from pipeline.tracking.redact import one_line

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


class Sender:
    """A queue of records for one store, and the thread that empties it.

    While the store does not answer, records wait: in memory and, where there is one, in a journal that the next process
    takes over. A record that the store refuses is left out, with a warning, so that it does not hold up the others.
    Sending a record twice changes nothing: points have the time they were recorded at, and runs are found by key.

    Parameters
    ----------
    delivery : Delivery
        Makes the calls; used in the sending thread.
    shown_uri : str
        The store without credentials.
    journal : Journal, optional
        Takes new records.
    left : iterable of Journal
        Of former processes; sent first.
    """

    def __init__(
        self,
        delivery: Delivery,
        shown_uri: str,
        *,
        journal: Journal | None = None,
        left: Iterable[Journal] = (),
    ) -> None:
        self._delivery, self._shown_uri, self._journal = delivery, shown_uri, journal
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

    def id_of(self, handle: str, timeout: float) -> str:
        """Return a run's identifier in the store; wait for it.

        Raises
        ------
        StageError
            When the store did not give one within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while handle not in self._delivery.ids and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            found = self._delivery.ids.get(handle)
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
            path = items[0].path if items[0].record["do"] == "artifact" else None
            self._delivery.send([item.record for item in items], path)
        except Exception as error:
            again = _worth_another(items[0], error) if upload else False
            if again or (is_outage(error) and not self._to_blame(items[0], error)):
                self._wait(items[0], pause, error)
                return False
            if len(items) > 1:  # one of them is refused, which is not the others' fault
                return all(self._try([item]) for item in items)
            # What belongs to a run that was refused is refused with it: one line is enough.
            level = logging.DEBUG if isinstance(error, Refused) else logging.WARNING
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
        if "failed with exception" in str(error) or not isinstance(error, _mlflow_exception()):
            return False  # nobody answered
        try:
            self._delivery.client().search_experiments(max_results=1)
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


def _worth_another(item: _Item, error: Exception) -> bool:
    """Whether an upload may succeed later: what a file store or a network does passes, a refusal does not."""
    if item.record["do"] == "artifact" and not item.path.exists():
        return False
    return not isinstance(error, Refused) and not isinstance(error, _mlflow_exception())


def _mlflow_exception() -> type[Exception]:
    from mlflow.exceptions import MlflowException

    return MlflowException


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
