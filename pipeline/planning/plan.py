"""The plan of a run: from settings to sizes, work, throughputs, seconds, cost, and what stands against it."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import Settings
from pipeline.data.mirror import share
from pipeline.errors import ConfigError, FacultyError
from pipeline.models.spec import TeacherSpec
from pipeline.models.teacher import Teacher
from pipeline.models.zoo import Zoo, load_zoo
from pipeline.places import is_remote
from pipeline.planning.against import FILE
from pipeline.planning.calibrate import PARTS, calibrate
from pipeline.planning.described import Cluster, parse_cluster, this_machine
from pipeline.planning.estimate import STAGES, StagePlan, estimate
from pipeline.planning.facts import Facts, facts_of
from pipeline.planning.memory import Memory, disk_of, memory_of
from pipeline.planning.rates import Rates
from pipeline.planning.recalled import recalled
from pipeline.planning.recorded import recorded
from pipeline.planning.refusals import Refusal, refusals, warnings
from pipeline.planning.teachers import TeacherSize, size_teachers
from pipeline.planning.work import Work, net_sizes, plain, student_size, work_of
from pipeline.report.console import Display
from pipeline.stages.artefacts import Record, RunFolder, write_json

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes
    ----------
    made : float
        Seconds since the epoch.
    name, run_dir : str
    cluster : Cluster
    teachers : tuple of TeacherSize
        The largest first.
    work : Work
    rates : Rates
    stages : tuple of StagePlan
    memory : tuple of Memory
    disk : mapping of str to int
    refused : tuple of Refusal
    warnings : tuple of str
    price : float or None
    """

    made: float
    name: str
    run_dir: str
    cluster: Cluster
    teachers: tuple[TeacherSize, ...]
    work: Work
    rates: Rates
    stages: tuple[StagePlan, ...]
    memory: tuple[Memory, ...]
    disk: Mapping[str, int]
    refused: tuple[Refusal, ...]
    warnings: tuple[str, ...]
    price: float | None = None

    @property
    def seconds(self) -> float | None:
        """Of all stages; None where one of them is not known."""
        taken = [stage.seconds for stage in self.stages]
        return None if None in taken else sum(one or 0.0 for one in taken)

    @property
    def cost(self) -> float | None:
        """Of all stages; None where there is no price, no GPU, or a stage is not known."""
        costs = [stage.cost for stage in self.stages]
        return None if None in costs else sum(one or 0.0 for one in costs)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, as `plan.json` has it."""
        rates = self.rates.as_dict()
        rates.pop("forward")
        return {
            "format": FORMAT,
            "made": self.made,
            "name": self.name,
            "cluster": self.cluster.as_dict(),
            "teachers": [_teacher(teacher) for teacher in self.teachers],
            "work": plain(self.work),
            "rates": rates,
            "stages": [asdict(stage) for stage in self.stages],
            "seconds": self.seconds,
            "price": self.price,
            "cost": self.cost,
            "memory": [asdict(one) | {"fits": one.fits, "together": one.together} for one in self.memory],
            "disk": dict(self.disk),
            "refused": [asdict(one) for one in self.refused],
            "warnings": list(self.warnings),
        }


def make_plan(
    settings: Settings,
    *,
    described: str | None = None,
    price: float | None = None,
    calibration: bool | None = None,
    display: Display | None = None,
) -> Plan:
    """Plan a run. Nothing of it is started, and nothing is written.

    Parameters
    ----------
    settings : Settings
    described : str, optional
        The cluster that it is for, see `parse_cluster`; None: this machine.
    price : float, optional
        Of a GPU, an hour.
    calibration : bool, optional
        Whether to measure this machine for up to half a minute; None: where former runs of the folder have not left
        what is needed.
    display : Display, optional

    Raises
    ------
    UserError
        For settings, a zoo or images that can't be used, and a cluster or price that can't be.
    """
    if price is not None and not price >= 0:
        raise ConfigError(f"--price is {price:g}; give what a GPU costs an hour, 0 or more")
    display = display or Display()
    cluster = this_machine(settings.cluster) if described is None else parse_cluster(described)
    files, zoo = RunFolder(settings.run_dir), _zoo(settings)
    files.check()
    with display.working("looking at what is finished"):
        states, records = _finished(settings, files)
        facts = facts_of(settings, records["ingest"].summary if "ingest" in records else None)
    teachers = _sized(settings, zoo, facts, display)
    work = _work(settings, zoo, facts, teachers, records, files)
    open_stages = [stage for stage, state in states.items() if state != "fresh"]
    rates = _rates(settings, zoo, work, cluster, files, calibration, open_stages, display)
    memory = memory_of(settings, work, rates, cluster, open_stages)
    disk = disk_of(settings, work, rates, open_stages)
    return Plan(
        made=time.time(),
        name=settings.name,
        run_dir=settings.run_dir,
        cluster=cluster,
        teachers=tuple(sorted(teachers, key=_largest)),
        work=work,
        rates=rates,
        stages=tuple(estimate(settings, work, rates, cluster, states, price=price)),
        memory=tuple(memory),
        disk=disk,
        refused=tuple(refusals(settings, cluster, memory, disk, open_stages)),
        warnings=(*facts.notes, *rates.notes, *warnings(teachers, settings, cluster, _weights(zoo))),
        price=price,
    )


def keep(plan: Plan) -> Path:
    """Write `plan.json` into the run folder, whole or not at all; return its path.

    Raises
    ------
    UserError
        When the folder can't be written.
    """
    files = RunFolder(plan.run_dir)
    files.prepare()
    path = files.root / FILE
    try:
        write_json(path, plan.as_dict())
        share(path)
    except OSError as error:
        raise ConfigError(f"{path}: can't be written ({error.strerror or error}); choose another run_dir") from None
    return path


def as_text(plan: Plan) -> str:
    """Return the plan as JSON, for machines."""
    return json.dumps(plan.as_dict() | {"run_dir": plan.run_dir}, indent=1, ensure_ascii=False)


def _zoo(settings: Settings) -> Zoo:
    path = settings.zoo_file
    if settings.zoo.path is None and not Path(path).exists():
        raise ConfigError(
            f"zoo.source: mlflow: the registry has not been asked yet ({path} is missing); run `faculty ingest` first, "
            "or give zoo.path"
        )
    zoo = load_zoo(path)
    return zoo if settings.zoo.only is None else zoo.only(settings.zoo.only)


def _weights(zoo: Zoo) -> set[Path]:
    """Return the folders of the teachers' weights on disks."""
    paths = [zoo[name].path for name in zoo.names]
    return {Path(path).parent for path in paths if path is not None and not is_remote(path)}


