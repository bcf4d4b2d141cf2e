"""Memory of processes and devices, and bytes on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config import Settings
from pipeline.planning.described import Cluster
from pipeline.planning.facts import LABELLED, TAUGHT
from pipeline.planning.rates import Rates
from pipeline.planning.sizes import (
    cache_bytes,
    outputs_bytes,
    probe_bytes,
    spoken_bytes,
    table_bytes,
    training_state_bytes,
    widths_of,
)
from pipeline.planning.teachers import TeacherSize
from pipeline.planning.work import Training, Work, shards_of, worker_resources, workers_of

MIB = 2**20
RESIDENT = 700 * MIB  # assumed of a process with torch and Ray, where it was not measured
CONTEXT = 500 * MIB  # assumed of a CUDA context, on the device


@dataclass(frozen=True)
class Memory:
    """What one process needs.

    Attributes
    ----------
    stage, process : str
    on : {"processor", "GPU"}
    bytes : int
    parts : mapping of str to int
    beside : int
        Processes of the kind that share one node's memory, or one GPU.
    all : int
        Bytes of these together: of teachers, the largest that may meet there.
    limit : int or None
        Bytes of that node or GPU.
    """

    stage: str
    process: str
    on: str
    bytes: int
    parts: Mapping[str, int] = field(default_factory=dict)
    beside: int = 1
    all: int = 0
    limit: int | None = None

    @property
    def fits(self) -> bool:
        """Whether one of them has room."""
        return self.limit is None or self.bytes <= self.limit

    @property
    def together(self) -> bool:
        """Whether all that run side by side have room."""
        return self.limit is None or max(self.all, self.bytes) <= self.limit


def memory_of(settings: Settings, work: Work, rates: Rates, cluster: Cluster, stages: Sequence[str]) -> list[Memory]:
    """Return what the processes of some stages need, the largest teacher standing for all.

    A teacher: weights + batch × activations of a forward pass, and its probe, mapped. A student: weights, gradients,
    moments of the optimiser, running average, what autograd keeps of its share of a batch, and live teachers.
    Activations are counted in single precision. Kernels' own scratch memory is not counted.
    """
    found: list[Memory] = []
    if "assess" in stages:
        found += _teachers(settings, work, rates, cluster, "assess")
    if "amalgamate" in stages:
        found += _teachers(settings, work, rates, cluster, "amalgamate")
    for stage in ("amalgamate", "distill", "evaluate"):
        if stage in stages and work.trainings.get(stage):
            found += _students(settings, work, rates, cluster, stage, work.trainings[stage])
    return found


def teacher_bytes(teacher: TeacherSize, batch: int) -> int:
    """Return weights and activations of a teacher that looks at a batch; weights alone where no more is known."""
    if teacher.net is None:
        return 0
    return teacher.net.weight_bytes + batch * (teacher.net.forward_bytes or 0)


def student_bytes(settings: Settings, work: Work, one: Training, workers: int) -> dict[str, int]:
    """Return what a training takes on one worker's device, part by part."""
    net, optim = one.net, one.loop.optim
    images = math.ceil(one.images(work.facts) / workers / one.loop.parts)
    state = training_state_bytes(
        net.parameter_bytes, net.weight_bytes, optim.name, optim.momentum, one.loop.ema is not None
    )
    return {
        "weights and optimiser": state,
        # Data-parallel workers hold gradients a second time, in the buckets that they exchange.
        "gradients": net.parameter_bytes * (2 if workers > 1 else 1),
        "activations": images * (net.training_bytes or 0),
        "live teachers": sum(teacher_bytes(teacher, images) for teacher in one.live),
    }


def _teachers(settings: Settings, work: Work, rates: Rates, cluster: Cluster, stage: str) -> list[Memory]:
    assessed = stage == "assess"
    section = settings.assess if assessed else settings.amalgamate
    names = work.teachers if assessed else work.faculty
    if not names:
        return []
    images = work.facts.count(*LABELLED) if assessed else work.facts.count(*TAUGHT)
    batch = min(section.batch_size, max(images, 1))
    largest = max(names, key=lambda teacher: teacher_bytes(teacher, batch))
    pixels = batch * 5 * math.prod(work.facts.shape)  # as stored, and in single precision
    own = {"weights": largest.net.weight_bytes if largest.net else 0}
    own["activations"] = teacher_bytes(largest, batch) - own["weights"] + pixels
    process = {"process": rates.resident or RESIDENT}
    if assessed:
        process["probe"] = probe_bytes(images, work.facts.shape)
    resources = {"CPU": section.resources.cpus, "GPU": section.resources.gpus}
    each = cluster.a_node(resources) or 1
    beside = min(each, section.resources.max_concurrent or each, max(len(names), 1))
    what = f"teacher {largest.name}"
    sizes = sorted((teacher_bytes(one, batch) + pixels for one in names), reverse=True)

    def together(count: int, besides: int) -> int:
        return count * besides + sum(sizes[:count])

    if section.resources.gpus > 0:
        sharing = min(max(1, math.floor(1 / section.resources.gpus + 1e-9)), beside)
        device, host = own | {"context": CONTEXT}, sum(process.values())
        return [
            Memory(
                stage,
                what,
                "GPU",
                sum(device.values()),
                device,
                sharing,
                together(sharing, CONTEXT),
                cluster.gpu_memory,
            ),
            Memory(stage, what, "processor", host, process, beside, beside * host, cluster.memory),
        ]
    whole = process | own
    everything = together(beside, sum(process.values()))
    return [Memory(stage, what, "processor", sum(whole.values()), whole, beside, everything, cluster.memory)]


