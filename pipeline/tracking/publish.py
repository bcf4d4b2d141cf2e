"""Teachers into a registry: a program without pickle, what a zoo needs to know of it, its card and its model card."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.models.description import METADATA, TeacherMetadata
from pipeline.models.program import Exported
from pipeline.tracking.entries import clean_document, clean_tags
from pipeline.tracking.redact import redact
from pipeline.tracking.versions import CONTENT_TAG, Registry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from pipeline.tracking.mlflow import MlflowTracker

PROGRAM, CARD_FILE = "data/model.pt2", "card.arrow"
_KIND_TAG = {"faculty": "teacher"}
_DESCRIPTION_LIMIT = 5000  # the width of the registry's column


def write_model(folder: Path, exported: Exported, classes: Sequence[str], about: TeacherMetadata) -> None:
    """Describe the program ``data/model.pt2`` in `folder` as an MLflow model that ``mlflow.pytorch`` loads.

    Parameters
    ----------
    folder : Path
    exported : Exported
        What the program takes and gives.
    classes : sequence of str
    about : TeacherMetadata
        Credentials in it are taken out.
    """
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    outputs = zip(exported.outputs, exported.widths, strict=True)
    kind = np.dtype("uint8") if exported.dtype == torch.uint8 else np.dtype(str(exported.dtype).removeprefix("torch."))
    model = Model(
        signature=ModelSignature(
            inputs=Schema([TensorSpec(kind, (-1, *exported.image))]),
            outputs=Schema([TensorSpec(np.dtype("float32"), (-1, *shape), name) for name, shape in outputs]),
        ),
        metadata=clean_document({"classes": list(classes), METADATA: about}),
    )
    # Not as a Python function too: that form admits one output.
    model.add_flavor("pytorch", model_data="data", pytorch_version=str(torch.__version__), code=None)
    needed = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("mlflow", "torch")]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    model.save(str(folder / "MLmodel"))


def version_with(registry: Registry, name: str, content: str) -> ModelVersion | None:
    """Find the version of a model that has this content.

    Raises
    ------
    StageError
        When the registry can't be reached or refuses.
    """
    with registry.asked():
        token = None
        while True:
            # The name goes into the query, the tag does not: not every registry can search by tags.
            page = registry.client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token)
            for version in page:
                if version.tags.get(CONTENT_TAG) == content and version.status == "READY":
                    return version
            token = page.token
            if not token:
                return None


def add_version(tracker: MlflowTracker, name: str, folder: Path, content: str, description: str) -> ModelVersion:
    """Make a model folder a new version; what is cut off on the way leaves no version.

    Raises
    ------
    StageError
        When the registry can't be reached or refuses.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    client = tracker.client
    tracker.flush()  # the version links to the run, so that the store must have it
    with Registry.of(tracker).asked():
        try:
            client.create_registered_model(name, tags=_KIND_TAG)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        logged = client.create_logged_model(tracker.experiment_id, name="teacher", source_run_id=tracker.run_id)
        model = Model.load(str(folder / "MLmodel"))
        model.run_id, model.model_uuid, model.model_id = tracker.run_id, logged.model_id, logged.model_id
        model.save(str(folder / "MLmodel"))
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        client.log_outputs(str(tracker.run_id), [LoggedModelOutput(logged.model_id, step=0)])
        return client.create_model_version(
            name,
            # Not models:/<id>: a database's registry looks that up in the process's global store, wherever it is.
            source=logged.artifact_location,
            run_id=tracker.run_id,
            tags={CONTENT_TAG: content},
            description=redact(description)[:_DESCRIPTION_LIMIT],
            model_id=logged.model_id,
        )


def tell(registry: Registry, version: ModelVersion, tags: Mapping[str, Any], alias: str | None) -> None:
    """Set tags, of the version and of its model, and let the alias point to it.

    Raises
    ------
    StageError
        When the registry can't be reached or refuses.
    """
    name, number, client = version.name, str(version.version), registry.client
    with registry.asked():
        known = dict(version.tags)
        for key, text in clean_tags(tags).items():
            client.set_registered_model_tag(name, key, text)
            if known.get(key) != text:
                client.set_model_version_tag(name, number, key, text)
        if alias is not None:
            client.set_registered_model_alias(name, alias, number)
