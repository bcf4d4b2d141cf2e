"""How fast something goes, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    r"""The rate of a piece of work whose amount is known, and the time that the rest of it takes.

    With :math:`W` the work, :math:`w` what is done of it and :math:`t` the seconds since the first of it began,

    .. math:: \mathrm{eta} = t\,\frac{W - w - c}{w + c}, \qquad c = \tfrac{1}{2}(k - 1)\,\frac{w}{n}

    where :math:`c` is what :math:`k` workers have in hand: half a piece each, but for the one that has just brought the
    last of :math:`n` pieces. All that was done counts alike, so that the estimate is steady; what went before, the
    start of workers above all, counts for nothing.

    Parameters
    ----------
    work : float
        All of it, in any unit.
    at_once : int
        How many workers do a piece each, side by side.
    clock : callable, optional
        Returns seconds.
    """

    def __init__(self, work: float, at_once: int = 1, clock: Callable[[], float] | None = None) -> None:
        self._work, self._at_once, self._clock = float(work), max(at_once, 1), clock or time.monotonic
        self._began = self._clock()
        self._done, self._pieces = 0.0, 0
        self._last: float | None = None

    def advance(self, work: float, took: float | None = None) -> None:
        """Count a piece as done now.

        Parameters
        ----------
        work : float
        took : float, optional
            Seconds that it took: what lies before the first piece is then known to be start-up. 0 for a piece that was
            there already, and tells nothing of the others.
        """
        if took == 0.0:
            self._work -= work
            return
        if work <= 0:
            return
        now = self._clock()
        if took is not None and not self._pieces:
            self._began = max(self._began, now - took)
        self._done, self._pieces, self._last = self._done + work, self._pieces + 1, now

    @property
    def rate(self) -> float | None:
        """Work a second since the first of it began; None before anything is done."""
        if self._last is None or self._last <= self._began:
            return None
        return self._done / (self._last - self._began)

    @property
    def share(self) -> float:
        """What is done, of all work that was to do, in [0, 1]."""
        return min(self._done / self._work, 1.0) if self._work > 0 else 1.0

    @property
    def eta(self) -> float | None:
        """Seconds from now to the end, at least 0; None before anything is done."""
        if self._last is None:
            return None
        piece = self._done / self._pieces
        left = max((self._work - self._done) / piece, 0.0)  # pieces, if they go on as large as they were
        reached = self._done + 0.5 * min(self._at_once - 1, left) * piece
        took = self._last - self._began
        ends = self._last + took * max(self._work - reached, 0.0) / reached
        return max(ends - self._clock(), 0.0)


def shown_rate(rate: float, unit: str) -> str:
    """Return a rate in three digits: ``5,210 images/s``, or ``3.2 s/teacher`` where one takes longer than a second."""
    if rate >= 1:
        return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s"
    return f"{shown_time(1 / rate) if rate <= 0.01 else f'{1 / rate:.1f} s'}/{unit.removesuffix('s')}"


def shown_time(seconds: float) -> str:
    """Return a time as ``0:05``, ``12:40`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
