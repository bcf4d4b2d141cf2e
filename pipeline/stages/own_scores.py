"""Scores of one's own: functions that the settings name (`assess.own`), called beside the scores of the literature."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pipeline.config import AssessSettings
from pipeline.errors import ConfigError

# What a score may ask for by the names of its arguments; the last row only where the task has labels.
GIVEN = (
    *("logits", "features", "num_classes", "classifier_weight", "parameters"),
    *("labels", "fitted"),
)
_OF_LABELS = frozenset({"labels", "fitted"})


def own_columns(settings: AssessSettings) -> tuple[str, ...]:
    """Return the names of the scores' columns: ``own.`` and the function's."""
    return tuple(map(_column, settings.own))


def own_needing_labels(settings: AssessSettings) -> frozenset[str]:
    """Return the columns of the scores that ask for labels."""
    return frozenset(
        name for name, (function, _) in own_scores(settings).items() if _OF_LABELS & set(_arguments(function))
    )


def own_scores(settings: AssessSettings) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Return the functions by column, each with its settings.

    Raises
    ------
    ConfigError
        When one can't be found, asks for what there is not, does not take its settings, or two have one name.
    """
    from pipeline.models.factories import Refused, import_factory

    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
    for target, chosen in settings.own.items():
        field, name = f"assess.own.{target}", _column(target)
        if not target.partition(":")[2]:
            raise ConfigError(f"{field}: is not of the form package.module:function")
        if name in found:
            raise ConfigError(f"{field}: there is a score {name!r} already; rename the function")
        try:
            function = import_factory(target, None)
        except Refused as error:
            raise ConfigError(f"{field}: {error}; its folder must be on PYTHONPATH") from None
        _check(function, chosen, field)
        found[name] = function, chosen
    return found


def score_own(settings: AssessSettings, given: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of one teacher; on a worker. One that asks for labels is left out where there are none.

    Parameters
    ----------
    settings : AssessSettings
    given : mapping
        Of `GIVEN`, what there is: ``logits`` (N, C_t), ``features`` (N, D), ``labels`` (N,), ``fitted`` (N,) bool,
        ``num_classes``, ``classifier_weight`` (C_t, D) or None, ``parameters``.

    Raises
    ------
    ValueError
        When one fails, or gives no finite number.
    """
    result: dict[str, float] = {}
    for name, (function, chosen) in own_scores(settings).items():
        wanted = _arguments(function)
        if _OF_LABELS & set(wanted) - set(given):
            continue
        arguments = {key: given[key] for key in wanted if key in given and key not in chosen}
        try:
            value = float(partial(function, **arguments, **chosen)())
        except Exception as error:
            raise ValueError(f"assess: {name} fails with {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise ValueError(f"assess: {name} gives {value}; a score must be a finite number")
        result[name] = value
    return result


def _column(target: str) -> str:
    return f"own.{target.partition(':')[2]}"


def _arguments(function: Callable[..., Any]) -> list[str]:
    """Return which of `GIVEN` a function asks for."""
    return [name for name in inspect.signature(function).parameters if name in GIVEN]


def _check(function: Callable[..., Any], chosen: Mapping[str, Any], field: str) -> None:
    try:
        signature = inspect.signature(function)
        signature.bind(**dict.fromkeys(_arguments(function)) | dict(chosen))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{field}: {error}; a score is called with what it names of {', '.join(GIVEN)}, and with its settings"
        ) from None
