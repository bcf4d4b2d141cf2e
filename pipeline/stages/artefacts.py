"""The run folder: one folder for each stage and key, and what is fresh, stale or missing in it.

Layout::

    <run_dir>/run.json                     format version, identity
    <run_dir>/settings.yaml                the latest resolved settings
    <run_dir>/<stage>/<key>/stage.json     written last: the stage is finished
    <run_dir>/<stage>/<key>/…              its artefacts

A key is a hash of everything that the stage's result depends on: its settings (resources excepted), its version, and
the digests of its inputs. A stage whose inputs come out the same again is therefore fresh, whatever ran before it, and
changed settings never overwrite an earlier result.

Where `run_dir` is a URI, all of this lies in the store; `root` is its mirror on this machine, see
`pipeline.data.mirror`. Artefacts are fetched when they are read, and sent when a stage is finished, `stage.json` last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.data.mirror import Mirror, here, share
from pipeline.errors import FacultyError, UserError
from pipeline.places import is_remote, join, local_place
from pipeline.tracking.redact import redact

if TYPE_CHECKING:
    from pipeline.report.console import Display

RUN_FORMAT = 1
# What tells where a run stands: fetched before anything is read.
_INDEX = ("run.json", "settings.yaml", "plan.json", "recorded.json", "registered.*", "*/*/stage.json")
# What was recorded and reported so far, which a run goes on with.
_RECORDED = ("tracking-journal/*", "tracking.jsonl", "report.html")


@dataclass(frozen=True)
class Record:
    """What a finished stage says of itself (`stage.json`).

    Attributes
    ----------
    stage, key : str
    digest : str
        Hash of the stage's result; part of the key of the stages that read it.
    inputs : dict
        Flat: what the key was made from. Compared with today's to say why a stage is stale.
    summary : dict
        Plain values to print.
    seconds, finished : float
        Wall time, and when it ended (seconds since the epoch).
    again : str
        Why it is to run again although nothing has changed; "" if it need not.
    starts : dict
        Seconds among those that passed before work began, by what was started; see `Run.timed`.
    machine : str
        Whose driver it was: what starting takes is that machine's.
    """

    stage: str
    key: str
    digest: str
    inputs: dict[str, Any]
    summary: dict[str, Any]
    seconds: float
    finished: float
    again: str = ""
    starts: dict[str, float] = field(default_factory=dict)
    machine: str = ""


@dataclass(frozen=True)
class Status:
    """Where a stage stands: `state` is fresh, partial, stale, missing or waiting; `why` says what changed."""

    stage: str
    state: str
    why: str = ""


class RunFolder:
    """A run's folder, on disk or in a store.

    Parameters
    ----------
    place : str or Path
        A path or a URI.

    Attributes
    ----------
    root : Path
        The folder on this machine.
    place : str
        The path or the URI.
    mirror : Mirror or None
        Of a URI.

    Raises
    ------
    UserError
        If it was written by another format version, or can't be written.
    """

    def __init__(self, place: str | Path) -> None:
        self.root = local_place(place)
        self.mirror: Mirror | None = None
        self.place = str(self.root)
        if is_remote(place):
            self.mirror, self.place = Mirror.of(str(place)), str(place)

    @property
    def storage(self) -> str:
        """Where trainings and trials keep their checkpoints: a path or a URI that every worker reaches."""
        return join(self.place, "ray")

    def prepare(self) -> None:
        """Create the folder, or check that it is one of ours and can be written."""
        self._look()
        marker = self.root / "run.json"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
            if not marker.exists():
                write_json(marker, {"format": RUN_FORMAT, "id": uuid.uuid4().hex})
        except OSError as error:
            remedy = "choose another run_dir or free it" if self.mirror is None else "set another FACULTY_CACHE"
            raise UserError(f"run_dir {self.root}: can't be written ({error.strerror}); {remedy}") from None
        self._check_marker()

    def check(self) -> None:
        """Check the format version of an existing folder; of one in a store, fetch what tells where its run stands."""
        self._look()
        self._check_marker()

    def _look(self) -> None:
        if self.mirror is not None:
            self.mirror.look(*_INDEX)

    def _check_marker(self) -> None:
        marker = self.root / "run.json"
        if not marker.exists():
            return
        try:
            found = self._marker()["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{marker}: is not a run marker; choose another run_dir") from None
        if found != RUN_FORMAT:
            raise UserError(
                f"{marker}: run folder of format {found}, this version reads {RUN_FORMAT}; choose another run_dir"
            )

    @property
    def identity(self) -> str:
        """What tells this run from every other one, on whatever machine: tracked runs are continued by it."""
        return str(self._marker()["id"])

    def _marker(self) -> dict[str, Any]:
        return json.loads((self.root / "run.json").read_text(encoding="utf-8"))

    @contextmanager
    def lock(self, display: Display | None = None) -> Iterator[None]:
        """Hold the folder for this process; a second one gets a clear error instead of a tangle.

        A folder in a store is held there, too; what was written into its mirror is sent when the block ends, however it
        ends.
        """
        with self._lock_here():
            if self.mirror is None:
                yield
                return
            from pipeline.data.claim import claim

            with contextlib.ExitStack() as stack:
                with contextlib.nullcontext() if display is None else display.working("opening the run folder"):
                    notice = (lambda text: None) if display is None else display.note
                    stack.enter_context(claim(self.mirror, notice=notice))
                    self.mirror.reconcile()
                    self.mirror.look(*_INDEX, *_RECORDED)
                    if not (self.root / "run.json").exists():  # the store was emptied since it was sent
                        self.prepare()
                try:
                    yield
                except BaseException:
                    with contextlib.suppress(FacultyError):  # what ended the block says more
                        self.push()
                    raise
                self.push()

    def push(self) -> None:
        """Send what was written into the mirror; a folder on disk needs none of it."""
        if self.mirror is not None:
            self.mirror.push()

    def pull(self, *patterns: str) -> None:
        """Fetch many small files at once, by patterns such as ``teachers/*/row.json``, before they are read."""
        if self.mirror is not None:
            self.mirror.pull(*patterns)

    @contextmanager
    def _lock_here(self) -> Iterator[None]:
        with (self.root / ".lock").open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                raise UserError(
                    f"run_dir {self.place}: in use by process {holder}; wait for it, or choose another run_dir"
                ) from None
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            yield

    def finished(self, stage: str, key: str) -> Path:
        """Return the folder of a finished stage, with its files; large tables are fetched when they are opened."""
        return here(self.folder(stage, key), but=("images.arrow",))

    def folder(self, stage: str, key: str) -> Path:
        """Return the folder of a stage's result under a key."""
        return self.root / stage / key

    def record(self, stage: str, key: str) -> Record | None:
        """Return what a finished stage says of itself; None if it is not finished, or is to run again."""
        record = _read_record(self.folder(stage, key) / "stage.json")
        return record if record is not None and not record.again else None

    def newest(self, stage: str) -> Record | None:
        """Return the record of the stage's latest finish, under whatever key."""
        records = [_read_record(path) for path in (self.root / stage).glob("*/stage.json")]
        return max((record for record in records if record), key=lambda record: record.finished, default=None)

    def finish(self, record: Record) -> None:
        """Mark a stage finished: the last thing that is written."""
        self.push()
        path = self.folder(record.stage, record.key) / "stage.json"
        write_json(path, asdict(record))
        share(path)

    def status(self, stage: str, key: str, inputs: Mapping[str, Any]) -> Status:
        """Say whether the result under `key` is there, and what changed if it is not."""
        if self.record(stage, key) is not None:
            return Status(stage, "fresh")
        partial = bool(self.folder(stage, key).is_dir() or (self.mirror and self.mirror.listed(f"{stage}/{key}")))
        former = self.newest(stage)
        if former is None:
            return (
                Status(stage, "partial", "interrupted; continues where it stopped")
                if partial
                else Status(stage, "missing")
            )
        why = "; ".join(_changes(former.inputs, inputs)) or former.again or "its inputs changed"
        return Status(stage, "stale", why)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_settings(path: Path, data: Any) -> None:
    """Write settings as YAML, whole or not at all, and without the credentials that a URI may hold."""
    write_text(path, redact(yaml.safe_dump(data, sort_keys=False, allow_unicode=True)))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def digest_of(data: Any) -> str:
    """Return a hash of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def key_of(stage: str, version: int, inputs: Mapping[str, Any]) -> str:
    """Return the key of a stage for its inputs."""
    return digest_of({"stage": stage, "version": version, "inputs": dict(inputs)})[:16]


def _read_record(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # absent, or cut off by a crash: the stage is not finished


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    lines = []
    for path in sorted(before.keys() | now.keys()):
        old, new = before.get(path, "absent"), now.get(path, "absent")
        if old != new:
            short = [text if len(text) <= 32 else f"{text[:12]}…" for text in (str(old), str(new))]
            lines.append(f"{path}: {short[0]} → {short[1]}")
    return lines


def clock() -> float:
    """Return the time in seconds since the epoch."""
    return time.time()
