"""The lineage of a registered student, read from the registry alone: down to teachers that were students themselves."""

from __future__ import annotations

import re
from typing import Any

from pipeline.errors import FacultyError
from pipeline.tracking.redact import one_line
from pipeline.tracking.versions import CONTENT_TAG, Registry, by_number, description_of, version_of

_VERSION = re.compile(r"models:/+([^/@]+)/(\d+)")
_SHOWN = ("faculty.", "accuracy", "difference.", "data.", "run", "teachers")
_DEEPEST = 20


def trace(registry: Registry, uri: str) -> dict[str, Any]:
    """Return where a version comes from.

    Parameters
    ----------
    registry : Registry
    uri : str
        ``models:/name/3`` or ``models:/name@champion``.

    Returns
    -------
    dict
        Plain values: `name`, `version`, `aliases`, `run_id`, `tags`, `classes`, `lineage` as the run has recorded it,
        and `note` where something is missing. A teacher that is a version in the same registry has, under `student`,
        the same again.

    Raises
    ------
    UserError
        When there is no such version.
    StageError
        When the registry can't be reached.
    """
    version = version_of(registry, uri)
    return _traced(registry, version.name, version.number, ())


def _traced(registry: Registry, name: str, number: str, above: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "version": number}
    if (name, number) in above or len(above) >= _DEEPEST:
        return found | {"note": "is among those above it"}
    version = by_number(registry, name, number)
    if version is None:
        return found | {"note": f"is no longer in {registry.uri}"}
    found |= {
        "aliases": _aliases(registry, name, number),
        "run_id": version.run_id,
        "tags": {key: text for key, text in version.tags.items() if key.startswith(_SHOWN)},
    }
    try:
        metadata = description_of(registry, version).get("metadata") or {}
    except FacultyError as error:
        return found | {"note": f"its files can't be read: {one_line(error)}"}
    found |= {"classes": metadata.get("classes"), "lineage": metadata.get("lineage")}
    if not isinstance(found["lineage"], dict):
        made_here = CONTENT_TAG in version.tags
        return found | {"lineage": None, "note": "has no lineage" if made_here else "was not registered by Faculty"}
    for teacher in _teachers(found["lineage"]):
        match = _VERSION.fullmatch(str(teacher.get("source", {}).get("location", "")))
        if teacher.get("source", {}).get("type") == "mlflow" and match is not None:
            teacher["student"] = _traced(registry, match[1], match[2], (*above, (name, number)))
    return found


def _teachers(lineage: dict[str, Any]) -> list[dict[str, Any]]:
    teachers = lineage.get("teachers")
    found = teachers.values() if isinstance(teachers, dict) else ()
    return [teacher for teacher in found if isinstance(teacher, dict) and isinstance(teacher.get("source", {}), dict)]


def _aliases(registry: Registry, name: str, number: str) -> list[str]:
    with registry.asked():
        aliases = registry.client.get_registered_model(name).aliases
    return sorted(alias for alias, pointed in aliases.items() if str(pointed) == number)
