"""What is recorded of a run as a whole: where it comes from, and what became of it.

The stages' own records are in `recording_teachers` (assess, select), `recording_data` (ingest, amalgamate) and
`recording_trainings` (distill, evaluate). None of them may end a run, see `optional`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline.stages.artefacts import Record, digest_of, write_json, write_text
from pipeline.tracking.redact import redact
from pipeline.tracking.tracker import NoTracker

if TYPE_CHECKING:
    from pipeline.stages.base import Run

NOTE_TAG = "mlflow.note.content"  # what MLflow shows as a run's description, in Markdown
BY_EPOCH = ("loss", "images_per_second")  # of a stage's numbers: they stand at its epochs already
_CODE = Path(pipeline.__file__).parent
_GIT_S = 5.0
_NOTED = 8  # controls in the note; all of them are in `summary.md`
_CLOSED = "recorded.json"

_log = logging.getLogger("pipeline.tracking")


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Go on where something could not be recorded, with one warning: hours of compute don't end for a picture."""
    try:
        yield
    except Exception as error:
        lines = redact(str(error)).strip().splitlines()
        _log.warning("%s could not be recorded: %s: %s", what, type(error).__name__, lines[0][:300] if lines else "")


def recorded(run: Run) -> bool:
    """Return whether anything is recorded at all; where not, no plot need be drawn for it."""
    return not isinstance(run.tracker, NoTracker)


def opening_tags(run: Run) -> dict[str, str]:
    """Return the tags of the whole run: version, commit, hash of the settings, run folder."""
    return {
        "faculty.version": version(),
        "settings.hash": digest_of(run.settings.dump())[:16],
        "run_dir": redact(run.files.place),
        **git_tags(_CODE),
    }


