"""What a stage is, and what it may use while it runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config import Settings
from pipeline.errors import TeacherError
from pipeline.report.console import Display
from pipeline.stages.artefacts import Record, RunFolder, digest_of
from pipeline.tracking.tracker import NoTracker, Tracker

if TYPE_CHECKING:
    from pipeline.models.zoo import Zoo


@dataclass(frozen=True)
class Outcome:
    """What a stage hands back.

    Attributes
    ----------
    digest : str
        Hash of its result.
    summary : dict
        Plain values to print and track.
    again : str
        Why the stage should run again next time although nothing has changed; "" if it need not.
    """

    digest: str
    summary: dict[str, Any]
    again: str = ""


class Stage(Protocol):
    """One step of the pipeline."""

    @property
    def name(self) -> str:
        """What it is called: in commands, in the run folder, in the tracking store."""
        ...

    @property
    def version(self) -> int:
        """Raised when the same inputs give another result than before."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages whose results it reads."""
        ...

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Return what the result depends on, besides the digests of `needs`: settings without resources, files."""
        ...

    def run(self, run: Run, folder: Path) -> Outcome:
        """Do the work; write artefacts into `folder`. What an interrupted run left there may be used."""
        ...


@dataclass
class Run:
    """One execution of the pipeline: its settings, folder, trackers and the results so far.

    `tracker` is that of the stage that is running, `root` that of the whole run. `timed` takes what starting takes in
    that stage, which the next plan goes by: ``session`` (a local Ray), ``trials`` (Tune, first and last), ``tasks``
    (until a worker works), ``group`` (of training workers), ``register`` (export and registry), in seconds; and
    ``resident``, the bytes of a worker that has begun.
    """

    settings: Settings
    files: RunFolder
    display: Display
    zoo: Zoo
    tracker: Tracker = field(default_factory=NoTracker)
    root: Tracker = field(default_factory=NoTracker)
    until: str = "register"
    verbose: bool = False
    records: dict[str, Record] = field(default_factory=dict)
    timed: dict[str, float] = field(default_factory=dict)
    _exits: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _open: set[str] = field(default_factory=set)

    def folder(self, stage: str) -> Path:
        """Return the folder of a finished stage's result."""
        record = self.records[stage]
        return self.files.finished(stage, record.key)

    def part(self, kind: str, name: str, inputs: Mapping[str, Any]) -> Path:
        """Return the folder of a piece of work that several stages, or the same stage under other settings, may share.

        It is keyed by what it depends on, so that adding one teacher to a zoo assesses one teacher.
        """
        return self.files.root / kind / f"{name}-{digest_of(dict(inputs))[:12]}"

    def within(self, tracker: Tracker) -> Run:
        """Return this run with another tracker: that of the stage that is running."""
        return replace(self, tracker=tracker)

    def open_tracker(self) -> None:
        """Open the run's own record in the tracking store, once."""
        if "tracker" in self._open:
            return
        from pipeline.stages.recording import opening_tags, record_opening
        from pipeline.tracking.connect import open_tracker

        settings = self.settings
        with self.display.working("opening the tracking store"):
            opened = open_tracker(
                settings.tracking,
                self.files.root,
                key=self.files.identity,
                name=settings.name,
                tags=opening_tags(self),
                params=settings.dump(),
                verbose=self.verbose,
            )
            self.tracker = self.root = self._exits.enter_context(opened)
        self._open.add("tracker")
        record_opening(self)

    def open_cluster(self) -> None:
        """Start or join Ray, once; it ends with the run."""
        if "cluster" in self._open:
            return
        began = time.perf_counter()
        from pipeline.cluster.session import session

        with self.display.working("starting Ray" if self.settings.cluster.local else "joining the cluster"):
            self._exits.enter_context(session(self.settings.cluster, verbose=self.verbose))
        self._open.add("cluster")
        from pipeline.stages.recording import record_cluster
        from pipeline.stages.visibility import check_nodes

        with self.display.working("asking the nodes what they see"):
            check_nodes(self)
        if self.settings.cluster.local:  # how long one waits for a cluster says nothing of the next time
            self.timed["session"] = time.perf_counter() - began
        record_cluster(self)

    def fingerprint(self, name: str) -> str:
        """Return what a teacher's results are keyed by: its spec, its weights, and the hash that they are to have.

        A weight file that can't be read does not stop the run: the teacher fails when it is loaded, by itself.
        """
        try:
            content = self.zoo.fingerprint_of(name)
        except TeacherError as error:
            content = f"unavailable: {error}"
        return digest_of([content, self.zoo[name].sha256])

    @property
    def tracking_uri(self) -> str | None:
        """Where MLflow is, for teachers from its registry; it may carry credentials and is never printed."""
        from pipeline.tracking.connect import find_store

        store = find_store(self.settings.tracking, self.files.root)
        return store.uri if store.kind in ("database", "server", "other") else None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Let go of the cluster, and end the record as finished, failed or killed."""
        self._exits.__exit__(kind, error, trace)
        self._open.clear()
