"""Teachers that look at the very views the student sees, beside the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.distillation.step import Seen
from pipeline.engine.objective_spec import LayersSpec
from pipeline.errors import ConfigError
from pipeline.models.precision import choose_autocast
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.stages import shapes_of, stages_of
from pipeline.models.student import Student
from pipeline.models.teacher import Teacher

Shapes = Mapping[str, tuple[int, ...]]


class Live:
    """Teachers run under no-grad, outside of the module that is trained: nothing of them is wrapped or saved.

    Each computes in a precision of its own, whatever the student's is, see `pipeline.models.precision`. No inference
    mode: adapters learn from what teachers show, and such tensors may not be kept for a gradient.

    Parameters
    ----------
    teachers : sequence of Teacher
        Already on the device that they are to work on.
    compiled : bool
        Compile them at the first batch, see `Teacher.compile_net`.
    """

    def __init__(self, teachers: Sequence[Teacher], *, compiled: bool = False) -> None:
        self.teachers, self.compiled = tuple(teachers), compiled
        self._types: list[torch.dtype | None] | None = None

    def tap(self, number: int, shapes: Shapes) -> None:
        """Have a teacher show these of its layers, besides those that it shows already."""
        teacher = self.teachers[number]
        teacher.taps |= {name: teacher.taps.get(name, name) for name in shapes}

    def fold(self) -> Live:
        """Make the teachers faster, see `Teacher.fold`, once it is known which of their layers are looked into."""
        for teacher in self.teachers:
            teacher.fold()
        return self

    def __call__(self, images: Tensor) -> tuple[Seen, ...]:
        """Return what every teacher shows of the images (n, C, H, W), as stored."""
        if self._types is None:
            self._types = [choose_autocast(teacher, images) for teacher in self.teachers]
            for teacher in self.teachers if self.compiled else ():
                teacher.compile_net()
        shown = []
        for teacher, dtype in zip(self.teachers, self._types, strict=True):
            with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
                output = teacher(images)
            shown.append(Seen(output.logits, output.features, output.taps))
        return tuple(shown)


def student_layers(student: Student, layers: LayersSpec) -> dict[str, tuple[int, ...]]:
    """Return the student's layers that take part, from low to high, and their shapes without the batch.

    Raises
    ------
    ConfigError
        When a path does not exist.
    """
    images = _example(student)
    try:
        if layers.student is not None:
            return shapes_of(student.net, images, layers.student)
        return stages_of(student.net, images, before_activation=layers.before_activation)
    except ValueError as error:
        raise ConfigError(f"layers.student: student {student.spec.name!r}: {error}") from None


def teacher_layers(teacher: Teacher, layers: LayersSpec, example: Tensor) -> dict[str, tuple[int, ...]]:
    """Return a teacher's layers that take part, from low to high, and their shapes without the batch.

    Those that the settings name for it; else its taps in the zoo; else the stages of its net.

    Parameters
    ----------
    teacher : Teacher
    layers : LayersSpec
    example : (n, C, H, W) tensor
        Images as stored.

    Raises
    ------
    ConfigError
        When a path does not exist.
    """
    named = layers.teachers.get(teacher.name)
    names = tuple(teacher.taps) if named is None else named
    with torch.no_grad():
        images = teacher.preprocessing(example.to(teacher.device))
    try:
        if not names:
            return stages_of(teacher.net, images, before_activation=layers.before_activation)
        paths = {name: teacher.taps.get(name, name) for name in names}
        shapes = shapes_of(teacher.net, images, tuple(paths.values()))
        return {name: shapes[path] for name, path in paths.items()}
    except ValueError as error:
        raise ConfigError(f"layers.teachers.{teacher.name}: {error}") from None


def _example(student: Student) -> Tensor:
    images = torch.zeros(2, *student.image_shape, dtype=torch.uint8, device=next(student.parameters()).device)
    preprocessing: Preprocessing = student.preprocessing
    with torch.no_grad():
        return preprocessing(images)
