"""New versions of registered models, of students and teachers alike: found by content, made whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.tracking.versions import CONTENT_TAG

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model
    from mlflow.tracking import MlflowClient

    from pipeline.tracking.mlflow import MlflowTracker

DESCRIPTION_LIMIT = 5000  # the width of the registry's column


def ensure_model(client: MlflowClient, name: str, kind: str) -> None:
    """Make a registered model of a kind (``student``, ``teacher``) unless there is one of its name."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags={"faculty": kind})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def version_with(client: MlflowClient, name: str, content: str) -> ModelVersion | None:
    """Find the version of a model that has this content; None where there is none."""
    token = None
    while True:
        # The name goes into the query, the tag does not: not every registry can search by tags.
        page = client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token)
        for version in page:
            if version.tags.get(CONTENT_TAG) == content and version.status == "READY":
                return version
        token = page.token
        if not token:
            return None


def add_version(
    tracker: MlflowTracker,
    name: str,
    folder: Path,
    model: Model,
    *,
    kind: str,
    tags: Mapping[str, str],
    description: str | None,
) -> ModelVersion:
    """Make a model folder a new version; what is cut off on the way leaves no version.

    Parameters
    ----------
    tracker : MlflowTracker
        The run that the version links to; flushed, for the store must have it.
    name : str
        A registered model that is there.
    folder : Path
        With all files but `MLmodel`, which is written anew.
    model : mlflow.models.Model
        What `MLmodel` is to say; gets the numbers of the run and of the entry in the store.
    kind : str
        ``student`` or ``teacher``.
    tags : mapping
        Of the version.
    description : str or None
        At most `DESCRIPTION_LIMIT` characters.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    client = tracker.client
    logged = client.create_logged_model(tracker.experiment_id, name=kind, source_run_id=tracker.run_id)
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
        tags=dict(tags),
        description=description,
        model_id=logged.model_id,
    )
