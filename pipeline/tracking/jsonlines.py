"""A tracker that appends to one text file: for machines without MLflow's database, and for reading with any tool."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from pipeline.tracking.redact import redact
from pipeline.tracking.tracker import ending


class JsonLinesTracker:
    """Appends one JSON object a line to a file.

    A line is written by one system call, so that threads and processes don't interleave and a crash leaves at most one
    torn line at the end, which the next start closes and :func:`read_events` skips.

    Parameters
    ----------
    path : Path
        The file; created with its folder where it does not exist.
    run_id : str, optional
        The run that is recorded; default: a new one, without a start event of its own.
    """

    def __init__(self, path: str | Path, run_id: str | None = None) -> None:
        self._path = Path(path)
        self._run_id = run_id or uuid.uuid4().hex
        self._lock = threading.Lock()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._close_torn_line()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path, "run_id": self._run_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["run_id"])  # type: ignore[misc]

    @property
    def run_id(self) -> str:
        """The run's identifier."""
        return self._run_id

    @property
    def uri(self) -> str:
        """The file's path."""
        return str(self._path)

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        *,
        key: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Iterator[JsonLinesTracker]:
        """Open a child run, or continue the one with the same key."""
        with self._open(name, key=key, parent=self._run_id, tags=tags, params=params) as child:
            yield child

    @classmethod
    @contextlib.contextmanager
    def root(
        cls, path: str | Path, name: str, *, key: str | None = None, tags: Mapping[str, Any] | None = None
    ) -> Iterator[JsonLinesTracker]:
        """Open a run without a parent, or continue the one with the same key."""
        with cls(path)._open(name, key=key, parent=None, tags=tags, params=None) as tracker:
            yield tracker

    def params(self, values: Mapping[str, Any]) -> None:
        """Record flattened parameters."""
        self._write("params", values=clean_params(values))

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers; what is not finite is null."""
        self._write("metrics", step=0 if step is None else int(step), values=clean_document(clean_metrics(values)))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record tags."""
        self._write("tags", values=clean_tags(values))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Record where an artefact lies; the file itself stays there.

        Raises
        ------
        FileNotFoundError
            When it does not exist.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"the artefact {path} does not exist")
        self._write("artifact", path=redact(str(path)), folder=folder)

    def document(self, name: str, data: Any) -> None:
        """Record nested data in the line itself."""
        self._write("document", name=document_name(name), data=clean_document(data))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record rows in the line itself."""
        self._write("table", name=document_name(name), data=table_document(list(rows)))

    def dataset(
        self, name: str, *, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record which images the run used."""
        found = {"digest": digest, "source": redact(source), "context": context, "profile": clean_document(profile)}
        self._write("dataset", name=clean_text(name), **found)

    def flush(self) -> None:
        """Nothing waits: every line is written at once."""

    @contextlib.contextmanager
    def _open(
        self,
        name: str,
        *,
        key: str | None,
        parent: str | None,
        tags: Mapping[str, Any] | None,
        params: Mapping[str, Any] | None,
    ) -> Iterator[JsonLinesTracker]:
        found = None if key is None else self._find(check_key(key), parent)
        child = JsonLinesTracker(self._path, found)
        child._write("continue" if found else "start", name=clean_text(name), key=key, parent=parent)
        with ending(lambda status, reason: child._write("end", status=status, reason=reason)):
            if tags:
                child.tags(tags)
            if params:
                child.params(params)
            yield child

    def _find(self, key: str, parent: str | None) -> str | None:
        for event in read_events(self._path):
            if event["event"] == "start" and event["key"] == key and event["parent"] == parent:
                return event["run"]
        return None

    def _write(self, event: str, **fields: Any) -> None:
        record = {"time": round(time.time(), 3), "run": self._run_id, "event": event, **fields}
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._lock:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line)
                if event in {"start", "end"}:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _close_torn_line(self) -> None:
        if not self._path.exists() or not self._path.stat().st_size:
            return
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        if torn:
            with self._path.open("ab") as file:
                file.write(b"\n")


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a file in order; lines that a crash left torn are skipped."""
    path = Path(path)
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event
