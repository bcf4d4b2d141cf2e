"""Errors in one line, whatever they were wrapped in on their way from a worker, and what the next attempt learns."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.errors import FacultyError, StageError, UserError

if TYPE_CHECKING:
    from pipeline.engine.checkpoint import CheckpointStore

_ATTEMPT = "FACULTY_ATTEMPT"
# Lies beside the checkpoints of a run that ran out of memory and has not ended well since.
FAILURE = "failure.json"
_INNER = ("failure", "health_check_failure", "controller_failure", "cause", "_base_exc")
_DEATHS = {"RayActorError", "WorkerCrashedError", "ActorDiedError", "NodeDiedError"}
# What libraries say where memory is short and no type says it: of torch's CPU, CUDA, cuBLAS and cuDNN, and of NCCL.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


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


def another_token(where: str) -> UserError:
    """Return the error for a head whose token this environment does not have."""
    return UserError(
        f"{where} asks for a token, and has another one than this environment; set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN (`ray get-auth-token` on the head tells it)"
    )


def is_death(error: object) -> bool:
    """Whether the error says that a process died, rather than that code raised."""
    kinds = [kind for one in (error, *_beneath(error)) for kind in type(one).__mro__]
    return any(kind.__name__ in _DEATHS for kind in kinds) or any(map(_is_memory_kill, kinds))


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out: in torch on any device, in Python, or so that Ray ended the process for its node's sake.

    A process that the kernel killed is none of these: nobody knows why it died.
    """
    error = root_cause(error)
    if isinstance(error, MemoryError) or any(map(_is_memory_kill, type(error).__mro__)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def one_line(error: BaseException) -> str:
    """Explain an error in one line: the text alone of our own errors, else the type and the first line of its text."""
    error = root_cause(error)
    text = " ".join(str(error).split("\n\n")[0].split()) or "no message"
    if any(map(_is_memory_kill, type(error).__mro__)):
        return "the worker process was ended because its node ran out of memory"
    if is_death(error):
        return "the worker process died (killed, out of memory or a crash in native code)"
    line = text if isinstance(error, FacultyError) else f"{type(error).__name__}: {text}"
    return line if len(line) <= 400 else line[:397] + "..."


def training_line(error: BaseException) -> str:
    """Explain an error of a training run in one line; where memory ran out, with the remedy."""
    line = one_line(error)
    if not is_memory(error):
        return line
    short = line if len(line) <= 160 else line[:157] + "..."
    return (
        f"out of memory ({short}); raise distill.loop.parts, into which a batch is cut and whose gradients are summed"
    )


def memory_failures(store: CheckpointStore) -> int:
    """Return how many attempts of a run have run out of memory since it last ended well."""
    try:
        with store.filesystem.open_input_stream(f"{store.root}/{FAILURE}") as stream:
            return int(json.loads(stream.read())["times"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def note_memory_failure(store: CheckpointStore, times: int) -> None:
    """Write down for the next attempt that memory has run out that many times; a storage that fails is passed over."""
    with contextlib.suppress(OSError):
        store.write(FAILURE, json.dumps({"failure": "memory", "times": times}).encode())


def forget_failures(store: CheckpointStore) -> None:
    """Delete what was written down: the run has ended well."""
    with contextlib.suppress(OSError):
        store.filesystem.delete_file(f"{store.root}/{FAILURE}")


def tell_attempt(attempt: int) -> None:
    """Let this process, a worker, know how often the workers were started before it."""
    os.environ[_ATTEMPT] = str(attempt)


def told_attempt() -> int:
    """Return what this process was told."""
    return int(os.environ[_ATTEMPT])


def write_log(store: CheckpointStore, text: str) -> str:
    """Leave a traceback beside the checkpoints and return where; where the storage takes nothing, say so."""
    try:
        return f"traceback in {store.write('error.log', text.encode())}"
    except OSError as error:
        return f"the traceback can't be stored: {one_line(error)}"


@contextlib.contextmanager
def storage_of(store: CheckpointStore) -> Iterator[None]:
    """Let an error of the storage name it.

    Raises
    ------
    StageError
        Instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise StageError(f"the storage {store.uri} can't be used: {one_line(error)}; mend it and run again") from error


def _is_memory_kill(kind: type) -> bool:
    # torch has an error of the same name, which is no death.
    return kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("ray.")


def _beneath(error: object) -> list[object]:
    return [inner for name in ("failure", "health_check_failure") if (inner := getattr(error, name, None)) is not None]
