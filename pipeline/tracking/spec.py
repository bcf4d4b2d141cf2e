"""Settings of tracking and of the model registry. Knows no MLflow."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from pipeline.strict import StrictModel


class TrackingSpec(StrictModel):
    """Where runs are recorded.

    Attributes
    ----------
    enabled : bool
        Without tracking nothing is recorded and no student can be registered.
    uri : str, optional
        An MLflow server (``http://host:5000``), a database (``sqlite:////path/mlflow.db``, ``postgresql://…``), or
        ``jsonl`` for a plain file ``tracking.jsonl`` in the run folder. Default: the environment's
        ``MLFLOW_TRACKING_URI``, else a database of its own in the run folder, with the artefacts beside it.
        Credentials belong in ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD`` or
        ``MLFLOW_TRACKING_TOKEN``.
    experiment : str
        The experiment that the runs belong to; created where it does not exist.
    artifacts : str, optional
        Where a new experiment keeps its artefacts (a folder or a URI). Only for a database without a server: a server
        decides itself. Default: the folder ``mlartifacts`` beside a SQLite database.
    timeout : float
        Seconds a server may take to answer when a run begins, before the run stops; and seconds that a run waits at its
        end for a server that has not got everything yet.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = Field(default="faculty", min_length=1, max_length=500)
    artifacts: str | None = None
    timeout: float = Field(default=10.0, gt=0, le=600)

    @field_validator("uri", "artifacts", mode="before")
    @classmethod
    def _no_blank(cls, value: object) -> object:
        return (value.strip() or None) if isinstance(value, str) else value

    @field_validator("experiment")
    @classmethod
    def _no_blank_name(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("an experiment needs a name")
        return value.strip()


class RegisterSpec(StrictModel):
    """How the student enters the model registry, and what it has to beat.

    A further version costs nothing; another version under the alias that people load may cost a lot. So there are two
    hurdles, both on the test images, and two aliases:

    1. *No teacher.* The student must be ahead of the same student trained without teachers by more than `margin` points
       (means over ``evaluate.seeds``). If it is not, the teachers were of no use and **no version is made**.
    2. *The champion.* The version that `champion` names now is loaded without unpickling and asked the very same test
       images. The student must be ahead of it by more than `margin` points and by more than `standard_errors` standard
       errors of the paired difference, so that luck on a few images replaces nothing. Otherwise it is a challenger
       only. The first student finds no champion and has nothing to beat.

    Every version that is made gets `alias`, and a tag ``faculty.gate``: ``passed``, ``failed`` or ``not judged``. The
    last is for what can't be compared: no labels, no test images, no control in ``evaluate.controls``, a champion with
    other classes. A student that is itself the one without teachers (none was chosen, or the guard dropped them) has
    only the champion to beat.

    `champion` moves by ``faculty promote`` alone, which refuses a version that has not passed, or by the run itself
    where `promote` is set; never to a version that has not passed.

    Attributes
    ----------
    enabled : bool
        Register the student at the end of the run.
    name : str
        The registered model; every new student is a version of it.
    alias : str
        The alias that is moved to every version that is registered: ``models:/<name>@<alias>`` loads it.
    champion : str
        The alias that people load in production, and that a student is compared with.
    gate : bool
        Whether a student that fails the first hurdle is kept out. Without it every student becomes a version; what was
        found is recorded all the same, and counts for `promote`.
    margin : float
        Points of test accuracy.
    standard_errors : float
        Of the paired difference to the champion; 0: the margin alone decides.
    promote : bool
        Move `champion` to a version that has passed, without a person in between (for CI).
    """

    enabled: bool = True
    name: str = "faculty-student"
    alias: str = "challenger"
    champion: str = "champion"
    gate: bool = True
    margin: float = Field(default=0.5, ge=0, le=100)
    standard_errors: float = Field(default=2.0, ge=0, le=10)
    promote: bool = False

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return check_model_name(value)

    @field_validator("alias", "champion")
    @classmethod
    def _alias(cls, value: str) -> str:
        return check_alias(value)

    @model_validator(mode="after")
    def _two_aliases(self) -> RegisterSpec:
        # Every student gets `alias`: under one name each would replace what is served, whatever the gate says.
        if self.alias.lower() == self.champion.lower():
            raise ValueError(
                f"`alias` and `champion` are both {self.alias!r}; they must differ, set `promote` to serve a student "
                "that passes at once"
            )
        return self


def check_model_name(name: str) -> str:
    """Return `name` if the registry admits it.

    Raises
    ------
    ValueError
        When it is empty, too long, or holds one of ``/ : @``, which part the fields of a model's URI.
    """
    if not name.strip() or len(name) > 250 or re.search(r"[/:@\s]", name) or name in {".", ".."}:
        raise ValueError(f"a model's name has 1 to 250 characters, no blank and none of / : @, got {name!r}")
    return name


def check_alias(alias: str) -> str:
    """Return `alias` if the registry admits it.

    Raises
    ------
    ValueError
        When it holds other characters than letters, digits, ``_`` and ``-``, or is reserved (``latest``, ``v1``).
    """
    if not re.fullmatch(r"[\w-]{1,250}", alias, re.ASCII):
        raise ValueError(f"an alias holds letters, digits, _ and - only, got {alias!r}")
    if alias.lower() == "latest" or re.fullmatch(r"(?i)v\d+", alias):
        raise ValueError(f"the registry reserves the alias {alias!r}; take another, for example challenger")
    return alias
