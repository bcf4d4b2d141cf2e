"""The model registry as the home of students: exported without pickle, versioned by content, found by alias."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from pipeline.errors import ConfigError
from pipeline.tracking.additions import DESCRIPTION_LIMIT, add_version, ensure_model, version_with
from pipeline.tracking.entries import clean_document, clean_tags
from pipeline.tracking.export import check_export, export_student, logits_of, weights_sha256
from pipeline.tracking.mlflow import MlflowTracker
from pipeline.tracking.redact import redact
from pipeline.tracking.spec import check_alias, check_model_name
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.versions import CONTENT_TAG, WEIGHTS_TAG, Registry, by_alias

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class RegisteredStudent:
    """A version of a registered model.

    Attributes
    ----------
    name, version : str
        The registered model and its version.
    alias : str, optional
        The alias that points to this version.
    uri : str
        What loads it: ``models:/<name>@<alias>``, or ``models:/<name>/<version>`` without an alias.
    created : bool
        Whether this call added the version, or found it with the same content.
    tags : dict
        The version's tags.
    """

    name: str
    version: str
    alias: str | None
    uri: str
    created: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)


def register_student(
    tracker: Tracker,
    *,
    student: nn.Module,
    example: np.ndarray,
    classes: Sequence[str],
    name: str,
    alias: str | None = None,
    tags: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
    model_card: str = "",
) -> RegisteredStudent:
    """Export a student and register it as a version, unless a version with the same content is there.

    The registered model takes a uint8 array (B, C, H, W) for any B and gives logits (B, K) in float32; it is the traced
    graph alone, so it loads where this package is not installed and where unpickling is forbidden. MLflow runs it on
    the CPU, which it was exported on; docs/serving.md says how to move it. No image of `example` is stored: the example
    that is kept with the model is noise of the same shape.

    Content is weights, classes, image shape and `identity`. A version that is found by it gets `tags` and the
    description anew, since those tell what is thought of it; its files stay.

    Parameters
    ----------
    tracker : Tracker
        The run that produced the student; the version links to it.
    student : nn.Module
        (B, C, H, W) uint8 tensor -> (B, K) logits. It is left as it was.
    example : numpy.ndarray, (B, C, H, W) uint8, B >= 2
        Images that the exported model is compared with the student on. With one image alone the exported batch size
        would be fixed at one.
    classes : sequence of str
        The K class names, kept in the model's metadata under ``classes``.
    name, alias : str
        The registered model, and the alias that is moved to the version.
    tags : mapping, optional
        Tags of the version, for example its accuracies.
    metadata : mapping, optional
        The lineage, kept in the model's metadata under ``lineage``.
    identity : mapping, optional
        The part of the lineage that tells one version from another: no times, no run ids, no places of files. Default:
        all of `metadata`.
    model_card : str
        Markdown; kept as ``model_card.md`` with the model and as the version's description.

    Raises
    ------
    ConfigError
        When the tracker is not MLflow's.
    ValueError
        When example, classes, name or alias do not fit.
    StageError
        When the student can't be exported, the export gives other logits, or the registry refuses.
    """
    if not isinstance(tracker, MlflowTracker):
        raise ConfigError(
            "`register.enabled` needs MLflow: set `tracking.enabled` to true and `tracking.uri` not to jsonl"
        )
    check_model_name(name)
    if alias is not None:
        check_alias(alias)
    expected = logits_of(student, example, classes)
    lineage = clean_document(metadata or {})
    told_by = lineage if identity is None else clean_document(identity)
    weights = weights_sha256(student)
    content = _content_sha256(weights, told_by, classes, example.shape[1:])
    card = redact(model_card)
    all_tags = clean_tags({**(tags or {}), CONTENT_TAG: content, WEIGHTS_TAG: weights})

    tracker.flush()  # the version links to the run, so that the store must have it
    with Registry.of(tracker).asked():
        ensure_model(tracker.client, name, "student")
        version = version_with(tracker.client, name, content)
        created = version is None
        if version is not None:
            version = _tell(tracker.client, version, all_tags, card)
        else:
            from mlflow.models import Model

            with tempfile.TemporaryDirectory(prefix="faculty-register-") as folder:
                path = Path(folder) / "model"
                described = Model(run_id=tracker.run_id)
                export_student(
                    student,
                    path,
                    image_shape=example.shape[1:],
                    num_classes=len(classes),
                    metadata={"classes": list(classes), "output": "logits", "lineage": lineage},
                    mlflow_model=described,
                )
                check_export(path, student, example, expected)
                (path / "model_card.md").write_text(card or f"# {name}\n", encoding="utf-8")
                # Only a student that exports well becomes an entry of the store.
                version = add_version(
                    tracker, name, path, described, kind="student", tags=all_tags, description=_described_by(card)
                )
        if alias is not None:
            move_alias(tracker, name, str(version.version), alias)
    return _described(version, alias, created)


def move_alias(tracker: MlflowTracker, name: str, version: str, alias: str) -> None:
    """Let an alias point to a version; it leaves the version it pointed to before.

    Raises
    ------
    ValueError
        When the alias is not admitted.
    StageError
        When the registry refuses.
    """
    with Registry.of(tracker).asked():
        tracker.client.set_registered_model_alias(name, check_alias(alias), version)


def registered(tracker: MlflowTracker, name: str, alias: str) -> RegisteredStudent | None:
    """Find the version that an alias points to, with its tags; None where there is no such model or alias.

    Raises
    ------
    StageError
        When the registry can't be reached or refuses.
    """
    version = by_alias(Registry.of(tracker), name, alias)
    if version is None:
        return None
    return RegisteredStudent(name, version.number, alias, f"models:/{name}@{alias}", False, version.tags)


def _tell(client: MlflowClient, version: ModelVersion, tags: Mapping[str, str], card: str) -> ModelVersion:
    """Bring what a version says of itself up to date."""
    number = str(version.version)
    for key, text in tags.items():
        if version.tags.get(key) != text:
            client.set_model_version_tag(version.name, number, key, text)
    description = _described_by(card)
    if description is not None and description != version.description:
        client.update_model_version(version.name, number, description)
    return client.get_model_version(version.name, number)


def _described_by(card: str) -> str | None:
    """Return a model card that fits the registry's column, cut at the end of a line."""
    if len(card) <= DESCRIPTION_LIMIT:
        return card or None
    mark = "\n\n… the whole card is model_card.md among the model's files"
    return card[: DESCRIPTION_LIMIT - len(mark)].rpartition("\n")[0] + mark


def _content_sha256(weights: str, lineage: Any, classes: Sequence[str], image_shape: Sequence[int]) -> str:
    content = {"weights": weights, "lineage": lineage, "classes": list(classes), "image_shape": list(image_shape)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _described(version: ModelVersion, alias: str | None, created: bool) -> RegisteredStudent:
    number = str(version.version)
    uri = f"models:/{version.name}@{alias}" if alias is not None else f"models:/{version.name}/{number}"
    return RegisteredStudent(version.name, number, alias, uri, created, dict(version.tags))
