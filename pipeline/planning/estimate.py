"""From work, throughputs and a cluster to seconds and cost, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config import Settings
from pipeline.planning.described import Cluster
from pipeline.planning.facts import LABELLED, TAUGHT, TESTED
from pipeline.planning.rates import Rates
from pipeline.planning.simulate import Limits, Task, makespan, ring_seconds, schedule
from pipeline.planning.sizes import spoken_bytes, widths_of
from pipeline.planning.teachers import TeacherSize
from pipeline.planning.work import BLOCK, JUDGED, Training, Work, worker_resources, workers_of

STAGES = ("ingest", "assess", "select", "amalgamate", "distill", "evaluate", "register")
_PICTURED = 20  # teachers whose plans are drawn, as in `pipeline.stages.recording_teachers`
_FEW = 8  # blocks, up to which they are tasks instead of a pool's, as in `pipeline.stages.speaking`
# Assumed: what gloo moves between processes of a machine, what NCCL moves between GPUs of a node, and a message.
_LOOPBACK, _BETWEEN_GPUS, _LATENCY = 1e9, 1e11, 2e-4


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take.

    Attributes
    ----------
    stage, state : str
        The state as `pipeline.stages.artefacts.Status` has it; a fresh stage takes nothing.
    images : int
        That teachers or students look at, each as often as it is looked at.
    resources : str
        What one of its processes asks for.
    at_once : int
        Processes side by side; 0: it runs in the driver alone.
    seconds : float or None
        None where nothing tells.
    parts : mapping of str to float
        What they go into.
    cost : float or None
    """

    stage: str
    state: str
    images: int = 0
    resources: str = ""
    at_once: int = 0
    seconds: float | None = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    cost: float | None = None


def estimate(
    settings: Settings,
    work: Work,
    rates: Rates,
    cluster: Cluster,
    states: Mapping[str, str],
    *,
    price: float | None = None,
) -> list[StagePlan]:
    """Return what every stage takes.

    Parameters
    ----------
    settings : Settings
    work : Work
    rates : Rates
    cluster : Cluster
    states : mapping of str to str
        Of the stages that take part.
    price : float, optional
        Of a GPU, an hour: all GPUs of the cluster are paid for as long as a stage runs.
    """
    estimator = _Estimator(settings, work, rates, cluster, states)
    found = []
    for stage in STAGES:
        if stage not in states:
            continue
        one = StagePlan(stage, "fresh") if states[stage] == "fresh" else estimator.plan(stage)
        cost = None
        if price is not None and cluster.all_gpus and one.seconds is not None:
            cost = one.seconds / 3600 * cluster.all_gpus * price
        found.append(StagePlan(**(vars(one) | {"state": states[stage], "cost": cost})))
    return found


