"""Settings of a sweep: what is varied, what is judged, and how trials are chosen. Imports neither Ray nor torch."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.strict import StrictModel

Mode = Literal["max", "min"]
# Of the student, after training; of the chosen teachers, without any.
STUDENT_METRICS: dict[str, Mode] = {"validation_accuracy": "max", "probe_accuracy": "max", "validation_nll": "min"}
FACULTY_METRICS: dict[str, Mode] = {"faculty_accuracy": "max", "faculty_nll": "min", "faculty_score": "max"}
_DEFAULT_TRIALS = 20
_MOST_GRID = 100_000


class Domain(StrictModel):
    """The values of one setting.

    `uniform` and `loguniform` are real numbers in [lower, upper], `int` and `logint` whole ones, both ends included;
    `choice` is one of `values`. A list in its place is a choice.
    """

    dist: Literal["uniform", "loguniform", "int", "logint", "choice"] = Field(description="how values are drawn")
    lower: float | None = Field(None, description="the least value; for all but choice")
    upper: float | None = Field(None, description="the largest value; for all but choice")
    step: float | None = Field(None, gt=0, description="uniform, int: only lower + k step")
    points: int | None = Field(None, ge=2, description="values that a grid takes of a range, both ends included")
    values: tuple[Any, ...] | None = Field(None, description="choice: plain values, also lists and mappings")

    @model_validator(mode="before")
    @classmethod
    def _list_is_choice(cls, data: Any) -> Any:
        return {"dist": "choice", "values": data} if isinstance(data, list | tuple) else data

    @model_validator(mode="after")
    def _whole(self) -> Domain:
        if self.dist == "choice":
            if not self.values:
                raise ValueError("choice: name at least one of `values`")
            if any(self.values[k] in self.values[:k] for k in range(len(self.values))):
                raise ValueError("choice: one of `values` is given twice; keep one")
            if (self.lower, self.upper, self.step, self.points) != (None,) * 4:
                raise ValueError("choice: has `values` alone; leave out lower, upper, step and points")
            return self
        if self.values is not None:
            raise ValueError(f"{self.dist}: has lower and upper; `values` belong to choice")
        if self.lower is None or self.upper is None or not self.lower < self.upper:
            raise ValueError(f"{self.dist}: needs lower < upper, got {self.lower} and {self.upper}")
        if self.log and self.lower <= 0:
            raise ValueError(f"{self.dist}: lower must be > 0, got {self.lower:g}")
        if self.log and self.step is not None:
            raise ValueError(f"{self.dist}: has no `step`; that belongs to uniform and int")
        whole = [value for value in (self.lower, self.upper, self.step) if value is not None]
        if self.whole and any(value != int(value) for value in whole):
            raise ValueError(f"{self.dist}: lower, upper and step must be whole numbers")
        if self.step is not None and self.step > self.upper - self.lower:
            raise ValueError(f"{self.dist}: step {self.step:g} is wider than the range")
        return self

    @property
    def log(self) -> bool:
        """Whether ratios count, rather than differences."""
        return self.dist in ("loguniform", "logint")

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return self.dist in ("int", "logint")

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values to try before anything runs: both ends of a range, every one of a choice."""
        if self.dist == "choice":
            assert self.values is not None
            return self.values
        return self.at(0.0), self.at(1.0)

    def at(self, place: float) -> Any:
        """Return the value at a place in [0, 1]: 0 is `lower`, 1 is `upper`, the last value for a choice."""
        if self.dist == "choice":
            assert self.values is not None
            return self.values[min(int(place * len(self.values)), len(self.values) - 1)]
        assert self.lower is not None and self.upper is not None
        if self.log:
            value = math.exp(math.log(self.lower) + place * (math.log(self.upper) - math.log(self.lower)))
        else:
            value = self.lower + place * (self.upper - self.lower)
        return self.fit(value)

    def fit(self, value: float) -> Any:
        """Return the value of a range that is nearest to a number: within the ends, on a step, whole if need be."""
        assert self.lower is not None and self.upper is not None
        if self.step is not None:
            most = math.floor((self.upper - self.lower) / self.step + 1e-9)
            value = self.lower + min(max(round((value - self.lower) / self.step), 0), most) * self.step
        value = min(max(value, self.lower), self.upper)
        return round(value) if self.whole else float(value)

    def draw(self, place: float) -> Any:
        """Return the value for a random number in [0, 1): each whole number, and each step, is as likely as another."""
        if self.dist == "choice" or (self.log and not self.whole):
            return self.at(place)
        assert self.lower is not None and self.upper is not None
        step = self.step or (1.0 if self.dist == "int" else None)
        if step is not None:
            count = math.floor((self.upper - self.lower) / step + 1e-9) + 1
            return self.fit(self.lower + min(int(place * count), count - 1) * step)
        return self.at(place)

    def grid(self) -> tuple[Any, ...] | None:
        """Return the values of a grid; None for a range that does not say how many."""
        if self.dist == "choice":
            return self.ends
        assert self.lower is not None and self.upper is not None
        if self.points is not None:
            found = [self.at(number / (self.points - 1)) for number in range(self.points)]
            return tuple(dict.fromkeys(found))
        step = self.step or (1.0 if self.dist == "int" else None)
        if step is None:
            return None
        count = math.floor((self.upper - self.lower) / step + 1e-9) + 1
        return tuple(self.fit(self.lower + number * step) for number in range(count))


