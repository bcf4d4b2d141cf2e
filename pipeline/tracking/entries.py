"""What a tracker records, brought into the form every tracker can hold: flat, bounded, finite, without credentials."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.tracking.redact import redact

VALUE_LIMIT = 2000
"""Longest recorded value in characters: 100 of them stay below the megabyte that a server takes in one request."""

NAME_LIMIT = 250
_KEY = re.compile(r"[\w.:/ +=@-]{1,250}")


def flatten(values: Mapping[str, Any] | BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``("outer.inner", value)`` for every leaf of nested mappings and settings; sequences are leaves."""
    if isinstance(values, BaseModel):
        values = values.model_dump(mode="json")
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, (Mapping, BaseModel)):
            yield from flatten(value, name)
        else:
            yield name, value


def clean_name(name: object) -> str:
    """Return a name every tracking store takes: word characters and ``. - / :`` and blanks, no path that climbs.

    Other characters become ``_``; a name that nothing is left of becomes ``_``.
    """
    parts = re.sub(r"[^\w./: -]", "_", str(name)).split("/")
    joined = "/".join(part for part in parts if part.strip(". "))
    return joined[:NAME_LIMIT].rstrip("/") or "_"


def clean_text(value: Any) -> str:
    """Return a value as text without credentials, cut to `VALUE_LIMIT` characters with a mark that says so."""
    text = redact(value if isinstance(value, str) else str(value))
    if len(text) <= VALUE_LIMIT:
        return text
    mark = f"… [cut, {len(text)} characters]"
    return text[: VALUE_LIMIT - len(mark)] + mark


def clean_params(values: Mapping[str, Any] | BaseModel) -> dict[str, str]:
    """Flatten nested parameters into names and bounded texts."""
    return {clean_name(name): clean_text(value) for name, value in flatten(values)}


def clean_tags(values: Mapping[str, Any]) -> dict[str, str]:
    """Bring tags into bounded texts; a tag whose value is None is left out."""
    return {clean_name(name): clean_text(value) for name, value in values.items() if value is not None}


def clean_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Bring metrics into floats; infinite ones become NaN.

    MLflow stores an infinity as 1.8e308, which flattens every plot that it stands in; NaN is shown as a gap.

    Raises
    ------
    ValueError
        When a value is not a number.
    """
    metrics = {}
    for name, value in flatten(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"metric {name} must be a number, got {value!r}") from None
        metrics[clean_name(name)] = number if math.isfinite(number) else math.nan
    return metrics


def clean_document(value: Any) -> Any:
    """Bring nested data into strict JSON: text keys, null for what is not finite, texts without credentials."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {redact(str(key)): clean_document(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean_document(item) for item in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, Path)):
        return redact(str(value))
    if hasattr(value, "tolist"):  # numpy arrays and scalars, tensors
        return clean_document(value.tolist())
    return redact(str(value))


def table_document(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows as ``{"columns": [...], "data": [[...]]}``, the layout MLflow shows as a table."""
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    plain = [clean_document(row) for row in rows]
    return {"columns": columns, "data": [[row.get(column) for column in columns] for row in plain]}


def document_name(name: str) -> str:
    """Return a document's path among the artefacts, ending in ``.json``."""
    cleaned = clean_name(name)
    return cleaned if cleaned.endswith(".json") else f"{cleaned}.json"


def check_key(key: str) -> str:
    """Return `key` if a run can be found again by it.

    Raises
    ------
    ValueError
        When it holds a character that a search can't quote.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"a run's key has 1 to 250 letters, digits, blanks or . : / + = @ - _, got {key!r}")
    return key
