"""Numbers and texts as the report's pages write them. Imports nothing of the run."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import Any

NOT_KNOWN = "\N{EN DASH}"
_MINUS, _TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _signed(text: str) -> str:
    return text.replace("-", _MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share as a percentage, without the sign: 0.794 → ``79.4``."""
    return _signed(f"{100 * value:.{digits}f}") if value is not None and _known(value) else NOT_KNOWN


def points(value: float | None, digits: int = 1) -> str:
    """Write a difference of shares in points, with its sign: 0.115 → ``+11.5``."""
    return _signed(f"{100 * value:+.{digits}f}") if value is not None and _known(value) else NOT_KNOWN


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with some digits behind the point."""
    return _signed(f"{value:.{digits}f}") if value is not None and _known(value) else NOT_KNOWN


def count(value: float | None) -> str:
    """Write a whole number with its thousands apart."""
    return f"{value:,.0f}" if value is not None and _known(value) else NOT_KNOWN


def short(value: float | None) -> str:
    """Write a large number in three digits: 43274 → ``43.3 k``."""
    if value is None or not _known(value):
        return NOT_KNOWN
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}" if abs(value) < 999.5 * unit else f"{value / unit:.0f} {name}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def duration(value: float | None) -> str:
    """Write seconds as a person would: ``0.4 s``, ``41 s``, ``12 min``, ``3.5 h``."""
    if value is None or not _known(value):
        return NOT_KNOWN
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.1f} min" if value < 600 else f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"


def when(value: float) -> str:
    """Write seconds since the epoch as a date and time, in UTC."""
    return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")


def listed(names: list[str], most: int = 6) -> str:
    """Write names in a sentence: ``a, b and c``; of many the first ones and how many more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def ratio(larger: float | None, smaller: float | None) -> str:
    """Write how many times: ``1.95×``."""
    if not larger or not smaller or not _known(larger) or not _known(smaller):
        return NOT_KNOWN
    value = larger / smaller
    return f"{value:,.0f}{_TIMES}" if value >= 100 else f"{value:.{1 if value >= 9.95 else 2}f}{_TIMES}"


def upper(text: str) -> str:
    """Write the first letter large."""
    return text[:1].upper() + text[1:]


FILTERS: dict[str, Callable[..., Any]] = {
    "percent": percent,
    "points": points,
    "number": number,
    "count": count,
    "short": short,
    "duration": duration,
    "when": when,
    "listed": listed,
    "ratio": ratio,
    "upfirst": upper,
}
