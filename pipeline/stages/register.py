"""Stage register: past the gate the student becomes a version of a registered model, with its lineage."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, FacultyError
from pipeline.stages.amalgamate import chosen
from pipeline.stages.artefacts import digest_of, write_json, write_text
from pipeline.stages.base import Outcome, Run
from pipeline.stages.heads import student_classes
from pipeline.stages.teachers import table_of
from pipeline.tracking.champion import AGAINST_TAG, GATE_TAG, NOBODY, PASSED, WHY_TAG
from pipeline.tracking.redact import redact

if TYPE_CHECKING:
    from pipeline.stages.gate import Decision
    from pipeline.tracking.registry import RegisteredStudent
    from pipeline.tracking.versions import Registry

_EXAMPLE = 4


class Register:
    """Student and evaluation → a model version if it passes the gate, `registered.json`, `model_card.md`."""

    name = "register"
    version = 2
    needs = ("ingest", "assess", "select", "amalgamate", "distill", "evaluate")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings, the store it goes to, and the champion that the student is compared with."""
        from pipeline.tracking.connect import find_store

        return {
            "register": run.settings.registration.model_dump(mode="json", exclude={"enabled"}),
            "licences": {name: redact(run.zoo[name].licence) for name in chosen(run)["chosen"]},
            "store": find_store(run.settings.tracking, run.files.root).shown,
            "champion": _champion_for(run),
        }

    def run(self, run: Run, folder: Path) -> Outcome:
        """Judge, export and register; the same content again adds no version."""
        from pipeline.models.student import load_student
        from pipeline.stages.gate import judge
        from pipeline.stages.lineage import lineage_of
        from pipeline.stages.model_card import licence_warnings, model_card
        from pipeline.tracking.export import weights_sha256
        from pipeline.tracking.mlflow import MlflowTracker
        from pipeline.tracking.versions import Registry, by_alias

        if not isinstance(run.tracker, MlflowTracker):
            raise ConfigError(
                "register.enabled: there is no model registry without MLflow; set register.enabled=false, or "
                "tracking.enabled=true and tracking.uri to MLflow's"
            )
        run.tracker.flush()  # a server that is on its way back is waited for
        settings, registry = run.settings.registration, Registry.of(run.tracker)
        student = load_student(run.folder("distill"), trusted_factories=None)
        champion = by_alias(registry, settings.name, settings.champion)
        decision = judge(run, registry, champion, weights_sha256(student))
        lineage = lineage_of(run, registry)
        card = model_card(run, lineage, decision)
        write_text(folder / "model_card.md", card)
        details: dict[str, Any] = {
            "name": settings.name,
            "version": None,
            "alias": None,
            "uri": None,
            "promoted": False,
            "gate": decision.gate,
        }
        created = False
        if decision.admitted:
            began = time.perf_counter()
            with run.display.working("exporting and registering"):
                found = _register(run, student, lineage, card, decision)
            if found.created:
                run.timed["register"] = time.perf_counter() - began
            details |= {"version": found.version, "alias": found.alias, "uri": found.uri}
            created = found.created
            details["promoted"] = settings.promote and _promote(run, registry, found, decision)
        told = details | {"why": decision.why, "warnings": licence_warnings(lineage["teachers"])}
        write_json(folder / "registered.json", told | {"decision": decision.as_dict(), "lineage": lineage})
        run.tracker.artifact(folder / "registered.json")
        run.tracker.artifact(folder / "model_card.md")
        run.tracker.tags({GATE_TAG: decision.gate, WHY_TAG: decision.why})
        differences = {
            f"difference.{hurdle.against.replace(' ', '_')}": hurdle.difference
            for hurdle in decision.hurdles
            if hurdle.difference is not None
        }
        summary = {name: value for name, value in told.items() if value is not None}
        return Outcome(digest=digest_of(details), summary={**summary, "created": created, **differences})


def _register(run: Run, student: Any, lineage: Mapping[str, Any], card: str, decision: Decision) -> RegisteredStudent:
    from pipeline.engine.arms import TAUGHT
    from pipeline.stages.lineage import identity_of
    from pipeline.tracking.registry import register_student

    settings = run.settings.registration
    return register_student(
        run.tracker,
        student=student,
        example=table_of(run).split(*TAUGHT).images(slice(0, _EXAMPLE)).numpy(),
        classes=student_classes(run),
        name=settings.name,
        alias=settings.alias,
        tags=_tags(run, lineage, decision),
        metadata=lineage,
        identity=identity_of(lineage),
        model_card=card,
    )


def _tags(run: Run, lineage: Mapping[str, Any], decision: Decision) -> dict[str, Any]:
    """Return what a version tells of itself in the registry; every tag each time, so that none is out of date."""
    from pipeline.stages.gate import TEST_TAG

    tags: dict[str, Any] = {
        "data.fingerprint": lineage["data"]["fingerprint"],
        "run": run.settings.name,
        "teachers": ", ".join(lineage["teachers"]) or "none",
        GATE_TAG: decision.gate,
        WHY_TAG: decision.why,
        AGAINST_TAG: decision.against,
        TEST_TAG: decision.test_fingerprint or "none",
        "accuracy": decision.accuracy,
    }
    for hurdle in decision.hurdles:
        gap = hurdle.difference
        told = hurdle.outcome if gap is None else f"{100 * gap:+.2f} points"
        tags[f"difference.{hurdle.against.replace(' ', '_')}"] = told
    return tags


def _promote(run: Run, registry: Registry, found: RegisteredStudent, decision: Decision) -> bool:
    """Let the champion's alias point to a version that has passed; say whether it does."""
    from pipeline.tracking.champion import promote

    if decision.gate != PASSED:
        return False
    settings = run.settings.registration
    try:
        promote(registry, f"models:/{found.name}/{found.version}", alias=settings.champion)
    except FacultyError as error:  # another run has promoted its own meanwhile: the next call compares with that one
        run.display.warn(str(error))
        return False
    return True


def _champion_for(run: Run) -> str:
    """Return the version that the student is to be compared with, or ``none``.

    That is the champion; but where this run's own student is the champion, what it was compared with when it was
    registered: having been promoted does not make its registration stale. While the store does not answer, what was
    found the last time holds.
    """
    from pipeline.tracking.versions import by_alias, open_registry

    settings = run.settings.registration
    records = _registrations(run)
    if not _may_have_versions(run):
        return NOBODY
    try:
        champion = by_alias(open_registry(run.settings.tracking, run.files.root), settings.name, settings.champion)
    except FacultyError:
        return records[-1]["inputs"]["champion"] if records else NOBODY
    if champion is None:
        return NOBODY
    for record in reversed(records):
        if record["summary"].get("version") == champion.number:
            return record["inputs"]["champion"]
    return champion.number


def _may_have_versions(run: Run) -> bool:
    """Return False where MLflow need not be asked: there is no registry, or not yet."""
    from pipeline.tracking.connect import find_store
    from pipeline.tracking.versions import exists

    store = find_store(run.settings.tracking, run.files.root)
    return store.kind not in ("none", "jsonl") and exists(store)


def _registrations(run: Run) -> list[dict[str, Any]]:
    """Return what was recorded when this very student was registered under the same name, oldest first."""
    found = []
    for path in (run.files.root / "register").glob("*/stage.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            inputs = record["inputs"]
            own = inputs["distill.digest"] == run.records["distill"].digest
            if own and inputs["register.name"] == run.settings.registration.name and "champion" in inputs:
                found.append(record)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # cut off, or of an older version
    return sorted(found, key=lambda record: record["finished"])
