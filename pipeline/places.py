"""Where a run folder lies: a path, or a URI with a folder on this machine that mirrors it. Paths only; reads nothing.

The mirror of ``s3://bucket/run`` is the folder ``mirrors/s3=3A=2F=2Fbucket=2Frun`` of the user's cache. Its name tells
the URI, so that a path in it, sent to another machine, says by itself what it mirrors and where it lies there.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "mock")
_LONGEST = 200  # bytes; a name in a folder may have 255, and a sign that is none of a name takes three
_MIRRORS = "mirrors"
_INSIDE = re.compile(rf".*/{_MIRRORS}/([a-z0-9]+=3A=2F=2F[^/]+)(?:/(.*))?", re.DOTALL)


def cache_folder() -> Path:
    """Return where copies of remote files lie: ``$FACULTY_CACHE``, else ``faculty`` in the user's cache folder."""
    if own := os.environ.get("FACULTY_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "faculty"


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Return whether a place is a URI of a store; ``file://`` is a path."""
    text = os.fspath(place)
    return "://" in text and not text.startswith("file://")


def tidy(place: str) -> str:
    """Return a place as the settings keep it: ``file:///shared/run`` as a path, a URI without a slash at its end.

    Raises
    ------
    ValueError
        For a URI that is no place for a run folder.
    """
    if place.startswith("file://"):
        parts = urlsplit(place)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{place} names the machine {parts.netloc}; give the path alone: file:///shared/run")
        return unquote(parts.path)
    if not is_remote(place):
        return place
    parts = urlsplit(place)
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES if scheme != "mock")
        raise ValueError(f"{place} is of no store that is known; give a path, or one of {known}")
    if parts.password is not None or (parts.username and parts.scheme in ("s3", "gs", "gcs")):
        raise ValueError(
            f"the URI at {parts.hostname} holds a credential; leave it out and set it in the environment of all nodes "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …)"
        )
    path = parts.path.rstrip("/")
    if not parts.netloc and parts.scheme != "mock":
        raise ValueError(f"{place} names no bucket; give it as {parts.scheme}://bucket/folder")
    found = parts._replace(path=path).geturl()
    if len(_quoted(found)) > _LONGEST:
        raise ValueError(f"{place} is too long ({_LONGEST} bytes at most, a slash takes three); take a shorter prefix")
    return found


def local_place(place: str | os.PathLike[str]) -> Path:
    """Return the folder of this machine: the path itself, or the mirror of a URI."""
    text = os.fspath(place)
    if text.startswith("file://"):
        text = tidy(text)
    if is_remote(text):
        return cache_folder() / _MIRRORS / _quoted(tidy(text))
    return Path(text).expanduser().absolute()


def origin_of(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Return the URI that a path mirrors and the path within it ("" for the folder itself); None for other paths."""
    text = os.fspath(path)
    return _origin(text) if "=3A=2F=2F" in text else None


def own(path: str | os.PathLike[str]) -> Path:
    """Return where a path lies on this machine: the mirrors of another machine may be elsewhere."""
    found = origin_of(path)
    return Path(path) if found is None else local_place(found[0]) / found[1]


def join(place: str, *names: str) -> str:
    """Append names to a path or a URI, before the options that the latter may have (``?region=…``)."""
    if not is_remote(place):
        return "/".join([place.rstrip("/"), *names])
    parts = urlsplit(place)
    return parts._replace(path="/".join([parts.path.rstrip("/"), *names])).geturl()


@cache
def _origin(text: str) -> tuple[str, str] | None:
    match = _INSIDE.fullmatch(text)
    return None if match is None else (unquote(match[1].replace("=", "%")), match[2] or "")


def _quoted(uri: str) -> str:
    return quote(uri, safe="").replace("%", "=")