def version() -> str:
    """Return this package's version; "unknown" where it is not installed."""
    try:
        return importlib.metadata.version("faculty")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def git_tags(folder: Path) -> dict[str, str]:
    """Return the commit that `folder` is at and whether files have been changed since; empty without Git.

    ``mlflow.source.git.commit`` is the name under which MLflow shows it.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    tags = {"mlflow.source.git.commit": commit, "git.commit": commit}
    return tags if changed is None else tags | {"git.dirty": str(bool(changed)).lower()}


def _git(folder: Path, *arguments: str) -> str | None:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_S,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Return what the run was computed with: Python, system, processors, versions of all installed packages."""
    about = (found.metadata for found in importlib.metadata.distributions())  # each look reads and parses a file
    packages = {str(one["Name"]): one["Version"] for one in about if one["Name"]}
    return {
        "faculty": version(),
        "python": sys.version.split()[0],
        "implementation": platform.python_implementation(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def record_opening(run: Run) -> None:
    """Record environment, lock file and settings of the whole run."""
    if not recorded(run):
        return
    with optional("the environment"):
        run.root.document("environment", environment())
    with optional("the settings"):
        run.root.artifact(run.files.root / "settings.yaml")
    lock = _CODE.parent / "requirements.lock"
    if lock.is_file():  # a checkout has it, an installed package does not
        with optional("the lock file"):
            run.root.artifact(lock)


def record_cluster(run: Run) -> None:
    """Record which job of which cluster the run is."""
    if not recorded(run):
        return
    from pipeline.cluster.identity import about_job

    with optional("the cluster"):
        run.root.tags(about_job())


def record_stage(run: Run, stage: str, numbers: Mapping[str, float], seconds: float) -> None:
    """Record a stage's numbers with the whole run, too, and what is known by now as its description."""
    with optional(f"{stage} in the whole run"):
        run.root.metrics({f"{stage}.{name}": value for name, value in numbers.items()} | {f"{stage}.seconds": seconds})


@contextlib.contextmanager
def described(run: Run) -> Iterator[None]:
    """Run the stages; whatever becomes of them, the run's description tells it."""
    try:
        yield
    except BaseException as error:
        lines = redact(str(error)).strip().splitlines()
        record_verdict(run, f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
        raise
    from pipeline.tracking.connect import records_wait

    if not is_closed(run):
        run.open_tracker()  # already open, unless a former process was killed at its very end
        record_verdict(run)
    elif run.root.run_id is None and records_wait(run.settings.tracking, run.files.root):
        run.open_tracker()  # sends what could not be sent before


def is_closed(run: Run) -> bool:
    """Return whether the end of a run with these results was recorded; False after a kill at the very end."""
    known = _closed(run)
    return all(known.get(name) == record.key for name, record in run.records.items())


def close(run: Run) -> None:
    """Keep that the end of the run was recorded."""
    if not is_closed(run):
        with optional("the end of the run"):
            keys = {name: record.key for name, record in run.records.items()}
            write_json(run.files.root / _CLOSED, _closed(run) | keys)


def _closed(run: Run) -> dict[str, str]:
    try:
        return dict(json.loads((run.files.root / _CLOSED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def record_verdict(run: Run, trouble: str = "") -> None:
    """Record what came out as the run's description and as `summary.md`.

    Parameters
    ----------
    run : Run
    trouble : str
        What ended the run; "" when it went well.
    """
    if isinstance(run.root, NoTracker):
        return
    with optional("the summary"):
        choice, evaluation = _artefact(run, "select", "faculty.json"), _artefact(run, "evaluate", "evaluation.json")
        run.root.tags({NOTE_TAG: summary(run.records, choice, evaluation, trouble, arms=_NOTED)})
        path = run.files.root / "summary.md"
        title = f"# {run.settings.name}\n\n"
        write_text(path, redact(title + summary(run.records, choice, evaluation, trouble)) + "\n")
        run.root.artifact(path)


def _artefact(run: Run, stage: str, name: str) -> dict[str, Any] | None:
    if stage not in run.records:
        return None
    return json.loads((run.folder(stage) / name).read_text(encoding="utf-8"))


def summary(
    records: Mapping[str, Record],
    choice: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    trouble: str = "",
    *,
    arms: int | None = None,
) -> str:
    """Return what came out of a run, in Markdown: the verdict first, then results, teachers, data, stages.

    Parameters
    ----------
    records : mapping of str to Record
        The stages that have finished.
    choice, evaluation : mapping or None
        `faculty.json` and `evaluation.json`.
    trouble : str
        What ended the run; "" when it went well.
    arms : int, optional
        How many controls to list at most.
    """
    parts = []
    if trouble:
        parts.append(f"**Ended early: {trouble}**")
    if evaluation is not None:
        parts.append(f"**{_upper(evaluation['verdict'])}.**")
        if evaluation["arms"]:
            parts.append(_results(evaluation["arms"], arms))
    if choice is not None:
        chosen = ", ".join(f"`{name}`" for name in choice["chosen"]) or "none"
        parts.append(f"Faculty: {chosen}. {_upper(choice['verdict'])}.")
    if "assess" in records:
        found = records["assess"].summary
        parts.append(f"Teachers: {found['teachers']} in all, {found['dropped']} dropped, {found['failed']} failed.")
    if "ingest" in records:
        found = records["ingest"].summary
        parts.append(
            f"Images: {found['rows']} of {found['classes']} classes, fingerprint `{records['ingest'].digest[:16]}`."
        )
    if "distill" in records:
        found = records["distill"].summary
        text = f"Student: {found['parameters']:,} parameters, {found['epochs']} epochs"
        if "validation_accuracy" in found:
            text += f", validation accuracy {100 * found['validation_accuracy']:.1f} %"
        parts.append(f"{text}.")
    if "register" in records and "uri" in records["register"].summary:
        parts.append(f"Registered as `{records['register'].summary['uri']}`.")
    if records:
        parts.append("Stages: " + ", ".join(f"{name} {record.seconds:.1f} s" for name, record in records.items()) + ".")
    return "\n\n".join(parts)


def _results(arms: list[dict[str, Any]], most: int | None) -> str:
    lines = ["| student taught by | seeds | test accuracy, % | ECE | difference, points |", "|---|---|---|---|---|"]
    for arm in arms[:most]:
        spread = f" ± {100 * arm['std']:.1f}" if len(arm["accuracies"]) > 1 else ""
        gap, error = arm.get("difference"), arm.get("difference_2se")
        told = "" if gap is None else f"{100 * gap:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
        lines.append(
            f"| {arm['title'].replace('|', '/')} | {len(arm['accuracies'])} | {100 * arm['mean']:.1f}{spread} "
            f"| {arm['ece']:.3f} | {told} |"
        )
    return "\n".join(lines)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".")