class _Estimator:
    def __init__(
        self, settings: Settings, work: Work, rates: Rates, cluster: Cluster, states: Mapping[str, str]
    ) -> None:
        self.settings, self.work, self.rates, self.cluster = settings, work, rates, cluster
        self._session = self._first_with_ray(states)
        drawing = [stage for stage in STAGES[1:6] if states.get(stage, "fresh") != "fresh"]
        self._first_picture = drawing[0] if drawing and settings.tracking.enabled else ""

    def plan(self, stage: str) -> StagePlan:
        found: StagePlan = getattr(self, f"_{stage}")()
        return found

    def _first_with_ray(self, states: Mapping[str, str]) -> str:
        """Return the stage that starts or joins the cluster."""
        users = ["assess", "amalgamate"]
        if self.settings.distill.resources.num_workers:
            users += ["distill", "evaluate"]
        return next((stage for stage in users if states.get(stage, "fresh") != "fresh"), "")

    def _finish(
        self, stage: str, images: int, resources: str, at_once: int, starting: float, parts: Mapping[str, float | None]
    ) -> StagePlan:
        if stage in self.rates.whole:
            taken = self.rates.besides[stage]
            session = self.rates.starts.session if stage == self._session else 0.0
            told = {"as before": taken} | ({"start": session} if session else {})
            return StagePlan(stage, "", images, resources, at_once, taken + session, told)
        session = self.rates.starts.session if stage == self._session else 0.0
        if stage in self.rates.besides:
            start = self.rates.besides[stage] + session
        else:
            start = starting + session
            parts = {**parts, "pictures": self._pictures(stage)}
        known = {name: value for name, value in parts.items() if value is not None and value > 0}
        everything = None if None in parts.values() else start + sum(known.values())
        return StagePlan(stage, "", images, resources, at_once, everything, {"start": start} | known)

    def _pictures(self, stage: str) -> float:
        """Return the seconds that go into the pictures of a stage; without a tracking store none are drawn."""
        if not self.settings.tracking.enabled:
            return 0.0
        work, starts = self.work, self.rates.starts
        heads = len(self.settings.task.subtasks or {"": None})
        matrices = {"assess": min(work.rungs[-1].teachers, _PICTURED), "evaluate": heads}
        panels = {"assess": 1, "select": 1, "amalgamate": 2 * heads if work.faculty else 0, "distill": 2, "evaluate": 1}
        first = starts.picture if stage == self._first_picture else 0.0
        return first + matrices.get(stage, 0) * starts.matrix + panels.get(stage, 0) * starts.panel

    def _ingest(self) -> StagePlan:
        count = self.work.facts.source
        reading = None
        if count is not None and self.rates.decode is not None:
            reading = self.rates.opening + count * self.rates.decode
        return self._finish("ingest", count or 0, "1 CPU", 0, 0.0, {"reading": reading})

    def _assess(self) -> StagePlan:
        resources, work = self.settings.assess.resources, self.work
        asked = {"CPU": resources.cpus, "GPU": resources.gpus}
        slots = self._slots(asked, resources.max_concurrent, work.candidates)
        order = sorted(work.teachers, key=lambda one: self.rates.look(one) or math.inf)
        seconds: float | None = 0.0
        taken = order
        for number, rung in enumerate(work.rungs):
            # Who climbs is not known: teachers of every cost, evenly.
            taken = [order[place * len(order) // max(rung.teachers, 1)] for place in range(rung.teachers)]
            costs = [self._trial(teacher, rung.images, loading=number == 0) for teacher in taken]
            known = [cost for cost in costs if cost is not None]
            if len(known) < len(costs):
                seconds = None
                break
            limits = Limits(rate=1 / self.rates.starts.result if self.rates.starts.result else math.inf)
            seconds = (seconds or 0.0) + schedule([Task(cost) for cost in known], max(slots, 1), limits).seconds
        images = sum(rung.teachers * rung.images for rung in work.rungs)
        return self._finish(
            "assess", images, _written(asked), slots, self.rates.starts.trials, {"teachers": seconds if order else 0.0}
        )

    def _trial(self, teacher: TeacherSize, images: int, *, loading: bool) -> float | None:
        look = self.rates.look(teacher)
        if look is None:
            return None
        widths = widths_of(teacher)
        score = self.rates.score * images * (widths[1] if widths else 0)
        return images * look + score + (self.rates.load if loading else self.rates.load / 2)

    def _select(self) -> StagePlan:
        work = self.work
        count = min(work.facts.count(*LABELLED), JUDGED)
        widths = sorted(width[1] for width in map(widths_of, work.teachers) if width is not None)
        middle = widths[len(widths) // 2] if widths else 0
        fitting: float | None = 0.0
        for many, members in work.fits:
            once = self.rates.a_fit(count, middle * members) if middle else 0.0
            fitting = None if once is None or fitting is None else fitting + many * once
        return self._finish("select", count, "1 CPU", 0, 0.0, {"fits": fitting})

    def _amalgamate(self) -> StagePlan:
        work, stage = self.work, "amalgamate"
        images, slots, start, parts = self._speaking(work.speakers.get(stage, ()))
        trainings = work.trainings.get(stage, ())
        resources = self.settings.amalgamate.resources
        asked = {"CPU": resources.cpus, "GPU": resources.gpus}
        if trainings:
            images += sum(one.arms * one.loop.epochs * work.facts.count(*TAUGHT) for one in trainings)
            start += self._group_start()
            parts["component nets"] = self._side_by_side(trainings)
        return self._finish(stage, images, _written(asked), slots, start, parts)

    def _speaking(self, teachers: Sequence[TeacherSize]) -> tuple[int, int, float, dict[str, float | None]]:
        """Return images, slots, start-up and parts of teachers that look at the training images."""
        work, settings = self.work, self.settings.amalgamate
        count = work.facts.count(*TAUGHT)
        resources = {"CPU": settings.resources.cpus, "GPU": settings.resources.gpus}
        blocks = [min(BLOCK, count - start) for start in range(0, count, BLOCK)]
        slots = self._slots(resources, settings.resources.max_concurrent, len(teachers) * len(blocks))
        if not teachers:
            return 0, 0, 0.0, {}
        looks = [self.rates.look(teacher) for teacher in teachers]
        few = len(blocks) * len(teachers) <= _FEW
        speaking: float | None = None
        if None not in looks:
            loading = self.rates.load if few else 0.0
            tasks = [rows * work.views * (look or 0.0) + loading for look in looks for rows in blocks]
            speaking = makespan(tasks, max(slots, 1))
        written = sum(
            spoken_bytes(*widths, work.facts.classes, work.facts.classes, images=count, views=work.views, raw=work.raw)
            for widths in map(widths_of, teachers)
            if widths is not None
        )
        # A pool's actors begin as tasks do, once Ray Data has been imported.
        starting = self.rates.starts.tasks + (0.0 if few else self.rates.starts.driver)
        # Shards are written, read again and joined in the driver.
        return (
            len(teachers) * count * work.views,
            slots,
            starting,
            {
                "teachers": speaking,
                "files": 3 * written / self.rates.disk,
            },
        )

    def _distill(self) -> StagePlan:
        return self._training("distill")

    def _evaluate(self) -> StagePlan:
        return self._training("evaluate")

    def _training(self, stage: str) -> StagePlan:
        work = self.work
        trainings = work.trainings.get(stage, ())
        workers = workers_of(self.settings.distill.resources, self.cluster)
        parts: dict[str, float | None] = {}
        for one in trainings:
            parts[one.name] = (parts.get(one.name) or 0.0) + value if (value := self._arms(one)) is not None else None
        images = sum(one.arms * one.loop.epochs * one.steps(work.facts) * one.images(work.facts) for one in trainings)
        start = self._group_start() if trainings else 0.0
        if stage in work.speakers:
            more, _, starting, spoken = self._speaking(work.speakers[stage])
            images, start = images + more, start + starting
            parts |= spoken
        if work.tested and stage == "evaluate":
            looks = [self.rates.look(teacher) for teacher in work.tested]
            tested = work.facts.count("test")
            parts["ensemble"] = None if None in looks else sum(tested * (look or 0.0) for look in looks)
        asked = worker_resources(self.settings.distill.resources) if workers else {"CPU": 1.0}
        return self._finish(stage, images, _written(asked), workers, start, parts)

    def _group_start(self) -> float:
        return self.rates.starts.group if self.settings.distill.resources.num_workers else 0.0

    def _arms(self, one: Training) -> float | None:
        """Return the seconds of trainings of one kind, one after the other in one group of workers."""
        work, workers = self.work, max(workers_of(self.settings.distill.resources, self.cluster), 1)
        share = one.images(work.facts) / workers
        step = self.rates.step(one.kind, one.net, share)
        if step is not None and one.kind in self.rates.steps and one.name == "finetune":
            step *= self._larger(one)  # what was timed is the student's own step
        looks = [self.rates.look(teacher) for teacher in one.live]
        if step is None or None in looks:
            return None
        if not self.rates.synchronised:
            step += self._synchronising(one.net.parameter_bytes, workers)
        step += sum(share * (look or 0.0) for look in looks)
        tested = work.facts.count(*TESTED) * step / max(share, 1) / 3
        epoch = one.steps(work.facts) * step + self.rates.starts.report
        return one.arms * (one.loop.epochs * epoch + tested)

    def _larger(self, one: Training) -> float:
        student = self.work.trainings["distill"][0].net
        return (one.net.flops or 1.0) / (student.flops or one.net.flops or 1.0)

    def _synchronising(self, size: int, workers: int) -> float:
        gpus = self.settings.distill.resources.gpus_per_worker > 0
        each = self.cluster.a_node(worker_resources(self.settings.distill.resources)) or workers
        inside = _BETWEEN_GPUS if gpus else _LOOPBACK
        bandwidth = inside if workers <= each else min(inside, self.cluster.network)
        return ring_seconds(size, workers, bandwidth, _LATENCY)

    def _side_by_side(self, trainings: Sequence[Training]) -> float | None:
        resources = self.settings.distill.resources
        workers = max(workers_of(resources, self.cluster), 1)
        room = self.cluster.slots(worker_resources(resources))
        groups = 1 if not resources.num_workers else max(1, (workers if room is None else room) // workers)
        seconds: list[float] = []
        for one in trainings:
            value = self._arms(one)
            if value is None:
                return None
            seconds += [value / one.arms] * one.arms
        return makespan(seconds, groups)

    def _register(self) -> StagePlan:
        return self._finish("register", 0, "1 CPU", 0, self.rates.starts.register, {})

    def _slots(self, resources: Mapping[str, float], most: int | None, wanted: int) -> int:
        room = self.cluster.slots(resources)
        if room is None:  # nothing known limits them: one a node
            room = self.cluster.nodes
        return min(wanted, most or wanted, room)


def _written(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} {key}" for key, value in resources.items() if value > 0)
