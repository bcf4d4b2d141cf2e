"""Several things timed in turn, round by round, and their ratios within each round: the same noise falls on all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """The median over the rounds of one rate over another, and the least and largest of them."""

    median: float
    least: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.largest:.3f})"


@dataclass(frozen=True)
class Times:
    """What the rounds took.

    Attributes
    ----------
    seconds : dict of str to list of float
        By name, one value a round.
    """

    seconds: dict[str, list[float]]

    def __contains__(self, name: str) -> bool:
        return name in self.seconds

    def median(self, name: str) -> float:
        """Return the median over the rounds [s]."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> Ratio:
        """Return how many times as fast as `other` a thing is."""
        each = [theirs / own for own, theirs in zip(self.seconds[name], self.seconds[other], strict=True)]
        return Ratio(statistics.median(each), min(each), max(each))


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
) -> Times:
    """Time everything in every round: A B C, A B C, …; a first round warms up and is not counted.

    Parameters
    ----------
    runs : mapping of str to callable
    rounds : int
        At least 1.
    device : torch.device
        It is waited for before a time is taken.
    say : callable, optional
        Is told how far it is.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            _settle(device)
            began = time.perf_counter()
            run()
            _settle(device)
            seconds[name].append(time.perf_counter() - began)
            say(f"{f'round {number} of {rounds}' if number else 'warming up'}: {name}, {seconds[name][-1]:.2f} s")
    return Times({name: values[1:] for name, values in seconds.items()})


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
