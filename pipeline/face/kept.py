"""What was given as Python objects and a run has to find again: files named by their content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pipeline.data.whole import replacing
from pipeline.errors import UserError

KEPT = "runs/kept"


def keep(folder: Path, name: str, write: Callable[[IO[bytes]], Any]) -> Path:
    """Return the path of a file, written whole or not at all unless it is there already.

    Parameters
    ----------
    folder : Path
        Is made where it does not exist.
    name : str
        Tells the content, so that a file of this name need not be written again.
    write : callable
        Gets the open file.

    Raises
    ------
    UserError
        When it can't be written.
    """
    path = folder.expanduser().absolute() / name
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as sink:
            write(sink)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); choose another `keep_in`") from None
    return path
