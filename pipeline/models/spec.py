"""Settings of teachers, of the zoo file that lists them, and of students."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from pipeline.data.spec import SourceSpec
from pipeline.strict import StrictModel

# Where a zoo file may take a `factory` from, unless the settings trust more.
TRUSTED_FACTORIES = ("pipeline.models.", "torchvision.models.", "timm.")

# What a teacher may be called: its name becomes part of folders.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$"

BUILTIN_LABELS = ("mnist", "fashion-mnist", "cifar-10", "cifar-100", "imagenet-1k")

Side = Annotated[int, Field(ge=1, le=4096)]


def _factory(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", value):
        raise ValueError(f"must be `module:callable`, for example pipeline.models.nets:resnet8, got {value!r}")
    return value


Factory = Annotated[str, AfterValidator(_factory)]


class PreprocessingSpec(StrictModel):
    """What a net wants done to stored images (uint8) before it sees them.

    In this order: channels, resize, crop, division by 255, normalisation.

    Attributes
    ----------
    size : int or (int, int), optional
        Side of a square, or (height, width), that the net wants, in pixels; null: images stay as large as stored.
    channels : {1, 3}
        Grey images are repeated for a net that wants 3; colour images become luma (ITU-R 601) for one that wants 1.
    mean, std : sequence of float
        Of the pixels divided by 255; one value for all channels or one each.
    interpolation : {"bilinear", "bicubic", "nearest"}
        Of the resize; the first two with antialiasing.
    crop : float, optional
        Fraction of the side that survives: images are resized to `size` / `crop` and the middle `size` is cut out.
    """

    size: Side | tuple[Side, Side] | None = None
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    crop: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> PreprocessingSpec:
        for field in ("mean", "std"):
            count = len(getattr(self, field))
            if count not in (1, self.channels):
                raise ValueError(
                    f"`{field}` has {count} values for {self.channels} channels; give 1 or {self.channels}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"`std` must be > 0, got {min(self.std)}")
        if self.crop is not None and self.size is None:
            raise ValueError("`crop` needs a `size`")
        return self

    def side(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width of what the net gets for images stored as `shape` (C, H, W)."""
        if self.size is None:
            return shape[1], shape[2]
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class TorchvisionModel(StrictModel):
    """A model of ``torchvision.models``.

    Attributes
    ----------
    model : str
        Its name, for instance ``resnet18``.
    weights : str, optional
        Name of published weights (``IMAGENET1K_V1``, ``DEFAULT``); torchvision downloads them on first use.
    path : str, optional
        A local state dict (``.safetensors``, ``.pt``, ``.pth``) instead.
    kwargs : dict
        Passed to the model's constructor.
    """

    type: Literal["torchvision"] = "torchvision"
    model: str
    weights: str | None = None
    path: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_origin(self) -> TorchvisionModel:
        if (self.weights is None) == (self.path is None):
            raise ValueError("give either `weights` (a published name) or `path` (a local file)")
        return self


class SafetensorsModel(StrictModel):
    """Weights in safetensors, for a net that a factory builds.

    Attributes
    ----------
    path : str
        The weights.
    factory : str
        ``module:callable``. The module must be trusted, see ``zoo.trusted_factories``.
    kwargs : dict
        Its arguments. ``num_classes`` and ``in_channels`` come from the teacher's classes and preprocessing where the
        factory has arguments of these names and `kwargs` leaves them out.
    """

    type: Literal["safetensors"] = "safetensors"
    path: str
    factory: Factory
    kwargs: dict[str, Any] = Field(default_factory=dict)


class StateDictModel(StrictModel):
    """Weights in a ``torch.save`` file, for a net that a factory builds.

    Read with ``weights_only``: a file that holds anything but tensors and plain containers is refused. A checkpoint
    that keeps its weights under ``state_dict`` or ``model`` is understood; a ``module.`` prefix of all keys is dropped.

    Attributes
    ----------
    path : str
        The weights.
    factory, kwargs
        As for safetensors.
    """

    type: Literal["state_dict"] = "state_dict"
    path: str
    factory: Factory
    kwargs: dict[str, Any] = Field(default_factory=dict)


class ExportedModel(StrictModel):
    """A program written by ``torch.export.save``.

    It takes preprocessed images (B, C, H, W) and returns logits (B, C_t), or logits and features (B, D); logits alone
    serve as features too. A file that holds anything which could run code is refused.

    Attributes
    ----------
    path : str
        The ``.pt2`` file.
    """

    type: Literal["exported"] = "exported"
    path: str


class MlflowModel(StrictModel):
    """A PyTorch model logged to MLflow.

    Attributes
    ----------
    uri : str
        ``models:/name@alias``, ``models:/name/3``, ``runs:/...``.
    described : bool
        The model itself says what is done to images: set where the teacher has no `preprocessing` entry.
    """

    type: Literal["mlflow"] = "mlflow"
    uri: str = Field(min_length=1)
    described: bool = False


class TimmModel(StrictModel):
    """A model of the optional package timm.

    Attributes
    ----------
    model : str
        Its name, for instance ``resnet18.a1_in1k``.
    path : str, optional
        A local state dict.
    pretrained : bool
        Take the published weights (timm downloads them) instead of a `path`.
    kwargs : dict
        Passed to ``timm.create_model``.
    """

    type: Literal["timm"] = "timm"
    model: str
    path: str | None = None
    pretrained: bool = False
    kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_origin(self) -> TimmModel:
        if self.pretrained == (self.path is not None):
            raise ValueError("give either `path` (a local file) or `pretrained: true`")
        return self


