"""From settings to a tracker: where runs are recorded, whether it answers, and the experiment they belong to."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, UserError
from pipeline.places import is_remote, local_place, origin_of
from pipeline.tracking.entries import check_key, clean_text
from pipeline.tracking.journal import FOLDER, Journal
from pipeline.tracking.quiet import prepare
from pipeline.tracking.redact import one_line, redact
from pipeline.tracking.spec import TrackingSpec
from pipeline.tracking.tracker import NoTracker, Tracker

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_log = logging.getLogger("pipeline.tracking")
_DATABASE = re.compile(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?://")


@dataclass(frozen=True)
class Store:
    """Where runs are recorded.

    Attributes
    ----------
    kind : str
        ``none``, ``jsonl``, ``database``, ``server`` or ``other`` (a managed service or a plugin of MLflow).
    uri : str
        The tracking URI or the file's path; it may carry credentials, so print :attr:`shown`.
    artifacts : str, optional
        The artefact location that a new experiment of a database gets.
    folder : Path, optional
        The local folder of a SQLite database.
    """

    kind: str
    uri: str = ""
    artifacts: str | None = None
    folder: Path | None = None

    @property
    def shown(self) -> str:
        """The URI without its credentials."""
        return redact(self.uri)


def find_store(spec: TrackingSpec, run_dir: str | Path) -> Store:
    """Say where runs are recorded; nothing is opened and MLflow is not imported.

    Parameters
    ----------
    spec : TrackingSpec
        The settings.
    run_dir : str or Path
        The run folder, which the embedded default lies in.

    Raises
    ------
    ConfigError
        When the settings lead to no store that can be used.
    """
    if not spec.enabled:
        return Store("none")
    uri = spec.uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if uri == "jsonl":
        return Store("jsonl", str(local_place(run_dir) / "tracking.jsonl"))
    if not uri:
        folder = _local(run_dir)
        return _sqlite(folder / "mlflow.db", "", spec.artifacts)
    if uri.startswith(("http://", "https://")):
        return Store("server", uri.rstrip("/"))
    if uri.startswith("sqlite://"):
        path, mark, query = uri.removeprefix("sqlite://").removeprefix("/").partition("?")
        if path in {"", ":memory:"}:
            raise ConfigError(
                "`tracking.uri` is a database in memory, which no worker sees; name a file: sqlite:////path/mlflow.db"
            )
        return _sqlite(Path(path), mark + query, spec.artifacts)
    if _DATABASE.match(uri):
        return Store("database", uri, _artifact_uri(spec.artifacts))
    if re.match(r"[\w.-]+:\d+(/|$)", uri):
        raise ConfigError(
            f"`tracking.uri` (or MLFLOW_TRACKING_URI) is {uri!r}; a server's begins with http:// or https://"
        )
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith(("databricks", "uc"))):
        raise ConfigError(
            f"`tracking.uri` (or MLFLOW_TRACKING_URI) is {uri!r}, a folder, which MLflow no longer writes to; "
            f"use sqlite:///{uri.removeprefix('file://').rstrip('/')}/mlflow.db"
        )
    return Store("other", uri)


@contextlib.contextmanager
def open_tracker(
    spec: TrackingSpec,
    run_dir: str | Path,
    *,
    name: str,
    key: str | None = None,
    tags: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    verbose: bool = False,
    wait: bool = True,
) -> Iterator[Tracker]:
    """Open the run that a pipeline records itself in.

    Call it once, on the driver, before anything is computed. Workers get the tracker itself, which may be pickled.

    Parameters
    ----------
    spec : TrackingSpec
        Where to record.
    run_dir : str or Path
        The run folder.
    name : str
        The run's name.
    key : str, optional
        A run of the experiment with this key is continued, so that a resumed pipeline has one run.
    tags, params : mapping, optional
        Recorded at once.
    verbose : bool
        Let MLflow log at its own levels.
    wait : bool
        Whether the store must answer now. Without it the run is opened in the background, once the store is there.

    Yields
    ------
    Tracker
        The open run; it ends as the block does (FINISHED, FAILED, KILLED).

    Raises
    ------
    UserError
        When the settings are wrong, or the store does not answer within ``spec.timeout`` seconds or refuses.
    """
    store = find_store(spec, run_dir)
    if store.kind == "none":
        yield NoTracker()
    elif store.kind == "jsonl":
        from pipeline.tracking.jsonlines import JsonLinesTracker

        with JsonLinesTracker.root(store.uri, name, key=key, tags=tags) as lines:
            if params:
                lines.params(params)
            yield lines
    else:
        if store.kind == "server" and wait:
            check_server(store.uri, spec.timeout)
        prepare(verbose=verbose)
        from pipeline.tracking.delivery import open_run
        from pipeline.tracking.mlflow import MlflowTracker, user

        folder = _journals(run_dir)
        journals: dict[str, Any] = {
            "journal": Journal.create(folder, store.shown) if folder else None,
            "left": tuple(Journal.left(folder, store.shown)) if folder else (),
            "timeout": spec.timeout,
        }
        if wait:
            with _refusals(store), file_lock(store.folder and store.folder / ".mlflow.lock"):
                client = _open_client(store)
                experiment = _experiment(client, spec, store)
                key = None if key is None else check_key(key)
                run, continued = open_run(client, experiment, clean_text(name)[:250], key, None, user=user())
            tracker = MlflowTracker(store.uri, run.info.run_id, experiment, continued=continued, **journals)
        else:
            handle = uuid.uuid4().hex

            def find() -> str:
                with file_lock(store.folder and store.folder / ".mlflow.lock"):
                    return _experiment(tracker.client, spec, store)

            tracker = MlflowTracker(store.uri, handle, find, exists=False, **journals)
            tracker.opened(name, key=key)
        try:
            with tracker.recording(tags, params):
                yield tracker
        finally:
            left = tracker.close()
            if left:
                where = f"wait in {folder}; the next run in this folder sends them" if folder else "are lost"
                _log.warning("MLflow at %s does not answer: %d records %s", store.shown, left, where)


def records_wait(spec: TrackingSpec, run_dir: str | Path) -> bool:
    """Return whether a former run in this folder left records that its store has not got yet."""
    store, folder = find_store(spec, run_dir), _journals(run_dir)
    return store.kind in ("database", "server", "other") and folder is not None and Journal.waiting(folder, store.shown)


def check_server(uri: str, timeout: float) -> None:
    """Ask a tracking server whether it is there.

    Parameters
    ----------
    uri : str
        Its address.
    timeout : float
        Seconds for all of it, the look-up of the name included.

    Raises
    ------
    UserError
        When nothing answers, or what answers is broken.
    """
    import requests

    verify: bool | str = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in {"1", "true"}:
        verify = False
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            with requests.get(f"{uri}/health", timeout=timeout, verify=verify, stream=True) as response:
                # 401, 403 and 404 may come from a gateway before the server; MLflow's first call tells more.
                outcome.append(f"it answered {response.status_code}" if response.status_code >= 500 else None)
        except requests.exceptions.SSLError:
            outcome.append("its certificate is not trusted (MLFLOW_TRACKING_SERVER_CERT_PATH names one that is)")
        except (requests.exceptions.InvalidURL, UnicodeError, ValueError):
            outcome.append("the address is not valid")
        except requests.exceptions.RequestException as error:
            timed_out = isinstance(error, requests.exceptions.Timeout)
            outcome.append(f"no answer within {timeout:g} s" if timed_out else "no connection")

    # The look-up of a host name knows no timeout, hence the thread.
    asking = threading.Thread(target=ask, daemon=True, name="tracking-health")
    asking.start()
    asking.join(timeout + 0.5)
    problem = outcome[0] if outcome else f"no answer within {timeout:g} s"
    if problem:
        raise UserError(
            f"the tracking server {redact(uri)} can't be used: {problem}; start it, correct `tracking.uri` "
            "(or MLFLOW_TRACKING_URI), or leave both out to record in the run folder"
        )


@contextlib.contextmanager
def file_lock(path: Path | None) -> Iterator[None]:
    """Let one holder in at a time, among all threads and processes of this machine; None locks nothing."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # gives the lock back


