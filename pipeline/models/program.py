"""A teacher as a program: written without pickle and without its code, and read back as a net with its features."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import TeacherError
from pipeline.models.archive import load_program
from pipeline.models.description import TAP
from pipeline.models.factories import Refused, one_line
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.teacher import Teacher

_BATCHES = (1, 2, 5)
_FREE, _OTHER = (48, 64), (80, 96)  # sides of the examples where the program is to take images of any size


@dataclass(frozen=True)
class Exported:
    """What a program takes and gives.

    Attributes
    ----------
    image : (C, H, W)
        Of an input; -1 where it is free.
    dtype : torch.dtype
        Of the input.
    outputs : tuple of str
        ``logits``, ``features``, ``taps.<name>``.
    widths : tuple of tuple of int
        Shapes of the outputs without the batch; -1 where free.
    classifier : str or None
        Path of the last linear layer's parameters in the program.
    """

    image: tuple[int, int, int]
    dtype: torch.dtype
    outputs: tuple[str, ...]
    widths: tuple[tuple[int, ...], ...]
    classifier: str | None


class Program(nn.Module):
    """A traced graph as the net of a teacher: its features and taps are found as those of any other net are.

    Its mode is fixed. Where the graph takes whole numbers, what a resize made of them is rounded.

    Parameters
    ----------
    graph : nn.Module
        As `load_program` gives it, or a module around it.
    outputs : sequence of str
        Names of the graph's outputs; (): it gives logits, or logits and features.
    classifier : str, optional
        Path of the last linear layer's parameters in the graph; the layer is then found as ``classifier``.

    Raises
    ------
    Refused
        When the graph has no such parameters.
    """

    def __init__(self, graph: nn.Module, outputs: Sequence[str] = (), classifier: str | None = None) -> None:
        super().__init__()
        self.graph = graph
        self.outputs = tuple(outputs)
        found = input_of(graph)
        self._whole = found is not None and found[1] == torch.uint8
        self.features_path: str | None = None
        for parameter in graph.parameters():
            if parameter.ndim == 4:  # which convolutions then run channels last, as they do in a net with modules
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        if "features" in self.outputs:
            self.features_path = "features" if classifier is None else "classifier"
            self.add_module(self.features_path, nn.Identity() if classifier is None else _linear(graph, classifier))
        self.taps = nn.ModuleList(nn.Identity() for name in self.outputs if name.startswith(TAP))

    def forward(self, images: Tensor) -> Any:
        """Map preprocessed images to logits, or to what the graph gives where its outputs have no names."""
        if self._whole and images.is_floating_point():
            images = images.round().clamp(0, 255).to(torch.uint8)
        said = self.graph(images)
        if self.features_path is None:
            return said
        logits, features, *taps = said
        self.get_submodule(self.features_path)(features)  # for the hooks on it
        for tap, value in zip(self.taps, taps, strict=True):
            tap(value)
        return logits

    def train(self, mode: bool = True) -> Program:
        """Do nothing: a graph has the mode that it was traced in."""
        return self


def input_of(net: nn.Module) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Return shape (-1 where free) and type of what a traced graph takes; None for a net that is none."""
    for module in net.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                value = node.meta.get("val") if node.op == "placeholder" else None
                if isinstance(value, Tensor):
                    return tuple(size if isinstance(size, int) else -1 for size in value.shape), value.dtype
    return None


