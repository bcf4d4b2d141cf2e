"""What each stage has to do: images for teachers, fits, trainings. Counts alone, no seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.assessment.halving import survivors
from pipeline.config import LoopSpec, Settings, TrainResources
from pipeline.engine.objectives import wants
from pipeline.errors import ConfigError
from pipeline.models.spec import StudentSpec
from pipeline.planning.described import Cluster
from pipeline.planning.facts import LABELLED, TAUGHT, Facts, on_first_rung
from pipeline.planning.nets import NetSize, measure_net
from pipeline.planning.teachers import TeacherSize

BLOCK = 4096  # images of one block over the training images, as in `pipeline.stages.speaking`
JUDGED = 5000  # labelled images that sets of teachers are judged on at most, as in `pipeline.stages.select`


@dataclass(frozen=True)
class Rung:
    """One rung of the search: how many teachers see how many images that they have not seen before."""

    teachers: int
    images: int


@dataclass(frozen=True)
class Training:
    """Trainings of one kind.

    Attributes
    ----------
    name : str
        As the stage calls it.
    kind : {"taught", "labels", "component"}
    arms : int
    net : NetSize
        Of what is trained.
    loop : LoopSpec
    live : tuple of TeacherSize
        Teachers that look at every image of a step.
    """

    name: str
    kind: str
    arms: int
    net: NetSize
    loop: LoopSpec
    live: tuple[TeacherSize, ...] = ()

    def images(self, facts: Facts) -> int:
        """Return the images of one step, over all workers."""
        labelled = self.loop.labelled_batch if facts.count("train_labelled") else 0
        return labelled + (0 if self.kind == "labels" else self.loop.batch_size)

    def steps(self, facts: Facts) -> int:
        """Return the steps of an epoch."""
        return math.ceil(facts.count(*TAUGHT) / self.loop.batch_size)


@dataclass(frozen=True)
class Work:
    """What the stages have to do.

    Attributes
    ----------
    facts : Facts
    teachers : tuple of TeacherSize
        Those that the assessment may run.
    candidates : int
        How many of them are run.
    rungs : tuple of Rung
    faculty : tuple of TeacherSize
        Those that are chosen; before that is known, as many as there may be, the most costly ones.
    assumed : bool
        Whether the faculty is a guess.
    views : int
    raw : bool
        Whether logits and features of the training images are kept.
    speakers : mapping of str to tuple
        By stage the teachers that have to look at the training images.
    fits : tuple of (int, int)
        How many fits the stage select does, and of how many teachers each.
    trainings : mapping of str to tuple
        By stage.
    tested : tuple of TeacherSize
        Those that look at the test images (the control `ensemble`).
    """

    facts: Facts
    teachers: tuple[TeacherSize, ...]
    candidates: int
    rungs: tuple[Rung, ...]
    faculty: tuple[TeacherSize, ...]
    assumed: bool
    views: int
    raw: bool
    speakers: Mapping[str, tuple[TeacherSize, ...]]
    fits: tuple[tuple[int, int], ...]
    trainings: Mapping[str, tuple[Training, ...]]
    tested: tuple[TeacherSize, ...] = ()


def work_of(
    settings: Settings,
    facts: Facts,
    teachers: Sequence[TeacherSize],
    nets: Mapping[str, NetSize],
    chosen: Sequence[str] | None,
) -> Work:
    """Count what the stages have to do.

    Parameters
    ----------
    settings : Settings
    facts : Facts
    teachers : sequence of TeacherSize
        Of the whole zoo.
    nets : mapping of str to NetSize
        ``student`` and ``component``, see `net_sizes`; and ``finetune`` where that control is wanted.
    chosen : sequence of str, optional
        The faculty, where the stage select has finished.
    """
    usable = [teacher for teacher in teachers if teacher.net is not None]
    candidates, rungs = _search(settings, facts, len(usable))
    known = {teacher.name: teacher for teacher in usable}
    if chosen is None:
        faculty = _guessed(settings, usable)
    else:
        faculty = tuple(known[name] for name in chosen if name in known)
    raw, live = _raw(settings), _live(settings)
    speakers = {"amalgamate": faculty}
    others = _controls(settings, facts, faculty)
    if "random_set" in others:
        speakers["evaluate"] = faculty
    return Work(
        facts=facts,
        teachers=tuple(usable),
        candidates=candidates,
        rungs=rungs,
        faculty=faculty,
        assumed=chosen is None,
        views=settings.distill.augment.views or 1,
        raw=raw,
        speakers=speakers,
        fits=_fits(settings, facts, rungs, faculty),
        trainings=_trainings(settings, facts, faculty, faculty if live else (), nets, others),
        tested=faculty if "ensemble" in others else (),
    )


def net_sizes(settings: Settings, facts: Facts) -> dict[str, NetSize]:
    """Return the sizes of the student and of the component nets.

    Raises
    ------
    ConfigError
        When one can't be built.
    """
    subtasks = settings.task.subtasks
    heads = facts.classes if subtasks is None else sum(map(len, subtasks.values()))
    found = {"student": student_size(settings.distill.student, heads, facts.shape)}
    if settings.amalgamate.mode == "components":
        spec = settings.amalgamate.components.student or settings.distill.student
        widest = facts.classes if subtasks is None else max(map(len, subtasks.values()))
        found["component"] = student_size(spec, widest, facts.shape)
    return found


def student_size(spec: StudentSpec, classes: int, shape: tuple[int, int, int]) -> NetSize:
    """Measure a student on the meta device; where it can't be built there, with weights.

    Raises
    ------
    ConfigError
        When it can't be built at all.
    """
    from pipeline.models.student import build_student

    def measured() -> NetSize:
        student = build_student(spec, classes, shape)
        pre = spec.preprocessing
        own = shape if pre is None else (pre.channels, *pre.side(shape))
        channels = student.preprocessing.spec.channels
        return measure_net(student.net, (channels, *own[1:]), training=True)

    try:
        with torch.device("meta"):
            return measured()
    except Exception:  # a net that looks at values; told properly below if it is no net at all
        return measured()


def workers_of(resources: TrainResources, cluster: Cluster) -> int:
    """Return how many training workers there will be; 0: in this process."""
    least, most = resources.counts[0], resources.counts[-1]
    if least == most:
        return most
    room = cluster.slots(worker_resources(resources))
    return most if room is None else min(max(room, least), most)


def worker_resources(resources: TrainResources) -> dict[str, float]:
    """Return what each training worker takes, as `pipeline.stages.training` asks for it."""
    gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
    return {"CPU": resources.cpus_per_worker} | gpus


def _search(settings: Settings, facts: Facts, count: int) -> tuple[int, tuple[Rung, ...]]:
    search, labelled = settings.assess.search, facts.count(*LABELLED)
    if search.class_level is not None:
        count = min(count, max(math.ceil(search.class_level.keep * count), search.least))
    if not labelled:
        return count, (Rung(count, min(settings.assess.unlabelled, facts.count("train_unlabelled"))),)
    climbing = survivors(count, rungs=len(search.rungs), eta=search.eta, least=search.least)
    if not any(more < count for more in climbing):
        return count, (Rung(count, labelled),)
    judged = [facts.count(split) for split in ("train_labelled", "probe")]
    seen = [sum(on_first_rung(one, facts.classes, share) for one in judged) for share in search.rungs]
    seen[-1] = labelled  # validation images are looked at last
    new = [now - before for now, before in zip(seen, [0, *seen[:-1]], strict=True)]
    return count, tuple(Rung(many, images) for many, images in zip((count, *climbing), new, strict=True))


def _guessed(settings: Settings, usable: Sequence[TeacherSize]) -> tuple[TeacherSize, ...]:
    """Return the faculty before it is known: those that are named, or the most costly ones of each other's size."""
    select = settings.select
    if select.teachers == "all":
        return tuple(usable)
    if select.teachers is not None:
        return tuple(teacher for teacher in usable if teacher.name in select.teachers)
    ordered = sorted(usable, key=lambda teacher: -((teacher.net.flops if teacher.net else None) or 0.0))
    found: list[TeacherSize] = []
    size = 0
    for teacher in ordered:
        parameters = teacher.net.parameters if teacher.net else 0
        if len(found) < select.max_teachers and size + parameters <= (select.max_params or math.inf):
            found.append(teacher)
            size += parameters
    return tuple(found)


