"""Teachers into a registry: a program without pickle, what a zoo needs to know of it, its card and its model card."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.models.description import METADATA, TeacherMetadata
from pipeline.models.program import Exported
from pipeline.tracking import additions
from pipeline.tracking.entries import clean_document, clean_tags
from pipeline.tracking.redact import redact
from pipeline.tracking.versions import CONTENT_TAG, Registry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from pipeline.tracking.mlflow import MlflowTracker

PROGRAM, CARD_FILE = "data/model.pt2", "card.arrow"


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
        return additions.version_with(registry.client, name, content)


def add_version(tracker: MlflowTracker, name: str, folder: Path, content: str, description: str) -> ModelVersion:
    """Make a model folder a new version; what is cut off on the way leaves no version.

    Raises
    ------
    StageError
        When the registry can't be reached or refuses.
    """
    from mlflow.models import Model

    tracker.flush()  # the version links to the run, so that the store must have it
    with Registry.of(tracker).asked():
        additions.ensure_model(tracker.client, name, "teacher")
        return additions.add_version(
            tracker,
            name,
            folder,
            Model.load(str(folder / "MLmodel")),
            kind="teacher",
            tags={CONTENT_TAG: content},
            description=redact(description)[: additions.DESCRIPTION_LIMIT],
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
