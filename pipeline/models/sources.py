"""Where a teacher's net comes from: from a spec to a `Teacher`, or to one line that says why not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import DataError, TeacherError
from pipeline.models.archive import load_program, output_widths
from pipeline.models.capture import find_penultimate, module_at
from pipeline.models.class_names import class_names
from pipeline.models.description import Description, completed
from pipeline.models.factories import (
    Refused,
    called,
    import_factory,
    nearest,
    one_line,
    with_defaults,
)
from pipeline.models.files import file_sha256, missing
from pipeline.models.program import Program, input_of
from pipeline.models.spec import (
    TRUSTED_FACTORIES,
    ExportedModel,
    MlflowModel,
    SafetensorsModel,
    StateDictModel,
    TeacherSpec,
    TimmModel,
    TorchvisionModel,
)
from pipeline.models.teacher import Teacher
from pipeline.models.weights import fill, read_state_dict
from pipeline.places import is_remote


@dataclass(frozen=True)
class Fetched:
    """What a registry gives.

    Attributes
    ----------
    net : nn.Module
    description : Description or None
        What the model says of itself.
    sha256 : str or None
        Of the program's file.
    """

    net: nn.Module
    description: Description | None = None
    sha256: str | None = None


Resolver = Callable[[str], "nn.Module | str | Path | Fetched"]


@dataclass(frozen=True)
class _Found:
    """A net; the widths of its outputs where it is a program; the classes where the source knows them."""

    net: nn.Module
    widths: list[int | None] = field(default_factory=list)
    classes: tuple[str, ...] | None = None


def load_teacher(
    spec: TeacherSpec,
    *,
    device: str | torch.device = "cpu",
    trusted_factories: tuple[str, ...] = TRUSTED_FACTORIES,
    resolvers: Mapping[str, Resolver] | None = None,
) -> Teacher:
    """Build a teacher from its spec.

    No file is unpickled: weights are tensors alone, and code comes from installed modules that `trusted_factories`
    admits.

    Parameters
    ----------
    spec : TeacherSpec
        With absolute paths, as `load_zoo` gives it. A weight file may be a URI, and its `sha256` is given then: it is
        fetched to the cache of the machine that asks.
    device : str or torch.device
    trusted_factories : tuple of str
        Prefixes of the modules that `factory` may come from.
    resolvers : mapping, optional
        For sources that this package can't reach by itself: ``{"mlflow": fetch}``, where ``fetch(uri)`` returns the
        net, the path of an exported program, or a net and what is known of it.

    Raises
    ------
    TeacherError
        One line: teacher, field or file, what is wrong and the remedy.
    """
    try:
        spec = _here(spec)
        _check_file(spec)
        if isinstance(spec.source, MlflowModel):
            spec, found = _registered(spec, spec.source, device, resolvers or {})
        else:
            found = _net(spec, device, trusted_factories)
        net = found.net
        _check_input(spec, net)
        classes = _classes(spec, found)
        features = spec.features
        if features is None and isinstance(net, Program):
            features = net.features_path
        opaque = _graph(net) is not None and find_penultimate(net) is None and features is None
        teacher = Teacher(
            net,
            name=spec.name,
            classes=classes,
            preprocessing=spec.preprocessing,
            features=features,
            taps=spec.taps,
            has_modules=not opaque,
        )
        return teacher.to(device)
    except Refused as error:
        raise TeacherError(f"teacher {spec.name!r}: {error}") from None


def _here(spec: TeacherSpec) -> TeacherSpec:
    """Return the spec with the local copy of a weight file that is given by a URI."""
    if spec.path is None or not is_remote(spec.path) or spec.sha256 is None:
        return spec
    from pipeline.data.storage import local_copy

    try:
        path = str(local_copy(spec.path))
    except DataError as error:
        raise Refused(f"`source.path` {error}") from None
    return spec.model_copy(update={"source": spec.source.model_copy(update={"path": path})})


def _check_file(spec: TeacherSpec) -> None:
    if spec.path is None:
        return
    problem = missing(spec.path)
    if problem:
        raise Refused(f"`source.path` {spec.path} {problem}")
    if spec.sha256 is not None and file_sha256(spec.path) != spec.sha256:
        raise Refused(
            f"`sha256` does not fit {spec.path}, which has {file_sha256(spec.path)}; get the file again, or correct "
            "`sha256` if you trust what is there"
        )


def _check_input(spec: TeacherSpec, net: nn.Module) -> None:
    """Compare what a program takes with what its preprocessing makes of an image, where both are fixed."""
    traced, wanted = input_of(net), spec.preprocessing
    if traced is None or wanted is None or len(traced[0]) != 4:
        return
    _, channels, *sides = traced[0]
    if channels not in (-1, wanted.channels):
        raise Refused(f"its program takes images of {channels} channels; set `preprocessing.channels` to {channels}")
    if wanted.size is None:
        return
    given = wanted.side((wanted.channels, 0, 0))
    if any(side not in (-1, other) for side, other in zip(sides, given, strict=True)):
        size = sides[0] if sides[0] == sides[1] else f"[{sides[0]}, {sides[1]}]"
        raise Refused(f"its program takes images of {sides[0]} x {sides[1]} pixels; set `preprocessing.size` to {size}")


def _net(spec: TeacherSpec, device: str | torch.device, trusted: tuple[str, ...]) -> _Found:
    source = spec.source
    match source:
        case TorchvisionModel():
            return _torchvision(spec, source)
        case TimmModel():
            return _Found(_timm(spec, source))
        case SafetensorsModel() | StateDictModel():
            suffix = Path(source.path).suffix
            if (source.type == "safetensors") != (suffix == ".safetensors"):
                other = "state_dict" if source.type == "safetensors" else "safetensors"
                raise Refused(f"`source.path` {source.path} has the suffix {suffix!r}; use `type: {other}`")
            factory = import_factory(source.factory, trusted)
            net = _built(factory, spec, source.kwargs, source.factory)
            return _Found(_filled(net, source.path, _count(spec)))
        case ExportedModel():
            net = _program(source.path, "source.path", device)
            return _Found(net, output_widths(net))
    raise AssertionError(source)


def _registered(
    spec: TeacherSpec, source: MlflowModel, device: str | torch.device, resolvers: Mapping[str, Resolver]
) -> tuple[TeacherSpec, _Found]:
    """Return a registered teacher's net, and its spec with what the model says where it leaves something out."""
    if "mlflow" not in resolvers:
        raise Refused("`source.type: mlflow` needs a tracking server; set `tracking.uri` and run through `faculty`")
    try:
        given = resolvers["mlflow"](source.uri)
    except TeacherError as error:
        raise Refused(f"`source.uri`: {error}") from None
    except Exception as error:  # whatever a server or a network may do
        raise Refused(f"`source.uri` {source.uri} can't be fetched ({one_line(error)})") from None
    if not isinstance(given, Fetched):
        given = Fetched(given if isinstance(given, nn.Module) else _program(given, "source.uri", device))
    if spec.sha256 is not None and spec.sha256 != given.sha256:
        raise Refused(
            f"`sha256` does not fit the program of {source.uri}, which has {given.sha256 or 'none'}; correct `sha256` "
            "if you trust what is there"
        )
    net, about = given.net, given.description
    graph = _graph(net)
    if graph is not None:
        pushed = None if about is None else about.teacher
        net = Program(net) if pushed is None else Program(net, pushed.outputs, pushed.classifier)
    if about is not None:
        spec = completed(spec, about)
    elif source.described:
        raise Refused("`preprocessing` is left to the model, of which nothing is known; give it")
    return spec, _Found(net, [] if graph is None else output_widths(graph))


