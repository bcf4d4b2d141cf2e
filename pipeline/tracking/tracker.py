"""The tracker seam: what a stage may record, the tracker that records nothing, and how a run ends. No MLflow import."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pipeline.errors import Interrupted
from pipeline.tracking.redact import redact

KEY_TAG = "faculty.key"
ERROR_TAG = "faculty.error"


@runtime_checkable
class Tracker(Protocol):
    """One run that is being recorded.

    Recording returns at once and never ends a run: while the store can't be reached, records wait for it.
    """

    @property
    def run_id(self) -> str | None:
        """The run's identifier in its store."""
        ...

    @property
    def uri(self) -> str | None:
        """Where the run is recorded, fit for printing (no credentials)."""
        ...

    def run(
        self,
        name: str,
        *,
        key: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> AbstractContextManager[Tracker]:
        """Open a child run.

        It ends as FINISHED, as FAILED when an exception leaves the block, or as KILLED on KeyboardInterrupt and
        SystemExit.

        Parameters
        ----------
        name : str
            Shown in the store.
        key : str, optional
            A child of this run with the same key is continued instead of a new one being opened, whatever its status.
        tags, params : mapping, optional
            Recorded at once.
        """
        ...

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters: nested mappings are flattened (``a.b``), long values are cut, a first value stays."""
        ...

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers at a step (default 0); infinite ones as NaN."""
        ...

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; a later value replaces the former one."""
        ...

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a file, or a folder's content, under `folder` among the run's artefacts."""
        ...

    def document(self, name: str, data: Any) -> None:
        """Keep nested data as the artefact ``<name>.json``."""
        ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows as the artefact ``<name>.json``, laid out as a table."""
        ...

    def dataset(
        self, name: str, *, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Record images that the run used: their fingerprint, where they come from, and what for (``training``)."""
        ...

    def flush(self) -> None:
        """Wait until the store has all that was recorded."""
        ...


class NoTracker:
    """Records nothing; its child runs are itself."""

    @property
    def run_id(self) -> str | None:
        """There is no run: None."""
        return None

    @property
    def uri(self) -> str | None:
        """There is no store: None."""
        return None

    def run(
        self,
        name: str,
        *,
        key: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> AbstractContextManager[Tracker]:
        """Give itself."""
        return contextlib.nullcontext(self)

    def params(self, values: Mapping[str, Any]) -> None:
        """Drop them."""

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Drop them."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Drop them."""

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Drop it."""

    def document(self, name: str, data: Any) -> None:
        """Drop it."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Drop it."""

    def dataset(
        self, name: str, *, digest: str, source: str, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """Drop it."""

    def flush(self) -> None:
        """There is nothing to wait for."""


@contextlib.contextmanager
def ending(close: Callable[[str, str | None], None]) -> Iterator[None]:
    """Run a block and report how it ended.

    Parameters
    ----------
    close : callable
        Called with FINISHED, FAILED or KILLED and, for the latter two, one line about the reason.
    """
    try:
        yield
    except BaseException as error:
        lines = redact(str(error)).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)
        close("KILLED" if stopped else "FAILED", reason)
        raise
    close("FINISHED", None)
