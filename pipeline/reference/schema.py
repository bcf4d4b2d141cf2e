"""The JSON Schema of a settings file: editors complete and check `run.yaml` with it."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from pipeline.config import Settings

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
_ENTRY = re.compile(
    r"^([A-Za-z_][\w, ]*) : .*\n((?:    .*\n?|\n)*)|^([A-Za-z_][\w, ]*)\n((?:    .*\n?)+)", re.MULTILINE
)


def settings_schema() -> dict[str, Any]:
    """Return the schema, with a description of every field and without defaults that are mappings."""
    schema = Settings.model_json_schema(by_alias=True, schema_generator=_Sorted)
    for model in all_models():
        entry = schema if model is Settings else schema["$defs"].get(model.__name__)
        if entry is not None:
            _describe(entry, model)
    _tidy(schema)
    # A list in the place of a mapping is read, too, which pydantic's schema does not know.
    space = schema["$defs"]["SweepSpec"]["properties"]["space"]
    space["additionalProperties"] = {"anyOf": [space["additionalProperties"], {"type": "array"}]}
    return {"$schema": _DIALECT, "title": "Settings of a run of Faculty"} | schema


def all_models() -> list[type[BaseModel]]:
    """Return `Settings` and every model below it, in the order in which a reader meets them."""
    found: dict[type[BaseModel], None] = {}

    def visit(model: type[BaseModel]) -> None:
        if model in found:
            return
        found[model] = None
        for field in model.model_fields.values():
            for inner in models_in(field.annotation):
                visit(inner)

    visit(Settings)
    return list(found)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return every model that an annotation holds, also as an item of a list or a value of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in models_in(part)]


def summary_of(model: type[BaseModel]) -> str:
    """Return what a model's docstring says before its sections, as one paragraph a line."""
    text = inspect.cleandoc(model.__doc__ or "")
    section = _SECTION.search(text)
    text = text[: section.start()] if section else text
    return "\n".join(" ".join(part.split()) for part in text.split("\n\n")).strip()


def said_of(model: type[BaseModel]) -> dict[str, str]:
    """Return what is said of each field: by itself, or by the docstring of the model or of one that it extends."""
    said: dict[str, str] = {}
    for cls in reversed([cls for cls in model.__mro__ if issubclass(cls, BaseModel) and cls is not BaseModel]):
        said |= dict(_entries(inspect.cleandoc(cls.__doc__ or "")))
        said |= {name: field.description for name, field in cls.model_fields.items() if field.description}
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        if name not in said and inner:
            said[name] = summary_of(inner[0]).split("\n")[0]
    return {name: text.replace("``", "`") for name, text in said.items() if name in model.model_fields}


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each entry under Attributes or Parameters."""
    parts = _SECTION.split(text)
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if title not in ("Attributes", "Parameters"):
            continue
        for match in _ENTRY.finditer(body.strip("\n") + "\n"):
            names, told = (match[1], match[2]) if match[1] else (match[3], match[4])
            for name in names.split(", "):
                yield name.strip(), " ".join((told or "").split())


def _describe(entry: dict[str, Any], model: type[BaseModel]) -> None:
    entry["description"] = summary_of(model)
    said = said_of(model)
    for name, field in model.model_fields.items():
        prop = entry.get("properties", {}).get(field.alias or name)
        if prop is not None and said.get(name):
            prop["description"] = said[name]


def _tidy(node: Any) -> None:
    """Leave out titles, which only repeat names, and defaults that are mappings, which repeat other entries."""
    if isinstance(node, list):
        for item in node:
            _tidy(item)
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        if name == "properties":  # here the keys are names of settings, one of which may be `title`
            for prop in value.values():
                prop.pop("title", None)
                if isinstance(prop.get("default"), dict) and prop["default"]:
                    del prop["default"]
        _tidy(value)
    if "type" in node or "properties" in node or "enum" in node or "anyOf" in node:
        if isinstance(node.get("title"), str):
            del node["title"]


class _Sorted(GenerateJsonSchema):
    """As pydantic makes it, in the order of the fields."""

    def sort(self, value: Any, parent_key: str | None = None) -> Any:
        return value
