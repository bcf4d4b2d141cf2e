"""Run the pipeline: every stage that is not fresh, in order, up to the one asked for."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Mapping
from typing import Any

from pipeline.config import Settings
from pipeline.data.mirror import here
from pipeline.engine.objective_spec import objective_of
from pipeline.errors import ConfigError
from pipeline.report.console import Display
from pipeline.stages import tables
from pipeline.stages.amalgamate import Amalgamate
from pipeline.stages.artefacts import Record, RunFolder, Status, clock, flatten, key_of, write_settings
from pipeline.stages.assess import Assess
from pipeline.stages.base import Run, Stage
from pipeline.stages.distill import Distill
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.ingest import Ingest
from pipeline.stages.own_scores import own_scores
from pipeline.stages.recording import BY_EPOCH, close, described, optional, record_stage
from pipeline.stages.register import Register
from pipeline.stages.registered import zoo_of
from pipeline.stages.report import add_report
from pipeline.stages.select import Select
from pipeline.stages.together import choice_of

STAGES: tuple[Stage, ...] = (Ingest(), Assess(), Select(), Amalgamate(), Distill(), Evaluate(), Register())


def run_pipeline(
    settings: Settings, *, until: str = "register", verbose: bool = False, display: Display | None = None
) -> dict[str, Record]:
    """Run the stages up to `until`; a stage whose key has a finished result is not run again.

    Returns
    -------
    records : dict of str to Record
        By stage.

    Raises
    ------
    UserError
        For input that can't be used: settings, zoo, run folder, tracking server. Before any compute where it can be
        known then.
    StageError
        If a stage fails; the results of the former stages stay, and the same call continues.
    """
    display = display or Display()
    files = RunFolder(settings.run_dir)
    files.pull("registered.json", "registered.parquet", "registered.cards.arrow")
    zoo = zoo_of(settings, display)
    wanted = [stage for stage in STAGES[: 1 + _position(until)] if _enabled(stage, settings)]
    own_scores(settings.assess)
    _check_objective(settings, wanted)
    _check_registry(settings, wanted, files)
    files.prepare()
    with files.lock(display):
        write_settings(files.root / "settings.yaml", settings.dump())
        run = Run(settings=settings, files=files, display=display, zoo=zoo, until=until, verbose=verbose)
        with run, described(run):
            _run_stages(run, wanted)
            add_report(run)
        close(run)
        tables.closing(run)
        return run.records


def show_status(settings: Settings, *, until: str = "register", display: Display | None = None) -> list[Status]:
    """Print where each stage stands: fresh, partial, stale (and what changed), missing, or waiting."""
    display = display or Display()
    files = RunFolder(settings.run_dir)
    files.check()
    zoo = zoo_of(settings, display)
    run = Run(settings=settings, files=files, display=display, zoo=zoo)
    found: list[Status] = []
    for stage in STAGES[: 1 + _position(until)]:
        if not _enabled(stage, settings):
            continue
        blocked = [need for need in stage.needs if need not in run.records]
        if blocked:
            former = files.newest(stage.name)
            found.append(
                Status(stage.name, "waiting" if former else "missing", f"for {', '.join(blocked)}" if former else "")
            )
            continue
        inputs = _inputs(stage, run)
        key = key_of(stage.name, stage.version, inputs)
        if _superseded(run, stage, key):
            found.append(Status(stage.name, "stale", "another student has been registered since"))
            continue
        status = files.status(stage.name, key, inputs)
        record = files.record(stage.name, key)
        if record is not None:
            run.records[stage.name] = record
        found.append(status)
    tables.status(display, settings, found)
    return found


def _check_objective(settings: Settings, wanted: list[Stage]) -> None:
    """Refuse a loss that can't be built, or that needs labels where there are none, before teachers have been run."""
    if any(stage.name == "amalgamate" for stage in wanted):
        choice_of(settings)
    if not any(stage.name == "distill" for stage in wanted):
        return
    from pipeline.engine.objectives import wants

    needed, loss = wants(settings.distill.objective), settings.distill.objective
    inner = {"features", "taps"} & needed or settings.distill.flow is not None
    if settings.distill.loop.compile and inner:
        raise ConfigError("distill.loop.compile: the loss looks into the student's layers; set it to false")
    components = settings.amalgamate.components.loop or settings.distill.loop
    if settings.amalgamate.mode == "components" and components.compile:
        raise ConfigError(
            "amalgamate.components.loop.compile: component nets are looked into; give them a loop without it"
        )
    if settings.task.splits.probe:
        return
    if "labelled" in needed:
        names = [name for name, part in loss.parts() if "labelled" in wants(objective_of(**{name: part.model_dump()}))]
        raise ConfigError(f"distill.objective.{(names or ['own'])[0]}: needs labelled images, and the task has none")
    if not needed and settings.distill.flow is None:
        raise ConfigError(
            "distill.objective: nothing in it learns from teachers, and the task has no labels; switch on transport or "
            "kd, or give labels (task.splits)"
        )


