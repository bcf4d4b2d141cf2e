"""Looking at a teacher before anything depends on it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import TeacherError
from pipeline.models.sources import load_teacher
from pipeline.models.spec import TeacherSpec
from pipeline.models.teacher import Teacher


@dataclass(frozen=True)
class TeacherCheck:
    """What was found.

    Attributes
    ----------
    name : str
    ok : bool
    error : str or None
        One line: what is wrong and the remedy.
    classes, parameters : int or None
        How many; None where it could not be loaded.
    feature_dim : int or None
    seconds : float
        To load it and look at the probe.
    megabytes : float or None
        Its parameters and buffers, in 10⁶ bytes.
    """

    name: str
    ok: bool
    error: str | None
    classes: int | None
    parameters: int | None
    feature_dim: int | None
    seconds: float
    megabytes: float | None


def check_teacher(
    spec: TeacherSpec, image_shape: tuple[int, int, int] = (1, 28, 28), **load_kwargs: Any
) -> TeacherCheck:
    """Load a teacher, show it noise and constant images, and see whether it does what the zoo says of it.

    Its logits must be as wide as its classes; logits and features finite, the same a second time, and the same for an
    image alone as among others; and looking must not change it (a batch norm in training mode fails the last three).

    Parameters
    ----------
    spec : TeacherSpec
    image_shape : (C, H, W)
        Of the stored images it will get.
    **load_kwargs
        For `load_teacher`.

    Returns
    -------
    TeacherCheck
        Also for a teacher that raises: this function does not.
    """
    started = time.perf_counter()
    teacher: Teacher | None = None
    error = None
    try:
        teacher = load_teacher(spec, **load_kwargs)
        _probe(teacher, image_shape)
    except TeacherError as problem:
        error = str(problem)
    except Exception as problem:
        # A teacher's code is anyone's code; one that breaks must not take the others along.
        text = " ".join(str(problem).split())[:240]
        error = f"teacher {spec.name!r}: {type(problem).__name__} on a probe of {image_shape} images ({text})"
    tensors = [] if teacher is None else [*teacher.net.parameters(), *teacher.net.buffers()]
    return TeacherCheck(
        name=spec.name,
        ok=error is None,
        error=error,
        classes=None if teacher is None else len(teacher.classes),
        parameters=None if teacher is None else teacher.num_parameters,
        feature_dim=None if teacher is None else teacher.feature_dim,
        seconds=time.perf_counter() - started,
        megabytes=None if teacher is None else sum(t.numel() * t.element_size() for t in tensors) / 1e6,
    )


def _probe(teacher: Teacher, shape: tuple[int, int, int]) -> None:
    noise = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.cat([noise, torch.zeros_like(noise[:1]), torch.full_like(noise[:1], 255)])
    images = images.to(teacher.device)
    before = {name: value.clone() for name, value in teacher.net.named_buffers()}

    def fail(what: str) -> TeacherError:
        return TeacherError(f"teacher {teacher.name!r}: {what}")

    with torch.inference_mode():
        first, second, alone = teacher(images), teacher(images), teacher(images[:1])
    for field in ("logits", "features"):
        values: Tensor = getattr(first, field)
        if not torch.isfinite(values).all():
            raise fail(f"NaN or infinite {field} on a probe; check its weights and `preprocessing`")
        if not _close(values, getattr(second, field)):
            raise fail(f"its {field} differ from one look to the next; it must not be random (dropout left on?)")
        if not _close(values[:1], getattr(alone, field)):
            raise fail(f"its {field} for an image depend on the other images of the batch; save it in evaluation mode")
    for name, value in teacher.net.named_buffers():
        if not torch.equal(before[name], value):
            raise fail(f"looking at images changes its buffer {name!r}; save it in evaluation mode")


def _close(a: Tensor, b: Tensor) -> bool:
    """Tell whether two results are equal up to the order of summation, which depends on the size of a batch."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * max(float(a.abs().max()), 1e-6))
