"""Errors that reach the user as one line, and the exit code each one ends the process with."""

from __future__ import annotations

import os


class FacultyError(Exception):
    """A failure that is explained in one line; the process ends with exit code 1."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        # What IPython shows in the place of a traceback: the line says it all.
        if os.environ.get("FACULTY_VERBOSE"):
            raise NotImplementedError  # and shows the traceback
        return [f"{type(self).__name__}: {self}"]


class UserError(FacultyError):
    """Bad input: the message names the file, the field and the remedy; the process ends with exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """Settings that do not parse, do not validate or contradict each other."""


class DataError(UserError):
    """A data set that can't be read or can't serve the task: no sample, an empty class, a label outside the classes."""


class TeacherError(UserError):
    """A teacher that can't be loaded or does not do what the zoo says of it."""


class StageError(FacultyError):
    """A stage that failed while it ran; what earlier stages produced is intact."""


class Interrupted(FacultyError):
    """The user stopped the run; the process ends with exit code 130."""

    exit_code = 130
