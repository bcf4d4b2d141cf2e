"""What a registered model says of itself: class names, preprocessing, outputs, from its `MLmodel` file and its tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.models.factories import Refused
from pipeline.models.spec import PreprocessingSpec, TeacherSpec
from pipeline.strict import StrictModel, parse_yaml, validate

METADATA = "faculty_teacher"
"""The entry of a model's metadata that `faculty zoo push` writes."""

CLASSES_TAG, PREPROCESSING_TAG = "faculty.classes", "faculty.preprocessing"
"""Tags of a version that say what its files leave out; files can't be changed afterwards, tags can."""

TAP = "taps."


class TeacherMetadata(StrictModel):
    """What a pushed teacher keeps in its model's metadata, beside ``classes``.

    Attributes
    ----------
    format : int
    preprocessing : PreprocessingSpec or None
        What is done to stored images before the program sees them; null: nothing.
    outputs : sequence of str
        Of the program, in order: ``logits``, ``features``, ``taps.<name>``.
    classifier : str, optional
        Path of the last linear layer's parameters in the program.
    sha256 : str
        Of the program's file.
    fingerprint : str
        Of the teacher that was pushed.
    card : str, optional
        The reference of the card that lies beside the model (``card.arrow``).
    licence, notes, accuracy
        As a zoo has them.
    """

    format: Literal[1] = 1
    preprocessing: PreprocessingSpec | None
    outputs: tuple[str, ...] = Field(min_length=1)
    classifier: str | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    fingerprint: str = ""
    card: str | None = None
    licence: str = ""
    notes: str = ""
    accuracy: float | None = Field(default=None, ge=0, le=1)


@dataclass(frozen=True)
class Description:
    """What is known of a registered model without loading it.

    Attributes
    ----------
    classes : tuple of str, str or None
        Names, or that of a built-in list; None where nothing tells them.
    count : int or None
        How many outputs the signature names.
    preprocessing : PreprocessingSpec or None
        None: it takes images as they are stored.
    problem : str
        Why the preprocessing is not known, and the remedy; "" where it is.
    teacher : TeacherMetadata or None
        Of a model that was pushed.
    """

    classes: tuple[str, ...] | str | None = None
    count: int | None = None
    preprocessing: PreprocessingSpec | None = None
    problem: str = ""
    teacher: TeacherMetadata | None = None


def read_description(model: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> Description:
    """Read what a model says of itself.

    Class names: the version's tag ``faculty.classes`` (YAML), else the metadata's ``classes``. Preprocessing: the tag
    ``faculty.preprocessing``, else the metadata of a pushed teacher, else the metadata's ``preprocessing``, in which
    `size` and `channels` may be left to the signature; else a signature of raw images, (B, C, H, W) uint8, which a
    student has: images are brought to that size and handed over as they are.

    Parameters
    ----------
    model : mapping
        The content of the ``MLmodel`` file.
    tags : mapping, optional
        Of the version.

    Raises
    ------
    Refused
        When it is no PyTorch model, or an entry is not valid; one line.
    """
    tags = tags or {}
    if "pytorch" not in (model.get("flavors") or {}):
        raise Refused("it is no PyTorch model; log it with mlflow.pytorch")
    metadata = model.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    teacher = (
        _valid(TeacherMetadata, metadata[METADATA], f"its metadata `{METADATA}`") if METADATA in metadata else None
    )
    dtype, shape = _signature(model, "inputs")
    _, widths = _signature(model, "outputs")
    preprocessing, problem = _preprocessing(tags, teacher, metadata, dtype, shape)
    return Description(
        classes=_classes(tags, metadata),
        count=widths[1] if len(widths) == 2 and widths[1] > 0 else None,
        preprocessing=preprocessing,
        problem=problem,
        teacher=teacher,
    )


def completed(spec: TeacherSpec, found: Description) -> TeacherSpec:
    """Return a teacher's spec with what it leaves out taken from its model's description; what it states stays.

    Raises
    ------
    Refused
        When it leaves the preprocessing to a model that does not tell.
    """
    changes: dict[str, Any] = {}
    if spec.classes is None and found.classes is not None:
        changes["classes"] = found.classes
    if getattr(spec.source, "described", False):
        if found.problem:
            raise Refused(found.problem)
        changes["preprocessing"] = found.preprocessing
        changes["source"] = spec.source.model_copy(update={"described": False})
    if found.teacher is not None:
        known = found.teacher
        changes |= {
            name: getattr(known, name)
            for name in ("licence", "notes", "accuracy")
            if getattr(spec, name) in ("", None) and getattr(known, name) not in ("", None)
        }
        if not spec.taps:
            changes["taps"] = tap_paths(known.outputs)
    return TeacherSpec.model_validate(spec.model_dump() | {name: _plain(value) for name, value in changes.items()})


def tap_paths(outputs: tuple[str, ...]) -> dict[str, str]:
    """Return where the taps of a program with these outputs are found, see `pipeline.models.program`."""
    names = [name.removeprefix(TAP) for name in outputs if name.startswith(TAP)]
    return {name: f"{TAP}{number}" for number, name in enumerate(names)}


def _classes(tags: Mapping[str, str], metadata: Mapping[str, Any]) -> tuple[str, ...] | str | None:
    found: Any = metadata.get("classes")
    where = "its metadata `classes`"
    if CLASSES_TAG in tags:
        found, where = _parsed(tags[CLASSES_TAG], CLASSES_TAG), f"its tag {CLASSES_TAG}"
    if found is None or isinstance(found, str):
        return found
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, (str, int)) for name in found):
        raise Refused(f"{where} must be a list of names; set the version's tag {CLASSES_TAG} to one")
    return tuple(map(str, found))


