"""Registered students from the outside: their lineage shown, one of them made champion. Needs no run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.report.console import Display
from pipeline.tracking.spec import RegisterSpec, TrackingSpec

if TYPE_CHECKING:
    from pipeline.tracking.versions import Registry


def promote_student(
    model: str,
    tracking_uri: str | None = None,
    config: Sequence[Path] = (),
    *,
    back: bool = False,
    force: bool = False,
    display: Display | None = None,
) -> None:
    """Let the champion's alias point to a version that has passed the gate, or to the former champion again.

    Parameters
    ----------
    model : str
        ``models:/name/3`` or ``models:/name@challenger``; with `back` the model's name.
    tracking_uri : str, optional
        Where the registry is; default: that of the settings in `config`, else ``MLFLOW_TRACKING_URI``.
    config : sequence of Path
        Files of settings; they also name the champion's alias, ``champion`` without them.
    back : bool
        Take the last promotion back.
    force : bool
        Promote a version although it has not passed the gate.

    Raises
    ------
    UserError
        When there is no such version or registry, or the version has not passed the gate.
    StageError
        When the registry can't be reached or refuses.
    """
    from pipeline.tracking.champion import demote, promote

    display = display or Display()
    registry, settings = _registry(tracking_uri, config)
    if back:
        done = demote(registry, model, alias=settings.champion)
    else:
        done = promote(registry, model, alias=settings.champion, force=force)
    where = f"models:/{done.name}@{done.alias}"
    if not done.moved:
        display.note(f"{where} is version {done.version} already")
        return
    display.note(f"{where}  {f'version {done.former}' if done.former else 'nothing'} → version {done.version}")
    if done.forced:
        display.warn("the gate was overruled; the version's tag faculty.promoted says so")
    if not back and done.former is not None:
        display.note(f"to take it back: faculty promote --back {done.name}")


def show_lineage(
    model: str,
    tracking_uri: str | None = None,
    config: Sequence[Path] = (),
    *,
    as_json: bool = False,
    display: Display | None = None,
) -> None:
    """Print where a version comes from, as a tree or as JSON; parameters and errors as in `promote_student`."""
    from pipeline.report.tree import lineage_tree
    from pipeline.tracking.lineage import trace

    display = display or Display()
    found = trace(_registry(tracking_uri, config)[0], model)
    if as_json:
        display.console.print(json.dumps(found, indent=1, ensure_ascii=False), markup=False, soft_wrap=True)
    else:
        display.console.print(lineage_tree(found), soft_wrap=True)


def _registry(tracking_uri: str | None, config: Sequence[Path]) -> tuple[Registry, RegisterSpec]:
    """Open the registry that the options lead to; return it with the settings of registration."""
    from pipeline.settings_files import load_settings
    from pipeline.tracking.versions import open_registry

    registration, tracking, run_dir = RegisterSpec(), TrackingSpec(), ""
    if config:
        settings = load_settings(config)
        registration, tracking, run_dir = settings.registration, settings.tracking, settings.run_dir
    if tracking_uri is not None:
        tracking = TrackingSpec(uri=tracking_uri)
    elif not config and not os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        raise UserError("no model registry is named: give --tracking-uri, or -c run.yaml, or set MLFLOW_TRACKING_URI")
    return open_registry(tracking, run_dir), registration
