"""The reference of the settings as a page of Markdown: a table for each section."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config import Settings
from pipeline.reference.schema import all_models, models_in, said_of, settings_schema, summary_of

_HEAD = """# Settings

Every setting of a run: what `-c run.yaml` may hold, and what `section.key=value` on the command line
overrides. Written by `faculty schema --markdown`; do not edit. [run.schema.json](run.schema.json) is the same for
editors: put `# yaml-language-server: $schema=run.schema.json` into the first line of a settings file, with the path to
a copy, as `faculty init` does.

Files merge in order: mappings key by key, anything else whole. `null` switches an optional part off. Paths in a file
(`path`, `root`) are relative to that file.
"""


def settings_page() -> str:
    """Return the page."""
    schema = settings_schema()
    paths = _paths()
    titles = {model: _title(model, places) for model, places in paths.items()}
    parts = [_HEAD]
    for model in all_models():
        entry = schema if model is Settings else schema["$defs"][model.__name__]
        parts.append(_section(model, entry, paths[model], titles))
    return "\n".join(parts)


def _paths() -> dict[type[BaseModel], list[str]]:
    """Return where each model occurs, as dotted paths; the first is the one that a reader meets first."""
    found: dict[type[BaseModel], list[str]] = {}

    def visit(model: type[BaseModel], path: str) -> None:
        places = found.setdefault(model, [])
        if path in places:
            return
        places.append(path)
        for name, field in model.model_fields.items():
            for inner in models_in(field.annotation):
                here = f"{path}.{field.alias or name}".lstrip(".")
                visit(inner, here + ".NAME" * _is_mapping(field.annotation))

    visit(Settings, "")
    return found


def _is_mapping(annotation: Any) -> bool:
    return "dict[" in str(annotation)


def _title(model: type[BaseModel], paths: list[str]) -> str:
    kind = _kind(model)
    return (f"`{paths[0]}`" if paths[0] else "Top level") + (f", `{kind[0]}: {kind[1]}`" if kind else "")


def _kind(model: type[BaseModel]) -> tuple[str, str] | None:
    """Return what tells a model from the others of its union: ``("type", "parquet")``."""
    field = model.model_fields.get("type")
    return ("type", str(field.default)) if field is not None and isinstance(field.default, str) else None


def _section(
    model: type[BaseModel], entry: Mapping[str, Any], paths: list[str], titles: Mapping[type[BaseModel], str]
) -> str:
    lines = [f"## {titles[model]}", "", summary_of(model).replace("``", "`").replace("\n", "\n\n"), ""]
    if len(paths) > 1:
        others = ", ".join(f"`{path}`" for path in paths[1:5]) + (", …" if len(paths) > 5 else "")
        lines += [f"The same at {others}.", ""]
    said = said_of(model)
    rows = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        prop = entry["properties"][key]
        inner = models_in(field.annotation)
        links = ", ".join(f"[{_plain(titles[other])}](#{_anchor(titles[other])})" for other in inner)
        told = _cell(said.get(name, "")).replace("<", "&lt;")
        rows.append(f"| `{key}` | {links or _type(prop)} | {_default(field)} | {told} |")
    if not rows:
        return "\n".join([*lines, "It has no settings.", ""])
    return "\n".join([*lines, "| key | value | default | |", "|---|---|---|---|", *rows, ""])


def _plain(title: str) -> str:
    return title.replace("`", "")


def _anchor(title: str) -> str:
    """Return the anchor that Markdown renderers give a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, BaseModel):
        kind = _kind(type(value))
        return f"`{kind[0]}: {kind[1]}`" if kind else "as there"
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 30, allow_unicode=True)
    return f"`{_cell(text.removesuffix(chr(10)).removesuffix(chr(10) + '...'))}`"


def _type(prop: Mapping[str, Any]) -> str:
    """Say in words what a JSON Schema admits."""
    if "anyOf" in prop or "oneOf" in prop:
        return " or ".join(dict.fromkeys(_type(option) for option in prop.get("anyOf", prop.get("oneOf", ()))))
    if "const" in prop:
        return f"`{prop['const']}`"
    if "enum" in prop:
        return ", ".join(f"`{value}`" for value in prop["enum"])
    kind = prop.get("type")
    if kind == "array":
        if "prefixItems" in prop:
            return "[" + ", ".join(_type(item) for item in prop["prefixItems"]) + "]"
        return f"list of {_type(prop.get('items', {}))}"
    if kind == "object":
        inner = prop.get("additionalProperties")
        return f"mapping to {_type(inner)}" if isinstance(inner, dict) else "mapping"
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
    text = names.get(str(kind), "anything")
    for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")):
        if key in prop:
            text += f" {sign} {prop[key]:g}"
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
