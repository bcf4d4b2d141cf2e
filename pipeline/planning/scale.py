"""A run at a scale that no one has at hand, simulated stage by stage. Pure: numbers in, numbers out.

What each stage does is written down here as the stages do it today: how many operations, where (on a GPU, on a
teacher's processors, in the driver alone), and how many bytes it moves. Scheduling is simulated, see
`pipeline.planning.simulate`.

Shapes: N images, D features, C classes of the task, C_t classes of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.assessment.halving import survivors
from pipeline.planning.simulate import Limits, Task, ring_seconds, schedule

_FOLDS, _RIDGES, _PRESS = 5, 8, 13  # of `pipeline.transport.centres.held_out` and `assessment.linear.linear_gain`
_EIGH = 10.0  # operations of a symmetric eigendecomposition, times D³: 9 D³ for the vectors, and what is around it
_SVD = 6.0  # operations of a thin singular value decomposition, times N² D
_BLOCK, _JUDGED = 4096, 5000
_HALF = 2


@dataclass(frozen=True)
class Model:
    """A teacher: operations of a forward pass, bytes of its weights, its widths."""

    flops: float
    weight_bytes: float
    classes: int
    features: int


@dataclass(frozen=True)
class Site:
    """A cluster. What is achieved, not what is promised.

    Attributes
    ----------
    nodes, gpus, cpus : int
        GPUs and processors are of a node.
    memory, gpu_memory, object_store : float
        Bytes of a node, a GPU, and a node's object store.
    gpu_flops, cpu_flops : float
        Operations a second of a GPU in half precision, and of one processor.
    driver_cpus : float
        Processors' worth that linear algebra in one process gets out of a node.
    storage, link : float
        Bytes a second of the shared storage, and of one process of it.
    network : float
        Bytes a second of a node's network card.
    gpu_link : float
        Bytes a second between GPUs of a node.
    latency : float
        Seconds of a message between workers.
    rate : float
        Trials that Tune hands out and takes back in a second.
    decode : float
        Images of the source that one processor decodes in a second.
    """

    nodes: int
    gpus: int
    cpus: int
    memory: float
    gpu_memory: float
    object_store: float
    gpu_flops: float
    cpu_flops: float
    driver_cpus: float
    storage: float
    link: float
    network: float
    gpu_link: float
    latency: float
    rate: float
    decode: float

    @property
    def all_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Job:
    """A task and how it is run.

    Attributes
    ----------
    images, source_bytes : float
        Of the source, and bytes of one encoded image in it.
    labelled : (int, int, int)
        Images a class: train, probe, validation.
    classes : int
    row_bytes : int
        Of an image as the table stores it.
    student_flops, student_bytes : float
        Of a forward pass, and of its parameters.
    faculty : int
        Teachers that are chosen.
    epochs, batch, labelled_batch : int
    seeds, controls : int
        Trainings of each arm of the evaluation, and controls that train.
    trial_cpus, trial_gpus : float
    rungs : tuple of float
    eta : float
    least, consider : int
    """

    images: float
    source_bytes: float
    labelled: tuple[int, int, int]
    classes: int
    row_bytes: int
    student_flops: float
    student_bytes: float
    faculty: int = 4
    epochs: int = 30
    batch: int = 16384
    labelled_batch: int = 8192
    seeds: int = 3
    controls: int = 2
    trial_cpus: float = 2.0
    trial_gpus: float = 0.25
    rungs: tuple[float, ...] = (0.15, 1.0)
    eta: float = 10.0
    least: int = 16
    consider: int = 32


@dataclass(frozen=True)
class Stage:
    """What a stage costs.

    Attributes
    ----------
    name : str
    seconds : float
    parts : dict of str to float
        Seconds, by what they go into; parts that overlap may sum to more.
    gpu_share : float
        Share of the time that the GPUs compute, over all of them.
    bound : str
        What would have to be faster for the stage to be.
    bytes : dict of str to float
        On the storage, or in memory.
    breaks : tuple of str
        Where it goes past a limit of the site.
    """

    name: str
    seconds: float
    parts: dict[str, float]
    gpu_share: float
    bound: str
    bytes: dict[str, float] = field(default_factory=dict)
    breaks: tuple[str, ...] = ()


def simulate(zoo: Sequence[Model], job: Job, site: Site) -> list[Stage]:
    """Simulate a run of all stages; start-ups of seconds are left out."""
    return [
        ingest(job, site),
        assess(zoo, job, site),
        select(zoo, job, site),
        amalgamate(zoo, job, site),
        *training(job, site),
    ]


def score_flops(N: float, D: float, C: float) -> float:
    """Return the operations of the default scores of one teacher on a processor.

    k-NN 2 N² D; `linear_gain` 2 N D² + 10 D³ and 13 ridges of 2 N D C; `held_out` with its ground cost, see
    `fit_flops`. With N < D the decompositions are of N dimensions.
    """
    width = min(N, D)
    return 2 * N * N * D + 2 * N * D * width + _EIGH * width**3 + _PRESS * 2 * N * width * C + fit_flops(N, D, C)


def fit_flops(N: float, D: float, C: float) -> float:
    """Return the operations of one view that is held out in five folds, `pipeline.transport.centres`.

    A thin SVD of 6 N² D where N < D; then, w = min(N, D), a fold is 2 (4/5) N w² + 10 w³ + 2 N w² / 5 and 8 ridges of
    2 (N / 5) w C.
    """
    width = min(N, D)
    fold = 2 * 0.8 * N * width**2 + _EIGH * width**3 + 0.4 * N * width**2 + _RIDGES * 0.4 * N * width * C
    return (_SVD * N * N * D if N < D else 0.0) + _FOLDS * fold


def ingest(job: Job, site: Site) -> Stage:
    """Simulate ingest: one process decodes on up to eight threads; pixels go to a spool and then into the table."""
    table = job.images * job.row_bytes
    parts = {
        "decoding": job.images / (site.decode * min(8, site.cpus)),
        "reading": job.images * job.source_bytes / site.link,
        "spool and table": 3 * table / site.link,
    }
    # A reader fills the pool of threads while they decode; the table is written after.
    seconds = max(parts["decoding"], parts["reading"] + table / site.link) + 2 * table / site.link
    return Stage("ingest", seconds, parts, 0.0, _largest(parts), {"table": table, "spool": table})


def assess(zoo: Sequence[Model], job: Job, site: Site) -> Stage:
    """Simulate the search: trials share GPUs, score on their own processors, and hand a row to the driver."""
    train, probe, held = (job.classes * each for each in job.labelled)
    climbing = survivors(len(zoo), rungs=len(job.rungs), eta=job.eta, least=job.least)
    slots = site.nodes * min(int(site.cpus / job.trial_cpus), int(site.gpus / job.trial_gpus))
    sharing = max(1, round(1 / job.trial_gpus))
    cpu_flops = job.trial_cpus * site.cpu_flops
    total, gpu, scoring, kept, cached, moved = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    seen = 0.0
    for rung, (share, many) in enumerate(zip(job.rungs, (len(zoo), *climbing), strict=True)):
        judged = share * (train + probe)
        images = judged + (held if rung == len(job.rungs) - 1 else 0.0)
        new, seen = images - seen, images
        tasks = []
        for model in _evenly(zoo, many):
            alone = new * model.flops / site.gpu_flops
            score = score_flops(judged, model.features, job.classes) / cpu_flops
            # Trials that share a GPU: either it is never idle, or they are all at their scores most of the time.
            row = 4 * (model.classes + model.features)
            written = new * (row + row / 2)
            tasks.append(Task(max(alone * sharing, alone + score), reads=model.weight_bytes, writes=written))
            gpu, scoring = gpu + alone, scoring + score
            kept, cached = kept + new * row, cached + new * row / 2
        done = schedule(tasks, slots, Limits(rate=site.rate, storage=site.storage, link=site.link))
        total, moved = total + done.seconds, moved + done.moving / slots
    probe_bytes = sum((train, probe, held)) * (job.row_bytes + 26)
    # Read, concatenated and copied into the object store by the driver; then fetched by every other node.
    spreading = 2 * probe_bytes / site.link + (site.nodes - 1) * probe_bytes / site.network
    handing = (len(zoo) + sum(climbing)) / site.rate
    parts = {
        "forward passes": gpu / site.all_gpus,
        "scores": scoring / slots,
        "storage": moved,
        "driver, a row each": handing,
        "probe to the nodes": spreading,
    }
    seconds = total + spreading
    breaks = []
    if probe_bytes > site.object_store:
        breaks.append(f"the probe ({_gb(probe_bytes)}) is larger than a node's object store ({_gb(site.object_store)})")
    if cached > 50e9:
        breaks.append(f"the cache ({_gb(cached)}) is over the default quota of 50 GB (cache.quota_gb)")
    driver = 2 * probe_bytes
    if driver > site.memory:
        breaks.append(f"the driver holds the probe twice ({_gb(driver)}), a node has {_gb(site.memory)}")
    stored = {"probe, each node": probe_bytes, "outputs in the run folder": kept, "cache": cached}
    return Stage("assess", seconds, parts, gpu / site.all_gpus / seconds, _largest(parts), stored, tuple(breaks))


def select(zoo: Sequence[Model], job: Job, site: Site) -> Stage:
    """Simulate the choice: every fit in the driver, one after the other."""
    climbing = survivors(len(zoo), rungs=len(job.rungs), eta=job.eta, least=job.least)
    judged = min(_JUDGED, job.classes * sum(job.labelled))
    labelled = job.classes * sum(job.labelled)
    usable = _evenly(zoo, climbing[-1] if climbing else len(zoo))
    speed = site.driver_cpus * site.cpu_flops
    alone = sum(fit_flops(judged, model.features, job.classes) for model in usable) / speed
    middle = sorted(model.features for model in usable)[len(usable) // 2]
    tried = min(job.consider, len(usable))
    joint = sum(
        (tried - members) * fit_flops(judged, middle * (members + 1), job.classes) / speed
        for members in range(1, job.faculty + 1)
        if tried > members
    )
    read = sum(4.0 * labelled * (model.classes + model.features) for model in usable)
    parts = {"each alone": alone, "sets": joint, "reading their features": read / site.link}
    seconds = sum(parts.values())
    breaks = (f"{site.all_gpus} GPUs wait for one process for {seconds / 3600:.1f} h",) if seconds > 600 else ()
    return Stage("select", seconds, parts, 0.0, _largest(parts), {"read": read}, breaks)


def amalgamate(zoo: Sequence[Model], job: Job, site: Site) -> Stage:
    """Simulate the faculty over all training images in blocks; then the joining and the common view in the driver."""
    faculty = _evenly(zoo, job.faculty)
    slots = site.nodes * min(int(site.cpus / job.trial_cpus), int(site.gpus / job.trial_gpus))
    sharing = max(1, round(1 / job.trial_gpus))
    blocks = math.ceil(job.images / _BLOCK)
    tasks, gpu, spoken, cached = [], 0.0, 0.0, 0.0
    for model in faculty:
        width = 2 * job.classes + model.classes + model.features
        said, kept = _HALF * width * _BLOCK, _HALF * (model.classes + model.features) * _BLOCK
        alone = _BLOCK * model.flops / site.gpu_flops
        tasks += [Task(alone * sharing, reads=_BLOCK * job.row_bytes, writes=said + kept)] * blocks
        gpu, spoken, cached = gpu + blocks * alone, spoken + blocks * said, cached + blocks * kept
    done = schedule(tasks, slots, Limits(storage=site.storage, link=site.link))
    width = sum(model.features for model in faculty)
    speed = site.driver_cpus * site.cpu_flops
    view = 2 * job.images * (width * min(width, job.classes * job.labelled[0]) + width * job.classes) / speed
    parts = {
        "forward passes": gpu / site.all_gpus,
        "blocks, with reading and writing": done.seconds,
        "joining, in the driver": 2 * spoken / site.link,
        "the common view, in the driver": view + 2 * job.images * width / site.link,
    }
    seconds = done.seconds + parts["joining, in the driver"] + parts["the common view, in the driver"]
    # Each teacher's say in single precision, stacked beside its parts.
    driver = 2 * job.faculty * job.images * job.classes * 4
    breaks = []
    if driver > site.memory:
        breaks.append(
            f"the driver holds what {job.faculty} teachers say of all images twice ({_gb(driver)}), a node has "
            f"{_gb(site.memory)}"
        )
    if cached > 50e9:
        breaks.append(f"the cache ({_gb(cached)}) is over the default quota of 50 GB (cache.quota_gb)")
    bound = _largest({name: value for name, value in parts.items() if name != "forward passes"})
    stored = {"what the faculty says": spoken, "cache": cached, "driver's memory": driver}
    return Stage("amalgamate", seconds, parts, gpu / site.all_gpus / seconds, bound, stored, tuple(breaks))


def training(job: Job, site: Site) -> list[Stage]:
    """Simulate distill and evaluate: data-parallel steps, whose images come from the table as each node caches it."""
    workers = site.all_gpus
    steps = math.ceil(job.images / job.batch)
    taught, alone = _step(job, site, job.batch + job.labelled_batch), _step(job, site, job.labelled_batch)
    table = job.images * job.row_bytes
    # Batches are drawn from all images: every node comes to hold the whole table, if its memory does.
    cached = table <= 0.8 * site.memory
    first = site.nodes * table / site.storage
    again = 0.0 if cached else first
    breaks = () if cached else (f"the table ({_gb(table)}) does not stay in a node's memory ({_gb(site.memory)})",)

    def arm(step: dict[str, float], reads: bool) -> tuple[float, float, float]:
        """Return seconds, seconds of computing, and seconds of reading."""
        epoch = steps * (step["compute"] + step["exchange"])
        reading = (first + (job.epochs - 1) * again) if reads else 0.0
        slow = max(epoch, first if reads else 0.0) + (job.epochs - 1) * max(epoch, again if reads else 0.0)
        return slow, job.epochs * steps * step["compute"], reading

    found = []
    more = job.seeds - 1  # of the student and of the control without teachers, which distill has trained once
    sets = [(taught, True)] * (more + job.seeds * (job.controls - 1))
    for name, arms in (
        ("distill", [(taught, True), (alone, False)]),
        ("evaluate", sets + [(alone, False)] * more),
    ):
        times = [arm(step, reads) for step, reads in arms]
        seconds, compute, reading = (sum(column) for column in zip(*times, strict=True))
        exchange = sum(job.epochs * steps * step["exchange"] for step, _ in arms)
        parts = {"steps": compute, "gradients": exchange, "images from the storage": reading}
        needed = {
            "table": table,
            "images a second, each GPU": (job.batch + job.labelled_batch) / workers / sum(taught.values()),
        }
        found.append(Stage(name, seconds, parts, compute / seconds, _largest(parts), needed, breaks))
    return found


def _step(job: Job, site: Site, images: int) -> dict[str, float]:
    """Return the seconds of a step: three forward passes' worth of operations, then a ring over all GPUs."""
    compute = 3 * job.student_flops * images / site.all_gpus / site.gpu_flops
    slowest = min(site.gpu_link, site.network) if site.nodes > 1 else site.gpu_link
    return {"compute": compute, "exchange": ring_seconds(job.student_bytes, site.all_gpus, slowest, site.latency)}


def _evenly(zoo: Sequence[Model], count: int) -> list[Model]:
    """Return so many teachers in the zoo's order, of every cost evenly: who is good is not known."""
    order = sorted(range(len(zoo)), key=lambda place: zoo[place].flops)
    return [zoo[place] for place in sorted(order[(2 * one + 1) * len(zoo) // (2 * count)] for one in range(count))]


def _largest(parts: dict[str, float]) -> str:
    return max(parts, key=lambda name: parts[name])


def _gb(size: float) -> str:
    return f"{size / 1e9:,.0f} GB"
