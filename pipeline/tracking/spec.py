"""Settings of tracking and of the model registry. Knows no MLflow."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

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
        Seconds a server may take to answer before the run stops.
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
    """How the student enters the model registry.

    Attributes
    ----------
    enabled : bool
        Register the student at the end of the run.
    name : str
        The registered model; every new student is a version of it.
    alias : str
        The alias that is moved to this version: ``models:/<name>@<alias>`` loads it.
    """

    enabled: bool = True
    name: str = "faculty-student"
    alias: str = "challenger"

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return check_model_name(value)

    @field_validator("alias")
    @classmethod
    def _alias(cls, value: str) -> str:
        return check_alias(value)


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
