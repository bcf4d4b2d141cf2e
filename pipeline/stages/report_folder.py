"""A run as its folder has it: which results belong together, and a `Run` over them without zoo and cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from pipeline.errors import ConfigError, StageError, UserError
from pipeline.report.console import Display
from pipeline.settings_files import apply, load_settings
from pipeline.stages.artefacts import Record, RunFolder
from pipeline.stages.base import Run, Stage

_CLOSED = "recorded.json"  # which results the last whole run had, see `pipeline.stages.recording`


class KeptRun(Run):
    """A run that is over: teachers are known by what the assessment wrote down, their weights need not be there."""

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        from pipeline.stages.assess import rows_of

        return {row["teacher"]: row["fingerprint"] for row in rows_of(self)} if "assess" in self.records else {}

    def fingerprint(self, name: str) -> str:
        """Return what the teacher's results are keyed by."""
        try:
            return self._fingerprints[name]
        except KeyError:
            raise StageError(f"the assessment has no teacher {name!r}") from None


def kept_run(root: str | Path, display: Display | None = None) -> KeptRun:
    """Open a run folder as it stands.

    Raises
    ------
    UserError
        If it is no run folder, of another format version, or no stage in it has finished.
    """
    files = RunFolder(root)
    files.check()
    if not (files.root / "run.json").is_file():
        raise UserError(
            f"{files.place}: is no run folder (it has no run.json); give the run_dir of a run, or run it first"
        )
    settings_file = files.root / "settings.yaml"
    if not settings_file.is_file():
        raise UserError(f"{settings_file}: does not exist; run the pipeline into this folder first")
    try:
        settings = apply(load_settings([settings_file]), {"run_dir": files.place})
    except ConfigError as error:
        raise UserError(f"{error}; it was written by another version, run the pipeline again with this one") from None
    records = records_of(files)
    if not records:
        raise UserError(f"{files.place}: no stage has finished in it; run the pipeline first")
    nobody = cast(Any, {})
    return KeptRun(settings=settings, files=files, display=display or Display(), zoo=nobody, records=records)


def records_of(files: RunFolder, known: Mapping[str, Record] | None = None) -> dict[str, Record]:
    """Return the results that belong together: those of the last whole run, else the newest that fit each other.

    Parameters
    ----------
    files : RunFolder
    known : mapping of str to Record, optional
        Results that are among them, by stage: those of a run that went as far as these.
    """
    from pipeline.stages.run import STAGES

    closed = _closed(files)
    found: dict[str, Record] = {}
    for stage in STAGES:
        if known and stage.name in known:
            found[stage.name] = known[stage.name]
            continue
        fitting = [record for record in _finished(files, stage.name) if _fits(stage, record, found)]
        if fitting:
            found[stage.name] = max(fitting, key=lambda one: (one.key == closed.get(one.stage), one.finished))
    return found


def _fits(stage: Stage, record: Record, found: dict[str, Record]) -> bool:
    return all(need in found and record.inputs.get(f"{need}.digest") == found[need].digest for need in stage.needs)


def _finished(files: RunFolder, stage: str) -> list[Record]:
    records = []
    for path in (files.root / stage).glob("*/stage.json"):
        try:
            records.append(Record(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # cut off by a crash: the stage is not finished
    return records


def _closed(files: RunFolder) -> dict[str, str]:
    try:
        return dict(json.loads((files.root / _CLOSED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
