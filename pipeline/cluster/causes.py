"""Errors in one line, whatever they were wrapped in on their way from a worker."""

from __future__ import annotations

from pipeline.errors import FacultyError


def root_cause(error: BaseException) -> BaseException:
    """Follow Ray's wrappers (``cause``, ``failure``, ``worker_failures``, …) to the original error."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        # A dead worker makes its peers fail too, with errors about lost connections: the death is what explains them.
        ranked = sorted(failures.values(), key=lambda item: not is_death(item)) if failures else []
        for inner in (*ranked, *(getattr(error, name, None) for name in _INNER)):
            if isinstance(inner, BaseException) and inner is not error:
                error = inner
                break
    return error


_INNER = ("failure", "controller_failure", "cause", "_base_exc")


def is_death(error: object) -> bool:
    """Whether the error says that a process died, rather than that code raised."""
    names = {kind.__name__ for kind in type(getattr(error, "failure", error)).__mro__}
    return bool(names & {"RayActorError", "WorkerCrashedError", "ActorDiedError", "NodeDiedError", "OutOfMemoryError"})


def one_line(error: BaseException) -> str:
    """Explain an error in one line: the text alone of our own errors, else the type and the first line of its text."""
    error = root_cause(error)
    text = " ".join(str(error).split("\n\n")[0].split()) or "no message"
    if is_death(error):
        return "the worker process died (killed, out of memory or a crash in native code)"
    line = text if isinstance(error, FacultyError) else f"{type(error).__name__}: {text}"
    return line if len(line) <= 400 else line[:397] + "..."