def _check_registry(settings: Settings, wanted: list[Stage], files: RunFolder) -> None:
    """Refuse a run that would only find at its end that there is no registry to put the student in."""
    from pipeline.tracking.connect import find_store

    store = find_store(settings.tracking, files.root)
    if any(stage.name == "register" for stage in wanted) and store.kind in ("none", "jsonl"):
        raise ConfigError(
            "register.enabled: there is no model registry without MLflow; set register.enabled=false, or "
            "tracking.enabled=true and tracking.uri to MLflow's"
        )


def _run_stages(run: Run, wanted: list[Stage]) -> None:
    for stage in wanted:
        inputs = _inputs(stage, run)
        key = key_of(stage.name, stage.version, inputs)
        record = None if _superseded(run, stage, key) else run.files.record(stage.name, key)
        if record is not None:
            run.records[stage.name] = record
            ended = datetime.datetime.fromtimestamp(record.finished).strftime("%Y-%m-%d %H:%M")
            run.display.fresh(stage.name, ended)
        else:
            with run.display.stage(stage.name):
                run.records[stage.name] = _run_stage(run, stage, key, inputs)
        tables.after(stage.name, run)


def _superseded(run: Run, stage: Stage, key: str) -> bool:
    """Whether another result has been registered since this one, and has taken the alias along."""
    if stage.name != "register" or run.files.record(stage.name, key) is None:
        return False
    newest = run.files.newest(stage.name)
    return newest is not None and newest.key != key


def _run_stage(run: Run, stage: Stage, key: str, inputs: Mapping[str, Any]) -> Record:
    run.open_tracker()
    folder = run.files.folder(stage.name, key)
    folder.mkdir(parents=True, exist_ok=True)
    here(folder)
    write_settings(folder / "settings.yaml", run.settings.dump())
    started = time.perf_counter()
    run.timed.clear()
    with run.tracker.run(stage.name, key=f"{stage.name}-{key}", tags={"stage": stage.name, "key": key}) as tracker:
        tracker.params({name: value for name, value in inputs.items() if not name.startswith("teachers.")})
        outcome = stage.run(run.within(tracker), folder)
        numbers = {name: value for name, value in flatten(outcome.summary).items() if _is_number(value)}
        seconds = time.perf_counter() - started
        with optional(stage.name):
            tracker.metrics(
                {key: value for key, value in numbers.items() if key not in BY_EPOCH} | {"stage_seconds": seconds}
            )
            tracker.artifact(folder / "settings.yaml")
    record_stage(run, stage.name, numbers, seconds)
    record = Record(
        stage=stage.name,
        key=key,
        digest=outcome.digest,
        inputs=dict(inputs),
        summary=outcome.summary,
        seconds=seconds,
        finished=clock(),
        again=outcome.again,
        starts=dict(run.timed),
        machine=platform.node(),
    )
    run.files.finish(record)
    return record


def _inputs(stage: Stage, run: Run) -> dict[str, Any]:
    inputs = flatten(dict(stage.inputs(run)))
    for need in stage.needs:
        inputs[f"{need}.digest"] = run.records[need].digest
    return inputs


def _position(until: str) -> int:
    return [stage.name for stage in STAGES].index(until)


def _enabled(stage: Stage, settings: Settings) -> bool:
    return stage.name != "register" or settings.registration.enabled


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
