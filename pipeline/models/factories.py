"""Code that a file names: importing it only from where it is trusted, and calling it."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Refused(ValueError):
    """One line: what is wrong with which field, and the remedy. Who it belongs to is added where it is caught."""


def import_factory(reference: str, trusted: Iterable[str] | None) -> Callable[..., Any]:
    """Import ``module:callable``.

    Parameters
    ----------
    reference : str
    trusted : iterable of str, optional
        Prefixes of the modules that are allowed, ending at a dot or the end of a name; None: all.

    Raises
    ------
    Refused
        When it is not allowed, not there or not callable.
    """
    module_name, _, attribute = reference.partition(":")
    if trusted is not None and not _trusted(module_name, trusted):
        raise Refused(
            f"factory {reference!r} is code from a module that is not trusted; if you trust it, add "
            f"{module_name.split('.')[0] + '.'!r} to `zoo.trusted_factories`, or to --trust of `faculty zoo`"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module_name.split(".")[0]
        remedy = "; install it, or put its folder on PYTHONPATH" if absent else ""
        raise Refused(
            f"factory {reference!r}: module {module_name!r} can't be imported ({one_line(error)}){remedy}"
        ) from None
    factory = getattr(module, attribute, None)
    if factory is None:
        public = [name for name in vars(module) if not name.startswith("_") and callable(vars(module)[name])]
        raise Refused(f"factory {reference!r}: {module_name} has no {attribute!r}; {nearest(attribute, public)}")
    # A trusted module may have imported something else, which it makes no promise about.
    origin = getattr(factory, "__module__", None)
    if not callable(factory) or (trusted is not None and not _trusted(str(origin), trusted)):
        raise Refused(f"factory {reference!r} is no function or class of {module_name}")
    return factory


def _trusted(module: str, prefixes: Iterable[str]) -> bool:
    return any(prefix.strip(".") and f"{module}.".startswith(prefix.rstrip(".") + ".") for prefix in prefixes)


def with_defaults(factory: Callable[..., Any], kwargs: Mapping[str, Any], **known: Any) -> dict[str, Any]:
    """Return `kwargs` and, of `known`, what the factory has an argument for and `kwargs` leaves out."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # written in C, or a class that hides its signature
        return dict(kwargs)
    return {key: value for key, value in known.items() if key in parameters and value is not None} | dict(kwargs)


def called(build: Callable[[], Any], what: str) -> Any:
    """Run a constructor that is not ours; whatever it raises becomes one line.

    Raises
    ------
    Refused
        When it raises anything.
    """
    try:
        return build()
    except Exception as error:
        raise Refused(f"{what} fails with {type(error).__name__} ({one_line(error)}); check `kwargs`") from None


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of a message: the names nearest to a wrong one, or the first few."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"for example: {', '.join(names[:7])}"


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's text that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:limit]
