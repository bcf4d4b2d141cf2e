"""The stages as calls: each builds settings from its arguments and runs the pipeline up to its stage.

What is up to date is not computed again, in whatever way it was made: the run folder of a call is that of
``faculty run``, and holds the settings that the command line goes on with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pipeline.config import Settings
from pipeline.errors import ConfigError, FacultyError, UserError
from pipeline.face.progress import CallDisplay
from pipeline.face.results import Assessment, Faculty
from pipeline.face.student import Student, Version
from pipeline.face.task import Task, load_task
from pipeline.face.zoo import Zoo, load_zoo
from pipeline.places import is_remote
from pipeline.settings_files import apply, overlay
from pipeline.strict import validate
from pipeline.tracking.redact import redact

if TYPE_CHECKING:
    from pipeline.stages.artefacts import Record

More = Mapping[str, Any] | str | Path | Sequence[Mapping[str, Any] | str | Path]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _discreet(call: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Keep credentials out of errors, as the command line does: notebooks are kept and shared."""

    @wraps(call)
    def called(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return call(*args, **kwargs)
        except FacultyError as error:
            told = redact(str(error))
            if told == str(error):
                raise
            raise type(error)(told) from None

    return called


@_discreet
def assess(
    zoo: Zoo | str | Path | Sequence[Any],
    task: Task | str | Path,
    *,
    name: str | None = None,
    run_dir: str | Path | None = None,
    seed: int = 0,
    scores: Sequence[str] | None = None,
    tracking: str | bool | None = None,
    cluster: str | Mapping[str, Any] | None = None,
    settings: More | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> Assessment:
    """Score every teacher on the task.

    Parameters
    ----------
    zoo : Zoo, or what `load_zoo` takes
    task : Task, or a path that `load_task` takes
    name : str, optional
        Of the run; default: the task's.
    run_dir : path or URI, optional
        Where all results lie; default ``runs/<name>``. The same folder again goes on from what is there.
    seed : int
        Of splits, trainings and resamples.
    scores : sequence of str, optional
        Scores of the literature beside the transport scores, see ``assess.scores``.
    tracking : str or bool, optional
        Where MLflow records the run; False: nowhere. Default: ``MLFLOW_TRACKING_URI``, else a database in the run
        folder.
    cluster : str or mapping, optional
        Address of a Ray cluster, or the section ``cluster``; default: a Ray on this machine that ends with the call. A
        Ray that this process is connected to already serves in any case.
    settings : mapping, path, or a sequence of them, optional
        Any further settings: ``{"assess.batch_size": 64, "distill.augment.flip": True}``, or a YAML file.
    quiet, verbose : bool
        Show nothing; show Ray's and MLflow's logs, too.

    Raises
    ------
    FacultyError
        In one line: what is wrong with which input, and the remedy.
    """
    zoo = zoo if isinstance(zoo, Zoo) else load_zoo(zoo)
    task = task if isinstance(task, Task) else load_task(task)
    name = name or task.name
    place = str(run_dir) if run_dir is not None else f"runs/{name}"
    plain: dict[str, Any] = {
        "name": name,
        "run_dir": place if is_remote(place) else str(Path(place.removeprefix("file://")).expanduser().absolute()),
        "seed": seed,
        "task": task.settings.model_dump(mode="json"),
        "zoo": zoo.settings.model_dump(mode="json"),
    }
    if scores is not None:
        plain["assess"] = {"scores": list(scores)}
    if tracking is not None:
        plain["tracking"] = {"enabled": tracking} if isinstance(tracking, bool) else {"uri": tracking}
    if cluster is not None:
        plain["cluster"] = {"address": cluster} if isinstance(cluster, str) else dict(cluster)
    found = _with(validate(Settings, plain, where="assess"), settings)
    return Assessment(found, _run(found, "assess", quiet, verbose))


@_discreet
def select(
    found: Assessment,
    *,
    max_teachers: int | None = None,
    max_params: int | None = None,
    min_gain: float | None = None,
    confidence: float | None = None,
    teachers: str | Sequence[str] | None = None,
    settings: More | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> Faculty:
    """Choose the set of teachers that help most together.

    Parameters
    ----------
    found : Assessment
    max_teachers, max_params : int, optional
        How many, and how many parameters in all; default 4 teachers.
    min_gain, confidence : float, optional
        What a teacher must add to the set's score, and in which share of resamples.
    teachers : sequence of str, or "all", optional
        These, without a test.
    settings, quiet, verbose
        See `assess`.

    Raises
    ------
    FacultyError
        In one line: what is wrong with which input, and the remedy.
    """
    _expect(found, Assessment, "select", "assess")
    values = {"max_teachers": max_teachers, "max_params": max_params, "min_gain": min_gain, "confidence": confidence}
    chosen: dict[str, Any] = {f"select.{key}": value for key, value in values.items() if value is not None}
    if teachers is not None:
        chosen["select.teachers"] = teachers if isinstance(teachers, str) else list(teachers)
    wanted = _with(apply(found.settings, chosen), settings)
    records = _run(wanted, "select", quiet, verbose)
    return Faculty(wanted, records, Assessment(wanted, records))


@_discreet
def distill(
    chosen: Faculty,
    *,
    student: str | Mapping[str, Any] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    workers: int | tuple[int, int] | None = None,
    gpus: float | None = None,
    seeds: int | None = None,
    controls: Sequence[str] | None = None,
    settings: More | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> Student:
    """Train the student with its faculty, and test it beside its controls.

    Parameters
    ----------
    chosen : Faculty
        May be empty: the student then learns from the labels alone.
    student : str or mapping, optional
        Its net: ``small_cnn`` (the default), ``resnet8``, ``torchvision:resnet18``, ``module:callable``, or the section
        ``distill.student``.
    epochs, batch_size, lr : optional
        Of the training, see ``distill.loop``; default 20, 128, 0.003.
    workers : int or (int, int), optional
        Processes that train side by side, or at least and at most as many; 0: this process, without Ray. Default 1.
    gpus : float, optional
        Of each worker; default 0.
    seeds : int, optional
        Trainings of each arm; default 1.
    controls : sequence of str, optional
        What the student is compared with, see ``evaluate.controls``; default ``no_teacher``.
    settings, quiet, verbose
        See `assess`.

    Raises
    ------
    FacultyError
        In one line: what is wrong with which input, and the remedy.
    """
    _expect(chosen, Faculty, "distill", "select")
    plain = chosen.settings.dump()
    if student is not None:
        plain["distill"]["student"] = {"name": student} if isinstance(student, str) else dict(student)
    values = {
        "distill.loop.epochs": epochs,
        "distill.loop.batch_size": batch_size,
        "distill.loop.optim.lr": lr,
        "distill.resources.num_workers": workers,
        "distill.resources.gpus_per_worker": gpus,
        "evaluate.seeds": seeds,
        "evaluate.controls": None if controls is None else list(controls),
    }
    given = {key: value for key, value in values.items() if value is not None}
    wanted = _with(apply(validate(Settings, plain, where="distill"), given), settings)
    return Student(wanted, _run(wanted, "evaluate", quiet, verbose))


@_discreet
def register(
    student: Student,
    *,
    name: str | None = None,
    uri: str | None = None,
    alias: str | None = None,
    gate: bool | None = None,
    promote: bool | None = None,
    settings: More | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> Version:
    """Make the student a version of a registered model, if it passes the gate.

    Parameters
    ----------
    student : Student
    name : str, optional
        The registered model; default ``faculty-student``.
    uri : str, optional
        The MLflow server or database; default: where the run is recorded.
    alias : str, optional
        Is moved to the version; default ``challenger``.
    gate : bool, optional
        False: register a student that teachers did not help, too.
    promote : bool, optional
        True: it becomes the champion if it beats the present one.
    settings, quiet, verbose
        See `assess`.

    Raises
    ------
    FacultyError
        In one line: what is wrong with which input, and the remedy.
    """
    _expect(student, Student, "register", "distill")
    values = {"name": name, "alias": alias, "gate": gate, "promote": promote, "enabled": True}
    given = {f"register.{key}": value for key, value in values.items() if value is not None}
    if uri is not None:
        given |= {"tracking.uri": uri, "tracking.enabled": True}
    wanted = _with(apply(student.settings, given), settings)
    return Version(wanted, _run(wanted, "register", quiet, verbose))


def _with(settings: Settings, more: More | None) -> Settings:
    """Return settings with further ones laid over them, in order."""
    if more is None:
        return settings
    for part in [more] if isinstance(more, Mapping | str | Path) else more:
        if isinstance(part, Mapping):
            settings = apply(settings, part)
        elif isinstance(part, str | Path):
            settings = overlay(settings, part)
        else:
            raise ConfigError(f"settings: takes a mapping or the path of a YAML file, got {type(part).__name__}")
    return settings


def _run(settings: Settings, until: str, quiet: bool, verbose: bool) -> Mapping[str, Record]:
    from pipeline.stages.run import run_pipeline

    return run_pipeline(settings, until=until, verbose=verbose, display=CallDisplay(quiet))


def _expect(value: object, kind: type, call: str, maker: str) -> None:
    if not isinstance(value, kind):
        raise UserError(f"{call}: takes what {maker} returned, got {type(value).__name__}")
