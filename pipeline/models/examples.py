"""A teacher's examples: a few labelled images of its own classes, read for its card."""

from __future__ import annotations

import difflib
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.pixels import UnreadableImageError, canonical
from pipeline.data.sources import RawSample, Source, open_source
from pipeline.data.spec import ImageSpec
from pipeline.errors import DataError, TeacherError
from pipeline.models.spec import PreprocessingSpec, TeacherSpec

# Enough for a centre and an accuracy, whatever the source holds.
PER_CLASS = 64
IN_ALL = 2048


def read_examples(spec: TeacherSpec, classes: Sequence[str]) -> tuple[Tensor, Tensor] | None:
    """Read a teacher's labelled examples: the first 64 of each class, fewer where that is more than 2,048.

    They are brought to the size that the teacher's `preprocessing` wants, in three channels; where it names no size
    they must all have the same, and where there is no preprocessing they stay as they are.

    Parameters
    ----------
    spec : TeacherSpec
        With absolute paths.
    classes : sequence of str
        The teacher's, in the order of its logits.

    Returns
    -------
    (images, labels) or None
        (N, C, H, W) uint8 tensor, and (N,) int64 tensor of indices into `classes`; None where the teacher has no
        `examples`.

    Raises
    ------
    TeacherError
        When they can't be read, hold no labelled image, or have a class that the teacher lacks.
    """
    if spec.examples is None:
        return None
    try:
        source = open_source(spec.examples)
        for name in source.classes:
            if name not in classes:
                near = difflib.get_close_matches(name, classes, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "correct it, or name the others in `only`"
                raise DataError(f"class {name!r} of {source.where} is not among the teacher's classes; {hint}")
        samples = _some(source)
        if not samples:
            raise DataError(f"{source.where}: holds no labelled image; give it some, or leave `examples` out")
        stored = _stored_as(spec.preprocessing, samples)
        images = np.stack([_pixels(sample, stored) for sample, _ in samples])
    except DataError as error:
        raise TeacherError(f"teacher {spec.name!r}: `examples`: {error}") from None
    return torch.from_numpy(images), torch.tensor([classes.index(source.classes[label]) for _, label in samples])


def _some(source: Source) -> list[tuple[RawSample, int]]:
    """Return the first samples of each class, and their labels; stop reading when all classes have enough."""
    wanted = max(1, min(PER_CLASS, IN_ALL // len(source.classes)))
    left = dict.fromkeys(range(len(source.classes)), wanted)
    samples = []
    for sample in source:
        if sample.label is not None and sample.label in left:
            samples.append((sample, sample.label))
            left[sample.label] -= 1
            if not left[sample.label]:
                del left[sample.label]
                if not left:
                    break
    return samples


def _stored_as(wanted: PreprocessingSpec | None, samples: list[tuple[RawSample, int]]) -> ImageSpec:
    if wanted is not None and wanted.size is not None:
        return ImageSpec(size=wanted.size, channels=3)
    shapes = {_shape(sample) for sample, _ in samples}
    sizes = {(height, width) for height, width, _ in shapes}
    if len(sizes) > 1:
        raise DataError(
            f"{samples[0][0].origin} and others have {len(sizes)} different sizes, and `preprocessing` wants none; "
            "bring them to one size, or set `preprocessing.size`"
        )
    grey = wanted is None and all(channels == 1 for _, _, channels in shapes)
    return ImageSpec(size=sizes.pop(), channels=1 if grey else 3)


def _shape(sample: RawSample) -> tuple[int, int, int]:
    """Return height, width and channels of an image as its source has it; of an encoded one the header is read."""
    image = sample.image
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1], 1 if image.ndim == 2 else image.shape[2]
    try:
        found = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        assert found is not None
        return found.height, found.width, 1 if found.mode in ("1", "L") else 3
    except Exception as error:  # Pillow raises anything on damaged bytes: SyntaxError, struct.error, KeyError, …
        raise _unreadable(sample, str(error)) from None


def _pixels(sample: RawSample, stored: ImageSpec) -> np.ndarray:
    if sample.image is None:
        raise _unreadable(sample, sample.problem)
    try:
        payload = canonical(sample.image, stored, sample.origin).payload
    except UnreadableImageError as error:
        raise _unreadable(sample, str(error)) from None
    return np.frombuffer(payload, np.uint8).reshape(stored.shape)


def _unreadable(sample: RawSample, why: str) -> DataError:
    return DataError(f"{sample.origin}: {why}; replace the image, or take it out")
