"""Which settings a sweep may vary, and how its trials are chosen: at random, on a grid, or by Optuna."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.settings_files import apply
from pipeline.stages.artefacts import digest_of
from pipeline.sweep_spec import Domain, SweepSpec

Values = dict[str, Any]
_SECTIONS = ("assess", "select", "amalgamate", "distill")
# Others of the task change the images that trials are judged on; the splits are filled in an order in which these
# change none of them.
_TASK = ("task.splits.probe", "task.splits.train_labelled", "task.splits.train_unlabelled")
_EXTRA = "Optuna is not installed; `pip install 'faculty[optuna]'`, or set sweep.search to random or grid"
# Not part of what a trial is: where it runs, what is recorded, what comes after it.
_NOT_DECISIVE = ("name", "run_dir", "cluster", "tracking", "cache", "evaluate", "register", "sweep", "zoo")
_DRAWS = 50  # draws in a row that have been there, after which there is taken to be nothing new


def check_sweep(settings: Settings, file: str = "") -> SweepSpec:
    """Return the settings of the sweep, every path of which has been tried with the ends of its values.

    Parameters
    ----------
    settings : Settings
    file : str
        That holds them, for errors.

    Raises
    ------
    ConfigError
        Naming the file, the path, and the nearest valid key or the reason; also where an extra is not installed.
    """
    where = f"{file}: " if file else ""
    spec = settings.sweep
    if spec is None:
        raise ConfigError("no sweep: give a file with a section `sweep`, for example -c conf/sweep/example.yaml")
    for path, domain in spec.space.items():
        reason = _refusal(path, spec)
        if reason:
            raise ConfigError(f"{where}sweep.space.{path}: {reason}")
        for value in domain.ends:
            _try(settings, {path: value}, f"{where}sweep.space.{path}={value!r}")
    if spec.retrain:
        for path in spec.retrain:
            if not path.startswith("distill."):
                raise ConfigError(f"{where}sweep.retrain.{path}: the student alone is trained anew; give distill.…")
        _try(settings, spec.retrain, f"{where}sweep.retrain")
    if settings.task.splits.probe == 0:
        raise ConfigError(f"{where}sweep.metric: {spec.metric} needs labelled images, and the task has none")
    if spec.search == "optuna":
        _optuna(where)
    return spec


def _try(settings: Settings, values: Mapping[str, Any], where: str) -> None:
    try:
        apply(trial_settings(settings, {}), values)
    except ConfigError as error:
        # Each line begins with the overrides that it is about: here that is the space, or a table of the file.
        names = [f"override {path}={value}" for path, value in values.items()]
        text = str(error)
        for name in (" + ".join(names), *names):
            text = text.replace(f"{name}: ", "")
        raise ConfigError(f"{where}: {'; '.join(text.splitlines())}") from None


def _refusal(path: str, spec: SweepSpec) -> str:
    """Return why a setting can't be swept; "" if it can."""
    first, keys = path.partition(".")[0], path.split(".")
    if first == "task" or first == "seed":
        if path not in _TASK:
            return f"changes the images that trials are judged on; of the task only {', '.join(_TASK)} can be swept"
        if spec.metric in ("probe_accuracy", "faculty_score"):
            return f"changes the images of {spec.metric}; take validation_accuracy or faculty_accuracy"
        return ""
    if first in ("zoo", "tracking", "cluster", "cache", "evaluate", "register", "sweep", "name", "run_dir"):
        return f"has no part in what a trial is judged by; sweep {', '.join(_SECTIONS)} or {_TASK[0]}"
    if "resources" in keys:
        return "resources change no result; set them for all trials"
    if not spec.of_student and first in ("amalgamate", "distill"):
        return f"has no part in {spec.metric}; take validation_accuracy"
    if spec.metric == "faculty_score" and path in ("select.by", "select.teachers"):
        return "what it is compared by is scored otherwise; take faculty_accuracy"
    return ""