def _students(
    settings: Settings, work: Work, rates: Rates, cluster: Cluster, stage: str, trainings: Sequence[Training]
) -> list[Memory]:
    resources = settings.distill.resources
    workers = workers_of(resources, cluster)
    count = max(workers, 1)
    parts = [(one, student_bytes(settings, work, one, count)) for one in trainings]
    one, own = max(parts, key=lambda pair: sum(pair[1].values()))
    process = {"process": rates.resident or RESIDENT}
    # A checkpoint is a copy of the state in main memory; the one before is still there.
    copies = {"checkpoint": 2 * own["weights and optimiser"]}
    each = cluster.a_node(worker_resources(resources)) or count
    beside = min(count, max(each, 1))
    what = f"student {one.name}"

    def memory(on: str, parts: Mapping[str, int], many: int, limit: int | None) -> Memory:
        size = sum(parts.values())
        return Memory(stage, what, on, size, parts, many, many * size, limit)

    if resources.gpus_per_worker > 0:
        sharing = min(max(1, math.floor(1 / resources.gpus_per_worker + 1e-9)), beside)
        on_gpu = memory("GPU", own | {"context": CONTEXT}, sharing, cluster.gpu_memory)
        return [on_gpu, memory("processor", process | copies, beside, cluster.memory)]
    return [memory("processor", process | own | copies, beside, cluster.memory)]


def disk_of(settings: Settings, work: Work, rates: Rates, stages: Sequence[str]) -> dict[str, int]:
    """Return the bytes that the stages add, by what they are.

    ``cache`` lies in the folder of the cache, all else in the run folder; ``object store`` is memory of each node.
    """
    facts, cache = work.facts, settings.cache
    shards = shards_of(work, settings)
    found: dict[str, int] = {}
    if "ingest" in stages:
        encoded = None
        if settings.task.image.storage == "encoded":
            encoded = rates.encoded or math.prod(facts.shape) / 2  # assumed, where no image was looked at
        found["image table"] = table_bytes(facts.rows, facts.shape, encoded)
    if "assess" in stages:
        found["object store"] = probe_bytes(facts.count(*LABELLED), facts.shape)
        found["outputs of teachers"] = sum(
            outputs_bytes(_spread(work.teachers, rung.teachers), rung.images) for rung in work.rungs
        )
        found["cache"] = sum(
            cache_bytes(
                _spread(work.teachers, rung.teachers), [rung.images], precision=cache.precision, top_k=cache.top_k
            )
            for rung in work.rungs
        )
    if "amalgamate" in stages:
        count = facts.count(*TAUGHT)
        found["what the faculty says"] = sum(
            spoken_bytes(*widths, facts.classes, facts.classes, images=count, views=work.views, raw=work.raw)
            for widths in map(widths_of, work.faculty)
            if widths is not None
        )
        found["cache"] = found.get("cache", 0) + cache_bytes(
            work.faculty, shards["amalgamate"], precision=cache.precision, top_k=cache.top_k
        )
    checkpoints = 0
    students = 0
    for stage in ("amalgamate", "distill", "evaluate"):
        for one in work.trainings.get(stage, ()) if stage in stages else ():
            own = student_bytes(settings, work, one, 1)
            checkpoints = max(checkpoints, 2 * own["weights and optimiser"])
            students += one.arms * one.net.weight_bytes
    if students:
        found["checkpoints"], found["students"] = checkpoints, students
    return found


def _spread(teachers: Sequence[TeacherSize], count: int) -> list[TeacherSize]:
    """Return so many teachers, evenly from the cheapest to the most costly: who climbs is not known."""
    ordered = sorted(teachers, key=lambda one: (one.net.flops if one.net else None) or 0.0)
    return [ordered[place * len(ordered) // max(count, 1)] for place in range(count)] if ordered else []
