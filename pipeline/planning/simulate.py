"""Simulated scheduling: tasks on slots, one dispatcher, one shared storage. Pure: numbers in, numbers out.

A slot takes the next task of the list as soon as it is free and the dispatcher has come to it. A task reads, computes
and writes; all that read or write share the storage's bandwidth evenly, none above its own link.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes
    ----------
    seconds : float
        Of computing.
    reads, writes : float
        Bytes from and to the storage.
    """

    seconds: float
    reads: float = 0.0
    writes: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What tasks share.

    Attributes
    ----------
    rate : float
        Tasks that the dispatcher hands out in a second.
    storage : float
        Bytes a second of the storage, over all that use it.
    link : float
        Bytes a second of one task.
    """

    rate: float = math.inf
    storage: float = math.inf
    link: float = math.inf


@dataclass(frozen=True)
class Schedule:
    """What came of it.

    Attributes
    ----------
    seconds : float
        Until the last task has ended.
    busy : float
        Seconds of computing, over all slots.
    moving : float
        Seconds that tasks spent on the storage, over all slots.
    idle : float
        Slot seconds without a task: waiting for the dispatcher, or for the others to end.
    ends : tuple of float
        When each task ended, in the order of the list.
    """

    seconds: float
    busy: float
    moving: float
    idle: float
    ends: tuple[float, ...]

    @property
    def used(self) -> float:
        """Share of the slots' time that went into computing, in [0, 1]."""
        total = self.busy + self.moving + self.idle
        return self.busy / total if total else 1.0


NO_LIMITS = Limits()


def schedule(tasks: Sequence[Task], slots: int, limits: Limits = NO_LIMITS) -> Schedule:
    """Run tasks in the order of the list on equal slots, event by event.

    Without limits n tasks of t seconds on k slots take ⌈n / k⌉ t.

    Parameters
    ----------
    tasks : sequence of Task
    slots : int
        ≥ 1.
    limits : Limits

    Raises
    ------
    ValueError
        For no slot, a limit that is not above 0, or a negative task.
    """
    if slots < 1:
        raise ValueError(f"slots must be >= 1, got {slots}")
    for name in ("rate", "storage", "link"):
        if not getattr(limits, name) > 0:
            raise ValueError(f"{name} must be > 0, got {getattr(limits, name)}")
    for task in tasks:
        if min(task.seconds, task.reads, task.writes) < 0 or math.isnan(task.seconds + task.reads + task.writes):
            raise ValueError(f"a task must not be negative, got {task}")
    return _Simulation(tasks, slots, limits).run()


def makespan(seconds: Iterable[float], slots: int) -> float:
    """Return when the last of some tasks ends that are taken in order by equal slots."""
    free = [0.0] * slots
    last = 0.0
    for one in seconds:
        end = heapq.heappop(free) + one
        last = max(last, end)
        heapq.heappush(free, end)
    return last


class _Storage:
    """Transfers that share a bandwidth evenly, in virtual time: V grows by what each of them has got so far."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._ends: list[tuple[float, int]] = []
        self._virtual = self._now = 0.0

    def _speed(self) -> float:
        return min(self._limits.link, self._limits.storage / len(self._ends))

    def _advance(self, now: float) -> None:
        if self._ends and now > self._now:
            self._virtual += (now - self._now) * self._speed()
        self._now = now

    def add(self, now: float, size: float, number: int) -> None:
        self._advance(now)
        heapq.heappush(self._ends, (self._virtual + size, number))

    def next_end(self) -> float:
        if not self._ends:
            return math.inf
        left = self._ends[0][0] - self._virtual
        return self._now + max(left, 0.0) / self._speed()

    def pop(self, now: float) -> int:
        self._advance(now)
        end, number = heapq.heappop(self._ends)
        self._virtual = max(self._virtual, end)  # sums of floats fall short of it by a rounding
        return number


class _Simulation:
    def __init__(self, tasks: Sequence[Task], slots: int, limits: Limits) -> None:
        self._tasks, self._slots, self._limits = tasks, slots, limits
        self._unlimited = math.isinf(limits.storage) and math.isinf(limits.link)
        self._storage = _Storage(limits)
        self._computing: list[tuple[float, int]] = []
        self._ends = [0.0] * len(tasks)
        self._began: dict[int, float] = {}  # of the transfer that a task is in
        self._written: set[int] = set()
        self._busy = self._moving = 0.0
        self._free, self._next, self._handed = slots, 0, 0.0

    def run(self) -> Schedule:
        now, left = 0.0, len(self._tasks)
        while left:
            if self._next < len(self._tasks) and self._free:
                dispatch = max(now, self._handed)
            else:
                dispatch = math.inf
            computed = self._computing[0][0] if self._computing else math.inf
            moved = self._storage.next_end()
            now = min(dispatch, computed, moved)
            if now == dispatch:
                self._dispatch(now)
            elif now == moved:
                left -= self._moved(now)
            else:
                _, number = heapq.heappop(self._computing)
                left -= self._move(now, number, self._tasks[number].writes, writing=True)
        seconds = max(self._ends, default=0.0)
        idle = max(self._slots * seconds - self._busy - self._moving, 0.0)
        return Schedule(seconds, self._busy, self._moving, idle, tuple(self._ends))

    def _dispatch(self, now: float) -> None:
        number = self._next
        self._next += 1
        self._free -= 1
        self._handed = now + 1 / self._limits.rate
        self._move(now, number, self._tasks[number].reads, writing=False)

    def _move(self, now: float, number: int, size: float, *, writing: bool) -> int:
        """Begin a transfer; one of nothing is over at once. Return how many tasks have ended by it."""
        if writing:
            self._written.add(number)
        if size and not self._unlimited:
            self._began[number] = now
            self._storage.add(now, size, number)
            return 0
        return self._after(now, number)

    def _moved(self, now: float) -> int:
        number = self._storage.pop(now)
        self._moving += now - self._began.pop(number)
        return self._after(now, number)

    def _after(self, now: float, number: int) -> int:
        if number in self._written:
            self._ends[number] = now
            self._free += 1
            return 1
        seconds = self._tasks[number].seconds
        self._busy += seconds
        heapq.heappush(self._computing, (now + seconds, number))
        return 0


def ring_seconds(size: float, workers: int, bandwidth: float, latency: float = 0.0) -> float:
    """Return the seconds of a ring all-reduce: 2 (n − 1) / n · size / bandwidth + 2 (n − 1) · latency.

    Parameters
    ----------
    size : float
        Bytes of the gradients.
    workers : int
        n; 1 needs none.
    bandwidth : float
        Bytes a second of the slowest link of the ring.
    latency : float
        Seconds of one message.
    """
    if workers <= 1:
        return 0.0
    return 2 * (workers - 1) / workers * size / bandwidth + 2 * (workers - 1) * latency
