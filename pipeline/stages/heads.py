"""The sub-tasks of a task: which classes each has, and which part of the student's logits is its own."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.stages.base import Run
from pipeline.stages.teachers import table_of

if TYPE_CHECKING:
    from pipeline.amalgamation.subtasks import SubTask
    from pipeline.distillation.step import Head


def subtasks_of(run: Run) -> list[SubTask]:
    """Return the sub-tasks with their classes; a single task is one sub-task with the classes of the table."""
    from pipeline.amalgamation.subtasks import SubTask

    named = run.settings.task.subtasks
    if named is None:
        return [SubTask("", table_of(run).classes)]
    return [SubTask(name, tuple(classes)) for name, classes in named.items()]


def heads_of(run: Run) -> tuple[Head, ...]:
    """Return the heads of the student; none for a single task.

    Raises
    ------
    ConfigError
        When a sub-task names a class that the images do not have.
    """
    from pipeline.distillation.step import Head

    named = run.settings.task.subtasks
    if named is None:
        return ()
    known = table_of(run).classes
    heads, start = [], 0
    for name, classes in named.items():
        members = [-1] * len(known)
        for number, names in enumerate(classes.values()):
            for member in names:
                if member not in known:
                    near = difflib.get_close_matches(member, known, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
                    raise ConfigError(f"task.subtasks.{name}: the images have no class {member!r}{hint}")
                members[known.index(member)] = number
        heads.append(Head(name, slice(start, start + len(classes)), tuple(members)))
        start += len(classes)
    return tuple(heads)


def student_classes(run: Run) -> tuple[str, ...]:
    """Return what the student's logits stand for: the task's classes, or ``subtask/class`` over all heads."""
    named = run.settings.task.subtasks
    if named is None:
        return table_of(run).classes
    return tuple(f"{name}/{label}" for name, classes in named.items() for label in classes)
