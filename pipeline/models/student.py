"""Students: preprocessing and a small net in one module, which therefore takes images as they are stored."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models import nets
from pipeline.models.capture import captured, find_penultimate, pooled
from pipeline.models.factories import Refused, called, import_factory, nearest, with_defaults
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.spec import (
    TRUSTED_FACTORIES,
    PreprocessingSpec,
    SafetensorsModel,
    StateDictModel,
    StudentSpec,
    TeacherSpec,
    TimmModel,
    TorchvisionModel,
)
from pipeline.models.teacher import Teacher
from pipeline.models.weights import fill, read_state_dict
from pipeline.strict import StrictModel, validate

NETS = ("small_cnn", "mlp", "small_vgg", "small_mobilenet", "resnet8", "resnet14", "resnet20")


class Student(nn.Module):
    """A net with its preprocessing.

    Parameters
    ----------
    net : nn.Module
        Maps preprocessed images to logits.
    spec : StudentSpec
        What it was built from.
    preprocessing : PreprocessingSpec
    num_classes : int
    image_shape : (C, H, W)
        Of the stored images it is meant for.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        spec: StudentSpec,
        preprocessing: PreprocessingSpec,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.net = net
        self.preprocessing = Preprocessing(preprocessing)
        self.spec = spec
        self.num_classes = num_classes
        self.image_shape = image_shape

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W), uint8 or float in 0..255, to logits (B, num_classes)."""
        return self.net(self.preprocessing(images))

    def with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to logits (B, num_classes) and penultimate features (B, D) in one pass, both part of the graph.

        Raises
        ------
        ValueError
            When the net has no linear layer to take them from.
        """
        penultimate = find_penultimate(self.net)
        if penultimate is None:
            raise ValueError(f"student {self.spec.name!r} has no linear layer, so it has no penultimate features")
        with captured(self.net, features=penultimate, taps={}) as seen:
            logits = self(images)
        return logits, pooled(seen["features", ""])

    def features(self, images: Tensor) -> Tensor:
        """Map images to penultimate features (B, D)."""
        return self.with_features(images)[1]

    @property
    def feature_dim(self) -> int | None:
        """D; None where the net has no linear layer."""
        penultimate = find_penultimate(self.net)
        module = None if penultimate is None else self.net.get_submodule(penultimate)
        return module.in_features if isinstance(module, nn.Linear) else None

    @property
    def num_parameters(self) -> int:
        """Number of the net's parameters."""
        return sum(parameter.numel() for parameter in self.net.parameters())


def build_student(
    spec: StudentSpec,
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    trusted_factories: tuple[str, ...] | None = None,
) -> Student:
    """Build a student with fresh weights (drawn from torch's global generator).

    Parameters
    ----------
    spec : StudentSpec
    num_classes : int
    image_shape : (C, H, W)
        Of the stored images.
    trusted_factories : tuple of str, optional
        Prefixes of the modules that a ``module:callable`` may come from; None: any, because the run's own settings name
        it.

    Raises
    ------
    ConfigError
        When there is no such net (names the nearest), its arguments do not fit, or it does not take such images.
    """
    try:
        preprocessing = spec.preprocessing or _as_stored(spec, image_shape)
        net = _net(spec, num_classes, preprocessing.channels, trusted_factories)
        student = Student(net, spec=spec, preprocessing=preprocessing, num_classes=num_classes, image_shape=image_shape)
        _try(student)
    except Refused as error:
        raise ConfigError(f"student {spec.name!r}: {error}") from None
    return student


def _as_stored(spec: StudentSpec, image_shape: tuple[int, int, int]) -> PreprocessingSpec:
    # The models of the libraries are made for colour.
    library = spec.name.startswith(("torchvision:", "timm:"))
    return PreprocessingSpec(channels=3 if library or image_shape[0] == 3 else 1, mean=(0.5,), std=(0.5,))


def _net(spec: StudentSpec, num_classes: int, in_channels: int, trusted: tuple[str, ...] | None) -> nn.Module:
    origin, _, rest = spec.name.partition(":")
    what = f"`kwargs`: {spec.name}"
    if not rest:
        if origin not in NETS:
            hint = nearest(origin, NETS)
            raise Refused(f"`name` is no built-in net; {hint}; or torchvision:NAME, timm:NAME, module:callable")
        return called(lambda: getattr(nets, origin)(num_classes, in_channels, **spec.kwargs), what)
    if origin == "torchvision":
        from torchvision import models

        if rest not in models.list_models():
            raise Refused(f"`name`: {rest!r} is not in torchvision.models; {nearest(rest, models.list_models())}")
        return called(lambda: models.get_model(rest, weights=None, num_classes=num_classes, **spec.kwargs), what)
    if origin == "timm":
        return called(lambda: _timm(rest, num_classes, in_channels, spec.kwargs), what)
    factory = import_factory(spec.name, trusted)
    arguments = with_defaults(factory, spec.kwargs, num_classes=num_classes, in_channels=in_channels)
    net = called(lambda: factory(**arguments), what)
    if not isinstance(net, nn.Module):
        raise Refused(f"`name` returns a {type(net).__name__}, not an nn.Module")
    return net


