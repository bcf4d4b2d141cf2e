"""Stage register: the student becomes a version of a registered model, with its lineage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.stages.artefacts import digest_of, write_json, write_text
from pipeline.stages.base import Outcome, Run
from pipeline.stages.heads import student_classes
from pipeline.stages.ingest import table_path

_EXAMPLE = 4


class Register:
    """Student and evaluation → a model version, `registered.json`, `model_card.md`."""

    name = "register"
    version = 1
    needs = ("ingest", "assess", "select", "amalgamate", "distill", "evaluate")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the model's name and alias, and the store it goes to."""
        from pipeline.tracking.connect import find_store

        return {
            "register": run.settings.registration.model_dump(mode="json", exclude={"enabled"}),
            "licences": {name: run.zoo[name].licence for name in run.zoo.names},
            "store": find_store(run.settings.tracking, run.files.root).shown,
        }

    def run(self, run: Run, folder: Path) -> Outcome:
        """Export and register; the same content again adds no version."""
        from pipeline.data.table import ImageTable
        from pipeline.engine.arms import TAUGHT
        from pipeline.models.student import load_student
        from pipeline.tracking.registry import register_student

        settings = run.settings.registration
        student = load_student(run.folder("distill"), trusted_factories=None)
        table = ImageTable.open(str(table_path(run)))
        lineage = _lineage(run)
        card = model_card(run, lineage)
        write_text(folder / "model_card.md", card)
        with run.display.working("exporting and registering"):
            found = register_student(
                run.tracker,
                student=student,
                example=table.split(*TAUGHT).images(slice(0, _EXAMPLE)).numpy(),
                classes=student_classes(run),
                name=settings.name,
                alias=settings.alias,
                tags={"data.fingerprint": table.fingerprint, "run": run.settings.name},
                metadata=lineage,
                model_card=card,
            )
        details = {"name": found.name, "version": found.version, "alias": found.alias, "uri": found.uri}
        write_json(folder / "registered.json", details | {"lineage": lineage})
        return Outcome(digest=digest_of(details), summary={**details, "created": found.created})


def _lineage(run: Run) -> dict[str, Any]:
    choice = json.loads((run.folder("select") / "faculty.json").read_text(encoding="utf-8"))
    return {
        "data": {"fingerprint": run.records["ingest"].digest},
        "teachers": {
            name: {"fingerprint": run.fingerprint(name), "licence": run.zoo[name].licence} for name in choice["chosen"]
        },
        "stages": {name: run.records[name].key for name in ("ingest", "assess", "select", "amalgamate", "distill")},
    }


def model_card(run: Run, lineage: Mapping[str, Any]) -> str:
    """Return the model's description in Markdown: data, teachers, results against the controls, limits."""
    settings, ingest = run.settings, run.records["ingest"].summary
    evaluation = json.loads((run.folder("evaluate") / "evaluation.json").read_text(encoding="utf-8"))
    classes = student_classes(run)
    lines = [
        f"# {settings.registration.name}",
        "",
        f"Image classifier with {len(classes)} classes: {', '.join(classes[:50])}{' …' if len(classes) > 50 else ''}.",
        f"Input: raw uint8 images (B, {', '.join(map(str, settings.task.image.shape))}); preprocessing is inside. "
        "Output: logits.",
        "",
        "## Data",
        "",
        f"Fingerprint `{lineage['data']['fingerprint']}`. Images: "
        + ", ".join(f"{name} {ingest[name]}" for name in ("train_labelled", "train_unlabelled", "validation", "test"))
        + ".",
        "",
        "## Teachers",
        "",
    ]
    lines += [
        f"- {name}: licence {details['licence'] or 'not stated'}, fingerprint `{details['fingerprint'][:16]}`"
        for name, details in lineage["teachers"].items()
    ] or ["None: no teacher helped on the labelled images."]
    lines += ["", "## Test accuracy", "", "| taught by | seeds | accuracy, % | ECE |", "|---|---|---|---|"]
    lines += [
        f"| {arm['title']} | {len(arm['accuracies'])} | {100 * arm['mean']:.1f} ± {100 * arm['std']:.1f} "
        f"| {arm['ece']:.3f} |"
        for arm in evaluation["arms"]
    ]
    lines += ["", f"{evaluation['verdict']}.", "", "## Limits", ""]
    if evaluation["arms"]:
        first = evaluation["arms"][0]["first"]["per_class"]
        weakest = sorted(first.items(), key=lambda item: item[1])[:3]
        lines.append(
            f"Weakest classes: {', '.join(f'{name} {100 * value:.0f} %' for name, value in weakest)}. "
            "Measured on the test split of the same source; other images may give other results."
        )
    lines.append("")
    return "\n".join(lines)