def _graph(net: nn.Module) -> nn.Module | None:
    """Return the traced graph that a net is, or wraps."""
    return next((module for module in net.modules() if isinstance(module, torch.fx.GraphModule)), None)


def _program(path: str | Path, field: str, device: str | torch.device) -> nn.Module:
    try:
        return load_program(path, device)
    except (ValueError, OSError) as error:
        raise Refused(f"`{field}` {path} {error}") from None


def _filled(net: nn.Module, path: str, count: int | None = None) -> nn.Module:
    try:
        fill(net, read_state_dict(path))
    except OSError as error:
        raise Refused(f"`source.path` {path} can't be read ({error.strerror or error})") from None
    except ValueError as error:
        hint = f"; `classes` names {count}" if count is not None and "another shape" in str(error) else ""
        raise Refused(f"`source.path` {path} {error}{hint}") from None
    return net


def _torchvision(spec: TeacherSpec, source: TorchvisionModel) -> _Found:
    from torchvision import models

    names = models.list_models()
    if source.model not in names:
        raise Refused(f"`source.model` {source.model!r} is not in torchvision.models; {nearest(source.model, names)}")
    if source.path is not None:
        count = _count(spec)
        kwargs = source.kwargs if count is None else {"num_classes": count, **source.kwargs}
        net = called(lambda: models.get_model(source.model, weights=None, **kwargs), f"`source`: {source.model}")
        return _Found(_filled(net, source.path))
    published = models.get_model_weights(source.model)
    if source.weights not in published.__members__:
        hint = nearest(str(source.weights), published.__members__)
        raise Refused(f"`source.weights` {source.weights!r} does not exist for {source.model}; {hint}")
    weights = published[str(source.weights)]
    net = called(lambda: models.get_model(source.model, weights=weights, **source.kwargs), f"`source`: {source.model}")
    return _Found(net, classes=tuple(weights.meta.get("categories", ())) or None)


