"""How fast things go: as calibrated, as recorded by former runs, or as described; and what starting takes."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.planning.nets import NetSize
from pipeline.planning.teachers import TeacherSize

BACKWARD = 2.0  # a backward pass over a forward pass, in operations: gradients of weights and of activations


@dataclass(frozen=True)
class Starts:
    """Seconds that pass before work begins and after it. What is neither measured nor known of former runs is assumed.

    Attributes
    ----------
    driver : float
        Until a process has imported Ray.
    session : float
        Until a local Ray has started, `driver` included.
    tasks : float
        Until plain tasks work: fresh processes have imported what a worker needs, as many side by side as will be.
    trials : float
        Of Tune, until its first trial works, and at its end.
    group : float
        Until a group of training workers trains.
    result : float
        What the driver does with the result of one trial: Tune's turn, the row, the tracking store.
    report : float
        What an epoch takes besides its steps: metrics, a checkpoint on its way.
    picture : float
        What the first picture takes longer than the others.
    matrix, panel : float
        Of a picture of a matrix between classes, and of any other panel of one.
    register : float
        Export and registration of the student.
    """

    driver: float = 2.0
    session: float = 10.0
    tasks: float = 8.0
    trials: float = 14.0
    group: float = 16.0
    result: float = 0.1
    report: float = 0.05
    picture: float = 1.0
    matrix: float = 0.6
    panel: float = 0.3
    register: float = 6.0


def derived(tried: Mapping[str, float]) -> dict[str, float]:
    """Return starts from what a rehearsal measured: those of Tune and of Train by what they start one after the other.

    Tune is imported by the driver, then a trial's process begins, imports Tune, too, and what a worker needs. Train is
    imported by the driver; a controller's process begins and imports it, too; then a process begins by which workers
    meet, and the workers, which import what they need. That these take each other's processors is not in it.

    Parameters
    ----------
    tried : mapping of str to float
        See `pipeline.planning.rehearsal.starts`; what is not in it is assumed.
    """
    assumed = Starts()
    found = {"driver": tried.get("driver", assumed.driver)}
    if "session" in tried:
        found["session"] = found["driver"] + tried["session"]
    if "tasks" in tried:
        found["tasks"] = tried["tasks"]
    if "train" in tried:
        process, imports, tune = tried["process"], tried["imports"], tried["tune"]
        train = tune + tried["train"]  # which was imported after the other, and needs it
        found["trials"] = tune + process + imports
        found["group"] = train + (process + train) + process + (process + imports)
    if "register" in tried:
        found["register"] = tried["register"]
    return found


@dataclass(frozen=True)
class Rates:
    """Throughputs on the cluster that the plan is for.

    Attributes
    ----------
    origin : {"calibrated", "recorded", "described", "none"}
    forward : mapping of str to float
        Seconds an image, in batches of the assessment, by `TeacherSize.key`.
    points : tuple of (float, float)
        Operations of an image, and operations a second achieved, rising: what other teachers are judged by.
    flops : float or None
        Operations a second of a device, where nothing was measured.
    load : float
        Seconds to load a teacher.
    score : float
        Seconds to score a teacher, an image and a feature.
    fit : (float, float, int) or None
        Seconds, images and width of one fit of the stage select.
    wide : (float, int) or None
        Seconds and width of the widest fit that was measured, over as many images.
    steps : mapping of str to float
        Seconds of a training step on one worker, by what is trained: ``taught``, ``labels``, ``component``.
    synchronised : bool
        Whether `steps` include what workers say to each other.
    opening : float
        Seconds until the source gives its first images.
    decode : float or None
        Seconds to read an image from the source.
    encoded : float or None
        Mean bytes of an image as an encoded table keeps it.
    resident : int or None
        Bytes of a worker process before it loads anything.
    starts : Starts
    besides : mapping of str to float
        By stage: all that a former run took besides its work, the start of Ray left out; instead of `starts`.
    whole : tuple of str
        Stages whose `besides` are all that they took.
    disk : float
        Bytes a second of the run folder's disk.
    notes : tuple of str
    """

    origin: str = "none"
    forward: Mapping[str, float] = field(default_factory=dict)
    points: tuple[tuple[float, float], ...] = ()
    flops: float | None = None
    load: float = 0.05
    score: float = 0.0
    fit: tuple[float, float, int] | None = None
    wide: tuple[float, int] | None = None
    steps: Mapping[str, float] = field(default_factory=dict)
    synchronised: bool = False
    opening: float = 0.0
    decode: float | None = None
    encoded: float | None = None
    resident: int | None = None
    starts: Starts = Starts()
    besides: Mapping[str, float] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    disk: float = 5e8
    notes: tuple[str, ...] = ()

    def look(self, teacher: TeacherSize) -> float | None:
        """Return the seconds of a teacher's forward pass over one image; None where nothing tells."""
        if teacher.key in self.forward:
            return self.forward[teacher.key]
        return None if teacher.net is None else self.forward_of(teacher.net)

    def forward_of(self, net: NetSize) -> float | None:
        """Return the seconds of a net's forward pass over one image, by its operations."""
        if net.flops is None:
            return None
        achieved = achieved_at(self.points, net.flops) if self.points else self.flops
        return None if achieved is None else net.flops / achieved

    def step(self, kind: str, net: NetSize, images: float) -> float | None:
        """Return the seconds of a training step on one worker with so many images."""
        if kind in self.steps:
            return self.steps[kind]
        once = self.forward_of(net)
        return None if once is None else (1 + BACKWARD) * once * images

    def a_fit(self, images: int, width: int) -> float | None:
        """Return the seconds of one held-out fit.

        Between the two widths that were measured by a power of the width; beyond them with its square, which features
        wider than there are images do not reach: they are compared within the span of the images. In proportion to the
        images.
        """
        if self.fit is None:
            return None
        seconds, known, least = self.fit
        most, reached = (seconds, least) if self.wide is None else self.wide
        if reached > least and width < reached:
            power = math.log(most / seconds) / math.log(reached / least)
            once = seconds * (max(width, least) / least) ** power
        else:
            once = most * max(min(width, images) / min(reached, known), 1.0) ** 2
        return once * images / known

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def achieved_at(points: tuple[tuple[float, float], ...], flops: float) -> float:
    """Return the operations a second that a net of so many operations an image achieves.

    Between two measured nets in proportion to the logarithms of their operations; beyond them as the nearest one.

    Parameters
    ----------
    points
        At least one, see `Rates.points`.
    flops
        > 0.
    """
    places = [one for one, _ in points]
    right = bisect.bisect_left(places, flops)
    if right == 0:
        return points[0][1]
    if right == len(points):
        return points[-1][1]
    (low, slow), (high, fast) = points[right - 1], points[right]
    part = 1.0 if high == low else math.log(flops / low) / math.log(high / low)
    return math.exp((1 - part) * math.log(slow) + part * math.log(fast))


def points_of(measured: Mapping[str, float], teachers: Mapping[str, NetSize]) -> tuple[tuple[float, float], ...]:
    """Return operations and operations a second of the architectures whose seconds an image are known."""
    found = {}
    for key, seconds in measured.items():
        net = teachers.get(key)
        if net is not None and net.flops and seconds > 0:
            found[net.flops] = net.flops / seconds
    return tuple(sorted(found.items()))
