"""Settings of the zoo: a file, or what a model registry answers to a query."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.models.spec import TRUSTED_FACTORIES
from pipeline.strict import StrictModel


class RegistryQuery(StrictModel):
    """Which versions of a model registry are teachers.

    Attributes
    ----------
    filter : str, optional
        MLflow's search syntax, for example ``tags.task = 'birds'`` or ``name LIKE 'birds-%'``. A version is meant when
        its registered model fits, or it does itself; null: all models.
    alias : str, optional
        Take the version that this alias names, and no model without it; null: see `versions`.
    versions : {"latest", "all"}
        Of each model the newest version that is meant, or all of them.
    """

    filter: str | None = Field(
        None, description="with source: mlflow, in its search syntax: \"tags.task = 'birds'\"; null: all models"
    )
    alias: str | None = Field(None, description="with source: mlflow, the version of each model that this alias names")
    versions: Literal["latest", "all"] = Field(
        "latest", description="with source: mlflow and no alias, the newest version of each model, or all"
    )

    @field_validator("filter", "alias", mode="before")
    @classmethod
    def _no_blank(cls, value: object) -> object:
        return (value.strip() or None) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way(self) -> RegistryQuery:
        if self.alias is not None and self.versions == "all":
            raise ValueError("an `alias` names one version of a model; leave `versions: all` or the alias out")
        return self


class ZooSettings(RegistryQuery):
    """The repository of teachers: a file (`path`), or what a registry answers (`source: mlflow`)."""

    path: str | None = Field(None, description="the zoo: a YAML file, or a Parquet catalogue (`faculty zoo pack`)")
    source: Literal["mlflow"] | None = Field(
        None, description="mlflow, in the place of a path: the zoo is what the model registry of `tracking.uri` answers"
    )
    only: tuple[str, ...] | None = Field(None, description="assess these teachers alone; null: all")
    trusted_factories: tuple[str, ...] = Field(
        TRUSTED_FACTORIES,
        description="prefixes of the modules that a zoo file may take a `factory` from: it is code that will run",
    )
    allow_pickle: tuple[str, ...] = Field(
        (), description="teachers, by name, whose registered model may be unpickled, which runs its author's code"
    )

    @model_validator(mode="after")
    def _one_zoo(self) -> ZooSettings:
        if self.path is None and self.source is None:
            raise ValueError("give `path` (a zoo file), or `source: mlflow` and a `filter`")
        if self.path is not None and self.source is not None:
            raise ValueError("`path` and `source: mlflow` are two zoos; keep one and set the other to null")
        asked = [name for name in RegistryQuery.model_fields if getattr(self, name) not in (None, "latest")]
        if self.source is None and asked:
            raise ValueError(f"`{asked[0]}` asks a registry; it needs `source: mlflow` in the place of `path`")
        return self

    @property
    def query(self) -> RegistryQuery:
        """What the registry is asked."""
        return RegistryQuery(filter=self.filter, alias=self.alias, versions=self.versions)
