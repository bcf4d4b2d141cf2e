"""The teachers of a zoo on paper: their nets built without weights, their files read no further than the header."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import FacultyError
from pipeline.models.class_names import class_names
from pipeline.models.factories import Refused, called, import_factory, one_line, with_defaults
from pipeline.models.files import missing
from pipeline.models.spec import SafetensorsModel, StateDictModel, TeacherSpec, TimmModel, TorchvisionModel
from pipeline.models.weights import fill
from pipeline.places import is_remote
from pipeline.planning.nets import NetSize, measure_net, weights_of

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TeacherSize:
    """One teacher on paper.

    Attributes
    ----------
    name : str
    kind : str
        Its architecture in a word.
    key : str
        The same for teachers that compute the same: architecture, arguments, input.
    classes : int or None
    shape : (int, int, int)
        Channels, height and width of what its net gets.
    net : NetSize or None
        None where nothing could be found out.
    problem : str
        Why it will fail, or what could not be found out; "" for neither.
    """

    name: str
    kind: str
    key: str
    classes: int | None
    shape: tuple[int, int, int]
    net: NetSize | None
    problem: str = ""


def size_teachers(
    specs: Iterable[TeacherSpec],
    image_shape: tuple[int, int, int],
    *,
    trusted: tuple[str, ...],
    load: Callable[[TeacherSpec], Any] | None = None,
    advance: Callable[[int, str], None] = lambda done, name: None,
) -> list[TeacherSize]:
    """Find out what teachers take; nets of one architecture are looked at once.

    Parameters
    ----------
    specs : iterable of TeacherSpec
    image_shape : (C, H, W)
        Of the task's stored images.
    trusted : tuple of str
        Prefixes of the modules that a factory may come from.
    load : callable, optional
        Loads a teacher whose net can't be built without its weights (an exported program, a registered model).
    advance : callable
        Told of every teacher.
    """
    known: dict[str, _Looked] = {}
    found = []
    for spec in specs:
        shape = _input(spec, image_shape)
        key = _key(spec, shape)
        if key not in known:
            known[key] = _look(spec, shape, trusted, load)
        looked = known[key]
        classes = _count(spec) or (None if looked.size is None else looked.size.outputs)
        problem = _file_problem(spec, looked.skeleton) or looked.problem
        found.append(TeacherSize(spec.name, kind_of(spec), key, classes, shape, looked.size, problem))
        advance(1, spec.name)
    return found


def skeleton(spec: TeacherSpec, trusted: tuple[str, ...]) -> nn.Module:
    """Build a teacher's net on the meta device: shapes without values.

    One whose constructor looks at values is built with them, and moved there.

    Raises
    ------
    Refused
        When its source gives no net without weights, or it can't be built.
    """
    try:
        with torch.device("meta"):
            return _built(spec, trusted)
    except Refused:
        return _built(spec, trusted).to("meta")


def _built(spec: TeacherSpec, trusted: tuple[str, ...]) -> nn.Module:
    source, count = spec.source, _count(spec)
    # Published weights bring their own number of classes.
    own = getattr(source, "path", None) is not None and count is not None
    kwargs = getattr(source, "kwargs", {})
    arguments = {"num_classes": count} | kwargs if own else kwargs
    match source:
        case SafetensorsModel() | StateDictModel():
            factory = import_factory(source.factory, trusted)
            channels = None if spec.preprocessing is None else spec.preprocessing.channels
            arguments = with_defaults(factory, source.kwargs, num_classes=count, in_channels=channels)
            net = called(lambda: factory(**arguments), f"`source`: factory {source.factory}")
        case TorchvisionModel():
            from torchvision import models

            build = models.get_model
            net = called(lambda: build(source.model, weights=None, **arguments), f"`source`: {source.model}")
        case TimmModel():
            try:
                timm: Any = importlib.import_module("timm")
            except ImportError:
                raise Refused("`source.type: timm` needs an optional package; pip install 'faculty[timm]'") from None
            create = timm.create_model
            net = called(lambda: create(source.model, pretrained=False, **arguments), f"`source`: {source.model}")
        case _:
            raise Refused(f"a source of type {source.type!r} gives no net without its weights")
    if not isinstance(net, nn.Module):
        raise Refused(f"`source` gives a {type(net).__name__}, not an nn.Module")
    return net


def header_of(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file on the meta device: names, shapes and types; values are not read.

    Raises
    ------
    ValueError
        When it is no file of weights.
    OSError
        When it can't be read.
    """
    if Path(path).suffix == ".safetensors":
        with Path(path).open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            if not 2 <= size <= 100_000_000:  # the format's own limit
                raise ValueError("is truncated or no safetensors file")
            header = json.loads(handle.read(size))
        return {
            name: torch.empty(one["shape"], dtype=_TYPES[one["dtype"]], device="meta")
            for name, one in header.items()
            if name != "__metadata__"
        }
    try:
        content: Any = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"can't be read without its values ({one_line(error)})") from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("holds more than tensors by name")
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def kind_of(spec: TeacherSpec) -> str:
    """Return a teacher's architecture in a word."""
    source = spec.source
    match source:
        case SafetensorsModel() | StateDictModel():
            return source.factory.rpartition(":")[2]
        case TorchvisionModel() | TimmModel():
            return source.model
        case _:
            return source.type


