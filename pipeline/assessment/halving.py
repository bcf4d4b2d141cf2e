"""Successive halving: who climbs to the next rung of a search, decided as soon as it is certain. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def survivors(candidates: int, *, rungs: int, eta: float, least: int) -> tuple[int, ...]:
    """Return how many of `candidates` climb from each rung to the next.

    n_r = max(least, ⌈candidates / η^r⌉), never more than there are: a zoo of up to `least` teachers is not thinned.

    Parameters
    ----------
    candidates
        ≥ 0, on the first rung.
    rungs
        ≥ 1.
    eta
        η ≥ 1; a rung passes 1/η on.
    least
        ≥ 1.

    Raises
    ------
    ValueError
        For a value out of range.

    References
    ----------
    .. [1] Jamieson, Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016
       (arXiv 1502.07943). The floor is ours.
    """
    for name, value, lowest in (
        ("candidates", candidates, 0),
        ("rungs", rungs, 1),
        ("eta", eta, 1),
        ("least", least, 1),
    ):
        if not value >= lowest:
            raise ValueError(f"{name} must be >= {lowest}, got {value}")
    counts = (max(least, math.ceil(candidates / eta**rung)) for rung in range(1, rungs))
    return tuple(min(candidates, count) for count in counts)


@dataclass(frozen=True)
class Decision:
    """What becomes of a candidate that waits on a rung.

    Attributes
    ----------
    name : str
    climbs : bool
    reason : str
        Why it does not; "" if it does.
    """

    name: str
    climbs: bool
    reason: str = ""


class Standing:
    """The state of a search.

    Candidates enter a rung with their score in any order; each is told to climb once fewer than n_r others can still be
    better, and to stop once n_r others are. Nothing is promoted on the strength of who happened to come first, so the
    outcome does not depend on the order or on how many run side by side. Ties go to the name that sorts first.

    Parameters
    ----------
    candidates
        How many there are on the first rung.
    climbing
        n_r for every rung but the last, as `survivors` gives it.
    """

    def __init__(self, candidates: int, climbing: Sequence[int]) -> None:
        self.climbing = tuple(climbing)
        self._candidates = candidates
        self._entered: list[dict[str, float]] = [{} for _ in self.climbing]
        self._decided: list[set[str]] = [set() for _ in self.climbing]
        self._climbed: list[int] = [0 for _ in self.climbing]
        self._gone: list[int] = [0 for _ in self.climbing]  # left on their way to this rung, without a score
        self._rung: dict[str, int] = {}  # the rung that a candidate is on its way to, 0 where it is not told

    def enter(self, name: str, rung: int, score: float | None) -> None:
        """Take the score that `name` reached on `rung` (from 0); None or NaN is below every number."""
        value = -math.inf if score is None or math.isnan(score) else score
        self._entered[rung][name] = value

    def climbed(self, name: str, rung: int) -> bool:
        """Return whether `name` has been told to climb from `rung`."""
        return self._rung.get(name, 0) > rung

    def leave(self, name: str) -> None:
        """Take it that `name` failed or has finished; the others need not wait for it, and it holds no place."""
        rung = self._rung.get(name, 0)
        if rung < len(self.climbing) and name not in self._decided[rung]:
            self._entered[rung].pop(name, None)
            self._gone[rung] += 1

    def settle(self) -> list[Decision]:
        """Return the decisions that have become certain since the last call."""
        found: list[Decision] = []
        coming = self._candidates
        for rung, limit in enumerate(self.climbing):
            entered, decided = self._entered[rung], self._decided[rung]
            open_ = max(coming - len(entered) - self._gone[rung], 0)
            ranked = sorted(entered, key=lambda name: (-entered[name], name))
            for place, name in enumerate(ranked):
                if name in decided:
                    continue
                if place >= limit:
                    decided.add(name)
                    found.append(Decision(name, False, self._reason(rung, entered[name], coming)))
                elif place + open_ < limit:
                    decided.add(name)
                    self._climbed[rung] += 1
                    self._rung[name] = rung + 1
                    found.append(Decision(name, True))
            undecided = len(entered) - len(decided)
            coming = min(limit, self._climbed[rung] + undecided + open_)
        return found

    def _reason(self, rung: int, score: float, of: int) -> str:
        limit = self.climbing[rung]
        value = "no score" if score == -math.inf else f"score {score:.3f}"
        return f"{value} on rung {rung + 1} of {len(self.climbing) + 1}, not among the best {limit} of {of}"