def _timm(name: str, num_classes: int, in_channels: int, kwargs: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise Refused("`name` needs the optional package timm; pip install 'faculty[timm]'") from None
    names = timm.list_models()
    if name.split(".")[0] not in names:
        raise Refused(f"`name`: {name!r} is not in timm; {nearest(name, names)}")
    return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **kwargs)


def _try(student: Student) -> None:
    """See whether the net takes such images, before anything depends on it."""
    images = torch.zeros(2, *student.image_shape, dtype=torch.uint8)
    student.eval()
    try:
        with torch.inference_mode():
            logits = called(lambda: student(images), f"an image of shape {student.image_shape}")
    finally:
        student.train()
    if not isinstance(logits, Tensor) or logits.shape != (2, student.num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Refused(f"its output for 2 images is {got}, expected (2, {student.num_classes}) logits")


def student_like(teacher: TeacherSpec) -> StudentSpec:
    """Return a student of a teacher's architecture: its net with fresh weights, its preprocessing.

    Raises
    ------
    ConfigError
        When its architecture can't be built anew: it is a program, or comes from a registry.
    """
    source = teacher.source
    kwargs = {key: value for key, value in getattr(source, "kwargs", {}).items() if key != "num_classes"}
    match source:
        case SafetensorsModel() | StateDictModel():
            name = source.factory
        case TorchvisionModel() | TimmModel():
            name = f"{source.type}:{source.model.split('.')[0]}"
        case _:
            raise ConfigError(
                f"a student can't start from teacher {teacher.name!r}: its source is of type {source.type!r}, from "
                "which no net with other classes can be built; choose another teacher"
            )
    return StudentSpec(name=name, kwargs=kwargs, preprocessing=teacher.preprocessing)


def adopt(student: Student, teacher: Teacher) -> list[str]:
    """Take over a teacher's weights wherever name and shape agree; return the names of those that stay fresh.

    Raises
    ------
    ConfigError
        When nothing agrees: the architectures differ.
    """
    penultimate = find_penultimate(student.net)
    own, theirs = student.net.state_dict(), teacher.net.state_dict()
    # The classifier of other classes may have the same shape by chance.
    taken = {
        name: value
        for name, value in theirs.items()
        if name in own and own[name].shape == value.shape and name.rpartition(".")[0] != penultimate
    }
    if not any(value.is_floating_point() for value in taken.values()):
        raise ConfigError(
            f"student {student.spec.name!r} can't start from teacher {teacher.name!r}: their architectures differ"
        )
    student.net.load_state_dict(taken, strict=False)
    return sorted(set(own) - set(taken))


class _Saved(StrictModel):
    """What lies beside a student's weights."""

    student: StudentSpec
    num_classes: int
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...] | None = None


def save_student(student: Student, folder: str | Path, *, classes: Sequence[str] | None = None) -> Path:
    """Write a student as ``model.safetensors`` and ``student.json``.

    Parameters
    ----------
    student : Student
    folder : path
        Is made where it does not exist.
    classes : sequence of str, optional
        Class names to keep with it.

    Returns
    -------
    Path
        The folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in student.net.state_dict().items()}
    saved = _Saved(
        student=student.spec,
        num_classes=student.num_classes,
        image_shape=student.image_shape,
        classes=None if classes is None else tuple(classes),
    )
    save_file(state, folder / "model.safetensors.part")
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    (folder / "student.json").write_text(json.dumps(saved.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    return folder


def saved_classes(folder: str | Path) -> tuple[str, ...]:
    """Return the class names kept with a student; () where there are none."""
    content = json.loads((Path(folder) / "student.json").read_text(encoding="utf-8"))
    return validate(_Saved, content, where=str(folder)).classes or ()


def load_student(folder: str | Path, *, trusted_factories: tuple[str, ...] | None = TRUSTED_FACTORIES) -> Student:
    """Read what `save_student` wrote; in evaluation mode, on the CPU.

    Raises
    ------
    ConfigError
        Naming the file that is missing, damaged or does not fit.
    """
    folder = Path(folder)
    description = folder / "student.json"
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{description}: can't be read ({error.strerror or error})") from None
    except ValueError:
        raise ConfigError(f"{description}: is damaged; save the student again") from None
    saved = validate(_Saved, content, where=str(description))
    student = build_student(saved.student, saved.num_classes, saved.image_shape, trusted_factories=trusted_factories)
    weights = folder / "model.safetensors"
    try:
        fill(student.net, read_state_dict(weights))
    except OSError as error:
        raise ConfigError(f"{weights}: can't be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ConfigError(f"{weights}: {error}") from None
    return student.eval()
