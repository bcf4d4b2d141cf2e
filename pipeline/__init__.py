"""Faculty: one small student from a repository of heterogeneous pre-trained teachers.

``import pipeline as faculty`` gives the Python face (docs/python.md). Its names are loaded when they are first used, so
that importing the package, or a room of it, brings nothing else along.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.errors import FacultyError
    from pipeline.face.results import Assessment, Faculty
    from pipeline.face.steps import assess, distill, register, select
    from pipeline.face.student import Student, Version
    from pipeline.face.task import Task, load_task
    from pipeline.face.zoo import Zoo, load_zoo

_HOMES = {
    "load_zoo": "pipeline.face.zoo",
    "load_task": "pipeline.face.task",
    "assess": "pipeline.face.steps",
    "select": "pipeline.face.steps",
    "distill": "pipeline.face.steps",
    "register": "pipeline.face.steps",
    "Assessment": "pipeline.face.results",
    "Faculty": "pipeline.face.results",
    "Student": "pipeline.face.student",
    "Version": "pipeline.face.student",
    "Task": "pipeline.face.task",
    "Zoo": "pipeline.face.zoo",
    "FacultyError": "pipeline.errors",
}

__all__ = [
    "Assessment",
    "Faculty",
    "FacultyError",
    "Student",
    "Task",
    "Version",
    "Zoo",
    "assess",
    "distill",
    "load_task",
    "load_zoo",
    "register",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