def _open_client(store: Store) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    # Without a registry URI of its own the client would take one from the environment or the process.
    return MlflowClient(store.uri, registry_uri=store.uri)


def _experiment(client: MlflowClient, spec: TrackingSpec, store: Store) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(spec.experiment)
    if found is None:
        if store.kind == "database" and store.artifacts is None:
            raise ConfigError(
                f"`tracking.artifacts` is missing: a new experiment in the database {store.shown} needs a place for "
                "its artefacts, a shared folder or a URI such as s3://bucket/artefacts"
            )
        try:
            return client.create_experiment(spec.experiment, artifact_location=store.artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(spec.experiment)  # another process was faster
    if found is None or found.lifecycle_stage != "active":
        raise ConfigError(
            f"`tracking.experiment`: {spec.experiment!r} was deleted in {store.shown}; restore it or take another name"
        )
    return found.experiment_id


@contextlib.contextmanager
def _refusals(store: Store) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        text = one_line(error)
        remedy = "correct `tracking.uri` (or MLFLOW_TRACKING_URI)"
        if "out-of-date database schema" in text:
            remedy = "back the database up and run `mlflow db upgrade`"
        elif re.search(r"\b(401|403)\b|PERMISSION_DENIED|UNAUTHENTICATED", text):
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        raise UserError(f"the tracking store {store.shown} can't be used: {text}; {remedy}") from None
    except Exception as error:
        # SQLAlchemy's own errors (no driver, no host) come through where the database is opened.
        if not type(error).__module__.startswith("sqlalchemy"):
            raise
        raise UserError(
            f"the tracking database {store.shown} can't be opened: {one_line(error)}; correct `tracking.uri`"
        ) from None


def _journals(run_dir: str | Path) -> Path:
    """Return where records wait for their store."""
    return local_place(run_dir) / FOLDER


def _sqlite(path: Path, query: str, artifacts: str | None) -> Store:
    path = path.expanduser().absolute()
    return Store(
        "database",
        f"sqlite:///{path}{query}",
        _artifact_uri(artifacts) or (path.parent / "mlartifacts").as_uri(),
        path.parent,
    )


def _artifact_uri(place: str | None) -> str | None:
    if place is None or "://" in place:
        return place
    return Path(place).expanduser().absolute().as_uri()


def _local(run_dir: str | Path) -> Path:
    origin = origin_of(run_dir)
    if is_remote(run_dir) or origin is not None:
        remote = str(run_dir) if origin is None else origin[0]
        raise ConfigError(
            f"`tracking.uri` is missing: the run folder {redact(remote)} is remote and can't hold a database; "
            "name an MLflow server, or set `tracking.enabled` to false"
        )
    path = local_place(run_dir)
    if re.search(r"[?#%]", str(path)):
        raise ConfigError(
            f"the run folder {path} can't hold MLflow's database: its path has one of ? # %; take another"
        )
    return path