class AshaSpec(StrictModel):
    """Asynchronous successive halving: at epochs `grace`, `grace`·`reduction`, … the worse trials end."""

    grace: int = Field(1, ge=1, description="epochs that every trial trains at least")
    reduction: float = Field(3.0, gt=1, description="of the trials that come to a rung, one in so many goes on")


class PbtSpec(StrictModel):
    """Population-based training: every `interval` epochs the worst trials go on from the weights of the best."""

    interval: int = Field(1, ge=1, description="epochs between two comparisons")
    quantile: float = Field(0.25, gt=0, le=0.5, description="share of the trials that are replaced, and that replace")
    resample: float = Field(0.25, ge=0, le=1, description="how often a value is drawn anew instead of shifted")


class SchedulerSpec(StrictModel):
    """Who decides, while trials train, which of them go on; one of the two."""

    asha: AshaSpec | None = None
    pbt: PbtSpec | None = None

    @model_validator(mode="after")
    def _one(self) -> SchedulerSpec:
        if (self.asha is None) == (self.pbt is None):
            raise ValueError("name one scheduler, for example {asha: {grace: 1}}")
        return self


class SweepSpec(StrictModel):
    """Many runs that differ in some settings, and the best of them.

    The metric is one on probe or validation images; the test split is not looked at.
    """

    space: dict[str, Domain] = Field(description="from the path of a setting to its values")
    metric: Literal[
        "validation_accuracy", "probe_accuracy", "validation_nll", "faculty_accuracy", "faculty_nll", "faculty_score"
    ] = Field(
        "validation_accuracy",
        description="of the student (validation_…, probe_…), or of the chosen teachers, with no training: accuracy or "
        "negative log-likelihood of what they say of the validation images in the mean, or the set's own score",
    )
    mode: Mode | None = Field(None, description="null: max for accuracies and scores, min for nll")
    search: Literal["random", "grid", "optuna"] = Field("random", description="how trials are chosen from the space")
    trials: int | None = Field(
        None, ge=1, description=f"how many at most; null: the whole grid, or {_DEFAULT_TRIALS} where none is searched"
    )
    scheduler: SchedulerSpec | None = Field(None, description="null: every trial trains to its end")
    max_concurrent: int | None = Field(None, ge=1, description="null: as many as the cluster's live resources hold")
    max_failures: int = Field(1, ge=0, description="restarts of a trial after a lost process")
    seed: int = Field(0, ge=0, description="of the search")
    promote: bool = Field(True, description="the best trial becomes the run's student, with the guard of `distill`")
    retrain: dict[str, Any] = Field(
        default_factory=dict,
        description="settings that the best one is trained anew with, for example distill.loop.epochs: 100",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SweepSpec:
        if not self.space:
            raise ValueError("space: is empty; name a setting, for example distill.loop.optim.lr: [1e-3, 3e-3]")
        if self.mode not in (None, self.direction):
            raise ValueError(f"mode: of {self.metric} the {self.direction} is best; leave mode out")
        if self.scheduler is not None and not self.of_student:
            raise ValueError(f"scheduler: {self.metric} needs no training; set scheduler to null")
        if self.scheduler is not None and self.scheduler.pbt is not None:
            self._population()
        if self.search == "grid":
            endless = [path for path, domain in self.space.items() if domain.grid() is None]
            if endless:
                raise ValueError(f"space.{endless[0]}: a grid needs to know how many values; give `points` or `step`")
            if self.grid_size > _MOST_GRID:
                raise ValueError(f"space: the grid has {self.grid_size} points; take fewer, or search: random")
        if self.retrain and not self.of_student:
            raise ValueError(f"retrain: {self.metric} trains no student; leave it out")
        return self

    def _population(self) -> None:
        if self.search != "random":
            raise ValueError("scheduler.pbt: begins with random trials; set search to random")
        for path, domain in self.space.items():
            if not path.startswith(("distill.loop.optim.", "distill.objective.")):
                raise ValueError(
                    f"space.{path}: can't change while a student trains; with pbt sweep distill.loop.optim and "
                    "distill.objective alone"
                )
            if domain.dist == "choice" and not all(isinstance(one, int | float) for one in domain.ends):
                raise ValueError(f"space.{path}: with pbt a choice must be among numbers")
        if self.count < 2:
            raise ValueError("trials: a population has two members at least")

    @property
    def of_student(self) -> bool:
        """Whether a student has to be trained to know the metric."""
        return self.metric in STUDENT_METRICS

    @property
    def population(self) -> bool:
        """Whether trials take over each other's state."""
        return self.scheduler is not None and self.scheduler.pbt is not None

    @property
    def direction(self) -> Mode:
        """Which end of the metric is the better one."""
        return (STUDENT_METRICS | FACULTY_METRICS)[self.metric]

    @property
    def grid_size(self) -> int:
        """Points of the grid."""
        return math.prod(len(domain.grid() or ()) for domain in self.space.values())

    @property
    def count(self) -> int:
        """How many trials there are at most."""
        if self.search == "grid":
            return min(self.grid_size, self.trials or self.grid_size)
        return self.trials or _DEFAULT_TRIALS
