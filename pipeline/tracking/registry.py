"""The model registry as the home of students: exported without pickle, versioned by content, found by alias."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import ConfigError, StageError
from pipeline.tracking.entries import clean_document, clean_tags
from pipeline.tracking.mlflow import MlflowTracker, translated
from pipeline.tracking.spec import check_alias, check_model_name
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CONTENT_TAG = "faculty.content_sha256"
WEIGHTS_TAG = "faculty.weights_sha256"
_DESCRIPTION_LIMIT = 5000  # the width of the registry's column


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
    model_card: str = "",
) -> RegisteredStudent:
    """Export a student and register it as a version, unless a version with the same content is there.

    The registered model takes a uint8 array (B, C, H, W) for any B and gives logits (B, K) in float32; it is the traced
    graph alone, so it loads where this package is not installed and where unpickling is forbidden. It runs on the CPU
    unless it is loaded with ``model_config={"device": ...}``. No image of `example` is stored: the example that
    is kept with the model is noise of the same shape.

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
        The lineage, kept in the model's metadata under ``lineage``. It is part of the content.
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
    expected = _check_student(student, example, classes)
    lineage = clean_document(metadata or {})
    weights = weights_sha256(student)
    content = _content_sha256(weights, lineage, classes, example.shape[1:])

    with translated(tracker.uri):
        _ensure_model(tracker.client, name)
        version = _version_with(tracker.client, name, content)
        created = version is None
        if version is None:
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
                _compare(path, example, expected)
                (path / "model_card.md").write_text(model_card or f"# {name}\n", encoding="utf-8")
                # Only a student that exports well becomes an entry of the store.
                logged = tracker.client.create_logged_model(
                    tracker.experiment_id, name="student", source_run_id=tracker.run_id
                )
                described.model_uuid = described.model_id = logged.model_id
                described.save(str(path / "MLmodel"))
                tracker.client.log_model_artifacts(logged.model_id, str(path))
            _finish(tracker, logged.model_id)
            version = tracker.client.create_model_version(
                name,
                # Not models:/<id>: a database's registry looks that up in the process's global store, wherever it is.
                source=logged.artifact_location,
                run_id=tracker.run_id,
                tags=clean_tags({**(tags or {}), CONTENT_TAG: content, WEIGHTS_TAG: weights}),
                description=model_card[:_DESCRIPTION_LIMIT] or None,
                model_id=logged.model_id,
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
    with translated(tracker.uri):
        tracker.client.set_registered_model_alias(name, check_alias(alias), version)


def registered(tracker: MlflowTracker, name: str, alias: str) -> RegisteredStudent | None:
    """Find the version that an alias points to, with its tags; None where there is no such model or alias.

    Raises
    ------
    StageError
        When the registry can't be reached or refuses.
    """
    from mlflow.exceptions import MlflowException

    with translated(tracker.uri):
        try:
            version = tracker.client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            # A missing alias of an existing model is reported as an invalid parameter.
            if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                raise
            return None
    return _described(version, alias, created=False)


def export_student(
    student: nn.Module,
    path: Path,
    *,
    image_shape: Sequence[int],
    num_classes: int,
    metadata: Mapping[str, Any],
    mlflow_model: Any = None,
) -> None:
    """Write a student as an MLflow model folder in the ``pt2`` form: a traced graph, no code and no pickled object.

    Parameters
    ----------
    student : nn.Module
        (B, C, H, W) uint8 tensor -> (B, K) logits. A copy of it is exported.
    path : Path
        The folder; it must not exist.
    image_shape : (C, H, W)
        The images' shape; the batch size stays free.
    num_classes : int
        K.
    metadata : mapping
        Plain data that is kept in the ``MLmodel`` file.
    mlflow_model : mlflow.models.Model, optional
        The description to complete, where the model belongs to a run.

    Raises
    ------
    StageError
        When the student can't be traced.
    """
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    channels, height, width = image_shape
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, channels, height, width))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, num_classes))]),
    )
    noise = np.random.default_rng(0).integers(0, 256, (2, channels, height, width), dtype=np.uint8)
    described = mlflow_model if mlflow_model is not None else Model()
    traced = _Float32Logits(copy.deepcopy(student)).cpu().eval().requires_grad_(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what tracing remarks about torch's own code is nothing a user can act on
            mlflow.pytorch.save_model(
                traced,
                str(path),
                mlflow_model=described,
                signature=signature,
                input_example=noise,
                metadata=dict(metadata),
                # Given, or MLflow would load the model in a process of its own to find out.
                pip_requirements=_requirements(),
                serialization_format="pt2",
            )
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise StageError(
            f"the student can't be exported ({lines[0]}); its forward must not branch on the batch's content or size"
        ) from error
    # The exported graph holds its tensors on the CPU, but MLflow would pick a GPU where it finds one and then refuse.
    described.flavors["python_function"]["config"] = {"device": "cpu"}
    described.save(str(path / "MLmodel"))


def weights_sha256(module: nn.Module) -> str:
    """Hash a module's parameters and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Float32Logits(nn.Module):
    """Gives logits in float32, which the signature promises, whatever precision the student computes in."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.student(images).float()


def _check_student(student: nn.Module, example: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    if example.dtype != np.uint8 or example.ndim != 4 or len(example) < 2:
        raise ValueError(f"example must be uint8 (B >= 2, C, H, W), got {example.dtype} {example.shape}")
    device = next((tensor.device for tensor in student.state_dict().values()), torch.device("cpu"))
    with _evaluating(student), torch.no_grad():
        logits = student(torch.from_numpy(np.ascontiguousarray(example)).to(device))
    if logits.shape != (len(example), len(classes)):
        raise ValueError(
            f"the student gives {tuple(logits.shape)} logits for {len(example)} images and {len(classes)} classes"
        )
    return logits.float().cpu().numpy()


def _compare(path: Path, example: np.ndarray, expected: np.ndarray) -> None:
    exported = torch.export.load(path / "data" / "model.pt2").module()
    with torch.no_grad():
        given = exported(torch.from_numpy(np.ascontiguousarray(example))).numpy()
        single = exported(torch.from_numpy(np.ascontiguousarray(example[:1]))).numpy()
    # A GPU's convolutions differ from the CPU's in the last digits; a wrong export differs in the first ones.
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    worst = max(float(np.abs(given - expected).max()), float(np.abs(single - expected[:1]).max()))
    if not worst <= 1e-2 * scale:
        raise StageError(f"the exported student differs from the student by {worst:.3g} in its logits")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _content_sha256(weights: str, lineage: Any, classes: Sequence[str], image_shape: Sequence[int]) -> str:
    content = {"weights": weights, "lineage": lineage, "classes": list(classes), "image_shape": list(image_shape)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _requirements() -> list[str]:
    # What serves the graph; the preprocessing is inside it, so neither this package nor torchvision is needed.
    packages = ("mlflow", "numpy", "torch")
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in packages]


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags={"faculty": "student"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_with(client: MlflowClient, name: str, content: str) -> ModelVersion | None:
    # The name goes into the query, the tag does not: not every registry can search by tags.
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token)
        for version in page:
            if version.tags.get(CONTENT_TAG) == content and version.status == "READY":
                return version
        token = page.token
        if not token:
            return None


def _finish(tracker: MlflowTracker, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    tracker.client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    tracker.client.log_outputs(str(tracker.run_id), [LoggedModelOutput(model_id, step=0)])


def _described(version: ModelVersion, alias: str | None, created: bool) -> RegisteredStudent:
    number = str(version.version)
    uri = f"models:/{version.name}@{alias}" if alias is not None else f"models:/{version.name}/{number}"
    return RegisteredStudent(version.name, number, alias, uri, created, dict(version.tags))