def export_teacher(teacher: Teacher, path: str | Path) -> Exported:
    """Write a teacher's net as a program (``.pt2``) of preprocessed images -> (logits, features, taps), for any batch.

    It is read back, and compared with the teacher for batches of 1, 2 and 5 images.

    Parameters
    ----------
    teacher : Teacher
        On the CPU; it is left as it is.
    path : path

    Raises
    ------
    TeacherError
        When it can't be traced, takes images of an unknown shape, or the program says something else.
    """

    def fail(what: str) -> TeacherError:
        return TeacherError(f"teacher {teacher.name!r}: {what}")

    try:
        image, dtype = _input(teacher)
    except Refused as error:
        raise fail(str(error)) from None
    sides = [side if side > 0 else free for side, free in zip(image[1:], _FREE, strict=True)]
    example = _example(max(_BATCHES), (image[0], *sides), dtype)
    free = {axis: torch.export.Dim.AUTO for axis in (2, 3) if image[axis - 1] < 0}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what tracing remarks about torch's own code is nothing a user can act on
            answers = _Answers(teacher)
            shapes = ({0: torch.export.Dim.DYNAMIC, **free},)
            program = torch.export.export(answers, (example,), dynamic_shapes=shapes)
            torch.export.save(program, path)
    except Exception as error:
        raise fail(
            f"can't be exported ({one_line(error)}); its forward must be plain operators, and not branch on a batch's "
            "content or size"
        ) from None
    try:
        graph = load_program(path)
    except ValueError as error:
        raise fail(f"can't be exported: its program {error}") from None
    said = _compare(answers, graph, example, fail)
    if free:
        other = [side if side > 0 else free_ for side, free_ in zip(image[1:], _OTHER, strict=True)]
        try:
            _compare(answers, graph, _example(max(_BATCHES), (image[0], *other), dtype), fail)
        except TeacherError:
            raise
        except Exception:  # whatever a net says of a shape that it does not take
            raise fail("can't be exported: its net takes images of one size; name it in `preprocessing.size`") from None
    return Exported(
        image=image,
        dtype=dtype,
        outputs=("logits", "features", *(f"{TAP}{name}" for name in teacher.taps)),
        widths=tuple(
            tuple(-1 if free and axis > 1 else size for axis, size in enumerate(one.shape) if axis) for one in said
        ),
        classifier=_classifier(answers.teacher, graph),
    )


class _Answers(nn.Module):
    """Logits, features and taps of a teacher for images that are preprocessed already."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(teacher)
        self.teacher.preprocessing = nn.Identity()
        for parameter in self.teacher.parameters():
            parameter.data = parameter.data.contiguous()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        said = self.teacher(images)
        return said.logits, said.features, *said.taps.values()


def _input(teacher: Teacher) -> tuple[tuple[int, int, int], torch.dtype]:
    """Return shape and type of what the net takes."""
    traced = input_of(teacher.net)
    if isinstance(teacher.preprocessing, Preprocessing):
        spec = teacher.preprocessing.spec
        if spec.size is not None:
            return (spec.channels, *spec.side((spec.channels, 0, 0))), teacher.preprocessing.dtype
        sides = (-1, -1) if traced is None or len(traced[0]) != 4 else (traced[0][2], traced[0][3])
        return (spec.channels, *sides), teacher.preprocessing.dtype
    if traced is None or len(traced[0]) != 4 or traced[0][1] < 1:
        raise Refused("can't be exported: its `preprocessing` is null, which does not tell what images it takes")
    return (traced[0][1], traced[0][2], traced[0][3]), traced[1]


def _example(count: int, image: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (count, *image), dtype=torch.uint8, generator=generator)
    return torch.randn(count, *image, generator=generator).to(dtype)


def _compare(answers: _Answers, graph: nn.Module, example: Tensor, fail: Any) -> tuple[Tensor, ...]:
    expected: tuple[Tensor, ...] = ()
    with torch.inference_mode():
        for count in _BATCHES:
            expected, got = answers(example[:count]), graph(example[:count])
            for name, wanted, given in zip(("logits", "features", *answers.teacher.taps), expected, got, strict=True):
                if wanted.shape != given.shape or not torch.allclose(wanted, given, rtol=1e-4, atol=1e-5):
                    raise fail(
                        f"can't be exported: its program gives other {name} for a batch of {count}; its forward must "
                        "not branch on a batch's content or size"
                    )
    return expected


def _width(output: Tensor, free: bool) -> tuple[int, ...]:
    """Return an output's shape without the batch; -1 for the sides of a map whose image may have any."""
    return tuple(-1 if free and axis > 0 else size for axis, size in enumerate(output.shape[1:]))


def _classifier(teacher: Teacher, graph: nn.Module) -> str | None:
    """Return where the program keeps the layer that the features go straight into."""
    weight = teacher.classifier_weight
    if weight is None or weight.dtype != torch.float32:  # the program's features are float32
        return None
    own = [name for name, value in teacher.named_parameters() if value.data_ptr() == weight.data_ptr()]
    path = f"teacher.{own[0].rpartition('.')[0]}" if own else ""
    return path if path and f"{path}.weight" in dict(graph.named_parameters()) else None


def _linear(graph: nn.Module, path: str) -> nn.Linear:
    found = {name.removeprefix("graph."): value for name, value in graph.named_parameters()}
    weight, bias = found.get(f"{path}.weight"), found.get(f"{path}.bias")
    if weight is None or weight.ndim != 2:
        raise Refused(f"its metadata name a classifier {path[:60]!r} that its program does not have; push it again")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.data, requires_grad=False) if not isinstance(weight, nn.Parameter) else weight
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.data, requires_grad=False)
    return layer