@dataclass(frozen=True)
class _Looked:
    """What was found out of an architecture: its net on the meta device, its size, and what stood in the way."""

    skeleton: nn.Module | None
    size: NetSize | None
    problem: str = ""


def _look(
    spec: TeacherSpec, shape: tuple[int, int, int], trusted: tuple[str, ...], load: Callable[[TeacherSpec], Any] | None
) -> _Looked:
    net: nn.Module | None = None
    try:
        net = skeleton(spec, trusted)
        return _Looked(net, measure_net(net, shape))
    except Refused as error:
        problem = str(error)
    except Exception as error:  # a net that looks at values can't be run without them
        problem = f"its net can't be run on paper ({one_line(error)})"
    if load is not None:
        try:
            return _Looked(net, measure_net(load(spec).net, shape))
        except FacultyError as error:
            problem = str(error)
        except Exception as error:
            problem = f"its net can't be run ({one_line(error)})"
    return _Looked(net, _from_header(spec) if net is None else NetSize(**weights_of(net)), problem)


def _from_header(spec: TeacherSpec) -> NetSize | None:
    """Return the size of a weight file's tensors: buffers can't be told from parameters there."""
    if spec.path is None:
        return None
    try:
        tensors = header_of(spec.path).values()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    size = sum(one.numel() * one.element_size() for one in tensors)
    return NetSize(sum(one.numel() for one in tensors), size, size)


def _file_problem(spec: TeacherSpec, net: nn.Module | None) -> str:
    """Say why a teacher's weights are no use for its net; "" where nothing is known against them."""
    if spec.path is None or (is_remote(spec.path) and spec.sha256):
        return ""  # a URI is fetched by whom it is loaded
    problem = missing(spec.path)
    if problem:
        return f"`source.path` {spec.path} {problem}"
    if net is None or not isinstance(spec.source, SafetensorsModel):
        return ""  # other files must be read to tell
    try:
        fill(net, header_of(spec.path))
    except (ValueError, KeyError, TypeError) as error:
        return f"`source.path` {spec.path} {one_line(error)}"
    except OSError as error:
        return f"`source.path` {spec.path} can't be read ({error.strerror or error})"
    return ""


def _input(spec: TeacherSpec, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if spec.preprocessing is None:
        return image_shape
    return (spec.preprocessing.channels, *spec.preprocessing.side(image_shape))


def _key(spec: TeacherSpec, shape: tuple[int, int, int]) -> str:
    source = spec.source.model_dump(mode="json", exclude={"path", "weights"})
    if spec.source.type in ("exported", "mlflow"):
        source["of"] = spec.path or spec.name  # their files alone know what they are
    return json.dumps([source, _count(spec), shape], sort_keys=True)


def _count(spec: TeacherSpec) -> int | None:
    """Return the number of a teacher's classes; None where its source alone knows them."""
    if spec.classes is None:
        return None
    return len(class_names(spec.classes) if isinstance(spec.classes, str) else spec.classes)
