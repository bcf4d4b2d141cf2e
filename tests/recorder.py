"""A tracker that keeps what it is told in memory, as a store does: a run with a key is continued.

A point that a run held when it was continued is not added again; one that is recorded twice in between is.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.tracking.entries import clean_document, clean_metrics, clean_params, clean_tags
from pipeline.tracking.tracker import ending


class Recorder:
    """One run. `store.dead` set to True is a driver that was killed: nothing arrives any more, not even an end."""

    def __init__(self, name: str, store: Recorder | None = None) -> None:
        self.name = name
        self.store = store or self
        self.dead = False
        self.status = "RUNNING"
        self.params_: dict[str, str] = {}
        self.tags_: dict[str, str] = {}
        self.points: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.files: dict[str, bytes] = {}
        self.documents: dict[str, Any] = {}
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.datasets: list[dict[str, Any]] = []
        self.children: dict[str, Recorder] = {}
        self.calls = 0
        self.held: dict[str, set[int]] = {}

    run_id = "root"
    uri = "memory"

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        *,
        key: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Iterator[Recorder]:
        key = key or f"{name} {len(self.children)}"
        child = self.children.get(key) or Recorder(name, self.store)
        if not self.store.dead:
            self.children[key] = child
            child.status = "RUNNING"
            child.held = {metric: set(points) for metric, points in child.points.items()}

        def close(status: str, reason: str | None) -> None:
            if not self.store.dead:
                child.status = status
                child.tags({"faculty.error": reason})

        with ending(close):
            child.tags(tags or {})
            child.params(params or {})
            yield child

    def params(self, values: Mapping[str, Any]) -> None:
        if self._alive():
            self.params_ = clean_params(values) | self.params_

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        if self._alive():
            for name, value in clean_metrics(values).items():
                if step is None:
                    self.points[name][0] = [value]
                elif step not in self.held.get(name, ()):  # as the store: what a continued run has, it keeps
                    self.points[name][step].append(value)

    def tags(self, values: Mapping[str, Any]) -> None:
        if self._alive():
            self.tags_ |= clean_tags(values)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        if self._alive():
            path = Path(path)
            self.files[f"{folder}/{path.name}" if folder else path.name] = path.read_bytes()

    def document(self, name: str, data: Any) -> None:
        if self._alive():
            self.documents[name] = clean_document(data)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._alive():
            self.tables[name] = [dict(clean_document(row)) for row in rows]

    def dataset(
        self, name: str, *, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        if self._alive():
            about = {"digest": digest, "source": source, "context": context, "profile": dict(profile or {})}
            self.datasets.append({"name": name} | about)

    def flush(self) -> None:
        """Nothing waits."""

    def _alive(self) -> bool:
        self.store.calls += 1
        return not self.store.dead

    def last(self, name: str) -> float:
        """The value of a metric at its highest step."""
        return self.points[name][max(self.points[name])][-1]

    def steps(self, name: str) -> list[int]:
        """The steps of a metric, one for each time that a different point was recorded."""
        return sorted(step for step, values in self.points[name].items() for _ in values)