def _finished(settings: Settings, files: RunFolder) -> tuple[dict[str, str], dict[str, Record]]:
    """Return where each stage stands, and the records of those that are fresh."""
    stages = [stage for stage in STAGES if stage != "register" or settings.registration.enabled]
    if not (files.root / "run.json").exists():
        return dict.fromkeys(stages, "missing"), {}
    from pipeline.stages.run import show_status

    silent = Display(Console(file=io.StringIO()))
    states = {one.stage: one.state for one in show_status(settings, display=silent)}
    fresh = {stage: files.newest(stage) for stage, state in states.items() if state == "fresh"}
    return states, {stage: record for stage, record in fresh.items() if record is not None}


def _sized(settings: Settings, zoo: Zoo, facts: Facts, display: Display) -> list[TeacherSize]:
    with display.bar("teachers on paper", len(zoo)) as advance:
        return size_teachers(
            (zoo[name] for name in zoo.names),
            facts.shape,
            trusted=settings.zoo.trusted_factories,
            load=lambda spec: _load(spec, settings, "cpu"),
            advance=advance,
        )


def _work(
    settings: Settings,
    zoo: Zoo,
    facts: Facts,
    teachers: list[TeacherSize],
    records: Mapping[str, Record],
    files: RunFolder,
) -> Work:
    chosen = None
    if "select" in records:
        text = (files.finished("select", records["select"].key) / "faculty.json").read_text(encoding="utf-8")
        chosen = json.loads(text)["chosen"]
    nets = net_sizes(settings, facts)
    if "finetune" in settings.evaluate.controls and chosen:
        from pipeline.models.student import student_like

        try:
            nets["finetune"] = student_size(student_like(zoo[chosen[0]]), facts.classes, facts.shape)
        except ConfigError:  # a program: the control will be left out
            pass
    return work_of(settings, facts, teachers, nets, chosen)


def _rates(
    settings: Settings,
    zoo: Zoo,
    work: Work,
    cluster: Cluster,
    files: RunFolder,
    calibration: bool | None,
    stages: list[str],
    display: Display,
) -> Rates:
    """Return throughputs: of the description, of former runs, or measured now."""
    if not stages:
        return Rates()
    if cluster.flops is not None:
        return _described(settings, work, cluster.flops, calibration, display)
    if cluster.gpus and not this_machine(settings.cluster).gpus:
        note = (
            "times are not known: this machine has no GPU to measure; say what one achieves, for example "
            "--cluster …,tflops=40"
        )
        return Rates(notes=(note,))
    if calibration is not True:
        found = recorded(settings, work, files)
        if found is not None or calibration is False:
            note = "times are not known: this folder has no finished run under such settings; give --calibrate"
            return found or Rates(notes=(note,))
    with display.bar("calibration", len(PARTS)) as advance:
        device = "cuda" if settings.assess.resources.gpus > 0 and cluster.gpus else "cpu"
        former = recalled(settings.run_dir)
        return calibrate(
            settings, work, lambda name: _load(zoo[name], settings, device), former=former, advance=advance
        )


def _described(settings: Settings, work: Work, flops: float, calibration: bool | None, display: Display) -> Rates:
    """Return what a description gives; what processors do there is taken to last as long as it does here."""
    if calibration is False:
        return Rates(origin="described", flops=flops)
    parts = ("images", "scores")
    with display.bar("calibration", len(parts)) as advance:
        here = calibrate(settings, work, _no_teacher, parts=parts, advance=advance)
    return replace(here, origin="described", flops=flops)


def _no_teacher(name: str) -> Teacher:
    raise AssertionError(name)  # teachers are not measured here


def _load(spec: TeacherSpec, settings: Settings, device: str) -> Teacher:
    from pipeline.models.sources import load_teacher

    def from_registry(uri: str) -> Any:
        from pipeline.tracking.connect import find_store
        from pipeline.tracking.resolve import load_mlflow_module

        store = find_store(settings.tracking, settings.run_dir)
        return load_mlflow_module(uri, store.uri)

    try:
        return load_teacher(
            spec,
            device=device,
            trusted_factories=settings.zoo.trusted_factories,
            resolvers={"mlflow": from_registry},
        )
    except FacultyError:
        raise
    except Exception as error:  # a factory is anyone's code
        raise ConfigError(f"teacher {spec.name!r}: {type(error).__name__}: {str(error)[:200]}") from error


def _largest(teacher: TeacherSize) -> tuple[float, str]:
    return (-(teacher.net.parameters if teacher.net else 0), teacher.name)


def _teacher(teacher: TeacherSize) -> dict[str, Any]:
    return {
        "name": teacher.name,
        "kind": teacher.kind,
        "classes": teacher.classes,
        "shape": list(teacher.shape),
        "problem": teacher.problem,
        **(asdict(teacher.net) if teacher.net else {}),
    }
