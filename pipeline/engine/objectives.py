"""From settings to the loss: every part is found by its name, built from what is known of student and teachers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.distillation.composite import Composite, Schedule
from pipeline.distillation.step import About, Objective
from pipeline.engine.objective_spec import LayersSpec, ObjectiveSpec, Part
from pipeline.errors import ConfigError
from pipeline.strict import validate


def build_objective(spec: ObjectiveSpec, about: Callable[[LayersSpec | None], About]) -> Composite:
    """Build the loss.

    Parameters
    ----------
    spec : ObjectiveSpec
    about : callable
        Returns what is known of student and teachers, with the layers that a part asks for (None: no layers).

    Raises
    ------
    ConfigError
        When a part can't be built from its settings; names it.
    """
    parts = {}
    for name, kind, part, arguments in _entries(spec):
        try:
            objective = kind(about(getattr(part, "layers", None)), **arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"distill.objective.{name}: {error}") from None
        parts[name] = objective, Schedule(part.weight, part.rise, part.fade)
    if not parts:
        raise ConfigError("distill.objective: every part is null; switch one on, for instance `cross_entropy: {}`")
    return Composite(parts)


def wants(spec: ObjectiveSpec) -> frozenset[str]:
    """Return what the parts need to be given, see `pipeline.distillation.step.Objective`.

    Raises
    ------
    ConfigError
        When someone's own objective can't be found, is none, or does not take its settings.
    """
    found: frozenset[str] = frozenset()
    for _, kind, _, _ in _entries(spec):
        found |= kind.needs
    return found


def _entries(spec: ObjectiveSpec) -> Iterator[tuple[str, type[Objective], Part, dict[str, Any]]]:
    for name, part in spec.parts():
        yield name, _imported(part.target, name), part, part.arguments()
    for name, settings in spec.own.items():
        kind, field = _imported(name, f"own.{name}"), f"distill.objective.own.{name}"
        common = {key: settings[key] for key in Part.model_fields if key in settings}
        arguments = {key: value for key, value in settings.items() if key not in common}
        try:
            inspect.signature(kind).bind(None, **arguments)
        except TypeError as error:
            raise ConfigError(f"{field}: {error}") from None
        yield f"own.{name}", kind, validate(Part, common, where=field), arguments


def _imported(target: str, name: str) -> type[Objective]:
    module, separator, attribute = target.partition(":")
    try:
        if not separator:
            raise ImportError("it is not of the form package.module:Class")
        kind = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ConfigError(f"distill.objective.{name}: {target} can't be imported ({error})") from None
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise ConfigError(f"distill.objective.{name}: {target} is no subclass of pipeline.distillation.step.Objective")
    return kind
