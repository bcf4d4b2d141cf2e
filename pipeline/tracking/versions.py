"""Versions of registered models: found by URI or alias, described by their `MLmodel` file, loaded without pickle."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import FacultyError, StageError, TeacherError, UserError
from pipeline.tracking.connect import Store, check_server, find_store
from pipeline.tracking.quiet import prepare
from pipeline.tracking.redact import one_line, redact
from pipeline.tracking.spec import TrackingSpec

if TYPE_CHECKING:
    import torch
    from mlflow.tracking import MlflowClient

    from pipeline.tracking.mlflow import MlflowTracker

CONTENT_TAG = "faculty.content_sha256"
WEIGHTS_TAG = "faculty.weights_sha256"
_ABSENT = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # a missing alias is an invalid parameter to MLflow


@dataclass(frozen=True)
class Registry:
    """A model registry.

    Attributes
    ----------
    client : MlflowClient
    secret_uri : str
        Where it is; it may carry credentials, so print :attr:`uri`.
    """

    client: MlflowClient
    secret_uri: str = field(repr=False)

    @property
    def uri(self) -> str:
        """Where it is, without credentials."""
        return redact(self.secret_uri)

    @classmethod
    def of(cls, tracker: MlflowTracker) -> Registry:
        """Return the registry of the store that a run is recorded in."""
        return cls(tracker.client, tracker.secret_uri)

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Turn what the store raises into a StageError of one line, without credentials."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            raise StageError(f"MLflow at {self.uri}: {one_line(error)}") from None
        except Exception as error:
            # SQLAlchemy's own errors (no driver, no host) come through where a database is opened.
            if not type(error).__module__.startswith("sqlalchemy"):
                raise
            raise StageError(f"MLflow's database {self.uri} can't be used: {one_line(error)}") from None


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes
    ----------
    name, number : str
    run_id : str or None
        The run that made it.
    tags : dict of str to str
    """

    name: str
    number: str
    run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """What loads it: ``models:/name/3``."""
        return f"models:/{self.name}/{self.number}"


def open_registry(spec: TrackingSpec, run_dir: str | Path) -> Registry:
    """Open the registry that settings lead to; nothing is created.

    Raises
    ------
    UserError
        When there is none: tracking is off, the database does not exist, or the server does not answer.
    """
    store = find_store(spec, run_dir)
    if store.kind in ("none", "jsonl"):
        raise UserError("there is no model registry without MLflow: name one with --tracking-uri, or `tracking.uri`")
    if not exists(store):
        raise UserError(
            f"there is no model registry {store.shown} (yet: a run makes it that registers its student); name another "
            "with --tracking-uri, or -c run.yaml"
        )
    if store.kind == "server":
        check_server(store.uri, spec.timeout)
    prepare()
    from mlflow.tracking import MlflowClient

    registry = Registry(MlflowClient(store.uri, registry_uri=store.uri), store.uri)
    with registry.asked():
        registry.client.search_registered_models(max_results=1)
    return registry


def exists(store: Store) -> bool:
    """Return False for a SQLite database whose file is not there: MLflow would create it."""
    if not store.uri.startswith("sqlite:///"):
        return True
    return os.path.isfile(store.uri.removeprefix("sqlite:///").partition("?")[0])


def version_of(registry: Registry, uri: str) -> Version:
    """Find a version by ``models:/name/3`` or ``models:/name@alias``.

    Raises
    ------
    UserError
        When the URI has another form, or there is no such version.
    StageError
        When the registry can't be reached.
    """
    match = re.fullmatch(r"models:/+([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if match is None:
        raise UserError(f"{redact(uri)!r} names no version of a model; write models:/name/3 or models:/name@alias")
    name, number, alias = match.groups()
    found = _version(registry, name, number, alias or "")
    if found is None:
        raise UserError(f"there is no {uri} in {registry.uri}; `mlflow ui` shows names, versions and aliases")
    return found


def by_alias(registry: Registry, name: str, alias: str) -> Version | None:
    """Find the version that an alias points to; None where there is no such model or alias.

    Raises
    ------
    StageError
        When the registry can't be reached or refuses.
    """
    return _version(registry, name, None, alias)


def by_number(registry: Registry, name: str, number: str) -> Version | None:
    """Find a version by its number; None where there is no such model or version."""
    return _version(registry, name, number, "")


def description_of(registry: Registry, version: Version) -> dict[str, Any]:
    """Return what a version's `MLmodel` file says: flavours, signature, metadata.

    Raises
    ------
    StageError
        When it can't be read, or is none.
    """
    from mlflow.artifacts import download_artifacts

    with registry.asked(), tempfile.TemporaryDirectory(prefix="faculty-model-") as folder:
        where = registry.client.get_model_version_download_uri(version.name, version.number)
        path = download_artifacts(
            artifact_uri=f"{where.rstrip('/')}/MLmodel",
            dst_path=folder,
            tracking_uri=registry.secret_uri,
            registry_uri=registry.secret_uri,
        )
        text = Path(path).read_text(encoding="utf-8")
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise StageError(f"{version.uri}: its MLmodel file is damaged")
    return found


@dataclass(frozen=True)
class Loaded:
    """A version that can be asked.

    Attributes
    ----------
    module : nn.Module
        (B, C, H, W) uint8 tensor -> (B, K) logits.
    classes : tuple of str
        The K names; () where the version does not tell them.
    image_shape : tuple of int or None
        (C, H, W) that it takes; None where it does not tell.
    """

    module: torch.nn.Module
    classes: tuple[str, ...]
    image_shape: tuple[int, ...] | None


def load_version(registry: Registry, version: Version, device: str = "cpu") -> Loaded:
    """Load a version without unpickling anything.

    Raises
    ------
    FacultyError
        When it can't be reached, was saved by pickle, or does not load; one line.
    """
    from pipeline.tracking.resolve import load_mlflow_module

    described = description_of(registry, version)
    try:
        module = load_mlflow_module(version.uri, registry.secret_uri, device=device)
    except TeacherError as error:
        raise FacultyError(str(error)) from None
    classes = (described.get("metadata") or {}).get("classes") or ()
    return Loaded(module, tuple(map(str, classes)), _image_shape(described))


def _image_shape(described: dict[str, Any]) -> tuple[int, ...] | None:
    try:
        (only,) = json.loads(described["signature"]["inputs"])
        return tuple(only["tensor-spec"]["shape"][1:])
    except (KeyError, TypeError, ValueError):
        return None


def _version(registry: Registry, name: str, number: str | None, alias: str) -> Version | None:
    from mlflow.exceptions import MlflowException

    with registry.asked():
        try:
            if number is not None:
                found = registry.client.get_model_version(name, number)
            else:
                found = registry.client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
            return None
    return Version(found.name, str(found.version), found.run_id, dict(found.tags))
