"""Strict settings: the base model, the YAML loader and validation errors that name file, path and nearest valid key."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import ConfigError


class StrictModel(BaseModel):
    """Base of all settings: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


Model = TypeVar("Model")

# What patterns of the settings ask for, by their first characters.
_IN_WORDS = {
    "^[A-Za-z0-9][A-Za-z0-9_.-]": "use letters, digits, _ . and -, the first a letter or a digit",
    "^[0-9a-f]{64}$": "a SHA-256 has 64 characters, each 0 to 9 or a to f",
    "^[A-Za-z_][\\w.]*:": "write module:callable",
}


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``3e-4`` as a float and rejects duplicate keys."""


# YAML 1.1 wants a dot and a signed exponent in a float, so that 3e-4 would be read as a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key {key!r}; keep one of the two", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)  # puts what `<<` merges in before the mapping's own keys, which win
    pairs = [(loader.construct_object(key, deep=True), value) for key, value in node.value]
    return {key: loader.construct_object(value, deep=True) for key, value in pairs}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse one YAML document; `where` names it in errors.

    Raises
    ------
    ConfigError
        On a syntax error or a duplicate key, with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: {problem}") from None


def load_yaml(path: str | Path) -> Any:
    """Read one YAML file strictly (safe tags only, no duplicate keys).

    Raises
    ------
    ConfigError
        When the file can't be read or is not valid YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        hint = (
            "; check the path: it is relative to the folder you are in" if isinstance(error, FileNotFoundError) else ""
        )
        raise ConfigError(f"{path}: can't be read ({error.strerror or error}){hint}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    return parse_yaml(text, where=str(path))


def validate(model: type[Model], data: Any, *, where: str | Callable[[Sequence[Any]], str]) -> Model:
    """Validate `data` against a pydantic model or union.

    Parameters
    ----------
    model : type
    data : plain values, as YAML gives them
    where : str or callable
        The file to name in errors, or a function from the path of a value to the file that set it.

    Raises
    ------
    ConfigError
        One line for each problem: where, the dotted path, what is wrong and the nearest valid key.
    """
    try:
        return TypeAdapter(model).validate_python(data)
    except ValidationError as error:
        items = _causes(model, error.errors(include_url=False))
        lines = [f"{where if isinstance(where, str) else where(i['loc'])}: {_explain(model, i)}" for i in items]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _causes(model: Any, items: Sequence[Any]) -> list[Any]:
    """Return the errors without those that follow from another one, which would send the reader astray.

    A list whose items are not valid counts as one that is too short, and a key that is misspelt as one that is missing.
    """
    places = [tuple(item["loc"]) for item in items]
    above = {place[:end] for place in places for end in range(len(place))}
    meant = {
        (*place[:-1], near)
        for place, item in zip(places, items, strict=True)
        if item["type"] == "extra_forbidden" and (near := _nearest_key(model, item)) is not None
    }
    return [
        item
        for place, item in zip(places, items, strict=True)
        if not (item["type"] == "too_short" and place in above) and not (item["type"] == "missing" and place in meant)
    ]


def _nearest_key(model: Any, item: Any) -> str | None:
    names, fields = _names_and_keys(model, item)
    return next(iter(difflib.get_close_matches(names[-1], fields, n=1, cutoff=0.5)), None)


def _names_and_keys(model: Any, item: Any) -> tuple[list[str], list[str]]:
    """Return the keys that lead to an error, and those that are valid where the last of them stands."""
    names: list[str] = []
    fields: list[str] = []
    current: Any = model
    for part in item["loc"]:
        options = _models_of(current)
        tagged = [option for option in options if part == _tag_of(option)]
        if tagged:  # the tag of a discriminated union is no key of the file
            current = tagged[0]
            continue
        names.append(str(part))
        known = {field.alias or key: field for option in options for key, field in option.model_fields.items()}
        fields = sorted(known)
        current = known[part].annotation if part in known else _item_type(current)
    return names, fields


def _explain(model: Any, item: Any) -> str:
    names, fields = _names_and_keys(model, item)
    path = ".".join(names) or "(top level)"
    if item["type"] == "extra_forbidden":
        key = _nearest_key(model, item)
        hint = f"did you mean `{key}`?" if key is not None else f"valid keys: {', '.join(fields)}"
        return f"`{path}` is not a setting; {hint}"
    if item["type"] == "missing":
        return f"`{path}` is missing"
    if item["type"] == "union_tag_invalid":
        given, expected = str(item["ctx"]["tag"]), str(item["ctx"]["expected_tags"])
        near = difflib.get_close_matches(given, expected.replace("'", "").split(", "), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"valid: {expected}"
        field = str(item["ctx"]["discriminator"]).strip("'")
        return f"`{path}.{field}` is {given!r}; {hint}"
    if item["type"] == "union_tag_not_found":
        return f"`{path}.{str(item['ctx']['discriminator']).strip(chr(39))}` is missing"
    if item["type"] == "literal_error":
        near = difflib.get_close_matches(
            str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]), n=1, cutoff=0.5
        )
        hint = f"did you mean `{near[0]}`?" if near else f"valid: {item['ctx']['expected']}"
        return f"`{path}` is {item['input']!r}; {hint}"
    if item["type"] == "string_pattern_mismatch":
        pattern = item["ctx"]["pattern"]
        wanted = next(
            (words for start, words in _IN_WORDS.items() if pattern.startswith(start)), f"must match {pattern}"
        )
        return f"`{path}` is {item['input']!r}; {wanted}"
    message = item["msg"].removeprefix("Value error, ")
    shown = repr(item["input"])
    if item["type"] == "value_error" or len(shown) > 60:
        return f"`{path}`: {message}"
    return f"`{path}` is {shown}: {message[0].lower()}{message[1:]}"


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """Return every pydantic model that an annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _models_of(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [found for option in typing.get_args(annotation) for found in _models_of(option)]
    return []


def _tag_of(model: type[BaseModel]) -> Any:
    for name in ("type", "source"):
        field = model.model_fields.get(name)
        if field is not None and typing.get_origin(field.annotation) is typing.Literal:
            return typing.get_args(field.annotation)[0]
    return None


def _item_type(annotation: Any) -> Any:
    """Return the type of the items of a list or mapping annotation."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _item_type(typing.get_args(annotation)[0])
    if origin in (list, tuple, set, dict):
        arguments = [a for a in typing.get_args(annotation) if a is not Ellipsis]
        return arguments[-1] if arguments else None
    if origin in (typing.Union, types.UnionType):
        return next(filter(None, map(_item_type, typing.get_args(annotation))), None)
    return None
