"""Half a minute of the run's own work on this machine: forward passes, scores, training steps, images, starts."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.cluster.spec import ClusterSpec
from pipeline.config import Settings
from pipeline.errors import FacultyError
from pipeline.models.teacher import Teacher, predict
from pipeline.planning import rehearsal
from pipeline.planning.facts import LABELLED, Facts
from pipeline.planning.rates import Rates, Starts, derived, points_of
from pipeline.planning.sizes import widths_of
from pipeline.planning.steps import step_seconds
from pipeline.planning.teachers import TeacherSize
from pipeline.planning.work import JUDGED, Work, workers_of

SECONDS = 30.0
_TEACHERS = 8  # architectures that are tried at most
_SHARES = {"images": 0.05, "teachers": 0.15, "steps": 0.1, "scores": 0.05, "pictures": 0.05, "starts": 0.6}
_PATIENCE = 10.0  # seconds beyond the time, after which Ray is no longer waited for
PARTS = tuple(_SHARES)
_SCORED = 2000  # images that a score is tried on at most
_WIDEST = 4e6  # features over all images of a fit that is tried: seconds for more
_DECODED = 2048
# Of what former runs tell, see `pipeline.stages.base.Run.timed`.
_KNOWN = ("session", "trials", "tasks", "group", "register")

Load = Callable[[str], Teacher]


@dataclass
class _Clock:
    """What is left of the time; the parts share it out, and what one leaves is the next one's."""

    deadline: float

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def share(self, part: str) -> float:
        """Return the seconds that a part may take."""
        names = list(_SHARES)
        coming = sum(_SHARES[name] for name in names[names.index(part) :])
        return max(self.left(), 0.0) * _SHARES[part] / coming


def calibrate(
    settings: Settings,
    work: Work,
    load: Load,
    *,
    seconds: float = SECONDS,
    parts: Collection[str] = PARTS,
    former: Mapping[str, float] | None = None,
    advance: Callable[[int, str], None] = lambda done, note: None,
) -> Rates:
    """Measure on this machine what the plan needs to know.

    What takes longer than its share of the time is left out or tried on less, and told in the notes.

    Parameters
    ----------
    settings : Settings
    work : Work
        Of which the stages are to come.
    load : callable
        Gives a teacher by name, on the device that it will work on.
    seconds : float
        In all; a piece of work that has begun is not cut off.
    parts : collection of str
        Which of `PARTS` to measure.
    former : mapping of str to float, optional
        What starting took in former runs, see `pipeline.planning.recalled.recalled`.
    advance : callable
        Told of every part that is over.
    """
    clock = _Clock(time.perf_counter() + seconds)
    notes: list[str] = []
    found, known = Rates(origin="calibrated"), dict(former or {})
    starts: dict[str, float] = {}
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "images": lambda: _images(settings, clock),
        "teachers": lambda: _teachers(settings, work, load, clock, notes),
        "steps": lambda: {"steps": _steps(settings, work, clock, notes)},
        "scores": lambda: _scores(settings, work, clock, notes),
    }
    for name in PARTS:
        if name not in parts:
            continue
        if name == "starts":
            begun, resident = _starts(clock, settings, work.facts, known, notes)
            starts |= begun
            found = replace(found, resident=resident)
        elif name == "pictures":
            starts |= _pictures(settings, work)
        else:
            found = replace(found, **measures[name]())
        advance(1, name)
    found = replace(found, starts=replace(Starts(), **starts))
    sizes = {teacher.key: teacher.net for teacher in work.teachers if teacher.net is not None}
    return replace(found, points=points_of(found.forward, sizes), notes=tuple(notes))


def sample(teachers: Sequence[TeacherSize], most: int = _TEACHERS) -> list[TeacherSize]:
    """Return teachers of different architectures, evenly from the cheapest to the most costly, both ends included."""
    kinds: dict[str, TeacherSize] = {}
    for teacher in teachers:
        kinds.setdefault(teacher.key, teacher)
    ordered = sorted(kinds.values(), key=lambda one: (one.net.flops if one.net else None) or 0.0)
    if len(ordered) <= most:
        return ordered
    return [ordered[round(place * (len(ordered) - 1) / (most - 1))] for place in range(most)]


