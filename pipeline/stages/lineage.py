"""Where a student comes from: data, teachers, settings, code; gathered for its version in the registry."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline.models.files import file_sha256
from pipeline.stages.amalgamate import chosen
from pipeline.stages.artefacts import digest_of
from pipeline.stages.assess import rows_of
from pipeline.stages.base import Run
from pipeline.stages.gate import fingerprint_of
from pipeline.stages.recording import git_tags
from pipeline.stages.teachers import table_of
from pipeline.stages.together import TOGETHER
from pipeline.tracking.entries import clean_document
from pipeline.tracking.versions import WEIGHTS_TAG, by_number

if TYPE_CHECKING:
    from pipeline.data.spec import SourceSpec
    from pipeline.models.spec import TeacherSpec
    from pipeline.tracking.versions import Registry

FORMAT = 1
_STAGES = ("ingest", "assess", "select", "amalgamate", "distill", "evaluate")
_PACKAGES = ("faculty", "torch", "torchvision", "timm", "numpy", "pyarrow", "ray", "mlflow")
_SPLITS = ("train_labelled", "train_unlabelled", "probe", "validation", "test")
_SCORES = ("score", "score_low", "score_high", "bridge_gain", "knn")
_REGISTERED = re.compile(r"models:/+([^/@]+)/(\d+)")


def lineage_of(run: Run, registry: Registry | None = None) -> dict[str, Any]:
    """Return all that a run's student was made from, as plain values without credentials.

    Parameters
    ----------
    run : Run
        With all stages up to `evaluate` finished.
    registry : Registry, optional
        Tells the hashes of teachers that are registered students.
    """
    lineage = {
        "format": FORMAT,
        "data": _data(run),
        "teaching": _teaching(run),
        "teachers": _teachers(run, chosen(run)["chosen"], registry),
        "student": run.settings.distill.student.model_dump(mode="json", exclude_none=True),
        "settings": _settings(run),
        "stages": {name: run.records[name].key for name in _STAGES},
        "run": _run(run),
        "code": _code(),
    }
    return clean_document(lineage)


def identity_of(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells one version from another besides its weights: no places, times, scores, run ids or versions."""
    return {
        "data": lineage["data"]["fingerprint"],
        "teachers": {
            name: {"fingerprint": teacher["fingerprint"], "licence": teacher["licence"]}
            for name, teacher in lineage["teachers"].items()
        },
    }


def _data(run: Run) -> dict[str, Any]:
    task, table = run.settings.task, table_of(run)
    counts = table.counts()
    sources = {"source": task.source, "test_source": task.test_source}
    return {
        "fingerprint": table.fingerprint,
        "test_fingerprint": fingerprint_of(table.split("test")),
        "sources": {name: _place(source) for name, source in sources.items() if source is not None},
        "images": {split: sum(counts.get(split, {}).values()) for split in _SPLITS},
        "classes": len(table.classes),
        "image_shape": list(table.image_shape),
    }


def _place(source: SourceSpec) -> dict[str, str]:
    if source.type == "torchvision":
        return {"type": source.type, "location": f"{source.name} in {source.root}"}
    return {"type": source.type, "location": source.factory if source.type == "own" else source.path}


def _teaching(run: Run) -> str:
    """Say how the chosen teachers taught: together, direct (an image each), components, or none."""
    shares = run.records["amalgamate"].summary.get("shares", {})
    if not shares or not run.records["distill"].summary.get("taught", True):
        return "none"
    if run.settings.amalgamate.mode == "components":
        return "components"
    return "together" if set(shares) == {TOGETHER} else "direct"


def _teachers(run: Run, names: list[str], registry: Registry | None) -> dict[str, Any]:
    rows = {row["teacher"]: row for row in rows_of(run)}
    return {name: _teacher(run, name, rows.get(name, {}), registry) for name in names}


def _teacher(run: Run, name: str, row: Mapping[str, Any], registry: Registry | None) -> dict[str, Any]:
    spec = run.zoo[name]
    return {
        "source": {"type": spec.source.type, "location": _where(spec)},
        "fingerprint": run.fingerprint(name),
        "weights_sha256": _weights(spec, registry),
        "licence": spec.licence,
        "preprocessing": None if spec.preprocessing is None else spec.preprocessing.model_dump(mode="json"),
        "classes": row.get("classes"),
        "parameters": row.get("parameters"),
        "own_accuracy": spec.accuracy,
        "scores": {key: row[key] for key in _SCORES if row.get(key) is not None},
        "share": _share(run, name),
    }


def _where(spec: TeacherSpec) -> str:
    source: Any = spec.source
    if source.type == "mlflow":
        return str(source.uri)
    if spec.path is not None:
        return spec.path
    weights = getattr(source, "weights", None)
    return f"{source.model} {weights}" if weights else str(source.model)


def _weights(spec: TeacherSpec, registry: Registry | None) -> str | None:
    """Return the hash of the file, or of the weights of a registered student; None where neither is known."""
    match = _REGISTERED.fullmatch(spec.source.uri) if spec.source.type == "mlflow" else None
    if match is not None and registry is not None:
        version = by_number(registry, match[1], match[2])
        if version is not None and WEIGHTS_TAG in version.tags:
            return version.tags[WEIGHTS_TAG]
    if spec.sha256 is not None or spec.path is None:
        return spec.sha256
    try:
        return file_sha256(spec.path)
    except OSError:  # it has gone since it was used; its fingerprint stays
        return None


def _share(run: Run, name: str) -> dict[str, float] | float | None:
    """Return the share of the training images that a teacher taught alone; by sub-task where there are several.

    None where all taught every image together; 0 where the student was trained without them.
    """
    if _teaching(run) == "none":
        return 0.0
    shares = run.records["amalgamate"].summary.get("shares", {})
    if set(shares) == {TOGETHER}:
        return None
    nested = {key: counts for key, counts in shares.items() if isinstance(counts, Mapping)}
    if nested:
        return {key: _part(counts, name) for key, counts in nested.items() if name in counts}
    return _part(shares, name)


def _part(counts: Mapping[str, int], name: str) -> float:
    total = sum(counts.values())
    return counts.get(name, 0) / total if total else 0.0


def _settings(run: Run) -> dict[str, Any]:
    settings = run.settings
    return {
        "sha256": digest_of(settings.dump()),
        "seed": settings.seed,
        "epochs": settings.distill.loop.epochs,
        "objective": [*(name for name, _ in settings.distill.objective.parts()), *settings.distill.objective.own],
        "flow": settings.distill.flow is not None,
        "start_from": settings.distill.start_from,
    }


def _run(run: Run) -> dict[str, Any]:
    return {"name": run.settings.name, "run_id": run.root.run_id, "stage_run_id": run.tracker.run_id}


def _code() -> dict[str, Any]:
    packages = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    tags = git_tags(Path(pipeline.__file__).parent)
    commit = {"commit": tags["git.commit"], "changed": tags.get("git.dirty") == "true"} if tags else {}
    return {"packages": packages, **commit}