def _timm(spec: TeacherSpec, source: TimmModel) -> nn.Module:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError:
        raise Refused("`source.type: timm` needs an optional package; pip install 'faculty[timm]'") from None
    names = timm.list_models()
    if source.model.split(".")[0] not in names:
        raise Refused(f"`source.model` {source.model!r} is not in timm; {nearest(source.model, names)}")
    count = _count(spec)
    kwargs = source.kwargs if count is None or source.pretrained else {"num_classes": count, **source.kwargs}
    net = called(
        lambda: timm.create_model(source.model, pretrained=source.pretrained, **kwargs), f"`source`: {source.model}"
    )
    return net if source.path is None else _filled(net, source.path)


def _built(factory: Callable[..., Any], spec: TeacherSpec, kwargs: Mapping[str, Any], reference: str) -> nn.Module:
    channels = None if spec.preprocessing is None else spec.preprocessing.channels
    arguments = with_defaults(factory, kwargs, num_classes=_count(spec), in_channels=channels)
    net = called(lambda: factory(**arguments), f"`source`: factory {reference}")
    if not isinstance(net, nn.Module):
        raise Refused(f"`source.factory` {reference} returns a {type(net).__name__}, not an nn.Module")
    return net


def _count(spec: TeacherSpec) -> int | None:
    """Return the number of classes that the spec states."""
    if spec.classes is None:
        return None
    return len(class_names(spec.classes) if isinstance(spec.classes, str) else spec.classes)


def _classes(spec: TeacherSpec, found: _Found) -> tuple[str, ...]:
    net, widths = found.net, found.widths
    if isinstance(spec.classes, str):
        classes = class_names(spec.classes)
    else:
        classes = spec.classes or found.classes or ()
    path = find_penultimate(net)
    last = module_at(net, path) if path is not None else None
    width = widths[0] if widths else last.out_features if isinstance(last, nn.Linear) else None
    if classes:
        if widths and width is not None and width != len(classes):
            raise Refused(f"its net has {width} outputs for {len(classes)} `classes`; correct `classes`")
        return classes
    if width is None:
        raise Refused("the number of its classes can't be told from its net; list them in `classes`")
    return tuple(f"class {i}" for i in range(width))