def _starts(
    clock: _Clock, settings: Settings, facts: Facts, former: Mapping[str, float], notes: list[str]
) -> tuple[dict[str, float], int | None]:
    """Return what starting takes, and the bytes of a worker that has begun: as former runs had it, or as it is tried.

    An existing cluster is not joined for it: its workers begin as those of a local Ray do.
    """
    spec, resident = settings.cluster, former.get("resident", 0.0)
    found = {kind: former[kind] for kind in _KNOWN if kind in former}
    if not rehearsal.known(former):
        beside = max(1, min(workers_of(settings.distill.resources, _here()), os.cpu_count() or 1))
        local = spec if spec.local else ClusterSpec(num_cpus=beside)
        student = settings.distill.student if settings.registration.enabled and "register" not in former else None
        limit = max(clock.left(), 0.0) + _PATIENCE
        tried = rehearsal.starts(local, beside, student, facts.classes, facts.shape, limit)
        if "train" not in tried:
            notes.append("starting Ray and its first workers took longer than can be tried: it is partly assumed")
        found = derived(tried) | found
        resident = resident or tried.get("resident", 0.0)
    return found, int(resident) or None


def _here() -> Any:
    from pipeline.planning.described import this_machine

    return this_machine(ClusterSpec())


def _pictures(settings: Settings, work: Work) -> dict[str, float]:
    """Return what pictures take, where any are drawn."""
    if not settings.tracking.enabled:
        return {}
    own = sorted(teacher.classes for teacher in work.teachers if teacher.classes is not None)
    usual = own[len(own) // 2] if own else work.facts.classes
    drawn = rehearsal.pictures(work.facts.classes, usual, max(work.candidates, 1))
    return {"picture": drawn["first"], "matrix": drawn["matrix"], "panel": drawn["panel"]}


def _images(settings: Settings, clock: _Clock) -> dict[str, Any]:
    """Return how long the source takes to open and for an image, read as `ingest` reads it; and an image's mean bytes.

    The first images also take what opening takes: an image's seconds are those of the images after them.
    """
    from pipeline.data.ingest import try_reading

    try:
        with tempfile.TemporaryDirectory(prefix="faculty-plan-") as folder:
            read = try_reading(
                settings.task.source, settings.task.image, Path(folder), seconds=clock.share("images"), most=_DECODED
            )
    except (FacultyError, OSError):
        return {}
    if read is None:
        return {}
    return {"opening": read.opening, "decode": read.seconds, "encoded": read.size}


def _teachers(settings: Settings, work: Work, load: Load, clock: _Clock, notes: list[str]) -> dict[str, Any]:
    """Return seconds an image by architecture, in batches of the assessment, and the seconds to load a teacher."""
    assess = settings.assess
    chosen, limit = sample(work.teachers), clock.share("teachers")
    shape, forward, loading = work.facts.shape, {}, []
    with threads(assess.resources.cpus):
        for number, teacher in enumerate(chosen):
            share = limit * (number + 1) / len(chosen)
            if clock.left() < 0:
                notes.append(f"no time was left for {len(chosen) - number} of {len(chosen)} architectures")
                break
            try:
                began = time.perf_counter()
                net = load(teacher.name)
                loading.append(time.perf_counter() - began)
                forward[teacher.key] = look_seconds(
                    net, shape, batch_size=assess.batch_size, precision=assess.precision, limit=share / (number + 1)
                )
            except (FacultyError, RuntimeError) as error:
                notes.append(f"teacher {teacher.name!r} can't be tried ({str(error).splitlines()[0][:120]})")
    return {"forward": forward} | ({"load": statistics.median(loading)} if loading else {})


def look_seconds(
    teacher: Teacher, shape: tuple[int, int, int], *, batch_size: int, precision: Any, limit: float
) -> float:
    """Return the seconds that a teacher takes an image, in batches as large as wanted, or as the time allows."""
    from pipeline.models.precision import choose_autocast

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, *shape), generator=generator, dtype=torch.uint8)
    few = images[: min(4, batch_size)]
    began = time.perf_counter()
    predict(teacher, [few])
    first = (time.perf_counter() - began) / len(few)
    autocast = None
    if teacher.device.type == "cuda":
        autocast = choose_autocast(teacher, images, precision)
    count = max(len(few), min(batch_size, int(limit / 3 / max(first, 1e-9))))
    taken: list[float] = []
    stop = time.perf_counter() + limit / 2
    while not taken or (time.perf_counter() < stop and len(taken) < 5):
        began = time.perf_counter()
        predict(teacher, [images[:count]], autocast=autocast)  # it waits for the device
        taken.append((time.perf_counter() - began) / count)
    return min(taken) if len(taken) < 3 else statistics.median(taken)