def _needs(settings: Settings) -> frozenset[str]:
    try:
        return wants(settings.distill.objective)
    except ConfigError:  # told of by the run itself
        return frozenset()


def _raw(settings: Settings) -> bool:
    from pipeline.stages.together import choice_of

    if settings.amalgamate.mode == "components" or {"said.logits", "said.features", "labelled"} & _needs(settings):
        return True
    try:
        return choice_of(settings) == "together"
    except ConfigError:
        return True


def _live(settings: Settings) -> bool:
    return "live" in _needs(settings) or settings.distill.flow is not None


def _fits(
    settings: Settings, facts: Facts, rungs: Sequence[Rung], faculty: Sequence[TeacherSize]
) -> tuple[tuple[int, int], ...]:
    """Return (how many, of how many teachers) for the fits of `pipeline.assessment.selection.select_set`."""
    select = settings.select
    if select.teachers is not None or select.by != "together" or not facts.count(*LABELLED):
        return ()
    usable, tried = rungs[-1].teachers, min(select.consider, rungs[-1].teachers)
    most = min(select.max_teachers, len(faculty) or 1, tried)
    # Rounds end with a full set, or one later: that one finds that nobody adds anything.
    full = most == select.max_teachers
    joint = [(tried - members, members + 1) for members in range(1, most + (not full)) if tried > members]
    return ((usable + 1, 1), *joint)