def _preprocessing(
    tags: Mapping[str, str],
    teacher: TeacherMetadata | None,
    metadata: Mapping[str, Any],
    dtype: str,
    shape: tuple[int, ...],
) -> tuple[PreprocessingSpec | None, str]:
    """Return the preprocessing, and why it is not known."""
    image = len(shape) == 4 and shape[1] in (1, 3)
    sized = image and min(shape[2:]) > 0
    if PREPROCESSING_TAG in tags:
        given, where = _parsed(tags[PREPROCESSING_TAG], PREPROCESSING_TAG), f"its tag {PREPROCESSING_TAG}"
    elif teacher is not None:
        return teacher.preprocessing, ""
    elif "preprocessing" in metadata:
        given, where = metadata["preprocessing"], "its metadata `preprocessing`"
    elif dtype == "uint8" and image:
        if not sized:
            return None, ""
        # The division by 255 and the multiplication by it cancel: the program gets 0..255, as its signature wants.
        channels: Literal[1, 3] = 1 if shape[1] == 1 else 3
        return PreprocessingSpec(size=(shape[2], shape[3]), channels=channels, mean=(0.0,), std=(1 / 255,)), ""
    else:
        takes = f"takes {dtype} {shape}" if shape else "has no signature"
        return None, (
            f"the model {takes} and nothing says what is done to images before; set the version's tag "
            f"{PREPROCESSING_TAG} to, for example, {{size: 224, channels: 3, mean: [0.5], std: [0.5]}}, or to null if "
            "it takes them as they are stored; or give `preprocessing` in a zoo file"
        )
    if given is None:
        return None, ""
    if isinstance(given, Mapping) and image:
        known = {"channels": shape[1]} | ({"size": [shape[2], shape[3]]} if sized else {})
        given = known | dict(given)
    return _valid(PreprocessingSpec, given, where), ""


def _signature(model: Mapping[str, Any], side: str) -> tuple[str, tuple[int, ...]]:
    """Return type and shape of the first tensor on one side of the signature; ("", ()) where it names none."""
    try:
        tensor = json.loads(model["signature"][side])[0]["tensor-spec"]
        return str(tensor["dtype"]), tuple(int(size) for size in tensor["shape"])
    except (KeyError, IndexError, TypeError, ValueError):
        return "", ()


def _parsed(text: str, tag: str) -> Any:
    try:
        return parse_yaml(text, where=f"its tag {tag}")
    except ConfigError as error:
        raise Refused(" ".join(str(error).split())) from None


def _valid(model: Any, data: Any, where: str) -> Any:
    try:
        return validate(model, data, where=where)
    except ConfigError as error:
        raise Refused(str(error).splitlines()[0]) from None


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, StrictModel) else value