def _scores(settings: Settings, work: Work, clock: _Clock, notes: list[str]) -> dict[str, Any]:
    """Return the seconds to score a teacher, an image and a feature; and seconds, images and width of one fit."""
    from pipeline.amalgamation.together import together_held_out
    from pipeline.assessment.probe import Said, score_labelled
    from pipeline.transport.bridge import fit_bridge

    facts = work.facts
    widths = sorted((two for two in map(widths_of, work.teachers) if two is not None), key=lambda two: two[1])
    labelled = facts.count(*LABELLED)
    if not widths or not labelled:
        return {}
    if clock.left() < 0:
        notes.append("no time was left for scores: they count nothing")
        return {}
    classes, width = widths[len(widths) // 2]
    count = min(labelled, max(_SCORED, 3 * facts.classes))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, width, generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    labels = torch.arange(count) % facts.classes
    fitted = torch.arange(count) < max(count // 2, facts.classes)
    said = Said(logits, features, labels, fitted, torch.randn(classes, width, generator=generator), 1)
    assess, judged = settings.assess, min(JUDGED, count)

    def score() -> None:
        score_labelled(said, facts.classes, scores=assess.scores, neighbours=assess.neighbours)
        fit_bridge(
            assess.bridge.kind,
            logits=logits[fitted],
            features=features[fitted],
            labels=labels[fitted],
            num_classes=facts.classes,
            classifier_weight=said.classifier_weight,
        )

    members = max((one for many, one in work.fits if many), default=1)

    def fit(members: int = 1) -> None:
        together_held_out([features[:judged]] * members, labels[:judged], facts.classes)

    try:
        with threads(assess.resources.cpus):
            scored = _best_of(score, clock.share("scores") / 2)
        # By itself first: where others keep the processors busy, threads that wait for each other take many times as
        # long, and may not be tried.
        with threads(1.0):
            once = _best_of(fit, clock.share("scores") / 2)
            wide = None
            if members > 1 and clock.left() > 0 and judged * width * members <= _WIDEST:
                wide = (_best_of(lambda: fit(members), clock.share("scores") / 2), width * members)
        if clock.left() > 0:
            once = min(once, _best_of(fit, clock.share("scores")))
    except (ValueError, RuntimeError) as error:  # too few images of a class, say: told when it runs
        notes.append(f"scores can't be tried ({str(error).splitlines()[0][:120]})")
        return {}
    found: dict[str, Any] = {"score": scored / (count * width), "fit": (once, judged, width)}
    return found if wide is None else found | {"wide": (max(wide[0], once), wide[1])}


def _best_of(work: Callable[[], object], limit: float, most: int = 5) -> float:
    """Return the least seconds of a few tries: the first ones also make libraries ready."""
    taken: list[float] = []
    stop = time.perf_counter() + limit
    while not taken or (len(taken) < most and time.perf_counter() < stop):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _steps(settings: Settings, work: Work, clock: _Clock, notes: list[str]) -> dict[str, float]:
    """Return the seconds of a step on one worker, by what is trained."""
    found: dict[str, float] = {}
    trainings = [one for stage in work.trainings.values() for one in stage]
    kinds: Mapping[str, Any] = {one.kind: one for one in reversed(trainings)}
    workers = max(workers_of(settings.distill.resources, _here()), 1)
    for number, (kind, one) in enumerate(sorted(kinds.items())):
        if clock.left() < 0:
            notes.append(f"no time was left for steps of kind {kind}")
            continue
        limit = clock.share("steps") / (len(kinds) - number)
        cpus = settings.distill.resources.cpus_per_worker if settings.distill.resources.num_workers else None
        try:
            with threads(cpus):
                found[kind] = step_seconds(settings, work, one, workers, limit=limit)
        except (FacultyError, ValueError, RuntimeError) as error:
            notes.append(f"a step of kind {kind} can't be tried ({str(error).splitlines()[0][:120]})")
    return found


@contextmanager
def threads(cpus: float | None) -> Iterator[None]:
    """Let torch use as many threads as Ray would give a process with so many processors; None: as many as it likes."""
    before = torch.get_num_threads()
    if cpus is not None:
        torch.set_num_threads(max(1, min(int(cpus), os.cpu_count() or 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
