"""A student as an MLflow model that loads without this package and without pickle: a traced graph and its card."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import StageError


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


def logits_of(student: nn.Module, example: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Return what a student says of images, (B, K) float32, and leave it as it was.

    Raises
    ------
    ValueError
        When the images are not (B >= 2, C, H, W) uint8, or the student does not give K logits for each.
    """
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


def check_export(path: Path, student: nn.Module, example: np.ndarray, expected: np.ndarray) -> None:
    """Compare an exported model with what the student said of the same images, in a batch and one by one.

    Raises
    ------
    StageError
        When they differ by more than rounding.
    """
    exported = torch.export.load(path / "data" / "model.pt2").module()
    with torch.no_grad():
        given = exported(torch.from_numpy(np.ascontiguousarray(example))).numpy()
        single = exported(torch.from_numpy(np.ascontiguousarray(example[:1]))).numpy()
    # A GPU's kernels may round to TF32, unlike the CPU's; a wrong export differs in the first digits.
    same_device = all(tensor.device.type == "cpu" for tensor in student.state_dict().values())
    limit = (1e-4 if same_device else 1e-2) * max(1.0, float(np.abs(expected).max(initial=0.0)))
    worst = max(float(np.abs(given - expected).max()), float(np.abs(single - expected[:1]).max()))
    if not worst <= limit:
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


def _requirements() -> list[str]:
    # What serves the graph; the preprocessing is inside it, so neither this package nor torchvision is needed.
    packages = ("mlflow", "numpy", "torch")
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in packages]