TeacherSource = Annotated[
    TorchvisionModel | SafetensorsModel | StateDictModel | ExportedModel | MlflowModel | TimmModel,
    Field(discriminator="type"),
]


class TeacherSpec(StrictModel):
    """One teacher: a reference to its weights and all that is needed to use them.

    Attributes
    ----------
    name : str
        Letters, digits, ``_``, ``.`` and ``-``, unique in the zoo.
    source : TeacherSource
        Where the net comes from, told apart by `type`.
    classes : sequence of str, str or None
        Class names in the order of the logits; or the name of a list that ships with the package (``mnist``,
        ``fashion-mnist``, ``cifar-10``, ``cifar-100``, ``imagenet-1k``); or null where the source knows them itself
        (torchvision's published weights, a registered model) or the names are of no interest (then ``class 0``,
        ``class 1``, ...).
    preprocessing : PreprocessingSpec or None
        What its net wants done to images; null: nothing, it takes them as they are stored (a student of another run).
        A teacher from MLflow may leave the entry out: then the model's metadata, or its signature, says.
    features : str, optional
        Path of the module whose input is taken as the penultimate features; null: ``classifier``, ``fc`` or ``head`` if
        it is, or ends in, a linear layer, else the last linear layer.
    taps : dict of str to str
        Name to module path: outputs of inner modules to hand over as well.
    sha256 : str, optional
        Of the weight file, or of a registered model's program; one that differs is refused.
    licence, notes : str
        For people: what the weights may be used for, what they were trained on.
    accuracy : float, optional
        On its own classes, in [0, 1], as its model card gives it. It has no part in what the teacher answers.
    examples : SourceSpec, optional
        A few labelled images of the teacher's own classes, for its card; a source as a task has it, whose class names
        must be among the teacher's. At most 64 images a class, and about 2,000 in all, are looked at.
    """

    name: str = Field(pattern=NAME_PATTERN)
    source: TeacherSource
    classes: tuple[str, ...] | str | None = None
    preprocessing: PreprocessingSpec | None
    features: str | None = None
    taps: dict[str, str] = Field(default_factory=dict)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    licence: str = ""
    notes: str = ""
    accuracy: float | None = Field(default=None, ge=0, le=1)
    examples: SourceSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _left_to_the_model(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "preprocessing" in data:
            return data
        source = data.get("source")
        if isinstance(source, MlflowModel):
            source = source.model_dump()
        if not isinstance(source, Mapping) or source.get("type") != "mlflow":
            return data
        return {**data, "preprocessing": None, "source": {**source, "described": True}}

    @field_validator("classes")
    @classmethod
    def _classes(cls, value: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if isinstance(value, str) and value not in BUILTIN_LABELS:
            raise ValueError(
                f"{value!r} is no built-in list of classes; give the names, or one of {', '.join(BUILTIN_LABELS)}"
            )
        if isinstance(value, tuple):
            if len(value) < 2:
                raise ValueError("at least two class names are needed")
            repeated = sorted({name for name in value if value.count(name) > 1})
            if repeated:
                raise ValueError(f"class name {repeated[0]!r} occurs twice")
        return value

    @field_validator("examples")
    @classmethod
    def _own_classes(cls, value: SourceSpec | None, info: ValidationInfo) -> SourceSpec | None:
        classes = info.data.get("classes")
        if value is not None and value.type == "own":
            raise ValueError(
                "`type: own` is code, and a zoo file names none for its examples; use image_folder or numpy"
            )
        if value is not None and isinstance(classes, tuple):  # other classes are known when the teacher is loaded
            unknown = [name for name in value.only or value.classes or () if name not in classes]
            if unknown:
                raise ValueError(f"class {unknown[0]!r} is not among the teacher's `classes`; they must be its own")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TeacherSpec:
        registered = isinstance(self.source, MlflowModel)
        if self.sha256 is not None and self.path is None and not registered:
            raise ValueError("`sha256` needs a source with a `path`, or of type mlflow")
        if getattr(self.source, "described", False) and self.preprocessing is not None:
            raise ValueError("`preprocessing` is given here and left to the model (`source.described`); keep one")
        return self

    @property
    def path(self) -> str | None:
        """The weight file, where the source has one."""
        return getattr(self.source, "path", None)


class ZooFile(StrictModel):
    """A zoo file: the teachers, in order."""

    teachers: tuple[TeacherSpec, ...] = Field(min_length=1)

    @field_validator("teachers")
    @classmethod
    def _unique(cls, teachers: tuple[TeacherSpec, ...]) -> tuple[TeacherSpec, ...]:
        names = [teacher.name for teacher in teachers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two teachers are called {repeated[0]!r}; rename one")
        return teachers


class StudentSpec(StrictModel):
    """The student's net.

    Attributes
    ----------
    name : str
        A net of ``pipeline.models.nets`` (``small_cnn``, ``mlp``, ``small_vgg``, ``small_mobilenet``, ``resnet8``,
        ``resnet14``, ``resnet20``), ``torchvision:resnet18``, ``timm:resnet18``, or your own ``module:callable``, which
        is called with ``num_classes``, ``in_channels`` where it has such an argument, and `kwargs`.
    kwargs : dict
        Further arguments, for instance ``width``.
    preprocessing : PreprocessingSpec, optional
        null: size and channels as stored, pixels mapped to [-1, 1].
    """

    name: str = Field(min_length=1)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    preprocessing: PreprocessingSpec | None = None