def _controls(settings: Settings, facts: Facts, faculty: Sequence[TeacherSize]) -> tuple[str, ...]:
    """Return the controls that can apply."""
    labels = bool(facts.count("train_labelled"))
    impossible: set[str] = set()
    if not faculty:
        impossible |= {"best_single", "random_set", "average", "concatenated", "ensemble"}
    if len(faculty) < 2:
        impossible |= {"average", "best_single"}
    if not labels:
        impossible |= {"no_teacher", "finetune", "concatenated"}
    if settings.amalgamate.mode == "components":
        impossible |= {"average"}
    return tuple(name for name in settings.evaluate.controls if name not in impossible)


def _trainings(
    settings: Settings,
    facts: Facts,
    faculty: tuple[TeacherSize, ...],
    live: tuple[TeacherSize, ...],
    nets: Mapping[str, NetSize],
    controls: Sequence[str],
) -> dict[str, tuple[Training, ...]]:
    distill, seeds, labels = settings.distill, settings.evaluate.seeds, bool(facts.count("train_labelled"))
    taught = bool(faculty)
    student = Training("faculty", "taught" if taught else "labels", 1, nets["student"], distill.loop, live)
    alone = Training("no_teacher", "labels", 1, nets["student"], distill.loop)
    found: dict[str, tuple[Training, ...]] = {}
    if settings.amalgamate.mode == "components" and taught:
        loop = settings.amalgamate.components.loop or distill.loop
        count = len(settings.task.subtasks or {"": None})
        found["amalgamate"] = (Training("component", "component", count, nets["component"], loop, faculty),)
    guarded = distill.guard is not None and labels and taught
    found["distill"] = (student, alone) if guarded else (student,)
    rest = [replace(student, arms=seeds - 1)]
    for name in controls:
        if name == "no_teacher" and taught:
            rest.append(replace(alone, arms=seeds - (1 if guarded else 0)))
        elif name == "finetune":
            rest.append(replace(alone, name=name, arms=seeds, net=nets.get("finetune", nets["student"])))
        elif name in ("best_single", "random_set", "average", "concatenated"):
            rest.append(replace(student, name=name, arms=seeds))
    found["evaluate"] = tuple(one for one in rest if one.arms > 0 and facts.count("test"))
    return found


def shards_of(work: Work, settings: Settings) -> dict[str, list[int]]:
    """Return the images of each shard that the cache gets of one teacher of the faculty, by stage."""
    total = work.facts.count(*TAUGHT)
    blocks = [min(BLOCK, total - start) for start in range(0, total, BLOCK)]
    first = blocks[0] - work.facts.count("train_labelled") if blocks else 0  # of which the assessment has kept the view
    clean = [max(first, 0), *blocks[1:]] if work.facts.count(*LABELLED) else blocks
    return {"assess": [rung.images for rung in work.rungs], "amalgamate": clean + blocks * (work.views - 1)}


def plain(work: Work) -> dict[str, Any]:
    """Return the counts as plain values."""
    return {
        "classes": work.facts.classes,
        "images": dict(work.facts.images),
        "teachers": len(work.teachers),
        "candidates": work.candidates,
        "rungs": [{"teachers": rung.teachers, "images": rung.images} for rung in work.rungs],
        "faculty": [teacher.name for teacher in work.faculty],
        "faculty_assumed": work.assumed,
        "trainings": {
            stage: [{"name": one.name, "kind": one.kind, "arms": one.arms, "epochs": one.loop.epochs} for one in found]
            for stage, found in work.trainings.items()
        },
    }