def trial_settings(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Return the settings of a trial: those of the run, without the sweep, and with some values replaced."""
    return apply(settings, {"sweep": None, **values})


def trial_id(settings: Settings) -> str:
    """Return what a trial is known by: a hash of all that its result depends on. The same values are the same trial."""
    return digest_of(_decisive(settings.dump()))[:10]


def sweep_key(settings: Settings, spec: SweepSpec, content: Any) -> str:
    """Return what a sweep is known by: its space, metric and search, and the run's settings. Not how many trials.

    Parameters
    ----------
    settings : Settings
    spec : SweepSpec
    content : plain values
        What else trials depend on: images and teachers.
    """
    about = spec.model_dump(mode="json", include={"space", "metric", "search", "scheduler", "seed"})
    return digest_of({"sweep": about, "settings": _decisive(settings.dump()), "content": content})[:10]


def _decisive(dump: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in dump.items() if key not in _NOT_DECISIVE}
    zoo = {"zoo": dump["zoo"].get("only")}
    return _without_resources(kept) | zoo


def _without_resources(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_resources(value) for key, value in data.items() if key != "resources"}
    return data


class Search(Protocol):
    """Where the values of the next trial come from."""

    @property
    def adaptive(self) -> bool:
        """Whether what it proposes depends on how trials ended."""
        ...

    def ask(self) -> Values | None:
        """Return the values of a further trial, or None when there is none."""
        ...

    def tell(self, values: Values, score: float | None) -> None:
        """Learn how a trial ended: its metric, or None where it has none."""
        ...


def make_search(spec: SweepSpec) -> Search:
    """Return the search that the settings name. The same settings propose the same trials."""
    if spec.search == "grid":
        return GridSearch(spec.space)
    if spec.search == "optuna":
        return OptunaSearch(spec.space, spec.direction, spec.seed)
    return RandomSearch(spec.space, spec.seed)


class GridSearch:
    """Every combination of values, the last setting varying fastest."""

    adaptive = False

    def __init__(self, space: Mapping[str, Domain]) -> None:
        self._names = list(space)
        self._points: Iterator[tuple[Any, ...]] = itertools.product(*(domain.grid() or () for domain in space.values()))

    def ask(self) -> Values | None:
        """Return the next combination."""
        point = next(self._points, None)
        return None if point is None else dict(zip(self._names, point, strict=True))

    def tell(self, values: Values, score: float | None) -> None:
        """Learn nothing."""


class RandomSearch:
    """Independent draws, none of them twice."""

    adaptive = False

    def __init__(self, space: Mapping[str, Domain], seed: int) -> None:
        self._space = dict(space)
        self._random = random.Random(seed)
        self._seen: set[str] = set()

    def ask(self) -> Values | None:
        """Return a draw that has not been there; None when there seems to be no other."""
        for _ in range(_DRAWS):
            values = {path: domain.draw(self._random.random()) for path, domain in self._space.items()}
            key = digest_of(values)
            if key not in self._seen:
                self._seen.add(key)
                return values
        return None

    def tell(self, values: Values, score: float | None) -> None:
        """Learn nothing."""


class OptunaSearch:
    """Optuna's tree-structured Parzen estimator, told of every trial that has ended, also of former calls."""

    adaptive = True

    def __init__(self, space: Mapping[str, Domain], direction: str, seed: int) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = dict(space)
        self._distributions = {path: _distribution(optuna, domain) for path, domain in space.items()}
        self._study = optuna.create_study(
            direction="maximize" if direction == "max" else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
        )
        self._open: dict[str, Any] = {}
        self._seen: dict[str, float | None] = {}
        self._optuna = optuna

    def ask(self) -> Values | None:
        """Return values that have not been there; None when it keeps coming back to known ones."""
        for _ in range(_DRAWS):
            trial = self._study.ask(self._distributions)
            values = {path: self._value(path, trial.params[path]) for path in self._space}
            key = digest_of(values)
            if key not in self._seen and key not in self._open:
                self._open[key] = trial
                return values
            self._end(trial, self._seen.get(key))
        return None

    def tell(self, values: Values, score: float | None) -> None:
        """Learn how a trial ended."""
        key = digest_of(values)
        self._seen[key] = score
        trial = self._open.pop(key, None)
        if trial is not None:
            self._end(trial, score)
        elif score is not None:  # of a former call
            created = self._optuna.trial.create_trial(
                params={path: self._parameter(path, value) for path, value in values.items()},
                distributions=self._distributions,
                value=score,
            )
            self._study.add_trial(created)

    def _end(self, trial: Any, score: float | None) -> None:
        if score is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, score)

    def _value(self, path: str, parameter: Any) -> Any:
        domain = self._space[path]
        # Optuna takes plain scalars alone for a choice: it is given their numbers.
        return domain.ends[parameter] if domain.dist == "choice" else domain.fit(parameter)

    def _parameter(self, path: str, value: Any) -> Any:
        domain = self._space[path]
        return domain.ends.index(value) if domain.dist == "choice" else value


def _optuna(where: str = "") -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError(f"{where}sweep.search: {_EXTRA}") from None
    return optuna


def _distribution(optuna: Any, domain: Domain) -> Any:
    kinds = optuna.distributions
    if domain.dist == "choice":
        return kinds.CategoricalDistribution(range(len(domain.ends)))
    low, high = domain.at(0.0), domain.at(1.0)  # the latter on a step: Optuna warns of a range that ends between two
    if domain.whole:
        return kinds.IntDistribution(low, high, log=domain.log, step=int(domain.step or 1))
    return kinds.FloatDistribution(low, high, log=domain.log, step=domain.step)


def planned(search: Search, count: int) -> list[Values]:
    """Return what a search that learns nothing proposes, `count` trials at most."""
    assert not search.adaptive
    found: list[Values] = []
    while len(found) < count:
        values = search.ask()
        if values is None:
            break
        found.append(values)
    return found


def numbers_of(space: Mapping[str, Domain], rows: Sequence[Mapping[str, Any]], path: str) -> list[float]:
    """Return the values of a setting as numbers: themselves for a range, their place for a choice."""
    domain = space[path]
    if domain.dist == "choice":
        plain = [list(one) if isinstance(one, tuple) else one for one in domain.ends]
        return [float(plain.index(row["values"][path])) for row in rows]
    return [float(row["values"][path]) for row in rows]
